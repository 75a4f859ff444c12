"""Runs training that records its events, and that fails where a test has set a trap.

    python -m tests.faults.traced FOLDER train --local ...        as python -m job.train
    python -m tests.faults.traced FOLDER launch train ...         as python -m launcher train

Every process writes a line of JSON per event into its own file in FOLDER/events. A trap is a file
in FOLDER/traps; the first process that it is meant for removes it and does what it says.
"""

import functools
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

PART_BYTES = "FLEXUNET_TEST_PART_BYTES"  # variable: larger files are uploaded in such parts

# Where a trap can be, and what its `at` means there.
#   meet      the processes have met, the strategy is not made yet
#   phase     a phase begins whose name starts with `at`
#   step      step `at` of the run, or a later one, is done
#   save      the members of a checkpoint of step `at` or later are stored, COMMIT.json is not
#   restore   the newest checkpoint is about to be read
#   read      the input pipeline reads samples, and step `at` or a later one is done
# What happens there (`do`): kill (SIGKILL), stop (SIGSTOP), block (the thread sleeps), or a number:
# the exit code with which the process ends at once.


def set_trap(
    folder: Path, rank: int, place: str, at: int | str = 0, do: str | int = "kill", number: int = 0
) -> Path:
    """Sets a trap and returns its file; `number` distinguishes traps at the same place."""
    traps = folder / "traps"
    traps.mkdir(parents=True, exist_ok=True)
    path = traps / f"{place}-{at}-{rank}-{number}".replace(" ", "-")
    new = path.with_suffix(".new")
    new.write_text(json.dumps({"rank": rank, "place": place, "at": at, "do": do}))
    return new.rename(path.with_suffix(".json"))


class Trace:
    """The events and traps of one training process."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._folder, self._rank = folder, rank
        self._step = 0
        (folder / "events").mkdir(parents=True, exist_ok=True)
        name = f"{time.time():.6f}-{os.getpid()}.jsonl"
        self._file = (folder / "events" / name).open("a", buffering=1)

    def record(self, event: str, **values: Any) -> None:
        """Writes an event."""
        line = {"event": event, "rank": self._rank, "time": time.time(), "pid": os.getpid()}
        self._file.write(json.dumps(line | values) + "\n")

    def pass_by(self, place: str, at: int | str = 0) -> None:
        """Triggers a trap that is set at this place for this process."""
        for path in sorted(self._folder.glob(f"traps/{place}-*.json")):
            try:
                trap = json.loads(path.read_text())
                if trap["rank"] != self._rank or not _is_at(trap["at"], at):
                    continue
                path.unlink()
            except FileNotFoundError:  # another process removed it
                continue
            self.record("trap", place=place, at=at, do=trap["do"])
            _fail(trap["do"])

    def install(self) -> None:
        """Makes the code of `job` in this process call `pass_by`; call this before training."""
        from job.distributed.runtime import import_tensorflow

        import_tensorflow()
        from flexunet.storage import gcs, gcs_transfer
        from job.data import reader
        from job.distributed import watchdog
        from job.runs import run
        from job.training import process, trainer

        part = os.environ.get(PART_BYTES)
        if part is not None:
            gcs._SINGLE_BYTES = gcs_transfer._PART_BYTES = int(part)
        self.record("start")
        self._after(process, "rendezvous", lambda *_: self.pass_by("meet"))
        self._before(watchdog.Watchdog, "enter", lambda _, name: self._enter(name))
        self._before(trainer.Trainer, "restore", lambda _: self.pass_by("restore"))
        self._after(run.Run, "_put_members", lambda _, step, *rest: self.pass_by("save", step))
        self._before(
            reader.RecordReader, "read_many", lambda *_: self.pass_by("read", self._step)
        )  # fmt: skip
        steps = trainer.Trainer.train_steps

        @functools.wraps(steps)
        def traced(of: trainer.Trainer, state: Any) -> Iterator[tuple[float, int]]:
            self.record("begin", attempt=of.attempt, epoch=state.epoch, step=state.step)
            train_step = of.train_step

            def traced_step(batch: Any, step: Any, *rest: Any) -> Any:
                sums = train_step(batch, step, *rest)
                # The state counts from 0, and this step is not in it yet.
                self._record_step(of, batch, state.epoch, int(step) + 1)
                return sums

            of.train_step = traced_step
            try:
                for values in steps(of, state):
                    self._step = state.step
                    self.pass_by("step", state.step)
                    yield values
            finally:
                of.train_step = train_step

        trainer.Trainer.train_steps = traced  # type: ignore[method-assign]

    def _enter(self, name: str) -> None:
        self.record("phase", name=name)
        self.pass_by("phase", name)

    def _record_step(self, of: Any, batch: Any, epoch: int, step: int) -> None:
        local = of.strategy.experimental_local_results
        keys, weights = (
            np.concatenate([np.asarray(part) for part in local(batch[name])]).tolist()
            for name in ("key", "weight")
        )
        self.record(
            "step", attempt=of.attempt, epoch=epoch, step=step, keys=keys, weights=weights
        )  # fmt: skip

    def _before(self, owner: Any, name: str, call: Any) -> None:
        inner = getattr(owner, name)

        @functools.wraps(inner)
        def outer(*arguments: Any, **options: Any) -> Any:
            call(*arguments)
            return inner(*arguments, **options)

        setattr(owner, name, outer)

    def _after(self, owner: Any, name: str, call: Any) -> None:
        inner = getattr(owner, name)

        @functools.wraps(inner)
        def outer(*arguments: Any, **options: Any) -> Any:
            result = inner(*arguments, **options)
            call(*arguments)
            return result

        setattr(owner, name, outer)


def _is_at(wanted: int | str, here: int | str) -> bool:
    if isinstance(wanted, str):
        return str(here).startswith(wanted)
    return isinstance(here, int) and here >= wanted


def _fail(do: str | int) -> None:
    if isinstance(do, int):
        os._exit(do)
    if do == "block":
        time.sleep(1e6)
    os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[do])


def events_of(folder: Path) -> list[dict[str, Any]]:
    """Returns all events so far, in the order of time, without unfinished lines."""
    lines = [line for path in folder.glob("events/*") for line in path.read_text().split("\n")[:-1]]
    return sorted((json.loads(line) for line in lines), key=lambda event: event["time"])


def work(folder: str, settings: dict[str, Any]) -> dict[str, Any] | None:
    """Trains as one worker of a Ray cluster, like `launcher.worker.work`."""
    from job.distributed.rendezvous import process_spec_from_environment
    from launcher import worker

    spec = process_spec_from_environment()
    assert spec is not None
    Trace(Path(folder), spec.rank).install()
    return worker.work(settings)


def main() -> int:
    """Runs the command and returns its exit code."""
    folder, kind, *arguments = sys.argv[1:]
    if kind == "launch":
        from launcher import worker_group
        from launcher.commands import launch

        # By this name it is imported again where the workers are.
        from tests.faults.traced import work as traced_work

        worker_group.work = functools.partial(traced_work, folder)
        return launch.main(arguments)
    from job import train as local
    from job.distributed.rendezvous import process_spec_from_environment

    spec = process_spec_from_environment()
    Trace(Path(folder), spec.rank if spec else 0).install()
    return local.main(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
