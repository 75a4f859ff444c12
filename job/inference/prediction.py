"""Predicts images in memory, whole or in windows, and resizes results to the original size.

Reads and writes no files: `job/inference/chunk.py` does.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from data_prep.imaging.geometry import Geometry, undo_geometry
from data_prep.imaging.pixels import grey_channel
from data_prep.imaging.tiles import starts
from data_prep.shards.manifest import Manifest
from flexunet.errors import StorageError, UsageError
from flexunet.storage import NotFound, open_store
from job.inference.options import ImageConfig
from job.inference.preprocess import to_model_pixels
from job.inference.sliding_window import Probabilities, Step, Windows, slide
from job.models.compatibility import window_overlap
from job.models.flips import Flips
from job.postprocessing.masks import (
    Ids,
    Postprocessing,
    area_scale,
    class_ids,
    masked_at_source,
    without_small,
)
from job.postprocessing.region_filter import read_min_pixels
from job.postprocessing.stored import (
    ExplicitValues,
    PredictionKind,
    Resolved,
    resolve_postprocessing,
)
from job.runs.loading import (
    EnsembleMember,
    TrainedRun,
    ensemble_member,
    find_checkpoint,
    load_model,
    open_run,
)


@dataclass(frozen=True)
class Predictor:
    """The network, and the dataset of its first run."""

    step: Step
    manifest: Manifest


@dataclass(frozen=True)
class ModelImage:
    """An image in the form that the network takes.

    Attributes:
        pixels: (H, W, C) at network size, or larger for sliding windows.
        geometry: the position of the image in `pixels`.
        has_other_colors: the image is in colour and the dataset grey, or the reverse.
        preview: (h, w, C), for the overlay.
    """

    name: str
    pixels: np.ndarray
    geometry: Geometry
    has_other_colors: bool
    preview: np.ndarray | None = None


def is_sliding(config: ImageConfig, manifest: Manifest) -> bool:
    """Returns whether images are predicted at original size, in windows."""
    return config.window == "sliding" or manifest.geometry == "tile"


def overlap_of(run: TrainedRun, config: ImageConfig) -> int | None:
    """Returns the overlap of windows in pixels, or None if images are predicted whole."""
    if not is_sliding(config, run.manifest):
        return None
    return window_overlap(run.manifest, config.overlap, run.config.window_overlap)


def find_members(
    runs: Sequence[TrainedRun], checkpoint: Literal["best", "last"]
) -> tuple[EnsembleMember, ...]:
    """Returns the weights of `runs`; they stay the same if training continues."""
    return tuple(ensemble_member(run, find_checkpoint(run.store, which=checkpoint)) for run in runs)


def postprocessing_of(
    config: ImageConfig,
    runs: Sequence[TrainedRun],
    members: Sequence[EnsembleMember],
    overlap: int | None,
) -> Resolved:
    """Returns how probabilities become masks: by the options, else by the fit of the run.

    Raises:
        UsageError: an option does not fit the classes, or sizes of `small_regions` are missing or
            were fitted for other predictions.
        ContentError: a fit is damaged.
    """
    manifest = runs[0].manifest
    names = [each.name for each in manifest.classes if each.id != 0]
    found = resolve_postprocessing(
        [each.store for each in runs],
        names,
        PredictionKind(tuple(members), config.flips, overlap),
        ExplicitValues.of(config),
    )
    if config.small_regions is None:
        return found
    min_pixels = _stored_sizes(config, manifest, members, overlap)
    return replace(found, values=replace(found.values, min_pixels=min_pixels))


def _stored_sizes(
    config: ImageConfig,
    manifest: Manifest,
    members: Sequence[EnsembleMember],
    overlap: int | None,
) -> tuple[int, ...]:
    """Returns the sizes of `--small-regions` for each class but 0."""
    if config.min_region is not None:
        raise UsageError(
            f"--small-regions={config.small_regions} and --min-region both give the smallest "
            "region; leave out one of the two options"
        )
    if is_sliding(config, manifest) and manifest.geometry != "tile":
        raise UsageError(
            f"--small-regions={config.small_regions}: its sizes are in pixels of resized images, "
            "and --window sliding does not resize; leave out one of the two options"
        )
    names = [each.name for each in manifest.classes if each.id != 0]
    store = open_store(str(config.small_regions))
    return read_min_pixels(store, names, members, config.flips, overlap)


def load_predictor(
    members: Sequence[EnsembleMember], flips: Flips, *, needs_gpu: bool
) -> Predictor:
    """Loads the network with the weights of `members`; imports TensorFlow.

    Raises:
        UsageError: there is no GPU, but one is needed.
        StorageError: a checkpoint was deleted after it was chosen.
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


def _model_of(run: TrainedRun, member: EnsembleMember) -> Any:
    try:
        return load_model(run, which=member.checkpoint)[0]
    except NotFound as error:
        raise StorageError(
            f"{run.store.url}/{member.checkpoint}: deleted because training continued; run "
            "infer again with --overwrite, or with another OUTPUT"
        ) from error


def model_image(
    image: np.ndarray,
    manifest: Manifest,
    config: ImageConfig,
    *,
    name: str,
    value_max: int | None = None,
) -> ModelImage:
    """Converts `image` (h, w, c) to the form that the network takes, without a preview.

    Args:
        value_max: raw value of full intensity, if the file has one.

    Raises:
        ContentError: the image has 16 bits and another full scale than the dataset.
    """
    if value_max is None and image.dtype == np.uint16:
        value_max = config.full_scale
    kind: Literal["tile"] | None = "tile" if config.window == "sliding" else None
    pixels, geometry = to_model_pixels(image, manifest, name=name, value_max=value_max, kind=kind)
    return ModelImage(name, pixels, geometry, _has_other_colors(image, manifest))


def _has_other_colors(image: np.ndarray, manifest: Manifest) -> bool:
    """Returns whether colours are lost, or a network for colour predicts a grey image.

    Equal channels are grey: many grey images are stored as RGB.
    """
    if manifest.channels == 1:
        return image.shape[2] == 3 and grey_channel(image) is None
    return manifest.channels == 3 and image.shape[2] == 1


def predict_all(
    images: Iterator[ModelImage],
    predictor: Predictor,
    batch_size: int,
    overlap: int | None,
    *,
    note: Callable[[str], None] = lambda text: None,
    thresholds: Sequence[float] | None = (),
) -> Iterator[tuple[ModelImage, np.ndarray]]:
    """Yields each image with its result at network size, for `mask_at_source`.

    Args:
        batch_size: images or windows per batch.
        overlap: of windows, pixels; None: predict images whole.
        note: called with the progress of an image of many windows.
        thresholds: as for `class_ids`, for images of many windows. None: yield probabilities of
            these, too, which takes much memory.
    """
    if overlap is None:
        return _predict_whole(images, predictor, batch_size)
    reduce = _unchanged if thresholds is None else partial(class_ids, thresholds=thresholds)
    return _predict_in_windows(images, predictor, batch_size, overlap, note, reduce)


def _unchanged(probabilities: np.ndarray) -> np.ndarray:
    return probabilities


def _predict_whole(
    images: Iterator[ModelImage], predictor: Predictor, batch_size: int
) -> Iterator[tuple[ModelImage, np.ndarray]]:
    """Yields each image with its probabilities, (H, W, K) float32."""
    while batch := list(itertools.islice(images, batch_size)):
        pixels = np.stack([image.pixels for image in batch])
        # Fill up the last batch: one shape needs one compilation.
        filler = np.repeat(pixels[:1], batch_size - len(batch), axis=0)
        probabilities = predictor.step(np.concatenate([pixels, filler])).numpy()
        yield from zip(batch, probabilities[: len(batch)], strict=True)


def _predict_in_windows(
    images: Iterator[ModelImage],
    predictor: Predictor,
    batch_size: int,
    overlap: int,
    note: Callable[[str], None],
    reduce: Callable[[np.ndarray], np.ndarray],
) -> Iterator[tuple[ModelImage, np.ndarray]]:
    """Yields each image, at original size, with its reduced probabilities.

    With `class_ids` as `reduce`, the probabilities of a large image are never all in memory.
    """
    manifest = predictor.manifest
    windows = Windows(manifest.image_height, manifest.image_width, overlap, batch_size)
    for image in images:
        bands = slide(image.pixels, predictor.step, windows)
        num_rows = len(starts(image.pixels.shape[0], manifest.image_height, overlap))
        parts = []
        for number, band in enumerate(bands, start=1):
            parts.append(reduce(band))
            note(f"{image.name}: {number}/{num_rows} rows of windows")
        yield image, np.concatenate(parts)


def mask_at_source(found: np.ndarray, geometry: Geometry, postprocessing: Postprocessing) -> Ids:
    """Returns the mask (h, w) of class ids or of probabilities, as `predict_all` yields them."""
    if found.ndim == 2:
        ids = undo_geometry(found, geometry, nearest=True)
        return without_small(ids, postprocessing.min_pixels, area_scale(geometry))
    return masked_at_source(found, geometry, postprocessing)


def probabilities_at_source(probabilities: np.ndarray, geometry: Geometry) -> Probabilities:
    """Returns probabilities (H, W, K) at the original size of the image: (h, w, K) float32.

    Cropped areas are background: class 0 if K > 1, else 0.
    """
    return np.stack(list(planes_at_source(probabilities, geometry)), axis=-1)


def planes_at_source(
    probabilities: np.ndarray, geometry: Geometry
) -> Iterator[npt.NDArray[np.float32]]:
    """Yields the probabilities of each class, as `probabilities_at_source`: (h, w) float32."""
    num_outputs = probabilities.shape[-1]
    for index in range(num_outputs):
        plane = undo_geometry(probabilities[..., index], geometry, nearest=False)
        if geometry.crop is not None and num_outputs > 1 and index == 0:
            part = geometry.part
            is_outside = np.ones(plane.shape, bool)
            rows, columns = part.top + part.height, part.left + part.width
            is_outside[part.top : rows, part.left : columns] = False
            plane[is_outside] = 1
        yield plane


def scale_warning(config: ImageConfig, manifest: Manifest) -> str | None:
    """Returns a warning if windows show objects larger than in training, or None."""
    if config.window != "sliding" or manifest.geometry == "tile":
        return None
    return (
        f"--window sliding: predicting windows of {manifest.image_width}x{manifest.image_height} "
        "pixels at original size, but this run was trained on whole images resized to that size; "
        "in larger images everything appears larger than in training"
    )


def color_warning(names: Iterable[str], manifest: Manifest) -> str | None:
    """Returns a warning if images have other colours than the dataset, or None.

    Args:
        names: images with `has_other_colors`.
    """
    found = sorted(names)
    if not found:
        return None
    count = "1 image is" if len(found) == 1 else f"{len(found)} images are"
    if manifest.channels == 1:
        return (
            f"{count} in colour (RGB), first {found[0]}, but the run was trained on grey images: "
            "predicted without the colours"
        )
    return (
        f"{count} grey, first {found[0]}, but the run was trained on images in colour (RGB): "
        "predicted with the same value in all three channels"
    )
