"""Predicts images in memory with the weights of a run: what `Run.predict` does."""

import dataclasses
import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from flexunet.errors import UsageError
from flexunet.storage import ObjectStore
from job.inference.inputs import read_any
from job.inference.options import ImageConfig
from job.inference.prediction import (
    ModelImage,
    Predictor,
    color_warning,
    find_members,
    load_predictor,
    mask_at_source,
    model_image,
    overlap_of,
    postprocessing_of,
    predict_all,
    probabilities_at_source,
    scale_warning,
)
from job.postprocessing.masks import Postprocessing
from job.postprocessing.temperature import calibrated
from job.runs.checkpoints import find_checkpoints
from job.runs.loading import EnsembleMember, TrainedRun, open_ensemble

logger = logging.getLogger(__name__)


class Prediction(NamedTuple):
    """The mask of an image, and its probabilities if requested, at the image's own size.

    Attributes:
        mask: (h, w) uint8, class ids; 0 is the background.
        probabilities: (h, w, K) float32; K is the number of classes, or 1 for a run of
            `model.num_classes=1`: the probability of class 1.
    """

    mask: npt.NDArray[np.uint8]
    probabilities: npt.NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class ArrayPredictor:
    """The network of some runs, and the options with which it predicts."""

    predictor: Predictor
    config: ImageConfig
    overlap: int | None
    postprocessing: Postprocessing
    line: str | None  # on the postprocessing, for the log

    def images(self, store: ObjectStore, names: Iterable[str]) -> Iterator[ModelImage]:
        """Yields the images of these names in `store`.

        Raises:
            ContentError: one of them cannot be read.
        """
        for name in names:
            pixels, value_max = read_any(
                store.get(name), name=name, max_pixels=self.config.max_pixels
            )
            yield self._model_image(pixels, name, value_max)

    def image(self, pixels: npt.NDArray[Any]) -> ModelImage:
        """Returns an array (h, w) or (h, w, c) of uint8 or uint16 as an image.

        c is 1, 3 or the number of channels of the dataset.

        Raises:
            UsageError: it has another shape or dtype.
            ContentError: it has 16 bits of another full scale than the dataset.
        """
        found = pixels[..., np.newaxis] if pixels.ndim == 2 else pixels
        channels = self.predictor.manifest.channels
        is_image = found.ndim == 3 and found.shape[2] in (1, 3, channels) and found.size > 0
        if not is_image or found.dtype not in (np.uint8, np.uint16):
            raise UsageError(
                f"flexunet.Run.predict(): an array of shape {pixels.shape} and dtype "
                f"{pixels.dtype}; give the pixels as an image file has them: (h, w), (h, w, 1) or "
                "(h, w, 3), uint8 or uint16"
            )
        return self._model_image(np.ascontiguousarray(found), "image", None)

    def predict(
        self, images: Iterator[ModelImage], batch_size: int | None = None
    ) -> Iterator[tuple[ModelImage, npt.NDArray[np.uint8]]]:
        """Yields each image with its mask.

        Args:
            batch_size: images, or windows, predicted at once; None: that of the config.
        """
        size = batch_size or self.config.batch_size
        thresholds = self.postprocessing.thresholds
        for image, found in predict_all(
            images, self.predictor, size, self.overlap, thresholds=thresholds
        ):
            yield image, mask_at_source(found, image.geometry, self.postprocessing)

    def predict_one(
        self, image: ModelImage, *, probabilities: bool
    ) -> npt.NDArray[np.uint8] | Prediction:
        """Returns the mask of an image, with its probabilities where they are asked for."""
        size = 1 if self.overlap is None else self.config.batch_size
        if not probabilities:
            return next(self.predict(iter([image]), size))[1]
        ((_, found),) = predict_all(
            iter([image]), self.predictor, size, self.overlap, thresholds=None
        )
        mask = mask_at_source(found, image.geometry, self.postprocessing)
        shown = calibrated(found, self.postprocessing.temperature)
        return Prediction(mask, probabilities_at_source(shown, image.geometry))

    def _model_image(
        self, pixels: npt.NDArray[Any], name: str, value_max: int | None
    ) -> ModelImage:
        manifest = self.predictor.manifest
        return model_image(pixels, manifest, self.config, name=name, value_max=value_max)

    def watched(self, images: Iterable[ModelImage], warned: set[str]) -> Iterator[ModelImage]:
        """Yields `images`; warns once of windows and of other colours than in training.

        Logs the postprocessing once, too.

        Args:
            warned: kinds of warnings that were given; this adds to them.
        """
        for image in images:
            names = [image.name] if image.has_other_colors else []
            manifest = self.predictor.manifest
            if self.line is not None and self.line not in warned:
                warned.add(self.line)
                logger.info("%s", self.line)
            for kind, warning in (
                ("scale", scale_warning(self.config, manifest)),
                ("colors", color_warning(names, manifest)),
            ):
                if warning is not None and kind not in warned:
                    warned.add(kind)
                    logger.warning("%s", warning)
            yield image


class PredictorCache:
    """Keeps the network of the latest call: one ensemble, in the memory of the device."""

    def __init__(self) -> None:
        """Holds nothing until the first call of `open`."""
        self._runs: tuple[tuple[str, ...], tuple[TrainedRun, ...]] | None = None
        self._members: tuple[Any, tuple[EnsembleMember, ...]] | None = None
        self._network: tuple[Any, Predictor] | None = None

    def open(self, urls: Sequence[str], config: ImageConfig) -> ArrayPredictor:
        """Returns the network of these runs together; TensorFlow is imported here.

        Loads weights only if the checkpoints or `flips` differ from the call before.

        Raises:
            UsageError: runs that do not go together, or options that do not fit them.
            ContentError: a checkpoint is damaged.
        """
        runs = self._open_runs(tuple(urls))
        overlap = overlap_of(runs[0], config)
        members = self._find_members(runs, config.checkpoint)
        found = postprocessing_of(config, runs, members, overlap)
        predictor = self._load(members, config)
        return ArrayPredictor(predictor, config, overlap, found.values, found.line)

    def _open_runs(self, urls: tuple[str, ...]) -> tuple[TrainedRun, ...]:
        if self._runs is None or self._runs[0] != urls:
            self._runs = urls, open_ensemble(urls)
        return self._runs[1]

    def _find_members(
        self, runs: Sequence[TrainedRun], checkpoint: Literal["best", "last"]
    ) -> tuple[EnsembleMember, ...]:
        # A list of names tells whether training stored another checkpoint since.
        key = checkpoint, [(run.store.url, find_checkpoints(run.store)) for run in runs]
        if self._members is None or self._members[0] != key:
            self._members = key, find_members(runs, checkpoint)
        return self._members[1]

    def _load(self, members: tuple[EnsembleMember, ...], config: ImageConfig) -> Predictor:
        key = members, config.flips, config.needs_gpu
        if self._network is None or self._network[0] != key:
            self._network = None  # frees its memory before the next one needs some
            predictor = load_predictor(members, config.flips, needs_gpu=config.needs_gpu)
            self._network = key, predictor
        return self._network[1]
