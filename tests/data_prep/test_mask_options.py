"""`prep` without options about masks: one choice for all, stated, kept, or asked for."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from data_prep.choices.mask_options import Existing, choose_mask_options
from data_prep.cli import main
from data_prep.config import PrepConfig
from data_prep.masks.class_names import id_color
from data_prep.masks.color_map import EARLIER_CLASSES, Palette
from data_prep.pipeline import prepare, prepare_source
from data_prep.shards.manifest import Manifest, MaskChoice, read_manifest
from data_prep.shards.mask_sample import NUM_SAMPLED
from data_prep.shards.pair_reader import ReadPair, read_pair
from data_prep.shards.records import decode_example, unframe_record
from data_prep.shards.sample_table import read_samples
from data_prep.shards.source_pairs import SourcePair
from data_prep.sources.pairs import find_sources
from flexunet.errors import ContentError, UsageError
from flexunet.storage import open_store
from tests.data_prep.masks.made_masks import areas, outlined, palette_file

SIDE = 64
NUM = 6


@pytest.fixture(autouse=True)
def without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out the figures, which take most of the time and do not depend on the choice."""
    monkeypatch.setattr("data_prep.pipeline.write_report", lambda *_: None)


def write_source(folder: Path, masks: list[np.ndarray]) -> Path:
    rng = np.random.default_rng(0)
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    for i, mask in enumerate(masks):
        image = rng.integers(0, 256, mask.shape, np.uint8)
        assert cv2.imwrite(str(folder / "images" / f"case_{i:02d}.png"), image)
        assert cv2.imwrite(str(folder / "masks" / f"case_{i:02d}.png"), mask.astype(np.uint8))
    return folder


def masks_of(values: list[int]) -> list[np.ndarray]:
    return [areas(values, side=SIDE, seed=i) for i in range(NUM)]


def prepared(source: Path, output: Path, **options: object) -> Manifest:
    config = PrepConfig(image_size=SIDE, num_processes=1, **options)  # type: ignore[arg-type]
    return prepare(find_sources(str(source)), str(output), config, progress=False)


def as_made_earlier(output: Path, **options: object) -> dict[str, object]:
    """Rewrites the manifest as a version that read each mask by itself, and returns it."""
    path = output / "dataset.json"
    manifest = json.loads(path.read_text())
    manifest.pop("mask_choice", None)
    for name in ("mask_encoding", "ignore"):
        manifest["options"].pop(name, None)
    manifest["options"] |= options
    path.write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
    found: dict[str, object] = manifest
    return found


def test_the_choice_is_logged_and_in_the_manifest(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    masks = [outlined(mask) for mask in masks_of([0, 1])]
    source = write_source(tmp_path / "source", masks)
    manifest = prepared(source, tmp_path / "out")
    assert [each.name for each in manifest.classes] == ["background", "foreground"]
    assert manifest.ignore_id == 255
    chosen = {name: manifest.options[name] for name in ("classes", "mask_encoding", "ignore")}
    assert chosen == {
        "classes": "background=0,0,0;foreground=128,0,0", "mask_encoding": "index", "ignore": "255"
    }  # fmt: skip
    assert manifest.mask_choice is not None
    assert manifest.mask_choice.decided == ("classes", "mask_encoding", "ignore")
    assert manifest.mask_choice.num_files == NUM
    assert "the pixels of 255 are a thin border" in manifest.mask_choice.evidence[0]
    assert "masks: read as index, 255 ignored, background=0,0,0;foreground=128,0,0" in caplog.text
    # Given options lead to the same shards, and the same command finds its own dataset.
    caplog.clear()
    assert prepared(source, tmp_path / "out") == manifest
    assert "finished already" in caplog.text
    assert "masks: read as" not in caplog.text
    same = prepared(source, tmp_path / "given", **chosen)
    assert same.mask_choice is None
    assert same.shards == manifest.shards


FOUR_OBJECTS = ["background", "class1", "class2", "class3", "class4"]


@pytest.mark.parametrize(
    ("masks", "found", "classes"),
    [
        (
            masks_of([0, 2]),
            "the masks have the ids 0, 2; 1 is missing",
            [["background", "class1", "class2"], ["background", "foreground"]],
        ),
        (
            [areas(range(3 + i % 3), side=SIDE, seed=i) for i in range(NUM)],
            "each mask numbers its regions from 1, so the values may be single objects, which are "
            "no classes",
            [FOUR_OBJECTS, ["background", "foreground"]],
        ),
    ],
)
def test_an_uncertain_choice_is_left_to_the_user(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    masks: list[np.ndarray],
    found: str,
    classes: list[list[str]],
) -> None:
    caplog.set_level("INFO")
    source = write_source(tmp_path / "a source", masks)
    output = tmp_path / "out"
    arguments = [str(source), str(output), "--image-size", str(SIDE), "--num-processes", "1"]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert f"{found} (6 masks read); give --mask-enc" in error
    assert not (output / "dataset.json").exists()
    commands = [line.strip() for record in caplog.messages for line in record.splitlines()
                if line.strip().startswith("flexunet prep")]  # fmt: skip
    assert len(commands) == 2
    read = []
    for i, command in enumerate(commands):
        words = shlex.split(command)
        assert words[2:4] == [str(source), str(output)]
        assert main([*words[2:3], str(tmp_path / f"out{i}"), *words[4:]]) == 0
        manifest, _ = read_manifest(open_store(str(tmp_path / f"out{i}")))
        read.append([each.name for each in manifest.classes])
    assert read == classes


def test_a_file_that_contradicts_the_choice_is_rejected(tmp_path: Path) -> None:
    sampled = np.linspace(0, 39, NUM_SAMPLED).round()
    unseen = [i for i in range(40) if i not in sampled and i > 9]
    for values, other in (([0, 255], 1), ([0, 1, 2], 90)):
        masks = [areas(values, side=16, seed=i) for i in range(40)]
        masks[unseen[0]] = areas([0, other], side=16)
        folder = tmp_path / str(other)
        source = write_source(folder / "source", masks)
        with pytest.raises(ContentError, match=rf"case_{unseen[0]}\.png: .*--skip-bad"):
            prepared(source, folder / "out")


RED_GREEN = [0, 0, 0, 255, 0, 0, 0, 255, 0]
GREEN_RED = [0, 0, 0, 0, 255, 0, 255, 0, 0]
WHITE_FIRST = [255, 255, 255, 0, 0, 0, 9, 9, 9]


def unsampled(number: int) -> int:
    """Returns the first of `number` masks that is not in the sample of `prep`."""
    sampled = np.linspace(0, number - 1, NUM_SAMPLED).round()
    return next(i for i in range(number) if i not in sampled)


def write_file(source: Path, number: int, data: bytes) -> None:
    (source / "masks" / f"case_{number:02d}.png").write_bytes(data)


@pytest.mark.parametrize(
    ("usual", "other", "message"),
    [
        (RED_GREEN, GREEN_RED, "index 1 of its palette has the colour 0,255,0, but 255,0,0 in"),
        (RED_GREEN, [0, 0, 0, 255, 0, 0, 9, 9, 9], "index 2 .* colour 9,9,9, but 0,255,0 in"),
        (None, WHITE_FIRST, "index 0 of its palette has the colour 255,255,255, but 0,0,0 in"),
    ],
)
def test_a_palette_with_other_colors_is_rejected(
    tmp_path: Path, usual: list[int] | None, other: list[int], message: str
) -> None:
    """The colours of its indices may mean other classes than in the sample."""
    masks = [areas([0, 1, 2], side=16, seed=i) for i in range(40)]
    source = write_source(tmp_path / "source", masks)
    for i, mask in enumerate(masks):
        if usual is not None:
            write_file(source, i, palette_file(mask, usual))
    unseen = unsampled(len(masks))
    write_file(source, unseen, palette_file(masks[unseen], other))
    with pytest.raises(ContentError, match=rf"case_{unseen:02d}\.png: {message} .*--skip-bad"):
        prepared(source, tmp_path / "out")
    # The same palette in the sample is a question, and the answer reads all of them.
    write_file(source, 0, palette_file(masks[0], other))
    if usual is not None:
        with pytest.raises(UsageError, match="the palettes of the masks differ"):
            prepared(source, tmp_path / "out")
    given = {"classes": "a=0,0,0;b=255,0,0;c=0,255,0", "mask_encoding": "index"}
    prepared(source, tmp_path / "given", **given)
    assert np.array_equal(stored(tmp_path / "given")[f"case_{unseen:02d}"][::4, ::4], masks[unseen])
    write_file(source, 0, palette_file(masks[0], usual or RED_GREEN))
    skipped = prepared(source, tmp_path / "skipped", skip_bad=True)
    assert skipped.num_samples == len(masks) - 1


def test_the_palette_is_kept_for_what_is_read_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of an interrupted preparation that was replaced is compared with its palette."""
    masks = [areas([0, 1, 2], side=16, seed=i) for i in range(40)]
    source = write_source(tmp_path / "source", masks)
    for i, mask in enumerate(masks):
        write_file(source, i, palette_file(mask, RED_GREEN))
    interrupted(source, tmp_path / "out", monkeypatch)
    write_file(source, 0, palette_file(masks[0], GREEN_RED))  # in the sample, which is not read
    with pytest.raises(ContentError, match=r"case_00\.png: index 1 of its palette"):
        prepared(source, tmp_path / "out")
    write_file(source, 0, palette_file(masks[0], RED_GREEN))
    manifest = prepared(source, tmp_path / "out")
    assert manifest.mask_choice is not None
    assert manifest.mask_choice.palette == ((0, (0, 0, 0)), (1, (255, 0, 0)), (2, (0, 255, 0)))
    written = json.loads((tmp_path / "out" / "dataset.json").read_text())["mask_choice"]
    assert written["palette"] == [[0, [0, 0, 0]], [1, [255, 0, 0]], [2, [0, 255, 0]]]


@pytest.mark.parametrize("palette", [(), ((0, (9, 9, 9)), (1, (0, 0, 0)))])
def test_a_stored_choice_checks_the_palette_that_it_has(palette: Palette) -> None:
    """Choices of earlier versions have none, and index 0 of their masks may have any colour."""
    config = PrepConfig(image_size=SIDE, num_processes=1)
    choice = MaskChoice(
        decided=("classes", "mask_encoding", "ignore"), evidence=(), num_files=1, palette=palette
    )
    existing = Existing("out", OF_1, choice, is_finished=False)
    chosen = choose_mask_options(config, existing, list)
    assert (chosen.encoding, chosen.palette) == ("index", palette)


def test_unused_classes_of_pascal_voc_have_its_colors(tmp_path: Path) -> None:
    palette = [channel for i in range(256) for channel in id_color(i)]
    masks = [areas([0, 1, 3], side=16, seed=i) for i in range(40)]
    source = write_source(tmp_path / "source", masks)
    unseen = unsampled(len(masks))
    masks[unseen] = areas([0, 2], side=16)
    for i, mask in enumerate(masks):
        write_file(source, i, palette_file(mask, palette))
    prepared(source, tmp_path / "out")
    palette[6:9] = [1, 2, 3]
    write_file(source, unseen, palette_file(masks[unseen], palette))
    with pytest.raises(ContentError, match="index 2 of its palette has the colour 1,2,3, but 0,1"):
        prepared(source, tmp_path / "other")


def test_an_open_sample_is_decided_by_all_masks(tmp_path: Path) -> None:
    """As `inspect` does, which reads all of them: class 1 is in no mask of the sample."""
    masks = [areas([0, 2], side=16, seed=i) for i in range(40)]
    masks[unsampled(40)] = areas([0, 1], side=16)
    source = write_source(tmp_path / "source", masks)
    manifest = prepared(source, tmp_path / "out")
    assert [each.name for each in manifest.classes] == ["background", "class1", "class2"]
    assert manifest.mask_choice is not None
    assert manifest.mask_choice.num_files == 40


@pytest.mark.parametrize(("folder", "is_hinted"), [("masks", True), ("images", False)])
def test_a_bad_mask_beside_the_sample_names_what_reads_all(
    tmp_path: Path, folder: str, is_hinted: bool
) -> None:
    source = write_source(tmp_path / "source", [areas([0, 255], seed=i) for i in range(40)])
    bad = sorted((source / folder).iterdir())[unsampled(40)]
    bad.write_bytes(bad.read_bytes()[:100])
    with pytest.raises(ContentError, match=re.escape(str(bad))) as error:
        prepared(source, tmp_path / "out")
    assert ("flexunet inspect reads all" in str(error.value)) == is_hinted


@pytest.mark.parametrize("foreground", [255, 1])
def test_a_dataset_of_an_earlier_version_stays_the_same(
    tmp_path: Path, foreground: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    source = write_source(tmp_path / "source", masks_of([0, foreground]))
    output = tmp_path / "out"
    prepared(source, output, classes=EARLIER_CLASSES)
    earlier = as_made_earlier(output)
    before = (output / "dataset.json").read_bytes()
    assert json.loads(prepared(source, output).to_json()) == earlier
    assert "finished already" in caplog.text
    assert (output / "dataset.json").read_bytes() == before
    # Its options were given, and are missing now.
    as_made_earlier(output, classes="background=0,0,0;cell=255,255,255")
    with pytest.raises(UsageError, match="--classes was background=0,0,0;cell=255,255,255, now"):
        prepared(source, output)


def interrupted(source: Path, output: Path, patched: pytest.MonkeyPatch, **options: object) -> Path:
    """Begins a preparation that is killed before its last step; returns the path of its plan."""

    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    with patched.context() as each:
        each.setattr("data_prep.pipeline.write_clipped", stop)
        with pytest.raises(KeyboardInterrupt):
            prepared(source, output, **options)
    return output / "prep-state" / "plan.json"


def read_again(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Returns a list that gets the names of the pairs that are read from now on."""
    found: list[str] = []

    def read(item: SourcePair, *arguments: object) -> ReadPair:
        found.append(item.id)
        return read_pair(item, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("data_prep.shards.encode.read_pair", read)
    return found


OF_255 = {"classes": "background=0,0,0;foreground=255,255,255", "mask_encoding": "colour"}
OF_1 = {"classes": "background=0,0,0;foreground=255,255,255", "mask_encoding": "index"}


@pytest.mark.parametrize(
    ("first", "second"),
    [({}, {}), ({}, OF_255), (OF_255, {}), ({"classes": OF_255["classes"]}, {}),
     ({}, {"classes": OF_255["classes"]})],
)  # fmt: skip
def test_any_command_of_the_same_meaning_continues_an_interrupted_preparation(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    first: dict[str, str],
    second: dict[str, str],
) -> None:
    """As `inspect` proposes a command with all options, and `prep` needs none."""
    source = write_source(tmp_path / "source", masks_of([0, 255]))
    whole = prepared(source, tmp_path / "whole", **first)
    plan = interrupted(source, tmp_path / "out", monkeypatch, **first).read_bytes()
    names = read_again(monkeypatch)
    manifest = prepared(source, tmp_path / "out", **second)
    assert names == []
    assert manifest == whole
    assert manifest.options == json.loads(plan)["options"]
    assert (tmp_path / "out" / "dataset.json").read_bytes() == manifest.to_json()
    assert prepared(source, tmp_path / "out") == manifest


def begun_earlier(
    source: Path, output: Path, patched: pytest.MonkeyPatch, **options: object
) -> dict[str, Any]:
    """Interrupts a preparation as a version that read each mask by itself; returns its options."""
    path = interrupted(source, output, patched, **{"mask_encoding": "mixed", **options})
    plan = json.loads(path.read_text())
    plan.pop("mask_choice", None)
    del plan["options"]["mask_encoding"]
    path.write_text(json.dumps(plan, indent=1, sort_keys=True))
    found: dict[str, Any] = plan["options"]
    return found


@pytest.mark.parametrize("foreground", [255, 1])
def test_what_an_earlier_version_began_is_finished_if_the_decision_means_the_same(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    foreground: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    masks = masks_of([0, foreground])
    source = write_source(tmp_path / "source", masks)
    options = begun_earlier(source, tmp_path / "out", monkeypatch, classes=EARLIER_CLASSES)
    manifest = prepared(source, tmp_path / "out")
    assert manifest.options == options
    assert [each.name for each in manifest.classes] == ["background", "mass"]
    assert "an earlier version began with --classes background=0,0,0;mass" in caplog.text
    assert np.array_equal(stored(tmp_path / "out")["case_00"] > 0, masks[0] > 0)


@pytest.mark.parametrize(
    ("masks", "now"),
    [
        (lambda: [outlined(mask) for mask in masks_of([0, 1])], "are read as .*--ignore 255.*"),
        (lambda: masks_of([0, 1, 2]), "are read as --mask-encoding index .*"),
        (lambda: [*masks_of([0, 1])[1:], *masks_of([0, 255])[:1]], "have several readings: some.*"),
    ],
)
def test_an_earlier_guess_is_not_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, masks: Any, now: str
) -> None:
    """Void borders, more classes, and both 1 and 255 as foreground were read without a word."""
    source = write_source(tmp_path / "source", masks_of([0, 255]))
    begun_earlier(source, tmp_path / "out", monkeypatch, classes=EARLIER_CLASSES)
    for i, mask in enumerate(masks()):
        cv2.imwrite(str(source / "masks" / f"case_{i:02d}.png"), mask.astype(np.uint8))
    before = sorted(path.name for path in tmp_path.rglob("*"))
    match = rf"earlier version was interrupted here, .*; now the masks {now}; delete the folder"
    with pytest.raises(UsageError, match=match):
        prepared(source, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_a_mask_that_contradicts_what_an_earlier_version_began_is_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    masks = [areas([0, 255], side=16, seed=i) for i in range(40)]
    source = write_source(tmp_path / "source", masks)
    begun_earlier(source, tmp_path / "out", monkeypatch, classes=EARLIER_CLASSES)
    sampled = np.linspace(0, 39, NUM_SAMPLED).round()
    unseen = next(i for i in range(10, 40) if i not in sampled)
    ids = areas([0, 1], side=16).astype(np.uint8)
    assert cv2.imwrite(str(source / "masks" / f"case_{unseen}.png"), ids)
    with pytest.raises(ContentError, match=rf"case_{unseen}\.png: has areas of a colour of no cl"):
        prepared(source, tmp_path / "out")


def test_an_option_of_the_first_command_is_missed(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", masks_of([0, 255]))
    prepared(source, tmp_path / "out", classes="a=0,0,0;b=255,255,255")
    with pytest.raises(UsageError, match="was made with --classes a=0,0,0;b=255,255,255; give it"):
        prepared(source, tmp_path / "out")


def test_more_masks_are_read_if_few_have_foreground(tmp_path: Path) -> None:
    empty = np.zeros((8, 8), np.uint8)
    masks = [empty] * 100
    masks[41] = areas([0, 1, 2, 3], side=SIDE)
    source = write_source(tmp_path / "source", masks)
    config = PrepConfig(image_size=8, num_processes=1)
    manifest = prepare_source(str(source), str(tmp_path / "out"), config, progress=False)
    assert len(manifest.classes) == 4
    assert manifest.mask_choice is not None
    assert manifest.mask_choice.num_files > NUM_SAMPLED


def test_bad_masks_are_rejected_and_do_not_decide(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", masks_of([0, 1, 2]))
    (source / "masks" / "case_00.png").write_bytes(b"no image")
    with pytest.raises(ContentError, match="case_00"):
        prepared(source, tmp_path / "out")
    manifest = prepared(source, tmp_path / "out", skip_bad=True)
    assert [each.name for each in manifest.classes] == ["background", "class1", "class2"]


def stored(output: Path) -> dict[str, np.ndarray]:
    """Returns the stored class ids of each image."""
    store = open_store(str(output))
    manifest, _ = read_manifest(store)
    result = {}
    for row in read_samples(store, manifest).to_pylist():
        record = store.get(row["shard"], row["offset"], row["length"])
        data = decode_example(unframe_record(record, where="x"))["image/segmentation/class/encoded"]
        assert isinstance(data, bytes)
        mask = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        result[row["id"]] = np.asarray(mask)
    return result


@pytest.mark.parametrize(
    ("background", "given", "names", "ids"),
    [
        ("first", {}, ["background", "foreground"], [0, 1]),
        ("white", {}, ["white", "black"], [1, 0]),
        ("255", {}, ["white", "black"], [1, 0]),
        ("none", {}, ["none", "black", "white"], [1, 2]),
        ("cell", {"classes": "wall=0,0,0;cell=255,255,255"}, ["cell", "wall"], [1, 0]),
    ],
)
def test_any_class_or_none_is_the_background(
    tmp_path: Path, background: str, given: dict[str, str], names: list[str], ids: list[int]
) -> None:
    masks = masks_of([0, 255])
    source = write_source(tmp_path / "source", masks)
    manifest = prepared(source, tmp_path / "out", background=background, **given)
    assert [each.name for each in manifest.classes] == names
    assert manifest.options.get("background", "first") == background
    for i, mask in enumerate(masks):
        expected = np.where(mask == 255, ids[1], ids[0])
        assert np.array_equal(stored(tmp_path / "out")[f"case_{i:02d}"], expected)
    assert prepared(source, tmp_path / "out", background=background, **given) == manifest


def test_the_background_of_ids_and_colors(tmp_path: Path) -> None:
    masks = masks_of([0, 1, 2])
    source = write_source(tmp_path / "ids", masks)
    manifest = prepared(source, tmp_path / "none", background="none")
    assert [each.name for each in manifest.classes] == ["none", "class0", "class1", "class2"]
    assert np.array_equal(stored(tmp_path / "none")["case_00"], masks[0] + 1)
    prepared(source, tmp_path / "last", background="class2")
    assert np.array_equal(stored(tmp_path / "last")["case_00"], (masks[0] + 1) % 3)
    with pytest.raises(UsageError, match=r"--background 'sky' is no class; .*: class0 \(0,0,0\)"):
        prepared(source, tmp_path / "out", background="sky")
    with pytest.raises(ValueError, match="--missing-mask empty needs a background"):
        PrepConfig(background="none", missing_mask="empty")
    # No colour is black: the user says which one is the background.
    for i, mask in enumerate(masks):
        colors = np.array([(9, 200, 9), (200, 9, 9), (9, 9, 200)], np.uint8)
        path = str(source / "masks" / f"case_{i:02d}.png")
        assert cv2.imwrite(path, colors[mask])  # blue, green and red
    with pytest.raises(UsageError, match="none of them is black"):
        prepared(source, tmp_path / "colors")
    prepared(source, tmp_path / "colors", background="200,9,9")
    assert np.array_equal(stored(tmp_path / "colors")["case_00"] == 0, masks[0] == 2)
