"""Draws random masks with known classes, and changes them as resampling and compression do."""

from collections.abc import Callable

import cv2
import numpy as np
import numpy.typing as npt

from data_prep.masks.color_map import ClassColor

Colors = npt.NDArray[np.int64]
Ids = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.uint8]


def random_classes(
    rng: np.random.Generator, number: int, distance: int = 80
) -> tuple[ClassColor, ...]:
    """Returns black and `number` - 1 colours; all differ by `distance` levels in a channel."""
    colors = [np.zeros(3, np.int64)]
    while len(colors) < number:
        color = rng.integers(0, 256, 3)
        if min(np.abs(color - other).max() for other in colors) >= distance:
            colors.append(color)
    return tuple(
        ClassColor(i, f"c{i}", (int(r), int(g), int(b))) for i, (r, g, b) in enumerate(colors)
    )


def colors_of(classes: tuple[ClassColor, ...]) -> Colors:
    """Returns the colours (K, 3)."""
    return np.array([entry.color for entry in classes])


def far_color(rng: np.random.Generator, colors: Colors) -> npt.NDArray[np.int64]:
    """Returns a colour (3,) that is no class, no noise of one, and no blend of two."""
    while True:
        color = rng.integers(0, 256, 3)
        ends = [(a, b - a) for i, a in enumerate(colors) for b in colors[i + 1 :]]
        positions = [np.clip((color - a) @ d / (d @ d), 0, 1) for a, d in ends]
        distances = [
            np.linalg.norm(a + p * d - color) for (a, d), p in zip(ends, positions, strict=True)
        ]
        if min(distances) > 70:
            return color


def random_ids(rng: np.random.Generator, number: int, side: int = 96) -> Ids:
    """Returns (side, side) ids with a few large ellipses of each class on background."""
    ids = np.zeros((side, side), np.uint8)
    for _ in range(2 * number):
        center = tuple(int(each) for each in rng.integers(0, side, 2))
        axes = tuple(int(each) for each in rng.integers(8, side // 4, 2))
        class_id = int(rng.integers(0, number))
        cv2.ellipse(ids, center, axes, float(rng.integers(0, 180)), 0, 360, class_id, -1)
    return ids


def resized(scale: float, method: int) -> Callable[[Mask], Mask]:
    """Returns a function that resizes a mask by `scale` with an OpenCV interpolation."""

    def resize(mask: Mask) -> Mask:
        height, width = (round(side * scale) for side in mask.shape[:2])
        return np.asarray(cv2.resize(mask, (width, height), interpolation=method), np.uint8)

    return resize


def compressed(quality: int) -> Callable[[Mask], Mask]:
    """Returns a function that compresses an RGB mask as JPEG."""

    def compress(mask: Mask) -> Mask:
        options = [cv2.IMWRITE_JPEG_QUALITY, quality]
        _, data = cv2.imencode(".jpg", mask[..., ::-1], options)
        return np.ascontiguousarray(cv2.imdecode(data, cv2.IMREAD_COLOR)[..., ::-1])

    return compress


def present_within(ids: Ids, number: int, radius: int) -> npt.NDArray[np.bool_]:
    """Returns whether each class occurs within `radius` pixels: (number, H, W)."""
    square = np.ones((2 * radius + 1,) * 2, np.uint8)
    return np.stack([cv2.dilate((ids == i).view(np.uint8), square) > 0 for i in range(number)])
