"""Tiny pictures for tests: a bright disc on noise, and its mask."""

from pathlib import Path

import cv2
import numpy as np

from data_prep.config import PrepConfig
from data_prep.pipeline import prepare
from data_prep.sources.pairs import find_sources


def write_discs(folder: Path, *, num_images: int, side: int = 32, seed: int = 0) -> None:
    """Writes `num_images` pairs into `folder`/images and `folder`/masks."""
    random = np.random.default_rng(seed)
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    y, x = np.mgrid[:side, :side]
    for index in range(num_images):
        center, radius = random.uniform(side * 0.3, side * 0.7, 2), random.uniform(3, side * 0.25)
        disc = (y - center[0]) ** 2 + (x - center[1]) ** 2 <= radius**2
        image = random.integers(20, 90, (side, side)) + 120 * disc
        for kind, pixels in (("images", image), ("masks", 255 * disc)):
            path = folder / kind / f"disc-{index:02d}.png"
            assert cv2.imwrite(str(path), pixels.astype(np.uint8))


def prepare_discs(
    folder: Path, *, num_images: int = 20, side: int = 32, tile: int | None = None
) -> str:
    """Returns the URL of a dataset of discs: 60 % train, 20 % valid, 20 % test.

    Args:
        tile: store tiles of so many pixels, which overlap by a quarter.
    """
    write_discs(folder / "source", num_images=num_images, side=side)
    size = {"tile": tile, "tile_overlap": tile // 4} if tile else {"image_size": side}
    classes = "background=0,0,0;mass=255,255,255"
    config = PrepConfig(**size, classes=classes, fractions=(0.6, 0.2, 0.2), num_processes=1)
    sources = find_sources(str(folder / "source"))
    prepare(sources, str(folder / "dataset"), config, progress=False)
    return str(folder / "dataset")
