"""Applies the options to the format of the stored pictures, and tells which pictures decided it.

The format itself is decided in `shards/pixel_format.py`.
"""

import logging
from collections.abc import Sequence

from data_prep import report_figures
from data_prep.config import MAX_LISTED, PrepConfig
from data_prep.imaging.pixels import PixelFormat
from data_prep.shards.manifest import FullScaleInfo
from data_prep.shards.pixel_format import clipped, common_pixel_format, sparing_scale
from data_prep.shards.source_pairs import EncodedSample
from flexunet.errors import UsageError
from flexunet.text import join_truncated, pluralize

logger = logging.getLogger(__name__)


def pixel_format_of(samples: Sequence[EncodedSample], config: PrepConfig) -> PixelFormat:
    """Returns the format of the stored pictures.

    Raises:
        UsageError: a full scale is given, and all pictures have 8 bits.
    """
    pixel_format = common_pixel_format(samples, config.full_scale)
    if config.full_scale is not None and pixel_format.bit_depth == 8:
        raise UsageError(
            f"--full-scale {config.full_scale}: it is for pictures of 16 bits, and all of these "
            "have 8; leave it out"
        )
    return pixel_format


def warn_of_clipped(
    samples: Sequence[EncodedSample], pixel_format: PixelFormat, config: PrepConfig
) -> list[tuple[EncodedSample, int]]:
    """Returns the pictures with pixels above the full scale, and their number; warns of them."""
    if pixel_format.bit_depth == 8:
        return []
    found = clipped(samples, pixel_format.value_max, config.full_scale)
    less = None if config.full_scale else sparing_scale(samples, pixel_format.value_max)
    if less is not None:
        above = clipped(samples, less, None)
        logger.warning(
            "the full scale is %d for few pixels: no picture has more than a thousandth of its "
            "pixels above %d; if they are markers, --full-scale %d makes the pictures %d times "
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
            "%d of %d pictures have pixels above the full scale %d%s, which become %d (see %s; "
            "--full-scale gives another): %s",
            len(found),
            len(images),
            pixel_format.value_max,
            "" if config.full_scale else " that the others need",
            pixel_format.value_max,
            report_figures.CLIPPED_NAME,
            join_truncated(named, MAX_LISTED),
        )
    return found


def full_scale_info(
    samples: Sequence[EncodedSample], pixel_format: PixelFormat, config: PrepConfig
) -> FullScaleInfo | None:
    """Returns what the manifest says of the full scale; None where every picture says its own."""
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
    """Warns of the few pictures that decided the format of all."""
    samples = list({sample.image_id: sample for sample in samples}.values())
    coloured = [sample.filename for sample in samples if sample.channels == 3]
    if config.channels == "auto" and 0 < len(coloured) < len(samples):
        logger.warning(
            "%d of %d pictures have colour, so all are stored as RGB (--channels grey would store "
            "one channel): %s", len(coloured), len(samples), _listed(coloured),
        )  # fmt: skip
    shallow = [sample.filename for sample in samples if sample.bit_depth < pixel_format.bit_depth]
    if shallow:
        logger.warning(
            "%d of %d pictures have 8 bits, the others 16: 255 becomes %d in them: %s",
            len(shallow), len(samples), pixel_format.value_max, _listed(shallow),
        )  # fmt: skip
    scaled = [s.filename for s in samples if s.value_max not in (None, pixel_format.value_max)]
    if scaled and not shallow:
        logger.warning(
            "%d of %d pictures are of detectors of fewer bits; their full scale becomes %d: %s",
            len(scaled), len(samples), pixel_format.value_max, _listed(scaled),
        )  # fmt: skip


def _listed(names: Sequence[str]) -> str:
    more = ", ..." if len(names) > MAX_LISTED else ""
    return ", ".join(names[:MAX_LISTED]) + more
