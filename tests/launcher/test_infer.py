"""`flexunet launch infer` writes the masks of `flexunet infer`, also after killed processes."""

import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from flexunet.storage import open_store
from tests import commands
from tests.launcher.conftest import Launch, RayCluster, ray_processes

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder of 41 images of several sizes; one of them cannot be read."""
    folder = tmp_path_factory.mktemp("input") / "images"
    folder.mkdir()
    random = np.random.default_rng(1)
    for index in range(40):
        pixels = random.integers(0, 255, (30 + index, 60)).astype(np.uint8)
        assert cv2.imwrite(
            str(folder / f"case-{index:02d}.png"), cv2.GaussianBlur(pixels, (9, 9), 3)
        )
    (folder / "case-17-broken.png").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def expected(
    trained_run: Path, images: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    """Returns the objects that `flexunet infer` writes."""
    output = tmp_path_factory.mktemp("alone") / "masks"
    done = commands.run("job.infer", str(trained_run), str(images), str(output))
    assert done.returncode == 3, done.stderr  # because of the broken image
    return objects(str(output))


def objects(url: str) -> dict[str, bytes]:
    store = open_store(url)
    names = [stat.name for stat in store.list()]
    # The records contain the path of the images.
    return {name: store.get(name) for name in names if not name.startswith("inference")}


def launch(*arguments: Any) -> list[str]:
    return ["launch", "infer", *map(str, arguments), "--batch-size=4"]


def test_a_cluster_writes_the_masks_of_one_process(
    flexunet: Launch,
    ray_cluster: RayCluster,
    trained_run: Path,
    images: Path,
    expected: dict[str, bytes],
    tmp_path: Path,
) -> None:
    output = tmp_path / "masks"
    arguments = launch(trained_run, images, output, "--address", ray_cluster.address)
    done = flexunet(*arguments)
    assert done.returncode == 3, done.stderr
    assert f"masks: {output} (40 written)" in done.stdout
    assert "case-17-broken.png" in done.stderr.splitlines()[-1]
    assert "infer: 41/41 images" in done.stderr
    assert "ray" not in done.stdout + done.stderr
    assert objects(str(output)) == expected
    assert len(expected) == 81  # 40 masks with their overlays, and the list of the broken image
    (images / "case-17-broken.png").rename(tmp_path / "broken.png")
    try:
        again = flexunet(*arguments)
    finally:
        (tmp_path / "broken.png").rename(images / "case-17-broken.png")
    assert again.returncode == 0, again.stderr
    assert "(0 written, 40 kept" in again.stdout


def test_killed_processes_change_nothing(
    ray_cluster: RayCluster,
    trained_run: Path,
    images: Path,
    expected: dict[str, bytes],
    tmp_path: Path,
) -> None:
    arguments = launch(trained_run, images, tmp_path / "masks", "--address", ray_cluster.address)
    with commands.start("launcher.cli", *arguments) as command:
        wait_for_mask(tmp_path / "masks", command)
        found = ray_processes(ray_cluster.folder, "_Process")
        for process in found:
            process.kill()
        _, error = command.communicate(timeout=120)
    assert len(found) == 2
    assert command.returncode == 3, error
    assert "ray" not in error
    assert objects(str(tmp_path / "masks")) == expected


def wait_for_mask(folder: Path, command: commands.Process) -> None:
    deadline = time.monotonic() + 90
    while not list(folder.glob("case-*.png")):
        assert command.poll() is None, command.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_cluster_infers_from_a_bucket(
    flexunet: Launch,
    ray_cluster: RayCluster,
    trained_run: Path,
    images: Path,
    expected: dict[str, bytes],
    bucket_url: str,
) -> None:
    store = open_store(bucket_url)
    for folder in (trained_run, images):
        local = open_store(str(folder))
        for stat in local.list():
            store.put(f"{folder.name}/{stat.name}", local.get(stat.name))
    run = f"{bucket_url}/{trained_run.name}"
    place = f"--address={ray_cluster.address}"
    done = flexunet(*launch(run, f"{bucket_url}/{images.name}", place, "--num-workers=1"))
    assert done.returncode == 3, done.stderr
    assert objects(f"{run}/inference") == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpus-per-worker=1"], "worker with 1 CPU, 1 GPU each requested, but the cluster fits"),
        (["--num-workers=3"], "but the cluster fits 2: "),
        (["--gpus-per-worker=2"], "--gpus-per-worker=2"),
    ],
)
def test_what_the_cluster_lacks_is_refused_at_once(
    flexunet: Launch,
    ray_cluster: RayCluster,
    trained_run: Path,
    images: Path,
    tmp_path: Path,
    options: list[str],
    message: str,
) -> None:
    arguments = launch(trained_run, images, tmp_path / "out")
    done = flexunet(*arguments, *options, RAY_ADDRESS=ray_cluster.address)
    assert done.returncode == 2
    *joined, line = done.stderr.splitlines()
    assert joined in ([], [f"joining Ray at {ray_cluster.address}"])
    assert message in line


def test_a_promised_gpu_that_tensorflow_does_not_see_is_refused(
    flexunet: Launch, ray_cluster: RayCluster, trained_run: Path, images: Path, tmp_path: Path
) -> None:
    ray_cluster.add_node("third", num_gpus=1)
    try:
        arguments = launch(trained_run, images, tmp_path / "out", "--gpus-per-worker=0.5")
        done = flexunet(*arguments, RAY_ADDRESS=ray_cluster.address)
    finally:
        ray_cluster.remove_node("third")
    assert done.returncode == 2
    assert "TensorFlow finds none on" in done.stderr.splitlines()[-1]
