"""Predicts a chunk of images in one process: reading, the network and writing at the same time.

How much waits between them is bounded, so that memory depends on the batch and not on the number of
images. A chunk may be predicted twice.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from data_prep.imaging.geometry import Geometry, apply_geometry, fit, undo_geometry
from data_prep.imaging.tiles import starts
from data_prep.shards.manifest import Manifest
from flexunet.errors import ContentError, StorageError
from flexunet.process_pool import available_cores, in_order
from flexunet.storage import Forbidden, NotFound, ObjectStore, open_source, open_store
from job.inference.inputs import OVERLAYS_FOLDER, mask_name, read_any
from job.inference.options import InferConfig
from job.inference.postprocess import Ids, area_scale, class_ids, class_ids_at_source, without_small
from job.inference.preprocess import to_model_pixels
from job.inference.sliding_window import Step, Windows, slide
from job.models.flips import Flips
from job.runs.loading import Member, TrainedRun, load_model, open_run

# The longest side of the picture that is kept for the overlay, pixels; no overlay is larger.
_PREVIEW_SIDE = 1600


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
class Predictor:
    """The network that predicts, and the dataset of its first run."""

    step: Step
    manifest: Manifest


@dataclass(frozen=True)
class _Picture:
    name: str
    pixels: np.ndarray  # (H, W, C), as the model takes it, or larger where windows slide over it
    geometry: Geometry
    preview: np.ndarray | None  # (h, w, C), for the overlay


def predict_chunk(chunk: Chunk) -> list[tuple[str, str]]:
    """Writes the masks of `chunk`; returns (file, reason) of the images that cannot be read.

    The model stays in this process for the next chunk. A chunk that runs again writes the same
    bytes.
    """
    predictor = _kept_predictor(chunk.members, chunk.config.flips, needs_gpu=chunk.config.needs_gpu)
    return predict_images(chunk, predictor, lambda: None)


@functools.lru_cache(maxsize=1)
def _kept_predictor(members: tuple[Member, ...], flips: Flips, *, needs_gpu: bool) -> Predictor:
    # A member's digest is there for the cache: the folder may have got other weights.
    return load_predictor(members, flips, needs_gpu=needs_gpu)


def load_predictor(members: Sequence[Member], flips: Flips, *, needs_gpu: bool) -> Predictor:
    """Returns the network of the weights of `members`; TensorFlow is imported here.

    Raises:
        UsageError: there is no GPU, but one is needed.
        StorageError: a checkpoint has vanished since it was chosen.
    """
    from job.distributed.runtime import import_tensorflow
    from job.distributed.strategy import require_gpu

    import_tensorflow()
    if needs_gpu:
        require_gpu()
    from job.models.ensemble import make_probability_step, network_of

    runs = [open_run(member.run) for member in members]
    models = [_model_of(run, member) for run, member in zip(runs, members, strict=True)]
    step = make_probability_step(network_of(models, flips))
    return Predictor(step, runs[0].manifest)


def _model_of(run: TrainedRun, member: Member) -> Any:
    try:
        return load_model(run, which=member.checkpoint)[0]
    except NotFound as error:
        raise StorageError(
            f"{run.store.url}/{member.checkpoint}: vanished, as training went on; run it again "
            "with --overwrite, or with another OUTPUT"
        ) from error


def predict_images(
    chunk: Chunk,
    predictor: Predictor,
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
    source: ObjectStore, name: str, manifest: Manifest, config: InferConfig
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
    pictures: Iterator[_Picture], predictor: Predictor, batch_size: int
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
    predictor: Predictor,
    batch_size: int,
    overlap: int,
    tell: Callable[[str], None],
) -> Iterator[tuple[_Picture, np.ndarray]]:
    """Yields each picture, which is at its own size, with its class ids (H, W) uint8.

    The probabilities of a large picture are never there all at once; `tell` hears how far it is.
    """
    manifest = predictor.manifest
    windows = Windows(manifest.image_height, manifest.image_width, overlap, batch_size)
    for picture in pictures:
        bands = slide(picture.pixels, predictor.step, windows)
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


def _write_picture(picture: _Picture, ids: Ids, manifest: Manifest, output: ObjectStore) -> None:
    from job.reporting import plots

    name = mask_name(picture.name)
    if picture.preview is not None:
        overlay = plots.overlay_png(picture.preview, ids, manifest.classes)
        _put_overlay(output, f"{OVERLAYS_FOLDER}/{name}", overlay)
    # The mask last: it is what a continued call looks for.
    output.put(name, plots.mask_png(ids, manifest.classes))


def _put_overlay(output: ObjectStore, name: str, overlay: bytes) -> None:
    """An overlay of a call that was stopped may stay: an account may create, and not replace."""
    try:
        output.put(name, overlay)
    except Forbidden:
        if output.stat(name) is None:
            raise
