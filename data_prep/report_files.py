"""Writes the files of a dataset's `report/` from the stored samples.

Selects the samples to show and the numbers to count; `report_figures.py` draws them.
"""

import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from data_prep import report_figures
from data_prep.imaging.arrays import decode_image, has_planes
from data_prep.imaging.codecs import read_mask_pixels
from data_prep.shards.manifest import Manifest
from data_prep.shards.records import IMAGE_FEATURE, MASK_FEATURE, decode_example, unframe_record
from data_prep.shards.source_pairs import EncodedSample
from data_prep.sources import inbreast
from data_prep.splits.names import SPLITS
from flexunet.errors import ContentError
from flexunet.process_pool import in_order, num_requests, request_threads
from flexunet.storage import ObjectStore, put_probably_new
from flexunet.tables import csv_table

_PAIRS_PER_CONTACT_SHEET = 6


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
