"""Writes the findings of an inspection, and draws its contact sheet."""

import functools
import json
import os
from collections.abc import Mapping, Sequence

from data_prep.imaging.pixels import PixelFormat, convert
from data_prep.inspection.findings import Inspection
from data_prep.report_figures import PairPreview, contact_sheet_png
from data_prep.shards.pair_reader import read_file, read_pair
from data_prep.shards.source_pairs import Layout, ScanTask, SourcePair
from flexunet.errors import ContentError, UsageError
from flexunet.process_pool import in_order, request_threads
from flexunet.storage import ObjectStore, is_file, is_subpath, open_store, put_if_changed

JSON_NAME = "inspect.json"
CONTACT_SHEET_NAME = "inspect.png"
NUM_PAIRS = 6  # of the contact sheet


def shown_pairs(pixels: Mapping[str, Sequence[int]], most: int = NUM_PAIRS) -> list[str]:
    """Returns the ids of up to `most` pairs that show all classes, if possible.

    Args:
        pixels: pixels of each class by id of the pair.
    """
    left, seen, chosen = dict(pixels), set[int](), list[str]()

    def rank(name: str) -> tuple[int, float]:
        counts = left[name]
        new = {i for i, count in enumerate(counts[1:], 1) if count} - seen
        return len(new), sum(counts[1:]) / max(1, sum(counts))

    while left and len(chosen) < most:
        best = max(left, key=rank)  # of equal ones the first
        seen |= {i for i, count in enumerate(left.pop(best)[1:], 1) if count}
        chosen.append(best)
    return chosen


def draw_contact_sheet(
    items: Sequence[SourcePair],
    layout: Layout,
    pixel_format: PixelFormat,
    title: str,
    num_requests: int,
) -> bytes:
    """Returns a PNG of the pairs with their masks as overlays, classes in the legend.

    Pairs that can no longer be read are left out. Ignored pixels are hatched.
    """
    with request_threads(num_requests) as threads:
        read = functools.partial(_preview, layout, pixel_format)
        previews = list(in_order(threads, read, items, num_waiting=len(items)))
    return contact_sheet_png(
        [preview for preview in previews if preview is not None],
        layout.classes,
        pixel_format.value_max,
        title,
        ignore_id=layout.ignore_id,
    )


def _preview(layout: Layout, pixel_format: PixelFormat, item: SourcePair) -> PairPreview | None:
    files = tuple(read_file(file) for file in item.files)
    try:
        read = read_pair(item, ScanTask("", layout, (item,), skip_bad=True), files)
    except ContentError:
        return None
    image = convert(read.image, pixel_format, value_max=read.value_max)
    return PairPreview(item.id, image, read.mask)


def output_store(source: str, output: str | None) -> ObjectStore:
    """Returns the store for the findings: `output`, or inspect-NAME in the current folder.

    Raises:
        UsageError: it is a file, or in the source.
    """
    found = open_store(source)
    name = os.path.basename(found.url.removeprefix("gs://")) or "source"
    store = open_store(output or f"inspect-{name}")
    if is_file(store):
        raise UsageError(f"{store.url}: is a file; give a folder with --output")
    if is_subpath(store, found):
        raise UsageError(
            f"{store.url}: is in SOURCE, into which inspect writes nothing; give a folder outside "
            "with --output"
        )
    return store


def write_findings(store: ObjectStore, inspection: Inspection, sheet: bytes | None) -> None:
    """Writes inspect.json and the contact sheet; without a sheet, an earlier one is deleted."""
    text = json.dumps(inspection.as_json(), indent=2) + "\n"
    put_if_changed(store, JSON_NAME, text.encode())
    if sheet is None:
        store.delete(CONTACT_SHEET_NAME)
    else:
        put_if_changed(store, CONTACT_SHEET_NAME, sheet)
