"""`flexunet launch prep` writes the dataset of `flexunet prep`, also after killed workers."""

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from data_prep.config import PrepConfig
from data_prep.phantoms.inbreast_release import write_release
from data_prep.pipeline import prepare
from data_prep.prep_input import sources_of
from data_prep.sources.pairs import find_sources
from flexunet.storage import open_store
from tests.job.discs import write_discs
from tests.launcher.conftest import (
    PROJECT,
    Launch,
    RayCluster,
    ray_processes,
    started_cluster,
)

# The bytes of figures are compared with those that other processes draw.
pytestmark = [pytest.mark.cluster, pytest.mark.draws]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder of 40 pairs, which give 10 tasks."""
    folder = tmp_path_factory.mktemp("input") / "source"
    write_discs(folder, num_images=40, side=64)
    return folder


def prepared(source: Path, output: Path, **options: Any) -> dict[str, bytes]:
    """Returns the objects of the dataset that one process of this machine writes."""
    config = PrepConfig(**{"image_size": 64, "num_processes": 1} | options)
    prepare(find_sources(str(source)), str(output), config, progress=False)
    return objects(str(output))


def objects(url: str) -> dict[str, bytes]:
    store = open_store(url)
    return {stat.name: store.get(stat.name) for stat in store.list()}


def launch(*arguments: Any) -> list[str]:
    return ["launch", "prep", *map(str, arguments), "--image-size=64"]


def test_a_cluster_writes_the_bytes_of_one_process(
    flexunet: Launch, ray_cluster: RayCluster, source: Path, tmp_path: Path
) -> None:
    arguments = launch(source, tmp_path / "cluster", "--address", ray_cluster.address)
    done = flexunet(*arguments)
    assert done.returncode == 0, done.stderr
    assert "│ train │      32 │" in done.stdout
    assert "encoding: 40/40 images" in done.stderr
    assert "ray" not in done.stdout + done.stderr
    assert objects(str(tmp_path / "cluster")) == prepared(source, tmp_path / "local")
    again = flexunet(*arguments)
    assert (again.returncode, "finished already" in again.stderr) == (0, True)


def test_a_cluster_prepares_the_inbreast_release_in_tiles(
    flexunet: Launch, ray_cluster: RayCluster, tmp_path: Path
) -> None:
    release = tmp_path / "release"
    write_release(str(release), 6, 96, 1)
    options = ["--format=inbreast", "--tile=32", "--tile-overlap=8", "--crop=breast", "--flip=left"]
    address = ["--address", ray_cluster.address]
    arguments = ["launch", "prep", str(release), str(tmp_path / "cluster"), *options, *address]
    done = flexunet(*arguments)
    assert done.returncode == 0, done.stderr
    assert "encoding: 22/22 images" in done.stderr  # of 6 patients
    assert "published" in done.stdout
    values = {"format": "inbreast", "tile": 32, "tile_overlap": 8, "num_processes": 1}
    config = PrepConfig.model_validate({**values, "crop": "breast", "flip": "left"})
    sources = sources_of(str(release), config)
    manifest = prepare(sources, str(tmp_path / "local"), config, progress=False)
    assert manifest.num_samples > 22 * 4
    assert objects(str(tmp_path / "cluster")) == objects(str(tmp_path / "local"))


def test_a_ray_of_this_machine_writes_the_bytes_of_one_process(
    flexunet: Launch, source: Path, tmp_path: Path
) -> None:
    # The key for hashed names is used where the command runs, and not sent to workers.
    key = {"FLEXUNET_HASH_KEY": "a secret"}
    config = tmp_path / "prep.yaml"
    config.write_text("hash_names: true\nshard_size: 0.05\n")
    output = tmp_path / "elsewhere" / "ours"
    done = flexunet(*launch(source, "ours", "--config", config), RAY_ADDRESS="", **key)
    assert done.returncode == 0, done.stderr
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(*key.popitem())
        local = prepared(source, tmp_path / "local", hash_names=True, shard_size=0.05)
    assert len([name for name in local if name.endswith(".tfrecord")]) > 3
    assert objects(str(output)) == local


def test_a_cluster_reads_from_and_writes_to_a_bucket(
    flexunet: Launch, ray_cluster: RayCluster, source: Path, tmp_path: Path, bucket_url: str
) -> None:
    store = open_store(f"{bucket_url}/source")
    for name, data in objects(str(source)).items():
        store.put(name, data)
    output = f"{bucket_url}/dataset"
    done = flexunet(*launch(f"{bucket_url}/source", output, "--address", ray_cluster.address))
    assert done.returncode == 0, done.stderr
    assert objects(output) == prepared(source, tmp_path / "local")


def test_killed_workers_change_nothing(
    ray_cluster: RayCluster, source: Path, tmp_path: Path
) -> None:
    write_discs(tmp_path / "source", num_images=240, side=200)
    arguments = launch(tmp_path / "source", tmp_path / "out", "--address", ray_cluster.address)
    with start(arguments) as command:
        for _ in range(2):
            # A busy worker. It may end before the signal arrives; then another one runs.
            wait_for_process(ray_cluster, command).kill()
            time.sleep(0.5)
        _, error = command.communicate(timeout=120)
    assert command.returncode == 0, error
    assert "ray" not in error
    assert objects(str(tmp_path / "out")) == prepared(tmp_path / "source", tmp_path / "local")


def start(arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "launcher.cli", *arguments],
        cwd=PROJECT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_process(cluster: RayCluster, command: subprocess.Popen[str]) -> Any:
    deadline = time.monotonic() + 60
    while not (found := ray_processes(cluster.folder, "scan_chunks")):
        assert command.poll() is None, "ended before a worker was seen"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found[0]


def test_sigterm_ends_with_one_line_and_the_same_command_continues(
    ray_cluster: RayCluster, flexunet: Launch, tmp_path: Path
) -> None:
    write_discs(tmp_path / "source", num_images=240, side=200)
    arguments = launch(tmp_path / "source", tmp_path / "out", "--address", ray_cluster.address)
    with start(arguments) as command:
        wait_for_process(ray_cluster, command)
        command.send_signal(signal.SIGTERM)
        _, error = command.communicate(timeout=60)
    assert command.returncode == 6
    assert error.splitlines()[-1] == "flexunet: interrupted; the same command continues"
    assert "Traceback" not in error
    assert not (tmp_path / "out" / "dataset.json").exists()
    done = flexunet(*arguments)
    assert done.returncode == 0, done.stderr
    assert objects(str(tmp_path / "out")) == prepared(tmp_path / "source", tmp_path / "local")


def test_a_bad_file_ends_with_the_line_of_prep(
    ray_cluster: RayCluster, flexunet: Launch, tmp_path: Path
) -> None:
    write_discs(tmp_path / "source", num_images=20)
    (tmp_path / "source" / "images" / "disc-07.png").write_bytes(b"no image")
    address = ray_cluster.address
    done = flexunet(*launch(tmp_path / "source", tmp_path / "out", "--address", address))
    local = flexunet("prep", tmp_path / "source", tmp_path / "out2", "--num-processes=1")
    assert (done.returncode, local.returncode) == (3, 3)
    assert done.stderr.splitlines()[-1] == local.stderr.splitlines()[-1]
    assert "disc-07.png" in done.stderr
    assert not (tmp_path / "out" / "dataset.json").exists()


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--address=ray://head:10001"], 2, "ray:// addresses are not supported"),
        (["--address=127.0.0.1:1"], 1, "no Ray cluster answers at"),
        (["--memory-per-worker=100000"], 2, "the cluster fits 0"),
        (["--num-processes=2"], 2, "no option '--num-processes'"),
    ],
)
def test_mistakes_are_one_line(
    ray_cluster: RayCluster,
    flexunet: Launch,
    source: Path,
    tmp_path: Path,
    options: list[str],
    code: int,
    message: str,
) -> None:
    environment = {"RAY_ADDRESS": ray_cluster.address}
    done = flexunet(*launch(source, tmp_path / "out"), *options, **environment)
    assert done.returncode == code
    expected = ("no --group option", "joining Ray at ", f"{source}: images in ")
    lines = [line for line in done.stderr.splitlines() if not line.startswith(expected)]
    assert len(lines) == 1
    assert message in lines[0]


def test_a_missing_source_is_reported_before_a_cluster_is_sought(
    flexunet: Launch, tmp_path: Path
) -> None:
    done = flexunet(*launch(tmp_path / "missing", tmp_path / "out", "--address=127.0.0.1:1"))
    assert done.returncode == 2
    assert f"{tmp_path}/missing" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_cluster_that_is_scaled_to_zero_is_waited_for_where_that_is_asked(
    flexunet: Launch, source: Path, tmp_path: Path
) -> None:
    with started_cluster({"head": 0}) as cluster:
        arguments = launch(source, tmp_path / "cluster", "--address", cluster.address)
        done = flexunet(*arguments)
        assert done.returncode == 2
        assert "add nodes, or give --wait-for-nodes" in done.stderr
        done = flexunet(*arguments, "--wait-for-nodes", "--join-timeout", "1")
        assert done.returncode == 1
        assert "did not fit 1 worker with 1 CPU, 0 GPUs each within 1 s" in done.stderr
        infer = ["launch", "infer", *[str(tmp_path)] * 3, "--address", cluster.address]
        options = flexunet(*infer, "--wait-for-nodes", "--join-timeout", "0")
        assert "--join-timeout=0.0: input should be greater than 0" in options.stderr
        with subprocess.Popen(
            [sys.executable, "-m", "launcher.cli", *arguments, "--wait-for-nodes"],
            cwd=PROJECT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        ) as driver:
            assert driver.stderr is not None
            line = next(line for line in driver.stderr if "does not fit" in line)
            assert "has 0 CPUs" in line
            cluster.add_node("second")
            rest = driver.stderr.read()
        assert driver.returncode == 0, rest
    assert objects(str(tmp_path / "cluster")) == prepared(source, tmp_path / "local")
