"""Comparisons of runs on the same cases: numbers, refusals, page, command and Python."""

import csv
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flexunet
from flexunet.errors import ContentError, UsageError
from flexunet.storage import open_store
from flexunet.tables import csv_table
from job.compare import main
from job.comparison.comparison import compare_runs
from job.comparison.curves import curves_of
from job.comparison.differences import Difference, differences_of
from job.comparison.page import difference_matrix, render_comparison
from job.comparison.runs import read_runs
from job.metrics.bootstrap import difference_interval, difference_intervals
from job.metrics.per_case import Scale, measure_case

RELICS = Path(__file__).resolve().parents[1] / "relics" / "v0.1.0" / "runs"


@pytest.fixture
def two_runs(street_runs: Path, tmp_path: Path) -> list[str]:
    """Returns copies of "clear" and "noisy" that a test may change."""
    shutil.copytree(street_runs, tmp_path / "runs")
    return [str(tmp_path / "runs" / name) for name in ("clear", "noisy")]


def change_tables(run: str, change: Callable[[dict[str, str]], dict[str, str] | None]) -> None:
    """Changes each row of the tables of measures of a run; None removes it."""
    for size in ("network", "original"):
        path = Path(run) / "evaluation" / f"measures_{size}.csv"
        rows = [change(row) for row in csv.DictReader(path.read_text().splitlines())]
        kept = [row for row in rows if row is not None]
        path.write_text(csv_table(list(kept[0]), [list(row.values()) for row in kept]))


def mask(*rows: str) -> np.ndarray:
    return np.array([[int(cell) for cell in row] for row in rows], np.uint8)


def test_differences_are_those_of_the_measures_with_a_paired_interval() -> None:
    truth, scale = mask("0110", "0110", "2200"), Scale((1.0, 1.0), "px")
    good, bad = mask("0110", "0100", "2200"), mask("0100", "0000", "0220")
    cases = [[measure_case(truth, each, 3, scale) for each in run]
             for run in ([bad] * 6, [good] * 5 + [bad])]  # fmt: skip
    groups = list("abcdef")
    found = {
        (each.owner, each.measure): each for each in differences_of(*cases, groups, ["a", "b"])
    }
    dice = found["a", "dice_mean"]
    # Dice of class a: 2 * 1 / 5 with the bad mask, 2 * 3 / 7 with the good one.
    assert dice.first == pytest.approx(0.4)
    assert dice.value == pytest.approx((5 * 6 / 7 + 0.4) / 6)
    assert dice.difference == pytest.approx(5 / 6 * (6 / 7 - 0.4))
    assert dice.low is not None and dice.high is not None
    assert 0 < dice.low < dice.difference < dice.high <= 6 / 7 - 0.4 + 1e-12
    assert (dice.verdict, dice.num_groups) == ("better", 6)
    assert found["foreground", "dice_mean"].verdict == "better"
    assert found["a", "hd95_px"].verdict == "better"  # it is lower
    assert found["a", "hd95_px"].difference is not None and found["a", "hd95_px"].difference < 0
    worse = differences_of(cases[1], cases[0], groups, ["a", "b"])
    assert {each.verdict for each in worse} <= {"worse", ""}
    few = differences_of(*([case[:4] for case in cases]), groups[:4], ["a", "b"])
    assert {(each.low, each.verdict) for each in few} == {(None, "")}


def test_groups_of_a_difference_have_the_measure_in_both_runs() -> None:
    """Class a is not in the truth: each run predicts it in other groups."""
    scale, empty, found = Scale((1.0, 1.0), "px"), mask("0000"), mask("0010")
    cases = [[measure_case(empty, each, 2, scale) for each in run]
             for run in ([empty] + [found] * 5, [found] * 5 + [empty])]  # fmt: skip
    (dice,) = [each for each in differences_of(*cases, list("abcdef"), ["a"])
               if each.measure == "dice_mean"]  # fmt: skip
    assert (dice.num_groups, dice.difference, dice.low, dice.high) == (4, 0.0, None, None)


def test_the_difference_of_a_class_named_foreground_is_not_the_mean() -> None:
    truth, scale = mask("0122"), Scale((1.0, 1.0), "px")
    cases = [[measure_case(truth, each, 3, scale)] for each in (mask("0022"), mask("0120"))]
    found = differences_of(*cases, ["a"], ["foreground", "rest"])
    dice = [each for each in found if each.measure == "dice_mean"]
    assert [(each.label, each.is_mean, each.difference) for each in dice] == [
        ("all foreground classes", True, pytest.approx(1 / 3)),
        ("foreground", False, 1.0),
        ("rest", False, pytest.approx(-1 / 3)),
    ]
    rows = difference_matrix("second", found, {"foreground": (1, 2, 3)}).rows
    assert [(row.name, row.color) for row in rows] == [
        ("all foreground classes", None), ("foreground", (1, 2, 3)), ("rest", None),
    ]  # fmt: skip


def test_a_difference_without_a_value_has_no_verdict() -> None:
    none = Difference("a", "dice_mean", None, 0.5, None, None, None, 0)
    assert none.verdict == ""


def test_intervals_of_many_differences_equal_those_of_each() -> None:
    random = np.random.default_rng(0)
    groups = [f"g{index % 9}" for index in range(30)]
    pairs = []
    for shape in ((30,), (30, 4), (30,)):
        first, second = ((random.random(shape), random.random(shape)) for _ in range(2))
        pairs.append((first, second))
    pairs[2] = (pairs[2][0], (np.zeros(30), np.zeros(30)))  # in no group
    found = difference_intervals(pairs, groups)
    assert found == [difference_interval(*pair, groups) for pair in pairs]
    assert found[2] is None
    assert found[0] != found[1]


def test_runs_that_were_evaluated_on_other_cases_are_refused_by_name(two_runs: list[str]) -> None:
    first, second = two_runs
    third = shutil.copytree(first, f"{first}-third")
    change_tables(second, lambda row: None if row["id"] in ("case-03", "case-04") else row)
    change_tables(third, lambda row: row | {"id": row["id"].replace("case-07", "other")})
    with pytest.raises(UsageError) as caught:
        compare_runs([first, second, third])
    message = str(caught.value)
    assert f"{second} was evaluated on other cases: it lacks 2 of 12 cases (case-03, " in message
    assert f"{third} was evaluated on other cases: it lacks 1 of 12 cases (case-07)" in message
    assert "has 1 other case (other)" in message
    assert message.endswith(f"as {first}")


def test_other_groups_masks_and_classes_are_refused(two_runs: list[str]) -> None:
    _, second = two_runs
    change_tables(second, lambda row: row | {"group": row["group"].replace("drive-2", "x")})
    with pytest.raises(UsageError, match=r"noisy has another group for 2 cases \(case-02, case-08"):
        compare_runs(two_runs)
    change_tables(second, lambda row: row | {"group": row["group"].replace("x", "drive-2")})
    change_tables(second, lambda row: row | {"fn_px_sky": str(int(row["fn_px_sky"]) + 1)})
    with pytest.raises(UsageError, match=r"noisy was evaluated with other masks .* of case-00"):
        compare_runs(two_runs)
    change_tables(second, lambda row: {k.replace("fence", "hedge"): v for k, v in row.items()})
    with pytest.raises(UsageError, match=r"noisy has the classes .*hedge, car.*not .*fence"):
        compare_runs(two_runs)


def test_runs_of_another_network_size_are_compared_at_the_original_size(
    two_runs: list[str],
) -> None:
    first, second = two_runs
    change_tables(second, lambda row: row | {"fn_px_sky": str(int(row["fn_px_sky"]) + 1)})
    path = Path(second) / "dataset.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"geometry": "pad"}))
    assert list(compare_runs([first, second]).differences) == ["original"]
    path.write_text(json.dumps(manifest | {"image_height": 64, "image_width": 96}))
    config = Path(second) / "config.yaml"
    text = config.read_text().replace("tracker: null", "tracker: mlflow")
    config.write_text(text.replace("experiment: null", "experiment: other"))
    assert "tracker: mlflow" in config.read_text()
    found = compare_runs([first, second])
    assert list(found.differences) == ["original"]
    assert "noisy has another network size or geometry than clear" in found.notes[0]
    assert not {"tracker", "experiment"} & set(found.options)
    assert found.options["dataset: network size"] == ["48 x 32", "96 x 64"]
    change_tables(second, lambda row: row | {"fn_px_sky": str(int(row["fn_px_sky"]) + 5000)})
    with pytest.raises(UsageError, match=r"noisy was evaluated with other masks .* of case-00"):
        compare_runs([first, second])


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["{first}"], "needs two runs or more"),
        (["{first}", "{first}/"], "given twice"),
        (["{first}", "{second}", "--split", "valid"], "no evaluation of the valid split"),
        (["{first}", "{first}-none"], "no run here: config.yaml is missing"),
        (["{first}", "{second}", "--output", "page"], "give a name that ends in .html"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_a_line(
    two_runs: list[str], capsys: pytest.CaptureFixture[str], arguments: list[str], problem: str
) -> None:
    first, second = two_runs
    assert main([each.format(first=first, second=second) for each in arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert problem in line


def test_a_damaged_table_is_refused_in_a_line(
    two_runs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(two_runs[1]) / "evaluation" / "measures_network.csv"
    text = path.read_text()
    for damaged, problem in (
        (text.replace("case-05", "case-05,x,y"), "damaged"),
        (text[:700], "is missing"),
    ):
        path.write_text(damaged)
        assert main(two_runs) == 3
        (line,) = capsys.readouterr().err.splitlines()
        assert problem in line
        assert "measures_network.csv" in line
    path.unlink()
    with pytest.raises(ContentError, match=r"measures_network.csv is missing or has no case"):
        compare_runs(two_runs)


def test_the_command_prints_a_table_and_writes_the_page(
    two_runs: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(two_runs) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines()[:-1])) <= 80  # the last line is a path
    assert "noisy minus clear, original size" in out
    assert "sign symbol" in out
    assert re.search(r"│ epochs +│ 4 +│ 5 +│", out)
    page = (tmp_path / "compare.html").read_text()
    assert f"comparison: {tmp_path}/compare.html" in out
    assert page == render_comparison(compare_runs(two_runs))
    assert main([*two_runs, "--json", "--output", str(tmp_path / "other.html")]) == 0
    values = json.loads(capsys.readouterr().out)
    assert (values["format_version"], values["num_cases"], values["num_groups"]) == (1, 12, 6)
    assert values["options"] == {"epochs": [4, 5]}
    assert values["runs"][0] == {
        "name": "clear", "url": two_runs[0], "status": "finished", "epochs": 4, "best_epoch": 4,
    }  # fmt: skip
    rows = {(row["class"], row["measure"]): row for row in values["sizes"]["original"]}
    summary = json.loads((Path(two_runs[1]) / "evaluation" / "summary.json").read_text())
    car = summary["sizes"]["original"]["classes"][8]
    assert rows["car", "dice_mean"]["value"] == pytest.approx(car["dice_mean"]["value"], abs=1e-12)
    assert rows["car", "dice_mean"]["value"] < rows["car", "dice_mean"]["first"]
    assert (tmp_path / "other.html").read_text() == page


def test_the_page_shows_differences_curves_and_options(two_runs: list[str]) -> None:
    page = render_comparison(compare_runs(two_runs))
    matrix = page.split('<table class="matrix">')[1].split("</table>")[0]
    assert matrix.count("<tr>") == 1 + 12
    assert "worse" in matrix
    assert page.count("<polyline") == 2 * 6  # two runs, three values over two axes
    assert "validation foreground Dice over minutes" in page
    assert "<td>epochs</td><td>4</td><td>5</td>" in page
    assert "<script" not in page
    assert "url(" not in page
    assert re.findall(r'(?:src|href)="(?!#|data:)', page) == []


def test_minutes_are_those_of_the_training_steps(two_runs: list[str]) -> None:
    (first, _) = read_runs(two_runs, "test")
    curves = curves_of(first)
    assert curves is not None
    # 10 images of the train split at 5.3 images per second.
    assert curves.minutes == pytest.approx([n * 10 / 5.3 / 60 for n in range(1, 5)])
    assert curves.points("val_foreground_dice", over_minutes=False)[0][0] == 2  # none in epoch 1
    (Path(two_runs[0]) / "metrics" / "throughput.csv").unlink()
    (first, _) = read_runs(two_runs, "test")
    without = curves_of(first)
    assert without is not None and without.minutes is None
    assert without.points("loss", over_minutes=True) == []


@pytest.mark.parametrize(
    ("name", "column"),
    [("history", "loss"), ("history", "epoch"), ("throughput", "train_images_per_s")],
)
def test_a_cell_of_a_curve_that_is_no_number_is_damage(
    two_runs: list[str], name: str, column: str
) -> None:
    path = Path(two_runs[0]) / "metrics" / f"{name}.csv"
    rows = list(csv.DictReader(path.read_text().splitlines()))
    for cell in ("nan", "x") if column != "epoch" else ("x",):
        rows[1][column] = cell
        path.write_text(csv_table(list(rows[0]), [list(row.values()) for row in rows]))
        if cell == "nan":  # of a training that diverged
            render_comparison(compare_runs(two_runs))
    (first, _) = read_runs(two_runs, "test")
    with pytest.raises(ContentError, match=rf"metrics/{name}\.csv: damaged"):
        curves_of(first)


def test_folds_of_an_earlier_version_and_cross_validations_are_compared(tmp_path: Path) -> None:
    """A cross-validation has pooled tables, and its options are those of its folds."""
    fold = RELICS / "folds-fold-0"
    urls = []
    for name in ("cv", "again"):
        shutil.copytree(fold, tmp_path / f"{name}-fold-0")
        (tmp_path / name).mkdir()
        (tmp_path / name / "cross_validation.json").write_text(json.dumps({"runs": []}))
        for size in ("network", "original"):
            table = f"measures_{size}.csv"
            shutil.copy(fold / "evaluation" / table, tmp_path / name / table)
        urls.append(str(tmp_path / name))
    found = compare_runs(urls)
    page = render_comparison(found)
    assert list(found.options) == []
    assert "each fold of a cross-validation has its own" in page
    assert [run["status"] for run in found.as_json()["runs"]] == [None, None]
    values = found.as_json()["sizes"]["original"]
    assert {row["difference"] for row in values if row["difference"] is not None} == {0.0}
    compare_runs([str(fold), str(tmp_path / "cv-fold-0")])
    with pytest.raises(UsageError, match="only the pooled test folds"):
        compare_runs(urls, "valid")


def test_runs_in_a_bucket_are_compared(
    two_runs: list[str], bucket_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("config.yaml", "dataset.json", "outcome.json", "evaluation/summary.json")
    tables = [f"evaluation/measures_{size}.csv" for size in ("network", "original")]
    source, target = open_store(two_runs[1]), open_store(f"{bucket_url}/runs/noisy")
    for name in (*names, *tables, "metrics/history.csv"):
        target.put(name, source.get(name))
    output = f"{bucket_url}/pages/compare.html"
    assert main([two_runs[0], f"{bucket_url}/runs/noisy", "--output", output]) == 0
    assert f"comparison: {output}" in capsys.readouterr().out
    page = open_store(f"{bucket_url}/pages").get("compare.html").decode()
    assert "noisy minus clear" in page


def test_python_returns_the_same_numbers_as_tables(two_runs: list[str], tmp_path: Path) -> None:
    found = flexunet.compare(*two_runs, output=tmp_path / "page.html")
    assert repr(found) == "<Comparison: clear and noisy, 12 cases>"
    assert found.url == str(tmp_path / "page.html")
    table: Any = found.differences.set_index(["class", "measure"])
    assert table.loc[("car", "dice_mean"), "difference"] < 0
    assert table["low"].dtype == float
    assert list(found.options.columns) == ["clear", "noisy"]
    assert flexunet.compare(*map(Path, two_runs)).url is None
