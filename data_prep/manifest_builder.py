"""Builds the manifest of a written dataset: counts, sizes and lost regions."""

import dataclasses
import logging
from collections.abc import Iterable, Mapping, Sequence

import flexunet
from data_prep.assignment import Assignment
from data_prep.config import PrepConfig, identity_of
from data_prep.format_choice import full_scale_info
from data_prep.imaging.pixels import PixelFormat
from data_prep.masks.rules import READING_RULES
from data_prep.shards.manifest import Manifest, MaskChoice, ReducedInfo, SplitInfo, group_rule_of
from data_prep.shards.source_pairs import EncodedSample
from data_prep.shards.write import WrittenShard, mean_and_std
from data_prep.splits.names import SPLITS, Split
from flexunet.storage import crc32c_of
from flexunet.text import pluralize

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Contents:
    """The content of a dataset before it is committed.

    Attributes:
        samples: at least one, in any order.
        table: bytes of the sample table.
        source_sha256: digest of the source files.
    """

    name: str
    pixel_format: PixelFormat
    samples: Sequence[EncodedSample]
    assignment: Assignment
    shards: Sequence[WrittenShard]
    table: bytes
    source_sha256: str


def build_manifest(
    contents: Contents, config: PrepConfig, mask_choice: MaskChoice | None = None
) -> Manifest:
    """Returns the manifest of `contents`, which was written with the options `config`.

    Args:
        mask_choice: how the masks are read, where the user gave no options.
    """
    pixel_format, samples, splits = (
        contents.pixel_format,
        contents.samples,
        contents.assignment.splits,
    )
    mean, std = _mean_and_std_of_train(contents.shards)
    options = identity_of(config)
    return Manifest(
        name=contents.name,
        image_height=config.height,
        image_width=config.width,
        channels=pixel_format.channels,
        bit_depth=pixel_format.bit_depth,
        value_max=pixel_format.value_max,
        classes=config.color_map,
        ignore_id=config.ignore_value,
        geometry=config.kind,
        crop=config.crop,
        flip=config.flip,
        split_rule="drawn" if samples[0].split is None else "ready-made",
        group_rule=group_rule_of(options),
        seed=config.seed,
        num_folds=config.num_folds,
        leaky=contents.assignment.is_leaky,
        splits=_split_infos(samples, splits),
        shards=tuple(shard.info for shard in contents.shards),
        samples_num_bytes=len(contents.table),
        samples_crc32c=crc32c_of(contents.table),
        mean=mean,
        std=std,
        tool_version=flexunet.__version__,
        options=options,
        reduced=_reduced(samples, splits),
        source_sha256=contents.source_sha256,
        full_scale=full_scale_info(samples, pixel_format, config),
        mask_choice=mask_choice,
        reading_rules=READING_RULES if config.format == "pairs" else None,
    )


def _mean_and_std_of_train(
    shards: Sequence[WrittenShard],
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns mean and standard deviation per channel over train, or all images if it is empty."""
    train = [r.moments for shard in shards if shard.info.split == "train" for r in shard.records]
    every = [r.moments for shard in shards for r in shard.records]
    return mean_and_std(train or every)


def _split_infos(
    samples: Sequence[EncodedSample], splits: Mapping[str, str]
) -> dict[Split, SplitInfo]:
    infos = {}
    for name in SPLITS:
        members = [sample for sample in samples if splits[sample.id] == name]
        num_groups = len({sample.group for sample in members})
        infos[name] = SplitInfo(num_samples=len(members), num_groups=num_groups)
    return infos


def _reduced(
    samples: Sequence[EncodedSample], splits: Mapping[str, str]
) -> dict[Split, ReducedInfo]:
    infos = {}
    for name in SPLITS:
        counts = [s.regions for s in samples if splits[s.id] == name and s.regions is not None]
        if counts:
            infos[name] = ReducedInfo(
                num_pictures=len(counts),
                num_emptied=sum(each.is_emptied for each in counts),
                num_regions=_sums(each.regions for each in counts),
                num_vanished=_sums(each.lost for each in counts),
            )
    return infos


def _sums(rows: Iterable[Sequence[int]]) -> tuple[int, ...]:
    return tuple(sum(column) for column in zip(*rows, strict=True))


def warn_of_lost_regions(manifest: Manifest) -> None:
    """Warns if downscaling removed regions of the masks."""
    infos = manifest.reduced.values()
    num_vanished = sum(sum(info.num_vanished) for info in infos)
    num_emptied = sum(info.num_emptied for info in infos)
    if num_vanished:
        logger.warning(
            "%d of %s have no pixel left at this size and are lost%s: they are missing in "
            "training, and no evaluation counts them as missed; increase --image-size or use "
            "--tile",
            num_vanished,
            pluralize(sum(sum(info.num_regions) for info in infos), "mask region"),
            f", and with them all foreground of {pluralize(num_emptied, 'image')}"
            if num_emptied
            else "",
        )
