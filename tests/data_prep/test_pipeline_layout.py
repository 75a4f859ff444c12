"""Datasets from other folder layouts: equal files, several masks, missing masks, drawn splits."""

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from data_prep import cli
from data_prep.config import PrepConfig, identity_of
from data_prep.pipeline import prepare_source
from data_prep.shards.manifest import MANIFEST_NAME, Manifest, read_manifest
from data_prep.shards.records import MASK_FEATURE, decode_example, unframe_record
from data_prep.shards.sample_table import read_samples
from flexunet.errors import ContentError, UsageError
from flexunet.storage import open_store
from tests.conftest import FaultyBucket

REAL = Path(__file__).resolve().parents[3] / "shared" / "data"
NUMBERS = range(8)
LATER_OPTIONS: dict[str, Any] = {
    "images": "images",
    "masks": "masks",
    "field_of_view": "view",
    "image_name": "{stem}",
    "mask_name": "{stem}",
    "missing_mask": "empty",
    "draw_valid": 0.2,
}


def write_image(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(
        str(path), np.random.default_rng(seed).integers(0, 256, (16, 16), dtype=np.uint8)
    )


def write_mask(path: Path, *squares: tuple[int, int], value: int = 255) -> None:
    """Writes a mask with squares of 2x2 at (row, column)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = np.zeros((16, 16), np.uint8)
    for row, column in squares:
        mask[row : row + 2, column : column + 2] = value
    assert cv2.imwrite(str(path), mask)


def write_source(folder: Path, image: str, mask: str) -> str:
    """Writes pairs whose paths are the patterns `image` and `mask` of a number."""
    for number in NUMBERS:
        write_image(folder / image.format(number), number)
        write_mask(folder / mask.format(number), (number, 4))
    return str(folder)


def prepared(source: str | Path, output: Path, **options: Any) -> Manifest:
    values = {"image_size": 16, "num_processes": 1, "fractions": (0.5, 0.3, 0.2)} | options
    return prepare_source(str(source), str(output), PrepConfig(**values), progress=False)


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".flexunet-")
    }


def masks_of(folder: Path) -> dict[str, np.ndarray]:
    """Returns the stored mask (16, 16) of each id."""
    store = open_store(str(folder))
    found = {}
    for row in read_samples(store, read_manifest(store)[0]).to_pylist():
        record = (folder / row["shard"]).read_bytes()[row["offset"] :][: row["length"]]
        encoded = decode_example(unframe_record(record, where="x"))[MASK_FEATURE]
        found[row["id"]] = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_UNCHANGED)
    return found


@pytest.mark.parametrize(
    ("image", "mask", "options"),
    [
        ("imgs/{}.png", "Label/{}_gt.png", {}),
        ("{}.png", "{}_mask.png", {}),
        ("deep/a/x/{}.png", "deep/b/y/m{}.png", {"images": "deep/a/*", "masks": "deep/b/*"}),
        ("images/{}.png", "masks/{}.png", {"mask_name": "{stem}"}),
    ],
)
def test_the_dataset_is_that_of_the_usual_folders(
    tmp_path: Path, image: str, mask: str, options: dict[str, str]
) -> None:
    usual = write_source(tmp_path / "usual" / "source", "images/{}.png", "masks/{}.png")
    other = write_source(tmp_path / "other" / "source", image, mask)
    expected = prepared(usual, tmp_path / "a")
    manifest = prepared(other, tmp_path / "b", **options)
    assert manifest.source_sha256 == expected.source_sha256
    assert manifest.options == expected.options | options
    assert manifest.name == "source"
    found, known = files(tmp_path / "b"), files(tmp_path / "a")
    for each in (found, known):
        del each[MANIFEST_NAME]
    assert found == known
    if not options:
        assert prepared(usual, tmp_path / "b") == manifest  # finished already


def test_the_options_of_layouts_are_no_part_of_the_identity_of_older_datasets() -> None:
    identity = identity_of(PrepConfig())
    assert set(LATER_OPTIONS).isdisjoint(identity)
    for name, value in LATER_OPTIONS.items():
        config = PrepConfig(ignore_id=9, **{name: value})
        assert identity_of(config) == identity | {name: value, "ignore_id": 9}


def test_several_masks_of_an_image_are_joined(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for number in NUMBERS:
        write_image(source / f"images/{number}.png", number)
        write_mask(source / f"masks/{number}_a.png", (0, 0), (4, 4))
        if number:
            write_mask(source / f"masks/{number}_b.bmp", (4, 4), (8, number))
    options = {"mask_name": "{stem}_*"}
    manifest = prepared(source, tmp_path / "out", **options)
    stored = masks_of(tmp_path / "out")
    assert stored.keys() == {str(number) for number in NUMBERS}
    for number in NUMBERS:
        expected = np.zeros((16, 16), np.uint8)
        squares = [(0, 0), (4, 4), *([(8, number)] if number else [])]
        for row, column in squares:
            expected[row : row + 2, column : column + 2] = 1
        np.testing.assert_array_equal(stored[str(number)], expected)
    assert prepared(source, tmp_path / "out", **options) == manifest
    write_mask(source / "masks/3_b.bmp", (12, 12))  # of the same size
    with pytest.raises(UsageError, match="contains another dataset"):
        prepared(source, tmp_path / "out", **options)


def test_masks_that_give_two_classes_to_a_pixel_are_bad_files(tmp_path: Path) -> None:
    source = Path(write_source(tmp_path / "source", "images/{}.png", "masks/{}_a.png"))
    write_mask(source / "masks/5_b.png", (5, 5), value=128)  # beside and on the square at 5, 4
    options = {"mask_name": "{stem}_*", "classes": "bg=0,0,0;one=255,255,255;two=128,128,128"}
    with pytest.raises(ContentError) as caught:
        prepared(source, tmp_path / "out", **options)
    text = (
        f"{source}/masks/5_b.png: 2 pixels have another class in {source}/masks/5_a.png, the "
        "first at x 5, y 5: two here, one there; correct one, or select fewer masks with "
        "--mask-name"
    )
    assert text in str(caught.value)
    assert prepared(source, tmp_path / "out", skip_bad=True, **options).num_samples == 7
    assert f"{source}/masks/5_b.png," in (tmp_path / "out/report/rejects.csv").read_text()


def test_a_class_replaces_ignored_pixels_of_another_mask(tmp_path: Path) -> None:
    source = Path(write_source(tmp_path / "source", "images/{}.png", "masks/{}_a.png"))
    for number in NUMBERS:
        write_mask(source / f"masks/{number}_a.png", (0, 0), value=1)
        write_mask(source / f"masks/{number}_b.png", (0, 1), value=9)
    prepared(source, tmp_path / "out", mask_name="{stem}_*", ignore_id=9)
    expected = np.zeros((16, 16), np.uint8)
    expected[0:2, 0:2], expected[0:2, 2] = 1, 9
    for mask in masks_of(tmp_path / "out").values():
        np.testing.assert_array_equal(mask, expected)


def test_an_image_without_a_mask_has_no_finding_if_asked_for(tmp_path: Path) -> None:
    source = Path(write_source(tmp_path / "source", "images/{}.png", "masks/{}.png"))
    (source / "masks/3.png").unlink()
    with pytest.raises(ContentError, match=r"images/3\.png: no mask of this name in"):
        prepared(source, tmp_path / "out")
    prepared(source, tmp_path / "out", missing_mask="empty")
    stored = masks_of(tmp_path / "out")
    assert len(stored) == len(NUMBERS)
    assert {name for name, mask in stored.items() if not mask.any()} == {"3"}
    (source / "images/5.png").unlink()
    with pytest.raises(ContentError, match=r"masks/5\.png: no image of this name in"):
        prepared(source, tmp_path / "other", missing_mask="empty")


@pytest.mark.parametrize("values", [(0, 255), (0, 1), (10, 240)])
def test_pixels_outside_of_the_field_of_view_are_ignored(
    tmp_path: Path, values: tuple[int, int]
) -> None:
    source = Path(write_source(tmp_path / "source", "images/{}.png", "gt/{}.png"))
    view = np.full((16, 16), values[0], np.uint8)
    view[2:9, 3:5] = values[1]
    (source / "view").mkdir()
    for number in NUMBERS:
        assert cv2.imwrite(str(source / f"view/{number}_fov.png"), view)
    options = {"field_of_view": "view", "ignore_id": 7}
    manifest = prepared(source, tmp_path / "out", **options)
    assert manifest.ignore_id == 7
    for name, mask in masks_of(tmp_path / "out").items():
        expected = np.where(view == values[1], 0, 7).astype(np.uint8)
        rows = slice(max(2, int(name)), min(9, int(name) + 2))
        expected[rows, 4] = 1
        np.testing.assert_array_equal(mask, expected)
    assert prepared(source, tmp_path / "out", **options) == manifest
    view[0, 0] = values[1]
    assert cv2.imwrite(str(source / "view/3_fov.png"), view)
    with pytest.raises(UsageError, match="contains another dataset"):
        prepared(source, tmp_path / "out", **options)


@pytest.mark.parametrize(
    ("view", "message"),
    [
        (np.zeros((16, 16), np.uint8), "no pixel is inside of the field of view; replace it"),
        (np.ones((8, 16), np.uint8), "the mask has 16x8 pixels, but its image"),
        (np.dstack([np.eye(16, dtype=np.uint8) * i for i in (9, 90, 200)]), "has colours; it must"),
    ],
)
def test_a_bad_field_of_view_is_named(tmp_path: Path, view: np.ndarray, message: str) -> None:
    source = Path(write_source(tmp_path / "source", "images/{}.png", "gt/{}.png"))
    for number in NUMBERS:
        write_mask(source / f"view/{number}.png", (4, 4))
    assert cv2.imwrite(str(source / "view/6.png"), view)
    options = {"field_of_view": "view", "ignore_id": 7}
    with pytest.raises(ContentError, match=rf"view/6\.png: .*{message}"):
        prepared(source, tmp_path / "out", **options)
    assert prepared(source, tmp_path / "out", skip_bad=True, **options).num_samples == 7
    assert f"{source}/view/6.png," in (tmp_path / "out/report/rejects.csv").read_text()


def write_release(folder: Path) -> str:
    """Writes a release with 12 images of 4 patients for training and 2 of 2 for testing."""
    for number in range(12):
        write_image(folder / f"train/images/p{number % 4}_{number}.png", number)
        write_mask(folder / f"train/masks/p{number % 4}_{number}.png", (4, 4))
    for number in (20, 21):
        write_image(folder / f"test/images/p{number}_{number}.png", number)
        write_mask(folder / f"test/masks/p{number}_{number}.png", (4, 4))
    return str(folder)


def test_a_validation_split_is_drawn_from_train_by_group(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = write_release(tmp_path / "source")
    options = {"group_regex": "p[0-9]+"}
    before = prepared(source, tmp_path / "before", **options)
    assert before.splits["valid"].num_samples == 0
    assert "draw one from train/ with --draw-valid 0.15" in caplog.text
    caplog.clear()
    manifest = prepared(source, tmp_path / "out", draw_valid=0.25, **options)
    assert "no validation split" not in caplog.text
    assert {name: info.num_samples for name, info in manifest.splits.items()} == {
        "train": 9, "valid": 3, "test": 2,
    }  # fmt: skip
    store = open_store(str(tmp_path / "out"))
    groups: dict[str, set[str]] = {}
    for row in read_samples(store, manifest).to_pylist():
        groups.setdefault(row["split"], set()).add(row["group"])
    assert groups["test"] == {"p20", "p21"}
    assert len(groups["valid"]) == 1
    assert groups["valid"].isdisjoint(groups["train"])
    again = prepared(source, tmp_path / "again", draw_valid=0.25, num_processes=2, **options)
    assert again == manifest
    seeds = {
        prepared(source, tmp_path / f"seed{seed}", draw_valid=0.25, seed=seed, **options)
        .splits["valid"].num_samples for seed in (2, 3)
    }  # fmt: skip
    assert seeds == {3}


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (("images/{}.png", "masks/{}.png"), "has no train/ and test/; give --fractions instead"),
        (("train/images/{}.png", "train/masks/{}.png", "valid/images/v.png", "valid/masks/v.png"),
         "has a validation split; leave it out"),
    ],
)  # fmt: skip
def test_a_validation_split_that_cannot_be_drawn_is_a_wrong_call(
    tmp_path: Path, layout: tuple[str, ...], message: str
) -> None:
    source = write_source(tmp_path, *layout[:2])
    for path in layout[2:]:
        write_mask(tmp_path / path, (4, 4))
    with pytest.raises(UsageError, match=f"^--draw-valid 0.2: the source {message}"):
        prepared(source, tmp_path / "out", draw_valid=0.2)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--masks", "gt"], 2, "--masks 'gt': no masks there in"),
        (
            ["--masks", "labels", "--mask-name", "{stem}.png"],
            2,
            "must be a name without its ending",
        ),
        (["--draw-valid", "1"], 2, "--draw-valid=1.0: input should be less than 1"),
        (["--format", "inbreast", "--masks", "gt"], 2, "--masks needs --format pairs"),
        ([], 2, "groundtruth/ and labels/ may be the masks; choose one, for example --masks"),
        (["--masks", "labels"], 3, "no rule pairs them"),
    ],
)
def test_a_wrong_call_ends_with_2_and_bad_names_with_3(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    source = tmp_path / "source"
    for name in ("imgs/a.png", "labels/p.png", "groundtruth/a.png"):
        write_mask(source / name, (4, 4))
    assert cli.main([str(source), str(tmp_path / "out"), *arguments]) == code
    error = capsys.readouterr().err
    assert message in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("image", "mask", "options"),
    [
        ("training/imgs/{}.png", "training/manual1/{}_m.png", {}),
        ("{}.png", "{}_mask.png", {}),
        ("x/a/{}.png", "x/b/{}.png", {"images": "x/a", "masks": "*/b"}),
    ],
)
def test_a_source_in_a_bucket_is_listed_once(
    tmp_path: Path, faulty_bucket: FaultyBucket, image: str, mask: str, options: dict[str, str]
) -> None:
    local = write_source(tmp_path / "source", image, mask)
    url, proxy = f"{faulty_bucket.url}/source", faulty_bucket.proxy
    for name, data in files(Path(local)).items():
        open_store(url).put(name, data)
    expected = prepared(local, tmp_path / "a", **options)
    proxy.clear()
    assert prepared(url, tmp_path / "b", **options) == expected
    assert proxy.count("list") <= 2  # the folders of the source, and all its files
    assert proxy.count("get") == 3 * len(NUMBERS)  # the masks are a sample as well
    assert proxy.count("stat") == 0


@pytest.mark.skipif(not REAL.is_dir(), reason=f"real data sets are not at {REAL}")
def test_prep_reads_drive_as_it_is_released(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "field_of_view": "training/mask", "ignore_id": 2, "image_size": 32,
    }  # fmt: skip
    manifest = prepared(REAL / "drive", tmp_path / "out", **options)
    assert (manifest.name, manifest.num_samples, manifest.channels) == ("drive", 20, 3)
    assert set(manifest.splits) == {"train", "valid", "test"}
    for mask in masks_of(tmp_path / "out").values():
        shares = [np.mean(mask == value) for value in range(3)]
        assert shares[1] > 0.02  # vessels
        assert 0.25 < shares[2] < 0.4  # outside of the field of view, a disc
        assert (mask[0, 0], mask[16, 16] != 2) == (2, True)
