"""The page about a run with many classes: short, complete, usable without a mouse or sight."""

import csv
import io
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flexunet.errors import ContentError
from flexunet.storage import open_store
from flexunet.tables import csv_table
from job.comparison.comparison import compare_runs
from job.comparison.page import render_comparison
from job.evaluation.example_cases import example_cases, image_dice_of
from job.metrics.confusion import Confusion, count_confusion, count_pixels
from job.metrics.per_case import Scale, measure_case, summarize_cases
from job.reporting.html_report import render
from job.reporting.views.confusion import confusion_of
from job.reporting.views.gallery import gallery_of
from job.reporting.views.line_plots import LINE_COLORS, Frame, line_style, range_of, ticks_of
from job.reporting.views.measures import size_of
from job.reporting.views.parts import small_figure
from tests.job.browser import checked_pages
from tests.job.stored_runs import NAMES

RELICS = Path(__file__).resolve().parents[1] / "relics" / "v0.1.0" / "runs"


@pytest.fixture(scope="module")
def page(street_runs: Path) -> str:
    """Returns the page of "noisy"."""
    return render(open_store(str(street_runs / "noisy")))


@pytest.fixture
def own_street_run(street_runs: Path, tmp_path: Path) -> Path:
    """Returns a copy of "noisy" that a test may change."""
    return Path(shutil.copytree(street_runs / "noisy", tmp_path / "noisy"))


def table_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def write_table(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text(csv_table(list(rows[0]), [list(row.values()) for row in rows]))


def test_pages_are_short_and_readable_at_every_width(
    street_runs: Path, page: str, tmp_path: Path
) -> None:
    pages = {
        "report": page,
        "comparison": render_comparison(
            compare_runs([str(street_runs / name) for name in ("clear", "noisy")])
        ),
    }
    found = checked_pages(pages, tmp_path)
    for (name, width), each in found.items():
        where = f"{name} at {width}"
        assert each["width"] == width
        assert each["num_texts"] > 300, where
        assert each["low_contrast"] == [], where
        assert max(each["overflow"], each["overflow_open"]) <= 0, where
        assert each["headings"][0] == 1, where
        steps = [b - a for a, b in zip(each["headings"], each["headings"][1:], strict=False)]
        assert max(steps) == 1, where
        assert each["headings"].count(1) == 1, where
        assert all(each["images"]), where
        assert all(each["scrolling"]), where
        assert each["broken_anchors"] == 0, where
        assert each["focus"] == "solid", where
    # 417 rows and 13,000 pixels before the first image, before many classes had a matrix.
    report = found["report", 1400]
    assert report["rows"] < 100
    assert report["first_image"] < 2000
    assert len(pages["report"]) < 3_000_000
    assert len(pages["comparison"]) < 200_000


def test_the_matrix_has_each_class_and_measure_with_its_interval(
    street_runs: Path, page: str
) -> None:
    summary = json.loads((street_runs / "noisy" / "evaluation" / "summary.json").read_text())
    matrix = page.split('<table class="matrix">')[1].split("</table>")[0]
    rows = matrix.split("<tr>")[2:]
    assert len(rows) == len(NAMES)  # the foreground, and all classes but the background
    measured = summary["sizes"]["original"]
    for row, values in zip(rows, [measured["foreground"], *measured["classes"]], strict=True):
        assert values.get("name", "all foreground classes") in row
        for measure in ("dice_mean", "iou_pooled"):
            each = values[measure]
            assert f"{each['value']:.4f}" in row
            assert f"{each['low']:.4f} to {each['high']:.4f}" in row
    car = rows[NAMES.index("car")]
    assert "rgb(64, 0, 128)" in car  # the colour of the dataset
    assert f"{measured['classes'][8]['hd95_px']['value']:.4f}" in car


def test_the_confusion_matrix_counts_each_pixel_once(street_runs: Path, page: str) -> None:
    rows = table_of(street_runs / "noisy" / "evaluation" / "confusion.csv")
    pixels = np.array([int(row["pixels"]) for row in rows]).reshape(len(NAMES), len(NAMES))
    cases = table_of(street_runs / "noisy" / "evaluation" / "per_case.csv")

    def total(key: str, name: str) -> int:
        return sum(int(row[f"{key}_px_{name}"]) for row in cases)

    for index, name in enumerate(NAMES):
        assert pixels[index, index] == total("tp", name)
        assert pixels[index].sum() == total("tp", name) + total("fn", name)
        assert pixels[:, index].sum() == total("tp", name) + total("fp", name)
    share = pixels[1, 1] / pixels[1].sum()
    assert f"sky {share:.0%}" in page
    assert f">{100 * share:.0f}</text>" in page


@pytest.mark.parametrize("row", ["sky,sky,many", "sky,moon,1", "sky,sky,99999999999999999999"])
def test_a_damaged_confusion_matrix_is_named(tmp_path: Path, row: str) -> None:
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "confusion.csv").write_text(f"truth,predicted,pixels\n{row}\n")
    with pytest.raises(ContentError, match=r"confusion\.csv: damaged .* evaluate the run again"):
        confusion_of(open_store(str(tmp_path)), {})


def test_a_class_named_foreground_is_not_the_mean() -> None:
    truth, scale = np.array([[0, 1, 2, 2]], np.uint8), Scale((1.0, 1.0), "px")
    case = measure_case(truth, np.array([[0, 1, 2, 0]], np.uint8), 3, scale)
    measures = summarize_cases([case], ["a"], ["foreground", "rest"])
    matrix = size_of("network size", measures, {"foreground": (1, 2, 3)}).matrix
    assert matrix is not None
    found = [(row.name, row.color, row.cells[0].value) for row in matrix.rows if row.cells[0]]
    assert found == [
        ("all foreground classes", None, pytest.approx(5 / 6)),
        ("foreground", (1, 2, 3), 1.0),
        ("rest", None, pytest.approx(2 / 3)),
    ]


def test_confusion_of_a_case_leaves_out_ignored_and_unknown_labels() -> None:
    truth = np.array([[0, 1, 2, 2], [1, 255, 9, 0]], np.uint8)
    prediction = np.array([[0, 2, 2, 1], [1, 1, 1, 2]], np.uint8)
    found = count_confusion(truth, prediction, 3, ignore_id=255)
    assert found.tolist() == [[1, 0, 1], [0, 1, 1], [0, 1, 1]]
    assert count_confusion(truth == 1, prediction == 1, 1).shape == (2, 2)
    counts = count_pixels(truth, prediction, 3, ignore_id=255)
    assert counts[:, 0].tolist() == np.diag(found).tolist()
    confusion = Confusion(["a", "b", "c"])
    confusion.add(found)
    confusion.add(found)
    assert confusion.rows()[2] == ("a", "c", 2)


def test_examples_are_sorted_by_the_number_of_the_headline(street_runs: Path) -> None:
    """One class: the Dice of the image, as before. More: the mean over classes."""
    # The large class hides that the small one is missed in the second case.
    counts = np.zeros((3, 3, 4), np.int64)
    counts[0, 1:] = [[60, 20, 20, 0], [8, 1, 1, 0]]
    counts[1, 1:] = [[90, 1, 1, 0], [0, 0, 10, 0]]
    assert [index for _, index, _ in example_cases(counts)][:2] == [0, 1]
    image_dice = image_dice_of(counts)
    assert image_dice[1] is not None and image_dice[0] is not None
    assert image_dice[1] > image_dice[0]
    assert image_dice[2] is None  # no foreground
    one = counts[:, :2]
    scores = {index: score for _, index, score in example_cases(one)}
    assert [scores[0], scores[1]] == image_dice_of(one)[:2]
    gallery = gallery_of(open_store(str(street_runs / "noisy")), {})
    assert gallery is not None
    ranks = [
        [int(re.findall(r"(\d+) of 12", case.caption)[0]) for case in cases]
        for _, cases in gallery.kinds
    ]
    assert ranks == [[1, 2, 3], [6, 7, 8], [12, 11, 10]]
    assert not gallery.is_chosen_otherwise


def test_examples_of_an_earlier_version_are_sorted_anew(own_street_run: Path) -> None:
    path = own_street_run / "evaluation" / "examples.csv"
    rows = [{k: v for k, v in row.items() if k != "mean_dice"} for row in table_of(path)]
    for row in rows:
        kind, number = row["picture"].split("-")
        row["picture"] = f"{kind}-{4 - int(number)}"
    write_table(path, rows)
    shutil.rmtree(own_street_run / "evaluation" / "overlays")
    page = render(open_store(str(own_street_run)))
    assert "An earlier version chose these cases" in page
    ranks = [int(rank) for rank in re.findall(r"<b>\d+\.png: mean Dice [\d.]+, (\d+) of 12", page)]
    assert ranks == [1, 2, 3, 6, 7, 8, 12, 11, 10]


def test_failures_are_grouped_by_class(street_runs: Path, page: str) -> None:
    rows = table_of(street_runs / "noisy" / "evaluation" / "measures_network.csv")
    part = page.split('id="failures"')[1].split('id="probabilities"')[0]
    failed = {
        name: [row for row in rows if row[f"dice_{name}"] and float(row[f"dice_{name}"]) < 0.5]
        for name in NAMES[1:]
    }
    num_failed = sum(map(len, failed.values()))
    assert num_failed > 5
    assert f"{num_failed} of " in part
    assert "pairs of image and class" in part
    summaries = re.findall(r"<summary>([^:<]+): ", part)
    assert summaries == sorted(summaries, key=lambda name: -len(failed[name]))
    assert set(summaries) == {name for name, found in failed.items() if found}


@pytest.mark.parametrize("name", ["folds-fold-0", "stopped"])
def test_a_run_of_version_0_1_0_has_a_page(name: str) -> None:
    """Its evaluation has no confusion matrix, no calibration and, here, no images."""
    page = render(open_store(str(RELICS / name)))
    assert "Confusion matrix" not in page
    assert "Calibration" not in page
    assert ("Probability thresholds" in page) == (name == "folds-fold-0")


def test_many_classes_of_version_0_1_0_have_a_page(own_street_run: Path) -> None:
    """As it wrote them: without the files and fields that later versions added."""
    for name in ("confusion.csv", "calibration.csv"):
        (own_street_run / "evaluation" / name).unlink()
    path = own_street_run / "evaluation" / "summary.json"
    summary: dict[str, Any] = json.loads(path.read_text())
    for key in ("calibration", "all_foreground", "init_from"):
        del summary[key]
    for each in summary["classes"][1:]:
        del each["all_foreground"]
    path.write_text(json.dumps(summary))
    page = render(open_store(str(own_street_run)))
    assert '<table class="matrix">' in page
    assert "Confusion matrix" not in page


def test_names_from_outside_are_escaped_in_plots_and_matrices(own_street_run: Path) -> None:
    evil = "<script>alert(1)</script>"
    folder = own_street_run / "evaluation"
    for name in ("thresholds.csv", "confusion.csv", "calibration.csv"):
        path = folder / name
        path.write_text(path.read_text().replace("building", f'"{evil}"'))
    text = (folder / "summary.json").read_text()
    (folder / "summary.json").write_text(text.replace('"building"', json.dumps(evil)))
    page = render(open_store(str(own_street_run)))
    assert evil not in page
    assert page.count("&lt;script&gt;alert(1)") > 5


def test_ticks_are_round_and_inside() -> None:
    assert [text for _, text in ticks_of(0, 1)] == ["0", "0.25", "0.5", "0.75", "1"]
    assert [text for _, text in ticks_of(0, 0.8)] == ["0", "0.2", "0.4", "0.6", "0.8"]
    assert [text for _, text in ticks_of(3, 3)] == ["3"]
    assert [text for _, text in ticks_of(1, 4, is_whole=True)] == ["1", "2", "3", "4"]
    assert [text for _, text in ticks_of(1, 60, is_whole=True)] == ["20", "40", "60"]
    for low, high in ((0, 7), (-0.3, 0.2), (1e-5, 3e-5), (0, 12345)):
        values = [value for value, _ in ticks_of(low, high)]
        assert 2 <= len(values) <= 6
        assert low - 1e-12 <= min(values) <= max(values) <= high * (1 + 1e-9)
    for low, high in ((math.nan, 1), (0, math.inf), (math.inf, math.inf), (-1e308, 1e308)):
        assert ticks_of(low, high) == []
    assert len(ticks_of(0, 5e-324)) == 1
    assert range_of([]) == (0, 1)
    assert range_of([2.0, 2.0]) == (2.0, 3.0)


def test_a_line_of_many_epochs_is_thinned_and_keeps_its_end() -> None:
    frame = Frame(("epoch", "loss"), 100, 50, (0.0, 5000.0), (0.0, 1.0))
    line = frame.line([(float(x), 1 - x / 5000) for x in range(5001)], line_style(0))
    assert len(line.points) <= 301
    assert line.points[0] == (0, 0)
    assert line.points[-1] == (100, 50)


def test_lines_differ_without_colour() -> None:
    assert len({(style.color, style.dash) for style in map(line_style, range(32))}) == 32
    assert len({style.dash for style in map(line_style, range(0, 32, len(LINE_COLORS)))}) == 4


def test_an_image_of_noise_stays_small() -> None:
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 255, (900, 1200, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, format="PNG")
    figure = small_figure(buffer.getvalue(), "noise", 500)
    assert figure.source is not None
    assert len(figure.source) < 130_000
