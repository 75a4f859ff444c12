"""The summary of an evaluation and the lines of epochs fit a terminal."""

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from flexunet.progress import Progress, sent_by
from job.config import TrainConfig
from job.metrics.confusion import summarize
from job.metrics.per_case import Scale, measure_case, summarize_cases
from job.reporting.summary_tables import show_summary
from job.reporting.training_display import TrainingDisplay


@pytest.mark.parametrize("name", ["mass", "architectural distortion", "a" * 70, "[red]"])
def test_tables_of_a_summary_fit_a_terminal(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    random = np.random.default_rng(0)
    masks = (random.random((10, 2, 64, 64)) < 0.3).astype(np.uint8)
    cases = [measure_case(*pair, 3, Scale((9.0, 9.0), "mm")) for pair in masks]
    sizes = summarize_cases(cases, [str(index) for index in range(10)], [name, "cyst"])
    summary = summarize(np.full((1000, 3, 4), 7)) | {"split": "test", "sizes": {"network": sizes}}
    for each, label in zip(summary["classes"], ("background", name, "cyst"), strict=True):
        each |= {"name": label, "num_empty": 1 + each["id"]}
    show_summary(summary)
    text = capsys.readouterr().out
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "mean over 997 to 998 of 1000" in text
    assert (
        "Images where neither the truth nor the prediction has the class are not counted "
        "(2 to 3 of 1000)."
    ) in " ".join(text.split())
    assert "Dice, mean ┃ Dice, pooled ┃" in text
    assert text.count("Dice, mean over images") == 3  # foreground and both classes
    assert name.replace(" ", "") in "".join(part for part in text.split() if part != "│")


def test_many_classes_have_a_row_each(capsys: pytest.CaptureFixture[str]) -> None:
    random = np.random.default_rng(0)
    names = ["sign symbol", *(f"class {n}" for n in range(2, 8)), "a" * 40, "[red]", "car", "x"]
    masks = random.integers(0, 12, (6, 2, 32, 32)).astype(np.uint8)
    cases = [measure_case(*pair, 12, Scale((1.0, 1.0), "px")) for pair in masks]
    sizes = summarize_cases(cases, list("abcdef"), names)
    summary = summarize(np.full((6, 12, 4), 7)) | {"split": "test", "sizes": {"network": sizes}}
    for each, label in zip(summary["classes"], ("background", *names), strict=True):
        each["name"] = label
    show_summary(summary)
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines) < 75
    for size in (sizes["classes"][0], sizes["classes"][9]):
        dice = size["dice_mean"]
        interval = f"{dice['low']:.4f} to {dice['high']:.4f}"
        (line,) = (each for each in lines if interval in each)
        assert size["name"] in line
        for name in ("dice_mean", "lesion_sensitivity", "hd95_px", "nsd_px"):
            assert f"{size[name]['value']:.4f}" in line


def test_names_with_brackets_are_shown_where_no_case_has_foreground(
    capsys: pytest.CaptureFixture[str],
) -> None:
    summary = summarize(np.zeros((10, 2, 4), int)) | {"split": "test"}
    for each, label in zip(summary["classes"], ("background", "[red]"), strict=True):
        each |= {"name": label, "num_false_alarms": 3}
    show_summary(summary)
    assert "False alarms: [red] in 3 of" in " ".join(capsys.readouterr().out.split())


def test_the_line_of_an_epoch_fits_a_terminal(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    step = {"epoch": 998, "step": 1, "num_epochs": 1000, "epoch_images": 4, "num_images": 4}
    epoch = {"loss": 1.5, "val_loss": 1.25, "learning_rate": 1e-4, "val_foreground_dice": 0.5}
    with TrainingDisplay(TrainConfig(data="data")) as display:
        display.report({"event": "step", "loss": 1.0, **step})
        display.report({"event": "epoch", **step, **epoch})
    (line,) = (text for text in caplog.messages if "val: loss 1.2500" in text)
    assert line.startswith("epoch 999/1000 ")
    assert line.endswith(" foreground Dice 0.5000")
    assert len(line) <= 80


def test_the_progress_of_a_worker_is_shown_between_the_steps(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    step = {"event": "step", "epoch": 0, "step": 1, "num_epochs": 1, "epoch_images": 4}
    step |= {"num_images": 4, "loss": 1.0}
    sent: list[Mapping[str, Any]] = []
    with sent_by(sent.append), Progress("evaluate test", 3, unit="cases") as bar:
        bar.advance(3)
    with TrainingDisplay(TrainConfig(data="data")) as display:
        display.report({**sent[0], "title": "cache"})  # and its worker is killed
        display.report(step)
        display.report(sent[0])  # not beside the bar of the steps
        display.report({"event": "phase", "name": "evaluation", "needs_peers": True})
        caplog.clear()
        for event in sent:
            display.report(event)
        assert caplog.messages == ["evaluate test: 3/3 cases"]
        display.report(sent[0])  # and the driver is interrupted
    with TrainingDisplay(TrainConfig(data="data", progress=False)) as display:
        caplog.clear()
        for event in sent:
            display.report(event)
    assert not caplog.messages
