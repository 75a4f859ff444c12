"""Tests tiles: their positions, how they are joined again, and datasets of tiles."""

import shutil

import cv2
import numpy as np
import pytest

from data_prep import report_files
from data_prep.config import PrepConfig
from data_prep.imaging.geometry import Box, apply_geometry, fit
from data_prep.imaging.tiles import around, count, cut, joined, starts
from data_prep.pipeline import prepare
from data_prep.shards.manifest import read_manifest
from data_prep.shards.records import decode_example, sha256_of_pixels, unframe_record
from data_prep.shards.sample_table import read_samples
from data_prep.sources.pairs import find_sources
from flexunet.errors import ContentError
from flexunet.storage import open_store


@pytest.mark.parametrize(
    ("length", "size", "overlap", "expected"),
    [
        (16, 16, 0, [0]),
        (10, 16, 4, [0]),  # smaller than a tile
        (32, 16, 0, [0, 16]),
        (33, 16, 0, [0, 8, 17]),  # 17 pixels remain: two gaps of 8.5, 8.5 rounds to 8
        (40, 16, 8, [0, 8, 16, 24]),  # 24 remain in steps of at most 8
    ],
)
def test_starts_cover_the_length_evenly(length, size, overlap, expected):
    assert starts(length, size, overlap) == expected


@pytest.mark.parametrize("size", [(37, 50), (16, 16), (9, 30), (5, 7)])
@pytest.mark.parametrize("crop", [None, Box(2, 1, 3, 5)])
@pytest.mark.parametrize("is_flipped", [False, True])
def test_joined_tiles_are_the_framed_image(size, crop, is_flipped):
    image = np.random.default_rng(0).integers(0, 2**16, (*size, 3), dtype=np.uint16)
    whole = fit(size, (1, 1), kind="tile", crop=crop, is_flipped=is_flipped)
    framed = apply_geometry(image, whole, whole.height, whole.width, nearest=False)
    assert framed.shape[:2] == ((3, 5) if crop else size)
    geometries = [geometry for _, geometry in cut(whole, 16, 16, 4)]
    pieces = [apply_geometry(image, each, 16, 16, nearest=False) for each in geometries]
    assert {piece.shape for piece in pieces} == {(16, 16, 3)}
    for (place, _), piece in zip(cut(whole, 16, 16, 4), pieces, strict=True):
        part = framed[place.top : place.top + 16, place.left : place.left + 16]
        assert np.array_equal(piece[: part.shape[0], : part.shape[1]], part)
        assert not piece[part.shape[0] :].any()
    assert around(geometries) == whole
    assert np.array_equal(joined(pieces, geometries), framed)


def _write(folder, name, seed, size=(40, 24)):
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    image = np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)
    image[-16:, -16:] = 0  # film: the same in all images
    mask = np.zeros(size, np.uint8)
    mask[2:6, 2:6] = 255
    assert cv2.imwrite(str(folder / "images" / f"{name}.png"), image)
    assert cv2.imwrite(str(folder / "masks" / f"{name}.png"), mask)


def _prepare(source, output, **options):
    values = {"tile": 16, "num_processes": 1, "fractions": (0.6, 0.2, 0.2)} | options
    config = PrepConfig(**values)
    return prepare(find_sources(str(source)), str(output), config, progress=False)


def _rows(output):
    store = open_store(str(output))
    manifest, _ = read_manifest(store)
    return read_samples(store, manifest).to_pylist()


def test_prepare_records_each_tile_and_keeps_an_image_in_one_split(tmp_path):
    for index in range(10):
        _write(tmp_path / "source", f"patient{index // 2}-{index}", index)
    options = {"tile_overlap": 4, "group_regex": "patient([0-9])"}
    manifest = _prepare(tmp_path / "source", tmp_path / "out", **options)
    assert (manifest.geometry, manifest.image_height, manifest.image_width) == ("tile", 16, 16)
    rows = _rows(tmp_path / "out")
    # 40 rows in steps of at most 12: 0, 12, 24; 24 columns: 0, 8.
    assert len(rows) == 10 * 3 * 2
    assert manifest.num_samples == 60
    assert len({row["id"] for row in rows}) == 60
    splits = {}
    for row in rows:
        splits.setdefault(row["group"], set()).add(row["split"])
        image = cv2.imread(str(tmp_path / "source" / "images" / row["filename"]), 0)
        top, left = row["crop_top"], row["crop_left"]
        assert row["id"] == f"{row['picture']}_y{top}_x{left}"
        assert (row["source_height"], row["source_width"]) == (40, 24)
        tile = np.ascontiguousarray(image[top : top + 16, left : left + 16])
        assert row["sha256"] == sha256_of_pixels(tile)
        data = (tmp_path / "out" / row["shard"]).read_bytes()
        record = data[row["offset"] :][: row["length"]]
        features = decode_example(unframe_record(record, where="x"))
        place = [features[f"image/tile/{name}"] for name in ("picture", "top", "left")]
        assert place == [row["picture"].encode(), top, left]
    # The tile of film is in all images, but the patients were not merged.
    assert sorted(splits) == ["0", "1", "2", "3", "4"]
    assert all(len(found) == 1 for found in splits.values())


def test_prepare_joins_images_that_are_the_same(tmp_path, caplog):
    for index in range(5):
        _write(tmp_path / "source", f"case-{index}", index)
    _write(tmp_path / "source", "copy", 3)
    _prepare(tmp_path / "source", tmp_path / "out")
    groups = {row["picture"]: row["group"] for row in _rows(tmp_path / "out")}
    assert groups["copy"] == groups["case-3"]
    assert len(set(groups.values())) == 5
    assert "1 group shares an image with another group" in caplog.text


def test_prepare_refuses_ready_made_splits_with_the_same_image(tmp_path):
    for index, split in enumerate(("train", "valid", "test")):
        _write(tmp_path / "source" / split, f"case-{index}", index)
    _prepare(tmp_path / "source", tmp_path / "out")  # the shared tile of film is no leak
    _write(tmp_path / "source" / "test", "again", 0)
    with pytest.raises(ContentError, match="leak"):
        _prepare(tmp_path / "source", tmp_path / "other")


def test_prepare_leaves_bad_images_out_and_continues(tmp_path):
    for index in range(6):
        _write(tmp_path / "source", f"case-{index}", index)
    shutil.copytree(tmp_path / "source", tmp_path / "broken")
    (tmp_path / "broken" / "images" / "case-2.png").write_bytes(b"no picture")
    manifest = _prepare(tmp_path / "broken", tmp_path / "out", skip_bad=True)
    # 3 x 2 tiles of five images.
    assert manifest.num_samples == 5 * 6
    again = _prepare(tmp_path / "broken", tmp_path / "out", skip_bad=True)
    assert again == manifest


def test_prepare_reports_images_and_not_their_tiles(tmp_path, caplog):
    for index in range(5):
        _write(tmp_path / "source", f"case-{index}", index)
    path = str(tmp_path / "source" / "images" / "case-1.png")
    colours = np.random.default_rng(9).integers(0, 256, (40, 24, 3), dtype=np.uint8)
    assert cv2.imwrite(path, colours)
    _prepare(tmp_path / "source", tmp_path / "out")
    assert "1 of 5 images have colour" in caplog.text
    assert "case-1.png" in caplog.text


def test_sheets_show_tiles_with_foreground_first(tmp_path):
    for index in range(10):
        _write(tmp_path / "source", f"case-{index}", index)
    _prepare(tmp_path / "source", tmp_path / "out")
    rows = [row for row in _rows(tmp_path / "out") if row["split"] == "train"]
    # One of the 6 tiles of an image has a lesion; a contact sheet shows 6 samples.
    assert sum(row["pixels_per_class"][1] > 0 for row in rows) == 6
    assert all(row["pixels_per_class"][1] for row in report_files._shown(rows))


def test_an_image_of_too_many_tiles_is_refused_in_one_line(tmp_path):
    source = tmp_path / "source"
    for kind in ("images", "masks"):
        (source / kind).mkdir(parents=True)
    for index, side in enumerate((160, 20, 20, 20)):
        image = np.random.default_rng(index).integers(0, 256, (side, side), np.uint8)
        for kind, pixels in (("images", image), ("masks", 255 * (image > 9))):
            assert cv2.imwrite(str(source / kind / f"{index}.png"), pixels.astype(np.uint8))
    options = {"tile": 8, "tile_overlap": 7, "fractions": (0.5, 0.25, 0.25)}
    problem = (
        r"0\.png: 160x160 pixels would give 23409 tiles, more than 20000; increase --tile or "
        r"reduce --tile-overlap; or skip such files with --skip-bad$"
    )
    with pytest.raises(ContentError, match=problem):
        _prepare(source, tmp_path / "out", **options)
    _prepare(source, tmp_path / "others", **options, skip_bad=True)
    assert {row["picture"] for row in _rows(tmp_path / "others")} == {"1", "2", "3"}
    whole = fit((20, 20), (1, 1), kind="tile")
    assert count(whole, 8, 8, 7) == len(list(cut(whole, 8, 8, 7))) == 13 * 13
    assert len(_rows(tmp_path / "others")) == 3 * 13 * 13
