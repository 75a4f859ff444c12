"""Measures one case at network size and at the original size, from its probabilities.

Pure functions of arrays, without TensorFlow: processes that measure start fast. Inputs and results
can be pickled.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from data_prep.imaging.geometry import Geometry, undo_geometry
from job.inference.sliding_window import Probabilities
from job.metrics.calibration import Bins, bin_case
from job.metrics.confusion import count_confusion, count_pixels
from job.metrics.lesions import MIN_PIXELS, TrueRegions, regions_of_classes, tiny_pixels
from job.metrics.per_case import (
    SIZES,
    CaseMetrics,
    Scale,
    measure_case,
    without_ignored,
)
from job.metrics.thresholds import CaseSweep, sweep_case
from job.postprocessing.masks import (
    Ids,
    Postprocessing,
    class_ids,
    masked,
    masked_at_source,
)
from job.postprocessing.temperature import calibrated

Spacing = tuple[float, float]


@dataclass(frozen=True)
class CaseInput:
    """A predicted case.

    Attributes:
        index: of the case in its split.
        geometry: position of the source image in the pixels of `truth`.
        spacing: mm (rows, columns) of a source pixel, if known.
        truth: (H, W) uint8.
        probabilities: (H, W, K) float32.
    """

    index: int
    geometry: Geometry
    spacing: Spacing | None
    truth: Ids
    probabilities: Probabilities


@dataclass(frozen=True)
class CaseTallies:
    """The sums of a case over pixels, at network size.

    Attributes:
        sweep: at several thresholds.
        calibration: without a temperature and, if there is one, with it.
        confusion: (classes, classes) int64 pixels of the mask: truth, prediction.
    """

    sweep: CaseSweep
    calibration: tuple[Bins, ...]
    confusion: npt.NDArray[np.int64]


@dataclass(frozen=True)
class CaseResult:
    """The measures of a case.

    Attributes:
        metrics: by size.
        counts: (classes, 4) int64, of the mask at network size.
        plain_counts: likewise, of the mask without postprocessing; None if that is the same.
        mask: the predicted class ids at network size, see `PackedMask`.
    """

    index: int
    metrics: dict[str, CaseMetrics]
    counts: npt.NDArray[np.int64]
    plain_counts: npt.NDArray[np.int64] | None
    tallies: CaseTallies
    mask: "PackedMask"


@dataclass(frozen=True)
class PackedMask:
    """A compressed mask (H, W) uint8."""

    shape: tuple[int, ...]
    data: bytes

    @classmethod
    def of(cls, ids: Ids) -> "PackedMask":
        """Compresses `ids`."""
        return cls(ids.shape, zlib.compress(ids.tobytes(), 1))

    def unpack(self) -> Ids:
        """Returns the class ids (H, W)."""
        return np.frombuffer(zlib.decompress(self.data), np.uint8).reshape(self.shape)


@dataclass(frozen=True)
class CaseMeasures:
    """Measures the cases of a dataset.

    Attributes:
        num_classes: background included.
        ignore_id: label of pixels that are not counted.
        postprocessing: how probabilities become masks.
    """

    num_classes: int
    ignore_id: int | None
    postprocessing: Postprocessing = field(default_factory=Postprocessing)

    def measure(self, case: CaseInput) -> CaseResult:
        """Returns the measures of a case."""
        ids = masked(case.probabilities, self.postprocessing)
        truth, probabilities = _without_ignored(case.truth, case.probabilities, self.ignore_id)
        regions = regions_of_classes(truth, self.num_classes, min_pixels=MIN_PIXELS)
        return CaseResult(
            index=case.index,
            metrics=self.metrics_of(case, ids, regions),
            counts=self._counts(case.truth, ids),
            plain_counts=self._plain_counts(case),
            tallies=CaseTallies(
                sweep=sweep_case(regions, probabilities),
                calibration=self._calibration(case),
                confusion=count_confusion(case.truth, ids, self.num_classes, self.ignore_id),
            ),
            mask=PackedMask.of(ids),
        )

    def _counts(self, truth: Ids, ids: Ids) -> npt.NDArray[np.int64]:
        return count_pixels(truth, ids, self.num_classes, self.ignore_id)

    def _plain_counts(self, case: CaseInput) -> npt.NDArray[np.int64] | None:
        if not self.postprocessing.changes_masks:
            return None
        return self._counts(case.truth, class_ids(case.probabilities))

    def _calibration(self, case: CaseInput) -> tuple[Bins, ...]:
        return tuple(
            bin_case(case.truth, calibrated(case.probabilities, each), self.ignore_id)
            for each in temperatures(self.postprocessing)
        )

    def metrics_of(
        self, case: CaseInput, ids: Ids, regions: Sequence[TrueRegions]
    ) -> dict[str, CaseMetrics]:
        """Returns the metrics at each size; equal sizes are measured once.

        Args:
            ids: (H, W) predicted class ids.
            regions: of the truth, with its tiny regions.
        """
        truth, geometry = case.truth, case.geometry
        scales = scales_of(geometry, case.spacing)
        masks = without_ignored(truth, ids, self.ignore_id)
        network = measure_case(*masks, self.num_classes, scales["network"], regions=regions)
        if not geometry.crop and (geometry.source_height, geometry.source_width) == truth.shape:
            return {"network": network, "original": network}
        # Decide once, at network size: a stored pixel is not always equally many original pixels.
        tiny = tiny_pixels(regions, truth.shape).view(np.uint8)
        tiny_regions = undo_geometry(tiny, geometry, nearest=True).view(bool)
        ids = masked_at_source(case.probabilities, geometry, self.postprocessing)
        masks = without_ignored(undo_geometry(truth, geometry, nearest=True), ids, self.ignore_id)
        regions = regions_of_classes(masks[0], self.num_classes, tiny_regions=tiny_regions)
        original = measure_case(*masks, self.num_classes, scales["original"], regions=regions)
        return {"network": network, "original": original}


def temperatures(postprocessing: Postprocessing) -> tuple[float, ...]:
    """Returns the temperatures at which calibration is measured; the first is 1."""
    temperature = postprocessing.temperature
    return (1.0,) if temperature == 1 else (1.0, temperature)


def scales_of(geometry: Geometry, spacing: Spacing | None) -> dict[str, Scale]:
    """Returns the size of a pixel at network size and at original size."""
    if spacing is None:
        return {size: Scale((1.0, 1.0), "px") for size in SIZES}
    network = (
        spacing[0] * geometry.part.height / geometry.height,
        spacing[1] * geometry.part.width / geometry.width,
    )
    return {"network": Scale(network, "mm"), "original": Scale(spacing, "mm")}


def _without_ignored(
    truth: np.ndarray, probabilities: np.ndarray, ignore_id: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Returns truth and probabilities, both 0 at ignored pixels."""
    if ignore_id is None:
        return truth, probabilities
    ignored = truth == ignore_id
    return np.where(ignored, 0, truth), np.where(ignored[..., np.newaxis], 0, probabilities)
