"""Starts training runs for fault tests, and checks what must be true at their end."""

import itertools
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from flexunet.storage import ObjectStore, join_url, open_store
from job.data.sampling import dropout_keys
from job.runs.checkpoints import find_checkpoints
from tests.faults.traced import events_of
from tests.job.discs import prepare_discs
from tests.job.processes import free_addresses, weights_of

PROJECT = Path(__file__).resolve().parents[2]
NUM_EPOCHS, NUM_STEPS, NUM_SAMPLES, BATCH, SEED = 10, 6, 12, 2, 1234  # steps of an epoch
OPTIONS = {
    "preset": "reference",
    "epochs": str(NUM_EPOCHS),
    "global-batch-size": str(BATCH),
    "seed": str(SEED),
    "precision": "float32",
    "prediction-images": "1",
    "checkpoint-every-minutes": "0.0001",
    "threads": "1",
    "schedule.early-stopping-patience": "0",
    "model.num-layers": "3",
    "model.base-filters": "4",
    "model.base-kernels": "3,3",
    "model.dropout-rate": "0.1",
}
TABLES = (
    *(f"metrics/{name}.csv" for name in ("history", "train_losses", "train_metrics")),
    "evaluation/per_case.csv",
)


def arguments(data: str, output: str, name: str, **changes: str) -> list[str]:
    """Returns the options of a training command."""
    values = OPTIONS | {"data": data, "output": output, "name": name} | changes
    flags = ["--deterministic", "--no-tensorboard", "--no-progress"]
    return [*flags, *(part for key, value in values.items() for part in (f"--{key}", value))]


class Command:
    """A running flexunet command, traced in `folder`; its stderr is a file, so it never blocks."""

    def __init__(self, folder: Path, words: Sequence[str], **environment: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._log = folder / f"stderr-{time.time():.6f}.txt"
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.faults.traced", str(folder), *words],
                cwd=PROJECT,
                env=os.environ | environment,
                stdout=subprocess.DEVNULL,
                stderr=log,
            )
        self.started = time.time()

    @property
    def errors(self) -> str:
        """The text of stderr so far."""
        return self._log.read_text()

    @property
    def last_line(self) -> str:
        """The last line of stderr so far."""
        return self.errors.strip().splitlines()[-1]

    def wait_for(self, predicate: Callable[[], Any], timeout: float = 120) -> Any:
        """Waits until `predicate` returns a true value, and returns it."""
        deadline = time.monotonic() + timeout
        while not (found := predicate()):
            assert self.process.poll() is None, f"it has ended: {self.errors}"
            assert time.monotonic() < deadline, f"it did not happen: {self.errors}"
            time.sleep(0.02)
        return found

    def end(self, timeout: float = 300) -> int:
        """Waits for the end and returns the exit code."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it has not ended: {self.errors}") from None


@contextmanager
def command(folder: Path, words: Sequence[str], **environment: str) -> Iterator[Command]:
    """Yields a running command, and kills it after the block."""
    running = Command(folder, words, **environment)
    try:
        yield running
    finally:
        running.process.kill()
        running.process.wait()


@contextmanager
def launched(
    folder: Path,
    address: str,
    options: Sequence[str],
    *,
    num_workers: int = 2,
    max_failures: int = 3,
) -> Iterator[Command]:
    """Yields a running `launch train` with two workers."""
    where = ["--address", address, "--num-workers", "2"]
    where += ["--max-failures", str(max_failures)]
    with command(folder, ["launch", "train", *where, *options]) as driver:
        yield driver


@contextmanager
def running_process(
    folder: Path, rank: int, addresses: Sequence[str], options: Sequence[str], **environment: str
) -> Iterator[Command]:
    """Yields the process `rank` of a cluster as `TF_CONFIG` describes it."""
    task = {"type": "worker", "index": rank}
    environment["TF_CONFIG"] = json.dumps({"cluster": {"worker": addresses}, "task": task})
    with command(folder, ["train", *options], **environment) as process:
        yield process


@contextmanager
def running_processes(
    folder: Path, options: Sequence[str], size: int = 2, **environment: str
) -> Iterator[list[Command]]:
    """Yields all processes of a `TF_CONFIG` cluster, in the order of their ranks."""
    addresses = free_addresses(size)
    with ExitStack() as stack:
        yield [
            stack.enter_context(running_process(folder, rank, addresses, options, **environment))
            for rank in range(size)
        ]


def copied(dataset: str, url: str) -> str:
    """Copies a dataset; returns the URL of the copy."""
    source, target = open_store(dataset), open_store(join_url(url, "dataset"))
    for stat in source.list():
        target.put(stat.name, source.get(stat.name))
    return target.url


def make_control(folder: Path) -> tuple[str, Path]:
    """Returns a dataset and an uninterrupted run of two processes."""
    data = prepare_discs(folder)
    with running_processes(folder / "trace", arguments(data, str(folder), "control")) as members:
        assert [each.end() for each in members] == [0, 0], members[0].errors
    return data, folder / "control"


def assert_same_run(run: ObjectStore, control: Path) -> None:
    """Checks that a run is the control: weights bit by bit, tables byte by byte, steps, epochs."""
    expected, found = weights_of(control), weights_of(run.url)
    assert expected.keys() == found.keys()
    assert all(np.array_equal(values, found[name]) for name, values in expected.items())
    for name in TABLES:
        assert run.get(name) == (control / name).read_bytes(), name
    newest = max(find_checkpoints(run))
    state = json.loads(run.get(f"{newest.prefix}/state.json"))
    total = len((control / TABLES[0]).read_text().splitlines()[1:]) * NUM_STEPS
    assert (newest.step, state["step"]) == (total, total)
    assert [row["epoch"] for row in state["rows"]] == list(range(total // NUM_STEPS))
    assert json.loads(run.get("outcome.json"))["status"] == "finished"


def redone_steps(folder: Path, num_processes: int = 2) -> list[int]:
    """Checks the samples of a run that has ended; returns the steps redone after each restart.

    Of each attempt, the steps up to the one from which the next attempt resumed count. In these
    steps, every epoch must train on every sample exactly once. Attempts that do the same step must
    train on the same samples.
    """
    events = events_of(folder)
    begins: dict[int, int] = {}
    for event in events:
        if event["event"] == "begin":
            begins.setdefault(event["attempt"], event["step"])
    attempts = sorted(begins)
    steps = [event for event in events if event["event"] == "step"]
    samples: dict[tuple[int, int], Any] = {}  # of (step, rank)
    seen: dict[int, Counter[int]] = {}  # by epoch
    done: dict[int, int] = {}
    counted: Counter[int] = Counter()
    for event in steps:
        what = (event["epoch"], event["keys"], event["weights"])
        assert samples.setdefault((event["step"], event["rank"]), what) == what
        done[event["attempt"]] = max(done.get(event["attempt"], 0), event["step"])
        later = [begins[attempt] for attempt in attempts if attempt > event["attempt"]]
        if event["step"] > min(later, default=sys.maxsize):
            continue  # lost with its process
        counted[event["step"]] += 1
        ids = _ids_of(event["keys"], event["epoch"])
        trained = [i for i, weight in zip(ids, event["weights"], strict=True) if weight]
        seen.setdefault(event["epoch"], Counter()).update(trained)
    assert len(seen) == NUM_EPOCHS
    assert counted == dict.fromkeys(range(1, NUM_EPOCHS * NUM_STEPS + 1), num_processes)
    assert all(found == dict.fromkeys(range(NUM_SAMPLES), 1) for found in seen.values())
    return [
        max(0, done.get(before, 0) - begins[after])
        for before, after in itertools.pairwise(attempts)
    ]


def _ids_of(keys: Sequence[int], epoch: int) -> list[int]:
    of = dropout_keys(np.arange(NUM_SAMPLES), seed=SEED, epoch=epoch)
    return [int(np.flatnonzero(of == key)[0]) for key in keys]


def commits_of(run: ObjectStore) -> list[int]:
    """Returns the steps of the existing checkpoints."""
    return [place.step for place in find_checkpoints(run)]


def steps_of(folder: Path, after: float = 0) -> list[int]:
    """Returns the steps that processes have finished after `after`."""
    return [
        event["step"]
        for event in events_of(folder)
        if event["event"] == "step" and event["time"] > after
    ]


def traps_left(folder: Path) -> list[str]:
    """Returns the traps that no process has triggered."""
    return sorted(path.name for path in folder.glob("traps/*"))


def pause_of(events: Sequence[dict[str, Any]], begin: float) -> float:
    """Returns the seconds from `begin` to the end of the first step of a process started later."""
    starts = {
        event["pid"]: event["time"]
        for event in events
        if event["event"] == "start" and event["time"] > begin
    }
    after = [
        event["time"] for event in events if event["event"] == "step" and event["pid"] in starts
    ]
    return min(after) - begin
