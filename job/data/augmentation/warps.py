"""Moves the pixels of an image and its mask at random, by one field of source coordinates.

All drawn kinds form one field, so that each sample is interpolated once: the image linearly, the
mask by nearest neighbour. The image is flipped, rotated, sheared and shrunk, then bulged, moved by
the random fields, scaled, and cropped; the coordinates go through these changes in reverse order.

Pixels from outside the image are 0: black, and class 0; or image and mask continue as in a mirror.
The random fields repeat the edge, since tissue at the border would otherwise get black notches.
Scaling always continues as in a mirror, so that no pixel gets a class that nobody annotated.
"""

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from data_prep.imaging.pixels import by_channels
from job.config import AugmentationConfig
from job.data.augmentation.draws import DrawnRange, Draws, drawn_range
from job.data.random_streams import Purpose

Pixels: TypeAlias = npt.NDArray[Any]  # uint8 or uint16
Field: TypeAlias = npt.NDArray[np.float32]  # (2, H, W): x and y, pixels
# x and y of points in pixels, each broadcastable to (H, W): an undistorted grid is one row and one
# column.
Points: TypeAlias = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]

# A field smoothed with sigma is drawn at a spacing of sigma / 4 and interpolated: far fewer numbers
# (1 / 4 at sigma 8, 1 / 100 at sigma 40), and no visible kinks.
_CELLS_PER_SIGMA = 4
_AFFINE = frozenset({"hflip", "vflip", "rotation", "shrink", "shear"})
_MOVING = _AFFINE | {"deformation", "distortion", "barrel", "pincushion"}


def _pick(options: tuple[float, ...], number: float) -> float:
    return options[int(number * len(options))]


def source_points(
    shape: tuple[int, ...],
    drawn: set[str],
    picks: dict[str, float],
    config: AugmentationConfig,
    draws: Draws,
) -> Points | None:
    """Returns the source coordinates of each pixel of the result; None if nothing moves.

    Args:
        shape: (H, W).
        drawn: the kinds without a stream of their own that apply.
        picks: for each of them a number in [0, 1), which selects the amount.
    """
    scale = drawn_range(draws, Purpose.SCALE, config, "scale")
    crop = drawn_range(draws, Purpose.CROP, config, "crop")
    if not drawn & _MOVING and scale is None and crop is None:
        return None
    height, width = shape
    points = (
        np.arange(width, dtype=np.float32)[np.newaxis, :],
        np.arange(height, dtype=np.float32)[:, np.newaxis],
    )
    if crop is not None:
        points = _cropped(points, crop, config.crop_aspects)
    if scale is not None:
        points = _scaled(points, scale)
    points = _moved_by_random_fields(points, drawn, picks, config, draws)
    for kind in ("pincushion", "barrel"):
        if kind in drawn:
            centers = getattr(config, f"{kind}_centers")
            i = 2 * int(picks[kind] * (len(centers) // 2))
            center = (centers[i] * width, centers[i + 1] * height)
            radius = getattr(config, f"{kind}_radius") * width
            points = _bulged(points, center, radius, getattr(config, f"{kind}_amount"))
    if drawn & _AFFINE:
        points = _transformed(points, _affine(drawn, picks, config), (height, width))
    return points


def _cropped(points: Points, crop: DrawnRange, aspects: tuple[float, float]) -> Points:
    """Returns the points of a random crop, enlarged to the whole image.

    Args:
        crop: draws the share of the area.
        aspects: limits of the ratio of width to height; 1 is that of the image.
    """
    area, generator = crop.uniform(), crop.generator
    aspect = aspects[0] * (aspects[1] / aspects[0]) ** generator.random()
    shares = min(1.0, np.sqrt(area * aspect)), min(1.0, np.sqrt(area / aspect))
    found = []
    for along, share in zip(points, shares, strict=True):
        start = (1 - share) * along.size * generator.random()
        # Pixels are areas: the outer half of a border pixel has no neighbour to mix with.
        source = (along + np.float32(0.5)) * np.float32(share) + np.float32(start - 0.5)
        found.append(np.clip(source, 0, along.size - 1))
    return found[0], found[1]


def _scaled(points: Points, scale: DrawnRange) -> Points:
    """Returns points further from a random point, or nearer to it; mirrored at the border."""
    ratio, found = scale.log_uniform(), []
    for along in points:
        last = along.size - 1
        center = last * scale.generator.random()
        found.append(
            _mirrored((along - np.float32(center)) / np.float32(ratio) + np.float32(center), last)
        )
    return found[0], found[1]


def _mirrored(values: npt.NDArray[np.float32], last: int) -> npt.NDArray[np.float32]:
    """Returns coordinates in [0, last]; those outside are mirrored at the outer pixels."""
    if last == 0:
        return np.zeros_like(values)
    return np.float32(last) - np.abs(np.mod(values, np.float32(2 * last)) - np.float32(last))


def _moved_by_random_fields(
    points: Points,
    drawn: set[str],
    picks: dict[str, float],
    config: AugmentationConfig,
    draws: Draws,
) -> Points:
    x, y = points
    height, width = y.size, x.size
    fields = []
    if "deformation" in drawn:
        sigma = _pick(config.deformation_sigmas, picks["deformation"])
        rng = draws(Purpose.DEFORMATION)
        fields.append(elastic_field(height, width, config.deformation_alpha, sigma, rng))
    if "distortion" in drawn:
        shift = _pick(config.distortion_sizes, picks["distortion"]) * max(height, width)
        rng = draws(Purpose.DISTORTION)
        fields.append(distortion_field(height, width, shift, config.distortion_sigma, rng))
    if not fields:
        return points
    moved = fields[0]
    for field in fields[1:]:
        moved += field
    moved[0] += x
    moved[1] += y
    np.clip(moved[0], 0, width - 1, out=moved[0])
    np.clip(moved[1], 0, height - 1, out=moved[1])
    return moved[0], moved[1]


def elastic_field(
    height: int, width: int, alpha: float, sigma: float, rng: np.random.Generator
) -> Field:
    """Returns an elastic displacement field: (2, height, width) float32, pixels.

    Uniform noise in [-1, 1], smoothed with a Gaussian of `sigma` and multiplied by `alpha`, has the
    standard deviation alpha / sqrt(3) / (2 sqrt(pi) sigma). The reference implementation smooths
    over the three channels too, which multiplies it by sqrt(k(-1)^2 + k(0)^2 + k(1)^2) of the
    one-dimensional Gaussian k. This function draws a field of that strength, the same for all
    channels: 2.3 pixels for alpha 1300 and sigma 8. Simard's formula alone would give 26.

    Source: Simard, Steinkraus, Platt 2003, doi:10.1109/ICDAR.2003.1227801.
    """
    offsets = np.arange(-1, 2)
    kernel = np.exp(-(offsets**2) / (2 * sigma**2)) / (sigma * np.sqrt(2 * np.pi))
    strength = alpha / np.sqrt(3) / (2 * np.sqrt(np.pi) * sigma) * np.sqrt(np.sum(kernel**2))
    spacing = max(1.0, sigma / _CELLS_PER_SIGMA)
    cells = _cells(height, width, spacing)
    fields = [_smooth_noise(*cells, sigma / spacing, rng) for _ in range(2)]
    return _resized(np.stack(fields) * np.float32(strength), height, width)


def distortion_field(
    height: int, width: int, shift: float, sigma: float, rng: np.random.Generator
) -> Field:
    """Returns a wide smooth displacement field: (2, height, width) float32, pixels.

    The field is the gradient of Gaussian noise smoothed with `sigma`. x and y are each scaled to a
    largest absolute shift of `shift` pixels.
    """
    spacing = max(1.0, sigma / _CELLS_PER_SIGMA)
    potential = _smooth_noise(*_cells(height, width, spacing), sigma / spacing, rng)
    along_y, along_x = np.gradient(potential)
    fields = [field * (shift / np.abs(field).max()) for field in (along_x, along_y)]
    return _resized(np.stack(fields), height, width)


def _cells(height: int, width: int, spacing: float) -> tuple[int, int]:
    """Returns the size of the coarse grid; at least 2 cells a side, as the gradient needs."""
    return max(2, int(np.ceil(height / spacing))), max(2, int(np.ceil(width / spacing)))


def _smooth_noise(
    height: int, width: int, sigma: float, rng: np.random.Generator
) -> npt.NDArray[np.float32]:
    """Returns stationary noise of standard deviation 1, smoothed with `sigma`: (height, width)."""
    import cv2

    margin = int(np.ceil(3 * sigma))
    noise = rng.standard_normal((height + 2 * margin, width + 2 * margin), dtype=np.float32)
    kernel = cv2.getGaussianKernel(2 * margin + 1, sigma, cv2.CV_32F)
    smooth = cv2.sepFilter2D(noise, -1, kernel, kernel)
    inside = smooth[margin : margin + height, margin : margin + width]
    return np.asarray(inside / np.sum(kernel**2), np.float32)


def _resized(fields: Field, height: int, width: int) -> Field:
    import cv2

    resized = np.empty((2, height, width), np.float32)
    for field, target in zip(fields, resized, strict=True):
        cv2.resize(field, (width, height), dst=target, interpolation=cv2.INTER_LINEAR)
    return resized


def _bulged(points: Points, center: tuple[float, float], radius: float, amount: float) -> Points:
    """Returns `points` with those in the circle moved to (amount > 0) or from its centre.

    The distance d from the centre is multiplied by sin(pi d / (2 radius)) ** amount, which is 1 on
    the circle.
    """
    x, y = np.broadcast_arrays(*points)
    x, y = x.copy(), y.copy()
    dx, dy = x - np.float32(center[0]), y - np.float32(center[1])
    squared = dx * dx + dy * dy
    inside = (squared < radius**2) & (squared > 0)
    dx, dy = dx[inside], dy[inside]
    angle = np.sqrt(squared[inside]) * np.float32(np.pi / 2 / radius)
    factor = np.sin(angle) ** np.float32(amount)
    x[inside] = np.float32(center[0]) + factor * dx
    y[inside] = np.float32(center[1]) + factor * dy
    return x, y


def _affine(
    drawn: set[str], picks: dict[str, float], config: AugmentationConfig
) -> npt.NDArray[np.float64]:
    """Returns the (2, 2) matrix about the centre that maps result to sample coordinates."""
    matrix = np.eye(2)
    if "hflip" in drawn:
        matrix = matrix @ np.diag([-1.0, 1.0])
    if "vflip" in drawn:
        matrix = matrix @ np.diag([1.0, -1.0])
    if "rotation" in drawn:
        turn = np.deg2rad(_pick(config.rotation_angles, picks["rotation"]))
        # y points down, so this turns the image anticlockwise. Rounding makes 90 degrees exact.
        cos, sin = np.round(np.cos(turn), 15), np.round(np.sin(turn), 15)
        matrix = matrix @ np.array([[cos, -sin], [sin, cos]])
    if "shear" in drawn:
        matrix = matrix @ np.array([[1, _pick(config.shear_factors, picks["shear"])], [0, 1]])
    if "shrink" in drawn:
        matrix = matrix / _pick(config.shrink_ratios, picks["shrink"])
    return matrix


def _transformed(points: Points, matrix: npt.NDArray[np.float64], shape: tuple[int, int]) -> Points:
    height, width = shape
    center = np.array([(width - 1) / 2, (height - 1) / 2])
    shift = (center - matrix @ center).astype(np.float32)
    (a, b), (c, d) = matrix.astype(np.float32)
    x, y = points
    return a * x + (b * y + shift[0]), c * x + (d * y + shift[1])


def warped(
    image: Pixels, mask: npt.NDArray[np.uint8], source: Points, *, is_mirrored: bool
) -> tuple[Pixels, npt.NDArray[np.uint8]]:
    """Returns image and mask with the pixels at the source points.

    Args:
        is_mirrored: beyond the border they continue as in a mirror; else they are 0.
    """
    import cv2

    x, y = (np.ascontiguousarray(part) for part in np.broadcast_arrays(*source))
    border = cv2.BORDER_REFLECT_101 if is_mirrored else cv2.BORDER_CONSTANT

    def moved(part: Pixels) -> Pixels:
        return cv2.remap(part, x, y, cv2.INTER_LINEAR, borderMode=border, borderValue=0)

    warped_image = by_channels(moved, image)
    warped_mask = cv2.remap(mask, x, y, cv2.INTER_NEAREST, borderMode=border, borderValue=0)
    return warped_image.reshape(image.shape), warped_mask.astype(np.uint8, copy=False)
