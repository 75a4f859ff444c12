"""Draws synthetic mammograms with their masks, for the demo and for tests, without patient data.

The module writes plain images, like any data source, and does not depend on datasets. The look
follows the INbreast images (Moreira et al., 2012, doi:10.1016/j.acra.2011.09.014): an oblique or
craniocaudal view, strands of glandular tissue, vessels, calcifications, pectoral muscle, and masses
with lobes or spicules. Brightness alone does not find a mass: muscle, glandular islands and
calcifications are as bright.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.imaging.codecs import encode_png
from data_prep.masks.color_map import DEFAULT_CLASSES
from data_prep.masks.reading import to_colors
from flexunet.errors import UsageError
from flexunet.storage import open_store

Plane = npt.NDArray[np.float32]
"""(size, size) float32, brightness 0..1 or a weight."""
Flags = npt.NDArray[np.bool_]

MIN_SIZE = 32

_LESION_FREE = 0.1  # share of images without a mass
_TWO_LESIONS = 0.15
_FAINT = 0.1
_SMALL = 0.1


@dataclass(frozen=True)
class _Canvas:
    """The tissue of one view, chest wall on the left; lengths are fractions of the size."""

    breast: Flags
    depth: Plane  # distance from the skin
    glands: Plane  # 0..1: amount of glandular tissue
    strands: Plane  # 0..1: fine structure of the glandular tissue


@dataclass(frozen=True)
class View:
    """One view of a breast, chest wall on the left.

    Attributes:
        image: brightness; the detector clips it to 0..1.
        mask: the pixels of masses.
        outlines: outline of each mass, (N, 2) x, y as fractions of the size.
        marks: some points in the tissue, x, y as fractions of the size.
    """

    image: Plane
    mask: Flags
    outlines: tuple[npt.NDArray[np.float64], ...]
    marks: tuple[tuple[float, float], ...]


def make_phantom(
    seed: int, index: int, size: int = 512, *, patient: int | None = None
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Returns an image (size, size) uint8 and its mask (size, size) uint8 of 0 and 1.

    The same arguments give the same pixels. Views of one patient share outline and glandular
    tissue, so that samples of a patient in two splits would leak.

    Args:
        index: number of the image; every index gives another view with other masses.
        size: side in pixels, at least 32.
        patient: number of the patient; None: each image has its own patient.

    Raises:
        ValueError: the size is too small.
    """
    body = np.random.default_rng([seed, 0, index if patient is None else patient])
    rng = np.random.default_rng([seed, 1, index])
    is_oblique = bool(rng.random() < 0.6)
    view = draw_view(body, rng, size, is_oblique=is_oblique)
    image, mask = view.image, view.mask
    is_right = bool(rng.random() < 0.5)
    if is_right:
        image, mask = image[:, ::-1], mask[:, ::-1]
    pixels = np.round(np.clip(image, 0, 1) * 255).astype(np.uint8)
    _stamp_label(pixels, is_right=is_right, is_oblique=is_oblique)
    return pixels, mask.astype(np.uint8)


def draw_view(
    body: np.random.Generator,
    rng: np.random.Generator,
    size: int,
    *,
    is_oblique: bool,
    num_masses: int | None = None,
    num_marks: int = 0,
) -> View:
    """Draws a view of (size, size) pixels.

    Args:
        body: random generator of everything that all views of a patient share.
        rng: random generator of the rest.
        num_masses: None: random.

    Raises:
        ValueError: the size is too small.
    """
    if size < MIN_SIZE:
        raise ValueError(f"size {size} is too small for a phantom; give at least {MIN_SIZE}")
    canvas = _draw_breast(body, size, is_oblique)
    image = _tissue(rng, canvas, is_oblique)
    mask = np.zeros((size, size), bool)
    outlines = []
    image = _add_distractors(rng, image, canvas)
    for _ in range(_num_lesions(rng) if num_masses is None else num_masses):
        image, lesion, outline = _add_lesion(rng, image, canvas)
        mask |= lesion
        outlines.append(outline)
    image = _develop(rng, image, canvas)
    marks = [_place(rng, canvas, 0.04)[::-1] for _ in range(num_marks)]
    return View(image, mask, tuple(outlines), tuple(marks))


def write_phantoms(
    folder: str, num_images: int, size: int, seed: int, *, num_patients: int | None = None
) -> None:
    """Writes images like `images/phantom-p007-1.png`, and black and white masks to `masks/`.

    Args:
        folder: path or storage URL.
        num_patients: number of patients; None: one per image.

    Raises:
        UsageError: more patients than images, or the folder contains other files.
    """
    num_patients = num_images if num_patients is None else num_patients
    if not 1 <= num_patients <= num_images:
        raise UsageError(
            f"--num-patients={num_patients}: give a number from 1 to --num-images ({num_images})"
        )
    store = open_store(folder)
    patients = [i * num_patients // num_images for i in range(num_images)]
    names = [f"phantom-p{p:03d}-{i - patients.index(p) + 1}.png" for i, p in enumerate(patients)]
    ours = {f"{place}/{name}" for place in ("images", "masks") for name in names}
    for place in ("images/", "masks/"):
        for stat in store.list(place):
            if stat.name not in ours:
                raise UsageError(
                    f"{store.url}/{stat.name} exists already and is not one of these phantoms; "
                    "choose another folder"
                )
    for i, name in enumerate(names):
        image, mask = make_phantom(seed, i, size, patient=patients[i])
        store.put(f"images/{name}", encode_png(image))
        store.put(f"masks/{name}", encode_png(to_colors(mask, DEFAULT_CLASSES)))


def _num_lesions(rng: np.random.Generator) -> int:
    draw = rng.random()
    return 0 if draw < _LESION_FREE else 2 if draw > 1 - _TWO_LESIONS else 1


def _grid(size: int) -> tuple[Plane, Plane]:
    """Returns the pixel centres y (size, 1) and x (1, size) in 0..1."""
    line = ((np.arange(size) + 0.5) / size).astype(np.float32)
    return line[:, np.newaxis], line[np.newaxis]


def _noise(
    rng: np.random.Generator, size: int, cells: int, *, octaves: int, aspect: float = 1
) -> Plane:
    """Returns smooth noise of mean 0 and deviation about 1, (size, size).

    Args:
        cells: bumps along a side in the coarsest octave; each octave has twice as many, half as
            high.
        aspect: width of the bumps divided by their height.
    """
    import cv2

    total = np.zeros((size, size), np.float32)
    for octave in range(octaves):
        number = cells * 2**octave
        shape = (round(number * aspect) + 1, number + 1)
        coarse = rng.standard_normal(shape).astype(np.float32)
        total += cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC) / 2**octave
    return total


def _draw_breast(rng: np.random.Generator, size: int, is_oblique: bool) -> _Canvas:
    import cv2

    y, x = _grid(size)
    centre = rng.uniform(0.5, 0.62) if is_oblique else rng.uniform(0.46, 0.54)
    below = rng.uniform(0.3, 0.36) if is_oblique else rng.uniform(0.36, 0.44)
    above = rng.uniform(0.7, 0.95) if is_oblique else below * rng.uniform(0.95, 1.1)
    width = rng.uniform(0.42, 0.6)
    reach = np.abs(y - centre) / np.where(y < centre, above, below)
    outline = width * np.sqrt(np.clip(1 - reach ** rng.uniform(1.8, 2.4), 0, 1))
    breast = x < outline
    nipple = rng.uniform(0.014, 0.022)
    breast |= (x - width) ** 2 + (y - centre) ** 2 < nipple**2
    # The chest wall is no skin: columns of tissue are added on its side.
    padded = np.pad(breast.astype(np.uint8), ((0, 0), (size // 4, 0)), mode="edge")
    depth = cv2.distanceTransform(padded, cv2.DIST_L2, 5)[:, size // 4 :] / np.float32(size)
    density = rng.uniform(-0.35, 0.55)
    middle = ((x - width * 0.58) / (width * 0.42)) ** 2 + ((y - centre) / (below * 0.75)) ** 2
    field = density + 1.1 - middle + 0.5 * _noise(rng, size, 4, octaves=3)
    glands = 1 / (1 + np.exp(-3 * field)) * np.clip(depth / 0.05 - 0.3, 0, 1)
    # Strands are ridges of noise along the ducts, interrupted by coarser noise.
    strands = np.zeros((size, size), np.float32)
    for cells, power in ((7, 3), (15, 2), (31, 2)):
        ridges = np.clip(1 - np.abs(_noise(rng, size, cells, octaves=3, aspect=1.5)), 0, 1)
        weight = np.clip(0.6 + 0.5 * _noise(rng, size, cells, octaves=1), 0, 1)
        strands += 0.45 * weight * ridges**power
    clouds = np.clip(0.5 + 0.3 * _noise(rng, size, 8, octaves=4), 0, 1)
    strands = np.clip(strands, 0, 1) * (0.4 + 0.6 * clouds)
    return _Canvas(breast, depth, glands.astype(np.float32), strands.astype(np.float32))


def _tissue(rng: np.random.Generator, canvas: _Canvas, is_oblique: bool) -> Plane:
    """Returns the brightness of fat, glands, skin, and muscle in an oblique view."""
    size = len(canvas.depth)
    fat = rng.uniform(0.26, 0.36) * (1 - np.exp(-(canvas.depth + 0.012) / 0.035))
    fat += 0.016 * _noise(rng, size, 9, octaves=4)
    glandular = canvas.glands * (0.03 + 0.4 * canvas.strands)
    skin = 0.1 * np.exp(-(((canvas.depth - 0.006) / 0.005) ** 2))
    image = fat + glandular + 0.09 * canvas.strands + skin
    if is_oblique:
        y, x = _grid(size)
        wide, high = rng.uniform(0.2, 0.34), rng.uniform(0.42, 0.75)
        edge = wide * (1 - y / high) + 0.03 * np.sin(3 * y + rng.uniform(0, 6)) - x
        muscle = 1 / (1 + np.exp(-np.clip(edge / 0.006, -30, 30)))
        image += muscle * (rng.uniform(0.14, 0.24) + 0.02 * _noise(rng, size, 6, octaves=3))
    return np.where(canvas.breast, np.maximum(image, 0.05), 0).astype(np.float32)


def _add_distractors(rng: np.random.Generator, image: Plane, canvas: _Canvas) -> Plane:
    """Adds glandular islands, vessels and calcifications to the image; none is a mass."""
    import cv2

    size = len(image)
    y, x = _grid(size)
    for _ in range(rng.integers(1, 5)):
        row, column = _place(rng, canvas, 0.05)
        high, wide = rng.uniform(0.02, 0.05), rng.uniform(0.04, 0.1)
        island = np.exp(-(((y - row) / high) ** 2) - ((x - column) / wide) ** 2)
        image = image + rng.uniform(0.08, 0.2) * island * (0.3 + canvas.strands)
    vessels = np.zeros((size, size), np.float32)
    for _ in range(rng.integers(2, 6)):
        row, slope, bend = rng.uniform(0.2, 0.85), rng.uniform(-0.5, 0.5), rng.uniform(-0.6, 0.6)
        along = np.linspace(rng.uniform(0, 0.15), rng.uniform(0.3, 0.6), 24)
        wave = 0.008 * np.sin(along * 40 + rng.uniform(0, 6))
        points = np.stack([along, row + slope * along + bend * along**2 + wave], axis=1) * size
        width = max(1, round(size * rng.uniform(0.003, 0.007)))
        cv2.polylines(vessels, [points.astype(np.int32)], False, rng.uniform(0.06, 0.14), width)
    image = image + cv2.GaussianBlur(vessels, (0, 0), size / 400)
    dots = np.zeros((size, size), np.float32)
    row, column = _place(rng, canvas, 0.05)
    for _ in range(rng.integers(0, 16)):
        centre = np.array([column, row]) + rng.normal(0, 0.03, 2)
        at = (int(centre[0] * size), int(centre[1] * size))
        cv2.circle(dots, at, round(size * rng.uniform(0, 0.004)), rng.uniform(0.15, 0.45), -1)
    image = image + cv2.GaussianBlur(dots, (0, 0), size / 700)
    return np.where(canvas.breast, image, 0).astype(np.float32)


def _place(rng: np.random.Generator, canvas: _Canvas, margin: float) -> tuple[float, float]:
    """Returns (y, x) of a random place at least `margin` from skin and border."""
    size = len(canvas.depth)
    y, x = _grid(size)
    inside = (x > margin) & (y > margin) & (y < 1 - margin)
    allowed = np.argwhere((canvas.depth > margin) & inside)
    row, column = allowed[rng.integers(len(allowed))]
    return (row + 0.5) / size, (column + 0.5) / size


def _add_lesion(
    rng: np.random.Generator, image: Plane, canvas: _Canvas
) -> tuple[Plane, Flags, npt.NDArray[np.float64]]:
    """Adds one mass; returns the image, the pixels of the mass, and its outline as in `View`.

    The spicules around it fade into the tissue and are not part of the mask.
    """
    import cv2

    size = len(image)
    y, x = _grid(size)
    diameter = rng.uniform(0.03, 0.06) if rng.random() < _SMALL else rng.uniform(0.065, 0.12)
    radius = diameter / 2
    row, column = _place(rng, canvas, radius + 0.02)
    angle, distance = np.arctan2(y - row, x - column), np.hypot(y - row, x - column)
    lobes = [(n, rng.normal(0, 0.28 / n), rng.uniform(0, 2 * np.pi)) for n in range(2, 8)]
    outline = radius * _lobed(angle, lobes)
    around = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    reach = radius * _lobed(around, lobes)
    points = np.stack([column + reach * np.cos(around), row + reach * np.sin(around)], axis=1)
    is_faint = rng.random() < _FAINT
    contrast = rng.uniform(0.16, 0.22) if is_faint else rng.uniform(0.26, 0.42)
    soft = 1 / (1 + np.exp(np.clip((distance - outline) / (0.08 * radius + 0.001), -30, 30)))
    texture = 0.85 + 0.1 * _noise(rng, size, 24, octaves=2) + 0.25 * (1 - distance / outline)
    image = image + contrast * soft * np.clip(texture, 0.5, 1.3)
    rays = np.zeros((size, size), np.float32)
    for _ in range(rng.integers(6, 20) if rng.random() < 0.5 else 0):
        direction, length = rng.uniform(0, 2 * np.pi), radius * rng.uniform(1.2, 2.2)
        tip = (column + length * np.cos(direction), row + length * np.sin(direction))
        ends = [(int(u * size), int(v * size)) for u, v in ((column, row), tip)]
        cv2.line(rays, ends[0], ends[1], 0.4 * contrast, max(1, size // 256))
    rays = cv2.GaussianBlur(rays, (0, 0), size / 400) * np.exp(-distance / (1.2 * radius))
    image = np.where(canvas.breast, image + rays * (1 - soft), 0)
    return image.astype(np.float32), distance < outline, points


def _lobed(angle: npt.NDArray[Any], lobes: Sequence[tuple[int, float, float]]) -> npt.NDArray[Any]:
    """Returns the distance of an outline from its centre at each angle, about 1; dtype kept."""
    outline = np.ones_like(angle)
    for waves, height, phase in lobes:
        outline += height * np.cos(waves * angle + phase)
    return np.clip(outline, 0.55, 1.5)


def _develop(rng: np.random.Generator, image: Plane, canvas: _Canvas) -> Plane:
    """Returns the image with the exposure, blur and grain of a detector."""
    import cv2

    size = len(image)
    exposed = np.clip(image, 0, 1.2) ** rng.uniform(0.85, 1.2) * rng.uniform(0.9, 1.25)
    # Bright values saturate gradually instead of being clipped.
    exposed = np.where(exposed > 0.7, 0.7 + 0.3 * np.tanh((exposed - 0.7) / 0.3), exposed)
    blurred = cv2.GaussianBlur(exposed.astype(np.float32), (0, 0), size / 900)
    grain = rng.normal(0, 1, (size, size)).astype(np.float32)
    return blurred + grain * np.where(canvas.breast, np.float32(0.016), np.float32(0.002))


def _stamp_label(pixels: npt.NDArray[np.uint8], *, is_right: bool, is_oblique: bool) -> None:
    """Writes side and view into the upper corner away from the breast, as on film."""
    import cv2

    size = len(pixels)
    text = f"{'R' if is_right else 'L'} {'MLO' if is_oblique else 'CC'}"
    scale = size / 700
    (width, height), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, 1)
    left = size // 25 if is_right else size - size // 25 - width
    at = (left, size // 25 + height)
    cv2.putText(pixels, text, at, cv2.FONT_HERSHEY_SIMPLEX, scale, 200, 1, cv2.LINE_AA)
