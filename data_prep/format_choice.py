"""Applies the options to the format of the stored images, and reports which images determine it.

`shards/pixel_format.py` chooses the format.
"""

import logging
from collections.abc import Sequence

from data_prep import report_figures
from data_prep.config import MAX_LISTED, PrepConfig
from data_prep.imaging.arrays import has_planes
from data_prep.imaging.pixels import PixelFormat
from data_prep.shards.manifest import FullScaleInfo
from data_prep.shards.pixel_format import clipped, common_pixel_format, sparing_scale
from data_prep.shards.source_pairs import EncodedSample
from flexunet.errors import ContentError, UsageError
from flexunet.text import join_truncated, pluralize

logger = logging.getLogger(__name__)


def pixel_format_of(samples: Sequence[EncodedSample], config: PrepConfig) -> PixelFormat:
    """Returns the format of the stored images.

    Raises:
        UsageError: a full scale is given, but all images have 8 bits.
        ContentError: the images have different numbers of channels, other than grey and RGB.
    """
    _refuse_mixed_channels(samples)
    pixel_format = common_pixel_format(samples, config.full_scale)
    if config.full_scale is not None and pixel_format.bit_depth == 8:
        raise UsageError(
            f"--full-scale {config.full_scale}: only for 16-bit images, but all of these have 8 "
            "bits; leave it out"
        )
    return pixel_format


def _refuse_mixed_channels(samples: Sequence[EncodedSample]) -> None:
    first = {sample.channels: sample.filename for sample in reversed(samples)}
    if len(first) > 1 and any(has_planes(channels) for channels in first):
        named = [f"{name} has {number}" for number, name in sorted(first.items())]
        raise ContentError(
            f"the images have different numbers of channels: {join_truncated(named, MAX_LISTED)}; "
            "give all the same number"
        )


def warn_of_clipped(
    samples: Sequence[EncodedSample], pixel_format: PixelFormat, config: PrepConfig
) -> list[tuple[EncodedSample, int]]:
    """Warns of images with pixels above the full scale; returns them with the pixels' number."""
    if pixel_format.bit_depth == 8:
        return []
    found = clipped(samples, pixel_format.value_max, config.full_scale)
    less = None if config.full_scale else sparing_scale(samples, pixel_format.value_max)
    if less is not None:
        above = clipped(samples, less, None)
        logger.warning(
            "the full scale is %d because of a few bright pixels (at most 0.1 %% of each image "
            "above %d); if they are markers, give --full-scale %d, which makes the images %d times "
            "brighter: %s",
            pixel_format.value_max,
            less,
            less,
            round(pixel_format.value_max / less),
            join_truncated([each.filename for each, _ in above], MAX_LISTED),
        )
    if found:
        images = {sample.image_id for sample in samples if sample.num_above}
        named = [f"{s.filename} ({pluralize(n, 'pixel')}, up to {s.max_value})" for s, n in found]
        logger.warning(
            "%d of %d images have pixels above the full scale %d%s; they are clipped to %d (see "
            "%s; --full-scale sets another value): %s",
            len(found),
            len(images),
            pixel_format.value_max,
            "" if config.full_scale else " of the other images",
            pixel_format.value_max,
            report_figures.CLIPPED_NAME,
            join_truncated(named, MAX_LISTED),
        )
    return found


def full_scale_info(
    samples: Sequence[EncodedSample], pixel_format: PixelFormat, config: PrepConfig
) -> FullScaleInfo | None:
    """Returns the manifest's full-scale entry; None if every image states its own full scale."""
    images = [sample for sample in samples if sample.num_above]
    if not images:
        return None
    above = clipped(images, pixel_format.value_max, config.full_scale)
    return FullScaleInfo(
        rule="found" if config.full_scale is None else "given",
        lowest_max=min((image.max_value for image in images if not image.is_blank), default=0),
        highest=max(image.max_value for image in images),
        num_clipped_pictures=len(above),
        num_clipped_pixels=sum(count for _, count in above),
    )


def warn_of_mixed(
    samples: Sequence[EncodedSample], pixel_format: PixelFormat, config: PrepConfig
) -> None:
    """Warns if some images determine the format of all: colour, 16 bits or full scale."""
    samples = list({sample.image_id: sample for sample in samples}.values())
    coloured = [sample.filename for sample in samples if sample.channels == 3]
    if config.channels == "auto" and 0 < len(coloured) < len(samples):
        logger.warning(
            "%d of %d images have colour, so all are stored as RGB (--channels grey would store "
            "one channel): %s", len(coloured), len(samples), _first_names(coloured),
        )  # fmt: skip
    shallow = [sample.filename for sample in samples if sample.bit_depth < pixel_format.bit_depth]
    if shallow:
        logger.warning(
            "%d of %d images have 8 bits, the others 16; 8-bit images are scaled: 255 becomes "
            "%d: %s",
            len(shallow), len(samples), pixel_format.value_max, _first_names(shallow),
        )  # fmt: skip
    scaled = [s.filename for s in samples if s.value_max not in (None, pixel_format.value_max)]
    if scaled and not shallow:
        logger.warning(
            "%d of %d images are from detectors with fewer bits; their full scale becomes %d: %s",
            len(scaled), len(samples), pixel_format.value_max, _first_names(scaled),
        )  # fmt: skip


def _first_names(names: Sequence[str]) -> str:
    more = ", ..." if len(names) > MAX_LISTED else ""
    return ", ".join(names[:MAX_LISTED]) + more
