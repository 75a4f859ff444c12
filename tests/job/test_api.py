"""The Python API: what `import flexunet` does with a run that the real command trained."""

import functools
import math
import operator
import os
import signal
import time
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

import flexunet
from data_prep.config import PrepConfig
from data_prep.inspection.config import InspectConfig
from flexunet.settings import Settings
from job.api import options as api_options
from job.config import ModelConfig, TrainConfig
from job.data.dataset import open_dataset
from job.data.reader import read_sample
from job.data.sampling import epoch_order
from job.data.shard_cache import open_reader
from job.distributed import watchdog
from job.evaluation.pipeline import EvaluateConfig
from job.exporting.options import ExportConfig
from job.inference.options import ImageConfig, InferConfig
from job.inference.prediction import find_members, load_predictor
from job.models.ensemble import make_probability_step, network_of, probability_model
from job.models.registry import build_model
from job.runs.loading import open_run
from job.training import loop

SMALL = {"num_layers": 2, "base_filters": 4, "base_kernels": (3, 3)}


@pytest.fixture(scope="module")
def dataset_url(trained_run: Path) -> str:
    return str(trained_run.parents[1] / "dataset")


@pytest.fixture(scope="module")
def run(trained_run: Path) -> flexunet.Run:
    return flexunet.open_run(trained_run)


def train(dataset_url: str, output: Path, **options: Any) -> flexunet.Run:
    values: dict[str, Any] = {
        "data": dataset_url,
        "output": output,
        "name": "a",
        "preset": "reference",
        "epochs": 1,
        "global_batch_size": 4,
        "model": SMALL,
        "prediction_images": 0,
        "tensorboard": False,
        "progress": False,
    }
    return flexunet.train(**(values | options))


def grey(height: int, width: int) -> np.ndarray:
    """Returns noise (h, w) uint8 with a bright rectangle."""
    pixels = np.random.default_rng(height).integers(20, 90, (height, width))
    pixels[height // 4 : height // 2, width // 4 : width // 2] += 120
    return pixels.astype(np.uint8)


def test_a_dataset_is_looked_at_and_read(dataset_url: str) -> None:
    dataset = flexunet.open_dataset(Path(dataset_url))
    assert dataset.url == dataset_url
    assert dataset.splits == {"train": 12, "valid": 4, "test": 4}
    assert dataset.classes == ("background", "mass")
    assert (dataset.image_shape, dataset.dtype) == ((32, 32, 1), np.uint8)
    assert (dataset.value_max, dataset.ignore_id) == (255, None)
    table = dataset.samples
    assert (len(table), table.index.name) == (20, "id")
    assert table["split"].value_counts().to_dict() == dataset.splits
    found = open_dataset(dataset_url)
    for name in dataset.splits:
        split = found.split(name)
        reader = open_reader(found, split, cache="full", cache_dir=None)
        for index, sample in enumerate(split.ids):
            image, mask = dataset.read(sample)
            expected = read_sample(reader, index)
            assert np.array_equal(image, expected[0])
            assert np.array_equal(mask, expected[1])
            assert list(np.bincount(mask.ravel(), minlength=2)) == list(
                table.loc[sample, "pixels_per_class"]
            )


@pytest.mark.parametrize("epoch", [None, 1, 2])
def test_tensorflow_gets_the_samples_in_an_exact_order(dataset_url: str, epoch: int | None) -> None:
    """Stored, or as a run takes them."""
    dataset = flexunet.open_dataset(dataset_url)
    split = open_dataset(dataset_url).split("train")
    order, options = np.arange(12), {}
    if epoch is not None:
        order = epoch_order(split.has_foreground, None, seed=5, epoch=epoch - 1, version=2)
        options = {"shuffle": True, "seed": 5, "epoch": epoch}
        assert not np.array_equal(order, np.arange(12))
    samples = dataset.as_tf_dataset("train", **options)
    assert len(samples) == 12
    assert samples.element_spec == (
        tf.TensorSpec((32, 32, 1), tf.uint8),
        tf.TensorSpec((32, 32), tf.uint8),
    )
    for index, (image, mask) in zip(order, samples, strict=True):
        expected = dataset.read(split.ids[index])
        assert np.array_equal(image, expected.image)
        assert np.array_equal(mask, expected.mask)


def test_what_a_dataset_lacks_is_a_usage_error(dataset_url: str, tmp_path: Path) -> None:
    dataset = flexunet.open_dataset(dataset_url)
    with pytest.raises(flexunet.UsageError, match="no sample 'disc-0'; did you mean 'disc-"):
        dataset.read("disc-0")
    with pytest.raises(flexunet.UsageError, match="split 'tset' has no samples"):
        dataset.as_tf_dataset("tset")
    for options, problem in (
        ({"epoch": 0}, "epoch=0: epochs count from 1"),
        ({"seed": -1}, "seed=-1: give an integer"),
        ({"cache": "range"}, "cache='range': give 'full' or 'ranges'"),
    ):
        with pytest.raises(flexunet.UsageError, match=problem):
            dataset.as_tf_dataset("train", shuffle=True, **options)  # type: ignore[arg-type]
    with pytest.raises(flexunet.UsageError, match=r"dataset\.json"):
        flexunet.open_dataset(tmp_path)
    with pytest.raises(flexunet.UsageError, match="'img_size'; did you mean 'image_size'"):
        flexunet.prepare(tmp_path, tmp_path / "ds", img_size=32)  # type: ignore[call-arg]


def test_train_sends_events_and_returns_the_run(dataset_url: str, tmp_path: Path) -> None:
    events: list[flexunet.Event] = []
    run = train(dataset_url, tmp_path, epochs=2, on_event=events.append)
    url = str(tmp_path / "a")
    assert run.url == url
    assert events[0] == flexunet.TrainingStarted(
        run=url, num_epochs_done=0, num_epochs=2, num_steps=3, attempt=1
    )
    steps = [each for each in events if isinstance(each, flexunet.StepEnded)]
    places = [(each.epoch, each.step) for each in steps]
    assert places == [(epoch, step) for epoch in (1, 2) for step in (1, 2, 3)]
    epochs = [each for each in events if isinstance(each, flexunet.EpochEnded)]
    assert [each.epoch for each in epochs] == list(run.history.index) == [1, 2]
    for each in epochs:
        assert run.history.loc[each.epoch].to_dict() == pytest.approx(dict(each.metrics))
    stored = [each for each in events if isinstance(each, flexunet.CheckpointStored)]
    assert [(each.num_epochs_done, each.step) for each in stored] == [(1, 0), (2, 0)]
    assert all((tmp_path / "a" / each.checkpoint).is_dir() for each in stored)
    evaluation, end = events[-2:]
    assert isinstance(evaluation, flexunet.EvaluationEnded)
    assert evaluation.summary == run.summary
    assert end == flexunet.TrainingEnded("finished")
    # The same call finds it finished.
    events.clear()
    assert train(dataset_url, tmp_path, epochs=2, on_event=events.append).status == "finished"
    assert events == []


class WorkError(Exception):
    """Raised by an `on_event`."""


def refuse() -> None:
    raise WorkError


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(
    ("work", "error"), [(refuse, WorkError), (interrupt, flexunet.StoppedError)]
)
def test_ctrl_c_and_an_error_of_on_event_store_a_checkpoint_first(
    work: Callable[[], None], error: type[Exception], dataset_url: str, tmp_path: Path
) -> None:
    events: list[flexunet.Event] = []

    def on_event(event: flexunet.Event) -> None:
        events.append(event)
        if isinstance(event, flexunet.StepEnded) and event.step == 2:
            work()

    with pytest.raises(error):
        train(dataset_url, tmp_path, on_event=on_event)
    run = flexunet.open_run(tmp_path / "a")
    assert run.status == "stopped"
    last = events[-1]
    if error is WorkError:
        assert isinstance(last, flexunet.StepEnded)  # no event after the error
    else:
        assert last == flexunet.TrainingEnded("stopped")
        stored = flexunet.CheckpointStored(0, 2, "checkpoints/step-00000002/a1")
        assert events[-2] == stored
    # The handler of the program is back, and the same call resumes.
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    events.clear()
    assert train(dataset_url, tmp_path, on_event=events.append).status == "finished"
    start = events[0]
    assert isinstance(start, flexunet.TrainingStarted)
    assert (start.num_epochs_done, start.attempt) == (0, 2)
    steps = [each.step for each in events if isinstance(each, flexunet.StepEnded)]
    assert steps == [3]


def test_a_second_ctrl_c_ends_at_once_without_a_checkpoint(
    dataset_url: str, tmp_path: Path
) -> None:
    events: list[flexunet.Event] = []

    def on_event(event: flexunet.Event) -> None:
        events.append(event)
        if isinstance(event, flexunet.StepEnded):
            interrupt()
            interrupt()

    with pytest.raises(KeyboardInterrupt):
        train(dataset_url, tmp_path, on_event=on_event)
    assert [type(each) for each in events] == [
        flexunet.TrainingStarted,
        flexunet.StepEnded,
        flexunet.TrainingEnded,
    ]
    assert events[-1] == flexunet.TrainingEnded("failed")
    with pytest.raises(flexunet.UsageError, match="no checkpoint yet"):
        flexunet.open_run(tmp_path / "a")


def test_a_stall_is_an_error_of_the_log_and_does_not_end_the_process(
    dataset_url: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(watchdog, "_TICK_S", 0.05)
    done: list[int] = []

    def slow_tick(clock: loop._Clock, num_images: int) -> None:
        done.append(num_images)
        if len(done) == 2:
            time.sleep(1.5)

    monkeypatch.setattr(loop._Clock, "tick", slow_tick)
    run = train(dataset_url, tmp_path, step_timeout=1)
    assert run.status == "finished"
    (line,) = [each for each in caplog.messages if "end this process" in each]
    (stacks,) = (tmp_path / "a" / "stacks").iterdir()
    assert str(stacks) in line
    assert "in slow_tick" in stacks.read_text()


def test_a_slow_on_event_is_no_stall(
    dataset_url: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(watchdog, "_TICK_S", 0.05)

    def on_event(event: flexunet.Event) -> None:
        if isinstance(event, flexunet.StepEnded) and event.step == 2:
            time.sleep(1.5)

    assert train(dataset_url, tmp_path, step_timeout=1, on_event=on_event).status == "finished"
    assert not [line for line in caplog.messages if "in: epoch 1" in line]


def test_an_error_of_on_event_at_the_end_is_raised_of_a_finished_run(
    dataset_url: str, tmp_path: Path
) -> None:
    def on_event(event: flexunet.Event) -> None:
        if isinstance(event, flexunet.TrainingEnded):
            raise WorkError

    with pytest.raises(WorkError):
        train(dataset_url, tmp_path, on_event=on_event)
    assert flexunet.open_run(tmp_path / "a").status == "finished"


def test_a_divergence_does_not_hide_the_error_of_on_event(dataset_url: str, tmp_path: Path) -> None:
    def on_event(event: flexunet.Event) -> None:
        if isinstance(event, flexunet.StepEnded) and not math.isfinite(event.loss):
            raise WorkError

    options = {"optimizer": {"learning_rate": 1e30, "clipvalue": None}, "epochs": 5}
    with pytest.raises(flexunet.DivergedError) as caught:
        train(dataset_url, tmp_path, on_event=on_event, **options)
    assert isinstance(caught.value.__cause__, WorkError)


def test_a_run_that_diverges_says_so_in_its_last_event(dataset_url: str, tmp_path: Path) -> None:
    events: list[flexunet.Event] = []
    with pytest.raises(flexunet.DivergedError, match="the loss became"):
        train(
            dataset_url,
            tmp_path,
            on_event=events.append,
            optimizer={"learning_rate": 1e30, "clipvalue": None},
            epochs=5,
        )
    assert events[-1] == flexunet.TrainingEnded("diverged")


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"batch_size": 4}, "unknown option 'batch_size'; did you mean 'global_batch_size'?"),
        ({"lr": 0.1}, "did you mean optimizer={'learning_rate': ...}?"),
        ({"epochs": 0}, r"flexunet.train(): epochs=0: input should be greater"),
        ({"data": None}, "no dataset: give data=DATASET, a folder"),
        ({"folds": 3}, "train(folds=3) would train several runs"),
        ({"config": "missing.yaml"}, "--config missing.yaml: does not exist"),
    ],
)
def test_what_train_cannot_do_is_a_usage_error(
    options: dict[str, Any], problem: str, dataset_url: str, tmp_path: Path
) -> None:
    with pytest.raises(flexunet.UsageError) as caught:
        train(dataset_url, tmp_path, **options)
    assert problem in str(caught.value)
    assert not (tmp_path / "a").exists()


def test_train_takes_a_file_and_options_win_over_it(dataset_url: str, tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("epochs: 7\nmodel: {num_layers: 2, base_filters: 2}\n")
    model = ModelConfig(base_filters=4, base_kernels=(3, 3))
    run = train(dataset_url, tmp_path, config=file, model=model)
    assert (run.config.epochs, run.config.model.num_layers) == (1, 2)
    assert run.config.model.base_filters == 4


def test_a_run_reports_its_numbers(run: flexunet.Run, trained_run: Path, dataset_url: str) -> None:
    assert isinstance(run.config, TrainConfig)
    assert (run.url, run.status, run.config.epochs) == (str(trained_run), "finished", 5)
    assert "discs: finished" in repr(run)
    history = run.history
    assert list(history.index) == [1, 2, 3, 4, 5]
    assert history["val_loss"].iloc[-1] < history["val_loss"].iloc[0]
    assert run.summary is not None
    assert run.summary["num_cases"] == len(run.summary.cases) == 4
    assert run.summary.url == str(trained_run / "evaluation")
    assert run.summary.cases.index.name == "id"
    assert run.open_dataset().url == dataset_url


def test_a_loaded_model_computes_what_infer_computes(run: flexunet.Run, dataset_url: str) -> None:
    images = np.stack(
        [image for image, _ in flexunet.open_dataset(dataset_url).as_tf_dataset("test")]
    )
    trained = open_run(run.url)
    predictor = load_predictor(find_members([trained], "best"), "none", needs_gpu=False)
    for which in ("best", "last"):
        model = run.load_model(which)
        assert type(model) is type(keras.Model(model.inputs, model.outputs))
        found = model(images)
        assert (found.dtype, found.shape) == (tf.float32, (4, 32, 32, 2))
        assert np.abs(found - model.predict(images, verbose=0)).max() <= 1e-6
        assert np.abs(np.sum(found, axis=-1) - 1).max() <= 1e-6
        if which == "best":
            assert np.abs(found - predictor.step(images)).max() <= 1e-6
        assert model(images[:1]).shape == (1, 32, 32, 2)


@pytest.mark.parametrize("normalization", ["none", "group", "batch"])
def test_a_model_of_16_bits_and_other_channels_is_saved_as_a_whole(
    normalization: str, tmp_path: Path
) -> None:
    config = ModelConfig(**SMALL, normalization=normalization)  # type: ignore[arg-type]
    inner = build_model(config, image_shape=(16, 16, 3), num_classes=1, value_max=4095.0)
    model = probability_model(inner, 1, 16)
    images = np.random.default_rng(1).integers(0, 4096, (3, 16, 16, 1)).astype(np.uint16)
    expected = make_probability_step(network_of([inner]))(images)
    assert model.input_shape == (None, 16, 16, 1)
    assert np.abs(model(images) - expected).max() <= 1e-6
    model.save(tmp_path / "a.keras")
    again = keras.models.load_model(tmp_path / "a.keras")
    assert np.array_equal(again(images), model(images))


@pytest.fixture(scope="module")
def images() -> dict[str, np.ndarray]:
    """Returns images of several kinds by file name, sorted."""
    wide, deep = grey(48, 80), grey(64, 64)
    return {
        "colour.png": cv2.merge([wide, wide // 2, wide]),
        "deep.tif": deep.astype(np.uint16) * 257,
        "sub/grey.png": grey(32, 32),
        "tall.bmp": grey(90, 45),
    }


@pytest.fixture(scope="module")
def folder(images: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("images")
    for name, pixels in images.items():
        (found / name).parent.mkdir(exist_ok=True)
        assert cv2.imwrite(str(found / name), pixels)
    return found


@pytest.mark.parametrize("options", [{}, {"window": "sliding", "flips": "both"}])
def test_predict_gives_the_masks_of_infer(
    options: dict[str, Any],
    run: flexunet.Run,
    images: dict[str, np.ndarray],
    folder: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    result = flexunet.infer(run, folder, tmp_path / "masks", progress=False, **options)
    masks = {
        name: np.asarray(Image.open(mask)) for name, mask in zip(images, result.masks, strict=True)
    }
    assert any(mask.any() for mask in masks.values())
    caplog.clear()
    for name, pixels in images.items():
        array = pixels[..., ::-1] if pixels.ndim == 3 else pixels  # BGR
        found = run.predict(array, **options)
        assert (found.dtype, found.shape) == (np.uint8, pixels.shape[:2])
        assert np.array_equal(found, masks[name]), name
        assert np.array_equal(run.predict(folder / name, **options), masks[name]), name
    # Once, not for each call.
    assert sum("in colour (RGB)" in line for line in caplog.messages) <= 1
    predicted = dict(run.predict(folder, **options))
    assert list(predicted) == sorted(images)
    for name, mask in predicted.items():
        assert np.array_equal(mask, masks[name]), name


@pytest.mark.parametrize("options", [{}, {"window": "sliding"}])
def test_predict_gives_probabilities_on_request(options: dict[str, Any], run: flexunet.Run) -> None:
    image = grey(50, 70)
    mask, probabilities = run.predict(image, probabilities=True, **options)
    assert (probabilities.dtype, probabilities.shape) == (np.float32, (50, 70, 2))
    assert np.abs(probabilities.sum(axis=-1) - 1).max() <= 1e-5
    assert np.array_equal(mask, run.predict(image, **options))
    assert np.array_equal(mask, probabilities.argmax(axis=-1))


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((8, 8), np.float32),
        np.zeros((8, 8, 4), np.uint8),
        np.zeros((2, 8, 8, 1), np.uint8),
        np.zeros((0, 8), np.uint8),
        np.zeros(8, np.uint8),
    ],
)
def test_an_array_that_is_no_image_is_refused(run: flexunet.Run, array: np.ndarray) -> None:
    with pytest.raises(flexunet.UsageError, match=r"an array of shape .* uint8 or uint16"):
        run.predict(array)


def test_what_predict_cannot_do_is_an_error(run: flexunet.Run, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "broken.png").write_bytes(b"x")
    for path, error, problem in (
        (
            tmp_path / "none",
            flexunet.UsageError,
            "none: does not exist; give an image or a folder of",
        ),
        (tmp_path / "notes.txt", flexunet.UsageError, "not an image"),
        (tmp_path / "broken.png", flexunet.ContentError, "broken.png"),
    ):
        with pytest.raises(error, match=problem):
            run.predict(path)
    with pytest.raises(flexunet.ContentError, match=r"broken\.png"):
        list(run.predict(tmp_path))
    with pytest.raises(flexunet.UsageError, match="for an array or a file"):
        run.predict(tmp_path, probabilities=True)
    with pytest.raises(flexunet.UsageError, match="'tta'; did you mean 'flips'"):
        run.predict(tmp_path, tta=True)  # type: ignore[call-overload]
    with pytest.raises(flexunet.UsageError, match="unknown option 'overlays'"):
        run.predict(tmp_path, overlays=False)  # type: ignore[call-overload]


def test_evaluate_returns_what_it_writes(own_run: Path, tmp_path: Path) -> None:
    summary = flexunet.evaluate(own_run, split="valid", progress=False)
    assert isinstance(summary, flexunet.EvaluationSummary)
    assert summary.url == str(own_run / "evaluation" / "valid")
    assert summary["split"] == "valid"
    assert len(summary.cases) == summary["num_cases"] == 4
    run = flexunet.open_run(own_run)
    again = flexunet.evaluate(run, flips="both", output=tmp_path / "e", progress=False)
    assert again["prediction"]["flips"] == "both"
    assert run.summary is not None
    assert "prediction" not in run.summary  # still that of training
    with pytest.raises(flexunet.UsageError, match="'tta'; did you mean 'flips'"):
        flexunet.evaluate(run, tta=True)  # type: ignore[call-arg]


def test_write_report_returns_where_it_is(own_run: Path, tmp_path: Path) -> None:
    (own_run / "report.html").unlink()
    assert flexunet.write_report(own_run) == str(own_run / "report.html")
    assert "discs" in (own_run / "report.html").read_text()
    with pytest.raises(flexunet.UsageError, match=r"config\.yaml is missing"):
        flexunet.write_report(tmp_path)


def test_a_bucket_holds_everything_too(remote: str) -> None:
    dataset = flexunet.open_dataset(remote)
    name = dataset.samples.index[0]
    assert dataset.read(name).image.shape == (32, 32, 1)


def argument_kind(kind: Any, *, is_path: bool) -> Any:
    """Returns the type of the keyword argument of a field: tuples as sequences, paths, groups."""
    if isinstance(kind, type) and issubclass(kind, Settings):
        return kind | Mapping[str, Any]
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        kinds = [argument_kind(each, is_path=is_path) for each in typing.get_args(kind)]
        return functools.reduce(operator.or_, kinds)
    if typing.get_origin(kind) is tuple:
        return Sequence[argument_kind(typing.get_args(kind)[0], is_path=is_path)]
    return str | os.PathLike[str] if is_path and kind is str else kind


@pytest.mark.parametrize(
    ("keywords", "settings"),
    [
        (api_options.InspectOptions, InspectConfig),
        (api_options.PrepOptions, PrepConfig),
        (api_options.TrainOptions, TrainConfig),
        (api_options.EvaluateOptions, EvaluateConfig),
        (api_options.ImageOptions, ImageConfig),
        (api_options.InferOptions, InferConfig),
        (api_options.ExportOptions, ExportConfig),
    ],
)
def test_keyword_arguments_are_typed_as_the_settings_are(
    keywords: Any, settings: type[Settings]
) -> None:
    hints = typing.get_type_hints(keywords)
    fields = settings.model_fields
    assert hints.keys() == fields.keys()
    for name, field in fields.items():
        is_path = bool((field.json_schema_extra or {}).get("path"))  # type: ignore[union-attr]
        assert hints[name] == argument_kind(field.annotation, is_path=is_path), name
