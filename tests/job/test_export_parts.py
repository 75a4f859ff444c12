"""The parts of an export that need no TensorFlow: comparison, samples, output, model card."""

import asyncio
import dataclasses
import errno
import importlib.util
import io
import json
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from flexunet.errors import ContentError, StorageError, UsageError
from flexunet.storage import open_store
from job.exporting import model_card, output
from job.exporting.formats.registry import check_installed, check_size
from job.exporting.metadata import Check, metadata_of
from job.exporting.options import ExportConfig
from job.exporting.parity import Expected, Parity, compare
from job.exporting.samples import check_batches, choose_samples
from job.exporting.source import ExportSource, open_source_runs
from job.postprocessing.masks import Postprocessing, class_ids
from job.postprocessing.stored import Resolved
from tests.conftest import FaultyBucket
from tests.faults.proxy import Fault

ROOT = Path(__file__).resolve().parents[2]


def expected_of(probabilities: Any) -> Expected:
    """Returns a batch of one row of pixels with these probabilities, (pixels, classes)."""
    found = np.array(probabilities, np.float32)[np.newaxis, np.newaxis]
    return Expected(np.zeros((1, 1, found.shape[2], 1), np.uint8), found)


CLEAR = [[0.9, 0.1], [0.2, 0.8], [0.3, 0.7]]
NEAR = [[0.50004, 0.49996], [0.2, 0.8], [0.3, 0.7]]  # two classes of the first are 8e-5 apart


@pytest.mark.parametrize(
    ("probabilities", "thresholds", "shift", "other", "result"),
    [
        (CLEAR, (), 0.0, (), (0, 0, True)),
        (CLEAR, (), 0.9e-5, (), (0, 0, True)),
        (CLEAR, (), 1.1e-5, (), (0, 0, False)),
        (CLEAR, (), np.nan, (), (0, 0, False)),
        (CLEAR, (), 0.0, (2,), (0, 1, False)),
        (NEAR, (), 0.0, (0,), (1, 0, True)),  # a tie may be decided either way
        (NEAR, (), 0.0, (1,), (1, 1, False)),
        (CLEAR, (0.8,), 0.0, (1,), (1, 0, True)),  # at the threshold
        (CLEAR, (0.75,), 0.0, (1,), (0, 1, False)),
        ([[0.8], [0.2]], (), 0.0, (1,), (0, 1, False)),  # a sigmoid
        ([[0.80004], [0.2]], (0.8,), 0.0, (0,), (1, 0, True)),
        ([[0.2, 0.4, 0.4], [0.1, 0.1, 0.8]], (), 0.0, (0,), (1, 0, True)),
        ([[0.2, 0.4, 0.4], [0.1, 0.1, 0.8]], (0.4, 0.5), 0.0, (0,), (0, 1, False)),
        ([[0.1, 0.36, 0.54], [0.1, 0.1, 0.8]], (0.4, 0.5), 0.0, (0,), (1, 0, True)),
    ],
)
def test_probabilities_and_clear_classes_must_agree(
    probabilities: Any,
    thresholds: tuple[float, ...],
    shift: float,
    other: tuple[int, ...],
    result: tuple[int, int, bool],
) -> None:
    batch = expected_of(probabilities)

    def predict(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        ids = class_ids(batch.probabilities, thresholds)
        for pixel in other:
            ids[0, 0, pixel] = (ids[0, 0, pixel] + 1) % max(2, batch.probabilities.shape[-1])
        return batch.probabilities + np.float32(shift), ids

    found = compare(predict, [batch], thresholds)
    assert (found.num_ties, found.num_other_ids, found.has_passed) == result
    assert found.num_pixels == len(probabilities)


def test_outputs_of_another_shape_are_refused() -> None:
    batch = expected_of(CLEAR)
    with pytest.raises(ContentError, match=r"probabilities of shape \(1, 2, 3, 2\)"):
        compare(lambda _: (np.zeros((1, 2, 3, 2)), np.zeros((1, 2, 3))), [batch], ())


def test_a_format_without_its_packages_names_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "tf2onnx" else found(name)
    )
    check_installed(("savedmodel", "keras"))
    with pytest.raises(UsageError) as error:
        check_installed(("savedmodel", "onnx"))
    assert str(error.value) == (
        "--format onnx: not installed: tf2onnx; run `pip install 'flexunet[onnx]'`, or leave out "
        "this format"
    )


def test_the_check_uses_samples_of_the_dataset_or_says_why_not(
    own_run: Path, trained_run: Path
) -> None:
    source = open_source_runs(str(own_run), ExportConfig())
    samples = choose_samples(source.runs[0], None)
    assert (samples.split, samples.indices, len(samples.ids)) == ("test", (0, 1, 2, 3), 4)
    assert [batch.shape for batch in check_batches(samples, 2)] == [
        (2, 32, 32, 1),
        (2, 32, 32, 1),
        (1, 32, 32, 1),
        (1, 34, 36, 1),
    ]
    config = source.runs[0].config.model_copy(update={"data": str(own_run / "gone")})
    run = dataclasses.replace(source.runs[0], config=config)
    generated = choose_samples(run, None)
    assert generated.split is None
    assert generated.images.dtype == np.uint8
    assert "no dataset at" in generated.reason
    assert np.array_equal(generated.images, choose_samples(run, None).images)
    dataset = str(trained_run.parents[1] / "dataset")
    assert choose_samples(run, dataset).split == "test"
    with pytest.raises(UsageError, match="no dataset at"):
        choose_samples(run, str(own_run / "gone"))


def write_export(url: str, *names: str, overwrite: bool = False) -> None:
    store = output.check_output(url, overwrite=overwrite)
    with output.staged(store, overwrite=overwrite) as folder:
        for name in (*names, output.METADATA_NAME):
            os.makedirs(os.path.dirname(os.path.join(folder, name)), exist_ok=True)
            Path(folder, name).write_text(name)


@pytest.mark.parametrize("place", ["folder", "bucket"])
def test_an_export_appears_as_a_whole(
    place: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    remote = request.getfixturevalue("bucket_url") if place == "bucket" else None
    url = remote or str(tmp_path / "new" / "export")
    names = ("savedmodel/variables/variables.index", "model.keras")
    write_export(url, *names)
    store = open_store(url)
    assert [stat.name for stat in store.list()] == sorted((*names, "metadata.json"))
    with pytest.raises(UsageError, match=r"has an export already; .* --overwrite"):
        write_export(url, "model.onnx")
    write_export(url, "model.onnx", overwrite=True)
    assert [stat.name for stat in store.list()] == ["metadata.json", "model.onnx"]
    store.put("notes.txt", b"mine")
    with pytest.raises(UsageError, match=r"not of an export, first notes\.txt"):
        write_export(url, "model.onnx", overwrite=True)
    store.delete("notes.txt")
    before = {stat.name: stat.generation for stat in store.list()}
    with pytest.raises(ZeroDivisionError), output.staged(store, overwrite=True) as folder:
        Path(folder, "model.keras").write_text("half")
        _ = 1 / 0
    assert {stat.name: stat.generation for stat in store.list()} == before
    with (
        pytest.raises(UsageError, match=r"not of an export, first late\.txt"),
        output.staged(store, overwrite=True) as folder,
    ):
        Path(folder, "metadata.json").write_text("new")
        store.put("late.txt", b"mine")
    assert store.get("late.txt") == b"mine"
    store.delete("late.txt")
    assert {stat.name: stat.generation for stat in store.list()} == before
    assert [path.name for path in tmp_path.rglob("*") if "tmp-" in path.name] == []


def test_an_upload_that_fails_leaves_no_object(faulty_bucket: FaultyBucket) -> None:
    faulty_bucket.proxy.add(Fault("status", 403, kinds=("put",), name="model"))
    store = open_store(faulty_bucket.url)
    with pytest.raises(StorageError), output.staged(store, overwrite=False) as folder:
        for name in ("MODEL_CARD.md", "metadata.json", "model.keras"):
            Path(folder, name).write_text(name)
    assert [each.name for each in faulty_bucket.proxy.log if each.kind == "delete"] != []
    assert store.list() == []


def test_an_export_of_another_process_is_not_replaced(tmp_path: Path) -> None:
    target = tmp_path / "export"
    store = output.check_output(str(target), overwrite=False)
    with (
        pytest.raises(UsageError, match="another process wrote here"),
        output.staged(store, overwrite=False) as folder,
    ):
        Path(folder, "metadata.json").write_text("mine")
        write_export(str(target))
    assert (target / "metadata.json").read_text() == "metadata.json"
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file; give OUTPUT a folder"):
        output.check_output(str(tmp_path / "file"), overwrite=False)


def test_a_swap_that_fails_keeps_all_files_and_names_the_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, rename = str(tmp_path / "export"), os.rename
    write_export(target)

    def refused(source: str, destination: str) -> None:
        if destination == target and os.path.exists(os.path.join(source, "model.keras")):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rename(source, destination)

    monkeypatch.setattr(os, "rename", refused)
    with pytest.raises(StorageError, match="Input/output error"):
        write_export(target, "model.keras", overwrite=True)
    assert output.files_of(target) == ["metadata.json"]
    assert os.listdir(tmp_path) == ["export"]

    def overtaken(source: str, destination: str) -> None:
        rename(source, destination)
        if source == target:  # renamed away: another process writes a new folder
            write_export(target, "model.onnx")

    monkeypatch.setattr(os, "rename", overtaken)
    with pytest.raises(UsageError, match="another process wrote here") as error:
        write_export(target, "model.keras", overwrite=True)
    assert output.files_of(target) == ["metadata.json", "model.onnx"]
    assert output.files_of(str(error.value).rpartition(" ")[2]) == ["metadata.json"]


def test_a_mount_point_is_refused() -> None:
    with pytest.raises(UsageError, match=r"mount point, .* a folder inside it, .* /proc/export"):
        output.check_output("/proc", overwrite=False)


def test_a_model_too_large_for_onnx_is_refused() -> None:
    check_size(("savedmodel", "keras"), 10**9)
    check_size(("onnx",), 475_000_000)
    with pytest.raises(
        UsageError, match=r"onnx: .* have 2\.00 GB, .* --format savedmodel or keras"
    ):
        check_size(("savedmodel", "onnx"), 500_000_000)


@pytest.mark.parametrize(
    ("pixels", "value_max", "result"),
    [((9, 4), 255, (200, (9, 4))), ((9, 4), 127, (400, None)), (None, 255, (400, None))],
)
def test_the_example_takes_pixels_as_they_are_stored(
    pixels: tuple[int, int] | None,
    value_max: int,
    result: tuple[int, tuple[int, int] | None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its own code runs; Ray Serve, which this project does not install, is left out."""

    def undecorated(**_: Any) -> Callable[[Any], Any]:
        return lambda decorated: decorated

    names = ("ray", "ray.serve", "starlette", "starlette.requests", "starlette.responses")
    modules: dict[str, Any] = {name: ModuleType(name) for name in names}
    modules["ray"].serve = modules["ray.serve"]
    modules["ray.serve"].deployment = modules["ray.serve"].batch = undecorated
    modules["starlette.requests"].Request = object
    modules["starlette.responses"].Response = lambda body, status=200, **_: (status, body)
    for name in names:
        monkeypatch.setitem(sys.modules, name, modules[name])
    segmentation = runpy.run_path(str(ROOT / "examples" / "serve.py"))["Segmentation"]

    async def predict(image: np.ndarray) -> np.ndarray:
        return np.full((*image.shape[:2], 1), 0.9, np.float32)

    async def body() -> bytes:
        if pixels is None:
            return b""
        exif = Image.Exif()
        exif[0x0112] = 6  # a viewer turns it by 90 degrees
        buffer = io.BytesIO()
        Image.new("L", pixels[::-1], 200).save(buffer, "JPEG", exif=exif)
        return buffer.getvalue()

    served = segmentation.__new__(segmentation)
    shape = ["batch", "height", "width", 1]
    served.input = {"dtype": "uint8", "value_max": value_max, "shape": shape}
    served.input |= {"network_height": 8, "network_width": 8}
    served.colors, served.weights = np.array([[0, 0, 0], [255, 0, 0]], np.uint8), np.ones(2)
    served.predict = predict
    status, answer = asyncio.run(served(SimpleNamespace(body=body)))
    mask = cv2.imdecode(np.frombuffer(answer, np.uint8), 1) if status == 200 else None
    assert (status, None if mask is None else mask.shape[:2]) == result


@pytest.fixture
def source(own_run: Path) -> ExportSource:
    return open_source_runs(str(own_run), ExportConfig())


def card_of(source: ExportSource, folder: Path, **options: Any) -> tuple[str, dict[str, Any]]:
    config = ExportConfig(**options)
    (folder / "files").mkdir(exist_ok=True)
    (folder / "files" / "model.keras").write_text("weights")
    check = Check(
        choose_samples(source.runs[0], config.data),
        ((2, 32, 32, 1),),
        {"keras": Parity(2.5e-7, 2048, 3, 0)},
    )
    metadata = metadata_of(source, check, str(folder / "files"))
    assert json.loads(json.dumps(metadata, allow_nan=False)) == metadata
    return model_card.render_card(source, config, metadata), metadata


def test_metadata_and_card_describe_the_run(source: ExportSource, tmp_path: Path) -> None:
    card, metadata = card_of(source, tmp_path)
    assert metadata["input"] == {
        "name": "image",
        "dtype": "uint8",
        "shape": ["batch", "height", "width", 1],
        "channels": ["grey"],
        "value_max": 255,
        "sides_divisible_by": 2,
        "network_height": 32,
        "network_width": 32,
    }
    assert metadata["preprocessing"]["geometry"] == "stretch"
    assert metadata["postprocessing"]["thresholds"] == {"mass": 0.5}
    assert metadata["runs"][0]["commit_sha256"] == source.checkpoints[0].sha256
    assert metadata["files"]["model.keras"]["bytes"] == 7
    for line in (
        "# Model card: discs",
        "| train | 12 | 12 |",
        "- Leak check: no group and no equal image is in two splits.",
        "- No groups were given: every image is its own group.",
        "- Started from random weights.",
        "| keras | 2.5e-07 | 2048 | 3 | 0 |",
        "Not stated. Ask the owner",
        "Research on images like those",
    ):
        assert line in card, card
    summary = json.loads((Path(source.store.url) / "evaluation" / "summary.json").read_text())
    dice = summary["foreground_mean"]["dice"]
    assert f"Foreground Dice {dice:.4f} on 4 cases of the test split" in card
    names = [
        path.stem
        for path in (Path(str(source.runs[0].config.data)).parent / "source" / "images").iterdir()
    ]
    assert names and not [name for name in names if name in card + json.dumps(metadata)]
    assert "\n\n\n" not in card


def test_the_card_says_what_is_known_only_to_its_owner(
    source: ExportSource, tmp_path: Path
) -> None:
    card, _ = card_of(source, tmp_path, licence="CC BY 4.0", intended_use="Discs | only.")
    assert "\nCC BY 4.0\n" in card
    assert "\nDiscs \\| only.\n" in card


def test_measures_of_other_weights_are_not_shown(source: ExportSource, tmp_path: Path) -> None:
    path = Path(source.store.url) / "evaluation" / "summary.json"
    plain = json.loads(path.read_text())
    own = {"flips": "none", "runs": [{"run": "a", "commit_sha256": source.checkpoints[0].sha256}]}
    used = {"thresholds": [0.5], "min_region": [0], "temperature": 1.0, "fitted_on": None}
    changes: list[tuple[dict[str, Any], bool]] = [
        ({"prediction": own}, True),
        ({"prediction": own | {"flips": "both"}}, False),
        ({"prediction": own | {"runs": [{"run": "a", "commit_sha256": "0" * 64}]}}, False),
        ({"split": "valid"}, False),
        ({"prediction": None, "checkpoint": {"which": "best", "epochs": [77]}}, False),
        ({"prediction": own | {"small_regions": {"classes": []}}}, False),
        ({"prediction": own | {"postprocessing": used | {"thresholds": [0.9]}}}, False),
        ({"prediction": own | {"postprocessing": used | {"min_region": [4]}}}, False),
        ({"prediction": own | {"postprocessing": used | {"temperature": 2.0}}}, True),
        ({"prediction": own, "case": "tile"}, False),
        ({"prediction": own, "overlap": 8}, False),
    ]
    for change, is_shown in changes:
        path.write_text(json.dumps(plain | change))
        card, _ = card_of(source, tmp_path)
        assert ("Foreground Dice" in card) is is_shown, change
        assert ("None: these weights have not been evaluated" in card) is not is_shown
    values = Postprocessing((0.9,), (4,))
    fitted = dataclasses.replace(source, postprocessing=Resolved(values))
    alike = used | {"thresholds": [0.9], "min_region": [4]}
    for record, is_shown in ((alike, True), (used, False), (None, False)):
        path.write_text(json.dumps(plain | {"prediction": own | {"postprocessing": record}}))
        assert (model_card.summary_of(fitted) is not None) is is_shown, record
    path.unlink()
    assert "None: these weights" in card_of(source, tmp_path)[0]
