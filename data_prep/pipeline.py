"""Prepares a committed dataset from images and masks: runs the steps in order.

Other modules find, read, split and store the images.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from data_prep import report_figures
from data_prep.assignment import assign, check_usable, warn_of_missing_classes
from data_prep.choices.mask_options import (
    ChosenMasks,
    CommandPaths,
    choose_mask_options,
    existing_options,
)
from data_prep.config import PrepConfig, identity_of
from data_prep.format_choice import pixel_format_of, warn_of_clipped, warn_of_mixed
from data_prep.manifest_builder import Contents, build_manifest, warn_of_lost_regions
from data_prep.masks.rules import READING_RULES
from data_prep.masks.statistics import MaskStatistics
from data_prep.prep_input import PrepInput, collect_input, source_digest, sources_of
from data_prep.report_files import (
    UnmappedColors,
    write_clipped,
    write_counts,
    write_report,
    write_unmapped_colors,
)
from data_prep.shards.encode import batched, chunked, scan_chunks
from data_prep.shards.manifest import MANIFEST_NAME, Manifest, MaskChoice, read_manifest
from data_prep.shards.mask_sample import SampleTask, read_samples, statistics_of_files
from data_prep.shards.output import (
    STATE_PREFIX,
    claim_output,
    commit,
    describe_difference,
    remove_state,
    staging_url,
)
from data_prep.shards.pair_reader import listed_crcs, source_crcs
from data_prep.shards.sample_table import samples_to_parquet
from data_prep.shards.source_pairs import EncodedSample, Layout, RejectedPair, ScanTask, SourcePair
from data_prep.shards.write import ShardTask, WrittenShard, plan_shards, sample_rows, write_shard
from data_prep.sources.listings import Listings
from data_prep.sources.pairs import Source, folder_made_by
from flexunet.errors import ContentError, UsageError
from flexunet.process_pool import (
    OpenWorkers,
    Workers,
    available_cores,
    local_workers,
    num_requests,
)
from flexunet.progress import Progress
from flexunet.storage import ObjectStore, is_file, open_store, probe_writable

logger = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")


def prepare_source(
    source: str,
    output: str,
    config: PrepConfig,
    *,
    open_workers: OpenWorkers | None = None,
    progress: bool = True,
) -> Manifest:
    """Prepares the dataset at `output` from the folder `source` and returns its manifest.

    Args:
        source: folder or gs:// URL as `flexunet prep` takes it.
        open_workers, progress: see `prepare`.

    Raises:
        UsageError, ContentError, StorageError: see `prepare`; also if the output would create a
            folder where the next preparation of `source` looks for images.
    """
    listings = Listings()
    sources = sources_of(source, config, listings)
    _refuse_other_layout(source, output, config, listings)
    # On other workers the command has another name.
    paths = None if open_workers else CommandPaths(source, output)
    command = _Command(open_workers, progress, paths)
    return _prepare_listed(sources, output, config, listings, command)


def prepare(
    sources: Sequence[Source],
    output_url: str,
    config: PrepConfig,
    *,
    open_workers: OpenWorkers | None = None,
    progress: bool = True,
) -> Manifest:
    """Prepares the dataset at `output_url`, unless it is finished, and returns its manifest.

    Args:
        open_workers: opens the workers that read and encode, after all other checks. None:
            processes of this machine.
        progress: show the progress on stderr.

    Raises:
        UsageError: a source is missing or empty, the output is a file or inside a source, or it
            contains another preparation.
        ContentError: a file is bad or splits leak; nothing was committed.
        StorageError: storage is unavailable, read-only or full; the same call continues.
    """
    command = _Command(open_workers, progress)
    return _prepare_listed(sources, output_url, config, Listings(), command)


@dataclasses.dataclass(frozen=True)
class _Command:
    """The arguments of `prepare` that do not change the dataset."""

    open_workers: OpenWorkers | None
    progress: bool
    paths: CommandPaths | None = None


def _prepare_listed(
    sources: Sequence[Source],
    output_url: str,
    config: PrepConfig,
    listings: Listings,
    command: _Command,
) -> Manifest:
    if not sources:
        raise UsageError("prep: no sources were given; give at least one folder of images")
    store = open_store(output_url)
    if is_file(store):
        raise UsageError(f"{store.url}: is a file; OUTPUT must be a folder, which prep creates")
    if config.off_map_limit != PrepConfig.model_fields["off_map_limit"].default:
        logger.warning("--off-map-limit has no effect; remove it")
    prep_input = collect_input(sources, store, config, listings)
    is_finished = store.stat(MANIFEST_NAME) is not None
    if not is_finished:
        # In the staging folder, with which a remaining probe is deleted.
        probe_writable(store.subpath(STATE_PREFIX), may_stay=True)
    with (command.open_workers or _processes(config, len(prep_input.items)))() as workers:
        work = _with_mask_options(
            _Work(store, config, workers, command.progress), prep_input, command.paths
        )
        manifest = _finished(work, prep_input) if is_finished else _prepare(work, prep_input)
    warn_of_lost_regions(manifest)
    return manifest


def _refuse_other_layout(source: str, output: str, config: PrepConfig, listings: Listings) -> None:
    store = open_store(output)
    folder = folder_made_by(store, source, listings) if config.format == "pairs" else None
    if folder:
        raise UsageError(
            f"{store.url}: the output would create {folder}, where the next prep looks for images; "
            "choose another"
        )


def _processes(config: PrepConfig, num_items: int) -> OpenWorkers:
    wanted = config.num_processes or available_cores()
    return functools.partial(local_workers, max(1, min(wanted, num_items)))


@dataclasses.dataclass(frozen=True)
class _Work:
    """The arguments that every step needs."""

    store: ObjectStore
    config: PrepConfig
    workers: Workers
    progress: bool
    masks: ChosenMasks | None = None

    @property
    def mask_choice(self) -> MaskChoice | None:
        """How the masks are read, where the user gave no options."""
        return None if self.masks is None else self.masks.choice


def _with_mask_options(work: _Work, prep_input: PrepInput, paths: CommandPaths | None) -> _Work:
    """Returns the arguments with options about masks for all that the user did not give."""
    items = prep_input.items

    def samples() -> Iterator[MaskStatistics]:
        task = SampleTask((), work.config.max_pixels, _num_requests(work, items))
        return read_samples(items, work.workers, task, rest)

    def rest(tasks: Sequence[SampleTask], num_files: int) -> Iterator[MaskStatistics]:
        yield from _each(work, statistics_of_files, tasks, "reading masks", num_files, _num_files)

    chosen = choose_mask_options(work.config, existing_options(work.store), samples, paths)
    return dataclasses.replace(work, config=chosen.config, masks=chosen)


def _num_files(masks: MaskStatistics) -> int:
    return masks.num_files


def _prepare(work: _Work, prep_input: PrepInput) -> Manifest:
    config, store = work.config, work.store
    colors = UnmappedColors()
    results = _scan(work, prep_input.items, colors)
    samples = [result for result in results if isinstance(result, EncodedSample)]
    bad = [(result.file, result.reason) for result in results if isinstance(result, RejectedPair)]
    refused = [*prep_input.refused, *bad]
    check_usable(samples, refused, prep_input.wanted_splits)
    assignment = assign(samples, config)
    warn_of_missing_classes(samples, assignment, config)
    samples = [dataclasses.replace(s, group=assignment.groups[s.id]) for s in samples]
    pixel_format = pixel_format_of(samples, config)
    above = warn_of_clipped(samples, pixel_format, config)
    warn_of_mixed(samples, pixel_format, config)
    tasks = plan_shards(
        samples,
        assignment.splits,
        pixel_format=pixel_format,
        output_url=store.url,
        shard_size_mb=config.shard_size,
        seed=config.seed,
    )
    source_sha256 = _digest_of_scanned(prep_input, results)
    claim_output(store, _plan(work, source_sha256))
    shards = _write(work, tasks)
    rows = list(sample_rows(tasks, shards, assignment.folds))
    table = samples_to_parquet(rows)
    contents = Contents(
        prep_input.name, pixel_format, samples, assignment, shards, table, source_sha256
    )
    manifest = build_manifest(contents, config, work.mask_choice)
    write_report(store, manifest, rows, refused)
    write_clipped(store, above)
    write_unmapped_colors(store, samples, colors, manifest.classes)
    if config.format == "inbreast":
        write_counts(store, samples, {item.id for item in prep_input.items if item.mask is None})
    commit(store, manifest, table)
    remove_state(store)
    if refused:
        logger.warning("list of skipped files: %s/%s", store.url, report_figures.REJECTS_NAME)
    return manifest


def _plan(work: _Work, source_sha256: str) -> dict[str, Any]:
    plan = {"options": identity_of(work.config), "source_sha256": source_sha256}
    if work.mask_choice is not None:
        plan["mask_choice"] = work.mask_choice.model_dump(mode="json")
    return plan


def _finished(work: _Work, prep_input: PrepInput) -> Manifest:
    """Returns the existing manifest if it has the same options and files; else raises."""
    manifest, _ = read_manifest(work.store)
    # An option that an earlier version did not have had its default value.
    options = identity_of(PrepConfig()) | manifest.options
    found = {"options": options, "source_sha256": manifest.source_sha256}
    plan = {"options": identity_of(work.config), "source_sha256": manifest.source_sha256}
    if found["options"] == plan["options"]:
        items = prep_input.items
        unlisted = [item for item in items if listed_crcs(item) is None]
        read = iter(_compare(work, unlisted))
        crcs = [listed_crcs(item) or next(read) for item in items]
        plan["source_sha256"] = source_digest(items, crcs, prep_input.refused)
    if found != plan:
        raise UsageError(
            f"{work.store.url}: contains another dataset ({describe_difference(found, plan)}); "
            "choose another folder or delete it"
        )
    remove_state(work.store)
    logger.info("%s: finished already with these options and files", work.store.url)
    if work.config.format == "pairs" and (manifest.reading_rules or 1) < READING_RULES:
        logger.info(
            "%s: an earlier version read the masks, by other rules; to read them by the present "
            "ones, prepare them into another folder",
            work.store.url,
        )
    return manifest


def _compare(work: _Work, unlisted: Sequence[SourcePair]) -> list[tuple[int, int]]:
    """Returns the checksums of items that the store does not list; shows no progress of none."""
    if not unlisted:
        return []
    return list(_each(work, source_crcs, unlisted, "comparing", len(unlisted), lambda _: 1))


def _digest_of_scanned(
    prep_input: PrepInput, results: Sequence[EncodedSample | RejectedPair]
) -> str:
    crcs = {result.image_id: result.source_crcs for result in results}
    return source_digest(
        prep_input.items, [crcs[item.id] for item in prep_input.items], prep_input.refused
    )


def _scan(
    work: _Work, items: Sequence[SourcePair], colors: UnmappedColors
) -> list[EncodedSample | RejectedPair]:
    """Returns the results of pass 1; their unmapped colours are added to `colors`."""
    config = work.config
    layout = Layout(
        height=config.height,
        width=config.width,
        geometry=config.kind,
        channels=config.channels,
        classes=config.color_map,
        ignore_id=config.ignore_value,
        max_pixels=config.max_pixels,
        format=config.format,
        rois=config.rois,
        crop=config.crop,
        flip=config.flip,
        tile_overlap=config.tile_overlap,
        full_scale=config.full_scale,
        ignored=config.ignored_colors,
        mask_encoding=config.file_encoding if work.masks is None else work.masks.encoding,
        file_ids=config.dataset_classes.file_ids,
        has_ignore_id=config.ignore_id is not None,
        palette=() if work.masks is None else work.masks.palette,
    )
    staging = staging_url(work.store.url)
    chunks = [
        ScanTask(staging, layout, chunk, config.skip_bad, config.dicom_reader)
        for chunk in chunked(items, layout)
    ]
    staged = {stat.name for stat in open_store(staging).list()}
    tasks = batched(chunks, staged, work.workers.num_workers(), _num_requests(work, items))
    try:
        chunks_of_results = _each(work, scan_chunks, tasks, "encoding", len(items), _num_images)
        return [result for chunk in chunks_of_results for result in colors.take(chunk)]
    except ContentError as error:
        hint = _hint_of_sample(work, items, str(error))
        raise ContentError(f"{error}; or skip such files with --skip-bad{hint}") from error


def _hint_of_sample(work: _Work, items: Sequence[SourcePair], problem: str) -> str:
    """Returns what finds other classes if only a sample of the masks decided about them.

    Args:
        problem: of a file, whose name is at its beginning.
    """
    choice = work.mask_choice
    masks = [mask for item in items for mask in item.masks]
    if choice is None or choice.num_files >= len(masks):
        return ""
    if not any(problem.startswith(mask.label) for mask in masks):
        return ""
    return f"; classes were found from {choice.num_files} masks, and flexunet inspect reads all"


def _num_requests(work: _Work, items: Sequence[SourcePair] = ()) -> int:
    """Returns how many requests each worker may send at once."""
    urls = {file.url for item in items for file in item.files}
    stores = [work.store, *map(open_store, urls)]
    return num_requests(*stores, num_processes=work.workers.num_workers())


def _num_images(results: Sequence[EncodedSample | RejectedPair]) -> int:
    return len({result.image_id for result in results})


def _write(work: _Work, tasks: Sequence[ShardTask]) -> list[WrittenShard]:
    num_images = sum(len(task.records) for task in tasks)
    number = _num_requests(work)
    tasks = [dataclasses.replace(task, num_requests=number) for task in tasks]
    return list(_each(work, write_shard, tasks, "writing", num_images, _num_records))


def _num_records(shard: WrittenShard) -> int:
    return len(shard.records)


def _each(
    work: _Work,
    function: Callable[[T], R],
    tasks: Iterable[T],
    title: str,
    num_images: int,
    images_in: Callable[[R], int],
) -> Iterator[R]:
    """Runs `function` on each task; yields the results in order and shows progress in images."""
    with Progress(title, num_images, shown=work.progress) as bar:
        for result in work.workers.in_order(function, tasks):
            bar.advance(images_in(result))
            yield result
