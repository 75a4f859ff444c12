"""Writes the evaluation of a split: tables, summary.json and images of some cases."""

import json
import math
from collections.abc import Iterator

import numpy as np

from flexunet.progress import Heartbeat, no_heartbeat
from flexunet.storage import ObjectStore
from flexunet.tables import csv_table
from job.data.cases import read_case
from job.data.dataset import Dataset
from job.data.reader import RecordReader
from job.evaluation.evaluator import Evaluation, Evaluator, foreground_names
from job.evaluation.example_cases import example_cases, image_dice_of
from job.metrics.confusion import scores
from job.metrics.per_case import case_cells, case_columns
from job.postprocessing.region_filter import FILE_NAME


def evaluation_folder(run: ObjectStore, split: str) -> ObjectStore:
    """Returns the folder of a run for the evaluation of a split."""
    return run.subpath("evaluation" if split == "test" else f"evaluation/{split}")


def write_evaluation(target: ObjectStore, evaluation: Evaluation, evaluator: Evaluator) -> str:
    """Writes the tables, the summary, and images of the best, middle and worst cases of a split.

    Args:
        target: the folder, see `evaluation_folder`.

    Returns:
        The URL of the folder.
    """
    means = evaluation.means
    loss, metric = evaluator.config.loss.name, next(iter(evaluator.metrics), "")
    table = evaluation_csv(loss, means["loss"], metric, means.get(metric, math.nan))
    for folder in ("examples", "overlays"):
        for stat in target.list(f"{folder}/"):
            target.delete(stat.name)
    # Delete the summary first, write it last: a summary implies that all files are complete.
    target.delete("summary.json")
    target.put("evaluation.csv", table.encode())
    target.put("per_case.csv", _per_case_csv(evaluation, evaluator.dataset).encode())
    target.put("examples.csv", _examples_csv(evaluation).encode())
    for measured_name, text in _measured_tables(evaluation, evaluator.dataset):
        target.put(measured_name, text.encode())
    for name, png in evaluation.examples.items():
        target.put(f"{name}.png", png)
    regions = evaluation.summary.get("prediction", {}).get("small_regions")
    # Without it an earlier fit stays: the file names its weights and is used with no other.
    if regions is not None:
        target.put(FILE_NAME, (json.dumps(regions, indent=2, allow_nan=False) + "\n").encode())
    summary = json.dumps(evaluation.summary, indent=2, allow_nan=False) + "\n"
    target.put("summary.json", summary.encode())
    return target.url


def evaluation_csv(loss_name: str, loss: float, metric_name: str, metric: float) -> str:
    """Formats evaluation.csv like the reference implementation: two lines `name,value`."""
    return f"{loss_name},{loss:.4f}\n{metric_name},{metric:.4f}\n"


def _per_case_csv(evaluation: Evaluation, dataset: Dataset) -> str:
    names = [each.name for each in dataset.manifest.classes]
    measures = scores(evaluation.counts)  # by name, (cases, classes)
    columns = ["id", "filename", "group"]
    columns += [f"{measure}_{name}" for name in names for measure in measures]
    columns += [f"{count}_px_{name}" for name in names for count in ("tp", "fp", "fn", "tn")]
    rows = []
    for index, (case, counts) in enumerate(zip(evaluation.cases, evaluation.counts, strict=True)):
        values = [measures[key][index, c] for c in range(len(names)) for key in measures]
        defined = [None if np.isnan(value) else float(value) for value in values]
        name = [case.id, case.filename, case.group]
        rows.append([*name, *defined, *(int(count) for count in counts.reshape(-1))])
    return csv_table(columns, rows)


def _measured_tables(evaluation: Evaluation, dataset: Dataset) -> Iterator[tuple[str, str]]:
    """Yields name and text of the tables of measured cases."""
    if evaluation.measured is None:
        return
    columns = ["id", "group", *case_columns(foreground_names(dataset))]
    for size, case_metrics in evaluation.measured.case_metrics.items():
        rows = [
            [case.id, case.group, *case_cells(metrics)]
            for case, metrics in zip(evaluation.cases, case_metrics, strict=True)
        ]
        yield f"measures_{size}.csv", csv_table(columns, rows)
    sweep = evaluation.measured.sweep
    yield "thresholds.csv", csv_table(sweep.COLUMNS, sweep.rows())
    calibration = evaluation.measured.calibration
    yield "calibration.csv", csv_table(calibration.COLUMNS, calibration.rows())
    confusion = evaluation.measured.confusion
    yield "confusion.csv", csv_table(confusion.COLUMNS, confusion.rows())


def _examples_csv(evaluation: Evaluation) -> str:
    """Returns the table of the cases in `examples/` and `overlays/`."""
    columns = ("picture", "id", "filename", "foreground_dice", "mean_dice")
    cases, image_dice = evaluation.cases, image_dice_of(evaluation.counts)
    rows = [
        (name, cases[index].id, cases[index].filename, image_dice[index], dice)
        for name, index, dice in example_cases(evaluation.counts)
    ]
    return csv_table(columns, rows)


def draw_examples(
    evaluator: Evaluator,
    evaluation: Evaluation,
    reader: RecordReader,
    heartbeat: Heartbeat = no_heartbeat,
) -> dict[str, bytes]:
    """Draws the best, middle and worst cases as panels and as overlays; returns PNGs by name.

    Args:
        evaluation: with measured cases, whose masks are drawn.
        heartbeat: called for every case.

    Raises:
        ValueError: the cases were not measured.
    """
    if evaluation.measured is None:
        raise ValueError("draw_examples needs measured cases: evaluate with measured=True")
    from job.reporting import plots

    classes = evaluator.dataset.manifest.classes
    is_mean = len(classes) > 2  # over classes
    found = {}
    for name, index, score in example_cases(evaluation.counts):
        case = evaluation.cases[index]
        image, truth = read_case(reader, case)
        ids = evaluation.measured.masks[index]
        title = plots.panel_title(case.filename, score, "mean Dice" if is_mean else "image Dice")
        found[f"examples/{name}"] = plots.panel_png(image, truth, ids, classes, title)
        found[f"overlays/{name}"] = plots.overlay_png(image, ids, classes, truth)
        heartbeat()
    return found
