"""Predicts the masks of a folder of images: decides what is to do, and cuts it into chunks."""

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from data_prep.shards.manifest import Manifest
from flexunet.errors import UsageError
from flexunet.process_pool import OpenWorkers
from flexunet.progress import Progress
from flexunet.storage import join_url, open_source, open_store
from job.inference.chunk import Chunk, ChunkResult, predict_chunk, predict_images
from job.inference.inputs import (
    mask_name,
    refuse_files,
    refuse_overlap,
    refuse_overlays_folder,
    sort_images,
)
from job.inference.options import InferConfig
from job.inference.outputs import claim_output, list_unreadable, record_of
from job.inference.prediction import color_warning, load_predictor
from job.inference.region_filter import read_min_pixels
from job.models.compatibility import window_overlap
from job.runs.loading import EnsembleMember, ensemble_member, find_checkpoint, open_ensemble

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class InferResult:
    """What `infer` did."""

    output_url: str
    num_written: int
    num_kept: int
    unreadable: tuple[tuple[str, str], ...]  # (file, reason)
    passed_over: tuple[str, ...] = ()  # files that are no images


def infer(
    run_url: str,
    images_url: str,
    output_url: str | None,
    config: InferConfig,
    *,
    open_workers: OpenWorkers | None = None,
) -> InferResult:
    """Writes the mask of every image below `images_url`, in the classes' colours, at its own size.

    What `output_url` already has is kept, so that a stopped call continues. Images that cannot be
    read are listed in `unreadable.csv`.

    Args:
        open_workers: opens the workers that predict, when there is something to do. None: this
            process.

    Raises:
        UsageError: no run, runs that do not go together, no images, two images whose masks would
            have one name, or output and images in one another.
        StorageError: an image vanished, or storage is unavailable; the same call continues.
    """
    runs = open_ensemble([run_url, *config.ensemble])
    manifest = runs[0].manifest
    overlap = None
    if _is_sliding(config, manifest):
        overlap = window_overlap(manifest, config.overlap, runs[0].config.window_overlap)
    source = open_source(images_url)
    output = open_store(output_url or join_url(run_url, "inference"))
    refuse_files(source, output)
    refuse_overlap(source, output)
    names, passed_over = sort_images(source)
    if config.window == "sliding" and manifest.geometry != "tile":
        logger.warning(
            "--window sliding: windows of %dx%d pixels of the pictures as they are, by a run that "
            "was trained on whole pictures of that size: in larger ones all looks larger than what "
            "it has learnt",
            manifest.image_width,
            manifest.image_height,
        )
    if config.overlays:
        refuse_overlays_folder(source, names)
    done = set() if config.overwrite else {stat.name for stat in output.list()}
    todo = tuple(name for name in names if mask_name(name) not in done)
    # Named by their folders: these weights stay the same while the run is trained further.
    members = tuple(
        ensemble_member(run, find_checkpoint(run.store, which=config.checkpoint)) for run in runs
    )
    min_pixels = _min_pixels(config, manifest, members, overlap)
    record = record_of(members, source, config, min_pixels, overlap)
    claim_output(output, record, is_continued=len(todo) < len(names))
    whole = Chunk(members, source.url, output.url, config, todo, min_pixels, overlap)
    unreadable = _predict_all(whole, manifest, open_workers) if todo else []
    list_unreadable(output, unreadable)
    return InferResult(
        output_url=output.url,
        num_written=len(todo) - len(unreadable),
        num_kept=len(names) - len(todo),
        unreadable=tuple(unreadable),
        passed_over=passed_over,
    )


def _is_sliding(config: InferConfig, manifest: Manifest) -> bool:
    return config.window == "sliding" or manifest.geometry == "tile"


def _min_pixels(
    config: InferConfig, manifest: Manifest, members: Sequence[EnsembleMember], overlap: int | None
) -> tuple[int, ...]:
    if config.small_regions is None:
        return ()
    if _is_sliding(config, manifest) and manifest.geometry != "tile":
        raise UsageError(
            f"--small-regions={config.small_regions}: its sizes are pixels of resized pictures, "
            "and --window sliding does not resize; leave one of the two out"
        )
    names = [each.name for each in manifest.classes if each.id != 0]
    return read_min_pixels(open_store(config.small_regions), names, members, config.flips, overlap)


def _predict_all(
    whole: Chunk, manifest: Manifest, open_workers: OpenWorkers | None
) -> list[tuple[str, str]]:
    """Writes the masks of `whole`; returns (file, reason) of the images that cannot be read."""
    results = list(_results(whole, open_workers))
    other_colors = [name for result in results for name in result.other_colors]
    warning = color_warning(other_colors, manifest)
    if warning is not None:
        logger.warning("%s", warning)
    return [each for result in results for each in result.unreadable]


def _results(whole: Chunk, open_workers: OpenWorkers | None) -> Iterator[ChunkResult]:
    """Yields the results of the parts of `whole`, which workers do, or this process at once."""
    config = whole.config
    if open_workers is None:
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
    """Yields parts of whole batches: several for each worker, so that none waits long for others.

    At most 8 batches, which a worker that dies would have to do again.
    """
    names, batch_size = whole.names, whole.config.batch_size
    num_batches = math.ceil(len(names) / batch_size)
    size = batch_size * min(8, math.ceil(num_batches / (4 * num_workers)))
    for start in range(0, len(names), size):
        yield replace(whole, names=names[start : start + size])
