"""Evaluation of a split: exact sums over every case, tables, and pictures of some cases.

Training and the command share the `Evaluator`.

python -m job.evaluate RUN --split test
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import click
import numpy as np

from data_prep.command import SettingsCommand, given, run_command, settings_options
from data_prep.errors import StoppedError, UsageError
from data_prep.progress import Progress, quiet_interrupts
from data_prep.settings import Settings, option, validated
from data_prep.storage import Store
from data_prep.table import csv_table
from job.config import TrainConfig
from job.data import (
    Dataset,
    RecordReader,
    Split,
    distributed_batches,
    global_batches,
    open_dataset,
    open_reader,
    read_sample,
)
from job.history import evaluation_csv
from job.trained import TrainedRun, load_model, num_outputs, open_trained

_NUM_EXAMPLES = 3  # of the best, the middle and the worst cases each


@dataclass(frozen=True)
class Evaluation:
    """What was counted over one split."""

    split: Split
    means: dict[str, float]  # "loss" and the reference's metrics
    counts: np.ndarray  # (cases, classes, 4) int64: tp, fp, fn, tn
    summary: dict[str, Any]  # strict JSON


@dataclass(frozen=True)
class Evaluator:
    """A model on its devices, and how its errors on a dataset are counted."""

    config: TrainConfig
    strategy: Any
    dataset: Dataset
    loss: Callable[..., Any]
    metrics: Mapping[str, Any]  # of the reference, by name
    step: Callable[..., Any]  # batch -> sums, counts
    predict: Callable[[np.ndarray], np.ndarray]  # (1, H, W, C) pixels -> (1, H, W) class ids
    first_replica: int = 0  # of this process, among all

    def evaluate(
        self,
        name: str,
        reader: RecordReader,
        *,
        shown: bool = False,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> Evaluation:
        """Returns the evaluation of every case of split `name`, with the weights as they are now.

        Args:
            reader: of that split.
            shown: show the progress.
            should_stop: asked after every batch.

        Raises:
            StoppedError: `should_stop` answered yes.
        """
        from job.metrics import RunningSums

        split = self.dataset.split(name)
        plan = global_batches(np.arange(len(split)), self.config.global_batch_size)
        batches = distributed_batches(
            *(self.strategy, self.dataset, reader, plan),
            seed=self.config.seed,
            epoch=0,
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
        # The last batch is filled up with padding, which comes after every case.
        cases = np.concatenate(parts)[: len(split)]
        means = means_of(running, self.metrics)
        return Evaluation(split, means, cases, _summary(split, cases, means, self.dataset))


def make_evaluator(
    config: TrainConfig, strategy: Any, dataset: Dataset, model: Any, *, first_replica: int = 0
) -> Evaluator:
    """Returns the evaluator of `model`, which was made in the scope of `strategy`.

    Args:
        first_replica: global number of this process' first replica.

    Raises:
        UsageError: the loss does not fit the dataset's classes.
    """
    from job.losses import make_loss
    from job.metrics import reference_metrics
    from job.step import make_evaluation_step, make_probability_step

    manifest = dataset.manifest
    loss = make_loss(
        config.loss.name,
        num_classes=num_outputs(config, manifest),
        class_weights=config.loss.class_weights,
        ignore_id=manifest.ignore_id,
    )
    metrics = reference_metrics(config.metrics, ignore_id=manifest.ignore_id)
    step = make_evaluation_step(
        strategy, model, loss, metrics, len(manifest.classes), manifest.ignore_id
    )
    predict = _class_ids_of(make_probability_step(model))
    return Evaluator(
        *(config, strategy, dataset, loss, metrics, step, predict), first_replica=first_replica
    )


def means_of(running: Any, metrics: Mapping[str, Any]) -> dict[str, float]:
    """Returns the mean loss and the value of each of `metrics` from their running sums."""
    values = {name: metric.value(*running.pair(name)) for name, metric in metrics.items()}
    return {"loss": running.mean("loss"), **values}


def _summary(split: Split, cases: np.ndarray, means: Mapping[str, float], dataset: Dataset) -> Any:
    from job.metrics import summarize

    values = {name: value if math.isfinite(value) else None for name, value in means.items()}
    summary = {
        "split": split.name,
        **summarize(cases),
        "loss": values.pop("loss"),
        **{f"reference_{name}": value for name, value in values.items()},
    }
    for each, info in zip(summary["classes"], dataset.manifest.classes, strict=True):
        each["name"] = info.name
    return summary


def _class_ids_of(step: Callable[[np.ndarray], Any]) -> Callable[[np.ndarray], np.ndarray]:
    """Returns `step`, which gives probabilities, as images (B, H, W, C) -> class ids (B, H, W)."""

    def predict(images: np.ndarray) -> np.ndarray:
        probabilities = step(images).numpy()
        if probabilities.shape[-1] == 1:
            return (probabilities[..., 0] > 0.5).astype(np.uint8)
        return np.argmax(probabilities, axis=-1).astype(np.uint8)

    return predict


def write_evaluation(
    store: Store, evaluation: Evaluation, evaluator: Evaluator, reader: RecordReader
) -> str:
    """Writes the tables, the summary and panels of best, middle and worst cases of a split.

    They go to `evaluation/`, or to `evaluation/<split>/` for another split than test.

    Args:
        store: the run's folder.
        reader: of that split.

    Returns:
        The URL of the folder.
    """
    split, means = evaluation.split.name, evaluation.means
    target = store.below("evaluation" if split == "test" else f"evaluation/{split}")
    loss, metric = evaluator.config.loss.name, next(iter(evaluator.metrics), "")
    table = evaluation_csv(loss, means["loss"], metric, means.get(metric, math.nan))
    pictures = dict(_example_pictures(evaluation, evaluator, reader))
    # Where there is a summary, all that it summarizes is there too.
    target.delete("summary.json")
    target.put("evaluation.csv", table.encode())
    target.put("per_case.csv", _per_case_csv(evaluation, evaluator.dataset).encode())
    for name, picture in pictures.items():
        target.put(f"examples/{name}.png", picture)
    summary = json.dumps(evaluation.summary, indent=2, allow_nan=False) + "\n"
    target.put("summary.json", summary.encode())
    return target.url


def _per_case_csv(evaluation: Evaluation, dataset: Dataset) -> str:
    from job.metrics import scores

    split, names = evaluation.split, [each.name for each in dataset.manifest.classes]
    measures = scores(evaluation.counts)  # by name, (cases, classes)
    columns = ["id", "filename", "group"]
    columns += [f"{measure}_{name}" for name in names for measure in measures]
    columns += [f"{count}_px_{name}" for name in names for count in ("tp", "fp", "fn", "tn")]
    rows = []
    for index, case in enumerate(evaluation.counts):
        values = [measures[key][index, c] for c in range(len(names)) for key in measures]
        defined = [None if np.isnan(value) else float(value) for value in values]
        name = [split.ids[index], split.filenames[index], split.groups[index]]
        rows.append([*name, *defined, *(int(count) for count in case.reshape(-1))])
    return csv_table(columns, rows)


def _example_pictures(
    evaluation: Evaluation, evaluator: Evaluator, reader: RecordReader
) -> Iterator[tuple[str, bytes]]:
    from job import plots

    classes = evaluator.dataset.manifest.classes
    for name, index, dice in _example_cases(evaluation.counts):
        image, truth = read_sample(reader, index)
        prediction = evaluator.predict(image[np.newaxis])[0]
        title = plots.panel_title(evaluation.split.filenames[index], dice)
        yield name, plots.panel_png(image, truth, prediction, classes, title)


def _example_cases(counts: np.ndarray) -> list[tuple[str, int, float | None]]:
    """Returns (name, case, foreground Dice) of the best, middle and worst cases, each case once.

    A case without foreground in truth and prediction has no Dice and is shown only where all have
    none.
    """
    from job.metrics import dice

    tp, fp, fn = (counts[:, 1:, i].sum(axis=1) for i in range(3))
    scores = dice(tp, fp, fn)
    order = [int(i) for i in np.argsort(-scores, kind="stable")]
    ranked = [i for i in order if not np.isnan(scores[i])] or order
    middle = max(0, len(ranked) // 2 - _NUM_EXAMPLES // 2)
    groups = {
        "best": ranked[:_NUM_EXAMPLES],
        "worst": ranked[::-1][:_NUM_EXAMPLES],
        "middle": ranked[middle : middle + _NUM_EXAMPLES],
    }
    chosen: list[tuple[str, int, float | None]] = []
    for name, cases in groups.items():
        for rank, case in enumerate(cases, start=1):
            if case not in [index for _, index, _ in chosen]:
                score = None if np.isnan(scores[case]) else float(scores[case])
                chosen.append((f"{name}-{rank}", case, score))
    return chosen


def show_summary(summary: Mapping[str, Any]) -> None:
    """Prints the foreground scores of a split beside the all-background baseline."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{summary['split']}: {summary['num_cases']} cases")
    table.add_column("foreground")
    baseline = summary["all_background"]["foreground_mean"]
    columns = {
        "mean over cases": summary["foreground_mean"],
        "pooled pixels": summary["foreground_pooled"],
        "all background": baseline,
    }
    for title in columns:
        table.add_column(title, justify="right")
    for name in baseline:
        values = [column[name] for column in columns.values()]
        table.add_row(name, *("-" if value is None else f"{value:.4f}" for value in values))
    Console().print(table)


class EvaluateConfig(Settings):
    """Options of `flexunet evaluate`."""

    split: Literal["train", "valid", "test"] = option("test", "Split whose cases are evaluated.")
    checkpoint: Literal["best", "last"] = option("best", "Weights.")
    data: str | None = option(
        None, "Where the run's dataset is now; unset: where it was trained from."
    )
    batch_size: int | None = option(None, "Cases per step; unset: the run's batch.", ge=1)
    cpu_replicas: int = option(1, "Mirrored replicas on a machine without a GPU.", ge=1)
    progress: bool = option(True, "Show a progress bar on a terminal.")


def evaluate_run(
    run: TrainedRun, dataset: Dataset, strategy: Any, config: EvaluateConfig
) -> tuple[Evaluation, str]:
    """Returns the evaluation of one split with the weights of a run, and where it was written.

    Raises:
        UsageError: no such split.
    """
    settings = resolve_config(run, config)
    split = dataset.split(config.split)
    with strategy.scope():
        model = load_model(run, which=config.checkpoint)
    evaluator = make_evaluator(settings, strategy, dataset, model)
    reader = open_reader(dataset, split, cache=settings.cache, cache_dir=settings.cache_dir)
    evaluation = evaluator.evaluate(split.name, reader, shown=config.progress)
    return evaluation, write_evaluation(run.store, evaluation, evaluator, reader)


def resolve_config(run: TrainedRun, config: EvaluateConfig) -> TrainConfig:
    """Returns the run's config with the batch and the devices of this evaluation."""
    batch_size = config.batch_size or run.config.global_batch_size
    changes = {"global_batch_size": batch_size, "cpu_replicas": config.cpu_replicas}
    return run.config.model_copy(update=changes)


def dataset_of(run: TrainedRun, url: str | None) -> Dataset:
    """Returns the dataset that `run` was trained on.

    Args:
        url: where it is now; None: where it was then.

    Raises:
        UsageError: another dataset is there.
    """
    dataset = open_dataset(url or str(run.config.data))
    if dataset.digest != run.dataset_digest:
        raise UsageError(
            f"{dataset.url}: not the dataset that this run was trained on (its manifest has sha256 "
            f"{dataset.digest[:12]}, the run's {run.dataset_digest[:12]}); give it with --data"
        )
    return dataset


@click.command(cls=SettingsCommand)
@click.argument("run")
@settings_options(EvaluateConfig)
def command(run: str, **options: Any) -> int:
    """Evaluate a run on one split of its dataset.

    RUN is the folder or gs:// URL of a run (RUNS/NAME). Writes RUN/evaluation.
    """
    config = validated(EvaluateConfig, given(options), "options")
    with quiet_interrupts():
        trained = open_trained(run)
        dataset = dataset_of(trained, config.data)
        dataset.split(config.split)
        from job import runtime

        strategy = runtime.configure(resolve_config(trained, config))
        evaluation, url = evaluate_run(trained, dataset, strategy, config)
    show_summary(evaluation.summary)
    click.echo(f"tables and pictures: {url}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return run_command(command, argv, "flexunet evaluate")


if __name__ == "__main__":
    raise SystemExit(main())
