"""Works on runs by commands from stdin, in a process that tests kill, pause and race.

It reads one command per line of stdin and answers each with a line on stdout. `fork` makes a child
that continues in its place until it dies, so that a thousand deaths do not need a thousand starts.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flexunet.errors import FlexUNetError
from flexunet.storage import LocalStore, ObjectMeta, ObjectStore, open_store
from job.runs.checkpoints import Checkpoint
from job.runs.lease import LeaseTiming
from job.runs.run import Run

PROJECT = Path(__file__).resolve().parents[2]
DIGEST = "d" * 64
IDENTITY = {"seed": 1, "model": {"num_layers": 8}}
MEMBERS = ("model.h5", "optimizer.h5")


class StoppingStore(LocalStore):
    """A folder store that ends its process at change number `stop_at`, before or after it."""

    stop_at = 0
    is_after = False
    num_changes = 0

    def _act(self, action: Any, *args: Any, **options: Any) -> Any:
        StoppingStore.num_changes += 1
        is_last = StoppingStore.num_changes == self.stop_at
        if is_last and not self.is_after:
            os._exit(100)
        result = action(*args, **options)
        if is_last:
            os._exit(100)
        return result

    def put(self, name: str, data: bytes, *, if_generation: int | None = None) -> ObjectMeta:
        return self._act(super().put, name, data, if_generation=if_generation)

    def put_file(self, name: str, path: str, *, if_generation: int | None = None) -> ObjectMeta:
        return self._act(super().put_file, name, path, if_generation=if_generation)

    def delete(self, name: str) -> None:
        self._act(super().delete, name)


def commit_step(run: Run, folder: str, step: int) -> Checkpoint:
    """Commits two files that contain their name and the step."""
    paths = {name: os.path.join(folder, name) for name in MEMBERS}
    for name, path in paths.items():
        Path(path).write_text(f"{name} {step}")
    return run.commit(step, step // 10, paths, {"step": step})


def restored_step(run: Run, folder: str) -> int | None:
    """Restores a run and returns its step, after checking that every file is of that step."""
    restored = run.restore(os.path.join(folder, "staging"))
    if restored is None:
        return None
    commit, paths = restored
    assert sorted(paths) == sorted(MEMBERS)
    for name, path in paths.items():
        assert Path(path).read_text() == f"{name} {commit.step}"
    assert commit.state == {"step": commit.step}
    return commit.step


def own_run(
    store: ObjectStore,
    timing: LeaseTiming,
    *,
    by_lease: bool | None = None,
    launch: str | None = None,
) -> Run:
    """Acquires a run and sets its identity."""
    run = Run.acquire(store, timing=timing, by_lease=by_lease, launch=launch)
    run.check_identity(IDENTITY, DIGEST)
    return run


class Commands:
    """The commands that a line may contain."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._run: Run | None = None

    def open(
        self, url: str, renew_s: float, expire_s: float, by_lease: bool | None = None
    ) -> dict[str, Any]:
        start = time.monotonic()
        try:
            store = open_store(url)
            self._run = own_run(store, LeaseTiming(renew_s, expire_s), by_lease=by_lease)
        except FlexUNetError as error:
            seconds = time.monotonic() - start
            return {"error": type(error).__name__, "reported": str(error), "seconds": seconds}
        return {"attempt": self._run.attempt, "seconds": time.monotonic() - start}

    def commit(self, step: int) -> dict[str, Any]:
        assert self._run is not None
        try:
            return {"prefix": commit_step(self._run, self._folder, step).prefix}
        except FlexUNetError as error:
            return {"error": type(error).__name__}

    def close(self) -> dict[str, Any]:
        if self._run is not None:
            self._run.close()
            self._run = None
        return {}

    def work(
        self, url: str, steps: list[int], keep_last: int, stop_at: int = 0, is_after: bool = False
    ) -> dict[str, Any]:
        """Opens a run, commits and collects garbage step by step, and closes it.

        The lease is never renewed meanwhile, so that every run makes the same changes.
        """
        store = open_store(url)
        if store.local_root is not None:
            StoppingStore.stop_at, StoppingStore.is_after = stop_at, is_after
            store = StoppingStore(store.local_root)
        with own_run(store, LeaseTiming(1e3, 1e3), launch="launch") as run:
            restored_step(run, self._folder)
            for step in steps:
                commit_step(run, self._folder, step)
                say({"committed": step})
                run.collect_garbage(keep_last)
        return {"num_changes": StoppingStore.num_changes}


def say(answer: dict[str, Any]) -> None:
    os.write(1, json.dumps(answer).encode() + b"\n")


def main() -> None:
    import google.cloud.storage  # noqa: F401  # once, before the forks

    with tempfile.TemporaryDirectory() as folder, open(0, "rb", buffering=0) as lines:
        commands = Commands(folder)
        while line := lines.readline():
            task: dict[str, Any] = json.loads(line)
            name = task.pop("do")
            if name != "fork":
                say(getattr(commands, name)(**task))
                continue
            child = os.fork()
            say({"pid": os.getpid()}) if child == 0 else say(
                {"died": os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}
            )


class Worker:
    """The tests' side of a worker process."""

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self.process = process

    def send(self, do: str, **task: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **task}).encode() + b"\n")
        self.process.stdin.flush()

    def hear(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the worker has died"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, do: str, **task: Any) -> dict[str, Any]:
        self.send(do, **task)
        return self.hear()


@contextlib.contextmanager
def started_worker() -> Iterator[Worker]:
    """Starts a worker; at the end, it and its fork, unless stopped, get the end of stdin."""
    command = [sys.executable, "-m", "tests.faults.worker"]
    with subprocess.Popen(
        command, cwd=PROJECT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        try:
            yield Worker(process)
        finally:
            process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()


if __name__ == "__main__":
    main()
