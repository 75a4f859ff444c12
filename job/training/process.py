"""Runs one training process: devices, peers, the run, precision, watchdog."""

import functools
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

from flexunet.cli.interrupts import handled
from flexunet.errors import UsageError
from flexunet.progress import Heartbeat
from flexunet.settings import parse_settings
from flexunet.storage import open_store
from job.config import TrainConfig, checked_run_name, identity_of
from job.data.dataset import Dataset
from job.data.folds import open_folded
from job.distributed.process_group import ProcessGroup, peer_errors
from job.distributed.rendezvous import ProcessSpec, rendezvous
from job.distributed.watchdog import STACKS_FOLDER, Watchdog, end_process, report_stall
from job.models.compatibility import check_compatible, input_max
from job.planning.facts import MachineFacts, machine_facts
from job.planning.options import needs_plan
from job.planning.settle import DryStep, preview, settle_config
from job.reporting.training_display import TrainingDisplay
from job.runs.identity import differences
from job.runs.provenance import check_encoder, check_origin
from job.runs.run import Run
from job.trackers.target import find_target
from job.training.dry_step import measure_step
from job.training.loop import train_and_evaluate
from job.training.setup import Callbacks, TrainingSetup

logger = logging.getLogger(__name__)

_RETRY_S = 60.0
_LAST_WORDS_S = 5.0  # to store the stacks of a stalled process


def run_local(
    config: TrainConfig, other: Callbacks | None = None, *, ends_process: bool = True
) -> dict[str, Any]:
    """Trains on the devices of this machine, as `train --local`.

    Args:
        config: `data` and `name` are set.
        other: called as well.
        ends_process: as for `run_process`.
    """
    with stop_signals() as should_stop, TrainingDisplay(config) as display:
        callbacks = Callbacks(display.report, should_stop)
        if other is not None:
            callbacks = callbacks.joined(other)
        return run_process(config, None, callbacks, ends_process=ends_process)


def run_in_cluster(config: TrainConfig, spec: ProcessSpec) -> dict[str, Any]:
    """Trains as the process `spec` of a cluster, as `train` without `--local`."""
    with stop_signals() as should_stop, TrainingDisplay(config) as display:
        report = display.report if spec.rank == 0 else lambda event: None
        return run_process(config, spec, Callbacks(report, should_stop))


@dataclass(frozen=True)
class Placement:
    """How a launcher has placed a process.

    Attributes:
        launch: name of the launcher, whose next process need not wait for the lease; None: the
            process was not launched.
        num_gpus: GPUs that the process must see; None: any number.
        node_share: share of the machine's memory for which it plans a new run.
    """

    launch: str | None = None
    num_gpus: int | None = None
    node_share: float = 1.0


def run_process(
    config: TrainConfig,
    spec: ProcessSpec | None,
    callbacks: Callbacks,
    *,
    placement: Placement | None = None,
    ends_process: bool = True,
) -> dict[str, Any]:
    """Trains as one of the processes that train together; all of them must call it.

    Args:
        config: `data` and `name` are set.
        spec: None: this process trains alone.
        placement: by a launcher; None: there is none.
        ends_process: end this process when training stalls; else the stacks are stored and an
            error is logged.

    Raises:
        FlexUNetError: also if another process ended or cannot be reached.
    """
    # Check first whatever can be checked without TensorFlow, whose import takes seconds.
    if spec is None or spec.rank == 0:
        find_target(config)
    dataset = open_folded(config)
    placement = placement or Placement()
    facts = _facts(config, spec, placement)
    planned = preview(config, facts()) if needs_plan(config) else config
    check_compatible(planned, dataset)
    if spec is None or spec.size == 1:
        if placement.launch is None:  # a launcher has checked it already
            check_origin(planned, dataset)
            check_encoder(planned)
        with _acquire_run(config, placement.launch) as run:
            # Before TensorFlow takes memory from the dry step.
            config = _settled(run, config, facts, callbacks)
            alone = _Process(config, dataset, None, placement, ends_process)
            return alone.train(run, callbacks)
    process = _Process(config, dataset, spec, placement, ends_process)
    return process.train(None, callbacks)


# Options outside the identity that determine the sequence of collectives: a process with other
# values would block all.
_ALIKE = (
    "epochs",
    "time_budget",
    "time_schedule",
    "accumulate",
    "gradient_exchange",
    "exchange_flops_per_byte",
    "xla",
)


@dataclass(frozen=True)
class _Process:
    """Represents one of the processes that train together, see `run_process`."""

    config: TrainConfig
    dataset: Dataset
    spec: ProcessSpec | None
    placement: Placement
    ends_process: bool

    def train(self, run: Run | None, callbacks: Callbacks) -> dict[str, Any]:
        """Makes the strategy, together with the other processes, and trains.

        Args:
            run: owned by a process that trains alone. Of several, the first acquires it here.
        """
        from job.distributed.strategy import (
            check_batch,
            check_devices,
            check_micro_batches,
            configure,
        )

        config, spec = self.config, self.spec
        num_seen = check_devices(config, spec, self.placement.num_gpus)
        if spec is not None:
            rendezvous(spec, config.phase_timeout, num_seen)
            if spec.size > 1 and not needs_plan(config):
                check_batch(config, spec.size, num_seen)
        with self._watched() as watchdog, ExitStack() as stack:
            watchdog.enter("setting up the devices")
            strategy = configure(config, spec)
            process_group = ProcessGroup(strategy, spec)
            callbacks = _watched_callbacks(watchdog, callbacks, pauses=not self.ends_process)
            with peer_errors(process_group):
                if spec is not None:
                    # Before the first process settles the options for all.
                    self._check_same(process_group)
                    run = self._acquire_on_primary(process_group, stack)
                    watchdog.enter("planning")
                    config = self._settle_on_primary(process_group, run, num_seen, callbacks)
                    if self.placement.launch is None:
                        process_group.run_on_primary(lambda: check_origin(config, self.dataset))
                    check_batch(config, spec.size, num_seen)
                else:
                    check_micro_batches(config, strategy.num_replicas_in_sync)
                watchdog.enter("starting")
                precision = self._agree_on_precision(config, process_group, run)
                config = config.model_copy(update={"precision": precision})
                setup = TrainingSetup(config, self.dataset, run, strategy, process_group)
                return train_and_evaluate(setup, callbacks)

    def _check_same(self, process_group: ProcessGroup) -> None:
        """Refuses processes with other settings or another dataset than the first.

        Raises:
            UsageError: in all processes; names the rank and the differences.
        """

        def settings() -> dict[str, Any]:
            free = {name: getattr(self.config, name) for name in _ALIKE}
            together = {**identity_of(self.config), **free}
            return {"config": together, "dataset": self.dataset.digest}

        first, *others = process_group.all_gather_object(settings)
        for rank, other in enumerate(others, start=1):
            if other != first:
                raise UsageError(
                    f"rank {rank} was started with other settings than rank 0: "
                    f"{'; '.join(differences(first, other))}; start all with the same settings"
                )

    def _acquire_on_primary(self, process_group: ProcessGroup, stack: ExitStack) -> Run | None:
        """Acquires the run in the first process until `stack` closes; returns it there."""
        owned: list[Run] = []

        def acquire() -> None:
            owned.append(stack.enter_context(_acquire_run(self.config, self.placement.launch)))

        process_group.run_on_primary(acquire)
        return owned[0] if owned else None

    def _settle_on_primary(
        self, process_group: ProcessGroup, run: Run | None, num_gpus: int, callbacks: Callbacks
    ) -> TrainConfig:
        """Returns the complete config that the first process settles, in all processes."""

        def settle(heartbeat: Heartbeat) -> dict[str, Any]:
            if run is None:
                return {}
            reports = Callbacks(callbacks.report, callbacks.should_stop, heartbeat)
            seen = replace(self.placement, num_gpus=num_gpus)
            settled = _settled(run, self.config, _facts(self.config, self.spec, seen), reports)
            return settled.model_dump(mode="json")

        settled = process_group.all_gather_with_heartbeat(settle, callbacks.heartbeat)[0]
        return parse_settings(TrainConfig, settled, "plan")

    @contextmanager
    def _watched(self) -> Iterator[Watchdog]:
        """Yields the watchdog of this process, which writes the stacks of a stall into the run."""
        config, spec = self.config, self.spec
        rank = spec.rank if spec else 0
        peers = {r: a for r, a in enumerate(spec.addresses) if r != rank} if spec else {}
        store = open_store(config.output, retry_s=_LAST_WORDS_S).subpath(str(config.name))

        def end(problem: str) -> None:
            name = f"{STACKS_FOLDER}/{socket.gethostname()}-{os.getpid()}-rank-{rank}.txt"
            if self.ends_process:
                end_process(store, name, f"rank {rank}: {problem}")
            else:
                report_stall(store, name, problem)

        with Watchdog(
            # The end of an epoch may wait for storage.
            phase_s=config.phase_timeout + config.storage_timeout,
            step_s=config.step_timeout,
            expired=end,
            peers=peers,
        ) as watchdog:
            yield watchdog

    def _agree_on_precision(
        self, config: TrainConfig, process_group: ProcessGroup, run: Run | None
    ) -> str:
        """Returns the precision of all processes.

        Raises:
            UsageError: one of them does not support it.
        """
        from job.distributed.precision import resolve_precision

        requested: str = config.precision
        begun_in: str | None = None
        if requested == "auto":
            # A run keeps its precision, on whatever machine it resumes.
            begun_in = process_group.run_on_primary(lambda: stored_precision(run))
            requested = begun_in or requested
        largest = input_max(config, self.dataset.manifest)

        def resolve() -> str:
            try:
                return resolve_precision(requested, largest)
            except UsageError as error:
                if begun_in is None:
                    raise
                raise UsageError(
                    f"{config.output}/{config.name} was started with precision {begun_in}, which "
                    f"{socket.gethostname()} does not support; resume it on a machine that "
                    "does, or train another --name"
                ) from error

        precisions = process_group.all_gather_object(resolve)
        # If the machines differ, all of them compute in float32.
        return precisions[0] if len(set(precisions)) == 1 else "float32"


def _facts(
    config: TrainConfig, spec: ProcessSpec | None, placement: Placement
) -> Callable[[], MachineFacts]:
    """Returns a function that collects the facts of this machine once, see `machine_facts`."""
    num_gpus, share = placement.num_gpus, placement.node_share
    return functools.cache(lambda: machine_facts(config, spec, num_gpus=num_gpus, node_share=share))


def _settled(
    run: Run, config: TrainConfig, machine: Callable[[], MachineFacts], callbacks: Callbacks
) -> TrainConfig:
    """Returns the complete config of the owned `run`, see `settle_config`."""

    def measure(config: TrainConfig, machine: MachineFacts) -> DryStep:
        return measure_step(config, machine, callbacks.should_stop, callbacks.heartbeat)

    return settle_config(run, config, machine, measure)


def stored_precision(run: Run | None) -> str | None:
    """Returns the precision with which a run was started; None for a new run or without ownership.

    `auto` is then this precision, since only the training processes know their hardware.
    """
    stored = run.read_identity() if run is not None else None
    return str(stored["config"]["precision"]) if stored else None


def _acquire_run(config: TrainConfig, launch: str | None) -> Run:
    # A request is repeated for a while; the upload queue repeats the whole call for longer.
    retry_s = min(_RETRY_S, max(config.storage_timeout, 1.0))
    store = open_store(config.output, retry_s=retry_s).subpath(checked_run_name(str(config.name)))
    return Run.acquire(store, launch=launch)


def _watched_callbacks(watchdog: Watchdog, callbacks: Callbacks, *, pauses: bool) -> Callbacks:
    """Returns `callbacks` that also notify the watchdog.

    Args:
        pauses: do not watch while an event is reported, because a function of the user may take any
            time: a prediction, a question, a breakpoint.
    """

    def report_event(event: Mapping[str, Any]) -> None:
        if event["event"] == "phase":
            watchdog.enter(event["name"], needs_peers=event["needs_peers"])
        with watchdog.paused() if pauses else nullcontext():
            callbacks.report(event)

    def ask() -> bool:
        watchdog.beat()
        return callbacks.should_stop()

    return Callbacks(report_event, ask, watchdog.heartbeat)


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Yields a function that returns whether Ctrl-C, SIGTERM or SIGHUP came; a second one ends."""
    stop = threading.Event()

    def ask(number: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        logger.warning(
            "%s received: the run stops and saves after this step or the next (during compilation "
            "this can take a minute). A second %s stops at once, without saving.",
            name,
            "Ctrl-C" if number == signal.SIGINT else "signal",
        )
        stop.set()

    with handled((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), ask):
        yield stop.is_set
