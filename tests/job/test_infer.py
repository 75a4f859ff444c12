"""Masks for images of every kind, by a run that the real command trained to find discs."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from data_prep.config import PrepConfig
from data_prep.imaging.geometry import fit
from data_prep.phantoms.inbreast_release import dicom_bytes, write_release
from data_prep.pipeline import prepare
from data_prep.prep_input import sources_of
from data_prep.shards.manifest import FullScaleInfo, Manifest
from data_prep.sources.pairs import find_sources
from flexunet.errors import ContentError, StorageError, UsageError
from flexunet.process_pool import InlineExecutor, Workers
from flexunet.storage import join_url, open_store
from job.config import identity_of
from job.data.dataset import open_dataset
from job.data.reader import read_sample
from job.data.shard_cache import open_reader
from job.infer import main
from job.inference.chunk import _read_image
from job.inference.inputs import find_images, sort_images
from job.inference.options import InferConfig
from job.inference.outputs import MAX_PASSED_OVER, list_passed_over
from job.inference.pipeline import infer
from job.inference.prediction import color_warning, model_image
from job.inference.preprocess import to_model_pixels
from job.optimization.optimizer import Adam
from job.postprocessing.masks import class_ids_at_source
from job.runs import serialization
from job.runs.loading import model_for, open_run
from job.runs.run import Run
from tests.conftest import FaultyBucket
from tests.job.discs import write_discs

PROJECT = Path(__file__).resolve().parents[2]
QUIET = InferConfig(progress=False, batch_size=4)
RECORDS = "inference.json", "inference-images-000001.json"


def disc(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns a picture (h, w) uint8 with a bright ellipse on noise, and where that is."""
    y, x = np.mgrid[:height, :width]
    inside = ((y / height - 0.5) / 0.25) ** 2 + ((x / width - 0.4) / 0.2) ** 2 <= 1
    noise = np.random.default_rng(height * width).integers(20, 90, (height, width))
    return (noise + 120 * inside).astype(np.uint8), inside


def write(path: Path, pixels: np.ndarray) -> None:
    """Writes grey, BGR or BGRA `pixels`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), pixels)


def write_same(folder: Path, num_images: int, side: int = 32) -> None:
    for index in range(num_images):
        write(folder / f"image-{index:03d}.png", disc(side, side)[0])


def mask_of(folder: Path, name: str) -> np.ndarray:
    """Returns the class ids of a written mask, (h, w) uint8."""
    with Image.open(folder / name) as read:
        assert read.mode == "P"
        return np.asarray(read)


def dice(predicted: np.ndarray, true: np.ndarray) -> float:
    return float(2 * np.sum(predicted & true) / (predicted.sum() + true.sum()))


def test_infer_reads_every_kind_of_image_and_answers_at_its_size(
    trained_run: Path, tmp_path: Path
) -> None:
    images, output = tmp_path / "images", tmp_path / "output"
    grey, wide, deep, clear, tall = (
        disc(*size) for size in [(32, 32), (48, 80), (64, 64), (40, 40), (90, 45)]
    )
    write(images / "grey.png", grey[0])
    write(images / "wide.JPG", cv2.merge([wide[0]] * 3))
    write(images / "deep.tif", deep[0].astype(np.uint16) * 257)
    opaque = np.full_like(clear[0], 255)
    write(images / "patient 1" / "clear.png", cv2.merge([*[clear[0]] * 3, opaque]))
    write(images / "patient 1" / "left" / "tall.bmp", cv2.merge([tall[0]] * 3))
    (images / "notes.txt").write_text("not an image")

    result = infer(str(trained_run), str(images), str(output), QUIET)

    assert (result.num_written, result.num_kept, result.unreadable) == (5, 0, ())
    expected = {
        "grey.png": grey,
        "wide.png": wide,
        "deep.png": deep,
        "patient 1/clear.png": clear,
        "patient 1/left/tall.png": tall,
    }
    names = {stat.name for stat in open_store(str(output)).list()}
    assert names == {
        "passed_over.csv",
        *RECORDS,
        *expected,
        *(f"overlays/{name}" for name in expected),
    }
    for name, (read, inside) in expected.items():
        ids = mask_of(output, name)
        assert ids.shape == read.shape
        assert set(np.unique(ids)) == {0, 1}
        assert dice(ids == 1, inside) > 0.8, name
        # Class 1 is shown white, as the dataset says.
        shown = cv2.imread(str(output / name))
        assert shown is not None
        assert np.array_equal(shown[..., 0], 255 * ids)


def test_infer_warns_of_images_with_other_colors_than_the_dataset(
    trained_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    grey = disc(32, 32)[0]
    write(tmp_path / "images" / "grey.png", grey)
    write(tmp_path / "images" / "grey-as-rgb.png", cv2.merge([grey] * 3))
    infer(str(trained_run), str(tmp_path / "images"), str(tmp_path / "a"), QUIET)

    def messages() -> list[str]:
        # TensorFlow may warn of retracing, depending on the tests before.
        return [each.message for each in caplog.records if each.name != "tensorflow"]

    assert messages() == []
    for name in ("b", "a"):
        write(tmp_path / "images" / f"{name}.png", cv2.merge([grey, grey // 2, grey]))
    infer(str(trained_run), str(tmp_path / "images"), str(tmp_path / "a"), QUIET)
    (line,) = messages()
    assert "2 images are in colour (RGB), first a.png, but the run was trained on grey" in line
    # The other way round: only the file's channels say what it is.
    manifest = open_run(str(trained_run)).manifest.model_copy(update={"channels": 3})
    images = {"grey": grey[..., np.newaxis], "rgb": cv2.merge([grey] * 3)}
    others = {
        name: model_image(image, manifest, QUIET, name=name).has_other_colors
        for name, image in images.items()
    }
    assert others == {"grey": True, "rgb": False}
    line = color_warning(["grey"], manifest) or ""
    assert "1 image is grey, first grey, but the run was trained on images in colour" in line


def test_infer_keeps_what_is_there_unless_asked(trained_run: Path, tmp_path: Path) -> None:
    write_same(tmp_path / "images", 3)
    arguments = str(trained_run), str(tmp_path / "images"), str(tmp_path / "output")
    infer(*arguments, QUIET)
    (tmp_path / "output" / "image-001.png").write_bytes(b"mine")
    (tmp_path / "output" / "image-002.png").unlink()
    result = infer(*arguments, QUIET)
    assert (result.num_written, result.num_kept) == (1, 2)
    assert (tmp_path / "output" / "image-001.png").read_bytes() == b"mine"
    result = infer(*arguments, QUIET.model_copy(update={"overwrite": True}))
    assert (result.num_written, result.num_kept) == (3, 0)
    assert mask_of(tmp_path / "output", "image-001.png").shape == (32, 32)


def test_infer_predicts_one_file_and_leaves_the_masks_of_others_alone(
    own_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_same(tmp_path / "images", 3)
    every = [str(own_run), str(tmp_path / "images"), "--no-progress"]
    one = [str(own_run), str(tmp_path / "images" / "image-001.png"), "--no-progress"]
    output = own_run / "inference"
    assert main(one) == 0
    mask, overlay = output / "image-001.png", output / "overlays" / "image-001.png"
    assert capsys.readouterr().out == f"mask: {mask}\noverlay: {overlay}\n"
    before = mask.read_bytes()
    assert main(every) == 0
    assert "2 written, 1 kept" in capsys.readouterr().out
    assert main(one) == 0
    assert f"mask: {mask} (kept; --overwrite predicts it again)" in capsys.readouterr().out
    # The others have images: none is said to be gone.
    assert main([*one, "--overwrite"]) == 0
    assert "gone" not in capsys.readouterr().out
    assert mask.read_bytes() == before
    assert len(list(output.glob("*.png"))) == 3


def test_command_names_an_overlay_only_if_there_is_one(
    trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_same(tmp_path / "images", 1)
    image, output = tmp_path / "images" / "image-000.png", tmp_path / "output"
    arguments = [str(trained_run), str(image), str(output), "--no-progress"]
    assert main([*arguments, "--no-overlays"]) == 0
    assert main(arguments) == 0
    kept = f"mask: {output}/image-000.png (kept; --overwrite predicts it again)\n"
    assert capsys.readouterr().out == f"mask: {output}/image-000.png\n{kept}"
    (output / "overlays").mkdir()
    (output / "overlays" / "image-000.png").touch()
    assert main(arguments) == 0
    assert capsys.readouterr().out == f"{kept}overlay: {output}/overlays/image-000.png\n"


@pytest.mark.parametrize(
    ("name", "output", "code", "problem"),
    [
        ("a.png", "mask.png", 2, "mask.png: OUTPUT must be a folder, also for one image"),
        ("a.png", ".", 2, "the image a.png is in the output, where its mask could replace it"),
        ("notes.txt", "masks", 2, "notes.txt: not an image; expected a file ending in"),
        ("broken.png", "masks", 3, "broken.png: "),
        ("a.png", "notes.txt", 2, "is a file; give OUTPUT a folder"),
    ],
)
def test_command_refuses_one_file_that_it_cannot_predict(
    name: str,
    output: str,
    code: int,
    problem: str,
    trained_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write(tmp_path / "a.png", disc(32, 32)[0])
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "broken.png").write_bytes(b"no image")
    arguments = [str(trained_run), str(tmp_path / name), str(tmp_path / output)]
    before = (tmp_path / "a.png").read_bytes()
    assert main([*arguments, "--no-progress"]) == code
    error = capsys.readouterr().err
    assert problem in error
    assert error.count("\n") == 1
    assert (tmp_path / "a.png").read_bytes() == before
    assert not (tmp_path / "masks" / "unreadable.csv").exists()


def test_infer_predicts_one_file_beside_its_output_and_one_object_of_a_bucket(
    trained_run: Path, tmp_path: Path, bucket_url: str
) -> None:
    write(tmp_path / "a.png", disc(40, 50)[0])
    data = dicom_bytes(disc(40, 50)[0].astype(np.uint16), 8, spacing_mm=0.07, key="x")
    (tmp_path / "IM0001").write_bytes(data)
    bucket = open_store(bucket_url)
    for name in ("a.png", "IM0001"):
        bucket.put(f"images/{name}", (tmp_path / name).read_bytes())
        result = infer(str(trained_run), str(tmp_path / name), str(tmp_path / "masks"), QUIET)
        (mask,) = result.masks
        url = join_url(bucket_url, "images", name)
        remote = infer(str(trained_run), url, join_url(bucket_url, "masks"), QUIET)
        assert remote.masks == (join_url(bucket_url, "masks", Path(mask).name),)
        found = bucket.get(f"masks/{Path(mask).name}")
        assert found == Path(mask).read_bytes()
        assert mask_of(tmp_path / "masks", Path(mask).name).shape == (40, 50)
    # A folder of the bucket is one all the same.
    urls = join_url(bucket_url, "images"), join_url(bucket_url, "all")
    assert infer(str(trained_run), *urls, QUIET).num_written == 2


def test_infer_gives_the_same_masks_whatever_the_batch(trained_run: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    for side in range(30, 37):
        write(images / f"{side}.png", disc(side, side)[0])
    for batch_size in (1, 3):
        config = QUIET.model_copy(update={"batch_size": batch_size, "overlays": False})
        infer(str(trained_run), str(images), str(tmp_path / str(batch_size)), config)
    for side in range(30, 37):
        one, three = (mask_of(tmp_path / size, f"{side}.png") for size in ("1", "3"))
        assert np.array_equal(one, three)


def test_command_lists_unreadable_images_and_does_the_others(
    trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, output = tmp_path / "images", tmp_path / "output"
    write_same(images, 5)
    whole = (images / "image-001.png").read_bytes()
    (images / "image-001.png").write_bytes(whole[:100])
    (images / "=image.png").write_bytes(b"no picture")
    (images / os.fsdecode(b"caf\xe9.png")).write_bytes(whole)  # Latin-1, of an old archive
    (images / "gone.png").symlink_to(tmp_path / "nothing")
    os.rename(images / "image-002.png", tmp_path / "elsewhere.png")
    (images / "image-002.png").symlink_to(tmp_path / "elsewhere.png")
    (images / "e\u0301.png").write_bytes(whole)  # as macOS writes an e with acute
    arguments = [str(trained_run), str(images), str(output), "--no-progress"]
    assert main(arguments) == 3
    shown = capsys.readouterr()
    assert f"masks: {output} (4 written)" in shown.out
    assert shown.err.count("\n") == 1
    assert "5 of the images could not be read" in shown.err
    rows = list(csv.reader((output / "unreadable.csv").read_text().splitlines()))
    # A spreadsheet would run the first name as a formula.
    assert [row[0] for row in rows] == [
        "file",
        "'=image.png",
        r"caf\xe9.png",
        "e\u0301.png",
        "gone.png",
        "image-001.png",
    ]
    assert sorted(path.name for path in output.glob("*.png")) == [
        f"image-{index:03d}.png" for index in (0, 2, 3, 4)
    ]

    (images / "image-001.png").write_bytes(whole)
    for name in ("=image.png", os.fsdecode(b"caf\xe9.png"), "e\u0301.png", "gone.png"):
        (images / name).unlink()
    assert main(arguments) == 0
    assert "1 written, 4 kept" in capsys.readouterr().out
    assert not (output / "unreadable.csv").exists()


def test_infer_reads_from_and_writes_to_a_bucket(
    trained_run: Path, tmp_path: Path, bucket_url: str
) -> None:
    write_same(tmp_path, 3)
    bucket = open_store(bucket_url)
    for index, name in enumerate(["a.png", "sub/b.png", "sub/c.png"]):
        bucket.put(f"images/{name}", (tmp_path / f"image-{index:03d}.png").read_bytes())
    urls = join_url(bucket_url, "images"), join_url(bucket_url, "masks")
    assert infer(str(trained_run), *urls, QUIET).num_written == 3
    names = [stat.name for stat in open_store(urls[1]).list()]
    masks = ["a.png", "sub/b.png", "sub/c.png"]
    assert names == sorted([*RECORDS, *masks, *(f"overlays/{name}" for name in masks)])
    assert infer(str(trained_run), *urls, QUIET).num_kept == 3


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        (["a.png", "a.tif"], "a.png and a.tif would both become a.png"),
        (["notes.txt"], "no images here"),
        ([], "images: does not exist; give an image or a folder of images"),
        (["overlays/a.png"], "would be among the overlays"),
    ],
)
def test_command_refuses_images_that_it_cannot_name(
    trained_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    files: list[str],
    problem: str,
) -> None:
    for name in files:
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).write_bytes(b"")
    assert main([str(trained_run), str(tmp_path / "images"), str(tmp_path / "output")]) == 2
    error = capsys.readouterr().err
    assert problem in error
    assert error.count("\n") == 1
    assert not (tmp_path / "output").exists()


def test_command_refuses_a_folder_without_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_same(tmp_path / "images", 1)
    assert main([str(tmp_path / "run"), str(tmp_path / "images")]) == 2
    assert "config.yaml is missing" in capsys.readouterr().err


def test_infer_reads_dicom_files_of_any_name(
    trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As an export of a PACS or a CD names them; what is passed over is told."""
    images, output = tmp_path / "images", tmp_path / "output"
    data = dicom_bytes(disc(32, 32)[0].astype(np.uint16), 8, spacing_mm=0.07, key="x")
    names = ["1.2.840.1", "1.2.840.2", "IM000001", "a.dcm", "b.dicom", "c.IMA"]
    for name in (*names, "DICOMDIR", ".hidden"):
        images.mkdir(exist_ok=True)
        (images / name).write_bytes(data)
    (images / "notes.txt").write_bytes(b"notes")
    assert main([str(trained_run), str(images), str(output), "--no-progress"]) == 0
    said = capsys.readouterr().out
    assert "(6 written)" in said
    assert (
        "skipped 2 files that are not images, first DICOMDIR\n"
        f"  listed in {output}/passed_over.csv\n"
    ) in said
    assert (output / "passed_over.csv").read_text().splitlines() == [
        "file,reason",
        "DICOMDIR,a file name of another kind of file",
        "notes.txt,a file name of another kind of file",
    ]
    masks = ["1.2.840.1", "1.2.840.2", "IM000001", "a", "b", "c"]
    assert sorted(path.name for path in output.glob("*.png")) == [f"{name}.png" for name in masks]
    found = {(output / f"{name}.png").read_bytes() for name in masks}
    assert len(found) == 1  # they are all of one picture
    assert main([str(trained_run), str(images), str(output), "--no-progress"]) == 0
    assert "0 written, 6 kept" in capsys.readouterr().out
    for name in ("DICOMDIR", "notes.txt"):
        (images / name).unlink()
    assert main([str(trained_run), str(images), str(output), "--no-progress"]) == 0
    assert not (output / "passed_over.csv").exists()


def test_sort_images_finds_dicom_files_in_a_bucket(bucket_url: str) -> None:
    data = dicom_bytes(disc(8, 8)[0].astype(np.uint16), 8, spacing_mm=0.07, key="x")
    bucket = open_store(bucket_url)
    for name, content in (("a/IM1", data), ("a/x", b"x" * 500), ("b.dcm", b""), ("c.json", b"{}")):
        bucket.put(name, content)
    images, others = sort_images(bucket)
    assert [(each.name, each.size) for each in images] == [("a/IM1", len(data)), ("b.dcm", 0)]
    assert others == ("a/x", "c.json")


def test_infer_refuses_dicom_files_whose_masks_would_have_one_name(tmp_path: Path) -> None:
    for name in ("a.dcm", "a.dicom"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UsageError, match=r"a\.dcm and a\.dicom would both become a\.png"):
        find_images(open_store(str(tmp_path)))


def test_infer_refuses_the_folder_that_prep_takes(tmp_path: Path) -> None:
    write_same(tmp_path / "images", 2)
    assert len(find_images(open_store(str(tmp_path)))) == 2
    write_same(tmp_path / "masks", 2)
    message = rf"^{tmp_path}: has images/ and masks/, .*; give {tmp_path}/images$"
    with pytest.raises(UsageError, match=message):
        find_images(open_store(str(tmp_path)))
    assert len(find_images(open_store(str(tmp_path / "images")))) == 2


@pytest.mark.parametrize(
    ("images", "output", "problem"),
    [
        ("none", "output", "none: does not exist; give an image or a folder of images"),
        ("images", "file", "/file: is a file; give OUTPUT a folder"),
    ],
)
def test_infer_refuses_what_is_no_folder(
    trained_run: Path, tmp_path: Path, images: str, output: str, problem: str
) -> None:
    write_same(tmp_path / "images", 1)
    (tmp_path / "file").write_bytes(b"kept")
    with pytest.raises(UsageError, match=problem):
        infer(str(trained_run), str(tmp_path / images), str(tmp_path / output), QUIET)
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("output", ["images", "images/masks", "", "link"])
def test_infer_refuses_an_output_among_the_images(
    trained_run: Path, tmp_path: Path, output: str
) -> None:
    write_same(tmp_path / "images", 1)
    (tmp_path / "link").symlink_to(tmp_path / "images")
    with pytest.raises(UsageError, match="must not contain each other"):
        infer(str(trained_run), str(tmp_path / "images"), str(tmp_path / output), QUIET)
    assert [path.name for path in (tmp_path / "images").iterdir()] == ["image-000.png"]


def test_command_ends_with_one_line_when_the_output_cannot_be_written(
    trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_same(tmp_path / "images", 9)
    (tmp_path / "file").write_bytes(b"")
    output = tmp_path / "file" / "masks"
    for place, code, words in (
        (output, 2, f"{tmp_path}/file is a file, not a folder; give a folder"),
        ("/proc/none/masks", 5, "cannot write"),
    ):
        arguments = [str(trained_run), str(tmp_path / "images"), str(place), "--no-progress"]
        assert main(arguments) == code
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1


def test_a_deleted_image_is_not_an_unreadable_one(trained_run: Path, tmp_path: Path) -> None:
    # It was listed a moment ago; to name it in unreadable.csv would end the call as if it was done.
    manifest = open_run(str(trained_run)).manifest
    with pytest.raises(StorageError, match=r"gone\.png does not exist"):
        _read_image(open_store(str(tmp_path)), "gone.png", manifest, QUIET)


@pytest.mark.cluster
def test_command_continues_after_it_was_killed(trained_run: Path, tmp_path: Path) -> None:
    images, output = tmp_path / "images", tmp_path / "output"
    write_same(images, 100, side=300)
    command = [sys.executable, "-m", "job.infer", str(trained_run), str(images), str(output)]
    with subprocess.Popen(command, cwd=PROJECT, stderr=subprocess.PIPE, text=True) as process:
        wait_for_masks(output, 3, process)
        process.kill()
    check_continues(trained_run, images, output)


def test_command_stops_at_sigterm_with_every_written_mask_whole(
    trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, output = tmp_path / "images", tmp_path / "output"
    write_same(images, 100, side=300)

    def terminate() -> None:
        wait_for_masks(output, 3)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=terminate)
    thread.start()
    code = main([str(trained_run), str(images), str(output), "--no-progress"])
    thread.join()
    assert code == 6
    error = capsys.readouterr().err.strip()
    assert error == "flexunet infer: interrupted; the same command continues"
    assert not list(output.rglob(".flexunet-*"))
    check_continues(trained_run, images, output)


def wait_for_masks(folder: Path, count: int, process: Any = None) -> None:
    deadline = time.monotonic() + 120
    while len(list(folder.glob("*.png"))) < count:
        assert process is None or process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def check_continues(run: Path, images: Path, output: Path) -> None:
    """Checks that some of 100 masks are there, all of them whole, and writes the others."""
    masks = list(output.glob("*.png"))
    assert 3 <= len(masks) < 100
    for path in masks:
        assert mask_of(output, path.name).shape == (300, 300)
        assert (output / "overlays" / path.name).exists()
    config = QUIET.model_copy(update={"overlays": False})
    result = infer(str(run), str(images), str(output), config)
    assert (result.num_kept, result.num_written) == (len(masks), 100 - len(masks))
    assert len(list(output.glob("*.png"))) == 100


def test_infer_of_a_sigmoid_head_takes_one_half_as_the_limit(
    trained_run: Path, tmp_path: Path
) -> None:
    write_same(tmp_path / "images", 2)
    for bias, expected in [(-0.1, 0), (0.1, 1)]:
        # With every weight 0 but the last bias, each pixel's probability is sigmoid(bias).
        run = constant_run(trained_run, tmp_path / "runs", f"run-{expected}", bias)
        output = tmp_path / str(expected)
        infer(run, str(tmp_path / "images"), str(output), QUIET)
        assert np.unique(mask_of(output, "image-000.png")).tolist() == [expected]


def constant_run(like: Path, output: Path, name: str, bias: float) -> str:
    """Returns the URL of a run with a sigmoid output that is the same everywhere."""
    trained = open_run(str(like))
    model_config = trained.config.model.model_copy(update={"num_classes": 1})
    config = trained.config.model_copy(update={"model": model_config})
    model = model_for(config, trained.manifest)
    for weight in model.weights:
        weight.assign(np.zeros(weight.shape))
    model.weights[-1].assign([bias])
    optimizer = Adam(config.optimizer, model.trainable_variables)
    staging = output / f"{name}-staging"
    staging.mkdir(parents=True)
    state = {"best": {"step": 1, "attempt": 1}}
    members = serialization.take(str(staging), model, optimizer, state)()
    with Run.open(str(output), name) as run:
        run.check_identity(identity_of(config), trained.dataset_digest)
        for file in ("dataset.json", "config.yaml"):
            data = trained.store.get(file)
            run.put_bytes(file, data.replace(b"num_classes: null", b"num_classes: 1"))
        run.commit(1, 1, members, {})
        return run.url


def test_class_ids_at_source_puts_a_padded_image_back() -> None:
    # 2x4 into 4x4: one row of padding above and below.
    geometry = fit((2, 4), (4, 4), kind="pad")
    probabilities = np.zeros((4, 4, 3), np.float32)
    probabilities[..., 0] = 0.4
    probabilities[0, :, 2] = 1  # in the padding
    probabilities[1, 0, 1] = 0.5
    probabilities[2, 3, 2] = 0.6
    expected = [[1, 0, 0, 0], [0, 0, 0, 2]]
    assert class_ids_at_source(probabilities, geometry).tolist() == expected


def test_class_ids_at_source_chooses_after_enlarging() -> None:
    # Two columns become four: bilinear weights put 0.25 and 0.75 between the two.
    geometry = fit((1, 4), (1, 2), kind="stretch")
    high_left = np.array([[[0.9], [0.3]]], np.float32)  # 0.9, 0.75, 0.45, 0.3
    assert class_ids_at_source(high_left, geometry).tolist() == [[1, 1, 0, 0]]
    low_left = np.array([[[1.0], [0.4]]], np.float32)  # 1.0, 0.85, 0.55, 0.4
    assert class_ids_at_source(low_left, geometry).tolist() == [[1, 1, 1, 0]]


@pytest.mark.parametrize(
    "layout",
    [
        {"geometry": "stretch"},
        {"geometry": "pad"},
        {"geometry": "pad", "crop": "breast", "flip": "right"},
    ],
)
def test_to_model_pixels_gives_what_prep_stores(tmp_path: Path, layout: Any) -> None:
    write_discs(tmp_path / "source", num_images=6, side=50)
    for path in sorted((tmp_path / "source").rglob("*.png"))[::2]:
        # Half of the pairs are not square, so that pad has something to do.
        twin = {"images": "masks", "masks": "images"}[path.parent.name]
        for each in (path, path.parents[1] / twin / path.name):
            pixels = cv2.imread(str(each), cv2.IMREAD_GRAYSCALE)
            assert pixels is not None
            write(each, pixels[:40])
    config = PrepConfig(image_size=24, **layout, num_processes=1)
    sources = find_sources(str(tmp_path / "source"))
    prepare(sources, str(tmp_path / "dataset"), config, progress=False)
    dataset = open_dataset(str(tmp_path / "dataset"))
    split = dataset.split("train")
    reader = open_reader(dataset, split, cache="full", cache_dir=None)
    for index, name in enumerate(split.filenames):
        pixels = cv2.imread(str(tmp_path / "source" / "images" / name), cv2.IMREAD_GRAYSCALE)
        assert pixels is not None
        made, _ = to_model_pixels(pixels[..., np.newaxis], dataset.manifest)
        assert np.array_equal(made, read_sample(reader, index)[0])
        # Colour that is grey is the same picture.
        colour, _ = to_model_pixels(np.dstack([pixels] * 3), dataset.manifest)
        assert np.array_equal(colour, made)


def test_masks_of_cropped_and_flipped_images_are_put_back(trained_run: Path) -> None:
    manifest = open_run(str(trained_run)).manifest
    framed = manifest.model_copy(update={"crop": "breast", "flip": "left"})
    image = np.zeros((40, 60, 1), np.uint8)
    image[10:30, 30:] = 100
    image[12:20, 40:50] = 200  # to be found
    for read in (image, np.ascontiguousarray(image[:, ::-1])):
        pixels, geometry = to_model_pixels(read, framed)
        assert geometry.is_flipped == (read is image)
        assert geometry.crop is not None
        bright = pixels.astype(np.float32) / 255
        ids = class_ids_at_source(np.concatenate([1 - bright, bright], axis=-1), geometry)
        truth = (read[..., 0] == 200).astype(np.uint8)
        assert ids.shape == truth.shape
        # Its border may move by a pixel: it went through a size of 32x32.
        inner = cv2.erode(truth, np.ones((3, 3)))
        outer = cv2.dilate(truth, np.ones((3, 3)))
        assert np.all(inner <= ids)
        assert np.all(ids <= outer)


def test_dicom_files_are_predicted_as_prep_stores_them(tmp_path: Path) -> None:
    write_release(str(tmp_path / "release"), 4, 64, 1)
    config = PrepConfig(
        format="inbreast", image_size=32, crop="breast", flip="left", num_processes=1
    )
    sources = sources_of(str(tmp_path / "release"), config)
    prepare(sources, str(tmp_path / "dataset"), config, progress=False)
    dataset = open_dataset(str(tmp_path / "dataset"))
    split = dataset.split("train")
    reader = open_reader(dataset, split, cache="full", cache_dir=None)
    images = open_store(str(tmp_path / "release" / "AllDICOMs"))
    assert set(split.filenames) < set(find_images(images))
    for index, name in enumerate(split.filenames):
        read = _read_image(images, name, dataset.manifest, QUIET)
        assert not isinstance(read, tuple)
        assert np.array_equal(read.pixels, read_sample(reader, index)[0])


def test_dicom_files_fit_a_dataset_of_8_bits(trained_run: Path) -> None:
    shallow = open_run(str(trained_run)).manifest
    # 819 of 4095 is a fifth of full intensity: 51 of 255. No upper byte is taken.
    image = np.full((32, 32, 1), 819, np.uint16)
    assert np.unique(to_model_pixels(image, shallow, value_max=4095)[0]).tolist() == [51]


def test_to_model_pixels_changes_the_bit_depth(trained_run: Path) -> None:
    shallow = open_run(str(trained_run)).manifest
    deep = shallow.model_copy(update={"bit_depth": 16, "value_max": 4095})
    image = np.full((32, 32, 1), 51, np.uint8)
    # 51/255 = 1/5 of full intensity, 4095/5 = 819.
    assert np.unique(to_model_pixels(image, deep)[0]).tolist() == [819]
    image = np.full((32, 32, 1), 51 * 256 + 200, np.uint16)
    assert np.unique(to_model_pixels(image, shallow)[0]).tolist() == [51]


def deep_manifest(run: Path, **full_scale: int) -> Manifest:
    info = {"rule": "found", "highest": 4095, "num_clipped_pictures": 0, "num_clipped_pixels": 0}
    recorded = FullScaleInfo.model_validate(info | full_scale) if full_scale else None
    update = {"bit_depth": 16, "value_max": 4095, "full_scale": recorded}
    return open_run(str(run)).manifest.model_copy(update=update)


def deep_image(highest: int) -> np.ndarray:
    return np.linspace(0, highest, 64 * 64).astype(np.uint16).reshape(64, 64, 1)


def test_an_image_of_more_bits_than_the_dataset_is_refused(
    trained_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    deep = deep_manifest(trained_run)
    pixels, _ = to_model_pixels(deep_image(4095), deep, name="a.png")
    with pytest.raises(ContentError, match=r"a\.png: 16-bit file with values up to 65535, .* 4095"):
        to_model_pixels(deep_image(65535), deep, name="a.png")
    # As prep does it: a marker is no range.
    marked = deep_image(4095)
    marked[0, :4] = 65535
    assert to_model_pixels(marked, deep, name="a.png")[0].max() == 4095
    assert caplog.messages == [
        "a.png: 4 pixels are above full intensity, up to 65535, clipped to 4095"
    ]
    # What is given is rescaled: the same picture in all bits.
    write(tmp_path / "a.png", deep_image(4095) * 16)
    store = open_store(str(tmp_path))
    assert isinstance(_read_image(store, "a.png", deep, QUIET), tuple)
    given = QUIET.model_copy(update={"full_scale": 4095 * 16})
    read = _read_image(store, "a.png", deep, given)
    assert not isinstance(read, tuple)
    assert np.abs(read.pixels.astype(int) - pixels).max() <= 1


def test_a_given_full_scale_below_the_values_is_refused(trained_run: Path) -> None:
    shallow = open_run(str(trained_run)).manifest
    with pytest.raises(ContentError, match="to 4095, but full intensity is 1023 by --full-scale"):
        to_model_pixels(deep_image(4095), shallow, value_max=1023)


@pytest.mark.parametrize(
    ("recorded", "highest", "is_refused"),
    [
        ({}, 255, True),  # a sixteenth of 4095
        ({}, 256, False),
        ({"lowest_max": 3000}, 1023, True),  # a quarter, and no picture is so dark
        ({"lowest_max": 3000}, 1024, False),
        ({"lowest_max": 900}, 900, False),
        ({"lowest_max": 900}, 899, True),
    ],
)
def test_an_image_of_fewer_bits_than_the_dataset_is_refused(
    trained_run: Path, recorded: dict[str, int], highest: int, is_refused: bool
) -> None:
    deep = deep_manifest(trained_run, **recorded)
    image = deep_image(highest)
    if is_refused:
        with pytest.raises(ContentError, match=rf"largest value is {highest}, .* --full-scale"):
            to_model_pixels(image, deep)
    else:
        assert to_model_pixels(image, deep)[0].max() <= highest
    # A blank one is dark on every scale, and one of known scale is as it is.
    to_model_pixels(np.zeros_like(image), deep)
    to_model_pixels(image, deep, value_max=4095)


def test_to_model_pixels_refuses_unused_bits(trained_run: Path, tmp_path: Path) -> None:
    shallow = open_run(str(trained_run)).manifest
    # The upper byte of 4095 is 15 of 255: a bright picture would become nearly black.
    image = np.full((32, 32, 1), 4095, np.uint16)
    with pytest.raises(ContentError, match=r"a\.png: 16-bit file .* 4095, .* 8-bit"):
        to_model_pixels(image, shallow, name="a.png")
    assert np.unique(to_model_pixels(image + 1, shallow)[0]).tolist() == [16]  # 4096 / 256
    write(tmp_path / "a.png", image)
    found = _read_image(open_store(str(tmp_path)), "a.png", shallow, QUIET)
    assert isinstance(found, tuple)
    assert found[0] == "a.png"


def test_masks_of_other_images_or_weights_are_never_kept(trained_run: Path, tmp_path: Path) -> None:
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
        pixels = np.full((20, 20), 50, np.uint8)
        assert cv2.imwrite(str(tmp_path / folder / "case.png"), pixels)
    config = InferConfig(progress=False)
    output = str(tmp_path / "masks")
    infer(str(trained_run), str(tmp_path / "first"), output, config)
    changed = (
        rf"{output} has masks of images from {tmp_path}/first, and this call has images from "
        rf"{tmp_path}/second; give another OUTPUT \(for example {output}-second\), or --overwrite"
    )
    with pytest.raises(UsageError, match=changed):
        infer(str(trained_run), str(tmp_path / "second"), output, config)
    other = config.model_copy(update={"ensemble": (str(trained_run),), "window": "sliding"})
    weights = json.loads((tmp_path / "masks" / "inference.json").read_text())["checkpoint"]
    changed = (
        rf"way: --ensemble was none, now {trained_run}/{weights}; "
        r"--window was auto, now sliding; give another OUTPUT"
    )
    with pytest.raises(UsageError, match=changed):
        infer(str(trained_run), str(tmp_path / "first"), output, other)
    sliding = config.model_copy(update={"window": "sliding", "overwrite": True, "overlap": 8})
    infer(str(trained_run), str(tmp_path / "first"), output, sliding)
    other = config.model_copy(update={"window": "sliding", "flips": "both"})
    changed = r"way: --flips was none, now both; --overlap was 8, now 16; give"
    with pytest.raises(UsageError, match=changed):
        infer(str(trained_run), str(tmp_path / "first"), output, other)
    again = config.model_copy(update={"overwrite": True})
    result = infer(str(trained_run), str(tmp_path / "second"), output, again)
    assert result.num_written == 1


def test_parts_done_by_workers_are_the_whole(trained_run: Path, tmp_path: Path) -> None:
    write_same(tmp_path / "images", 9)
    (tmp_path / "images" / "image-009.png").write_bytes(b"no picture")
    results = []
    for name, workers in [("whole", None), ("parts", lambda: nullcontext(inline_workers()))]:
        arguments = str(trained_run), str(tmp_path / "images"), str(tmp_path / name), QUIET
        results.append(infer(*arguments, open_workers=workers))
    assert results[0].num_written == results[1].num_written == 9
    assert results[0].unreadable == results[1].unreadable != ()
    for stat in open_store(str(tmp_path / "whole")).list():
        whole, part = ((tmp_path / name / stat.name).read_bytes() for name in ("whole", "parts"))
        assert whole == part


def test_what_is_there_already_is_never_written_again(
    trained_run: Path,
    tmp_path: Path,
    faulty_bucket: FaultyBucket,
    caplog: pytest.LogCaptureFixture,
) -> None:
    write_same(tmp_path / "images", 2)
    (tmp_path / "images" / "image-002.png").write_bytes(b"no picture")
    arguments = str(trained_run), str(tmp_path / "images"), faulty_bucket.url, QUIET
    infer(*arguments)
    open_store(faulty_bucket.url).delete("image-001.png")  # as if it had been killed before
    # An account that may create objects and view them is refused all else.
    faulty_bucket.proxy.creates_only = True
    result = infer(*arguments)
    assert (result.num_written, result.num_kept) == (1, 1)
    write(tmp_path / "images" / "image-002.png", disc(32, 32)[0])  # it is mended
    result = infer(*arguments)
    assert (result.num_written, result.num_kept, result.unreadable) == (1, 2, ())
    assert f"{faulty_bucket.url}/unreadable.csv is of an earlier call and stays" in caplog.text


def test_the_list_of_passed_over_files_is_bounded(
    faulty_bucket: FaultyBucket, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(faulty_bucket.url)
    list_passed_over(store, [f"=scan-{index}" for index in range(MAX_PASSED_OVER + 5)])
    rows = list(csv.reader(store.get("passed_over.csv").decode().splitlines()))
    assert len(rows) == MAX_PASSED_OVER + 1
    assert rows[1] == ["'=scan-0", "no ending of an image, and no DICM at byte 128"]
    faulty_bucket.proxy.creates_only = True
    list_passed_over(store, ["a"])
    list_passed_over(store, [])
    assert [text.partition("passed_over.csv is of an earlier call and stays, ")[2] for text in
            caplog.messages] == [
        "as these credentials have no permission to replace objects",
        "as these credentials have no permission to delete; no file was skipped",
    ]  # fmt: skip


def inline_workers() -> Workers:
    return Workers(InlineExecutor(), lambda: 1)


def test_weights_are_those_of_the_claim_while_training_goes_on(
    own_run: Path, tmp_path: Path
) -> None:
    write_same(tmp_path / "images", 1)
    claim = tmp_path / "masks" / "inference.json"

    @contextmanager
    def workers_while_training() -> Iterator[Workers]:
        # What a training process does when a better epoch has ended.
        shutil.rmtree(own_run / json.loads(claim.read_text())["checkpoint"])
        yield inline_workers()

    arguments = str(own_run), str(tmp_path / "images"), str(tmp_path / "masks"), QUIET
    with pytest.raises(StorageError, match="deleted because training continued; run infer again"):
        infer(*arguments, open_workers=workers_while_training)
    assert not (tmp_path / "masks" / "image-000.png").exists()


def test_a_gpu_that_is_missing_is_refused(
    trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import tensorflow as tf

    if tf.config.list_physical_devices("GPU"):
        pytest.skip("this machine has a GPU")
    write_same(tmp_path / "images", 1)
    arguments = [str(trained_run), str(tmp_path / "images"), str(tmp_path / "masks")]
    assert main([*arguments, "--needs-gpu"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(
        r"a GPU was requested, but TensorFlow finds none on .*CUDA_VISIBLE_DEVICES", line
    )
    assert not list((tmp_path / "masks").rglob("*.png"))
