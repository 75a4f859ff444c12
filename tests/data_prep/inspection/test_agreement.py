"""`inspect` and `prep` without options agree about masks of any encoding: exit 0, 2 or 3."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from data_prep.config import PrepConfig
from data_prep.inspection.config import InspectConfig
from data_prep.inspection.pipeline import inspect_source
from data_prep.pipeline import prepare_source
from flexunet.errors import ContentError, UsageError
from tests.data_prep.inspection.test_questions import parsed
from tests.data_prep.masks.drawn_masks import colors_of, compressed, random_classes, random_ids
from tests.data_prep.masks.made_masks import (
    grey_file,
    image_file,
    outlined,
    palette_file,
)

SIDE, NUM, SEED = 96, 4, 3
ENCODINGS = ("ids", "ids and a border", "black and white", "levels", "palette", "colours", "alpha")
CHANGES = ("none", "resized", "jpeg", "one level off", "spot", "spot in one file", "one id more")


@pytest.fixture(autouse=True)
def without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_prep.pipeline.write_report", lambda *_: None)


def drawn(rng: np.random.Generator, encoding: str, change: str) -> list[bytes]:
    """Returns mask files of one random dataset."""
    number = 2 if encoding in ("black and white", "alpha") else int(rng.integers(2, 7))
    truth = [random_ids(rng, number, SIDE) for _ in range(NUM)]
    for class_id in range(number):
        cv2.circle(truth[class_id % NUM], (20 + 11 * class_id, 20), 7, class_id, -1)
    colors = colors_of(random_classes(rng, number))
    if encoding in ("ids", "ids and a border"):
        colors = np.repeat(np.arange(number)[:, np.newaxis], 3, axis=1)
    elif encoding in ("black and white", "levels", "alpha"):
        colors = np.repeat(np.linspace(0, 255, number).astype(int)[:, np.newaxis], 3, axis=1)
    if change == "one id more":
        truth[0][40:44, 40:43] = number
        colors = np.vstack([colors, [colors[-1] - rng.integers(1, 60)]]).clip(0, 255)
    if encoding == "palette":
        return [palette_file(ids, colors.ravel().tolist()) for ids in truth]
    pixels = [colors.astype(np.uint8)[ids] for ids in truth]
    if encoding == "ids and a border":
        pixels = [np.repeat(outlined(each[..., 0])[..., np.newaxis], 3, axis=2) for each in pixels]
    pixels = changed(rng, pixels, change)
    if encoding == "alpha":
        white = np.full((*pixels[0].shape[:2], 3), 255, np.uint8)
        return [image_file(Image.fromarray(np.dstack([white, each[..., 0]]))) for each in pixels]
    if encoding == "colours":
        return [image_file(Image.fromarray(each)) for each in pixels]
    return [grey_file(each[..., 0]) for each in pixels]


def changed(rng: np.random.Generator, pixels: list[np.ndarray], change: str) -> list[np.ndarray]:
    """Returns the masks (H, W, 3) as tools change them."""
    if change == "resized":
        method = int(rng.choice([cv2.INTER_AREA, cv2.INTER_LINEAR, cv2.INTER_CUBIC]))
        size = (int(SIDE * rng.uniform(0.5, 1.6)),) * 2
        return [np.asarray(cv2.resize(each, size, interpolation=method)) for each in pixels]
    if change == "jpeg":
        return [compressed(int(rng.integers(60, 96)))(each) for each in pixels]
    spots = range(1) if change == "spot in one file" else range(NUM)
    if change.startswith("spot"):
        height, width = rng.integers(1, 9, 2)
        value = pixels[0].max() - rng.integers(1, 60)
        for i in spots:
            pixels[i][30 : 30 + height, 30 : 30 + width] = value
    if change == "one level off":
        for i in range(0, NUM, 2):
            pixels[i][pixels[i] == pixels[i].max()] -= 1
    return pixels


def write(folder: Path, files: list[bytes]) -> str:
    from data_prep.imaging.codecs import read_image

    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i, data in enumerate(files):
        shape = read_image(data, name="m").shape[:2]
        image = rng.integers(0, 256, shape, dtype=np.uint8)
        (folder / "images" / f"{i}.png").write_bytes(grey_file(image))
        (folder / "masks" / f"{i}.png").write_bytes(data)
    return str(folder)


def exit_code(source: str, output: Path, config: PrepConfig) -> int:
    """Returns the exit code of `prep`."""
    try:
        prepare_source(source, str(output), config, progress=False)
    except UsageError:
        return 2
    except ContentError:
        return 3
    return 0


def outcome(source: str, folder: Path) -> tuple[int, int, list[tuple[str, int]]]:
    """Returns the exit codes of `inspect`, of `prep` without options, and of each answer.

    Without a question, the proposed command has the options that `prep` finds.
    """
    found, _ = inspect_source(source, InspectConfig(num_processes=1), progress=False)
    plain = PrepConfig(image_size=32, num_processes=1)
    commands: dict[str, str] = {}
    for question in found.questions:
        commands |= {each.command: each.text for each in question.answers}
    codes = []
    for i, (command, text) in enumerate(commands.items()):
        config = parsed(command)[2].model_copy(update={"num_processes": 1, "image_size": 32})
        codes.append((text, exit_code(source, folder / f"answer{i}", config)))
    return found.exit_code, exit_code(source, folder / "plain", plain), codes


OF_PIXELS = ("none", "spot in one file", "one id more")  # changes of palettes and alpha


@pytest.mark.parametrize(
    ("encoding", "change"),
    [
        (encoding, change)
        for encoding in ENCODINGS
        for change in (OF_PIXELS if encoding in ("palette", "alpha") else CHANGES)
    ],
)
def test_inspect_and_prep_agree(tmp_path: Path, encoding: str, change: str) -> None:
    rng = np.random.default_rng([ENCODINGS.index(encoding), CHANGES.index(change), SEED])
    source = write(tmp_path / "source", drawn(rng, encoding, change))
    inspected, plain, answers = outcome(source, tmp_path)
    assert inspected == plain
    if inspected == 2:  # the proposed command works, if any does
        assert not answers or answers[0][1] == min(code for _, code in answers), answers
    else:
        assert all(code == 0 for _, code in answers), answers
