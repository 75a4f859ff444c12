"""Training under failures: kills, storms, hangs, preemption; counts what is lost.

A run with failures must equal an uninterrupted run: weights bit by bit, tables byte by byte, every
sample of every epoch exactly once.
"""

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from flexunet.storage import join_url, open_store
from job.runs.checkpoints import find_checkpoints
from tests.conftest import FaultyBucket
from tests.faults.proxy import Fault
from tests.faults.test_run_faults import storm
from tests.faults.traced import PART_BYTES, events_of, set_trap
from tests.faults.training import (
    NUM_EPOCHS,
    NUM_STEPS,
    arguments,
    assert_same_run,
    command,
    commits_of,
    copied,
    free_addresses,
    launched,
    make_control,
    pause_of,
    redone_steps,
    running_process,
    running_processes,
    steps_of,
    traps_left,
)
from tests.launcher.conftest import RayCluster, started_cluster

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]
Record = Callable[[str, int, int, str], None]

# Preempts the second node, like a cloud that removes it after a minute.
_DRAIN = """
import sys, time
import ray
from ray._raylet import GcsClient
from ray.core.generated.autoscaler_pb2 import DRAIN_NODE_REASON_PREEMPTION
ray.init(address=sys.argv[1], logging_level="ERROR")
(node,) = [
    each["NodeID"]
    for each in ray.nodes()
    if each["Alive"] and "node:__internal_head__" not in each["Resources"]
]
deadline_ms = int((time.time() + 60) * 1000)
client = GcsClient(address=sys.argv[1])
accepted, problem = client.drain_node(node, DRAIN_NODE_REASON_PREEMPTION, "a test", deadline_ms)
assert accepted, problem
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Returns a dataset, and an uninterrupted run of two processes."""
    return make_control(tmp_path_factory.mktemp("control"))


class Case:
    """A dataset and runs in a bucket, traced in a folder."""

    def __init__(self, bucket: FaultyBucket, folder: Path, dataset: str) -> None:
        self.proxy, self.folder = bucket.proxy, folder / "trace"
        self.runs = join_url(bucket.url, "runs")
        self.run = open_store(join_url(self.runs, "broken"))
        self._data, self._cache = copied(dataset, bucket.url), str(folder / "cache")

    def options(self, **changes: str) -> list[str]:
        """Returns the options of a training command."""
        return arguments(self._data, self.runs, "broken", **{"cache-dir": self._cache, **changes})

    def step(self, after: float = 0) -> int:
        """Returns the newest step that a process has finished after `after`; 0: none."""
        return max(steps_of(self.folder, after), default=0)

    def num_events(self, name: str) -> int:
        """Returns the number of events with this name."""
        return sum(event["event"] == name for event in events_of(self.folder))


@pytest.fixture
def case(faulty_bucket: FaultyBucket, tmp_path: Path, made: tuple[str, Path]) -> Case:
    """Returns a dataset in a bucket, and a URL for its run."""
    return Case(faulty_bucket, tmp_path, made[0])


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def test_killed_workers_change_nothing(
    ray_cluster: RayCluster, case: Case, made: tuple[str, Path], record_fault: Record
) -> None:
    choice = random.Random(1)
    early, late = choice.sample(range(20, 38), 3), choice.sample(range(38, 58), 2)
    for step in early[:2]:
        set_trap(case.folder, choice.randrange(2), "step", step)
    set_trap(case.folder, 0, "save", early[2])
    set_trap(case.folder, 0, "save", late[0])
    set_trap(case.folder, 1, "meet", number=1)
    set_trap(case.folder, choice.randrange(2), "phase", f"validation of epoch {1 + late[1] // 6}")
    set_trap(case.folder, 0, "phase", f"end of epoch {2 + late[1] // 6}")
    set_trap(case.folder, choice.randrange(2), "phase", "evaluation")
    num_traps = len(traps_left(case.folder))
    with launched(case.folder, ray_cluster.address, case.options()) as driver:
        for _ in range(2):  # whenever it may be
            now = time.time()
            driver.wait_for(lambda now=now: case.step(after=now))
            time.sleep(choice.uniform(0, 1))
            starts = [each for each in events_of(case.folder) if each["event"] == "start"]
            kill(choice.choice(starts[-2:])["pid"])
        code = driver.end(600)
        assert code == 0, driver.errors
        num_restarts = driver.errors.count("restarting the workers")
    assert traps_left(case.folder) == []
    assert num_restarts == num_traps + 2
    assert_same_run(case.run, made[1])
    redone = redone_steps(case.folder)
    note = (
        f"{num_restarts} kills of random ranks: 2 at any time, 2 after a step, 2 inside a save, 1 "
        "before the strategy, 1 in validation, 1 at the end of an epoch, 1 in evaluation; weights, "
        f"tables identical; steps redone per kill {redone}"
    )
    record_fault("R1", num_restarts, 0, note)
    num_steps = NUM_EPOCHS * NUM_STEPS
    record_fault("R2", num_steps, 0, "state.step and the newest commit are the steps exactly")
    note = f"samples of {NUM_EPOCHS} epochs over {num_restarts} restarts: each exactly once"
    record_fault("R3", num_steps, 0, note)
    record_fault("R22", num_restarts, 0, "tables equal the control's byte by byte, epochs once")


def test_killed_drivers_change_nothing(
    ray_cluster: RayCluster, case: Case, made: tuple[str, Path], record_fault: Record
) -> None:
    choice = random.Random(4)
    begins = []
    for step in (0, 12, 24, 36, 48):
        with launched(case.folder, ray_cluster.address, case.options()) as driver:
            begins.append(driver.started)
            if step:
                driver.wait_for(lambda step=step: case.step() >= step)
            else:
                driver.wait_for(lambda: case.num_events("start"))
            time.sleep(choice.uniform(0, 0.5))
            assert driver.process.poll() is None
    with launched(case.folder, ray_cluster.address, case.options()) as driver:
        begins.append(driver.started)
        assert driver.end() == 0, driver.errors
    assert_same_run(case.run, made[1])
    redone = redone_steps(case.folder)
    pauses = [pause_of(events_of(case.folder), begin) for begin in begins[1:]]
    late = sum(pause > 60 for pause in pauses)
    note = (
        f"SIGKILL of the driver, same command: identical; {min(pauses):.0f}-{max(pauses):.0f} s "
        f"from its start to the first new step; steps redone {redone}"
    )
    record_fault("R4", 5, late, note)
    assert late == 0, pauses


def test_a_killed_cluster_changes_nothing(
    case: Case, made: tuple[str, Path], record_fault: Record
) -> None:
    with (
        started_cluster() as cluster,
        launched(case.folder, cluster.address, case.options()) as driver,
    ):
        driver.wait_for(lambda: case.step() >= 20)
        server = psutil.Process(cluster.pid)
        for each in [server, *server.children(recursive=True)]:
            kill(each.pid)
        begin = time.monotonic()
        code = driver.end(200)
        seconds, last = time.monotonic() - begin, driver.last_line
    with (
        started_cluster() as cluster,
        launched(case.folder, cluster.address, case.options()) as driver,
    ):
        assert driver.end() == 0, driver.errors
    assert_same_run(case.run, made[1])
    note = (
        f"all processes of the cluster killed; driver ended with {code} after {seconds:.0f} s; "
        f"same command on a new cluster: identical, steps redone {redone_steps(case.folder)}"
    )
    record_fault("R5", 1, 0, note)
    assert code == 1, last
    assert last.endswith("the same command resumes, also on another cluster")


def test_a_storm_an_outage_and_a_stall_lose_nothing(
    case: Case, made: tuple[str, Path], record_fault: Record
) -> None:
    case.proxy.add(*storm(0.3))
    with running_processes(
        case.folder, case.options(**{"checkpoint-every-minutes": "0.01"})
    ) as members:
        members[0].wait_for(lambda: case.step() >= 15)
        case.proxy.down = True
        time.sleep(20)
        case.proxy.down = False
        num_during = case.step()
        members[0].wait_for(lambda: commits_of(case.run)[-1] > num_during)
        case.proxy.add(Fault("stall", seconds=5, count=3))
        assert [each.end() for each in members] == [0, 0], members[0].errors
    num_requests, num_faults = case.proxy.count(), sum(bool(e.fault) for e in case.proxy.log)
    case.proxy.clear()
    assert_same_run(case.run, made[1])
    assert redone_steps(case.folder) == []
    note = (
        f"training: {num_faults} of {num_requests} requests failed, outage of 20 s, stall of 5 s: "
        "identical, no restart, no checkpoint lost"
    )
    record_fault("R8", 1, 0, note)


def test_an_outage_for_good_keeps_the_newest_checkpoint(
    case: Case, made: tuple[str, Path], record_fault: Record, tmp_path: Path
) -> None:
    options = case.options(**{"storage-timeout": "10"})
    staging = tmp_path / "staging"
    staging.mkdir()
    with running_processes(case.folder, options, TMPDIR=str(staging)) as members:
        members[0].wait_for(lambda: case.step() >= 15)
        case.proxy.down = True
        begin = time.monotonic()
        codes = [each.end() for each in members]
        seconds = time.monotonic() - begin
        last = members[0].last_line
    assert codes == [5, 5], last
    found = re.search(r"is kept on \S+ in (\S+)", last)
    assert found, last
    kept = found[1].rstrip(";.,")
    assert Path(kept).is_relative_to(staging)
    steps = {json.loads(path.read_text())["step"]: path for path in Path(kept).rglob("state.json")}
    newest = max(steps)
    names = {path.name for path in steps[newest].parent.iterdir()}
    assert names == {"state.json", "model.weights.h5", "optimizer.npz"}
    case.proxy.down = False
    assert newest >= commits_of(case.run)[-1]
    with running_processes(case.folder, options) as members:
        assert [each.end() for each in members] == [0, 0], members[0].errors
    assert_same_run(case.run, made[1])
    redone = redone_steps(case.folder)
    note = (
        f"outage for good, --storage-timeout 10: exit 5 after {seconds:.0f} s, checkpoint of step "
        f"{newest} kept; afterwards the same command: identical, steps redone {redone}"
    )
    record_fault("R8", 1, 0, note)
    assert seconds < 60


def test_a_stopped_process_of_a_large_network_saves_in_time(
    tmp_path: Path, record_fault: Record
) -> None:
    from tests.job.discs import prepare_discs

    data = prepare_discs(tmp_path, side=128)
    changes = {
        "epochs": "1000", "global-batch-size": "1", "threads": "2", "model.num-layers": "8",
        "model.base-filters": "16", "model.base-kernels": "9,9", "prediction-images": "0",
        "checkpoint-every-minutes": "0",
    }  # fmt: skip
    options = ["--local", *arguments(data, str(tmp_path), "large", **changes)]
    run, trace = open_store(str(tmp_path / "large")), tmp_path / "trace"
    seconds, redone, num_bytes = [], [], 0
    choice = random.Random(11)
    for number in range(5):
        events = trace / str(number)
        with command(events, ["train", *options]) as process:
            process.wait_for(lambda events=events: len(steps_of(events)) >= 3, 250)
            time.sleep(choice.uniform(0, 2))
            begin = time.time()
            process.process.terminate()
            assert process.end() == 6, process.errors
        place = max(find_checkpoints(run))
        marker = tmp_path / "large" / place.prefix / "COMMIT.json"
        seconds.append(marker.stat().st_mtime - begin)
        redone.append(max(steps_of(events)) - place.step)
        num_bytes = sum(path.stat().st_size for path in marker.parent.iterdir())
    seconds.sort()
    fast, slow = sum(s > 15 for s in seconds), sum(s > 25 for s in seconds)
    note = (
        f"SIGTERM with a state of {num_bytes / 1e9:.2f} GB: committed p50 {seconds[2]:.1f} s, "
        f"at most {seconds[-1]:.1f} s; {5 - fast} of 5 within 15 s, {5 - slow} of 5 within 25 s; "
        f"steps redone at most {max(redone)}"
    )
    record_fault("R11", 5, slow, note)
    assert max(redone) <= 1
    assert slow == 0, seconds


@pytest.mark.parametrize("num_train", [4, 5, 7])
def test_uneven_data_neither_hang_nor_change_a_number(
    num_train: int, tmp_path: Path, record_fault: Record
) -> None:
    from data_prep.config import PrepConfig
    from data_prep.pipeline import prepare
    from data_prep.sources.pairs import find_sources
    from tests.job.discs import write_discs
    from tests.job.test_process_group import history_of

    for seed, (split, count) in enumerate((("train", num_train), ("valid", 2), ("test", 1))):
        write_discs(tmp_path / "source" / split, num_images=count, seed=seed)
        for path in (tmp_path / "source" / split).glob("*/*.png"):
            path.rename(path.with_name(f"{split}-{path.name}"))
    data = str(tmp_path / "dataset")
    config = PrepConfig(image_size=32, num_processes=1)
    prepare(find_sources(str(tmp_path / "source")), data, config, progress=False)
    changes = {"epochs": "2", "global-batch-size": "3", "precision": "float64"}
    alone = ["train", "--local", *arguments(data, str(tmp_path), "alone", **changes)]
    with command(tmp_path / "alone-trace", alone) as process:
        assert process.end(120) == 0, process.errors
    begin = time.monotonic()
    with running_processes(
        tmp_path / "trace", arguments(data, str(tmp_path), "three", **changes), 3
    ) as three:
        assert [each.end(120) for each in three] == [0, 0, 0], three[0].errors
    seconds = time.monotonic() - begin
    alone_run, three_run = tmp_path / "alone", tmp_path / "three"
    rows = list(zip(history_of(alone_run), history_of(three_run), strict=True))
    assert len(rows) == 2
    pairs = [(float(a[name]), float(b[name])) for a, b in rows for name in a]
    worst = max(abs(a - b) / max(1.0, abs(a)) for a, b in pairs)
    cases = [(run / "evaluation" / "per_case.csv").read_text() for run in (alone_run, three_run)]
    assert cases[0] == cases[1]
    assert worst < 1e-9
    note = f"{num_train} samples, 3 processes, batch of 3: {seconds:.0f} s, difference {worst:.0e}"
    record_fault("R14", 1, 0, note)


def test_an_upload_at_a_tenth_of_the_needed_speed_ends_nothing(
    case: Case, record_fault: Record
) -> None:
    """All limits are 20 s; the checkpoint takes 200 s, and both processes wait for it."""
    limits = {"phase-timeout": "15", "storage-timeout": "5", "step-timeout": "20"}
    network = {"model.base-filters": "40", "model.base-kernels": "5,5", "epochs": "1"}
    options = case.options(**limits, **network, **{"checkpoint-every-minutes": "0"})
    with running_processes(case.folder, options, **{PART_BYTES: str(1 << 18)}) as members:
        members[0].wait_for(lambda: case.step() >= NUM_STEPS - 1)
        case.proxy.add(Fault("slow", kinds=("part",), bytes_per_s=SLOW_BYTES_PER_S))
        begin = time.monotonic()
        codes = [each.end(600) for each in members]
        seconds = time.monotonic() - begin
    assert codes == [0, 0], members[0].errors
    (place,) = find_checkpoints(case.run)
    num_bytes = sum(stat.size for stat in case.run.list(f"{place.prefix}/"))
    needed_s = num_bytes / SLOW_BYTES_PER_S
    assert needed_s > 9 * 20  # a checkpoint has 9 to 10 MB
    assert (place.step, case.run.list("stacks/")) == (NUM_STEPS, [])
    note = (
        f"checkpoint of {num_bytes / 1e6:.1f} MB at {SLOW_BYTES_PER_S / 1e3:.0f} kB/s, all limits "
        f"20 s: both processes waited and finished {seconds:.0f} s later"
    )
    record_fault("R25", 1, 0, note)


SLOW_BYTES_PER_S = 50e3
HASTY = {"step-timeout": "10", "phase-timeout": "40", "storage-timeout": "5"}


def test_workers_that_stand_still_are_replaced(
    ray_cluster: RayCluster, case: Case, made: tuple[str, Path], record_fault: Record
) -> None:
    set_trap(case.folder, 1, "step", 14, "stop")
    set_trap(case.folder, 0, "step", 30, "stop")
    set_trap(case.folder, 1, "read", 42, "block")
    with launched(case.folder, ray_cluster.address, case.options(**HASTY)) as driver:
        assert driver.end(500) == 0, driver.errors
        assert driver.errors.count("restarting the workers") == 3, driver.errors
    assert traps_left(case.folder) == []
    assert_same_run(case.run, made[1])
    events = events_of(case.folder)
    falls = [event for event in events if event["event"] == "trap"]
    pauses = [pause_of(events, fall["time"]) for fall in falls]
    pids = {event["pid"] for event in falls if event["do"] == "stop"}
    assert not any(psutil.pid_exists(pid) for pid in pids)
    stacks = [stat.name for stat in case.run.list("stacks/")]
    # A process that stalls at the beginning of an epoch has the time limit of a phase.
    late = sum(pause > limit + 60 for pause, limit in zip(pauses, (10, 10, 45), strict=True))
    note = (
        "SIGSTOP of rank 1, of rank 0, blocked input of rank 1; --step-timeout 10: training after "
        f"{', '.join(f'{pause:.0f}' for pause in pauses)} s, {len(stacks)} stacks, identical, "
        f"steps redone {redone_steps(case.folder)}"
    )
    record_fault("R15", 3, late, note)
    # A stopped process cannot write its stacks; all other processes did.
    assert len(stacks) == 1 + 1 + 2, stacks
    assert late == 0, pauses


def test_a_rank_that_never_comes_is_named(
    made: tuple[str, Path], tmp_path: Path, record_fault: Record
) -> None:
    options = arguments(made[0], str(tmp_path), "lonely", **{"phase-timeout": "5"})
    seconds = []
    for number in range(3):
        rank, addresses = number % 2, free_addresses(2)
        with running_process(tmp_path / "trace", rank, addresses, options) as process:
            assert process.end(60) == 1, process.errors
            seconds.append(time.time() - process.started)
            expected = f"rank {1 - rank} ({addresses[1 - rank]}) did not connect in time"
            assert expected in process.last_line
    note = f"--phase-timeout 5: named, ended {max(seconds):.0f} s after the start at most"
    record_fault("R16", 3, 0, note)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_dies_before_the_strategy_is_noticed(
    victim: int, made: tuple[str, Path], tmp_path: Path, record_fault: Record
) -> None:
    limits = {"phase-timeout": "15", "storage-timeout": "5"}
    options = arguments(made[0], str(tmp_path), "early", **limits)
    set_trap(tmp_path / "trace", victim, "meet")
    with running_processes(tmp_path / "trace", options) as members:
        members[1 - victim].wait_for(lambda: not traps_left(tmp_path / "trace"))
        begin = time.monotonic()
        code, seconds = members[1 - victim].end(200), time.monotonic() - begin
        last = members[1 - victim].last_line
    note = f"rank {victim} died before the strategy: the other ended with {code}, {seconds:.0f} s"
    record_fault("R16", 1, int(seconds > 60), note)
    assert code == 1, last
    assert seconds < 60


def test_divergence_is_not_tried_again(
    ray_cluster: RayCluster, case: Case, record_fault: Record
) -> None:
    wild = {"optimizer.learning-rate": "1e30", "optimizer.clipvalue": "0"}
    for num_starts in (2, 2):
        with launched(case.folder, ray_cluster.address, case.options(**wild)) as driver:
            assert driver.end() == 7, driver.errors
        assert case.num_events("start") == num_starts
    record_fault("R24", 2, 0, "loss not finite: exit 7, no restart, also not by the next command")


def test_a_worker_that_exits_with_137_is_tried_again(
    ray_cluster: RayCluster, case: Case, made: tuple[str, Path], record_fault: Record
) -> None:
    set_trap(case.folder, 1, "step", 20, 137)
    with launched(case.folder, ray_cluster.address, case.options()) as driver:
        assert driver.end() == 0, driver.errors
        assert driver.errors.count("restarting the workers") == 1
    assert_same_run(case.run, made[1])
    record_fault("R24", 1, 0, "worker ended with 137: restarted, identical")


def test_a_preempted_node_is_left_in_time(
    case: Case, made: tuple[str, Path], record_fault: Record
) -> None:
    with (
        started_cluster() as cluster,
        # A preemption is not a failure.
        launched(case.folder, cluster.address, case.options(), max_failures=0) as driver,
    ):
        driver.wait_for(lambda: case.step() >= 20)
        begin = time.time()
        drain = [sys.executable, "-c", _DRAIN, cluster.address]
        subprocess.run(drain, check=True, capture_output=True, timeout=60)
        drained = time.time()
        driver.wait_for(lambda: "restarting" in driver.errors)
        seconds, stopped_at = time.time() - drained, case.step()
        assert commits_of(case.run)[-1] == stopped_at
        cluster.add_node("third")
        assert driver.end() == 0, driver.errors
    assert_same_run(case.run, made[1])
    assert redone_steps(case.folder) == [0]
    pause = pause_of(events_of(case.folder), begin)
    note = (
        f"a node preempted: saved and stopped after {seconds:.1f} s, again on another node, "
        f"{pause:.0f} s in all, no failure counted, no step redone"
    )
    record_fault("R11", 1, 0, note)
