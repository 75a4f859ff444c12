"""Writes the files of a dataset's `report/` from the stored samples.

Selects the samples to show and the numbers to count; `report_figures.py` draws them.
"""

import dataclasses
import functools
import logging
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from data_prep import report_figures
from data_prep.imaging.arrays import decode_image, has_planes
from data_prep.imaging.codecs import read_mask_pixels
from data_prep.masks.color_map import ClassColor, Color
from data_prep.shards.manifest import Manifest
from data_prep.shards.records import IMAGE_FEATURE, MASK_FEATURE, decode_example, unframe_record
from data_prep.shards.source_pairs import EncodedSample, RejectedPair
from data_prep.sources import inbreast
from data_prep.splits.names import SPLITS
from flexunet.errors import ContentError
from flexunet.process_pool import in_order, num_requests, request_threads
from flexunet.storage import ObjectStore, put_probably_new
from flexunet.tables import csv_table
from flexunet.text import pluralize

logger = logging.getLogger(__name__)

_PAIRS_PER_CONTACT_SHEET = 6
_MAX_UNMAPPED_COLORS = 1000  # rows
_MAX_COUNTED = 2**17  # colours in memory
_Key = tuple[Color, int]  # a colour, and the class with the nearest colour


def write_report(
    store: ObjectStore,
    manifest: Manifest,
    rows: Sequence[Mapping[str, Any]],
    refused: Sequence[tuple[str, str]],
) -> None:
    """Writes the list of rejected files, a contact sheet per split, and the statistics.

    Args:
        rows: the rows of the sample table.
        refused: (file, reason) of each rejected file.
    """
    # The file may exist from an interrupted run, and the account may not replace objects.
    put_probably_new(
        store, report_figures.REJECTS_NAME, report_figures.rejects_csv(sorted(refused)).encode()
    )
    statistics: dict[str, report_figures.SplitStatistics] = {}
    for name in SPLITS:
        members = [row for row in rows if row["split"] == name]
        if not members:
            continue
        counts = zip(*(row["pixels_per_class"] for row in members), strict=True)
        pixels = tuple(sum(column) for column in counts)
        statistics[name] = report_figures.SplitStatistics(len(members), pixels)
        pairs = _read_pairs(store, _shown(members), manifest.channels)
        title = f"{manifest.name}: {name}, {len(pairs)} of {len(members)} samples, foreground first"
        if has_planes(manifest.channels):
            title += f", channel 1 of {manifest.channels}"
        contact_sheet = report_figures.contact_sheet_png(
            pairs,
            manifest.classes,
            manifest.value_max,
            title,
            ignore_id=manifest.ignore_id,
        )
        put_probably_new(store, report_figures.contact_sheet_name(name), contact_sheet)
    plot = report_figures.statistics_png(statistics, manifest.classes, manifest.name)
    put_probably_new(store, report_figures.STATISTICS_NAME, plot)


def _shown(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Returns the samples for a contact sheet, those with foreground first.

    A sheet shows whether masks match their images, and most tiles have no foreground.
    """
    ordered = sorted(rows, key=lambda row: not any(row["pixels_per_class"][1:]))
    return ordered[:_PAIRS_PER_CONTACT_SHEET]


def write_clipped(store: ObjectStore, above: Sequence[tuple[EncodedSample, int]]) -> None:
    """Writes the list of images with clipped pixels, if there are any.

    Args:
        above: (sample, number of pixels above the full scale) of each image.
    """
    if above:
        lines = [(sample.filename, count, sample.max_value) for sample, count in above]
        put_probably_new(
            store, report_figures.CLIPPED_NAME, report_figures.clipped_csv(lines).encode()
        )


class UnmappedColors:
    """Adds up the mask colours of no class over all images, in bounded memory.

    Beyond the limits of a mask and of the dataset, only the number of pixels is known.
    """

    def __init__(self, max_colors: int = _MAX_COUNTED) -> None:
        self._max_colors = max_colors
        self._pixels, self._files = Counter[_Key](), Counter[_Key]()
        self._num_pixels = 0

    def take(self, results: Iterable[EncodedSample | RejectedPair]) -> list[Any]:
        """Adds the colours of the next results; returns the results without them.

        Args:
            results: those of an image follow each other.
        """
        kept, image_id = [], None
        for result in results:
            if isinstance(result, EncodedSample):
                if result.image_id != image_id:
                    self._add(result)
                image_id = result.image_id
                result = dataclasses.replace(result, unmapped_colors=())
            kept.append(result)
        return kept

    def _add(self, sample: EncodedSample) -> None:
        self._num_pixels += sample.unmapped_pixels
        for each in sample.unmapped_colors:
            self._pixels[each.color, each.nearest] += each.num_pixels
            self._files[each.color, each.nearest] += 1
        if len(self._pixels) > self._max_colors:
            self._pixels = Counter(dict(self._pixels.most_common(self._max_colors // 2)))
            self._files = Counter({key: self._files[key] for key in self._pixels})

    def rows(self, classes: Sequence[ClassColor]) -> list[tuple[Any, ...]]:
        """Returns the rows of the table: the commonest colours, and the pixels of all others."""
        found = sorted(self._pixels.items(), key=lambda each: (-each[1], each[0]))
        rows: list[tuple[Any, ...]] = [
            (*color, count, self._files[color, nearest], _class_name(nearest, classes))
            for (color, nearest), count in found[:_MAX_UNMAPPED_COLORS]
        ]
        rest = self._num_pixels - sum(count for _, count in found[:_MAX_UNMAPPED_COLORS])
        return [*rows, ("", "", "", rest, "", "(other colours)")] if rest else rows


def _class_name(class_id: int, classes: Sequence[ClassColor]) -> str:
    return classes[class_id].name if class_id < len(classes) else "(ignored)"


def write_unmapped_colors(
    store: ObjectStore,
    samples: Sequence[EncodedSample],
    colors: UnmappedColors,
    classes: Sequence[ClassColor],
) -> None:
    """Writes the commonest mask colours of no class, if there are any, and warns of unexplained.

    Noise and blends along edges get a class by their neighbourhood; other pixels get the class of
    the nearest colour.
    """
    images = list({sample.image_id: sample for sample in samples}.values())
    rows = colors.rows(classes)
    if not rows:
        return
    table = csv_table(report_figures.UNMAPPED_COLUMNS, rows)
    put_probably_new(store, report_figures.UNMAPPED_NAME, table.encode())
    unexplained = [sample for sample in images if sample.unexplained_pixels]
    if unexplained:
        worst = max(unexplained, key=lambda each: each.unexplained_pixels)
        logger.warning(
            "%s of %s are neither noise nor blends of classes nearby and got the class of the "
            "nearest colour, most in %s (%d); %s/%s lists the colours",
            pluralize(sum(each.unexplained_pixels for each in unexplained), "mask pixel"),
            pluralize(len(unexplained), "image"),
            worst.filename,
            worst.unexplained_pixels,
            store.url,
            report_figures.UNMAPPED_NAME,
        )


def write_counts(
    store: ObjectStore, samples: Sequence[EncodedSample], unannotated: Collection[str]
) -> None:
    """Writes the number of findings of each kind in an INbreast release.

    Args:
        unannotated: ids of the images without an annotation file.
    """
    findings = {sample.image_id: sample.findings for sample in samples}
    groups = {sample.image_id: sample.group for sample in samples}
    found = [image_id for image_id in findings if image_id in unannotated]
    table = csv_table(inbreast.COUNTS_COLUMNS, inbreast.count_rows(findings, groups, found))
    put_probably_new(store, inbreast.COUNTS_NAME, table.encode())


def _read_pairs(
    store: ObjectStore, rows: Sequence[Mapping[str, Any]], channels: int
) -> list[report_figures.PairPreview]:
    with request_threads(num_requests(store)) as threads:
        read = functools.partial(_read_pair, store, channels)
        return list(in_order(threads, read, rows, num_waiting=len(rows)))


def _read_pair(
    store: ObjectStore, channels: int, row: Mapping[str, Any]
) -> report_figures.PairPreview:
    """Returns a sample as read from its shard."""
    where = f"{store.url}/{row['shard']} at {row['offset']}"
    record = store.get(row["shard"], row["offset"], row["length"])
    features = decode_example(unframe_record(record, where=where))
    image, mask = features[IMAGE_FEATURE], features[MASK_FEATURE]
    if not isinstance(image, bytes) or not isinstance(mask, bytes):
        raise ContentError(f"{where}: the image or mask is not bytes; prepare the dataset again")
    image_pixels = decode_image(image, channels, name=where)
    mask_pixels = read_mask_pixels(mask, name=where, max_pixels=2**31)
    return report_figures.PairPreview(str(row["id"]), image_pixels, mask_pixels)
