"""Evaluates a network on every case of a split: exact pixel counts, and measures of each case.

Training and the command share the `Evaluator`. Every epoch counts pixels, on all devices. A final
evaluation also measures each case: contours, lesions and thresholds, at network size and, by the
recorded geometry, at the original size of the image. A case is an image: tiles are put together and
predicted in windows, unless each tile counts as an image.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from data_prep.shards.manifest import Manifest
from flexunet.errors import StoppedError
from flexunet.progress import Heartbeat, Progress, no_heartbeat
from job.config import TrainConfig
from job.data.cases import Case, cases_of
from job.data.dataset import Dataset, Split
from job.data.pipeline import EpochPlan, distributed_batches
from job.data.reader import RecordReader
from job.data.sampling import global_batches
from job.distributed.process_group import ProcessGroup, StopPoll
from job.evaluation.case_measures import CaseMeasures
from job.evaluation.gathering import Measured, measure_together
from job.evaluation.rank_evaluation import RankEvaluation, Watch, workers_for
from job.inference.sliding_window import Probabilities, Windows, probabilities_of
from job.metrics.confusion import summarize
from job.metrics.per_case import TRUTHS, summarize_cases
from job.models.compatibility import num_outputs, window_overlap
from job.postprocessing.masks import Ids, Postprocessing, masked
from job.postprocessing.stored import FittedPostprocessing

if TYPE_CHECKING:
    from job.distributed.replica_sums import Criterion


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
        postprocessing: how probabilities become masks.
        fitted: the fit that has these values, if summaries name it.
    """

    config: TrainConfig
    strategy: Any
    dataset: Dataset
    loss: Callable[..., Any]
    metrics: Mapping[str, Any]  # of the reference implementation, by name
    step: Callable[..., Any]  # batch -> sums, counts
    local_step: Callable[..., Any]  # batch -> sums and probabilities of each replica
    probabilities: Callable[[np.ndarray], Any]  # (B, H, W, C) pixels -> (B, H, W, K) float32
    windows: Windows
    process_group: ProcessGroup
    is_by_tile: bool = False
    postprocessing: Postprocessing = field(default_factory=Postprocessing)
    fitted: FittedPostprocessing | None = None

    @property
    def has_windows(self) -> bool:
        """Whether cases may be larger than the network."""
        return self.dataset.manifest.geometry == "tile" and not self.is_by_tile

    def with_postprocessing(self, fitted: FittedPostprocessing) -> "Evaluator":
        """Returns an evaluator that uses fitted values and names them in its summaries."""
        return replace(self, postprocessing=fitted.values(), fitted=fitted)

    def cases_of(self, split: Split) -> tuple[Case, ...]:
        """Returns the cases of `split`."""
        return cases_of(split, is_by_tile=self.is_by_tile)

    def predict(self, image: np.ndarray, heartbeat: Heartbeat = no_heartbeat) -> Probabilities:
        """Returns the probabilities (H, W, K) of an image (H, W, C) of any size."""
        return probabilities_of(image, self.probabilities, self.windows, heartbeat=heartbeat)

    def mask_of(self, image: np.ndarray, heartbeat: Heartbeat = no_heartbeat) -> Ids:
        """Returns the class ids (H, W) of an image (H, W, C) of any size."""
        return masked(self.predict(image, heartbeat), self.postprocessing)

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
            measured: also measure each case; the processes of the group share the cases.
            shown: show the progress.
            should_stop: called after every batch and after every measured case: whether this
                process requests a stop. It stops all processes of the group within seconds.
            heartbeat: see `Watch`.

        Raises:
            StoppedError: `should_stop` returned True in one of the processes.
        """
        split = self.dataset.split(name)
        if measured:
            return self._measured_evaluation(split, reader, Watch(shown, should_stop, heartbeat))
        samples, means = self._count(split, reader, shown, should_stop)
        cases = self.cases_of(split)
        counts = np.stack([samples[list(each.samples)].sum(axis=0) for each in cases])
        return Evaluation(split, cases, means, counts, self._summary(name, counts, means))

    def _count(
        self, split: Split, reader: RecordReader, shown: bool, should_stop: Callable[[], bool]
    ) -> tuple[np.ndarray, dict[str, float]]:
        """Returns the counts of each sample, (samples, classes, 4) int64, and the means."""
        from job.metrics.batch import RunningSums

        plan = global_batches(np.arange(len(split)), self.config.global_batch_size)
        batches = distributed_batches(
            self.strategy,
            self.dataset,
            reader,
            EpochPlan(plan, self.config.seed, epoch=0),
            first_replica=self.process_group.first_replica,
        )
        running, parts = RunningSums(), []
        is_stopped = StopPoll(self.process_group, should_stop, len(plan))
        with Progress(f"evaluate {split.name}", len(plan), unit="batches", shown=shown) as bar:
            for batch in bar.tracked(batches):
                sums, counts = self.step(batch)
                running.add(sums)
                parts.append(counts.numpy())
                if is_stopped():
                    raise StoppedError(f"stopped evaluating {split.name}; the same command resumes")
        # The last batch ends with padding, after the last case.
        return np.concatenate(parts)[: len(split)], means_of(running, self.metrics)

    def _summary(self, name: str, counts: np.ndarray, means: Mapping[str, float]) -> dict[str, Any]:
        is_by_tile = self.is_by_tile and self.dataset.manifest.geometry == "tile"
        protocol = {
            "case": "tile" if is_by_tile else "picture",
            "overlap": self.windows.overlap if self.has_windows else None,
            "fold": list(self.dataset.fold) if self.dataset.fold else None,
        }
        return {**_summary(name, counts, means, self.dataset), **protocol}

    def _measured_evaluation(self, split: Split, reader: RecordReader, watch: Watch) -> Evaluation:
        """Predicts and measures each case once, together with the other processes."""
        from job.distributed.replica_sums import Criterion
        from job.evaluation.steps import total_sums
        from job.metrics.batch import RunningSums

        cases, names = self.cases_of(split), foreground_names(self.dataset)
        own, group = self.rank_evaluation(split, reader), self.process_group
        sums, found = measure_together(own, group, watch, names)
        criterion = Criterion(self.loss, self.metrics)
        channels, running = num_outputs(self.config, self.dataset.manifest), RunningSums()
        for totals in total_sums(sums, criterion, channels):
            running.add(totals)
        means = means_of(running, self.metrics)
        summary = self._summary(split.name, found.counts, means)
        groups = [each.group for each in cases]
        summary["truth"] = dict(TRUTHS)
        summary["sizes"] = {
            size: summarize_cases(each, groups, names) for size, each in found.case_metrics.items()
        }
        summary["calibration"] = found.calibration.summary()
        if self.fitted is not None:
            summary["prediction"] = {"postprocessing": self.fitted.record()}
        if found.plain_counts is not None:
            summary["without_postprocessing"] = _named(summarize(found.plain_counts), self.dataset)
        return Evaluation(split, cases, means, found.counts, summary, found)

    def rank_evaluation(self, split: Split, reader: RecordReader) -> RankEvaluation:
        """Returns the part of this process in the evaluation of `split`."""
        group, manifest = self.process_group, self.dataset.manifest
        return RankEvaluation(
            dataset=self.dataset,
            split=split,
            reader=reader,
            cases=self.cases_of(split),
            measures=CaseMeasures(len(manifest.classes), manifest.ignore_id, self.postprocessing),
            strategy=self.strategy,
            step=self.local_step,
            predict=self.predict if self.has_windows else None,
            batch_size=self.config.global_batch_size,
            first_replica=group.first_replica,
            rank=group.rank,
            num_processes=group.size,
            num_workers=workers_for(self.config.threads, group.size),
        )


def make_evaluator(
    config: TrainConfig,
    strategy: Any,
    dataset: Dataset,
    network: Callable[..., Any],
    *,
    max_images_at_once: int | None = None,
    process_group: ProcessGroup | None = None,
) -> Evaluator:
    """Returns the evaluator of a network, see `job.models.ensemble.network_of`.

    Args:
        network: of models that were made in the scope of `strategy`.
        max_images_at_once: images per device and pass; None: from the batch, devices and
            micro-batches of the config.
        process_group: of `strategy`; None: this process alone.

    Raises:
        UsageError: the loss does not fit the classes of the dataset, or the overlap its tiles.
    """
    from job.evaluation.steps import make_evaluation_step, make_local_step
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
        local_step=make_local_step(strategy, network, criterion, num_micro_batches),
        probabilities=make_probability_step(network),
        windows=Windows(
            height=manifest.image_height,
            width=manifest.image_width,
            overlap=overlap,
            batch_size=local_batch // num_micro_batches,
        ),
        process_group=process_group or ProcessGroup(strategy),
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
    return _named(summary, dataset)


def _named(summary: dict[str, Any], dataset: Dataset) -> dict[str, Any]:
    """Adds the names of the classes to a summary."""
    for each, info in zip(summary["classes"], dataset.manifest.classes, strict=True):
        each["name"] = info.name
    return summary


def foreground_names(dataset: Dataset) -> list[str]:
    """Returns the names of all classes but 0."""
    return [each.name for each in dataset.manifest.classes if each.id != 0]
