"""A run is planned once, by its owner; what resumes keeps its options, wherever it does."""

import re
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from flexunet.errors import FlexUNetError, UsageError
from flexunet.settings import parse_settings, write_yaml
from flexunet.storage import open_store
from job.config import TrainConfig, identity_of
from job.data.dataset import open_dataset
from job.planning.facts import MachineFacts
from job.planning.options import needs_plan, resolve_config
from job.planning.plan_file import PLAN_NAME, plan_json, read_plan
from job.planning.settle import DryStep, facts_of, fitted_plan, settle_config
from job.planning.situation import GIB
from job.reporting.html_report import render
from job.runs.run import Run
from job.training.dry_step import result_of

LAPTOP = MachineFacts(
    host="laptop", device="cpu", memory_bytes=16 * GIB, cores=2, precision="float32"
)
NODE = MachineFacts(
    host="node", device="gpu", memory_bytes=40 * GIB, cores=8, precision="mixed_bfloat16"
)


@dataclass
class Steps:
    """Dry steps that fit from some number of samples and filters on, and take some time."""

    samples: int = 99
    filters: int = 99
    seconds_per_filter: float = 0.0  # 0: half a second in any case
    seen: list[tuple[int, int]] = field(default_factory=list)

    def __call__(self, config: TrainConfig, machine: MachineFacts) -> DryStep:
        assert not needs_plan(config)
        found = config.global_batch_size // config.accumulate, config.model.base_filters
        self.seen.append(found)
        fits = found[0] <= self.samples and found[1] <= self.filters
        step_s = self.seconds_per_filter * found[1] or 0.5
        return DryStep(fits, GIB, step_s if fits else 0.0)


def not_here() -> MachineFacts:
    raise AssertionError("a run that has begun does not look at its machine")


def never(config: TrainConfig, machine: MachineFacts) -> DryStep:
    raise AssertionError("no dry step is needed")


@dataclass(frozen=True)
class Typed:
    """The options of a command."""

    data: str
    output: str
    name: str = "run"

    def resolve(self, **options: Any) -> TrainConfig:
        values = {"data": self.data, "output": self.output, "name": self.name, "preset": "auto"}
        return resolve_config(values | options, None)

    def settle(self, machine: Any = LAPTOP, **options: Any) -> TrainConfig:
        """Settles the config as an attempt does that is killed before its identity is stored."""
        config = self.resolve(**options)
        facts = machine if callable(machine) else lambda: machine
        with Run.open(self.output, str(config.name)) as run:
            return settle_config(run, config, facts, never)

    def begin(self, machine: Any = LAPTOP, *, is_described: bool = True, **options: Any) -> None:
        """Leaves what a run has when its first attempt has begun."""
        config = self.settle(machine, **options).model_copy(update={"precision": "float32"})
        with Run.open(self.output, str(config.name)) as run:
            run.check_identity(identity_of(config), "d" * 64)
            if is_described:
                run.put_text("config.yaml", write_yaml(config))


@pytest.fixture
def typed(discs: str, tmp_path: Path) -> Typed:
    return Typed(discs, str(tmp_path))


def test_a_new_run_is_planned_and_keeps_the_plan(typed: Typed) -> None:
    config = typed.settle(seed=5, model={"num_layers": 2})
    store = open_store(typed.output).subpath("run")
    plan = read_plan(store)
    assert plan is not None
    assert not needs_plan(config)
    assert (config.seed, config.model.num_layers, config.optimizer.name) == (5, 2, "adamw")
    assert plan.given == {"model.num_layers": 2}
    assert parse_settings(TrainConfig, plan.values(), "plan").model == config.model
    store.put("config.yaml", write_yaml(config).encode())
    page = render(store)
    assert "--schedule.cosine" in page
    assert "laptop: CPU, 2 cores, float32" in page
    store.delete(PLAN_NAME)
    assert "--schedule.cosine" not in render(store)


@pytest.mark.parametrize("is_described", [True, False])
def test_a_begun_run_is_not_planned_again(typed: Typed, is_described: bool) -> None:
    typed.begin(is_described=is_described, model={"num_layers": 2})
    first = (Path(typed.output) / "run" / PLAN_NAME).read_bytes()
    for options in ({}, {"model": {"num_layers": 2}}, {"seed": 1234}):
        config = typed.settle(NODE, **options)
        assert config.global_batch_size == 4  # a GPU would get 8
        assert config.model.num_layers == 2
        assert config.accumulate == 1
    other = typed.resolve(model={"num_layers": 3}).model_copy(update={"precision": "float32"})
    with (
        Run.open(typed.output, "run") as run,
        pytest.raises(UsageError, match="num-layers was 2"),
    ):
        run.check_identity(identity_of(other), "d" * 64)
    assert (Path(typed.output) / "run" / PLAN_NAME).read_bytes() == first


def test_one_who_read_the_options_before_another_began_the_run_keeps_theirs(
    typed: Typed,
) -> None:
    late = typed.resolve()
    assert needs_plan(late)
    typed.begin(NODE)
    with Run.open(typed.output, "run") as run:
        config = settle_config(run, late, lambda: LAPTOP, never)
    assert (config.global_batch_size, needs_plan(config)) == (8, False)


def test_an_attempt_killed_before_its_first_step_leaves_a_plan_for_the_same_options(
    typed: Typed,
) -> None:
    assert typed.settle(LAPTOP).global_batch_size == 4
    assert typed.settle(NODE).global_batch_size == 4
    # Nothing has begun, so other options may still be planned.
    assert typed.settle(NODE, model={"base_filters": 4}).global_batch_size == 8


@pytest.mark.parametrize(("replicas", "parts"), [(1, 4), (2, 2), (4, 1)])
def test_micro_batches_follow_the_workers(typed: Typed, replicas: int, parts: int) -> None:
    config = typed.resolve()
    plan = fitted_plan(facts_of(config), LAPTOP, config, Steps(samples=1), always=True)
    assert plan.samples_at_once == 1
    with Run.open(typed.output, "run") as run:
        run.put_text(PLAN_NAME, plan.model_dump_json())
        values = parse_settings(TrainConfig, plan.values(), "plan")
        run.check_identity(
            identity_of(values.model_copy(update={"precision": "float32"})), "d" * 64
        )
    workers = LAPTOP.model_copy(update={"num_replicas": replicas})
    assert typed.settle(workers).accumulate == parts
    assert typed.settle(not_here, accumulate=2).accumulate == 2


def test_a_dry_step_that_does_not_fit_gives_smaller_parts_then_fewer_filters(
    typed: Typed,
) -> None:
    config = typed.resolve()
    facts = facts_of(config)
    steps = Steps(samples=1, filters=12)
    plan = fitted_plan(facts, LAPTOP, config, steps, always=True)
    assert steps.seen == [(4, 32), (2, 32), (1, 32), (1, 24), (1, 16), (1, 12)]
    assert plan.measured is not None
    assert len(plan.measured.tried) == 5
    assert plan.minutes == pytest.approx(plan.num_steps * 0.5 / 60)
    given = typed.resolve(model={"base_filters": 32}, accumulate=4)
    with pytest.raises(UsageError, match=r"does not fit into the memory of laptop, 16\.0 G"):
        fitted_plan(facts, LAPTOP, given, Steps(filters=24), always=True)
    # Batch normalisation allows no parts: the batch itself becomes smaller, unless it was given.
    batch = {"model": {"normalization": "batch"}}
    assert (
        fitted_plan(facts, LAPTOP, typed.resolve(**batch), Steps(samples=2), always=True).value(
            "global_batch_size"
        )
        == 2
    )
    with pytest.raises(UsageError, match="does not fit into the memory of laptop"):
        config = typed.resolve(global_batch_size=4, **batch)
        fitted_plan(facts, LAPTOP, config, Steps(samples=2), always=True)
    # Far below the memory, nothing is measured.
    assert fitted_plan(facts, LAPTOP, config, never).measured is None


def test_a_measured_step_gives_the_epochs_and_fewer_filters(typed: Typed) -> None:
    config = typed.resolve()
    facts = facts_of(config)
    plans = []
    # At most an hour: with 32 filters a step takes 0.32, 2.9 and 32 s.
    for seconds_per_filter in (0.01, 0.09, 1.0):
        steps = Steps(seconds_per_filter=seconds_per_filter)
        plan = fitted_plan(facts, LAPTOP, config, steps, always=True)
        filters = plan.value("model.base_filters")
        assert steps.seen[-1][1] == filters  # the plan's own step is the measured one
        step_s = seconds_per_filter * float(str(filters))
        assert plan.minutes == pytest.approx(plan.num_steps * step_s / 60)
        plans.append((filters, plan.num_steps >= 1500, plan.minutes < 62))
    assert plans == [(32, True, True), (24, True, True), (8, False, False)]
    budget = typed.resolve(time_budget=10)
    steps = Steps(seconds_per_filter=0.09)
    plan = fitted_plan(facts_of(budget), LAPTOP, budget, steps, always=True)
    assert plan.measured is not None
    assert plan.num_steps * plan.measured.step_s == pytest.approx(600, rel=0.01)
    assert plan.value("model.base_filters") == 12  # 500 steps in 10 minutes
    # A budget needs the true duration of a step, if it is not too short for a dry step.
    assert fitted_plan(facts_of(budget), LAPTOP, budget, Steps()).measured is not None
    short = typed.resolve(time_budget=0.5)
    assert fitted_plan(facts_of(short), LAPTOP, short, never).measured is None


def test_folds_share_one_plan(typed: Typed) -> None:
    folds = [Typed(typed.data, typed.output, f"cv-fold-{k}") for k in range(3)]
    first = folds[0].settle(LAPTOP, folds=3, fold=0)
    second = folds[1].settle(NODE, folds=3, fold=1)
    assert first.global_batch_size == second.global_batch_size == 4
    shared = open_store(typed.output).subpath("cv").get(PLAN_NAME)
    for fold in folds[:2]:
        assert open_store(typed.output).subpath(fold.name).get(PLAN_NAME) == shared
    with pytest.raises(UsageError, match=r"--model.num-layers was not set, now 2; give the old"):
        folds[2].settle(NODE, folds=3, fold=2, model={"num_layers": 2})


def test_auto_is_refused_for_a_run_of_another_preset(typed: Typed) -> None:
    config = typed.resolve(preset="recipe")
    with Run.open(typed.output, "run") as run:
        run.check_identity(identity_of(config), "d" * 64)
        run.put_text("config.yaml", write_yaml(config))
    with pytest.raises(UsageError, match="was started with --preset recipe, and a run keeps its"):
        typed.resolve()
    assert not needs_plan(resolve_config({"output": typed.output, "name": "run"}, None))


def leave_plan(typed: Typed) -> None:
    """Leaves the plan of an attempt that had memory for one sample at once, and never began."""
    config = typed.resolve()
    plan = fitted_plan(facts_of(config), LAPTOP, config, Steps(samples=1), always=True)
    digest = open_dataset(typed.data).digest
    with Run.open(typed.output, "run") as run:
        run.put_bytes(PLAN_NAME, plan_json(plan.model_copy(update={"dataset_digest": digest})))


def test_a_plan_that_an_attempt_left_is_not_used_by_another_preset(typed: Typed) -> None:
    leave_plan(typed)
    config = typed.settle(not_here, preset="recipe", global_batch_size=8)
    assert config.accumulate == 1
    assert read_plan(open_store(typed.output).subpath("run")) is None


@pytest.mark.parametrize(("replicas", "batch", "parts"), [(1, 4, 4), (2, 4, 2), (3, 6, 1)])
def test_a_plan_that_an_attempt_left_is_fitted_to_other_workers(
    typed: Typed, replicas: int, batch: int, parts: int
) -> None:
    leave_plan(typed)
    config = typed.settle(LAPTOP.model_copy(update={"num_replicas": replicas}))
    assert (config.global_batch_size, config.accumulate) == (batch, parts)


def test_batch_normalisation_keeps_the_batch_of_a_replica_whole(typed: Typed) -> None:
    two = LAPTOP.model_copy(update={"num_replicas": 2})
    typed.begin(two, model={"normalization": "batch"})
    assert typed.settle(LAPTOP).accumulate == 1


@pytest.mark.parametrize(
    ("code", "log", "is_memory"),
    [
        (-signal.SIGKILL, "", True),
        (-signal.SIGABRT, "terminate called after throwing an instance of 'std::bad_alloc'", True),
        (1, "ResourceExhaustedError: OOM when allocating tensor with shape[2,512,512]", True),
        (1, "MemoryError: Unable to allocate 8.00 GiB", True),
        (-signal.SIGSEGV, "Fatal Python error: Segmentation fault", False),
        (-signal.SIGABRT, "Check failed: status.ok()", False),
        (1, "ValueError: images of the ZOOM lens", False),
    ],
)
def test_a_dry_step_that_crashes_is_not_taken_for_short_memory(
    code: int, log: str, is_memory: bool
) -> None:
    if is_memory:
        assert result_of(code, "", log, GIB) == DryStep(fits=False, memory_bytes=GIB, step_s=0.0)
        return
    with pytest.raises(FlexUNetError, match=f"failed with exit code {code}: {re.escape(log)}"):
        result_of(code, "", log, GIB)
