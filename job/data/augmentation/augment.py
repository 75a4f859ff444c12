"""Augments an image and its mask, as drawn from (seed, epoch, sample).

The kinds and their formulas are those of the reference implementation and some more, with these
differences:
- The reference implementation makes one deformed copy per kind. Here each kind is drawn
  independently with its probability, and `warps` moves all pixels once.
- Sharpening and brightening change the image only.
- One elastic field moves all channels.

Does not import TensorFlow and reads no files.
"""

from functools import partial

import numpy as np
import numpy.typing as npt

from job.config import AugmentationConfig
from job.data.augmentation.appearance import (
    Pixels,
    brightened,
    changed_appearance,
    sharpened,
)
from job.data.augmentation.warps import source_points, warped
from job.data.random_streams import Purpose, SampleKey, sample_generator

# The kinds that share one stream; its numbers belong to every run, so that others have their own.
_KINDS = (
    "hflip",
    "vflip",
    "rotation",
    "shrink",
    "shear",
    "deformation",
    "distortion",
    "barrel",
    "pincushion",
    "sharpening",
    "brightening",
)


def augment(
    image: Pixels,
    mask: npt.NDArray[np.uint8],
    sample: SampleKey,
    *,
    config: AugmentationConfig,
    value_max: int,
) -> tuple[Pixels, npt.NDArray[np.uint8]]:
    """Returns the augmented image and mask; the arguments themselves if no kind was drawn.

    A pure function of its arguments: same result on any number of machines and after a restart.

    Args:
        image: (H, W, C) uint8 or uint16, any number of channels.
        mask: (H, W) uint8 class ids.
        value_max: largest pixel value; changes of pixel values clip to it.
    """
    if not config.enabled:
        return image, mask
    # A kind that needs many draws has its own stream, so that switching it on does not change the
    # other kinds.
    draws = partial(sample_generator, sample=sample)
    rng = draws(Purpose.DECISIONS)
    drawn = {
        kind
        for kind, number in zip(_KINDS, rng.random(len(_KINDS)), strict=True)
        if number < getattr(config, f"{kind}_probability")
    }
    picks = dict(zip(_KINDS, rng.random(len(_KINDS)), strict=True))
    source = source_points(mask.shape, drawn, picks, config, draws)
    if source is not None:
        image, mask = warped(image, mask, source, is_mirrored=config.border == "mirror")
    if "sharpening" in drawn:
        image = sharpened(image, config.sharpening_k, value_max)
    if "brightening" in drawn:
        image = brightened(image, config.brightening_alpha, config.brightening_beta, value_max)
    return changed_appearance(image, config, draws, value_max), mask
