"""TensorBoard's event files: what it reads from them, once per epoch, also after a kill."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.masks.color_map import ClassColor
from flexunet.storage import LocalStore
from job.trackers.overlays import overlay_jpeg
from job.trackers.tensorboard import (
    EventLog,
    curve_counts,
    probability_histogram,
    shows_epoch,
)
from tests.job.tracked import steps_by_run

CLASSES = (
    ClassColor(id=0, name="background", color=(0, 0, 0)),
    ClassColor(id=1, name="mass", color=(255, 0, 0)),
    ClassColor(id=2, name="wire", color=(0, 0, 128)),
)


def test_a_curve_counts_the_pixels_at_least_as_probable_as_each_threshold() -> None:
    random = np.random.default_rng(3)
    probabilities = random.random(500).astype(np.float32)
    probabilities[:6] = [0.0, 1.0, 0.5, 1 / 128, np.nextafter(np.float32(0.5), np.float32(0)), 0.25]
    is_true = random.random(500) < probabilities
    histogram = probability_histogram(probabilities[:200], is_true[:200])
    histogram = histogram + probability_histogram(probabilities[200:], is_true[200:])
    counts = curve_counts(histogram)
    for index, threshold in enumerate(np.linspace(0, 1, 129)):
        found = probabilities >= threshold
        expected = [found & is_true, found & ~is_true, ~found & ~is_true, ~found & is_true]
        values = [counts[key][index] for key in ("tp", "fp", "tn", "fn")]
        assert values == [each.sum() for each in expected]
    assert counts["recall"][0] == 1
    nothing = curve_counts(probability_histogram(np.zeros(4, np.float32), np.zeros(4, bool)))
    assert (nothing["precision"][-1], nothing["recall"][-1]) == (1, 0)


@pytest.mark.parametrize("shape", [(64, 96, 1), (500, 1000, 3), (40, 30, 5)])
def test_an_overlay_is_small_and_shows_truth_and_prediction(shape: tuple[int, ...]) -> None:
    image = np.full(shape, 1000 if shape[2] == 5 else 100, np.uint16 if shape[2] == 5 else np.uint8)
    truth = np.zeros(shape[:2], np.uint8)
    truth[10:25, 5:20] = 1
    height, width, data = overlay_jpeg(image, np.zeros_like(truth), truth, CLASSES)
    assert 192 < max(height, (width - 8) // 2) <= 384
    pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    assert pixels.shape == (height, width, 3)
    red = (pixels[..., 0] - pixels[..., 2]) > 60
    assert red[:, : width // 2].any()
    assert not red[:, width // 2 + 8 :].any()
    alone = overlay_jpeg(image, truth, None, CLASSES)
    assert alone[:2] == (height, (width - 8) // 2)


def test_long_runs_show_fewer_epochs() -> None:
    shown = [epoch + 1 for epoch in range(1024) if shows_epoch(epoch)]
    assert shown[:34] == [*range(1, 33), 34, 36]
    assert shown[46:50] == [62, 64, 68, 72]
    assert (len(shown), shown[-1]) == (112, 1024)


def test_every_epoch_is_there_once_after_a_kill(tmp_path: Path) -> None:
    run = LocalStore(str(tmp_path / "run"))
    image = np.zeros((16, 16, 1), np.uint8)
    truth = (np.arange(256).reshape(16, 16) // 100).astype(np.uint8)
    truth[0] = 255  # ignored
    probabilities = np.full((16, 16, 3), 1 / 3, np.float32)

    def attempt(number: int, first: int, last: int) -> None:
        (tmp_path / f"{number}").mkdir()
        log = EventLog(str(tmp_path / f"{number}"), number, CLASSES, run.put)
        log.write_numbers([{"epoch": epoch, "loss": 1.0, "x": None} for epoch in range(first)])
        log.forget_others(run, first)
        for epoch in range(first, last):
            for name in "abcdef":
                log.add_case(name, image, truth if name != "f" else None, truth, probabilities)
            log.put_epoch(epoch)
            log.write_numbers([{"epoch": epoch, "loss": 1.0, "val_dice/mass": 0.5}])
        log.close()

    attempt(1, 0, 3)
    attempt(2, 2, 4)  # epoch 2 was stored, but not its checkpoint
    found = steps_by_run(tmp_path / "run" / "tensorboard")
    assert set(found) == {"attempt-2", "validation"}
    assert found["attempt-2"] == {"loss": [0, 1, 2, 3], "val_dice/mass": [2, 3]}
    curves = {f"precision_recall/{name}/pr_curves" for name in ("mass", "wire")}
    assert set(found["validation"]) == curves | {f"overlays/{name}" for name in "abcd"}
    assert all(steps == [0, 1, 2, 3] for steps in found["validation"].values())
    files = [each.size for each in run.list("tensorboard/validation/")]
    assert len(files) == 4
    assert max(files) < 200_000
    empty = EventLog(str(tmp_path / "2"), 2, CLASSES, run.put)
    empty.put_epoch(4)
    assert len(run.list("tensorboard/validation/")) == 4
    empty.close()
