"""A trained run as something to use: what is read, which weights, and what is refused."""

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from flexunet.errors import ContentError, UsageError
from flexunet.storage import LocalStore, open_store
from job.config import ModelConfig, TrainConfig
from job.models.compatibility import image_shape
from job.models.ensemble import predicted_ids, probabilities_of_logits
from job.models.heads import main_model
from job.models.registry import build_model
from job.runs import serialization
from job.runs.layout import CROSS_VALIDATION_NAME
from job.runs.loading import (
    ensemble_member,
    fetch_checkpoint,
    initialize_from,
    load_model,
    model_for,
    open_run,
    take_fitting,
)


def with_model(config: TrainConfig, **changes: int) -> TrainConfig:
    return config.model_copy(update={"model": config.model.model_copy(update=changes)})


def weights_of(model: Any) -> dict[str, np.ndarray]:
    return {path: each.numpy() for path, each in serialization.weights_by_path(model).items()}


def test_open_trained_needs_a_run(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no run here: config\.yaml is missing"):
        open_run(str(tmp_path))


def test_open_trained_names_the_runs_of_a_cross_validation(tmp_path: Path) -> None:
    (tmp_path / CROSS_VALIDATION_NAME).write_text("{}")
    with pytest.raises(UsageError, match=f"a cross-validation has no .* {tmp_path}-fold-0"):
        open_run(str(tmp_path))


def test_open_trained_needs_a_checkpoint(own_run: Path) -> None:
    for member in (own_run / "checkpoints").rglob("COMMIT.json"):
        member.unlink()
    (own_run / "outcome.json").unlink()
    with pytest.raises(
        UsageError, match=r"no checkpoint yet; wait .*the same train command resumes"
    ):
        open_run(str(own_run))
    (own_run / "attempts").mkdir()
    (own_run / "attempts" / "1.json").write_text('{"end": "stopped"}')
    with pytest.raises(UsageError, match="no checkpoint yet; it was stopped before its first one"):
        open_run(str(own_run))


def test_fetch_checkpoint_finds_the_best_and_the_last(trained_run: Path, tmp_path: Path) -> None:
    store = open_store(str(trained_run))
    last, members = fetch_checkpoint(store, str(tmp_path), which="last")
    # 12 samples, one per step, 5 epochs.
    assert last.prefix == "checkpoints/step-00000060/a1"
    state = serialization.read_state(members[serialization.STATE_NAME])
    best, _ = fetch_checkpoint(store, str(tmp_path), which="best")
    assert best.prefix == f"checkpoints/step-{state['best']['step']:08d}/a1"


def test_load_model_takes_an_older_checkpoint_where_the_last_is_damaged(own_run: Path) -> None:
    folders = sorted((own_run / "checkpoints").iterdir())
    weights = folders[-1] / "a1" / serialization.WEIGHTS_NAME
    weights.write_bytes(weights.read_bytes()[:-1])
    load_model(open_run(str(own_run)), which="last")
    for folder in folders:
        (folder / "a1" / serialization.WEIGHTS_NAME).write_bytes(b"")
    with pytest.raises(ContentError, match="no undamaged checkpoint"):
        load_model(open_run(str(own_run)), which="last")


class ReadingStore(LocalStore):
    """A folder that knows which of its objects were read."""

    read: list[str] = []  # noqa: RUF012 - a frozen class; the test empties it

    def get(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        self.read.append(name)
        return super().get(name, start, length)


def test_load_model_reads_the_record_of_a_commit_once(trained_run: Path) -> None:
    run = replace(open_run(str(trained_run)), store=ReadingStore(str(trained_run)))
    ReadingStore.read.clear()
    _, commit = load_model(run, which="last")
    data = (trained_run / commit.prefix / "COMMIT.json").read_bytes()
    assert ensemble_member(run, commit).commit_sha256 == hashlib.sha256(data).hexdigest()
    assert commit.epoch == 5
    assert ReadingStore.read == ["lease.json", f"{commit.prefix}/COMMIT.json"]


def test_padding_is_never_predicted_where_no_class_is_background(trained_run: Path) -> None:
    run = open_run(str(trained_run))
    shape = (1, *image_shape(run.config, run.manifest))
    image = np.random.default_rng(0).uniform(0, 255, shape)
    options = {**run.manifest.options, "background": "none"}
    without = replace(run, manifest=run.manifest.model_copy(update={"options": options}))
    plain, excluded = (load_model(each, which="best")[0](image) for each in (run, without))
    probabilities = probabilities_of_logits(excluded).numpy()
    assert plain.shape[-1] == 2
    assert not probabilities[..., 0].any()
    assert np.array_equal(excluded[..., 1], plain[..., 1])
    assert (predicted_ids(excluded).numpy() == 1).all()


def test_initialize_from_copies_the_best_weights_of_a_run(
    trained_run: Path, tmp_path: Path
) -> None:
    run = open_run(str(trained_run))
    best = load_model(run, which="best")[0]
    _, members = fetch_checkpoint(run.store, str(tmp_path), which="best")
    file = tmp_path / "some.weights.h5"
    shutil.copy(members[serialization.WEIGHTS_NAME], file)
    for source in (str(trained_run), str(file)):
        model = model_for(run.config, run.manifest)
        assert not np.array_equal(model.weights[0], best.weights[0])
        initialize_from(model, source)
        for weight, expected in zip(model.weights, best.weights, strict=True):
            assert np.array_equal(weight, expected)


def test_initialize_from_starts_only_layers_of_other_shapes_anew(
    trained_run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = open_run(str(trained_run))
    best = weights_of(load_model(run, which="best")[0])
    more = replace(run.manifest.classes[1], id=2, name="more")
    other = run.manifest.model_copy(update={"classes": (*run.manifest.classes, more)})
    model = model_for(with_model(run.config, image_channels=3), other)
    before = weights_of(model)
    with caplog.at_level("INFO", "job.runs.loading"):
        initialize_from(model, str(trained_run))
    anew = {"conv2d/kernel", "conv2d/bias", "head/kernel", "head/bias"}
    for name, found in weights_of(model).items():
        assert np.array_equal(found, before[name] if name in anew else best[name]), name
    (record,) = caplog.records
    assert record.message == (
        f"--init-from {trained_run}: took 6 of 8 layers; these start anew: "
        "conv2d kernel 5x5x3x8, bias 8 (there: kernel 5x5x1x8, bias 8), "
        "head kernel 1x1x8x3, bias 3 (there: kernel 1x1x8x2, bias 2)"
    )


def test_heads_for_deep_supervision_are_left_out_or_start_anew(
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = ModelConfig(num_layers=3, base_filters=2, base_kernels=(3, 3))
    supervised = config.model_copy(update={"deep_supervision": 1})
    for ours, theirs, words in (
        (supervised, config, "took 13 of 14 layers; these start anew: head_level_1 kernel 1x1x4x2"),
        (config, supervised, "took 13 of 13 layers; these are not used: head_level_1 kernel"),
    ):
        model, trained = (
            build_model(each, image_shape=(8, 8, 1), num_classes=2, seed=seed)
            for seed, each in enumerate((ours, theirs))
        )
        with caplog.at_level("INFO", "job.runs.loading"):
            take_fitting(model, trained, "RUN")
        assert words in caplog.records[-1].message
        pairs = zip(main_model(model).weights, main_model(trained).weights, strict=True)
        assert all(np.array_equal(found, right) for found, right in pairs)


def test_taking_weights_of_which_none_fits_is_an_error() -> None:
    first, other = (
        keras.Sequential([keras.Input((4, 4, channels)), keras.layers.Conv2D(2, 1)])
        for channels in (1, 2)
    )
    with pytest.raises(ContentError, match="--init-from RUN: no layer of its network fits"):
        take_fitting(first, other, "RUN")


# Keras warns before it fails.
@pytest.mark.filterwarnings("ignore:Skipping nested container:UserWarning")
def test_initialize_from_refuses_another_network(trained_run: Path, tmp_path: Path) -> None:
    run = open_run(str(trained_run))
    model = model_for(with_model(run.config, base_filters=4), run.manifest)
    with pytest.raises(ContentError, match="does not fit this model"):
        initialize_from(model, str(trained_run))
    # All that this one wants is there, and more.
    normalized = model_for(with_model(run.config, normalization="group"), run.manifest)
    normalized.save_weights(tmp_path / "group.weights.h5")
    model = model_for(run.config, run.manifest)
    with pytest.raises(ContentError, match="it has 28 arrays, the model has 16; give"):
        initialize_from(model, str(tmp_path / "group.weights.h5"))


def test_model_for_repeats_grey_and_refuses_to_drop_colour(trained_run: Path) -> None:
    run = open_run(str(trained_run))  # a grey dataset
    grey = with_model(run.config, image_channels=3)
    assert model_for(grey, run.manifest).input_shape == (None, 32, 32, 3)
    colour = run.manifest.model_copy(update={"channels": 3})
    with pytest.raises(UsageError, match=r"--model\.image-channels=1: the dataset has 3 channels"):
        model_for(with_model(run.config, image_channels=1), colour)
