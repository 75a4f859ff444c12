"""Inspections of small generated sources, in this process: findings, questions, commands, files."""

import json
import shlex
import subprocess
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from data_prep import cli as prep_cli
from data_prep.choices.mask_options import choose_mask_options
from data_prep.config import PrepConfig
from data_prep.inspection import cli
from data_prep.inspection.config import InspectConfig
from data_prep.inspection.findings import Inspection
from data_prep.inspection.layout import find_layout
from data_prep.inspection.output import CONTACT_SHEET_NAME, JSON_NAME, shown_pairs
from data_prep.inspection.pipeline import inspect_source
from data_prep.inspection.scan import InspectTask, RegionsScan, scan_regions
from data_prep.phantoms.inbreast_release import write_release
from data_prep.pipeline import prepare_source
from data_prep.prep_input import pairs_of
from data_prep.shards.manifest import read_manifest
from data_prep.shards.mask_sample import SampleTask, read_samples
from data_prep.sources.listings import Listings
from data_prep.sources.pairs import find_pairs, find_sources
from flexunet.errors import UsageError
from flexunet.process_pool import InlineExecutor, Workers
from flexunet.storage import open_store
from tests import commands
from tests.data_prep.inspection.test_questions import parsed

RED = (0, 0, 255)  # as OpenCV orders it


def write(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), pixels)


def image(seed: int, size: int = 64) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size, size), dtype=np.uint8)


def mask(row: int, value: Any = 255, size: int = 64, side: int = 12) -> np.ndarray:
    """Returns a black mask with a square at `row`: grey, or colour if `value` is one."""
    shape = (size, size) if isinstance(value, int) else (size, size, 3)
    pixels = np.zeros(shape, np.uint8)
    pixels[row : row + side, 5 : 5 + side] = value
    return pixels


def make(folder: Path, images: str = "images/{}.png", masks: str = "masks/{}.png") -> str:
    """Writes eight pairs, whose paths are the patterns of a number."""
    for number in range(8):
        write(folder / images.format(number), image(number))
        write(folder / masks.format(number), mask(number))
    return str(folder)


def inspected(source: str | Path, **options: Any) -> Inspection:
    found, _ = inspect_source(str(source), InspectConfig(**options), progress=False)
    return found


def words(command: str | None) -> list[str]:
    assert command is not None
    return shlex.split(command)[4:]


def test_a_plain_source_has_no_questions(tmp_path: Path) -> None:
    url = make(tmp_path / "a")
    found = inspected(url, num_processes=1)
    assert found.exit_code == 0
    assert (found.layout.num_pairs, found.layout.rule, found.layout.left_over) == (
        8,
        "equal names",
        (),
    )
    assert found.images is not None
    assert found.images.sizes == ((64, 64, 8),)
    assert (dict(found.images.channels), dict(found.images.bit_depths)) == ({"grey": 8}, {8: 8})
    assert dict(found.images.file_kinds) == {"PNG": 8}
    assert found.masks is not None
    assert [(v.value, v.looks_like, v.num_files) for v in found.masks.values] == [
        ("0", "class background", 8),
        ("255", "class foreground", 8),
    ]
    (regions,) = found.regions
    assert (regions.number, regions.median, regions.smallest) == (8, 144, 144)
    assert (found.questions, found.groups, found.bad_files) == ((), (), ())
    assert found.size is not None and found.size.options == {"image_size": 128}
    assert words(found.command)[:2] == ["--image-size", "128"]


def test_every_problem_is_found_and_the_rest_is_still_inspected(tmp_path: Path) -> None:
    url = make(tmp_path, "train/images/p{}_1.png", "train/masks/p{}_1.png")
    for number in range(8):  # a second image of each patient
        write(tmp_path / f"train/images/p{number}_2.png", image(20 + number))
        write(tmp_path / f"train/masks/p{number}_2.png", mask(number))
    write(tmp_path / "test/images/q_1.png", image(3))  # equal to p3_1
    write(tmp_path / "test/masks/q_1.png", mask(3))
    (tmp_path / "train/images/p0_1.png").write_bytes(b"\x89PNG no")
    write(tmp_path / "train/masks/p1_1.png", mask(1, size=32))
    write(tmp_path / "train/images/alone.png", image(9))
    write(tmp_path / "docs/a.png", image(9))
    found = inspected(url, num_processes=1)
    assert found.exit_code == 3
    assert [(each.number, each.examples) for each in found.layout.left_over] == [
        (1, ("train/images/alone.png",))
    ]
    assert [each.about for each in found.layout.other_files] == ["docs"]
    assert {each.examples[0]: each.about for each in found.bad_files}.keys() == {
        "train/images/p0_1.png",
        "train/masks/p1_1.png",
    }
    assert found.duplicates is not None
    assert found.duplicates.num_across_splits == 1
    assert set(found.duplicates.sets[0]) == {"train/p3_1.png", "test/q_1.png"}
    about = [question.about for question in found.questions]
    assert about == ["groups", "validation", "bad files", "leaks"]
    answers = found.questions[2].answers
    assert ["--missing-mask" in words(each.command) for each in answers] == [False, False, True]
    assert {"--skip-bad", "--draw-valid"} <= set(words(found.command))
    assert "--allow-leaks" not in words(found.command)
    assert all(
        len(question.answers) > 1 and question.answers[0].command == found.command
        for question in found.questions
    )


def test_groups_in_names_are_a_question_and_a_given_group_is_none(tmp_path: Path) -> None:
    for number in range(12):
        write(tmp_path / f"images/p{number // 3}_{number}.png", image(number))
        write(tmp_path / f"masks/p{number // 3}_{number}.png", mask(number))
    found = inspected(tmp_path, num_processes=1)
    assert [(each.num_groups, each.largest) for each in found.groups] == [(4, 3)]
    (question,) = found.questions
    assert "--group-regex" not in words(question.answers[0].command)
    assert "--group-regex" in words(question.answers[1].command)
    assert found.exit_code == 0
    given = inspected(tmp_path, group_regex="^(p[0-9])", num_processes=1)
    assert [(each.num_groups, each.value) for each in given.groups] == [(4, "^(p[0-9])")]
    assert given.questions == ()
    assert words(given.command)[-2:] == ["--group-regex", "^(p[0-9])"]


def test_two_folders_of_masks_are_two_readings(tmp_path: Path) -> None:
    url = make(tmp_path, "training/images/{}_x.png", "training/manual/{}_y.png")
    for number in range(8):
        write(tmp_path / f"training/mask/{number}_x_mask.png", np.full((64, 64), 255, np.uint8))
    found = inspected(url, num_processes=1)
    assert found.exit_code == 2
    assert found.layout.problem is not None and "may be the masks" in found.layout.problem
    assert found.layout.num_pairs == 8
    (question,) = found.questions
    masks = [words(each.command)[3] for each in question.answers]
    assert masks == ["training/manual", "training/manual", "training/mask"]
    assert ["--field-of-view" in words(each.command) for each in question.answers] == [
        True,
        False,
        False,
    ]


def test_several_rules_of_names_are_readings(tmp_path: Path) -> None:
    for number in range(6):
        write(tmp_path / f"images/{number}.png", image(number))
        for kind in ("a", "b"):
            write(tmp_path / f"masks/{number}_{kind}.png", mask(number))
    found = find_layout(str(tmp_path), {}, Listings())
    assert found.problem is not None and "more than one rule" in found.problem
    names = [reading.options["mask_name"] for reading in found.readings]
    assert sorted(names) == ["{stem}_a", "{stem}_b"]
    assert found.paired is not None and len(found.paired.pairs) == 6


def test_splits_without_train_are_readings_of_one_split(tmp_path: Path) -> None:
    make(tmp_path, "val/imgs/{}.png", "val/gt/{}.png")
    make(tmp_path, "test/imgs/{}.png", "test/gt/{}.png")
    found = find_layout(str(tmp_path), {}, Listings())
    assert [reading.options for reading in found.readings] == [
        {"images": "test/imgs", "masks": "test/gt"},
        {"images": "val/imgs", "masks": "val/gt"},
    ]


def test_a_source_without_masks_has_findings_and_no_command(tmp_path: Path) -> None:
    write(tmp_path / "photos/a.png", image(1))
    found = inspected(tmp_path, num_processes=1)
    assert (found.exit_code, found.command, found.images) == (2, None, None)
    assert [(each.about, each.number) for each in found.layout.other_files] == [("photos", 1)]
    with pytest.raises(UsageError, match="does not exist"):
        inspected(tmp_path / "missing")


def test_masks_with_several_meanings_are_a_question(tmp_path: Path) -> None:
    make(tmp_path)
    for number in range(8):
        both = mask(number, 1)
        both[40:60, 30:60] = 255
        write(tmp_path / f"masks/{number}.png", both)
    found = inspected(tmp_path, num_processes=1)
    assert found.masks is not None
    assert (found.masks.encoding, found.masks.classes) == (None, None)
    (question,) = found.questions
    assert len(question.answers) > 1
    assert len({each.command for each in question.answers}) == len(question.answers)
    assert found.exit_code == 2  # as that of prep


def test_mostly_white_masks_are_asked_about(tmp_path: Path) -> None:
    make(tmp_path)
    for number in range(8):
        write(tmp_path / f"masks/{number}.png", 255 - mask(number))
    (question,) = inspected(tmp_path, num_processes=1).questions
    assert "Are the objects white or black?" in question.text
    assert "background=255,255,255;foreground=0,0,0" in words(question.answers[1].command)
    assert inspected(tmp_path, num_processes=1, background="white").questions == ()


def test_a_sample_is_spread_over_all_pairs_and_noise_needs_larger_regions(tmp_path: Path) -> None:
    make(tmp_path)
    noisy = mask(20, RED)
    noisy[0, 0] = (0, 0, 200)
    write(tmp_path / "masks/0.png", noisy)
    found = inspected(
        tmp_path, sample=3, num_processes=1, classes="a=0,0,0;b=255,255,255;c=#ff0000"
    )
    assert found.size is not None and found.size.num_sampled == 3
    assert {each.class_name: each.num_images for each in found.regions} == {"b": 2, "c": 1}
    assert {each.min_area for each in found.regions} == {16}


def test_masks_outside_of_the_sample_are_checked_if_they_have_other_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regions are measured on pairs 0, 2 and 5; pair 3 has an area of no class."""
    checked: list[tuple[str, ...]] = []

    def scan(task: InspectTask) -> RegionsScan:
        checked.append(tuple(item.id for item in task.items if task.is_check))
        return scan_regions(task)

    monkeypatch.setattr("data_prep.inspection.pipeline.scan_regions", scan)
    url = make(tmp_path)
    spot = mask(3)
    spot[50:56, 40:46] = 100
    write(tmp_path / "masks/3.png", spot)
    given = {"classes": "a=0,0,0;b=255,255,255", "mask_encoding": "colour"}
    found = inspected(url, sample=3, num_processes=1, **given)
    assert [each.examples for each in found.bad_files] == [("masks/3.png",)]
    assert [names for names in checked if names] == [("3",)]
    assert found.exit_code == 3
    assert [each.text for each in found.questions[0].answers] == [
        "to be ignored",
        "classes of their own",
        "mistakes: leave these masks out",
    ]


def test_a_bucket_gives_the_findings_of_a_folder(tmp_path: Path, bucket_url: str) -> None:
    folder = make(tmp_path / "data", "imgs/{}.png", "gt/{}_m.png")
    (tmp_path / "data/gt/notes.txt").write_text("x")
    (tmp_path / "data/imgs/3.png").write_bytes(b"no image")
    store = open_store(f"{bucket_url}/data")
    for path in Path(folder).rglob("*.*"):
        store.put(str(path.relative_to(folder)), path.read_bytes())
    found = [
        json.dumps(inspected(url, num_processes=1).as_json()).replace(url, "SOURCE")
        for url in (folder, store.url)
    ]
    assert found[0] == found[1]
    assert '"exit_code": 3' in found[0]


def test_a_release_of_inbreast_is_found(tmp_path: Path) -> None:
    write_release(str(tmp_path), num_patients=4, size=64, seed=1)
    found = inspected(tmp_path, num_processes=1)
    assert "--format" in words(found.command)
    assert found.images is not None
    assert dict(found.images.file_kinds) == {"DICOM": found.layout.num_pairs}
    assert found.masks is None
    assert [each.class_name for each in found.regions] == ["mass"]


def test_pairs_of_a_sheet_show_all_classes_first() -> None:
    pixels = {"a": (90, 10, 0), "b": (50, 50, 0), "c": (99, 0, 1), "d": (100, 0, 0)}
    assert shown_pairs(pixels, 2) == ["b", "c"]
    assert shown_pairs(pixels) == ["b", "c", "a", "d"]


def test_the_command_writes_its_findings_and_nothing_into_the_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    url = make(tmp_path / "data", "imgs/{}.png", "gt/{}.png")
    before = sorted(Path(url).rglob("*"))
    monkeypatch.chdir(tmp_path)
    assert cli.main([url, "--num-processes", "1"]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.split("Proposed command")[0].splitlines())) <= 100
    folder = tmp_path / "inspect-data"
    written = json.loads((folder / JSON_NAME).read_text())
    assert written["command"].startswith(f"flexunet prep {url} dataset-data ")
    sheet = cv2.imread(str(folder / CONTACT_SHEET_NAME))
    assert sheet is not None and (sheet != 255).any()
    assert sorted(Path(url).rglob("*")) == before
    assert cli.main([url, "--json", "--output", str(tmp_path / "other")]) == 0
    assert json.loads(capsys.readouterr().out) == written
    (tmp_path / "file").write_text("x")
    assert cli.main([url, "--output", str(tmp_path / "file" / "below")]) == 2
    written_nowhere = capsys.readouterr()
    assert "Proposed command" in written_nowhere.out
    assert "is a file, not a folder" in written_nowhere.err
    monkeypatch.chdir(url)
    assert cli.main([url, "--num-processes", "1"]) == 2
    assert "into which inspect writes nothing" in capsys.readouterr().err
    assert sorted(Path(url).rglob("*")) == before


def test_a_shell_runs_the_proposed_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs `flexunet inspect` as a process, and the command that it prints in a shell."""
    make(tmp_path / "it's", "imgs/{}.png", "gt/{}_m.png")
    done = commands.run("launcher.cli", "inspect", "it's", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    printed = done.stdout.split("Proposed command:\n")[1].split("\n\n")[0]
    shell = f'flexunet() {{ printf "%s\\0" "$@"; }}\n{printed}'
    read = subprocess.run(["bash", "-c", shell], capture_output=True, text=True).stdout
    arguments = read.rstrip("\0").split("\0")
    assert arguments[:3] == ["prep", "it's", "dataset-it's"]
    monkeypatch.chdir(tmp_path)
    assert prep_cli.main([*arguments[1:], "--num-processes", "1"]) == 0
    manifest, _ = read_manifest(open_store(str(tmp_path / "dataset-it's")))
    assert sum(split.num_samples for split in manifest.splits.values()) == 8


def void_border(row: int) -> np.ndarray:
    """Returns ids 0 and 1 with a border of 255 around the square."""
    pixels = mask(row, 1)
    pixels[row, 5:17] = pixels[row + 11, 5:17] = 255
    return pixels


def chosen_by_prep(source: str, options: PrepConfig) -> PrepConfig:
    """Returns `options` with those about masks that `prep` chooses."""
    listings = Listings()
    pairs, _ = find_pairs(find_sources(source, listings), listings)
    items = pairs_of([(pair, pair.id) for pair in pairs], options, listings)
    workers = Workers(InlineExecutor(), lambda: 1)
    task = SampleTask((), max_pixels=2**20, num_requests=1)
    chosen = choose_mask_options(options, None, lambda: read_samples(items, workers, task, no_rest))
    return chosen.config


def no_rest(tasks: object, num_files: int) -> list[Any]:
    raise AssertionError("all masks are in the sample")


@pytest.mark.parametrize(
    "masks",
    [mask, lambda row: mask(row, 1), void_border, lambda row: mask(row, RED)],
    ids=["black and white", "ids", "void border", "colours"],
)
def test_prep_chooses_the_options_of_the_command(tmp_path: Path, masks: Any) -> None:
    url = make(tmp_path)
    for number in range(8):
        write(tmp_path / f"masks/{number}.png", masks(number))
    found = inspected(url, num_processes=1)
    assert (found.questions, found.exit_code) == ((), 0)
    _, _, config = parsed(str(found.command))
    assert config.classes is not None
    assert chosen_by_prep(url, PrepConfig(image_size=config.image_size)) == config


def test_prep_without_options_and_the_command_write_the_same_dataset(tmp_path: Path) -> None:
    url = make(tmp_path / "a")
    for number in range(8):
        write(tmp_path / f"a/masks/{number}.png", void_border(number))
    _, _, config = parsed(str(inspected(url, num_processes=1).command))
    plain = PrepConfig(image_size=config.image_size, num_processes=1)
    contents = []
    for name, each in (("command", config), ("plain", plain)):
        manifest = prepare_source(url, str(tmp_path / name), each, progress=False)
        contents.append((manifest.shards, manifest.samples_crc32c, manifest.options))
    assert contents[0] == contents[1]
    assert manifest.ignore_id == 255
