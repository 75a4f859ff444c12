"""Evaluates a network on every case of a split: exact pixel counts, and measures of each case.

Training and the command share the `Evaluator`. Every epoch counts pixels, on all devices. A final
evaluation also measures each case: contours, lesions and thresholds, at network size and, by the
recorded geometry, at the original size of the image. A case is an image: tiles are put together and
predicted in windows, unless each tile counts as an image.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from data_prep.imaging.geometry import Geometry, undo_geometry
from data_prep.shards.manifest import Manifest
from flexunet.errors import StoppedError
from flexunet.progress import Heartbeat, Progress, no_heartbeat
from job.config import TrainConfig
from job.data.cases import Case, cases_of, read_case
from job.data.dataset import Dataset, Split
from job.data.pipeline import EpochPlan, distributed_batches
from job.data.reader import RecordReader
from job.data.sampling import global_batches
from job.inference.postprocess import (
    Ids,
    area_scale,
    class_ids,
    class_ids_at_source,
    without_small,
)
from job.inference.sliding_window import Probabilities, Windows, probabilities_of
from job.metrics.confusion import summarize
from job.metrics.lesions import MIN_PIXELS, TrueRegions, regions_of_classes, tiny_pixels
from job.metrics.per_case import (
    SIZES,
    TRUTHS,
    CaseMetrics,
    Scale,
    measure_case,
    summarize_cases,
    without_ignored,
)
from job.metrics.thresholds import ThresholdSweep, sweep_case
from job.models.compatibility import num_outputs, window_overlap

if TYPE_CHECKING:
    from job.distributed.replica_sums import Criterion


@dataclass(frozen=True)
class Measured:
    """The measures of each case."""

    case_metrics: dict[str, list[CaseMetrics]]  # by size
    counts: np.ndarray  # (cases, classes, 4) int64, of the measured masks
    sweep: ThresholdSweep  # at network size


@dataclass(frozen=True)
class Evaluation:
    """The counts, means and summary of one split."""

    split: Split
    cases: tuple[Case, ...]
    means: dict[str, float]  # "loss", metrics of the reference; over samples or tiles
    counts: np.ndarray  # (cases, classes, 4) int64: tp, fp, fn, tn
    summary: dict[str, Any]  # strict JSON
    measured: Measured | None = None
    examples: Mapping[str, bytes] = field(default_factory=dict)  # PNG by name, see `draw_examples`


@dataclass(frozen=True)
class Evaluator:
    """Evaluates a model on its devices and on one dataset.

    Attributes:
        windows: in which large cases are predicted; the overlap is 0 if all images of the dataset
            have network size, and the batch is the number of windows per device and pass.
        is_by_tile: a tile counts as an image.
        min_pixels: of each class but 0, at network size; smaller regions are not predicted.
    """

    config: TrainConfig
    strategy: Any
    dataset: Dataset
    loss: Callable[..., Any]
    metrics: Mapping[str, Any]  # of the reference implementation, by name
    step: Callable[..., Any]  # batch -> sums, counts
    probabilities: Callable[[np.ndarray], Any]  # (B, H, W, C) pixels -> (B, H, W, K) float32
    windows: Windows
    first_replica: int = 0  # of this process, among all
    is_by_tile: bool = False
    min_pixels: tuple[int, ...] = ()

    @property
    def has_windows(self) -> bool:
        """Whether cases may be larger than the network."""
        return self.dataset.manifest.geometry == "tile" and not self.is_by_tile

    def cases_of(self, split: Split) -> tuple[Case, ...]:
        """Returns the cases of `split`."""
        return cases_of(split, is_by_tile=self.is_by_tile)

    def predict(self, image: np.ndarray, heartbeat: Heartbeat = no_heartbeat) -> Probabilities:
        """Returns the probabilities (H, W, K) of an image (H, W, C) of any size."""
        return probabilities_of(image, self.probabilities, self.windows, heartbeat=heartbeat)

    def mask_of(self, image: np.ndarray, heartbeat: Heartbeat = no_heartbeat) -> Ids:
        """Returns the class ids (H, W) of an image (H, W, C) of any size."""
        return without_small(class_ids(self.predict(image, heartbeat)), self.min_pixels)

    def evaluate(
        self,
        name: str,
        reader: RecordReader,
        *,
        measured: bool = False,
        shown: bool = False,
        should_stop: Callable[[], bool] = lambda: False,
        heartbeat: Heartbeat = no_heartbeat,
    ) -> Evaluation:
        """Evaluates every case of split `name` with the current weights.

        Without `measured`, the pixel counts of an image are the sums over its tiles.

        Args:
            reader: of that split.
            measured: also measure each case, which predicts it once more.
            shown: show the progress.
            should_stop: called after every batch and after every measured case.
            heartbeat: called for every batch of windows of a case.

        Raises:
            StoppedError: `should_stop` returned True.
        """
        from job.metrics.batch import RunningSums

        split = self.dataset.split(name)
        plan = global_batches(np.arange(len(split)), self.config.global_batch_size)
        batches = distributed_batches(
            self.strategy,
            self.dataset,
            reader,
            EpochPlan(plan, self.config.seed, epoch=0),
            first_replica=self.first_replica,
        )
        running, parts = RunningSums(), []
        with Progress(f"evaluate {name}", len(plan), unit="batches", shown=shown) as bar:
            for batch in bar.tracked(batches):
                sums, counts = self.step(batch)
                running.add(sums)
                parts.append(counts.numpy())
                if should_stop():
                    raise StoppedError(f"stopped evaluating {name}; the same command resumes")
        # The last batch ends with padding, after the last case.
        samples = np.concatenate(parts)[: len(split)]
        cases = self.cases_of(split)
        means = means_of(running, self.metrics)
        if not measured:
            counts = np.stack([samples[list(each.samples)].sum(axis=0) for each in cases])
            return Evaluation(split, cases, means, counts, self._summary(name, counts, means))
        # Predict again: the loss and the metrics of the reference are means over samples, which may
        # be tiles, in batches spread over devices. A case is a whole image, in windows if large.
        found = self._measure(name, cases, reader, shown, should_stop, heartbeat)
        summary = self._summary(name, found.counts, means)
        groups, names = [each.group for each in cases], foreground_names(self.dataset)
        summary["truth"] = dict(TRUTHS)
        summary["sizes"] = {
            size: summarize_cases(each, groups, names) for size, each in found.case_metrics.items()
        }
        return Evaluation(split, cases, means, found.counts, summary, found)

    def _summary(self, name: str, counts: np.ndarray, means: Mapping[str, float]) -> dict[str, Any]:
        is_by_tile = self.is_by_tile and self.dataset.manifest.geometry == "tile"
        protocol = {
            "case": "tile" if is_by_tile else "picture",
            "overlap": self.windows.overlap if self.has_windows else None,
            "fold": list(self.dataset.fold) if self.dataset.fold else None,
        }
        return {**_summary(name, counts, means, self.dataset), **protocol}

    def _measure(
        self,
        name: str,
        cases: Sequence[Case],
        reader: RecordReader,
        shown: bool,
        should_stop: Callable[[], bool],
        heartbeat: Heartbeat,
    ) -> Measured:
        """Measures each case; one at a time is in memory.

        Every process of a group does all of it; the rest would only wait for the first.
        """
        from job.metrics.batch import confusion_counts

        manifest = self.dataset.manifest
        case_metrics: dict[str, list[CaseMetrics]] = {size: [] for size in SIZES}
        parts = []
        sweep = ThresholdSweep(foreground_names(self.dataset))
        with Progress(f"measure {name}", len(cases), unit="cases", shown=shown) as bar:
            for case in bar.tracked(cases):
                image, truth = read_case(reader, case)
                probabilities = self.predict(image, heartbeat)
                ids = without_small(class_ids(probabilities), self.min_pixels)
                pair = truth[np.newaxis], ids[np.newaxis]
                parts.append(confusion_counts(*pair, len(manifest.classes), manifest.ignore_id))
                counted, counted_probabilities = _without_ignored(
                    truth, probabilities, manifest.ignore_id
                )
                regions = regions_of_classes(counted, len(manifest.classes), min_pixels=MIN_PIXELS)
                found = self._metrics_of_case(case, truth, probabilities, ids, regions)
                for size, metrics in found.items():
                    case_metrics[size].append(metrics)
                sweep.add(sweep_case(regions, counted_probabilities))
                if should_stop():
                    raise StoppedError(f"stopped measuring {name}; the same command resumes")
        return Measured(case_metrics, np.concatenate(parts), sweep)

    def _metrics_of_case(
        self,
        case: Case,
        truth: np.ndarray,
        probabilities: np.ndarray,
        ids: np.ndarray,
        regions: Sequence[TrueRegions],
    ) -> dict[str, CaseMetrics]:
        """Returns the metrics at each size; equal sizes are measured once.

        Args:
            regions: of the truth, with its tiny regions.
        """
        manifest = self.dataset.manifest
        geometry = case.geometry
        scales = _scales(geometry, case.spacing)
        num_classes, ignore_id = len(manifest.classes), manifest.ignore_id
        masks = without_ignored(truth, ids, ignore_id)
        network = measure_case(*masks, num_classes, scales["network"], regions=regions)
        if not geometry.crop and (geometry.source_height, geometry.source_width) == truth.shape:
            return {"network": network, "original": network}
        # Decide once, at network size: a stored pixel is not always equally many original pixels.
        tiny = tiny_pixels(regions, truth.shape).view(np.uint8)
        tiny_regions = undo_geometry(tiny, geometry, nearest=True).view(bool)
        ids = class_ids_at_source(probabilities, geometry)
        ids = without_small(ids, self.min_pixels, area_scale(geometry))
        masks = without_ignored(undo_geometry(truth, geometry, nearest=True), ids, ignore_id)
        regions = regions_of_classes(masks[0], num_classes, tiny_regions=tiny_regions)
        original = measure_case(*masks, num_classes, scales["original"], regions=regions)
        return {"network": network, "original": original}


def make_evaluator(
    config: TrainConfig,
    strategy: Any,
    dataset: Dataset,
    network: Callable[..., Any],
    *,
    max_images_at_once: int | None = None,
    first_replica: int = 0,
) -> Evaluator:
    """Returns the evaluator of a network, see `job.models.ensemble.network_of`.

    Args:
        network: of models that were made in the scope of `strategy`.
        max_images_at_once: images per device and pass; None: from the batch, devices and
            micro-batches of the config.
        first_replica: global number of the first replica of this process.

    Raises:
        UsageError: the loss does not fit the classes of the dataset, or the overlap its tiles.
    """
    from job.evaluation.steps import make_evaluation_step
    from job.models.ensemble import make_probability_step

    manifest = dataset.manifest
    criterion = _criterion(config, manifest)
    local_batch = config.global_batch_size // strategy.num_replicas_in_sync
    num_micro_batches = _num_micro_batches(config, local_batch, max_images_at_once)
    step = make_evaluation_step(
        strategy,
        network,
        criterion,
        len(manifest.classes),
        manifest.ignore_id,
        num_micro_batches=num_micro_batches,
    )
    overlap = 0
    if manifest.geometry == "tile":
        overlap = window_overlap(manifest, config.window_overlap, flag="--window-overlap")
    return Evaluator(
        config=config,
        strategy=strategy,
        dataset=dataset,
        loss=criterion.loss,
        metrics=criterion.metrics,
        step=step,
        probabilities=make_probability_step(network),
        windows=Windows(
            height=manifest.image_height,
            width=manifest.image_width,
            overlap=overlap,
            batch_size=local_batch // num_micro_batches,
        ),
        first_replica=first_replica,
    )


def _criterion(config: TrainConfig, manifest: Manifest) -> "Criterion":
    from job.distributed.replica_sums import Criterion
    from job.losses import make_loss
    from job.metrics.batch import reference_metrics

    loss = make_loss(
        config.loss.name,
        num_classes=num_outputs(config, manifest),
        class_weights=config.loss.class_weights,
        ignore_id=manifest.ignore_id,
    )
    metrics = reference_metrics(
        config.metrics, ignore_id=manifest.ignore_id, hybrid_weights=config.hybrid_weights
    )
    return Criterion(loss, metrics)


def _num_micro_batches(
    config: TrainConfig, local_batch: int, max_images_at_once: int | None
) -> int:
    if max_images_at_once is None:
        # An evaluation may use another batch and other devices than training.
        return math.gcd(local_batch, config.accumulate)
    divisors = (n for n in range(1, local_batch + 1) if local_batch % n == 0)
    return next(n for n in divisors if local_batch // n <= max_images_at_once)


def means_of(running: Any, metrics: Mapping[str, Any]) -> dict[str, float]:
    """Returns the mean loss and the value of each of `metrics` from their running sums."""
    values = {name: metric.value(*running.pair(name)) for name, metric in metrics.items()}
    return {"loss": running.mean("loss"), **values}


def _summary(name: str, counts: np.ndarray, means: Mapping[str, float], dataset: Dataset) -> Any:
    values = {name: value if math.isfinite(value) else None for name, value in means.items()}
    summary = {
        "split": name,
        **summarize(counts),
        "loss": values.pop("loss"),
        **{f"reference_{name}": value for name, value in values.items()},
    }
    for each, info in zip(summary["classes"], dataset.manifest.classes, strict=True):
        each["name"] = info.name
    return summary


def foreground_names(dataset: Dataset) -> list[str]:
    """Returns the names of all classes but 0."""
    return [each.name for each in dataset.manifest.classes if each.id != 0]


def _scales(geometry: Geometry, spacing: tuple[float, float] | None) -> dict[str, Scale]:
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
