"""Settles the config of a run by its owner: plans a new run once, keeps that of a begun one."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from flexunet.errors import UsageError
from flexunet.settings import deep_merge, flat_values, parse_settings
from flexunet.storage import ObjectStore, PreconditionFailed, open_store
from job.config import ModelConfig, TrainConfig
from job.data.dataset import Dataset, open_dataset
from job.planning.facts import DatasetFacts, MachineFacts, dataset_facts
from job.planning.options import begun_config, needs_plan
from job.planning.plan_file import (
    PLAN_NAME,
    PLANNED,
    Measured,
    Plan,
    explicit_values,
    plan_json,
    read_plan,
)
from job.planning.plan_words import plan_words
from job.planning.rules import FILTERS, TRAINING_MINUTES, make_plan
from job.planning.situation import GIB, Limits
from job.runs.identity import differences
from job.runs.loading import WEIGHT_FILES, open_run
from job.runs.run import Run

logger = logging.getLogger(__name__)

_GROUPS = ("model.", "loss.", "optimizer.", "schedule.", "augmentation.")
_GIVEN = PLANNED | {"time_budget"}
# Share of the memory that a measured step may use: evaluation and checkpoints need the rest.
_MEASURED_SHARE = 0.85
# With less than this share of the memory and of the longest duration, estimates need no dry step.
_SURE_SHARE = 0.3
# Minutes: in a shorter budget a dry step takes too much of the user's time.
_SHORT_BUDGET = 1.0


@dataclass(frozen=True)
class DryStep:
    """The result of a training step in a process of its own.

    Attributes:
        memory_bytes: its peak memory; if it did not fit, the memory at which it ended.
        step_s: seconds of a step after the first; 0 if it did not fit.
    """

    fits: bool
    memory_bytes: int
    step_s: float


# Trains a step of a config on a machine.
Measure = Callable[[TrainConfig, MachineFacts], DryStep]


def settle_config(
    run: Run, config: TrainConfig, machine: Callable[[], MachineFacts], measure: Measure
) -> TrainConfig:
    """Returns the complete config of a run that this process owns.

    Plans a new run and stores the plan. A run that has begun keeps its options, whatever the
    machine and the number of workers are now.

    Args:
        machine: called if the run is planned, or was planned.

    Raises:
        UsageError: not even the smallest network fits into memory, or the folds of this
            cross-validation were planned with other options.
        ContentError: the stored plan is damaged.
    """
    has_begun = run.read_identity() is not None
    if has_begun and needs_plan(config):
        config = begun_config(config)
    elif needs_plan(config):
        facts = machine()
        plan = _plan_of_new(run, config, facts, measure)
        planned = with_plan(config, plan)
        # The plan may be that of an earlier attempt, or of another fold, with other workers.
        return (
            planned if _keeps_parts(config) else fit_to_workers(planned, plan, facts.num_replicas)
        )
    if config.preset != "auto" and not has_begun and run.store.stat(PLAN_NAME) is not None:
        run.store.delete(PLAN_NAME)  # of an attempt that ended before its first step
    if config.preset != "auto" or _keeps_parts(config):
        return config
    stored = read_plan(run.store) or _copied_from_folds(run, config)
    return config if stored is None else fit_to_workers(config, stored, machine().num_replicas)


def _keeps_parts(config: TrainConfig) -> bool:
    """Returns whether the user gives the number of micro-batches."""
    return "accumulate" in config.model_fields_set


def fit_to_workers(config: TrainConfig, plan: Plan, num_replicas: int) -> TrainConfig:
    """Returns `config` with the fewest micro-batches that are as small as the plan's.

    A network whose normalisation needs the whole batch at once keeps it.
    """
    if config.model.exchanges_statistics:
        return config
    batch = max(1, config.global_batch_size // num_replicas)
    parts = [n for n in range(1, batch + 1) if batch % n == 0]
    part = next(n for n in parts if batch // n <= plan.samples_at_once)
    return config.model_copy(update={"accumulate": part})


def with_plan(config: TrainConfig, plan: Plan) -> TrainConfig:
    """Returns `config` completed by `plan`."""
    values = deep_merge(plan.values(), explicit_values(config))
    return parse_settings(TrainConfig, values, "plan")


def preview(config: TrainConfig, machine: MachineFacts) -> TrainConfig:
    """Returns `config` completed by a plan for `machine` that is not stored.

    For checks before the run is owned.
    """
    if not needs_plan(config):
        return config
    facts = facts_of(config)
    return with_plan(config, make_plan(facts, machine, given_options(config)))


def facts_of(config: TrainConfig) -> DatasetFacts:
    """Returns the facts of the dataset of `config`."""
    return dataset_facts(open_dataset(str(config.data)), config.folds)


def given_options(config: TrainConfig) -> dict[str, Any]:
    """Returns the options of the user that a plan keeps, by dotted path.

    The network of --init-from counts as given, because its weights need it.
    """
    values = explicit_values(config)
    if config.init_from is not None:
        values = deep_merge({"model": _network_of(config.init_from)}, values)
    return {
        name: value
        for name, value in flat_values(values).items()
        if name in _GIVEN or name.startswith(_GROUPS)
    }


def _network_of(source: str) -> dict[str, Any]:
    """Returns the options of the network whose weights `--init-from` reads.

    A weight file does not name them: it counts as the reference's network.
    """
    model = ModelConfig() if source.endswith(WEIGHT_FILES) else open_run(source).config.model
    return model.model_dump(mode="json", exclude={"num_classes", "image_channels"})


def fitted_plan(
    facts: DatasetFacts,
    machine: MachineFacts,
    config: TrainConfig,
    measure: Measure | None,
    *,
    always: bool = False,
) -> Plan:
    """Returns a plan whose training step fits into the memory of `machine`.

    Tries it with a dry step, unless the estimates are far below the memory and the longest
    duration. The measured duration then gives the epochs, and fewer filters where they take too
    long.

    Args:
        measure: None: no dry step.
        always: try it in any case.

    Raises:
        UsageError: not even the smallest network fits.
    """
    limits = Limits()
    tried: list[str] = []
    given = given_options(config)
    while True:
        plan = make_plan(facts, machine, given, limits)
        is_small = plan.memory_bytes < _SURE_SHARE * machine.memory_bytes
        # The steps that fit into a budget depend on the true duration of a step.
        is_short = plan.minutes < (
            _SURE_SHARE * TRAINING_MINUTES if config.time_budget is None else _SHORT_BUDGET
        )
        if measure is None or (is_small and is_short and not always):
            return plan
        found = measure(with_plan(config, plan), machine)
        limit = _MEASURED_SHARE * machine.memory_bytes
        if not found.fits or found.memory_bytes > limit:
            tried.append(_words(plan, found, machine))
            logger.info("dry step: %s", tried[-1])
            limits = _tighter(plan, limits, machine)
            continue
        timed_limits = _timed(plan, limits, found.step_s)
        timed = make_plan(facts, machine, given, timed_limits)
        if _size_of(timed) == _size_of(plan):
            measured = Measured(
                memory_bytes=found.memory_bytes, step_s=found.step_s, tried=tuple(tried)
            )
            return timed.model_copy(update={"measured": measured})
        filters = plan.value("model.base_filters")
        tried.append(f"{filters} filters: {found.step_s:.2g} s for a step, which is too long")
        logger.info("dry step: %s", tried[-1])
        limits = replace(timed_limits, measured_filters=_size_of(timed)[0])


def _timed(plan: Plan, limits: Limits, step_s: float) -> Limits:
    """Returns limits with the measured duration of a step of `plan`."""
    estimated_s = plan.minutes * 60 / plan.num_steps
    slowdown = limits.slowdown * step_s / estimated_s
    return replace(limits, slowdown=slowdown, measured_filters=_size_of(plan)[0])


def _size_of(plan: Plan) -> tuple[Any, int]:
    """Returns the filters, and the samples at once."""
    return plan.value("model.base_filters"), plan.samples_at_once


def _words(plan: Plan, found: DryStep, machine: MachineFacts) -> str:
    filters = plan.value("model.base_filters")
    more = "" if found.fits else "more than "
    return (
        f"{filters} filters, {plan.samples_at_once} samples at once: {more}"
        f"{found.memory_bytes / GIB:.1f} of {machine.memory_bytes / GIB:.1f} GiB"
    )


def _tighter(plan: Plan, limits: Limits, machine: MachineFacts) -> Limits:
    """Returns limits under which the next plan needs less memory.

    Raises:
        UsageError: nothing is left to reduce.
    """
    is_ignored = plan.samples_at_once > (limits.samples_at_once or plan.samples_at_once)
    if plan.samples_at_once > 1 and plan.chose("accumulate") and not is_ignored:
        return replace(limits, samples_at_once=plan.samples_at_once // 2)
    filters = plan.value("model.base_filters")
    fewer = [n for n in FILTERS if isinstance(filters, int) and n < filters]
    if fewer and plan.chose("model.base_filters"):
        return replace(limits, samples_at_once=plan.samples_at_once, base_filters=fewer[0])
    raise UsageError(
        f"training does not fit into the memory of {machine.host}, "
        f"{machine.memory_bytes / GIB:.1f} GiB, with {filters} filters "
        f"and {plan.samples_at_once} samples at once; prepare smaller images or tiles, leave "
        "--model.base-filters and --accumulate to the plan, or use a machine with more memory"
    )


def _plan_of_new(run: Run, config: TrainConfig, machine: MachineFacts, measure: Measure) -> Plan:
    """Returns the plan of a new run, after storing it.

    An attempt that ended before its first step has left a plan. It stays, unless the options of
    the user or the dataset are now others, or the workers do not divide its batch. The folds of a
    cross-validation share the first plan.
    """
    dataset, given = open_dataset(str(config.data)), given_options(config)
    plan = read_plan(run.store)
    if plan is not None and (plan.dataset_digest, plan.given) == (dataset.digest, given):
        batch = with_plan(config, plan).global_batch_size
        if batch % machine.num_replicas == 0:
            return plan
    folds = _folder_of_folds(config)
    plan = read_plan(folds) if folds is not None else None
    if plan is None:
        plan = _fitted(dataset, config, machine, measure)
        if folds is not None:
            plan = _stored_first(folds, plan)
    if (plan.dataset_digest, plan.given) != (dataset.digest, given):
        raise _other_plan(folds, plan, dataset.digest, given)
    run.put_bytes(PLAN_NAME, plan_json(plan))
    return plan


def _fitted(dataset: Dataset, config: TrainConfig, machine: MachineFacts, measure: Measure) -> Plan:
    facts = dataset_facts(dataset, config.folds)
    plan = fitted_plan(facts, machine, config, measure)
    logger.info("%s", plan_words(plan))
    for note in plan.notes:
        logger.warning("%s", note)
    return plan.model_copy(update={"dataset_digest": dataset.digest})


def _folder_of_folds(config: TrainConfig) -> ObjectStore | None:
    """Returns the folder of the cross-validation that a fold's run belongs to, by its name."""
    ending = f"-fold-{config.fold}"
    name = str(config.name)
    if config.fold is None or not name.endswith(ending):
        return None
    return open_store(config.output).subpath(name.removesuffix(ending))


def _stored_first(folds: ObjectStore, plan: Plan) -> Plan:
    """Stores the plan of all folds, unless another fold did; returns the stored one."""
    try:
        folds.put(PLAN_NAME, plan_json(plan), if_generation=0)
    except PreconditionFailed:
        return read_plan(folds) or plan
    return plan


def _copied_from_folds(run: Run, config: TrainConfig) -> Plan | None:
    """Returns the plan of the cross-validation of a fold's run, after copying it into the run."""
    folds = _folder_of_folds(config)
    plan = read_plan(folds) if folds is not None and config.preset == "auto" else None
    if plan is not None:
        run.put_bytes(PLAN_NAME, plan_json(plan))
    return plan


def _other_plan(
    folds: ObjectStore | None, plan: Plan, digest: str, given: dict[str, Any]
) -> UsageError:
    where = folds.url if folds is not None else ""
    if plan.dataset_digest != digest:
        problem = "another dataset"
    else:
        problem = "; ".join(differences({"config": plan.given}, {"config": given}))
    return UsageError(
        f"{where}/{PLAN_NAME} was made with other options: {problem}; give the old ones or another "
        "--name, or delete the file if no fold has begun"
    )
