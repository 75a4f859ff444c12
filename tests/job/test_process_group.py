"""Processes that train together: one computation, one end."""

import csv
import json
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from flexunet.errors import UsageError
from flexunet.storage import open_store
from job.distributed.rendezvous import ProcessSpec, process_spec_from_environment, rendezvous
from job.runs.checkpoints import find_checkpoints
from tests import commands
from tests.conftest import FaultyBucket
from tests.faults.proxy import Fault
from tests.job.discs import prepare_discs
from tests.job.processes import (
    finish,
    free_addresses,
    run_alone,
    start_cluster,
    start_rank,
    training,
    wait_until,
    weights_of,
)

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    # 13 train, 5 valid, 4 test: no batch of 4 comes out even, and the last one of an epoch holds
    # samples for one process only.
    return prepare_discs(tmp_path_factory.mktemp("discs"), num_images=22)


def options(dataset: str, output: Path, name: str, **changes: str) -> list[str]:
    values = {
        "data": dataset,
        "output": str(output),
        "name": name,
        "epochs": "3",
        "global-batch-size": "4",
        "precision": "float64",
        "prediction-images": "1",
        "preset": "reference",
        "model.num-layers": "4",
        "model.base-filters": "4",
        "model.base-kernels": "3,3",
        "model.dropout-rate": "0.1",
        "augmentation.deformation-probability": "0.5",
        "augmentation.preset": "strong",
        "foreground-share": "0.9",
        "foreground-share-end": "0.1",
        "optimizer.ema-momentum": "0.5",
        "time-budget": "1000",  # the clock of the first process travels with the steps
    } | changes
    flags = ["--no-tensorboard", "--augmentation.enabled"]
    return [*flags, *(part for key, value in values.items() for part in (f"--{key}", value))]


def history_of(run: Path) -> list[dict[str, str]]:
    with (run / "metrics" / "history.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def assert_same_numbers(first: Path, second: Path) -> None:
    assert len(history_of(first)) == 3
    for a, b in zip(history_of(first), history_of(second), strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert float(a[name]) == pytest.approx(float(b[name]), rel=1e-9), name
    ours, theirs = (files_of(run / "evaluation") for run in (first, second))
    assert ours == theirs
    assert len(ours) >= 5 + 4 * 2  # tables, and two images of each of 4 cases


def files_of(evaluation: Path) -> dict[str, bytes]:
    """Returns the tables and images; the loss in summary.json is a sum of parts of each process."""
    return {
        str(path.relative_to(evaluation)): path.read_bytes()
        for path in evaluation.rglob("*.*")
        if path.suffix in (".csv", ".png")
    }


def newest_step(run: Path) -> int:
    return max(spec.step for spec in find_checkpoints(open_store(str(run))))


@pytest.fixture(scope="module")
def control(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the run of one process that is never stopped."""
    output = tmp_path_factory.mktemp("control")
    run_alone(options(dataset, output, "alone"))
    return output / "alone"


def test_two_processes_compute_what_one_does(dataset: str, control: Path, tmp_path: Path) -> None:
    # At this rate the gradients of deep layers are computed from gathered inputs.
    changes = {"exchange-flops-per-byte": "1e12"}
    processes = start_cluster(2, options(dataset, tmp_path, "two", **changes))
    errors = finish(processes)
    assert re.search(r"exchange: [1-9]\d* of 18 layers", errors[0]), errors[0]
    assert re.search(r"per step: [\d.]+ m?s to .* GFLOP/s .* all_reduce [\d.]+ m?s", errors[0])
    assert [process.returncode for process in processes] == [0, 0], errors
    assert_same_numbers(control, tmp_path / "two")
    # Nobody but the first wrote: one of everything.
    assert json.loads((tmp_path / "two" / "environment.json").read_text())["replicas"] == 2


def test_two_then_one_then_two_processes_continue_one_run(
    dataset: str, control: Path, tmp_path: Path
) -> None:
    run = tmp_path / "changing"
    arguments = options(dataset, tmp_path, "changing")
    # The second process is asked to stop: both end after the same step, and the first commits.
    processes = start_cluster(2, arguments, stop_after=3)
    errors = finish(processes)
    assert [process.returncode for process in processes] == [6, 6], errors
    stopped = newest_step(run)
    assert stopped in (3, 4)  # short steps carry the request, which ends training one step later
    words = f"stopped and saved at epoch 1, step {stopped}; the same"
    assert all(words in error for error in errors), errors
    run_alone(arguments, stop_after=4)
    assert newest_step(run) == stopped + 4  # alone nothing has to be exchanged
    # With auto, a run goes on in the precision in which it began.
    processes = start_cluster(2, options(dataset, tmp_path, "changing", precision="auto"))
    errors = finish(processes)
    assert [process.returncode for process in processes] == [0, 0], errors
    assert_same_numbers(control, run)
    expected, found = weights_of(control), weights_of(run)
    for name, values in expected.items():
        assert np.allclose(values, found[name], rtol=0, atol=1e-9), name


# Rank 1 works for 4 s, with a sign of life every 0.4 s; prints how many signs came here.
_SLOW = """
import sys, time
from job.distributed.runtime import import_tensorflow
from job.distributed.strategy import configure
from job.config import TrainConfig
from job.distributed.process_group import ProcessGroup
from job.distributed.rendezvous import rendezvous, process_spec_from_environment
spec = process_spec_from_environment()
config = TrainConfig(data="data", output="runs", name="slow")
rendezvous(spec, config.phase_timeout)
process_group = ProcessGroup(configure(config, spec), spec)
signs = []
def work(heartbeat):
    for _ in range(10 * spec.rank):
        time.sleep(0.4)
        heartbeat()
process_group.all_gather_with_heartbeat(work, lambda: signs.append(1))
sys.exit(f"{len(signs)} signs")
"""
# Says for equal and then for different weights whether they are the same.
_CHECK = """
import json, os, sys
from job.distributed.runtime import import_tensorflow
from job.distributed.strategy import configure
from job.config import TrainConfig
from job.distributed.process_group import ProcessGroup
from job.distributed.rendezvous import rendezvous, process_spec_from_environment
from flexunet.errors import FlexUNetError
spec = process_spec_from_environment()
config = TrainConfig(data="data", output="runs", name="check")
rendezvous(spec, config.phase_timeout)
tf = import_tensorflow()
strategy = configure(config, spec)
process_group = ProcessGroup(strategy, spec)
with strategy.scope():
    weights = [tf.Variable([1.0, -0.0]), tf.Variable([2.0])]
process_group.check_same(weights)
for variable in strategy.experimental_local_results(weights[0]):
    variable.assign([1.0, 0.0 if spec.rank else -0.0])
try:
    process_group.check_same(weights)
except FlexUNetError as error:
    sys.exit(str(error))
"""

# Says whether XLA is used, where it compiles nothing on rank 1: no backend of it has strings.
_XLA = """
import sys
from job.distributed.runtime import import_tensorflow
from job.distributed.strategy import configure
from job.config import TrainConfig
from job.distributed.process_group import ProcessGroup
from job.distributed.rendezvous import rendezvous, process_spec_from_environment
from flexunet.errors import UsageError
spec = process_spec_from_environment()
config = TrainConfig(data="data", output="runs", name="xla", xla="on")
rendezvous(spec, config.phase_timeout)
tf = import_tensorflow()
process_group = ProcessGroup(configure(config, spec), spec)
from job.distributed.xla import uses_xla
if spec.rank:
    tf.nn.softplus = tf.strings.as_string
try:
    uses_xla(config, process_group)
except UsageError as error:
    sys.exit(str(error))
"""


def run_two(script: str) -> list[str]:
    """Runs `script` as both processes of a cluster; returns what each wrote to stderr."""
    processes = start_cluster(2, [], code=script)
    errors = finish(processes)
    assert [process.returncode for process in processes] == [1, 1], errors
    return errors


def test_weights_that_differ_in_one_bit_end_all_processes() -> None:
    errors = run_two(_CHECK)
    assert all("the weights of rank 1 differ from those of rank 0" in error for error in errors)


def test_who_waits_for_slow_work_of_another_hears_that_it_goes_on() -> None:
    for error in run_two(_SLOW):
        signs = re.search(r"(\d+) signs", error)
        assert signs and int(signs[1]) >= 2, error


DRAWING = """
import sys

from job import train
from job.reporting import plots

def telling(name):
    draw = getattr(plots, name)

    def drawn(*arguments):
        print("drawn by", name, file=sys.stderr)
        return draw(*arguments)

    setattr(plots, name, drawn)

for name in ("panel_png", "overlay_png", "mask_png"):
    telling(name)
raise SystemExit(train.main(sys.argv[1:]))
"""


def test_only_the_process_that_stores_images_draws_them(dataset: str, tmp_path: Path) -> None:
    arguments = ["--no-progress", "--threads", "1"]
    arguments += options(dataset, tmp_path, "drawn", epochs="1", precision="float32")
    processes = start_cluster(2, arguments, code=DRAWING)
    errors = finish(processes)
    assert [process.returncode for process in processes] == [0, 0], errors
    assert len(list((tmp_path / "drawn" / "evaluation" / "examples").iterdir())) == 4
    counts = [[text.count(f"drawn by {name}") for name in ("panel_png", "overlay_png", "mask_png")]
              for text in errors]  # fmt: skip
    assert counts == [[4, 4, 1], [0, 0, 0]]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_never_arrives_is_named(dataset: str, tmp_path: Path, rank: int) -> None:
    addresses = free_addresses(2)
    arguments = options(dataset, tmp_path, "lonely", **{"phase-timeout": "3"})
    process = start_rank(rank, addresses, arguments)
    (errors,) = finish([process], timeout=60)
    assert process.returncode == 1
    last = errors.strip().splitlines()[-1]
    assert f"rank {1 - rank} ({addresses[1 - rank]}) did not connect in time" in last


def connected(address: str) -> socket.socket:
    """Returns a connection to a process that is about to listen there."""
    host, port = address.split(":")
    deadline = time.monotonic() + 60
    while True:
        try:
            return socket.create_connection((host, int(port)))
        except ConnectionRefusedError:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_those_who_meet_wait_for_the_last_and_heed_no_stranger() -> None:
    addresses = tuple(free_addresses(3))
    order: list[str] = []

    def come(rank: int) -> None:
        order.append("came")
        rendezvous(ProcessSpec(rank, addresses), 60)
        order.append("met")

    threads = [threading.Thread(target=come, args=(i,)) for i in (0, 2, 1)]
    for thread in threads[:2]:
        thread.start()
    with connected(addresses[0]) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\nHost: nobody\r\nUser-Agent: stranger\r\n\r\n")
        time.sleep(1)
        threads[2].start()
        for thread in threads:
            thread.join(60)
    assert order == ["came"] * 3 + ["met"] * 3


def test_another_number_of_gpus_is_reported_to_all() -> None:
    addresses = tuple(free_addresses(3))

    def come(rank: int) -> str:
        with pytest.raises(UsageError) as caught:
            rendezvous(ProcessSpec(rank, addresses), 20, num_gpus=4 if rank == 1 else 8)
        return str(caught.value)

    with ThreadPoolExecutor(3) as threads:
        reported = list(threads.map(come, range(3)))
    assert set(reported) == {
        f"rank 1 ({addresses[1]}) sees 4 GPUs and rank 0 sees 8; give all processes equally many "
        "(CUDA_VISIBLE_DEVICES)"
    }


def test_when_one_process_is_killed_the_other_ends_with_a_line(
    dataset: str, tmp_path: Path
) -> None:
    changes = {"gradient-dtype": "bfloat16", "gradient-exchange": "all_reduce", "epochs": "200"}
    processes = start_cluster(2, options(dataset, tmp_path, "killed", **changes))
    store = open_store(str(tmp_path / "killed"))
    wait_until(lambda: len(find_checkpoints(store)) > 0, processes)
    processes[1].kill()
    errors = finish(processes)
    assert processes[0].returncode == 1
    last = errors[0].strip().splitlines()[-1]
    # Which of the two is quicker: the collective, or the look for the peer.
    assert re.search(r"another process ended or cannot|cannot connect to rank 1 \(.*\)", last)
    assert "the same command resumes" in last


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        ({"seed": "5"}, 2, "was started with other settings: --seed was 1234, now 5"),
        (
            {"global-batch-size": "4", "accumulate": "4"},
            2,
            "--accumulate=4 does not divide ",
        ),
        ({"global-batch-size": "3"}, 2, "--global-batch-size=3 is not divisible by the 2 replicas"),
    ],
)
def test_a_mistake_ends_all_processes_with_its_line(
    dataset: str, control: Path, changes: dict[str, str], code: int, message: str
) -> None:
    arguments = options(dataset, control.parent, "alone", **changes)
    processes = start_cluster(2, arguments)
    errors = finish(processes)
    assert [process.returncode for process in processes] == [code, code], errors
    for error in errors:
        assert message in error.strip().splitlines()[-1]


def test_another_dataset_is_named(dataset: str, control: Path, tmp_path: Path) -> None:
    other = prepare_discs(tmp_path, num_images=8)
    done = commands.run(*training(["--local", *options(other, control.parent, "alone")]))
    assert done.returncode == 2, done.stderr
    assert f"--data {other} is not the dataset of run" in done.stderr
    assert f"({dataset}), or was prepared again since" in done.stderr


@pytest.mark.parametrize(
    ("option", "values"),
    [("seed", ("5", "6")), ("gradient-exchange", ("auto", "all_reduce"))],  # the last is free
)
def test_a_process_with_other_settings_is_named_by_all(
    dataset: str, tmp_path: Path, option: str, values: tuple[str, str]
) -> None:
    addresses = free_addresses(2)
    processes = [
        start_rank(rank, addresses, options(dataset, tmp_path, "mixed", **{option: values[rank]}))
        for rank in range(2)
    ]
    errors = finish(processes)
    assert [process.returncode for process in processes] == [2, 2], errors
    for error in errors:
        reported = f"rank 1 was started with other settings than rank 0: --{option} was "
        assert f"{reported}{values[0]}, now {values[1]}" in error.replace('"', "")
    assert not (tmp_path / "mixed" / "checkpoints").exists()


def test_a_stop_waits_for_slow_storage_longer_than_for_a_step(
    dataset: str, faulty_bucket: FaultyBucket
) -> None:
    limits = {"step-timeout": "3", "phase-timeout": "60", "epochs": "200"}
    arguments = options(dataset, Path(faulty_bucket.url), "slow", **limits)
    arguments[arguments.index("--output") + 1] = faulty_bucket.url
    # Every answer takes longer than a step may.
    faulty_bucket.proxy.add(Fault("stall", seconds=4.0, name="checkpoints/", count=3))
    run_alone(arguments, stop_after=3)
    assert [spec.step for spec in find_checkpoints(open_store(f"{faulty_bucket.url}/slow"))] == [3]


CLUSTER = {"worker": ["a:1", "b:2"]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "Invalid JSON"),
        (json.dumps({"cluster": CLUSTER}), "task Field required"),
        (json.dumps({"cluster": CLUSTER, "task": {"type": "worker", "index": 2}}), "index 2"),
        (json.dumps({"cluster": CLUSTER, "task": {"type": "chief", "index": 0}}), "'chief'"),
        (
            json.dumps({"cluster": CLUSTER | {"ps": ["c:3"]}, "task": {"index": 0}}),
            "only workers",
        ),
    ],
)
def test_a_cluster_that_makes_no_sense_is_refused(
    text: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TF_CONFIG", text)
    with pytest.raises(UsageError, match=message):
        process_spec_from_environment()


def test_a_chief_comes_before_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = {"chief": ["c:0"], **CLUSTER}
    ranks = []
    for task in ({"type": "chief", "index": 0}, {"type": "worker", "index": 1}):
        monkeypatch.setenv("TF_CONFIG", json.dumps({"cluster": cluster, "task": task}))
        spec = process_spec_from_environment()
        assert spec is not None
        assert spec.addresses == ("c:0", "a:1", "b:2")
        ranks.append(spec.rank)
    assert ranks == [0, 2]


def test_what_only_tensorflow_needs_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    more = {"environment": "cloud", "rpc_layer": "grpc"}
    task = {"cluster": CLUSTER, "task": {"type": "worker", "index": 1, "trial": "1"}, **more}
    monkeypatch.setenv("TF_CONFIG", json.dumps(task))
    spec = process_spec_from_environment()
    assert spec is not None and spec.rank == 1


def test_no_cluster_is_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TF_CONFIG", raising=False)
    assert process_spec_from_environment() is None


def test_xla_is_used_by_all_or_none() -> None:
    for error in run_two(_XLA):
        assert "--xla=on: XLA does not work on this machine" in error
