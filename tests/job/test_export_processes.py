"""Exports are used by processes without this project, and agree with `infer` on whole images."""

import contextlib
import http.client
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

import flexunet
from job.exporting.formats.onnx_file import open_onnx_file
from job.inference.sliding_window import Windows, probabilities_of
from tests import commands
from tests.source_tree import ROOT

pytestmark = pytest.mark.cluster

CLASSES = "background=0,0,0;disc=255,0,0;square=0,255,0"
# Reads pixels (B, H, W, C), and writes what an export computes from them.
_PROGRAM = """
import importlib.util, sys
sys.path.append(sys.argv[1])
kind, path, images, found = sys.argv[2:]
import numpy as np
pixels = np.load(images)
if kind == "keras":
    import keras
    result = keras.saving.load_model(path, safe_mode=True)(pixels)
else:
    import onnxruntime
    names = ["probabilities", "class_ids"]
    result = dict(zip(names, onnxruntime.InferenceSession(path).run(names, {"image": pixels})))
assert not [name for name in ("flexunet", "job", "data_prep") if importlib.util.find_spec(name)]
np.savez(found, **{name: np.asarray(value) for name, value in result.items()})
"""


def write_source(folder: Path, *, side: int, bits: int, num_images: int = 12) -> None:
    """Writes images of a disc and a square, RGB with 8 bits or grey with 16, and their masks."""
    random = np.random.default_rng(3)
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    y, x = np.mgrid[:side, :side]
    for index in range(num_images):
        row, column = random.uniform(side * 0.3, side * 0.7, 2)
        disc = (y - row) ** 2 + (x - column) ** 2 <= (side / 5) ** 2
        square = (abs(y - side + row) < side / 8) & (abs(x - side + column) < side / 8) & ~disc
        image = random.integers(20, 90, (side, side, 3)) + 120 * disc[..., None]
        image[..., 0] += 100 * square
        mask = np.zeros((side, side, 3), np.uint8)
        mask[disc], mask[square] = (0, 0, 255), (0, 255, 0)  # OpenCV's order
        if bits == 16:
            mask = np.where(disc[..., None], 255, mask * 0).astype(np.uint8)
            image = (image[..., :1] * 16).astype(np.uint16)
        name = f"case-{index:02d}.png"
        assert cv2.imwrite(str(folder / "images" / name), image.astype(f"uint{min(bits, 16)}"))
        assert cv2.imwrite(str(folder / "masks" / name), mask)


def trained(folder: Path, prep: dict[str, Any], options: dict[str, Any]) -> Path:
    """Prepares `folder`/source, trains one epoch of a tiny network, and returns the run."""
    flexunet.prepare(folder / "source", folder / "dataset", progress=False, **prep)
    values = {
        "data": str(folder / "dataset"),
        "output": str(folder / "runs"),
        "name": "tiny",
        "preset": "reference",
        "epochs": 1,
        "prediction-images": 0,
        "model.num-layers": 3,
        "model.base-filters": 4,
        "model.base-kernels": "3,3",
        **options,
    }
    arguments = [str(part) for name, value in values.items() for part in (f"--{name}", value)]
    done = commands.run("job.train", "--local", "--no-tensorboard", *arguments)
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "tiny"


def computed(folder: Path, kind: str, path: Path, pixels: np.ndarray) -> tuple[Any, Any]:
    """Returns what a process without this project computes from `pixels`."""
    np.save(folder / "pixels.npy", pixels)
    # Isolated, and without the .pth files of an editable install.
    command = [sys.executable, "-I", "-S", "-c", _PROGRAM, sysconfig.get_path("purelib")]
    command += [kind, str(path), str(folder / "pixels.npy"), str(folder / "found.npz")]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with np.load(folder / "found.npz") as found:
        return found["probabilities"], found["class_ids"]


def infer(run: Path, images: Path, out: Path) -> None:
    options = ("--probabilities", "float32", "--batch-size", "2", "--no-overlays")
    done = commands.run("job.infer", str(run), str(images), str(out), *options)
    assert done.returncode == 0, done.stderr


def test_rgb_images_of_three_classes_and_an_ensemble(tmp_path: Path) -> None:
    write_source(tmp_path / "source", side=32, bits=8)
    run = trained(
        tmp_path,
        {"image_size": 32, "classes": CLASSES, "fractions": (0.6, 0.2, 0.2)},
        {
            "model.normalization": "batch",
            "precision": "mixed_bfloat16",
        },
    )
    result = flexunet.export(run, tmp_path / "export", format=["keras", "onnx"], ensemble=[run])
    check = result.metadata["check"]
    assert check["max_difference_to_trained_precision"] > 1e-5
    assert {each["num_other_ids"] for each in check["formats"].values()} == {0}
    names = sorted((tmp_path / "source" / "images").iterdir())[:3]
    pixels = np.stack([cv2.imread(str(name))[..., ::-1] for name in names])
    found = {
        kind: computed(tmp_path, kind, tmp_path / "export" / path, pixels)
        for kind, path in result.files.items()
    }
    first = found["keras"]
    assert first[0].shape == (3, 32, 32, 3)
    for probabilities, ids in found.values():
        assert probabilities == pytest.approx(first[0], abs=1e-5)
        assert np.array_equal(ids, first[1])
    infer(run, tmp_path / "source" / "images", tmp_path / "masks")
    theirs = [np.load(tmp_path / "masks" / "probabilities" / f"{each.stem}.npy") for each in names]
    difference = np.abs(np.stack(theirs) - first[0]).max()
    assert difference <= 2 * check["max_difference_to_trained_precision"]


def test_tiles_of_16_bit_images(tmp_path: Path) -> None:
    write_source(tmp_path / "source", side=80, bits=16)
    run = trained(
        tmp_path,
        {"tile": 32, "tile_overlap": 8, "fractions": (0.6, 0.2, 0.2)},
        {"model.normalization": "group", "precision": "float32", "model.image-channels": 3},
    )
    result = flexunet.export(run, tmp_path / "export", format=["onnx"])
    values = result.metadata["input"]
    assert (values["dtype"], values["shape"][-1]) == ("uint16", 1)
    assert result.metadata["preprocessing"]["geometry"] == "tile"
    infer(run, tmp_path / "source" / "images", tmp_path / "masks")
    predict = open_onnx_file(str(tmp_path / "export" / "model.onnx"))
    overlap = result.metadata["preprocessing"]["window_overlap"]
    windows = Windows(values["network_height"], values["network_width"], overlap, 4)
    for path in sorted((tmp_path / "source" / "images").iterdir())[:2]:
        pixels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)[..., np.newaxis]
        ours = probabilities_of(pixels, lambda images: predict(images)[0], windows)
        theirs = np.load(tmp_path / "masks" / "probabilities" / f"{path.stem}.npy")
        assert ours == pytest.approx(theirs, abs=1e-5)


def test_the_example_serves_the_masks_of_infer(trained_run: Path, tmp_path: Path) -> None:
    """This project does not install Ray Serve; SERVE_PYTHON may name a Python that has it."""
    python = os.environ.get("SERVE_PYTHON", sys.executable)
    if subprocess.run([python, "-I", "-c", "import ray.serve"], capture_output=True).returncode:
        pytest.skip("needs Ray Serve: pip install 'ray[serve]' into the Python of SERVE_PYTHON")
    images = tmp_path / "images"
    images.mkdir()
    for number, shape in enumerate(((32, 32), (50, 41), (20, 64))):
        pixels = np.random.default_rng(number).integers(0, 255, shape, dtype=np.uint8)
        pixels[5:15, 8:18] //= 8
        cv2.imwrite(str(images / f"{number}.png"), pixels)
    flexunet.export(trained_run, tmp_path / "export")
    infer(trained_run, images, tmp_path / "masks")
    port, ray_folder = free_port(), tempfile.mkdtemp(prefix="flexunet-serve-")
    with subprocess.Popen(
        [python, "-I", str(ROOT / "examples" / "serve.py"), str(tmp_path / "export"),
         "--port", str(port)],
        cwd=tmp_path,
        env=os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": ray_folder},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as server:  # fmt: skip
        try:
            wait_until_served(port, server)
            for path in sorted(images.iterdir()):
                status, body = post(port, path.read_bytes())
                assert status == 200, body
                mask = cv2.imdecode(np.frombuffer(body, np.uint8), cv2.IMREAD_COLOR)
                theirs = cv2.imread(str(tmp_path / "masks" / path.name), cv2.IMREAD_COLOR)
                assert np.array_equal(mask, theirs), path
            assert post(port, b"no image") == (
                400,
                b"send an image file of uint8 pixels up to 255\n",
            )
        finally:
            server.terminate()
            server.communicate(timeout=60)
            shutil.rmtree(ray_folder, ignore_errors=True)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def post(port: int, body: bytes) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(connection):
        connection.request("POST", "/", body)
        answer = connection.getresponse()
        return answer.status, answer.read()


def wait_until_served(port: int, server: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert server.poll() is None, server.communicate()[1]
        try:
            if post(port, b"")[0] == 400:
                return
        except OSError:
            pass
        time.sleep(0.5)
    raise AssertionError("the example does not answer")
