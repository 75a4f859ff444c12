"""Masks for a folder of images of any size.

Reading, the network and writing go on at the same time; how much waits between them is bounded, so
that memory depends on the batch and not on the number of images. Other processes may do parts of
it: what is to do is decided first, and a part may be done twice.

python -m job.infer RUN IMAGES [OUTPUT]
"""

import functools
import itertools
import json
import logging
import math
import posixpath
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import click
import numpy as np

from data_prep.imaging.codecs import DEFAULT_MAX_PIXELS, read_image
from data_prep.imaging.dicom import DICOM_ENDINGS, is_dicom, read_dicom
from data_prep.imaging.geometry import Geometry, apply_geometry, fit, undo_geometry
from data_prep.imaging.tiles import starts
from data_prep.shards.manifest import Manifest
from data_prep.sources.dicom_files import dicom_without_ending, stem_of
from data_prep.sources.pairs import IMAGE_ENDINGS
from flexunet.cli.interrupts import quiet_interrupts
from flexunet.cli.options import PATH, SettingsCommand, from_options, settings_options
from flexunet.cli.runner import run_command
from flexunet.errors import ContentError, StorageError, UsageError
from flexunet.process_pool import OpenWorkers, available_cores, in_order
from flexunet.progress import Progress
from flexunet.settings import flag_of, option
from flexunet.storage import (
    Forbidden,
    NotFound,
    Store,
    folder_problem,
    is_file,
    join_url,
    lies_in,
    open_source,
    open_store,
)
from flexunet.tables import csv_table
from flexunet.text import counted, legible
from job.inference.predict import (
    Flips,
    Ids,
    PredictConfig,
    Step,
    area_scale,
    class_ids,
    class_ids_at_source,
    slide,
    to_model_pixels,
    without_small,
)
from job.inference.region_filter import read_min_pixels
from job.models.compatibility import window_overlap
from job.runs.loading import (
    Member,
    TrainedRun,
    find_checkpoint,
    load_model,
    member_of,
    open_alike,
    open_trained,
)

logger = logging.getLogger(__name__)

OVERLAYS_FOLDER = "overlays"
UNREADABLE_NAME = "unreadable.csv"
RECORD_NAME = "inference.json"  # which run, weights and images the masks are of

# The longest side of the picture that is kept for the overlay, pixels; no overlay is larger.
_PREVIEW_SIDE = 1600

# What a record says and what it is where the record lacks it; None: no option of that name.
_RECORDED = {
    "run": None,
    "checkpoint": None,
    "images": None,
    "ensemble": "none",
    "flips": "none",
    "window": "auto",
    "small_regions": "none",
    "full_scale": "the dataset's",
}
_MAX_CHANGES = 3  # that are told


class InferConfig(PredictConfig):
    """Options of `flexunet infer`."""

    batch_size: int = option(8, "Images, or windows, predicted at once.", ge=1)
    window: Literal["auto", "sliding"] = option(
        "auto",
        "sliding: predict pictures at their own size, in overlapping windows of the network's; "
        "auto: do so where the run was trained on tiles, else resize them as for training.",
    )
    small_regions: str | None = option(
        None,
        "Evaluation (folder or gs:// URL) made with --remove-small-regions: predict no regions "
        "below its sizes.",
        path=True,
    )
    full_scale: int | None = option(
        None,
        "Raw value of full intensity of 16-bit images whose files do not say it, as DICOM files "
        "do; unset: the dataset's of the run.",
        ge=255,
        le=65535,
    )
    overlays: bool = option(True, "Write contours over the images to OUTPUT/overlays.")
    overwrite: bool = option(False, "Predict again what OUTPUT already has.")
    max_pixels: int = option(100_000_000, "Larger images are refused, pixels.", ge=1)
    progress: bool = option(True, "Show a progress bar on a terminal.")


@dataclass(frozen=True)
class InferResult:
    """What `infer` did."""

    output_url: str
    num_written: int
    num_kept: int
    unreadable: tuple[tuple[str, str], ...]  # (file, reason)
    passed_over: tuple[str, ...] = ()  # files that are no images


@dataclass(frozen=True)
class Chunk:
    """Images to predict, and all that a process needs for it; may run twice.

    Attributes:
        members: the weights whose mean predicts.
        min_pixels: of each class but 0, at the network's size; smaller regions go.
        overlap: of windows, pixels; None where pictures are predicted whole.
    """

    members: tuple[Member, ...]
    images_url: str
    output_url: str
    config: InferConfig
    names: tuple[str, ...]
    min_pixels: tuple[int, ...]
    overlap: int | None


@dataclass(frozen=True)
class _Predictor:
    step: Step
    manifest: Manifest


@dataclass(frozen=True)
class _Picture:
    name: str
    pixels: np.ndarray  # (H, W, C), as the model takes it, or larger where windows slide over it
    geometry: Geometry
    preview: np.ndarray | None  # (h, w, C), for the overlay


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
    runs = open_alike([run_url, *config.ensemble])
    manifest = runs[0].manifest
    overlap = None
    if _is_sliding(config, manifest):
        overlap = window_overlap(manifest, config.overlap, runs[0].config.window_overlap)
    source = open_source(images_url)
    output = open_store(output_url or join_url(run_url, "inference"))
    _refuse_files(source, output)
    _refuse_overlap(source, output)
    names, passed_over = sort_images(source)
    if config.window == "sliding" and manifest.geometry != "tile":
        logger.warning(
            "--window sliding: windows of %dx%d pixels of the pictures as they are, by a run that "
            "was trained on whole pictures of that size: in larger ones all looks larger than what "
            "it has learnt",
            *(manifest.image_width, manifest.image_height),
        )
    if config.overlays:
        _refuse_overlays_folder(source, names)
    done = set() if config.overwrite else {stat.name for stat in output.list()}
    todo = tuple(name for name in names if mask_name(name) not in done)
    # Named by their folders: these weights stay the same while the run is trained further.
    members = tuple(
        member_of(run, find_checkpoint(run.store, which=config.checkpoint)) for run in runs
    )
    min_pixels = _min_pixels(config, manifest, members, overlap)
    record = _record(members, source, config, min_pixels, overlap)
    _claim_output(output, record, is_continued=len(todo) < len(names))
    whole = Chunk(members, source.url, output.url, config, todo, min_pixels, overlap)
    unreadable = _predict_all(whole, open_workers) if todo else []
    _list_unreadable(output, unreadable)
    return InferResult(
        output_url=output.url,
        num_written=len(todo) - len(unreadable),
        num_kept=len(names) - len(todo),
        unreadable=tuple(unreadable),
        passed_over=passed_over,
    )


def _list_unreadable(output: Store, unreadable: Sequence[tuple[str, str]]) -> None:
    """Nothing is touched that is right already: an account may create, and not replace."""
    rows = [(legible(file), legible(reason)) for file, reason in unreadable]
    data = csv_table(["file", "reason"], rows).encode() if rows else None
    try:
        found = output.get(UNREADABLE_NAME)
    except NotFound:
        found = None
    if data == found:
        return
    if data is not None:
        output.put(UNREADABLE_NAME, data)
        return
    try:
        output.delete(UNREADABLE_NAME)
    except Forbidden:
        logger.warning(
            "%s/%s is of an earlier call and stays, as these credentials may not delete; all "
            "images were read",
            *(output.url, UNREADABLE_NAME),
        )


def predict_chunk(chunk: Chunk) -> list[tuple[str, str]]:
    """Writes the masks of `chunk`; returns (file, reason) of the images that cannot be read.

    The model stays in this process for the next chunk. A chunk that runs again writes the same
    bytes.
    """
    predictor = _kept_predictor(chunk.members, chunk.config.flips, needs_gpu=chunk.config.needs_gpu)
    return _predict(chunk, predictor, lambda: None)


def _is_sliding(config: InferConfig, manifest: Manifest) -> bool:
    return config.window == "sliding" or manifest.geometry == "tile"


def _min_pixels(
    config: InferConfig, manifest: Manifest, members: Sequence[Member], overlap: int | None
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


def _record(
    members: Sequence[Member],
    source: Store,
    config: InferConfig,
    min_pixels: Sequence[int],
    overlap: int | None,
) -> dict[str, Any]:
    """Returns whose masks OUTPUT holds; what is not asked for is not named."""
    first, *others = members
    record: dict[str, Any] = {
        "run": first.run,
        "checkpoint": first.checkpoint,
        "images": source.url,
    }
    if others:
        record["ensemble"] = [f"{each.run}/{each.checkpoint}" for each in others]
    if config.flips != "none":
        record["flips"] = config.flips
    if overlap is not None:
        record |= {"window": "sliding", "overlap": overlap}
    if config.small_regions is not None:
        # The file may be another one by the next call.
        record |= {"small_regions": config.small_regions, "min_pixels": list(min_pixels)}
    if config.full_scale is not None:
        record["full_scale"] = config.full_scale
    return record


def _claim_output(output: Store, record: Mapping[str, Any], *, is_continued: bool) -> None:
    """Writes down whose masks OUTPUT holds; masks made from or with other things are never kept.

    Raises:
        UsageError: masks would be kept that were made from others.
    """
    try:
        found = json.loads(output.get(RECORD_NAME))
    except (NotFound, ValueError):
        found = None
    if is_continued and found != record:
        changes = _changes(found if isinstance(found, dict) else {}, record)
        raise UsageError(
            f"{output.url}: holds masks made in another way: {'; '.join(changes[:_MAX_CHANGES])}; "
            "give another OUTPUT, or --overwrite to predict them again"
        )
    if found != record:
        output.put(RECORD_NAME, (json.dumps(record, indent=1) + "\n").encode())


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Returns in words what differs between two records (see `_record`)."""
    changes = []
    for name, default in _RECORDED.items():
        before, now = (_worded(record.get(name, default)) for record in (old, new))
        if before != now:
            changes.append(
                f"{name if default is None else flag_of([name])} was {before}, now {now}"
            )
    # What follows from one of these is told where it alone differs.
    both = [record for record in (old, new) if "overlap" in record]
    if len(both) == 2 and old["overlap"] != new["overlap"]:
        changes.append(f"--overlap was {old['overlap']}, now {new['overlap']}")
    if old.get("small_regions") == new.get("small_regions"):
        sizes = [record.get("min_pixels") for record in (old, new)]
        if sizes[0] != sizes[1]:
            where = new.get("small_regions")
            changes.append(f"the sizes of {where} were {sizes[0]}, now {sizes[1]}")
    return changes or ["by another version"]


def _worded(value: Any) -> str:
    if value is None:
        return "unknown"
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def find_images(source: Store) -> list[str]:
    """Returns the names of all images below `source`, sorted; see `sort_images`."""
    return sort_images(source)[0]


def sort_images(source: Store) -> tuple[list[str], tuple[str, ...]]:
    """Returns the names of all images below `source`, sorted, and of the files that are none.

    DICOM files are found by how they begin, too. Hidden files are not mentioned.

    Raises:
        UsageError: there are no images, masks lie beside them, or two would have one mask.
    """
    endings = (*IMAGE_ENDINGS, *DICOM_ENDINGS)
    stats = source.list()
    unnamed = dicom_without_ending(source, stats)
    names = [
        each.name for each in stats if each.name.lower().endswith(endings) or each.name in unnamed
    ]
    if not names:
        raise UsageError(
            f"{source.url}: no images here; expected files ending in {', '.join(endings)}, or "
            "DICOM files of any name"
        )
    if {"images", "masks"} <= {name.rpartition("/")[0] for name in names}:
        raise UsageError(
            f"{source.url}: holds images/ and masks/, and masks are no images to predict; give "
            f"{join_url(source.url, 'images')}"
        )
    by_mask: dict[str, str] = {}
    for name in names:
        other = by_mask.setdefault(mask_name(name), name)
        if other != name:
            raise UsageError(
                f"{source.url}: {other} and {name} would both become {mask_name(name)}; rename one"
            )
    images = set(names)
    others = (each.name for each in stats if each.name not in images)
    return names, tuple(name for name in others if not posixpath.basename(name).startswith("."))


def mask_name(image_name: str) -> str:
    """Returns the object name of the mask of `image_name`."""
    return stem_of(image_name) + ".png"


def read_any(
    data: bytes, *, name: str, max_pixels: int = DEFAULT_MAX_PIXELS
) -> tuple[np.ndarray, int | None]:
    """Returns (h, w, 1|3) pixels of a picture or a DICOM file, and their full scale if it says so.

    Raises:
        ContentError: it cannot be read.
    """
    if is_dicom(data):
        found = read_dicom(data, name=name, max_pixels=max_pixels)
        return found.pixels, found.value_max
    return read_image(data, name=name, max_pixels=max_pixels), None


def _refuse_files(source: Store, output: Store) -> None:
    problem = folder_problem(source)
    if problem:
        raise UsageError(f"{source.url}: {problem}; give IMAGES a folder of images")
    if is_file(output):
        raise UsageError(f"{output.url}: is a file; give OUTPUT a folder, which infer makes")


def _refuse_overlap(source: Store, output: Store) -> None:
    """Masks among the images would be taken for images by the next call, or replace some."""
    if lies_in(source, output) or lies_in(output, source):
        raise UsageError(
            f"{output.url}: the output and the images in {source.url} must not lie in one "
            "another; give another OUTPUT"
        )


def _refuse_overlays_folder(source: Store, names: Sequence[str]) -> None:
    for name in names:
        if name.startswith(f"{OVERLAYS_FOLDER}/"):
            raise UsageError(
                f"{source.url}: the masks of its folder {OVERLAYS_FOLDER} would lie among the "
                "overlays; rename the folder or give --no-overlays"
            )


def _predict_all(whole: Chunk, open_workers: OpenWorkers | None) -> list[tuple[str, str]]:
    """Writes the masks of `whole`, which workers do in parts; returns as `predict_chunk`."""
    config = whole.config
    if open_workers is None:
        predictor = _load_predictor(whole.members, config.flips, needs_gpu=config.needs_gpu)
        with Progress("infer", len(whole.names), shown=config.progress) as progress:
            return _predict(whole, predictor, progress.advance, progress.note)
    unreadable: list[tuple[str, str]] = []
    with (
        open_workers() as workers,
        Progress("infer", len(whole.names), shown=config.progress) as progress,
    ):
        chunks = list(_cut(whole, workers.num_workers()))
        found = workers.in_order(predict_chunk, chunks)
        for chunk, refused in zip(chunks, found, strict=True):
            unreadable += refused
            progress.advance(len(chunk.names))
    return unreadable


def _cut(whole: Chunk, num_workers: int) -> Iterator[Chunk]:
    """Yields parts of whole batches: several for each worker, so that none waits long for others.

    At most 8 batches, which a worker that dies would have to do again.
    """
    names, batch_size = whole.names, whole.config.batch_size
    num_batches = math.ceil(len(names) / batch_size)
    size = batch_size * min(8, math.ceil(num_batches / (4 * num_workers)))
    for start in range(0, len(names), size):
        yield replace(whole, names=names[start : start + size])


@functools.lru_cache(maxsize=1)
def _kept_predictor(members: tuple[Member, ...], flips: Flips, *, needs_gpu: bool) -> _Predictor:
    # A member's digest is there for the cache: the folder may have got other weights.
    return _load_predictor(members, flips, needs_gpu=needs_gpu)


def _load_predictor(members: Sequence[Member], flips: Flips, *, needs_gpu: bool) -> _Predictor:
    from job.distributed.runtime import import_tensorflow, require_gpu

    import_tensorflow()
    if needs_gpu:
        require_gpu()
    from job.inference.network import make_probability_step, network_of

    runs = [open_trained(member.run) for member in members]
    models = [_model_of(run, member) for run, member in zip(runs, members, strict=True)]
    step = make_probability_step(network_of(models, flips))
    return _Predictor(step, runs[0].manifest)


def _model_of(run: TrainedRun, member: Member) -> Any:
    try:
        return load_model(run, which=member.checkpoint)[0]
    except NotFound as error:
        raise StorageError(
            f"{run.store.url}/{member.checkpoint}: vanished, as training went on; run it again "
            "with --overwrite, or with another OUTPUT"
        ) from error


def _predict(
    chunk: Chunk,
    predictor: _Predictor,
    advance: Callable[[], None],
    tell: Callable[[str], None] = lambda text: None,
) -> list[tuple[str, str]]:
    """Writes the masks of `chunk`; returns (file, reason) of those that cannot be read."""
    source, output = open_source(chunk.images_url), open_store(chunk.output_url)
    config, manifest = chunk.config, predictor.manifest
    # Pictures at their own size are large: one is read and one written beside the one predicted.
    num_waiting = 2 * config.batch_size if chunk.overlap is None else 1
    unreadable: list[tuple[str, str]] = []

    def read(name: str) -> _Picture | tuple[str, str]:
        return _read_picture(source, name, manifest, config)

    def write(task: tuple[_Picture, np.ndarray]) -> None:
        picture, found = task
        ids = _mask_at_source(found, picture.geometry, chunk.min_pixels)
        _write_picture(picture, ids, manifest, output)

    with _threads() as readers, _threads() as writers:
        found = in_order(readers, read, chunk.names, num_waiting=num_waiting)
        pictures = _readable(found, unreadable, advance)
        if chunk.overlap is None:
            predicted = _predicted(pictures, predictor, config.batch_size)
        else:
            predicted = _slid(pictures, predictor, config.batch_size, chunk.overlap, tell)
        for _ in in_order(writers, write, predicted, num_waiting=num_waiting):
            advance()
    return unreadable


@contextmanager
def _threads() -> Iterator[Executor]:
    """Yields a pool of threads; at the end what has not begun is dropped."""
    pool = ThreadPoolExecutor(min(8, available_cores()))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _read_picture(
    source: Store, name: str, manifest: Manifest, config: InferConfig
) -> _Picture | tuple[str, str]:
    """Returns the picture, or its name and why it cannot be read."""
    try:
        image, value_max = read_any(source.get(name), name=name, max_pixels=config.max_pixels)
        if value_max is None and image.dtype == np.uint16:
            value_max = config.full_scale
        kind: Literal["tile"] | None = "tile" if config.window == "sliding" else None
        pixels, geometry = to_model_pixels(
            image, manifest, name=name, value_max=value_max, kind=kind
        )
    except ContentError as error:
        return name, str(error)
    return _Picture(name, pixels, geometry, _preview(image) if config.overlays else None)


def _preview(image: np.ndarray) -> np.ndarray:
    height, width = image.shape[:2]
    scale = _PREVIEW_SIDE / max(height, width)
    if scale >= 1:
        return image
    size = max(1, round(height * scale)), max(1, round(width * scale))
    geometry = fit((height, width), size, kind="stretch")
    return apply_geometry(image, geometry, *size, nearest=False)


def _readable(
    found: Iterable[_Picture | tuple[str, str]],
    unreadable: list[tuple[str, str]],
    advance: Callable[[], None],
) -> Iterator[_Picture]:
    for each in found:
        if isinstance(each, _Picture):
            yield each
        else:
            unreadable.append(each)
            advance()


def _predicted(
    pictures: Iterator[_Picture], predictor: _Predictor, batch_size: int
) -> Iterator[tuple[_Picture, np.ndarray]]:
    """Yields each picture with its probabilities, (H, W, K) float32."""
    while batch := list(itertools.islice(pictures, batch_size)):
        pixels = np.stack([picture.pixels for picture in batch])
        # The last batch is filled up: one shape, one compilation.
        filler = np.repeat(pixels[:1], batch_size - len(batch), axis=0)
        probabilities = predictor.step(np.concatenate([pixels, filler])).numpy()
        yield from zip(batch, probabilities[: len(batch)], strict=True)


def _slid(
    pictures: Iterator[_Picture],
    predictor: _Predictor,
    batch_size: int,
    overlap: int,
    tell: Callable[[str], None],
) -> Iterator[tuple[_Picture, np.ndarray]]:
    """Yields each picture, which is at its own size, with its class ids (H, W) uint8.

    The probabilities of a large picture are never there all at once; `tell` hears how far it is.
    """
    manifest = predictor.manifest
    for picture in pictures:
        bands = slide(
            picture.pixels,
            predictor.step,
            height=manifest.image_height,
            width=manifest.image_width,
            overlap=overlap,
            batch_size=batch_size,
        )
        num_rows = len(starts(picture.pixels.shape[0], manifest.image_height, overlap))
        parts = []
        for number, band in enumerate(bands, start=1):
            parts.append(class_ids(band))
            tell(f"{picture.name}: {number}/{num_rows} rows of windows")
        yield picture, np.concatenate(parts)


def _mask_at_source(found: np.ndarray, geometry: Geometry, min_pixels: Sequence[int]) -> Ids:
    """Returns the mask (h, w) of class ids or of probabilities, as `_slid` and `_predicted` yield.

    Regions that are too small are left out.
    """
    is_mask = found.ndim == 2
    ids = (
        undo_geometry(found, geometry, nearest=True)
        if is_mask
        else class_ids_at_source(found, geometry)
    )
    return without_small(ids, min_pixels, area_scale(geometry))


def _write_picture(picture: _Picture, ids: Ids, manifest: Manifest, output: Store) -> None:
    from job.reporting import plots

    name = mask_name(picture.name)
    if picture.preview is not None:
        overlay = plots.overlay_png(picture.preview, ids, manifest.classes)
        _put_overlay(output, f"{OVERLAYS_FOLDER}/{name}", overlay)
    # The mask last: it is what a continued call looks for.
    output.put(name, plots.mask_png(ids, manifest.classes))


def _put_overlay(output: Store, name: str, overlay: bytes) -> None:
    """An overlay of a call that was stopped may stay: an account may create, and not replace."""
    try:
        output.put(name, overlay)
    except Forbidden:
        if output.stat(name) is None:
            raise


@click.command(cls=SettingsCommand)
@click.argument("run", type=PATH)
@click.argument("images", type=PATH)
@click.argument("output", type=PATH, required=False)
@settings_options(InferConfig)
def command(run: str, images: str, output: str | None, **options: Any) -> int:
    """Predict masks for the images in a folder or bucket prefix.

    RUN is the folder or gs:// URL of a run (RUNS/NAME), IMAGES a folder of images of any size,
    OUTPUT your own folder or gs:// URL for the masks (default: in the run, RUN/inference), new or
    not, outside of IMAGES. Writes a mask of IMAGES' name for each image, overlays/, inference.json
    and, where needed, unreadable.csv. Masks that OUTPUT has are kept, so that the same command
    continues after a stop; those of another run, checkpoint or images are refused. --overwrite
    predicts all again. Other files stay.
    """
    config = from_options(InferConfig, options)
    with quiet_interrupts():
        result = infer(run, images, output, config)
    show_result(result, config)
    return 0


def show_result(result: InferResult, config: InferConfig) -> None:
    """Prints where the masks are.

    Raises:
        ContentError: some images could not be read.
    """
    kept = f", {result.num_kept} kept (--overwrite predicts them again)" if result.num_kept else ""
    click.echo(f"masks: {result.output_url} ({result.num_written} written{kept})")
    if config.overlays:
        click.echo(f"overlays: {join_url(result.output_url, OVERLAYS_FOLDER)}")
    if result.passed_over:
        files = counted(len(result.passed_over), "file")
        first = legible(result.passed_over[0])
        click.echo(f"passed over: {files}, neither pictures nor DICOM, first {first}")
    if result.unreadable:
        raise ContentError(
            f"{len(result.unreadable)} of the images could not be read, first "
            f"{result.unreadable[0][1]}; all are in {join_url(result.output_url, UNREADABLE_NAME)}"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return run_command(command, argv, "flexunet infer")


if __name__ == "__main__":
    raise SystemExit(main())
