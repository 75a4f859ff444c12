"""The page about a run, as text and as headless Chromium shows it."""

import csv
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flexunet.errors import ContentError
from flexunet.storage import open_store
from flexunet.tables import csv_table
from job.report import main
from job.reporting.html_report import render, write_report
from job.reporting.summary_tables import show_summary
from job.train import show_end


class Page(HTMLParser):
    """The tags, their attributes and addresses, and the words of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.attributes: set[str] = set()
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {key for key, _ in attributes}
        self.addresses += [str(value) for key, value in attributes if key in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.words += f" {data}"


def become_fold(run: Path) -> None:
    config = run / "config.yaml"
    text = config.read_text()
    config.write_text(text.replace("fold: null", "fold: 1").replace("folds: null", "folds: 3"))


def page_of(run: Path) -> Page:
    return Page(render(open_store(str(run))))


def test_page_says_how_cases_were_predicted(own_run: Path) -> None:
    path = own_run / "evaluation" / "summary.json"
    summary = json.loads(path.read_text())
    assert "Mean of" not in render(open_store(str(own_run)))
    fit = {"name": "mass", "min_pixels": 37, "dice_before": 0.5, "dice": 0.75}
    regions = {"fitted_on": {"split": "valid", "num_cases": 4}, "classes": [fit]}
    runs = [{"run": "runs/a"}, {"run": "runs/<b>"}]
    summary["prediction"] = {"runs": runs, "flips": "both", "small_regions": regions}
    path.write_text(json.dumps(summary | {"case": "tile"}))
    page = render(open_store(str(own_run)))
    assert "Mean of 2 runs: runs/a, runs/&lt;b&gt;." in page
    assert "Mean over mirrored images (--flips): both." in page
    assert "fitted on 4 images of the valid split" in page
    assert '<td>mass</td><td class="number">37</td><td class="number">0.5000</td>' in page
    assert "Every tile counts as one image" in page


def test_page_needs_no_network_and_no_script(trained_run: Path) -> None:
    page = page_of(trained_run)
    # Panel and overlay of four cases, and three curves.
    assert page.tags.count("img") == 11
    assert all(address.startswith(("data:image/", "#")) for address in page.addresses)
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert "url(" not in render(open_store(str(trained_run)))


def test_page_shows_what_the_run_has_stored(trained_run: Path) -> None:
    summary = json.loads((trained_run / "evaluation" / "summary.json").read_text())
    mass = summary["sizes"]["network"]["classes"][0]
    words = page_of(trained_run).words
    for text in (
        f"{mass['dice_mean']['value']:.4f}",
        "no interval if fewer than 5 groups have the measure",
        f"{mass['hd95_px']['all_background']:.4f}",  # the diagonal of 32x32 pixels
        "no groups were given",
        "an IoU of at least 0.1; one region finds at most one lesion",
        "True regions of fewer than 6 pixels at network size are tiny regions",
        "Nothing predicted: the class is in the truth only.",
        "Status: finished",
        "0 restarts.",
        "disc-",
        "learning_rate: 0.003",  # the config
        "tensorflow",  # the environment
    ):
        assert text in words, text
    assert f"{32 * 2**0.5:.4f}" in words
    # The images are as large as the input of the network: one table has both sizes.
    assert words.count("original size (same as network size)") == 1
    assert "Measures, network size" not in words


def test_page_lists_failures_worst_first(own_run: Path) -> None:
    path = own_run / "evaluation" / "measures_network.csv"
    header, first, second, third, *others = path.read_text().splitlines()
    columns = header.split(",")

    def changed(line: str, **values: str) -> str:
        cells = dict(zip(columns, line.split(","), strict=True)) | values
        return ",".join(cells.values())

    first = changed(first, dice_mass="0.4")
    second = changed(second, dice_mass="0.0", presence_mass="truth_only", found_lesions_mass="0")
    third = changed(third, dice_mass="0.0", presence_mass="both", tp_px_mass="0")
    path.write_text("\n".join([header, first, second, third, *others]) + "\n")
    failures = page_of(own_run).words.split("Failures")[2].split("Curves")[0]
    assert "3 of 4 images have a Dice below 0.5 (each class counted by itself, at" in failures
    places = [failures.index(words) for words in ("nothing predicted", "no overlap")]
    assert sorted(places) == places
    assert places[-1] < failures.index("poor overlap")
    assert "0 of 1" in failures


def test_headline_counts_the_cases_of_its_mean(
    own_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = own_run / "evaluation" / "summary.json"
    summary = json.loads(path.read_text())
    summary["classes"][1]["num_empty"] = 1
    path.write_text(json.dumps(summary))
    words = page_of(own_run).words
    assert "Foreground Dice, mean over images: " in words
    assert " for 3 of 4 images of the test split, at network size" in words
    show_summary(summary)
    assert "mean over 3 of 4 images" in " ".join(capsys.readouterr().out.split())


def test_a_class_that_fills_the_images_is_compared_with_itself_on_every_pixel(
    own_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = own_run / "evaluation" / "summary.json"
    summary = json.loads(path.read_text())
    mass = summary["classes"][1]
    everywhere = mass["all_foreground"]["dice"]
    page = page_of(own_run).words
    assert f"predict-everything baseline: {everywhere:.4f})" in page
    assert "is not above the predict-everything" not in page
    show_summary(summary)
    shown = " ".join(capsys.readouterr().out.split())
    assert "predict-everything" in shown
    assert f"{everywhere:.4f}" in shown
    mass["all_foreground"]["dice"] = 0.9999
    words = f"mass: Dice {mass['dice']:.4f} is not above the predict-everything baseline (0.9999)."
    path.write_text(json.dumps(summary))
    assert words in page_of(own_run).words
    show_summary(summary)
    assert words in " ".join(capsys.readouterr().out.split())
    # An earlier version recorded no such baseline.
    del summary["all_foreground"], mass["all_foreground"]
    path.write_text(json.dumps(summary))
    assert "predict-everything" not in page_of(own_run).words
    show_summary(summary)
    assert "predict-everything" not in capsys.readouterr().out


def test_page_of_cases_without_foreground_says_that_there_was_none(
    own_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = own_run / "evaluation" / "summary.json"
    summary = json.loads(path.read_text())
    summary["foreground_mean"]["dice"] = 0.0
    summary["all_background"]["foreground_mean"] = {"dice": None, "iou": None}
    summary["classes"][1] |= {"num_empty": 1, "num_missed": 0, "num_false_alarms": 3}
    path.write_text(json.dumps(summary))
    words = "No image of the test split has foreground, so there is no Dice to report."
    page = page_of(own_run).words
    assert f"{words} False alarms: mass in 3 of 4 images." in page
    assert "Foreground Dice" not in page
    show_summary(summary)
    assert f"{words} False alarms: mass in 3 of 4 images." in " ".join(
        capsys.readouterr().out.split()
    )


def test_page_reports_restarts_and_stalls(own_run: Path) -> None:
    lease = json.loads((own_run / "lease.json").read_text())
    base = "checkpoints/step-00000012/a1"
    # A stop, a launcher's look, a kill, the end, and a command that found the run over.
    lease["bases"] = {"1": None, "2": base, "3": base, "4": base, "5": base}
    (own_run / "lease.json").write_text(json.dumps(lease))
    outcome = json.loads((own_run / "outcome.json").read_text())
    (own_run / "outcome.json").write_text(json.dumps(outcome | {"attempt": 4}))
    (own_run / "attempts").mkdir()
    stop = {"end": "stopped", "epoch": 2, "step": 7}
    (own_run / "attempts" / "1.json").write_text(json.dumps(stop))
    (own_run / "attempts" / "2.json").write_text('{"end": "looked"}')
    (own_run / "stacks").mkdir()
    (own_run / "stacks" / "host-1-rank-0.txt").write_text("stood still")
    words = page_of(own_run).words
    assert "2 restarts." in words
    assert words.count("stopped and saved at epoch 2, step 7") == 1
    assert words.count("killed, or ended by an error") == 1
    assert "checkpoints/step-00000012/a1" in words
    assert "stacks/host-1-rank-0.txt" in words


def test_page_shows_regions_that_the_dataset_lost(own_run: Path) -> None:
    path = own_run / "dataset.json"
    manifest = json.loads(path.read_text())
    assert "Lost before training" not in page_of(own_run).words
    lost = {"num_pictures": 41, "num_emptied": 3, "num_regions": [0, 52], "num_vanished": [0, 17]}
    reduced = {"test": lost, "train": lost, "valid": lost | {"num_pictures": 9}}
    path.write_text(json.dumps(manifest | {"reduced": reduced}))
    text = render(open_store(str(own_run)))
    cells = "".join(f'<td class="number">{number}</td>' for number in (41, 52, 17, 3))
    assert f"<td>test</td><td>mass</td>{cells}" in text
    # A fold is drawn of train and valid together.
    become_fold(own_run)
    text = render(open_store(str(own_run)))
    cells = "".join(f'<td class="number">{number}</td>' for number in (50, 104, 34, 6))
    assert f"<td>all folds</td><td>mass</td>{cells}" in text
    assert "<td>test</td>" not in text
    # As a version that did not count them has written it.
    del manifest["reduced"]
    path.write_text(json.dumps(manifest))
    assert "Lost before training" not in page_of(own_run).words


def test_page_shows_groups_and_says_what_the_truth_is(own_run: Path) -> None:
    path = own_run / "evaluation" / "summary.json"
    summary = json.loads(path.read_text())
    mass = summary["sizes"]["original"]["classes"][0]
    mass["dice_mean"] |= {"value": 0.625, "low": 0.5, "high": 0.75, "num_cases": 31}
    mass["dice_mean"] |= {"num_groups": 29, "all_background_num_cases": 23}
    path.write_text(json.dumps(summary))
    text = render(open_store(str(own_run)))
    numbers = "".join(f'<td class="number">{n}</td>' for n in (31, 29, "0.0000", 23))
    assert f"0.6250</td><td>0.5000 to 0.7500</td>{numbers}" in text
    assert "Truth at this size: the stored mask, enlarged" in text
    assert "assume square pixels" in text


def test_page_escapes_names_from_outside(own_run: Path) -> None:
    path = own_run / "evaluation" / "examples.csv"
    evil = "<script>alert(1)</script>"
    path.write_text(re.sub(r"disc-\d+\.png", evil, path.read_text()))
    text = render(open_store(str(own_run)))
    assert evil not in text
    assert evil in Page(text).words


@pytest.mark.parametrize("quote", ["'", '"'])
def test_a_name_stays_in_the_attribute_that_it_is_in(own_run: Path, quote: str) -> None:
    """The caption of a figure is its `alt`, too."""
    path = own_run / "evaluation" / "examples.csv"
    columns, *rows = csv.reader(path.read_text().splitlines())
    evil = f"x{quote} onload={quote}alert(1)"
    named = [[evil if key == "filename" else cell for key, cell in zip(columns, row, strict=True)]
             for row in rows]  # fmt: skip
    path.write_text(csv_table(columns, named))
    page = page_of(own_run)
    assert evil in page.words
    assert "onload" not in page.attributes
    assert "alt" in page.attributes


def test_page_warns_of_accepted_leaks(own_run: Path) -> None:
    manifest = json.loads((own_run / "dataset.json").read_text())
    (own_run / "dataset.json").write_text(json.dumps(manifest | {"leaky": True}))
    assert "The metrics are optimistic" in page_of(own_run).words


def test_page_warns_where_groups_were_not_given_whoever_made_the_splits(own_run: Path) -> None:
    path = own_run / "dataset.json"
    manifest = json.loads(path.read_text())
    assert (manifest["split_rule"], manifest["group_rule"]) == ("drawn", "by file")
    sound = "no group and no image is in more than one split"
    for changes, words in (
        ({"split_rule": "ready-made"}, "no groups were given"),
        ({"group_rule": "not recorded"}, "how groups were made is not recorded"),
        ({"group_rule": "by table"}, sound),
    ):
        path.write_text(json.dumps(manifest | changes))
        found = page_of(own_run).words
        assert words in found
        assert (sound in found) == (words == sound)
    # As earlier versions wrote it of folders train, valid and test.
    del manifest["group_rule"]
    path.write_text(json.dumps(manifest | {"split_rule": "ready-made"}))
    assert "no groups were given" in page_of(own_run).words


def test_page_says_what_intervals_draw(own_run: Path) -> None:
    words = "intervals draw images, not patients"
    assert words in page_of(own_run).words
    path = own_run / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"group_rule": "by table"}))
    assert words not in page_of(own_run).words


def test_page_says_where_weights_came_from(own_run: Path) -> None:
    path = own_run / "evaluation" / "summary.json"
    summary = json.loads(path.read_text())
    assert "Trained from random weights." in page_of(own_run).words
    for seen, words in (
        ("no", "which were trained on no group that is evaluated here"),
        ("yes", "which were trained on groups that are evaluated here"),
        ("unknown", "On which cases these weights were trained is not known"),
    ):
        origin = {"run": "discs", "source": "runs/<first>", "seen": seen}
        path.write_text(json.dumps(summary | {"init_from": [origin]}))
        assert "Trained from the weights of runs/<first>" in page_of(own_run).words
        assert words in page_of(own_run).words
    # An evaluation of an earlier version did not record it, the config did.
    path.write_text(json.dumps(without(summary, "init_from")))
    assert "Trained from random weights." in page_of(own_run).words
    config = own_run / "config.yaml"
    config.write_text(config.read_text().replace("init_from: null", "init_from: a.h5"))
    found = page_of(own_run).words
    assert (
        "Trained from the weights of a.h5. On which cases these weights were trained is not"
        in found
    )


def test_card_counts_tiles_as_tiles_and_reports_a_fold(own_run: Path) -> None:
    path = own_run / "dataset.json"
    page = render(open_store(str(own_run)))
    assert '<th scope="col">split</th><th scope="col" class="number">images</th>' in page
    path.write_text(json.dumps(json.loads(path.read_text()) | {"geometry": "tile"}))
    page = render(open_store(str(own_run)))
    assert '<th scope="col">split</th><th scope="col" class="number">tiles</th>' in page
    become_fold(own_run)
    page = render(open_store(str(own_run)))
    assert "Fold 2 of 3 (--fold 1), taken from train and valid (16 tiles)" in page
    assert "test split of the dataset was not used" in page
    assert '<th scope="col">split</th>' not in page


def test_page_of_a_run_that_is_not_over_says_what_is_missing(own_run: Path) -> None:
    shutil.rmtree(own_run / "evaluation")
    (own_run / "outcome.json").unlink()
    words = page_of(own_run).words
    assert "Status: not finished" in words
    assert "evaluation/summary.json is not there yet" in words


def test_command_writes_the_page_and_refuses_what_is_no_run(
    own_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(own_run)]) == 0
    assert "report.html" in capsys.readouterr().out
    assert (own_run / "report.html").read_text() == render(open_store(str(own_run)))
    assert main([str(tmp_path)]) == 2
    assert "config.yaml is missing" in capsys.readouterr().err
    for text, problem in (("{", "not valid JSON"), ("[]", "not a JSON object")):
        (own_run / "evaluation" / "summary.json").write_text(text)
        assert main([str(own_run)]) == 3
        assert problem in capsys.readouterr().err


def test_a_damaged_record_of_the_run_is_refused_in_a_line(
    own_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for text, problem in (("{", "not valid JSON"), ("{}", "'status' is missing")):
        (own_run / "outcome.json").write_text(text)
        assert main([str(own_run)]) == 3
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{own_run}/outcome.json: {problem}" in line
        assert "train a run of another name" in line


def test_a_damaged_summary_of_folds_is_refused_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for text, problem in (("{", "not valid JSON"), ("{}", "'runs' is missing")):
        (tmp_path / "cross_validation.json").write_text(text)
        assert main([str(tmp_path)]) == 3
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{tmp_path}/cross_validation.json: {problem}" in line


def without(value: Any, key: str) -> Any:
    """Returns JSON without a field, wherever it is."""
    if isinstance(value, dict):
        return {name: without(each, key) for name, each in value.items() if name != key}
    return [without(each, key) for each in value] if isinstance(value, list) else value


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("summary.json", "num_specks"),
        ("summary.json", "lesion_rule"),
        ("summary.json", "all_background_num_cases"),
        ("measures_network.csv", "false_positives_mass"),
        ("measures_network.csv", "found_lesions_mass"),
    ],
)
def test_an_evaluation_of_an_earlier_version_is_refused_in_a_line(
    own_run: Path, capsys: pytest.CaptureFixture[str], name: str, key: str
) -> None:
    path = own_run / "evaluation" / name
    if name.endswith(".csv"):
        rows = list(csv.DictReader(path.read_text().splitlines()))
        rows = [{k: "0" if k == "dice_mass" else v for k, v in without(row, key).items()}
                for row in rows]  # fmt: skip
        path.write_text(csv_table(list(rows[0]), [list(row.values()) for row in rows]))
    else:
        path.write_text(json.dumps(without(json.loads(path.read_text()), key)))
    assert main([str(own_run)]) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{path}: '{key}' is missing" in line
    assert line.endswith(f"evaluate the run again: flexunet evaluate {own_run}")


def test_a_run_that_is_over_refuses_to_show_an_evaluation_of_an_earlier_version(
    own_run: Path,
) -> None:
    path = own_run / "evaluation" / "summary.json"
    path.write_text(json.dumps(without(json.loads(path.read_text()), "lesion_rule")))
    with pytest.raises(ContentError, match=r"'lesion_rule' is missing.*flexunet evaluate"):
        write_report(open_store(str(own_run)))


def test_outcome_without_groups_is_shown(own_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = json.loads((own_run / "outcome.json").read_text())
    for size in outcome["evaluation"]["sizes"].values():
        size["classes"] = without(size["classes"], "num_groups")
    # As where a new evaluation was stopped while it replaced this one.
    (own_run / "evaluation" / "summary.json").unlink()
    show_end(outcome, str(own_run))
    assert "Dice, mean over images" in capsys.readouterr().out


def test_chromium_shows_the_page(own_run: Path, tmp_path: Path) -> None:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium: install the Debian package of this name")
    page, shot = write_report(open_store(str(own_run))), tmp_path / "shot.png"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    flags += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1160,6000"]
    subprocess.run(
        [chromium, *flags, f"--screenshot={shot}", f"file://{page}"],
        check=True,
        capture_output=True,
        timeout=120,
    )
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    assert pixels.shape == (6000, 1160, 3)
    red, green, blue = np.moveaxis(pixels, -1, 0)
    # The contours of the cases, orange and cyan however they were scaled, and both kinds of curve.
    orange = (red - blue > 90) & (green - blue > 30) & (red - green > 40)
    cyan = (blue - red > 90) & (green - red > 60)
    assert orange.sum() > 100
    assert cyan.sum() > 100
    for color in ((0, 128, 0), (255, 0, 0)):
        assert (np.abs(pixels - color).max(axis=-1) < 40).sum() > 50, color
    # Ink down the page: no section is blank. 8 bands of 300 rows.
    assert all((pixels[top : top + 300] < 128).any() for top in range(0, 2400, 300))
