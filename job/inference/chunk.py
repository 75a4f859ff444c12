"""Predicts a chunk of images in one process; reads, predicts and writes at the same time.

The queues between these steps are bounded, so memory depends on the batch and not on the number of
images. A chunk may be predicted twice.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from data_prep.imaging.geometry import apply_geometry, fit
from data_prep.shards.manifest import Manifest
from flexunet.errors import ContentError
from flexunet.process_pool import available_cores, in_order
from flexunet.storage import (
    Forbidden,
    ObjectStore,
    content_matches,
    open_source,
    open_store,
)
from job.inference.inputs import OVERLAYS_FOLDER, mask_name, read_any
from job.inference.mask_sources import MaskSource
from job.inference.options import InferConfig
from job.inference.outputs import OutputClaim
from job.inference.prediction import (
    ModelImage,
    Predictor,
    load_predictor,
    mask_at_source,
    model_image,
    predict_all,
)
from job.inference.probability_files import probability_file, probability_name
from job.models.flips import Flips
from job.postprocessing.masks import Ids, Postprocessing
from job.runs.loading import EnsembleMember

# The longest side of the image that is kept for the overlay, pixels; no overlay is larger.
_PREVIEW_SIDE = 1600


@dataclass(frozen=True)
class Chunk:
    """Images to predict, with all that a process needs to do so; may run twice.

    Attributes:
        members: the weights whose mean predicts.
        postprocessing: how probabilities become masks.
        overlap: of windows, pixels; None if images are predicted whole.
        record: how the masks of this call are made; None: nothing else writes the output.
        sources: the images of the masks as recorded, by the name of the mask.
    """

    members: tuple[EnsembleMember, ...]
    images_url: str
    output_url: str
    config: InferConfig
    names: tuple[str, ...]
    postprocessing: Postprocessing
    overlap: int | None
    record: Mapping[str, Any] | None = None
    sources: Mapping[str, MaskSource] = field(default_factory=dict)


@dataclass(frozen=True)
class ChunkResult:
    """The result of a chunk.

    Attributes:
        unreadable: (file, reason) of the images that could not be read.
        other_colors: images with other colours than the dataset, see `ModelImage`.
        old_overlays: images whose overlay is of an earlier call, and may not be replaced.
    """

    unreadable: tuple[tuple[str, str], ...]
    other_colors: tuple[str, ...]
    old_overlays: tuple[str, ...] = ()


def predict_chunk(chunk: Chunk) -> ChunkResult:
    """Writes the masks of `chunk`.

    The model stays in this process for the next chunk. A chunk that runs again writes the same
    bytes.
    """
    predictor = _kept_predictor(chunk.members, chunk.config.flips, needs_gpu=chunk.config.needs_gpu)
    return predict_images(chunk, predictor, lambda: None)


@functools.lru_cache(maxsize=1)
def _kept_predictor(
    members: tuple[EnsembleMember, ...], flips: Flips, *, needs_gpu: bool
) -> Predictor:
    # The digest of a member is a cache key: the folder may have new weights.
    return load_predictor(members, flips, needs_gpu=needs_gpu)


def predict_images(
    chunk: Chunk,
    predictor: Predictor,
    advance: Callable[[], None],
    note: Callable[[str], None] = lambda text: None,
) -> ChunkResult:
    """Writes the masks of `chunk`; `note` gets the progress of images of many windows."""
    source, output = open_source(chunk.images_url), open_store(chunk.output_url)
    config, manifest = chunk.config, predictor.manifest
    # Images at original size are large: read one and write one while one is predicted.
    num_waiting = 2 * config.batch_size if chunk.overlap is None else 1
    unreadable: list[tuple[str, str]] = []
    other_colors: list[str] = []
    old_overlays: list[str] = []
    claim = OutputClaim(output, chunk.record, chunk.sources) if chunk.record is not None else None
    thresholds = chunk.postprocessing.thresholds if config.probabilities == "none" else None

    def read(name: str) -> ModelImage | tuple[str, str]:
        return _read_image(source, name, manifest, config)

    def write(task: tuple[ModelImage, np.ndarray]) -> None:
        image, found = task
        if claim is not None:
            claim.check_often()
        ids = mask_at_source(found, image.geometry, chunk.postprocessing)
        if config.probabilities != "none":
            _put_probabilities(image, found, chunk, output)
        source = chunk.sources.get(mask_name(image.name))
        was_listed = source is not None and source.old_mask != 0
        if _write_mask(image, ids, manifest, output, was_listed=was_listed):
            old_overlays.append(image.name)

    with _threads() as readers, _threads() as writers:
        found = in_order(readers, read, chunk.names, num_waiting=num_waiting)
        images = _readable(found, unreadable, other_colors, advance)
        predicted = predict_all(
            images, predictor, config.batch_size, chunk.overlap, note=note, thresholds=thresholds
        )
        for _ in in_order(writers, write, predicted, num_waiting=num_waiting):
            advance()
    return ChunkResult(tuple(unreadable), tuple(other_colors), tuple(old_overlays))


@contextmanager
def _threads() -> Iterator[Executor]:
    """Yields a pool of threads; cancels waiting calls at the end."""
    pool = ThreadPoolExecutor(min(8, available_cores()))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _read_image(
    source: ObjectStore, name: str, manifest: Manifest, config: InferConfig
) -> ModelImage | tuple[str, str]:
    """Returns the image, or its name and the reason why it cannot be read."""
    try:
        image, value_max = read_any(source.get(name), name=name, max_pixels=config.max_pixels)
        found = model_image(image, manifest, config, name=name, value_max=value_max)
    except ContentError as error:
        return name, str(error)
    return replace(found, preview=_preview(image)) if config.overlays else found


def _preview(image: np.ndarray) -> np.ndarray:
    height, width = image.shape[:2]
    scale = _PREVIEW_SIDE / max(height, width)
    if scale >= 1:
        return image
    size = max(1, round(height * scale)), max(1, round(width * scale))
    geometry = fit((height, width), size, kind="stretch")
    return apply_geometry(image, geometry, *size, nearest=False)


def _readable(
    found: Iterable[ModelImage | tuple[str, str]],
    unreadable: list[tuple[str, str]],
    other_colors: list[str],
    advance: Callable[[], None],
) -> Iterator[ModelImage]:
    for each in found:
        if isinstance(each, ModelImage):
            if each.has_other_colors:
                other_colors.append(each.name)
            yield each
        else:
            unreadable.append(each)
            advance()


def _write_mask(
    image: ModelImage, ids: Ids, manifest: Manifest, output: ObjectStore, *, was_listed: bool
) -> bool:
    """Writes the mask and the overlay of an image; returns whether an old overlay stays.

    Args:
        was_listed: there was a mask before this call.
    """
    from job.reporting import plots

    name, is_old = mask_name(image.name), False
    if image.preview is not None:
        overlay = plots.overlay_png(image.preview, ids, manifest.classes)
        is_old = not _put_overlay(output, f"{OVERLAYS_FOLDER}/{name}", overlay)
    # Write the mask last: a call that continues looks for it.
    _put_mask(output, name, plots.mask_png(ids, manifest.classes), was_listed=was_listed)
    return is_old


def _put_probabilities(
    image: ModelImage, found: np.ndarray, chunk: Chunk, output: ObjectStore
) -> None:
    """Writes the probabilities of an image, before its mask."""
    file_format = chunk.config.probabilities
    assert file_format != "none"  # noqa: S101 - the caller's promise
    temperature = chunk.postprocessing.temperature
    data = probability_file(found, image.geometry, temperature, file_format)
    name = probability_name(image.name, file_format)
    try:
        output.put(name, data)
    except Forbidden:
        stat = output.stat(name)
        if stat is None or not content_matches(output, stat, data):
            raise


def _put_mask(output: ObjectStore, name: str, mask: bytes, *, was_listed: bool) -> None:
    """Writes a mask; an account that may not replace objects keeps an equal one.

    A chunk that runs again meets its own masks. Other accounts replace an equal mask: its new
    generation shows the next call that it is up to date.
    """
    try:
        output.put(name, mask)
    except Forbidden as error:
        found = output.stat(name)
        if found is not None and content_matches(output, found, mask):
            return
        if found is None or not was_listed:
            raise
        raise Forbidden(f"{error}; or give another OUTPUT: this mask is out of date") from error


def _put_overlay(output: ObjectStore, name: str, overlay: bytes) -> bool:
    """Writes an overlay; returns False if the account may not replace another one."""
    try:
        output.put(name, overlay)
    except Forbidden:
        found = output.stat(name)
        if found is None:
            raise
        return content_matches(output, found, overlay)
    return True
