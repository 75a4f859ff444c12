"""Inspects a source: finds pairs, reads all files once, measures a sample, proposes the command.

`tables.py` prints the result, `output.py` writes it.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from data_prep.config import PrepConfig
from data_prep.imaging.stored_sizes import MIN_AREA, MIN_NOISY_AREA, stored_sizes
from data_prep.inspection.config import InspectConfig
from data_prep.inspection.findings import Inspection
from data_prep.inspection.layout import find_layout
from data_prep.inspection.mask_values import are_known
from data_prep.inspection.output import draw_contact_sheet, shown_pairs
from data_prep.inspection.scan import (
    BadFile,
    FilesScan,
    InspectTask,
    RegionsScan,
    batches,
    scan_files,
    scan_regions,
)
from data_prep.inspection.summary import GROUP_OPTIONS, Measured, count_sizes, summarize
from data_prep.masks.color_map import FIRST_CLASS, parse_color_map, parse_ignored
from data_prep.masks.decision.decide import GivenOptions, MaskDecision, decide_masks
from data_prep.masks.decision.findings import Reading, black_and_white
from data_prep.prep_input import pairs_of
from data_prep.shards.pixel_format import common_pixel_format
from data_prep.shards.source_pairs import Layout, SourcePair
from data_prep.sources.listings import Listings
from data_prep.splits.group_candidates import GroupCandidate, given_groups, group_candidates
from data_prep.splits.groups import group_of
from flexunet.process_pool import (
    OpenWorkers,
    Workers,
    available_cores,
    local_workers,
    num_requests,
)
from flexunet.progress import Progress
from flexunet.settings import read_text
from flexunet.storage import open_store

T = TypeVar("T")
R = TypeVar("R")

_MAX_TRIED = 4  # readings of masks with several ones
_FEW_PAIRS = 100  # that one process reads before others have started
_FEW_BYTES = 32 * 2**20


def inspect_source(
    source: str,
    config: InspectConfig,
    *,
    with_contact_sheet: bool = False,
    open_workers: OpenWorkers | None = None,
    progress: bool = True,
) -> tuple[Inspection, bytes | None]:
    """Returns what was found in `source`, and a contact sheet as PNG.

    Args:
        source: folder or gs:// URL as `flexunet prep` takes it.
        with_contact_sheet: draw it, if the masks can be read.
        open_workers: opens the workers that read files; None: processes of this machine.
        progress: show the progress on stderr.

    Raises:
        UsageError: the source does not exist, or an option is wrong.
        StorageError: it cannot be read.
    """
    listings = Listings()
    found = Measured(find_layout(source, config.prep_options, listings))
    paired = found.layout.paired
    sheet = None
    if paired is not None and paired.pairs:
        grouped = [(pair, pair.id) for pair in paired.pairs]
        found.items = pairs_of(grouped, found.layout.config, listings)
        with (open_workers or _processes(config, found.items))() as workers:
            _measure(found, config, _Work(workers, progress))
        if with_contact_sheet:
            sheet = _contact_sheet(found, source)
    groups = _groups(found)
    return summarize(source, found, groups, listings), sheet


def _groups(found: Measured) -> tuple[GroupCandidate, ...]:
    """Returns the groups by the given rule, or those that names may hint at.

    Names without a group by the given rule are bad files.
    """
    config = found.layout.config
    splits = {image.filename: image.split for image in found.images}
    if config.format == "inbreast":
        return ()
    given = ((name, getattr(config, name)) for name in GROUP_OPTIONS)
    option, value = next((each for each in given if each[1] is not None), ("", ""))
    if not option:
        return group_candidates(splits)
    table = (read_text(value, "--group-csv"), value) if option == "group_csv" else None
    rule = group_of(preset=config.group_preset, regex=config.group_regex, table=table)
    candidate, problems = given_groups(splits, option, value, rule)
    labels = {item.filename: item.image.label for item in found.items}
    found.bad += [BadFile(labels[name], reason) for name, reason in problems.items()]
    return () if candidate is None else (candidate,)


@dataclass(frozen=True)
class _Work:
    """The arguments that each step needs."""

    workers: Workers
    progress: bool

    def run(
        self, function: Callable[[T], R], tasks: Iterable[T], title: str, total: int,
        number: Callable[[R], int],
    ) -> Iterable[R]:  # fmt: skip
        """Yields the results in order, and shows the progress in images."""
        with Progress(title, total, shown=self.progress) as bar:
            for result in self.workers.in_order(function, tasks):
                bar.advance(number(result))
                yield result


def _processes(config: InspectConfig, items: Sequence[SourcePair]) -> OpenWorkers:
    num_bytes = sum(file.size for item in items for file in item.files)
    is_small = len(items) <= _FEW_PAIRS and num_bytes <= _FEW_BYTES
    number = config.num_processes or (1 if is_small else available_cores())
    return functools.partial(local_workers, max(1, min(number, len(items))))


def _measure(found: Measured, config: InspectConfig, work: _Work) -> None:
    """Reads all files, decides what the masks mean, and measures the regions of a sample."""
    layout = layout_of(found.layout.config, None)
    stores = [open_store(url) for url in {file.url for item in found.items for file in item.files}]
    number = work.workers.num_workers()
    task = InspectTask((), layout, num_requests(*stores, num_processes=number))
    scans = work.run(
        scan_files, batches(found.items, task, number), "reading", len(found.items), _num_pairs
    )
    for scan in scans:
        _add(found, scan)
    if not found.images:
        return
    found.decision = _decide(found)
    found.sizes = stored_sizes(count_sizes(found.images))
    sample = _evenly(_good(found), config.sample)
    measured: list[tuple[int, Reading | None, RegionsScan]] = []
    for reading in _readings(found.decision):
        found.reading, found.regions = reading, RegionsScan()
        _measure_regions(found, sample, task, work)
        num_refused = sum(bool(bad.colors) for bad in found.regions.bad)
        measured.append((num_refused, reading, found.regions))
        if not num_refused:
            break
    if not measured:
        return
    _, found.reading, found.regions = min(measured, key=lambda each: each[0])
    found.min_area = MIN_NOISY_AREA if found.has_noise else MIN_AREA
    if found.decision is not None and found.reading is not None:
        found.decision = found.decision.with_first(found.reading)


def _readings(decision: MaskDecision | None) -> tuple[Reading | None, ...]:
    """Returns the readings to try until one reads all masks, the likeliest first.

    None: there are no masks.
    """
    if decision is None or decision.reading is not None:
        return (None if decision is None else decision.reading,)
    return decision.candidates[:_MAX_TRIED]


def _measure_regions(
    found: Measured, sample: Sequence[SourcePair], task: InspectTask, work: _Work
) -> None:
    """Reads the masks of a sample, and checks the others.

    Args:
        task: the task that read all files.
    """
    sizes = {image.image_id: (image.height, image.width) for image in found.images}
    task = dataclasses.replace(
        task,
        layout=layout_of(found.layout.config, found.reading),
        image_sizes=tuple(sizes[item.id] for item in sample),
        sizes=found.sizes,
        min_area=MIN_NOISY_AREA if found.has_noise else MIN_AREA,
    )
    tasks = batches(sample, task, work.workers.num_workers())
    for part in work.run(scan_regions, tasks, "measuring regions", len(sample), _num_pairs):
        found.regions.add(part)
    _check_rest(found, sample, task, work)


def _check_rest(
    found: Measured, sample: Sequence[SourcePair], task: InspectTask, work: _Work
) -> None:
    """Reads the masks outside of the sample that have other values than those of classes.

    `prep` may reject them.
    """
    if found.reading is None:
        return
    measured = {item.id for item in sample}
    known = {values: are_known(values, found.reading) for values in set(found.values.values())}
    rest = [
        item
        for item in _good(found)
        if item.id not in measured and not known[found.values[item.id]]
    ]
    sizes = {image.image_id: (image.height, image.width) for image in found.images}
    task = dataclasses.replace(
        task, image_sizes=tuple(sizes[item.id] for item in rest), is_check=True
    )
    tasks = batches(rest, task, work.workers.num_workers())
    for part in work.run(scan_regions, tasks, "checking masks", len(rest), _num_pairs):
        found.regions.bad.extend(part.bad)


def _good(found: Measured) -> list[SourcePair]:
    """Returns the pairs without a bad file."""
    bad = {each.file for each in found.bad}
    return [item for item in found.items if bad.isdisjoint(file.label for file in item.files)]


def _num_pairs(scan: FilesScan | RegionsScan) -> int:
    return scan.num_pairs


def _add(found: Measured, scan: FilesScan) -> None:
    found.images += scan.images
    found.masks += scan.masks
    found.bad += scan.bad
    for item_id, values in scan.values.items():
        found.values[item_id] = found.interned(values)
    for kind, number in scan.mask_kinds.items():
        found.mask_kinds[kind] = found.mask_kinds.get(kind, 0) + number


def _decide(found: Measured) -> MaskDecision | None:
    config = found.layout.config
    if config.format == "inbreast" or not found.masks.num_files:
        return None
    given = found.layout.options
    ignored = parse_ignored(config.ignore.split(";")) if config.ignore is not None else None
    classes = parse_color_map(given["classes"]) if given.get("classes") else None
    return decide_masks(
        found.masks,
        GivenOptions(
            config.mask_encoding,
            classes,
            ignored,
            background=None if config.background == FIRST_CLASS else config.background,
        ),
    )


def layout_of(config: PrepConfig, reading: Reading | None) -> Layout:
    """Returns the options of `prep` that say how the pairs are read, with original sizes."""
    options = {} if reading is None else reading.options
    if reading is None and config.classes is None:
        # The given background may be no class of these.
        options = {**black_and_white().options, "background": FIRST_CLASS}
    if options:
        config = config.model_validate({**config.model_dump(), **options})
    return Layout(
        height=config.height,
        width=config.width,
        geometry="stretch",
        channels="auto",
        classes=config.color_map,
        ignore_id=config.ignore_value,
        max_pixels=config.max_pixels,
        format=config.format,
        rois=config.rois,
        full_scale=config.full_scale,
        ignored=config.ignored_colors,
        mask_encoding=config.file_encoding,
        file_ids=config.dataset_classes.file_ids,
    )


def _evenly(items: Sequence[T], most: int) -> list[T]:
    """Returns up to `most` evenly spaced items."""
    if len(items) <= most:
        return list(items)
    return [items[number * len(items) // most] for number in range(most)]


def _contact_sheet(found: Measured, source: str) -> bytes | None:
    chosen = shown_pairs(found.regions.pixels)
    if not chosen:
        return None
    by_id = {item.id: item for item in found.items}
    items = [by_id[name] for name in chosen]
    layout = layout_of(found.layout.config, found.reading)
    how = ""
    if found.decision is not None and found.decision.reading is None and found.reading:
        how = f", if {found.reading.meaning}"
    title = f"{open_store(source).url.rpartition('/')[2]}: {len(items)} of {len(found.items)}{how}"
    pixel_format = common_pixel_format(found.images, found.layout.config.full_scale)
    stores = [open_store(url) for url in {file.url for item in items for file in item.files}]
    return draw_contact_sheet(items, layout, pixel_format, title, num_requests(*stores))
