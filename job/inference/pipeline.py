"""Predicts the masks of a folder of images: selects the images and cuts them into chunks."""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from data_prep.shards.manifest import Manifest
from flexunet.errors import StorageError
from flexunet.process_pool import OpenWorkers
from flexunet.progress import Progress, waiting
from flexunet.storage import (
    NotFound,
    ObjectMeta,
    ObjectStore,
    PreconditionFailed,
    join_url,
    open_store,
)
from flexunet.text import legible, pluralize
from job.inference.chunk import Chunk, ChunkResult, predict_chunk, predict_images
from job.inference.inputs import (
    OVERLAYS_FOLDER,
    mask_name,
    open_images,
    refuse_files,
    refuse_folder,
    refuse_overlap,
    select_images,
)
from job.inference.mask_sources import (
    MaskPlan,
    delete_outdated,
    overlay_names,
    plan_masks,
    read_sources,
    report_plan,
    write_sources,
)
from job.inference.options import InferConfig
from job.inference.outputs import (
    OutputClaim,
    claim_output,
    list_passed_over,
    list_unreadable,
    made_otherwise,
    record_of,
    refuse_other_masks,
)
from job.inference.prediction import (
    color_warning,
    find_members,
    load_predictor,
    overlap_of,
    postprocessing_of,
    scale_warning,
)
from job.inference.probability_files import PROBABILITIES_FOLDER, probability_names
from job.postprocessing.masks import Postprocessing
from job.runs.loading import EnsembleMember, TrainedRun, open_ensemble

logger = logging.getLogger(__name__)

_MAX_PLANS = 20  # that other calls may outrun


@dataclass(frozen=True)
class InferResult:
    """The result of `infer`.

    Attributes:
        output_url: folder or gs:// URL of the masks.
        masks: URL of the mask of each readable image, in the order of the images.
        num_written: masks that this call predicted.
        num_kept: masks of earlier calls.
        unreadable: (file, reason) of the images that could not be read.
        passed_over: files that are not images.
        gone: masks of images that are no longer there.
        is_file: IMAGES was one file.
    """

    output_url: str
    masks: tuple[str, ...]
    num_written: int
    num_kept: int
    unreadable: tuple[tuple[str, str], ...]
    passed_over: tuple[str, ...] = ()
    gone: tuple[str, ...] = ()
    is_file: bool = False


def infer(
    run_url: str,
    images_url: str,
    output_url: str | None,
    config: InferConfig,
    *,
    open_workers: OpenWorkers | None = None,
) -> InferResult:
    """Writes the mask of every image, in the colours of the classes and at its original size.

    A mask that `output_url` already has is kept if its image is still the same, so that a stopped
    call continues. Images that cannot be read are listed in `unreadable.csv`, files that are
    not images in `passed_over.csv`.

    Args:
        images_url: a folder, or one image.
        open_workers: opens the workers that predict, if there is something to do. None: this
            process predicts.

    Raises:
        UsageError: no run, runs that do not match, no images, two images whose masks would
            have one name, output and images that contain each other, or masks
            of another run or folder.
        StorageError: an image was deleted, or storage is unavailable; the same call continues.
    """
    runs = open_ensemble([run_url, *config.ensemble])
    manifest = runs[0].manifest
    overlap = overlap_of(runs[0], config)
    source, file = open_images(images_url)
    output = open_store(output_url or join_url(run_url, "inference"))
    refuse_files(source, file, output)
    refuse_overlap(source, file, output)
    images, passed_over = select_images(source, file)
    if warning := scale_warning(config, manifest):
        logger.warning("%s", warning)
    _refuse_folders(source, [each.name for each in images], config)
    # Refer to the folders of checkpoints: these weights stay the same if training continues.
    members = find_members(runs, config.checkpoint)
    postprocessing = _logged_postprocessing(config, runs, members, overlap)
    record = record_of(members, source, config, postprocessing, overlap)
    plan, objects = _prepare_output(output, images, record, config)
    whole = Chunk(members, source.url, output.url, config, plan.todo, postprocessing, overlap)
    sources = {name: plan.sources[name] for name in map(mask_name, plan.todo)}
    whole = replace(whole, record=record, sources=sources)
    unreadable = _predict_all(whole, manifest, open_workers) if plan.todo else []
    if file is None:  # the tables are about all images
        list_unreadable(output, unreadable)
        list_passed_over(output, passed_over)
    failed = {name for name, _ in unreadable}
    gone = [*map(mask_name, failed), *overlay_names(failed), *probability_names(failed)]
    delete_outdated(output, objects, gone)
    return InferResult(
        output_url=output.url,
        masks=tuple(
            join_url(output.url, mask_name(each.name)) for each in images if each.name not in failed
        ),
        num_written=len(plan.todo) - len(unreadable),
        num_kept=len(images) - len(plan.todo),
        unreadable=tuple(unreadable),
        passed_over=passed_over,
        gone=plan.gone if file is None else (),
        is_file=file is not None,
    )


def _logged_postprocessing(
    config: InferConfig,
    runs: Sequence[TrainedRun],
    members: Sequence[EnsembleMember],
    overlap: int | None,
) -> Postprocessing:
    """Returns how probabilities become masks; logs what was fitted for it."""
    found = postprocessing_of(config, runs, members, overlap)
    if found.line is not None:
        logger.info("%s", found.line)
    return found.values


def _refuse_folders(source: ObjectStore, names: Sequence[str], config: InferConfig) -> None:
    """Refuses images whose masks would be among other files of OUTPUT."""
    if config.overlays:
        refuse_folder(source, names, OVERLAYS_FOLDER, "--no-overlays")
    if config.probabilities != "none":
        refuse_folder(source, names, PROBABILITIES_FOLDER, "--probabilities none")


def _prepare_output(
    output: ObjectStore,
    images: Sequence[ObjectMeta],
    record: Mapping[str, Any],
    config: InferConfig,
) -> tuple[MaskPlan, Mapping[str, ObjectMeta]]:
    """Writes the records of OUTPUT; returns what to predict and the earlier objects of OUTPUT.

    Calls for single images may begin at once: each plans again after another has written a record.

    Raises:
        StorageError: other calls were first each time.
    """
    for _ in range(_MAX_PLANS):
        try:
            plan, objects = _write_plan(output, images, record, config)
            break
        except (PreconditionFailed, NotFound) as error:
            problem = error
    else:
        raise StorageError(
            f"{output.url}: another infer is writing here; wait until it ends, then run "
            "the same command again"
        ) from problem
    report_plan(output, plan)
    claim_output(output, record)
    if not config.overlays:
        delete_outdated(output, objects, overlay_names(plan.todo))
    others = probability_names(plan.todo, without=config.probabilities)
    delete_outdated(output, objects, others)
    return plan, objects


def _write_plan(
    output: ObjectStore,
    images: Sequence[ObjectMeta],
    record: Mapping[str, Any],
    config: InferConfig,
) -> tuple[MaskPlan, Mapping[str, ObjectMeta]]:
    objects = {stat.name: stat for stat in output.list()}
    sources = read_sources(output, objects)
    is_other = config.overwrite and made_otherwise(output, record)
    plan = plan_masks(images, objects, sources, overwrite=config.overwrite, is_other=is_other)
    is_continued = plan.holds_masks and not config.overwrite
    refuse_other_masks(output, record, is_continued=is_continued)
    # Write the record of images first: a call that is then killed keeps no mask of another run.
    if plan.sources != sources:
        write_sources(output, objects, plan.sources)
    return plan, objects


def _predict_all(
    whole: Chunk, manifest: Manifest, open_workers: OpenWorkers | None
) -> list[tuple[str, str]]:
    """Writes the masks of `whole`; returns (file, reason) of the unreadable images."""
    results = list(_results(whole, open_workers))
    other_colors = [name for result in results for name in result.other_colors]
    warning = color_warning(other_colors, manifest)
    if warning is not None:
        logger.warning("%s", warning)
    old_overlays = [name for result in results for name in result.old_overlays]
    if old_overlays:
        logger.warning(
            "%s: these credentials cannot replace %s of an earlier call, first %s; delete them or "
            "give another OUTPUT",
            whole.output_url,
            pluralize(len(old_overlays), "overlay"),
            legible(overlay_names(old_overlays)[0]),
        )
    if whole.record is not None:
        OutputClaim(open_store(whole.output_url), whole.record, whole.sources).check()
    return [each for result in results for each in result.unreadable]


def _results(whole: Chunk, open_workers: OpenWorkers | None) -> Iterator[ChunkResult]:
    """Yields the results of the parts of `whole`, from workers or from this process."""
    config = whole.config
    if open_workers is None:
        if whole.overlap is None:  # a batch is filled up, which a few images do not need
            size = min(config.batch_size, len(whole.names))
            whole = replace(whole, config=config.model_copy(update={"batch_size": size}))
        with waiting("loading TensorFlow and the weights", shown=config.progress):
            predictor = load_predictor(whole.members, config.flips, needs_gpu=config.needs_gpu)
        with Progress("infer", len(whole.names), shown=config.progress) as progress:
            yield predict_images(whole, predictor, progress.advance, progress.note)
        return
    with (
        open_workers() as workers,
        Progress("infer", len(whole.names), shown=config.progress) as progress,
    ):
        chunks = list(_cut(whole, workers.num_workers()))
        for chunk, result in zip(chunks, workers.in_order(predict_chunk, chunks), strict=True):
            progress.advance(len(chunk.names))
            yield result


def _cut(whole: Chunk, num_workers: int) -> Iterator[Chunk]:
    """Yields parts of whole batches: several per worker, so that none waits long at the end.

    A part has at most 8 batches: if a worker dies, its part is predicted again.
    """
    names, batch_size = whole.names, whole.config.batch_size
    num_batches = math.ceil(len(names) / batch_size)
    size = batch_size * min(8, math.ceil(num_batches / (4 * num_workers)))
    for start in range(0, len(names), size):
        part = names[start : start + size]
        sources = {name: whole.sources[name] for name in map(mask_name, part)}
        yield replace(whole, names=part, sources=sources)
