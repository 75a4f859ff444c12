"""Evaluation of a split: exact sums over every case, tables, and pictures of some cases.

Training and the command share the `Evaluator`. Every epoch counts pixels, on all devices. A final
evaluation also measures case by case: contours, lesions and thresholds, at the network's size and,
by the recorded geometry, at the picture's own. A case is a picture: tiles are put together and
predicted in windows, unless each of them shall count as a picture.

python -m job.evaluate RUN --split test
"""

import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import click
import numpy as np
from pydantic import model_validator

from data_prep.imaging.geometry import Geometry, undo_geometry
from flexunet.cli.interrupts import quiet_interrupts
from flexunet.cli.options import PATH, SettingsCommand, from_options, settings_options
from flexunet.cli.runner import run_command
from flexunet.errors import StoppedError, UsageError
from flexunet.json_files import read_json
from flexunet.progress import Alive, Progress, not_told
from flexunet.settings import option
from flexunet.storage import Store, open_store
from flexunet.tables import csv_table
from flexunet.text import counted
from job.config import TrainConfig
from job.data.cases import Picture, pictures_of, read_picture
from job.data.dataset import (
    Dataset,
    RecordReader,
    Split,
    distributed_batches,
    global_batches,
    open_dataset,
    open_reader,
)
from job.data.folds import open_folded, split_words
from job.inference.predict import (
    Ids,
    PredictConfig,
    Probabilities,
    area_scale,
    class_ids,
    class_ids_at_source,
    probabilities_of,
    without_small,
)
from job.inference.region_filter import FILE_NAME, ClassFit, FittedOn, RegionTally, SmallRegions
from job.metrics.lesions import MIN_PIXELS
from job.metrics.per_case import (
    SIZES,
    TRUTHS,
    Case,
    Scale,
    ThresholdSweep,
    case_cells,
    case_columns,
    checkpoint_words,
    lesion_words,
    measure_case,
    measure_rows,
    size_notes,
    specks_of,
    summarize_cases,
    titled_sizes,
    without_ignored,
)
from job.models.compatibility import num_outputs, window_overlap
from job.runs.history import evaluation_csv
from job.runs.loading import TrainedRun, load_model, member_of, open_alike
from job.runs.provenance import as_record, read_origin
from job.runs.status import standing

logger = logging.getLogger(__name__)

_NUM_EXAMPLES = 3  # of the best, the middle and the worst cases each


@dataclass(frozen=True)
class Measured:
    """What was measured picture by picture."""

    cases: dict[str, list[Case]]  # by size
    counts: np.ndarray  # (pictures, classes, 4) int64, of the masks that were measured
    sweep: ThresholdSweep  # at the network's size


@dataclass(frozen=True)
class Evaluation:
    """What was counted over one split."""

    split: Split
    pictures: tuple[Picture, ...]  # the cases
    means: dict[str, float]  # "loss" and the reference's metrics; of samples, which may be tiles
    counts: np.ndarray  # (cases, classes, 4) int64: tp, fp, fn, tn
    summary: dict[str, Any]  # strict JSON
    measured: Measured | None = None
    examples: Mapping[str, bytes] = field(default_factory=dict)  # PNG by name, see `draw_examples`


@dataclass(frozen=True)
class Evaluator:
    """A model on its devices, and how its errors on a dataset are counted.

    Attributes:
        overlap: of windows, pixels; 0 where the dataset's pictures are all of the network's size.
        images_at_once: pictures, or windows, that go through the network of a device at once.
        is_by_tile: a tile counts as a picture.
        min_pixels: of each class but 0, at the network's size; smaller regions are not predicted.
    """

    config: TrainConfig
    strategy: Any
    dataset: Dataset
    loss: Callable[..., Any]
    metrics: Mapping[str, Any]  # of the reference, by name
    step: Callable[..., Any]  # batch -> sums, counts
    probabilities: Callable[[np.ndarray], Any]  # (B, H, W, C) pixels -> (B, H, W, K) float32
    overlap: int
    images_at_once: int
    first_replica: int = 0  # of this process, among all
    is_by_tile: bool = False
    min_pixels: tuple[int, ...] = ()

    @property
    def has_windows(self) -> bool:
        """Whether cases may be larger than the network."""
        return self.dataset.manifest.geometry == "tile" and not self.is_by_tile

    def pictures_of(self, split: Split) -> tuple[Picture, ...]:
        """Returns the cases of `split`."""
        return pictures_of(split, is_by_tile=self.is_by_tile)

    def predict(self, image: np.ndarray, alive: Alive = not_told) -> Probabilities:
        """Returns the probabilities (H, W, K) of a picture (H, W, C) of any size."""
        return probabilities_of(
            image,
            self.probabilities,
            self.dataset.manifest,
            alive=alive,
            overlap=self.overlap,
            batch_size=self.images_at_once,
        )

    def mask_of(self, image: np.ndarray, alive: Alive = not_told) -> Ids:
        """Returns the class ids (H, W) of a picture (H, W, C) of any size."""
        return without_small(class_ids(self.predict(image, alive)), self.min_pixels)

    def evaluate(
        self,
        name: str,
        reader: RecordReader,
        *,
        measured: bool = False,
        shown: bool = False,
        should_stop: Callable[[], bool] = lambda: False,
        alive: Alive = not_told,
    ) -> Evaluation:
        """Returns the evaluation of every case of split `name`, with the weights as they are now.

        Where it is not measured, the pixels of a picture are added over its tiles.

        Args:
            reader: of that split.
            measured: also measure case by case, which predicts each case once more.
            shown: show the progress.
            should_stop: asked after every batch, and after every case that is measured.
            alive: told of every batch of windows in which a case is predicted.

        Raises:
            StoppedError: `should_stop` answered yes.
        """
        from job.metrics.batch import RunningSums

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
        samples = np.concatenate(parts)[: len(split)]
        pictures = self.pictures_of(split)
        means = means_of(running, self.metrics)
        if not measured:
            counts = np.stack([samples[list(each.samples)].sum(axis=0) for each in pictures])
            return Evaluation(split, pictures, means, counts, self._summary(name, counts, means))
        # Predicted again: the loss and the reference's metrics are of samples, which may be tiles,
        # in batches spread over devices; a case is a picture, in windows where it is large.
        found = self._measure(name, pictures, reader, shown, should_stop, alive)
        summary = self._summary(name, found.counts, means)
        groups, names = [each.group for each in pictures], foreground_names(self.dataset)
        summary["truth"] = dict(TRUTHS)
        summary["sizes"] = {
            size: summarize_cases(each, groups, names) for size, each in found.cases.items()
        }
        return Evaluation(split, pictures, means, found.counts, summary, found)

    def _summary(self, name: str, counts: np.ndarray, means: Mapping[str, float]) -> dict[str, Any]:
        is_by_tile = self.is_by_tile and self.dataset.manifest.geometry == "tile"
        way = {
            "case": "tile" if is_by_tile else "picture",
            "overlap": self.overlap if self.has_windows else None,
            "fold": list(self.dataset.fold) if self.dataset.fold else None,
        }
        return {**_summary(name, counts, means, self.dataset), **way}

    def _measure(
        self,
        name: str,
        pictures: Sequence[Picture],
        reader: RecordReader,
        shown: bool,
        should_stop: Callable[[], bool],
        alive: Alive,
    ) -> Measured:
        """Returns what is measured on each case; one at a time is in memory.

        Every process of a team does all of it: the others would only wait for the first.
        """
        from job.metrics.batch import confusion_counts

        manifest = self.dataset.manifest
        cases: dict[str, list[Case]] = {size: [] for size in SIZES}
        parts = []
        sweep = ThresholdSweep(foreground_names(self.dataset), min_lesion=MIN_PIXELS)
        with Progress(f"measure {name}", len(pictures), unit="cases", shown=shown) as bar:
            for picture in bar.tracked(pictures):
                image, truth = read_picture(reader, picture)
                probabilities = self.predict(image, alive)
                ids = without_small(class_ids(probabilities), self.min_pixels)
                for size, case in self._cases_of(picture, truth, probabilities, ids).items():
                    cases[size].append(case)
                pair = truth[np.newaxis], ids[np.newaxis]
                parts.append(confusion_counts(*pair, len(manifest.classes), manifest.ignore_id))
                sweep.add(*_counted(truth, probabilities, manifest.ignore_id))
                if should_stop():
                    raise StoppedError(f"stopped measuring {name}; the same command resumes")
        return Measured(cases, np.concatenate(parts), sweep)

    def draw_examples(
        self, evaluation: Evaluation, reader: RecordReader, alive: Alive = not_told
    ) -> dict[str, bytes]:
        """Returns PNGs by name of the best, middle and worst cases: as panels and as overlays.

        For who stores them: they are predicted again, as measuring keeps no masks.
        """
        from job.reporting import plots

        classes = self.dataset.manifest.classes
        found = {}
        for name, index, dice in _example_cases(evaluation.counts):
            picture = evaluation.pictures[index]
            image, truth = read_picture(reader, picture)
            ids = self.mask_of(image, alive)
            title = plots.panel_title(picture.filename, dice)
            found[f"examples/{name}"] = plots.panel_png(image, truth, ids, classes, title)
            found[f"overlays/{name}"] = plots.overlay_png(image, ids, classes, truth)
        return found

    def _cases_of(
        self, picture: Picture, truth: np.ndarray, probabilities: np.ndarray, ids: np.ndarray
    ) -> dict[str, Case]:
        """Returns the case at each size; where both sizes are one, it is measured once."""
        manifest = self.dataset.manifest
        geometry = picture.geometry
        scales = _scales(geometry, picture.spacing)
        # Decided once: stored pixels are not all equally many of the picture's.
        specks = specks_of(
            without_ignored(truth, truth, manifest.ignore_id)[0], len(manifest.classes), MIN_PIXELS
        )
        network = self._measured(truth, ids, scales["network"], specks)
        if not geometry.crop and (geometry.source_height, geometry.source_width) == truth.shape:
            return {"network": network, "original": network}
        truth = undo_geometry(truth, geometry, nearest=True)
        ids = class_ids_at_source(probabilities, geometry)
        ids = without_small(ids, self.min_pixels, area_scale(geometry))
        specks = undo_geometry(specks.view(np.uint8), geometry, nearest=True).view(bool)
        original = self._measured(truth, ids, scales["original"], specks)
        return {"network": network, "original": original}

    def _measured(
        self, truth: np.ndarray, ids: np.ndarray, scale: Scale, specks: np.ndarray
    ) -> Case:
        manifest = self.dataset.manifest
        truth, ids = without_ignored(truth, ids, manifest.ignore_id)
        return measure_case(truth, ids, len(manifest.classes), scale, specks=specks)


def make_evaluator(
    config: TrainConfig,
    strategy: Any,
    dataset: Dataset,
    network: Callable[..., Any],
    *,
    max_images_at_once: int | None = None,
    first_replica: int = 0,
) -> Evaluator:
    """Returns the evaluator of a network, see `job.inference.network.network_of`.

    Args:
        network: of models that were made in the scope of `strategy`.
        max_images_at_once: pictures that may go through the network of a device at once; None:
            what the config's batch, devices and micro-batches make.
        first_replica: global number of this process' first replica.

    Raises:
        UsageError: the loss does not fit the dataset's classes, or the overlap its tiles.
    """
    from job.distributed.replica_sums import Criterion
    from job.evaluation.steps import make_evaluation_step
    from job.inference.network import make_probability_step
    from job.losses import make_loss
    from job.metrics.batch import reference_metrics

    manifest = dataset.manifest
    loss = make_loss(
        config.loss.name,
        num_classes=num_outputs(config, manifest),
        class_weights=config.loss.class_weights,
        ignore_id=manifest.ignore_id,
    )
    metrics = reference_metrics(config.metrics, ignore_id=manifest.ignore_id)
    local_batch = config.global_batch_size // strategy.num_replicas_in_sync
    # An evaluation may have another batch and other devices than the training.
    num_micro_batches = math.gcd(local_batch, config.accumulate)
    if max_images_at_once is not None:
        divisors = (n for n in range(1, local_batch + 1) if local_batch % n == 0)
        num_micro_batches = next(n for n in divisors if local_batch // n <= max_images_at_once)
    step = make_evaluation_step(
        strategy,
        network,
        Criterion(loss, metrics),
        len(manifest.classes),
        manifest.ignore_id,
        num_micro_batches=num_micro_batches,
    )
    overlap = 0
    if manifest.geometry == "tile":
        overlap = window_overlap(manifest, config.window_overlap, flag="--window-overlap")
    return Evaluator(
        *(config, strategy, dataset, loss, metrics, step, make_probability_step(network)),
        overlap=overlap,
        images_at_once=local_batch // num_micro_batches,
        first_replica=first_replica,
    )


def means_of(running: Any, metrics: Mapping[str, Any]) -> dict[str, float]:
    """Returns the mean loss and the value of each of `metrics` from their running sums."""
    values = {name: metric.value(*running.pair(name)) for name, metric in metrics.items()}
    return {"loss": running.mean("loss"), **values}


def _summary(name: str, cases: np.ndarray, means: Mapping[str, float], dataset: Dataset) -> Any:
    from job.metrics.batch import summarize

    values = {name: value if math.isfinite(value) else None for name, value in means.items()}
    summary = {
        "split": name,
        **summarize(cases),
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
    """Returns the size of a pixel at each size of a picture."""
    if spacing is None:
        return {size: Scale((1.0, 1.0), "px") for size in SIZES}
    network = (
        spacing[0] * geometry.part.height / geometry.height,
        spacing[1] * geometry.part.width / geometry.width,
    )
    return {"network": Scale(network, "mm"), "original": Scale(spacing, "mm")}


def _counted(
    truth: np.ndarray, probabilities: np.ndarray, ignore_id: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Returns truth and probabilities, with nothing of a class where the truth is ignored."""
    if ignore_id is None:
        return truth, probabilities
    ignored = truth == ignore_id
    return np.where(ignored, 0, truth), np.where(ignored[..., np.newaxis], 0, probabilities)


def evaluation_folder(run: Store, split: str) -> Store:
    """Returns where in a run the evaluation of a split lies."""
    return run.below("evaluation" if split == "test" else f"evaluation/{split}")


def write_evaluation(target: Store, evaluation: Evaluation, evaluator: Evaluator) -> str:
    """Writes the tables, the summary and pictures of best, middle and worst cases of a split.

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
    # Where there is a summary, all that it summarizes is there too.
    target.delete("summary.json")
    target.put("evaluation.csv", table.encode())
    target.put("per_case.csv", _per_case_csv(evaluation, evaluator.dataset).encode())
    target.put("examples.csv", _examples_csv(evaluation).encode())
    for measured_name, text in _measured_tables(evaluation, evaluator.dataset):
        target.put(measured_name, text.encode())
    for name, picture in evaluation.examples.items():
        target.put(f"{name}.png", picture)
    regions = evaluation.summary.get("prediction", {}).get("small_regions")
    # An evaluation without it keeps an earlier fit: that names its weights, and fits no others.
    if regions is not None:
        target.put(FILE_NAME, (json.dumps(regions, indent=2, allow_nan=False) + "\n").encode())
    summary = json.dumps(evaluation.summary, indent=2, allow_nan=False) + "\n"
    target.put("summary.json", summary.encode())
    return target.url


def _per_case_csv(evaluation: Evaluation, dataset: Dataset) -> str:
    from job.metrics.batch import scores

    names = [each.name for each in dataset.manifest.classes]
    measures = scores(evaluation.counts)  # by name, (cases, classes)
    columns = ["id", "filename", "group"]
    columns += [f"{measure}_{name}" for name in names for measure in measures]
    columns += [f"{count}_px_{name}" for name in names for count in ("tp", "fp", "fn", "tn")]
    rows = []
    for index, (picture, case) in enumerate(
        zip(evaluation.pictures, evaluation.counts, strict=True)
    ):
        values = [measures[key][index, c] for c in range(len(names)) for key in measures]
        defined = [None if np.isnan(value) else float(value) for value in values]
        name = [picture.id, picture.filename, picture.group]
        rows.append([*name, *defined, *(int(count) for count in case.reshape(-1))])
    return csv_table(columns, rows)


def _measured_tables(evaluation: Evaluation, dataset: Dataset) -> Iterator[tuple[str, str]]:
    """Yields name and text of the tables of what was measured case by case."""
    if evaluation.measured is None:
        return
    columns = ["id", "group", *case_columns(foreground_names(dataset))]
    for size, cases in evaluation.measured.cases.items():
        rows = [
            [picture.id, picture.group, *case_cells(case)]
            for picture, case in zip(evaluation.pictures, cases, strict=True)
        ]
        yield f"measures_{size}.csv", csv_table(columns, rows)
    sweep = evaluation.measured.sweep
    yield "thresholds.csv", csv_table(sweep.COLUMNS, sweep.rows())


def _examples_csv(evaluation: Evaluation) -> str:
    """Returns which case each picture in `examples/` and `overlays/` is of."""
    columns = ("picture", "id", "filename", "foreground_dice")
    pictures = evaluation.pictures
    rows = [
        (name, pictures[index].id, pictures[index].filename, dice)
        for name, index, dice in _example_cases(evaluation.counts)
    ]
    return csv_table(columns, rows)


def _example_cases(counts: np.ndarray) -> list[tuple[str, int, float | None]]:
    """Returns (name, case, foreground Dice) of the best, middle and worst cases, each case once.

    A case without foreground in truth and prediction has no Dice and is shown only where all have
    none.
    """
    from job.metrics.batch import dice

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

    used = summary.get("checkpoint")
    weights = f", {checkpoint_words(used)}" if used else ""
    cases = counted(summary["num_cases"], "case")
    table = Table(title=f"{summarized_words(summary)}: {cases}{weights}")
    table.add_column("foreground")
    baseline = summary["all_background"]["foreground_mean"]
    columns = {
        f"mean over {counted_cases(summary)}": summary["foreground_mean"],
        "pooled pixels": summary["foreground_pooled"],
        "all background": baseline,
    }
    for title in columns:
        table.add_column(title, justify="right")
    for name in baseline:
        values = [column[name] for column in columns.values()]
        table.add_row(name, *("-" if value is None else f"{value:.4f}" for value in values))
    console = Console()
    console.print(table)
    if not has_foreground(summary):
        console.print(no_foreground_words(summary))
    sizes = titled_sizes(summary.get("sizes", {}))
    for title, measures in sizes:
        console.print(measures_table(title, measures))
        for line in size_notes(title, measures):
            console.print(line, style="dim")
    if sizes:
        console.print(lesion_words(sizes[0][1]), style="dim")


def summarized_words(summary: Mapping[str, Any]) -> str:
    """Returns which cases a summary is of."""
    # An earlier version did not write the fold.
    return split_words(summary["split"], summary.get("fold"))


def counted_cases(summary: Mapping[str, Any]) -> str:
    """Returns how many cases the mean foreground Dice is over: those with a class in a mask."""
    total = summary["num_cases"]
    counts = {total - each["num_empty"] for each in summary["classes"][1:]}
    if counts == {total}:
        return counted(total, "case")
    number = " to ".join(str(count) for count in sorted({min(counts), max(counts)}))
    return f"{number} of {counted(total, 'case')}"


def has_foreground(summary: Mapping[str, Any]) -> bool:
    """Returns whether a case of a summary has a foreground class in its truth."""
    return summary["all_background"]["foreground_mean"]["dice"] is not None


def no_foreground_words(summary: Mapping[str, Any]) -> str:
    """Returns what can be said of cases without any foreground."""
    alarms = ", ".join(
        f"{each['name']} in {each['num_false_alarms']}" for each in summary["classes"][1:]
    )
    return (
        f"No case of {summarized_words(summary)} has foreground, so none can be found: false "
        f"alarms of {alarms} of {counted(summary['num_cases'], 'case')}."
    )


def measures_table(title: str, measures: Mapping[str, Any]) -> Any:
    """Returns what `summarize_cases` returned as a table for people, at most 80 columns wide."""
    from rich.table import Table

    table = Table(title=f"{title}: {counted(measures['num_groups'], 'group')}")
    table.add_column("measure", overflow="fold")
    for column in ("value", "95 % interval", "cases", "groups"):
        table.add_column(column, justify="right", no_wrap=True)
    for label, measure in measure_rows(measures):
        value, low, high = measure["value"], measure["low"], measure["high"]
        table.add_row(
            label,
            "-" if value is None else f"{value:.4f}",
            "-" if low is None else f"{low:.4f} to {high:.4f}",
            str(measure["num_cases"]),
            # The outcome of a run of an earlier version has none.
            str(measure.get("num_groups", "-")),
        )
    return table


class EvaluateConfig(PredictConfig):
    """Options of `flexunet evaluate`."""

    split: Literal["train", "valid", "test"] = option("test", "Split whose cases are evaluated.")
    data: str | None = option(
        None, "Where the run's dataset is now; unset: where it was trained from.", path=True
    )
    output: str | None = option(
        None,
        "Your own folder or gs:// URL for the tables and pictures: new, or of an earlier "
        "evaluation, which is replaced; one with other files is refused. Unset: in the run, "
        "RUN/evaluation for the test split, else RUN/evaluation/SPLIT; an ensemble needs it.",
        path=True,
    )
    tiles_as_pictures: bool = option(
        False, "Evaluate every tile of a dataset of tiles as if it were a picture."
    )
    remove_small_regions: bool = option(
        False,
        "Predict no regions below a size, which is fitted on the validation split and written to "
        "small_regions.json.",
    )
    batch_size: int | None = option(
        None,
        "Cases per step, over all devices; unset: the run's batch, of which a device takes no more "
        "at once than in training.",
        ge=1,
    )
    cpu_replicas: int = option(1, "Mirrored replicas on a machine without a GPU.", ge=1)
    progress: bool = option(True, "Show a progress bar on a terminal.")

    @model_validator(mode="after")
    def _small_regions_fit(self) -> "EvaluateConfig":
        if self.tiles_as_pictures and self.remove_small_regions:
            raise ValueError(
                "--remove-small-regions fits sizes for whole pictures; leave it out, or "
                "--tiles-as-pictures"
            )
        if self.split == "valid" and self.remove_small_regions:
            raise ValueError(
                "--remove-small-regions is fitted on the validation split, so --split valid would "
                "flatter it; evaluate another split, or leave it out"
            )
        return self


def evaluate_run(
    run: TrainedRun,
    dataset: Dataset,
    strategy: Any,
    config: EvaluateConfig,
    others: Sequence[TrainedRun] = (),
) -> tuple[Evaluation, str]:
    """Returns the evaluation of one split with the weights of a run, and where it was written.

    Args:
        others: runs that predict together with it.

    Raises:
        UsageError: no such split, or an ensemble without a place for its evaluation.
    """
    from job.inference.network import network_of

    settings = resolve_config(run, config)
    split = dataset.split(config.split)
    target = _target(run, config)
    with strategy.scope():
        loaded = [load_model(each, which=config.checkpoint) for each in (run, *others)]
    members = [
        member_of(each, commit) for each, (_, commit) in zip((run, *others), loaded, strict=True)
    ]
    network = network_of([model for model, _ in loaded], config.flips)
    max_images_at_once = None if config.batch_size else min(map(_images_at_once, (run, *others)))
    evaluator = replace(
        make_evaluator(settings, strategy, dataset, network, max_images_at_once=max_images_at_once),
        is_by_tile=config.tiles_as_pictures,
    )
    used = {"which": config.checkpoint, "epochs": [commit.epoch for _, commit in loaded]}
    _tell_checkpoint(run.store, used)
    _tell_replaced(target, keeps_fit=not config.remove_small_regions)
    way: dict[str, Any] = {
        "runs": [asdict(member) for member in members],
        "checkpoint": config.checkpoint,
        "flips": config.flips,
        "small_regions": None,
    }
    if config.remove_small_regions:
        fits, fitted_on = _fit_regions(evaluator, shown=config.progress)
        regions = SmallRegions(
            fitted_on=fitted_on,
            runs=tuple(members),
            flips=config.flips,
            overlap=evaluator.overlap if evaluator.has_windows else None,
            classes=fits,
        )
        way["small_regions"] = regions.model_dump(mode="json")
        evaluator = replace(evaluator, min_pixels=tuple(fit.min_pixels for fit in fits))
    reader = _reader_of(dataset, split, settings)
    evaluation = evaluator.evaluate(split.name, reader, measured=True, shown=config.progress)
    origins = as_record(
        [read_origin(each.store, each.config) for each in (run, *others)], dataset, split.name
    )
    evaluation.summary.update(checkpoint=used, prediction=way, init_from=origins)
    evaluation = replace(evaluation, examples=evaluator.draw_examples(evaluation, reader))
    return evaluation, write_evaluation(target, evaluation, evaluator)


def _tell_checkpoint(run: Store, used: Mapping[str, Any]) -> None:
    stands = {
        "stopped": "; the run was stopped before its end",
        "open": "; the run is not over: it is being trained, or its process was killed",
    }
    logger.info("evaluating %s%s", checkpoint_words(used), stands.get(standing(run), ""))


def _target(run: TrainedRun, config: EvaluateConfig) -> Store:
    if config.output is not None:
        store = open_store(config.output)
        names = {stat.name for stat in store.list()}
        # Pictures of an earlier evaluation are deleted there: it must be one.
        if names and "per_case.csv" not in names:
            raise UsageError(
                f"{store.url}: holds other files than an evaluation; give --output a new folder"
            )
        return store
    if config.ensemble:
        raise UsageError("an ensemble's evaluation belongs to none of its runs; give --output")
    return evaluation_folder(run.store, config.split)


def _tell_replaced(target: Store, *, keeps_fit: bool) -> None:
    if target.stat("summary.json") is None:
        return
    stays = f"; {FILE_NAME} stays" if keeps_fit and target.stat(FILE_NAME) is not None else ""
    logger.info("replacing the evaluation in %s (--output puts it elsewhere)%s", target.url, stays)


def _reader_of(dataset: Dataset, split: Split, settings: TrainConfig) -> RecordReader:
    return open_reader(dataset, split, cache=settings.cache, cache_dir=settings.cache_dir)


def _fit_regions(evaluator: Evaluator, *, shown: bool) -> tuple[tuple[ClassFit, ...], FittedOn]:
    """Returns from which size on regions stay, and what it was fitted on: always `valid`."""
    dataset = evaluator.dataset
    split = dataset.split("valid")
    reader = _reader_of(dataset, split, evaluator.config)
    tally, pictures = RegionTally(foreground_names(dataset)), evaluator.pictures_of(split)
    with Progress("fit on valid", len(pictures), unit="cases", shown=shown) as bar:
        for picture in bar.tracked(pictures):
            image, truth = read_picture(reader, picture)
            ids = class_ids(evaluator.predict(image))
            tally.add(*without_ignored(truth, ids, dataset.manifest.ignore_id))
    fitted_on = FittedOn(
        split=split.name,
        num_cases=tally.num_cases,
        dataset_sha256=dataset.digest,
        fold=evaluator.config.fold,
    )
    fits = tuple(tally.fit())
    for line in tally.describe(fits):
        logger.info("%s", line)
    return fits, fitted_on


def resolve_config(run: TrainedRun, config: EvaluateConfig) -> TrainConfig:
    """Returns the run's config with the batch and the devices of this evaluation."""
    batch_size = config.batch_size or run.config.global_batch_size
    changes: dict[str, Any] = {
        "global_batch_size": batch_size,
        "cpu_replicas": config.cpu_replicas,
    }
    if config.overlap is not None:
        changes["window_overlap"] = config.overlap
    return run.config.model_copy(update=changes)


def _images_at_once(run: TrainedRun) -> int:
    """Returns how many pictures went through the network of a replica at once in training.

    A run that does not tell its replicas counts as one of a single replica.
    """
    environment = read_json(run.store, "environment.json", "restore it, or give --batch-size") or {}
    local = run.config.global_batch_size // int(environment.get("replicas", 1))
    return max(1, local // run.config.accumulate)


def dataset_of(run: TrainedRun, url: str | None, others: Sequence[TrainedRun] = ()) -> Dataset:
    """Returns the dataset that `run` was trained on.

    Where runs of other folds predict with it, each has trained on what another validates, and the
    only split that all have not seen is the dataset's own test split.

    Args:
        url: where it is now; None: where it was then.

    Raises:
        UsageError: another dataset is there, or one of `others` was trained on another.
    """
    folds = {(each.config.folds, each.config.fold) for each in (run, *others)}
    if len(folds) == 1:
        dataset = open_folded(run.config, url)
    else:
        dataset = open_dataset(url or str(run.config.data))
        dataset = replace(dataset, splits={"test": dataset.split("test")})
    for each in others:
        if each.dataset_digest != run.dataset_digest:
            raise UsageError(
                f"{each.store.url}: was trained on another dataset than {run.store.url}, and may "
                "have seen the cases that would be evaluated; leave it out"
            )
    if dataset.digest != run.dataset_digest:
        raise UsageError(
            f"{dataset.url}: not the dataset that this run was trained on, the only one that it "
            f"can be evaluated on (its manifest has sha256 {dataset.digest[:12]}, the run's "
            f"{run.dataset_digest[:12]}): that was {run.config.data}; give --data only where it "
            "lies elsewhere now"
        )
    return dataset


@click.command(cls=SettingsCommand)
@click.argument("run", type=PATH)
@settings_options(EvaluateConfig)
def command(run: str, **options: Any) -> int:
    """Evaluate a run on one split of its dataset.

    RUN is the folder or gs:// URL of a run (RUNS/NAME). Writes tables (per_case.csv), summary.json
    and pictures of some cases to RUN/evaluation, or to --output; what an earlier evaluation wrote
    there is replaced, but for small_regions.json, which only --remove-small-regions replaces.

    Cases are measured at the network's size and at the picture's own. The truth is the stored mask,
    for the picture's own size enlarged: what making it smaller lost does not count as missed, and
    flexunet prep says how much that is.
    """
    config = from_options(EvaluateConfig, options)
    with quiet_interrupts():
        trained, *others = open_alike([run, *config.ensemble])
        dataset = dataset_of(trained, config.data, others)
        if config.split not in dataset.splits and others:
            raise UsageError(
                f"--split {config.split}: runs of several folds have each trained on what others "
                "validate; all of them have only the test split not seen"
            )
        for name in (config.split, *(["valid"] if config.remove_small_regions else [])):
            dataset.split(name)
        _target(trained, config)
        if config.tiles_as_pictures and dataset.manifest.geometry != "tile":
            raise UsageError(
                f"--tiles-as-pictures: {dataset.url} was prepared without tiles "
                f"(geometry {dataset.manifest.geometry}); leave it out"
            )
        if dataset.manifest.geometry == "tile":
            window_overlap(dataset.manifest, config.overlap, trained.config.window_overlap)
        from job.distributed import runtime

        if config.needs_gpu:
            runtime.require_gpu()
        strategy = runtime.configure(resolve_config(trained, config))
        evaluation, url = evaluate_run(trained, dataset, strategy, config, others)
    show_summary(evaluation.summary)
    click.echo(f"tables and pictures: {url}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return run_command(command, argv, "flexunet evaluate")


if __name__ == "__main__":
    raise SystemExit(main())
