"""Evaluation of a split: exact sums over every case, tables, and pictures of some cases.

python -m job.evaluate RUN --split test
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import click
import numpy as np

from data_prep.command import SettingsCommand, given, run_command, settings_options
from data_prep.errors import UsageError
from data_prep.progress import Progress
from data_prep.settings import Settings, option, validated
from data_prep.storage import Store, join_url, open_store
from job.data import Dataset, RecordReader, Split, read_sample
from job.history import csv_table, evaluation_csv

_NUM_EXAMPLES = 3  # of the best, the middle and the worst cases each


@dataclass(frozen=True)
class Evaluation:
    """What was counted over one split."""

    split: Split
    means: dict[str, float]  # "loss" and the reference's metrics
    counts: np.ndarray  # (cases, classes, 4) int64: tp, fp, fn, tn
    summary: dict[str, Any]


def evaluate_cases(
    batches: Iterable[Mapping[str, Any]],
    evaluation_step: Callable[..., Any],
    split: Split,
    class_names: Sequence[str],
    metrics: Mapping[str, Any],
) -> Evaluation:
    """Returns the evaluation of `split` from its `batches`, which hold every case once, in order.

    Args:
        metrics: the reference's metrics that `evaluation_step` sums, by name.
    """
    from job.metrics import RunningSums, summarize

    running = RunningSums()
    parts = []
    for batch in batches:
        sums, counts = evaluation_step(batch)
        running.add(sums)
        parts.append(counts.numpy())
    # The last batch is filled up with padding, which comes after every case.
    counts = np.concatenate(parts)[: len(split)]
    means = means_of(running, metrics)
    summary = {
        "split": split.name,
        **summarize(counts),
        "loss": means["loss"],
        **{f"reference_{name}": value for name, value in means.items() if name != "loss"},
    }
    for each, name in zip(summary["classes"], class_names, strict=True):
        each["name"] = name
    return Evaluation(split=split, means=means, counts=counts, summary=summary)


def means_of(running: Any, metrics: Mapping[str, Any]) -> dict[str, float]:
    """Returns the mean loss and the value of each of `metrics` from their running sums."""
    values = {name: metric.value(*running.pair(name)) for name, metric in metrics.items()}
    return {"loss": running.mean("loss"), **values}


def write_evaluation(
    store: Store,
    evaluation: Evaluation,
    dataset: Dataset,
    reader: RecordReader,
    predict: Callable[[np.ndarray], np.ndarray],
    *,
    loss_name: str,
    metric_name: str,
) -> None:
    """Writes `evaluation/`: the tables, the summary and panels of best, middle and worst cases.

    A split other than test goes to `evaluation/<split>/`.

    Args:
        store: the run's folder.
        predict: (1, H, W, C) pixels -> (1, H, W) class ids.
    """
    split = evaluation.split.name
    folder = "evaluation" if split == "test" else f"evaluation/{split}"
    means = evaluation.means
    text = evaluation_csv(loss_name, means["loss"], metric_name, means.get(metric_name, np.nan))
    store.put(f"{folder}/evaluation.csv", text.encode())
    store.put(f"{folder}/per_case.csv", _per_case_csv(evaluation, dataset).encode())
    summary = json.dumps(evaluation.summary, indent=2, allow_nan=False) + "\n"
    store.put(f"{folder}/summary.json", summary.encode())
    _write_examples(store, folder, evaluation, dataset, reader, predict)


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


def _write_examples(
    store: Store,
    folder: str,
    evaluation: Evaluation,
    dataset: Dataset,
    reader: RecordReader,
    predict: Callable[[np.ndarray], np.ndarray],
) -> None:
    from job import plots

    classes = dataset.manifest.classes
    for name, index, dice in _example_cases(evaluation.counts):
        image, truth = read_sample(reader, index)
        prediction = predict(image[np.newaxis])[0]
        title = plots.panel_title(evaluation.split.filenames[index], dice)
        picture = plots.panel_png(image, truth, prediction, classes, title)
        store.put(f"{folder}/examples/{name}.png", picture)


def _example_cases(counts: np.ndarray) -> list[tuple[str, int, float | None]]:
    """Returns (name, case, foreground Dice) of the best, middle and worst cases, each case once."""
    from job.metrics import dice

    tp, fp, fn = (counts[:, 1:, i].sum(axis=1) for i in range(3))
    scores = dice(tp, fp, fn)
    ranked = [int(i) for i in np.argsort(-np.nan_to_num(scores, nan=-1.0), kind="stable")]
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


def evaluate_run(run_url: str, config: EvaluateConfig) -> Evaluation:
    """Evaluates one split with the weights of a run and writes `evaluation/` into it.

    Raises:
        UsageError: no run, no such split, or the dataset is not the one of the run.
    """
    from job import runtime
    from job.data import global_batches, iterate, make_batches, open_dataset, open_reader
    from job.losses import make_loss
    from job.metrics import reference_metrics
    from job.step import make_evaluation_step, make_probability_step
    from job.trained import load_trained, num_outputs, read_config

    settings = read_config(open_store(run_url))
    changes = {
        "global_batch_size": config.batch_size or settings.global_batch_size,
        "cpu_replicas": config.cpu_replicas,
    }
    strategy = runtime.configure(settings.model_copy(update=changes))
    with strategy.scope():
        trained = load_trained(run_url, which=config.checkpoint)
    dataset = open_dataset(config.data or str(settings.data))
    if dataset.digest != trained.dataset_digest:
        raise UsageError(
            f"{dataset.url}: not the dataset that this run was trained on (its manifest has sha256 "
            f"{dataset.digest[:12]}, the run's {trained.dataset_digest[:12]}); give it with --data"
        )
    split = dataset.split(config.split)
    reader = open_reader(dataset, split, cache=settings.cache, cache_dir=settings.cache_dir)
    outputs = num_outputs(settings, dataset.manifest)
    loss = make_loss(
        settings.loss.name,
        num_classes=outputs,
        class_weights=settings.loss.class_weights,
        ignore_id=dataset.manifest.ignore_id,
    )
    metrics = reference_metrics(settings.metrics, ignore_id=dataset.manifest.ignore_id)
    step = make_evaluation_step(
        strategy,
        trained.model,
        loss,
        metrics,
        len(dataset.manifest.classes),
        dataset.manifest.ignore_id,
    )
    plan = global_batches(np.arange(len(split)), changes["global_batch_size"])
    replicas = strategy.num_replicas_in_sync
    batches = strategy.distribute_datasets_from_function(
        lambda _: make_batches(
            dataset,
            reader,
            plan,
            seed=settings.seed,
            epoch=0,
            num_replicas=replicas,
            num_local_replicas=replicas,
        )
    )
    names = [each.name for each in dataset.manifest.classes]
    with Progress(
        f"evaluate {split.name}", len(plan), unit="batches", shown=config.progress
    ) as bar:
        evaluation = evaluate_cases(
            bar.tracked(iterate(batches, reader)), step, split, names, metrics
        )
    write_evaluation(
        trained.store,
        evaluation,
        dataset,
        reader,
        class_ids_of(make_probability_step(trained.model)),
        loss_name=settings.loss.name,
        metric_name=settings.metrics[0] if settings.metrics else "",
    )
    return evaluation


def class_ids_of(step: Callable[[np.ndarray], Any]) -> Callable[[np.ndarray], np.ndarray]:
    """Returns `step`, which gives probabilities, as images (B, H, W, C) -> class ids (B, H, W)."""

    def predict(images: np.ndarray) -> np.ndarray:
        probabilities = step(images).numpy()
        if probabilities.shape[-1] == 1:
            return (probabilities[..., 0] > 0.5).astype(np.uint8)
        return np.argmax(probabilities, axis=-1).astype(np.uint8)

    return predict


@click.command(cls=SettingsCommand)
@click.argument("run")
@settings_options(EvaluateConfig)
def command(run: str, **options: Any) -> int:
    """Evaluate a run on one split of its dataset.

    RUN is the folder or gs:// URL of a run (RUNS/NAME). Writes RUN/evaluation.
    """
    config = validated(EvaluateConfig, given(options), "options")
    evaluation = evaluate_run(run, config)
    show_summary(evaluation.summary)
    click.echo(f"tables and pictures: {join_url(run, 'evaluation')}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return run_command(command, argv, "flexunet evaluate")


if __name__ == "__main__":
    raise SystemExit(main())
