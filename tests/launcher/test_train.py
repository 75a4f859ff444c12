"""`flexunet launch train` on a Ray cluster of two nodes, with data and run in a bucket."""

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flexunet.storage import ObjectStore, join_url, open_store
from job.runs.checkpoints import find_checkpoints
from job.runs.lease import LeaseTiming
from job.runs.run import Run
from tests import commands
from tests.job.discs import prepare_discs, write_discs
from tests.job.processes import finish, start_cluster, weights_of
from tests.launcher.conftest import RayCluster, ray_processes

pytestmark = pytest.mark.cluster

PROJECT = Path(__file__).resolve().parents[2]
OPTIONS = {
    "epochs": "6",
    "global-batch-size": "2",
    "precision": "float32",
    "prediction-images": "1",
    "threads": "1",
    "preset": "reference",
    "model.num-layers": "3",
    "model.base-filters": "4",
    "model.base-kernels": "3,3",
    "model.dropout-rate": "0.1",
}
TABLES = ("history.csv", "train_losses.csv", "train_metrics.csv")


def options(data: str, output: str, name: str, **changes: str) -> list[str]:
    values = OPTIONS | {"data": data, "output": output, "name": name} | changes
    flags = ["--deterministic", "--no-tensorboard"]
    return [*flags, *(part for key, value in values.items() for part in (f"--{key}", value))]


class Driver:
    """A running `flexunet launch train`."""

    def __init__(self, cluster: RayCluster, arguments: list[str], *, num_workers: int = 2) -> None:
        where = ["--address", cluster.address, "--num-workers", str(num_workers)]
        self.process = commands.start("launcher", "train", *where, *arguments)

    def wait_for(self, predicate: Callable[[], Any], timeout: float = 300) -> Any:
        """Waits until `predicate` returns a true value, and returns it."""
        deadline = time.monotonic() + timeout
        while not (found := predicate()):
            if self.process.poll() is not None:
                raise AssertionError(f"the driver has ended: {self.process.communicate()[1]}")
            assert time.monotonic() < deadline, "it did not happen"
            time.sleep(0.02)
        return found

    def end(self, timeout: float = 600) -> tuple[int, str]:
        """Returns exit code and stderr."""
        errors = self.process.communicate(timeout=timeout)[1]
        return self.process.returncode, errors


def prepare(output: str, folder: Path) -> str:
    """Returns the URL of a dataset in a bucket."""
    from data_prep.config import PrepConfig
    from data_prep.pipeline import prepare as run
    from data_prep.sources.pairs import find_sources

    write_discs(folder / "source", num_images=20)
    config = PrepConfig(image_size=32, fractions=(0.6, 0.2, 0.2), num_processes=1)
    run(find_sources(str(folder / "source")), join_url(output, "dataset"), config, progress=False)
    return join_url(output, "dataset")


def texts_of(run: ObjectStore) -> dict[str, bytes]:
    """Returns the tables of a run that contain no times."""
    names = [f"metrics/{name}" for name in TABLES]
    return {name: run.get(name) for name in [*names, "evaluation/per_case.csv"]}


def test_a_killed_worker_changes_nothing(
    ray_cluster: RayCluster, bucket_url: str, tmp_path: Path
) -> None:
    data = prepare(bucket_url, tmp_path)
    # The same two processes without Ray, never stopped.
    control = start_cluster(2, options(data, str(tmp_path), "control"))
    assert [finish([each]) and each.returncode for each in control] == [0, 0]

    runs = join_url(bucket_url, "runs")
    store = open_store(join_url(runs, "killed"))
    driver = Driver(ray_cluster, options(data, runs, "killed"))
    driver.wait_for(lambda: find_checkpoints(store))
    victims = driver.wait_for(lambda: ray_processes(ray_cluster.folder, "RayTrainWorker"))
    victims[-1].kill()
    code, errors = driver.end()
    assert code == 0, errors
    assert "restarting the workers" in errors
    assert "evaluate test, rank 0 of 2: " in errors  # the progress of a worker
    assert "resuming from checkpoints/step-" in errors

    expected, found = weights_of(tmp_path / "control"), weights_of(store.url)
    assert all(np.array_equal(values, found[name]) for name, values in expected.items())
    assert texts_of(store) == texts_of(open_store(str(tmp_path / "control")))
    names = {stat.name for stat in store.list()}
    assert {"outcome.json", "config.yaml", "evaluation/summary.json"} <= names
    assert any(name.startswith("epoch_change_infer/Epoch_6_") for name in names)
    assert max(find_checkpoints(store)).step == 6 * 6  # epochs and steps of each
    rows = list(csv.DictReader(io.StringIO(store.get("metrics/history.csv").decode())))
    assert [row["epoch"] for row in rows] == [str(number) for number in range(6)]


def test_a_stopped_run_goes_on_with_another_number_of_workers(
    ray_cluster: RayCluster, bucket_url: str, tmp_path: Path
) -> None:
    data, runs = prepare(bucket_url, tmp_path), join_url(bucket_url, "runs")
    arguments = options(data, runs, "moving", **{"global-batch-size": "4"})
    store = open_store(join_url(runs, "moving"))
    driver = Driver(ray_cluster, arguments)
    driver.wait_for(lambda: find_checkpoints(store))
    driver.process.send_signal(signal.SIGTERM)
    code, errors = driver.end()
    assert code == 6, errors
    assert "the same command resumes" in errors.strip().splitlines()[-1]
    stopped_at = max(find_checkpoints(store)).step

    driver = Driver(ray_cluster, arguments, num_workers=1)
    code, errors = driver.end()
    assert code == 0, errors
    assert "starting 1 worker" in errors
    assert f"resuming from checkpoints/step-{stopped_at:08d}" in errors
    assert json.loads(store.get("environment.json"))["replicas"] == 1

    # The run is finished: the same command again starts no worker.
    code, errors = Driver(ray_cluster, arguments).end()
    assert code == 0
    assert "finished already after 6 epochs" in errors
    assert "starting" not in errors


def test_divergence_is_reported_at_once_and_not_tried_again(
    ray_cluster: RayCluster, tmp_path: Path
) -> None:
    data = prepare_discs(tmp_path)
    changes = {"optimizer.learning-rate": "1e30", "optimizer.clipvalue": "0"}
    arguments = options(data, str(tmp_path / "runs"), "wild", **changes)
    code, errors = Driver(ray_cluster, arguments).end()
    assert code == 7, errors
    assert "lower --optimizer.learning-rate" in errors.strip().splitlines()[-1]
    assert "restarting the workers" not in errors
    outcome = json.loads((tmp_path / "runs" / "wild" / "outcome.json").read_text())
    assert (outcome["status"], outcome["exit_code"]) == ("diverged", 7)
    code, errors = Driver(ray_cluster, arguments).end()
    assert code == 7
    assert "start a run of another name" in errors


def test_what_cannot_work_is_refused_before_a_worker_starts(
    ray_cluster: RayCluster, bucket_url: str, tmp_path: Path, flexunet: Any
) -> None:
    data = prepare_discs(tmp_path)
    where = ["launch", "train", "--address", ray_cluster.address]
    for arguments, message in (
        (["--num-workers", "3"], "--global-batch-size=2 is not divisible by the 3 replicas"),
        (["--data", "nowhere"], "no dataset at"),
        (["--num-workers", "0"], "--num-workers=0"),
        (["--model.num-layers", "7"], "needs image sides divisible by 64"),
    ):
        done = flexunet(*where, *options(data, str(tmp_path / "runs"), "no"), *arguments)
        assert done.returncode == 2, done.stderr
        assert message in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "runs").exists()
    timing = LeaseTiming(renew_s=0.5, expire_s=15)
    with Run.open(bucket_url, "taken", timing=timing):
        done = flexunet(*where, *options(data, bucket_url, "taken"), "--num-workers", "2")
    assert done.returncode == 4, done.stderr
    assert "the run is owned by" in done.stderr


@pytest.mark.parametrize(
    ("signals", "last_line"),
    [
        ([signal.SIGTERM], "stopped before all workers had started; the same command resumes"),
        ([signal.SIGINT, signal.SIGINT], "interrupted; the same command continues"),
    ],
)
def test_a_stop_while_ray_starts_is_reported(
    tmp_path: Path, signals: list[signal.Signals], last_line: str
) -> None:
    arguments = options(prepare_discs(tmp_path), str(tmp_path / "runs"), "new")
    with subprocess.Popen(
        [sys.executable, "-m", "launcher", "train", *arguments, "--num-workers", "2"],
        cwd=PROJECT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as driver:
        assert driver.stderr is not None
        awaited = ["starting Ray on this machine", "Ctrl-C received: the run stops and saves"]
        for number, line in zip(signals, awaited, strict=False):
            assert driver.stderr.readline().startswith(line)
            # Later, Ray would handle the signal itself.
            time.sleep(1)
            driver.send_signal(number)
        lines = driver.stderr.read().splitlines()
    assert driver.returncode == 6, lines
    assert lines[-1] == f"flexunet launch: {last_line}"
    assert not (tmp_path / "runs").exists() or not find_checkpoints(
        open_store(str(tmp_path / "runs" / "new"))
    )


def test_gpus_that_are_not_there_are_reported_at_once(tmp_path: Path, flexunet: Any) -> None:
    data = prepare_discs(tmp_path)
    begin = time.monotonic()
    arguments = options(data, str(tmp_path / "runs"), "gpu")
    environment = {name: os.environ[name] for name in ("PATH",)}
    done = flexunet("launch", "train", *arguments, "--gpus-per-worker", "1", **environment)
    assert done.returncode == 2, done.stderr
    assert "1 GPU each" in done.stderr and "0 GPUs" in done.stderr
    assert time.monotonic() - begin < 200  # not after --join-timeout
