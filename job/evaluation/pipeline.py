"""Evaluates a run, or an ensemble of runs, on a split of their dataset."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, Literal

from pydantic import model_validator

from flexunet.errors import UsageError
from flexunet.json_files import read_json
from flexunet.progress import Progress, waiting
from flexunet.settings import option
from flexunet.storage import ObjectStore, open_store
from job.config import TrainConfig
from job.data.cases import read_case
from job.data.dataset import Dataset, Split, open_dataset
from job.data.folds import open_folded
from job.data.reader import RecordReader
from job.data.shard_cache import CacheOptions, open_readers
from job.evaluation.artifacts import draw_examples, evaluation_folder, write_evaluation
from job.evaluation.evaluator import Evaluation, Evaluator, foreground_names, make_evaluator
from job.inference.options import PredictConfig
from job.metrics.per_case import without_ignored
from job.models.compatibility import window_overlap
from job.postprocessing.masks import class_ids
from job.postprocessing.region_filter import FILE_NAME, FittedOn, RegionTally, SmallRegions
from job.postprocessing.stored import ExplicitValues, PredictionKind, resolve_postprocessing
from job.reporting.phrases import checkpoint_words
from job.runs.loading import (
    EnsembleMember,
    TrainedRun,
    check_dataset,
    ensemble_member,
    load_model,
    open_ensemble,
)
from job.runs.provenance import as_record, read_origin
from job.runs.status import run_status

logger = logging.getLogger(__name__)


class EvaluateConfig(PredictConfig):
    """Options of `flexunet evaluate`."""

    split: Literal["train", "valid", "test"] = option("test", "Split to evaluate.")
    data: str | None = option(
        None,
        "Folder or URL of the dataset, if it was moved after training; none: not moved.",
        path=True,
    )
    output: str | None = option(
        None,
        "Folder or gs:// URL for the tables and images: new, or of an earlier evaluation, which is "
        "replaced; a folder with other files is refused. none: RUN/evaluation for the test split, "
        "else RUN/evaluation/SPLIT. Required for an ensemble.",
        path=True,
    )
    tiles_as_pictures: bool = option(False, "Evaluate every tile of a tiled dataset as one image.")
    remove_small_regions: bool = option(
        False,
        "Remove predicted regions below a size that is fitted on the validation split and written "
        "to small_regions.json.",
    )
    batch_size: int | None = option(
        None,
        "Cases per step, over all devices; none: the batch of the run, with at most as many per "
        "device as in training.",
        ge=1,
    )
    cpu_replicas: int = option(1, "Replicas on a machine without a GPU.", ge=1)
    progress: bool = option(True, "Show a progress bar on a terminal.")

    @model_validator(mode="after")
    def _small_regions_fit(self) -> "EvaluateConfig":
        if self.tiles_as_pictures and self.remove_small_regions:
            raise ValueError(
                "--remove-small-regions fits sizes for whole images; leave out this option or "
                "--tiles-as-pictures"
            )
        if self.min_region is not None and self.remove_small_regions:
            raise ValueError(
                "--remove-small-regions fits the sizes that --min-region gives; leave out one of "
                "the two options"
            )
        if self.split == "valid" and self.remove_small_regions:
            raise ValueError(
                "--remove-small-regions is fitted on the validation split, so scores of "
                "--split valid would be optimistic; evaluate another split, or leave out the option"
            )
        return self


def evaluate(run_url: str, config: EvaluateConfig) -> tuple[Evaluation, str]:
    """Evaluates one split of the dataset of a run; returns the evaluation and its folder.

    All options are checked before TensorFlow is imported.

    Raises:
        UsageError: no run, no such split, another dataset, runs that do not match, an output folder
            with other files, or no GPU although one is needed.
    """
    run, *others = open_ensemble([run_url, *config.ensemble])
    if others and not config.ensemble and config.output is None:
        # A cross-validation has a folder of its own.
        output = evaluation_folder(open_store(run_url), config.split).url
        config = config.model_copy(update={"output": output})
    dataset = dataset_of(run, config.data, others)
    if config.split not in dataset.splits and others:
        raise UsageError(
            f"--split {config.split}: runs of several folds were trained on each other's images; "
            "only the test split is unseen by all of them; give --split test"
        )
    for name in (config.split, *(["valid"] if config.remove_small_regions else [])):
        dataset.split(name)
    evaluation_target(run, config)
    _check_tiles(run, dataset, config)
    from job.distributed.strategy import configure, require_gpu

    with waiting("loading TensorFlow", shown=config.progress):
        if config.needs_gpu:
            require_gpu()
        strategy = configure(resolve_config(run, config))
    return evaluate_run(run, dataset, strategy, config, others)


def _check_tiles(run: TrainedRun, dataset: Dataset, config: EvaluateConfig) -> None:
    """Checks the options for tiles and for the overlap of windows.

    Raises:
        UsageError: an option does not fit the dataset.
    """
    if dataset.manifest.geometry == "tile":
        window_overlap(dataset.manifest, config.overlap, run.config.window_overlap)
    elif config.tiles_as_pictures:
        raise UsageError(
            f"--tiles-as-pictures: {dataset.url} was prepared without tiles "
            f"(geometry {dataset.manifest.geometry}); leave it out"
        )


def evaluate_run(
    run: TrainedRun,
    dataset: Dataset,
    strategy: Any,
    config: EvaluateConfig,
    others: Sequence[TrainedRun] = (),
) -> tuple[Evaluation, str]:
    """Evaluates one split with the weights of a run; returns the evaluation and its folder.

    Args:
        others: the other runs of an ensemble.

    Raises:
        UsageError: no such split, or an ensemble without an output folder.
    """
    from job.models.ensemble import network_of

    settings = resolve_config(run, config)
    split = dataset.split(config.split)
    target = evaluation_target(run, config)
    with waiting("loading the weights", shown=config.progress), strategy.scope():
        loaded = [load_model(each, which=config.checkpoint) for each in (run, *others)]
    members = [
        ensemble_member(each, commit)
        for each, (_, commit) in zip((run, *others), loaded, strict=True)
    ]
    network = network_of([model for model, _ in loaded], config.flips)
    max_images_at_once = None if config.batch_size else min(map(_images_at_once, (run, *others)))
    evaluator = replace(
        make_evaluator(settings, strategy, dataset, network, max_images_at_once=max_images_at_once),
        is_by_tile=config.tiles_as_pictures,
    )
    used = {"which": config.checkpoint, "epochs": [commit.epoch for _, commit in loaded]}
    _log_checkpoint(run.store, used)
    _log_replaced(target, keeps_fit=not config.remove_small_regions)
    protocol: dict[str, Any] = {
        "runs": [asdict(member) for member in members],
        "checkpoint": config.checkpoint,
        "flips": config.flips,
        "small_regions": None,
    }
    evaluator = _postprocessed(evaluator, [run, *others], members, config, protocol)
    reader = _reader_of(dataset, split, settings, progress=config.progress)
    evaluation = evaluator.evaluate(split.name, reader, measured=True, shown=config.progress)
    origins = as_record(
        [read_origin(each.store, each.config) for each in (run, *others)], dataset, split.name
    )
    evaluation.summary.update(checkpoint=used, prediction=protocol, init_from=origins)
    with waiting("writing tables and images", shown=config.progress):
        evaluation = replace(evaluation, examples=draw_examples(evaluator, evaluation, reader))
        return evaluation, write_evaluation(target, evaluation, evaluator)


def _postprocessed(
    evaluator: Evaluator,
    runs: Sequence[TrainedRun],
    members: Sequence[EnsembleMember],
    config: EvaluateConfig,
    protocol: dict[str, Any],
) -> Evaluator:
    """Returns the evaluator with the fitted or explicit values; adds them to `protocol`.

    Fits the sizes of `--remove-small-regions` here.
    """
    overlap = evaluator.windows.overlap if evaluator.has_windows else None
    found = resolve_postprocessing(
        [each.store for each in runs],
        foreground_names(evaluator.dataset),
        PredictionKind(tuple(members), config.flips, overlap, config.split),
        ExplicitValues.of(config),
    )
    if found.line is not None:
        logger.info("%s", found.line)
    if found.record is not None:
        protocol["postprocessing"] = found.record
    evaluator = replace(evaluator, postprocessing=found.values)
    if config.remove_small_regions:
        regions = _fit_regions(evaluator, members, config)
        protocol["small_regions"] = regions.model_dump(mode="json")
        min_pixels = tuple(fit.min_pixels for fit in regions.classes)
        evaluator = replace(evaluator, postprocessing=replace(found.values, min_pixels=min_pixels))
    return evaluator


def _log_checkpoint(run: ObjectStore, used: Mapping[str, Any]) -> None:
    endings = {
        "stopped": "; the run was stopped before its end",
        "open": "; the run has not ended: it is still training, or its process was killed",
    }
    logger.info("evaluating %s%s", checkpoint_words(used), endings.get(run_status(run), ""))


def evaluation_target(run: TrainedRun, config: EvaluateConfig) -> ObjectStore:
    """Returns the folder for the evaluation.

    Raises:
        UsageError: the folder has other files, or an ensemble has no output folder.
    """
    if config.output is not None:
        store = open_store(config.output)
        names = {stat.name for stat in store.list()}
        # Images of an earlier evaluation are deleted there, so it must be one.
        if names and "per_case.csv" not in names:
            raise UsageError(
                f"{store.url}: has files that are not of an evaluation; give --output a new folder"
            )
        return store
    if config.ensemble:
        raise UsageError("the evaluation of an ensemble belongs to none of its runs; give --output")
    return evaluation_folder(run.store, config.split)


def _log_replaced(target: ObjectStore, *, keeps_fit: bool) -> None:
    if target.stat("summary.json") is None:
        return
    stays = f"; {FILE_NAME} stays" if keeps_fit and target.stat(FILE_NAME) is not None else ""
    logger.info(
        "replacing the evaluation in %s (--output writes to another folder)%s", target.url, stays
    )


def _reader_of(
    dataset: Dataset, split: Split, settings: TrainConfig, *, progress: bool
) -> RecordReader:
    options = CacheOptions(settings.cache, settings.cache_dir, settings.cache_size, progress)
    return open_readers(dataset, {"": split}, options)[""]


def _fit_regions(
    evaluator: Evaluator, members: Sequence[EnsembleMember], config: EvaluateConfig
) -> SmallRegions:
    """Fits on `valid` from which size on regions are kept."""
    dataset = evaluator.dataset
    split = dataset.split("valid")
    reader = _reader_of(dataset, split, evaluator.config, progress=config.progress)
    tally, cases = RegionTally(foreground_names(dataset)), evaluator.cases_of(split)
    with Progress("fit on valid", len(cases), unit="cases", shown=config.progress) as bar:
        for case in bar.tracked(cases):
            image, truth = read_case(reader, case)
            ids = class_ids(evaluator.predict(image), evaluator.postprocessing.thresholds)
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
    return SmallRegions(
        fitted_on=fitted_on,
        runs=tuple(members),
        flips=config.flips,
        overlap=evaluator.windows.overlap if evaluator.has_windows else None,
        classes=fits,
    )


def resolve_config(run: TrainedRun, config: EvaluateConfig) -> TrainConfig:
    """Returns the config of the run with the batch and devices of this evaluation."""
    batch_size = config.batch_size or run.config.global_batch_size
    changes: dict[str, Any] = {
        "global_batch_size": batch_size,
        "cpu_replicas": config.cpu_replicas,
    }
    if config.overlap is not None:
        changes["window_overlap"] = config.overlap
    return run.config.model_copy(update=changes)


def _images_at_once(run: TrainedRun) -> int:
    """Returns how many images a replica processed at once in training.

    A run that did not record its replicas counts as having one.
    """
    environment = read_json(run.store, "environment.json", "restore it, or give --batch-size") or {}
    local = run.config.global_batch_size // int(environment.get("replicas", 1))
    return max(1, local // run.config.accumulate)


def dataset_of(run: TrainedRun, url: str | None, others: Sequence[TrainedRun] = ()) -> Dataset:
    """Opens the dataset that `run` was trained on.

    Runs of different folds were trained on each other's images. The only split that is unseen by
    all of them is the test split of the dataset.

    Args:
        url: its present folder or URL; None: as in training.

    Raises:
        UsageError: the folder has another dataset, or one of `others` was trained on another.
    """
    folds = {(each.config.folds, each.config.fold) for each in (run, *others)}
    if len(folds) == 1:
        dataset = open_folded(run.config, url)
    else:
        dataset = open_dataset(url or str(run.config.data))
        if not len(dataset.splits.get("test", ())):
            raise UsageError(
                f"{dataset.url}: has no test split, and runs of several folds were trained on each "
                "other's images; cross_validation.json has the measures of all folds, each on "
                "images that its run was not trained on"
            )
        dataset = replace(dataset, splits={"test": dataset.split("test")})
    for each in others:
        if each.dataset_digest != run.dataset_digest:
            raise UsageError(
                f"{each.store.url}: was trained on another dataset than {run.store.url} and may "
                "have seen the evaluated images; leave it out"
            )
    remedy = (
        f"a run can be evaluated only on the dataset that it was trained on, {run.config.data}; "
        "give --data only if that dataset has moved"
    )
    check_dataset(run, dataset, remedy)
    return dataset
