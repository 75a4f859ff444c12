"""Tests scanning, planning, writing and continuing, on small images made here."""

import dataclasses
import json
import os

import cv2
import google_crc32c
import numpy as np
import pytest

from data_prep.imaging.pixels import PixelFormat
from data_prep.masks.color_map import DEFAULT_CLASSES
from data_prep.shards.encode import chunked, moments_of, scan_chunks
from data_prep.shards.manifest import shard_name
from data_prep.shards.output import claim_output, remove_state, staging_url
from data_prep.shards.pixel_format import clipped, common_pixel_format
from data_prep.shards.records import decode_example, sha256_of_pixels, unframe_record
from data_prep.shards.source_pairs import (
    File,
    Layout,
    Moments,
    RejectedPair,
    ScanBatch,
    ScanTask,
    SourcePair,
)
from data_prep.shards.write import mean_and_std, plan_shards, write_shard
from flexunet.errors import ContentError, UsageError
from flexunet.storage import open_store

_LAYOUT = Layout(
    height=8,
    width=8,
    geometry="stretch",
    channels="auto",
    classes=DEFAULT_CLASSES,
    ignore_id=None,
    max_pixels=10_000,
)


def _write(folder, name, pixels):
    os.makedirs(folder, exist_ok=True)
    path = f"{folder}/{name}"
    assert cv2.imwrite(path, pixels)
    info = os.stat(path)
    return File(str(folder), name, path, info.st_size, info.st_mtime_ns)


def _item(tmp_path, name, image, mask=None):
    mask = np.zeros(image.shape[:2], np.uint8) if mask is None else mask
    return SourcePair(
        id=name,
        group=name,
        filename=f"{name}.png",
        split=None,
        image=_write(tmp_path / "images", f"{name}.png", image),
        mask=_write(tmp_path / "masks", f"{name}.png", mask),
    )


def _grey(value, dtype=np.uint8):
    return np.full((8, 8), value, dtype)


def _scan(tmp_path, items, *, skip_bad=False, **changes):
    layout = dataclasses.replace(_LAYOUT, **changes)
    staging = staging_url(f"{tmp_path}/out")
    task = ScanTask(staging, layout, tuple(items), skip_bad)
    return scan_chunks(ScanBatch((task,), (True,), 1))


def _plan(tmp_path, samples, **changes):
    options = {"shard_size_mb": 64, "seed": 1} | changes
    splits = {sample.id: "train" for sample in samples}
    chosen = common_pixel_format(samples)
    return plan_shards(
        samples, splits, pixel_format=chosen, output_url=f"{tmp_path}/out", **options
    )


def _pixels(tmp_path, written, index=0):
    placed = written.records[index]
    store = open_store(f"{tmp_path}/out")
    record = store.get(written.info.name, placed.offset, placed.length)
    features = decode_example(unframe_record(record, where="x"))
    encoded = np.frombuffer(features["image/encoded"], np.uint8)
    return cv2.imdecode(encoded, cv2.IMREAD_UNCHANGED)


def test_scan_reports_facts_of_a_grey_image_stored_as_rgb(tmp_path):
    image = np.zeros((8, 8, 3), np.uint8)
    image[0, 0] = 10
    mask = np.zeros((8, 8), np.uint8)
    mask[:2, :3] = 255
    (found,) = _scan(tmp_path, [_item(tmp_path, "a", image, mask)])
    assert (found.channels, found.bit_depth, found.max_value) == (1, 8, 10)
    assert found.pixels_per_class == (58, 6)
    assert found.moments == Moments(64, (10,), (100,))
    assert found.unmapped_pixels == 0
    assert found.sha256 == sha256_of_pixels(image[:, :, :1])
    source = (tmp_path / "images" / "a.png").read_bytes()
    assert found.source_crcs[0] == google_crc32c.value(source)


def test_moments_are_exact_for_large_16_bit_images():
    image = np.full((1500, 1024, 1), 65535, np.uint16)
    image[0, 0] = 65534
    count = 1500 * 1024
    assert moments_of(image) == Moments(
        count, (65535 * count - 1,), (65535**2 * (count - 1) + 65534**2,)
    )


def test_mean_and_std_of_two_images():
    # values 1, 3 and 5, 7: mean 4; squared deviations 9, 1, 1, 9: variance 5
    parts = [Moments(2, (4,), (10,)), Moments(2, (12,), (74,))]
    assert mean_and_std(parts) == ((4.0,), (5**0.5,))


def test_scan_names_the_file_and_both_sizes(tmp_path):
    item = _item(tmp_path, "a", _grey(1), np.zeros((4, 9), np.uint8))
    with pytest.raises(ContentError, match=r"masks/a\.png: the mask has 9x4 .*has 8x8"):
        _scan(tmp_path, [item])
    assert open_store(f"{tmp_path}/out").list() == []


def test_scan_names_the_colour_that_is_no_class(tmp_path):
    mask = np.zeros((8, 8, 3), np.uint8)
    mask[0, :2] = (0, 0, 255)  # BGR: red, 2 of 64 pixels
    mask[4, :2] = 255
    item = _item(tmp_path, "a", _grey(1), mask)
    (found,) = _scan(tmp_path, [item])
    assert (found.unmapped_pixels, found.unexplained_pixels) == (2, 2)
    assert found.unmapped_colors == (((255, 0, 0), 2, 0),)
    mask[0:2, :2] = (0, 0, 255)
    item = _item(tmp_path, "b", _grey(1), mask)
    words = r"masks/b\.png: .* 4 pixels of colour 255,0,0 at row 0, column 0; .*--ignore 255,0,0"
    with pytest.raises(ContentError, match=words):
        _scan(tmp_path, [item])
    (found,) = _scan(tmp_path, [item], ignore_id=254, ignored=((255, 0, 0),))
    assert (found.unmapped_pixels, found.pixels_per_class) == (0, (58, 2))


def test_scan_skips_a_bad_pair_and_says_why(tmp_path):
    bad = _item(tmp_path, "bad", _grey(1))
    (tmp_path / "images" / "bad.png").write_bytes(b"not a picture")
    good = _item(tmp_path, "good", _grey(2))
    with pytest.raises(ContentError, match=r"bad\.png"):
        _scan(tmp_path, [bad, good])
    first, second = _scan(tmp_path, [bad, good], skip_bad=True)
    assert isinstance(first, RejectedPair)
    assert first.file == str(tmp_path / "images" / "bad.png")
    assert first.reason.startswith(first.file)
    assert second.offset == 0


def test_scan_again_reads_the_staged_index(tmp_path):
    items = [_item(tmp_path, name, _grey(7)) for name in "ab"]
    before = _scan(tmp_path, items)
    os.remove(tmp_path / "images" / "a.png")  # not needed any more
    assert _scan(tmp_path, items) == before


def test_scan_again_after_damage_does_the_work_again(tmp_path):
    items = [_item(tmp_path, name, _grey(7)) for name in "ab"]
    before = _scan(tmp_path, items)
    staged = tmp_path / "out" / "prep-state" / before[0].staged
    staged.write_bytes(staged.read_bytes()[:-20])
    assert _scan(tmp_path, items) == before


def test_scan_of_a_skipped_chunk_is_strict_without_skip_bad(tmp_path):
    bad = _item(tmp_path, "bad", _grey(1))
    (tmp_path / "images" / "bad.png").write_bytes(b"")
    _scan(tmp_path, [bad], skip_bad=True)
    with pytest.raises(ContentError, match=r"bad\.png"):
        _scan(tmp_path, [bad])


def test_target_is_grey_only_when_all_are_grey(tmp_path):
    colour = np.zeros((8, 8, 3), np.uint8)
    colour[0, 0] = (1, 2, 3)
    samples = _scan(tmp_path, [_item(tmp_path, "a", _grey(1)), _item(tmp_path, "b", colour)])
    assert common_pixel_format(samples[:1]) == PixelFormat(1, 8, 255)
    assert common_pixel_format(samples) == PixelFormat(3, 8, 255)


def test_target_keeps_the_bits_in_use(tmp_path):
    samples = _scan(tmp_path, [_item(tmp_path, "a", _grey(3000, np.uint16))])
    assert common_pixel_format(samples) == PixelFormat(1, 16, 4095)


def _marked(value, num_marked=1):
    """Returns 40x40 pixels of 12 bits, `num_marked` of them with `value`."""
    pixels = np.random.default_rng(0).integers(0, 4096, (40, 40), dtype=np.uint16)
    pixels[0, 0] = 4095
    pixels.ravel()[1 : num_marked + 1] = value
    return pixels


@pytest.mark.parametrize(
    ("images", "value_max"),
    [
        ([_marked(0)] * 9 + [_marked(65535)], 4095),  # one pixel in one of ten
        ([_marked(0)] * 9 + [_marked(16383)], 4095),
        ([_marked(0)] * 9 + [_marked(8191)], 8191),  # not much darker
        ([_marked(0)] * 9 + [_marked(65535, 2)], 65535),  # more than a thousandth of it
        ([_marked(0)] * 8 + [_marked(65535)], 65535),  # one of nine
        ([_marked(0)] * 18 + [_marked(65535)] * 2, 4095),
        ([_marked(65535)] * 10, 65535),
    ],
)
def test_few_outliers_do_not_make_all_images_dark(tmp_path, images, value_max):
    items = [_item(tmp_path, f"{i:02}", image) for i, image in enumerate(images)]
    samples = _scan(tmp_path, items, height=40, width=40)
    assert common_pixel_format(samples) == PixelFormat(1, 16, value_max)
    written = write_shard(_plan(tmp_path, samples)[0])
    stored = [_pixels(tmp_path, written, i) for i in range(len(images))]
    assert max(int(pixels.max()) for pixels in stored) == min(value_max, max(map(np.max, images)))
    for record, pixels in zip(written.records, stored, strict=True):
        assert record.sha256 == sha256_of_pixels(pixels)
        assert record.moments == moments_of(pixels[..., np.newaxis])


def test_given_full_scale_is_taken_and_what_is_above_it_counted(tmp_path):
    items = [_item(tmp_path, f"{i}", _marked(65535, 5 * i)) for i in range(3)]
    samples = _scan(tmp_path, items, full_scale=5000, height=40, width=40)
    target = common_pixel_format(samples, 5000)
    assert target == PixelFormat(1, 16, 5000)
    above = [(each.id, count) for each, count in clipped(samples, 5000, 5000)]
    assert above == [("2", 10), ("1", 5)]


def test_odd_images_are_stored_like_the_others(tmp_path):
    colour = np.zeros((8, 8, 3), np.uint16)
    colour[0, 0] = (100, 200, 4000)
    samples = _scan(tmp_path, [_item(tmp_path, "a", _grey(51)), _item(tmp_path, "b", colour)])
    (task,) = _plan(tmp_path, samples)
    written = write_shard(task)
    index = [sample.id for sample in task.records].index("a")
    pixels = _pixels(tmp_path, written, index)
    # 51 of 255 is a fifth of 4095: 819
    assert (pixels.dtype, pixels.shape, set(pixels.ravel())) == (np.uint16, (8, 8, 3), {819})
    assert written.records[index].moments.sums == (819 * 64,) * 3
    assert written.records[index].sha256 == sha256_of_pixels(pixels)
    assert np.array_equal(_pixels(tmp_path, written, 1 - index), colour)


def test_channels_option_decides_for_all(tmp_path):
    colour = np.zeros((8, 8, 3), np.uint8)
    colour[:] = (0, 0, 255)  # BGR; the luma of red is 76.245
    item = _item(tmp_path, "b", colour)
    (grey,) = _scan(tmp_path, [item], channels="grey")
    assert (grey.channels, grey.moments.sums) == (1, (76 * 64,))
    (rgb,) = _scan(tmp_path, [item], channels="rgb")
    assert rgb.moments.sums == (255 * 64, 0, 0)


def test_plan_cuts_by_size_and_mixes_neighbours(tmp_path):
    items = [_item(tmp_path, f"{i:02d}", _grey(i)) for i in range(20)]
    samples = _scan(tmp_path, items)
    total = sum(sample.length for sample in samples)
    tasks = _plan(tmp_path, samples, shard_size_mb=total / 4 / 1e6)
    assert [task.name for task in tasks] == [shard_name("train", i, 4) for i in range(4)]
    assert [len(task.records) for task in tasks] == [5, 5, 5, 5]
    order = [sample.id for task in tasks for sample in task.records]
    assert sorted(order) == [item.id for item in items] != order
    assert tasks == _plan(tmp_path, samples[::-1], shard_size_mb=total / 4 / 1e6)
    other = _plan(tmp_path, samples, seed=2)
    assert [sample.id for sample in other[0].records] != order


def test_plan_has_one_shard_at_least(tmp_path):
    samples = _scan(tmp_path, [_item(tmp_path, "a", _grey(1))])
    (task,) = _plan(tmp_path, samples, shard_size_mb=1e-9)
    assert (task.name, len(task.records)) == ("train-00000-of-00001.tfrecord", 1)


def test_write_shard_keeps_a_finished_one(tmp_path):
    (task,) = _plan(tmp_path, _scan(tmp_path, [_item(tmp_path, "a", _grey(1))]))
    before = write_shard(task)
    path = tmp_path / "out" / task.name
    written_at = path.stat().st_mtime_ns
    assert write_shard(task) == before
    assert path.stat().st_mtime_ns == written_at
    assert before.info.crc32c == google_crc32c.value(path.read_bytes())


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: b"x" + data[1:]])
def test_write_shard_refuses_to_replace_another(tmp_path, change):
    (task,) = _plan(tmp_path, _scan(tmp_path, [_item(tmp_path, "a", _grey(1))]))
    write_shard(task)
    path = tmp_path / "out" / task.name
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ContentError, match=r"train-00000-of-00001\.tfrecord: is damaged or"):
        write_shard(task)


def test_write_shard_finds_a_damaged_staged_record(tmp_path):
    (task,) = _plan(tmp_path, _scan(tmp_path, [_item(tmp_path, "a", _grey(1))]))
    staged = tmp_path / "out" / "prep-state" / task.records[0].staged
    data = bytearray(staged.read_bytes())
    data[40] ^= 1
    staged.write_bytes(data)
    with pytest.raises(ContentError, match="checksum differs"):
        write_shard(task)
    assert not (tmp_path / "out" / task.name).exists()


def test_claim_output_names_the_option_that_differs(tmp_path):
    store = open_store(f"{tmp_path}/out")
    plan = {"options": {"image_size": 512, "seed": 1}, "source_sha256": "a"}
    claim_output(store, plan)
    claim_output(store, plan)
    other = plan | {"options": {"image_size": 256, "seed": 1}}
    with pytest.raises(UsageError, match="--image-size was 512, now 256"):
        claim_output(store, other)
    with pytest.raises(UsageError, match="files of the source changed"):
        claim_output(store, plan | {"source_sha256": "b"})


def test_claim_output_refuses_shards_of_unknown_origin(tmp_path):
    store = open_store(f"{tmp_path}/out")
    store.put("notes.txt", b"mine")
    store.put("train-00000-of-00001.tfrecord", b"?")
    with pytest.raises(UsageError, match=r"contains train-00000-of-00001\.tfrecord"):
        claim_output(store, {"options": {}, "source_sha256": "a"})


def test_remove_state_leaves_everything_else(tmp_path):
    store = open_store(f"{tmp_path}/out")
    claim_output(store, {"options": {}, "source_sha256": "a"})
    store.put("prep-state/scan-1.bin", b"1")
    store.put("notes.txt", b"mine")
    remove_state(store)
    assert [stat.name for stat in store.list()] == ["notes.txt"]


def test_chunks_depend_on_the_input_alone_and_fit_memory(tmp_path):
    item = _item(tmp_path, "a", _grey(1))
    assert [len(chunk) for chunk in chunked([item] * 9, _LAYOUT)] == [4, 4, 1]
    sizes = {len(chunk) for chunk in chunked([item] * 6400, _LAYOUT)}
    assert sizes == {32}
    large = dataclasses.replace(_LAYOUT, height=4096, width=4096)  # 117 MB uncompressed
    assert {len(chunk) for chunk in chunked([item] * 100, large)} == {1}


def test_tiles_are_staged_in_parts_of_bounded_size(tmp_path, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 4096, (64, 64), dtype=np.uint16)
    item = _item(tmp_path, "a", pixels)
    layout = {"geometry": "tile", "tile_overlap": 6}
    whole = _scan(tmp_path / "whole", [item], **layout)
    assert len({sample.staged for sample in whole}) == 1
    limit = 5000
    monkeypatch.setattr("data_prep.shards.staging._PART_BYTES", limit)
    samples = _scan(tmp_path, [item], **layout)
    assert len(samples) == len(whole) == 29 * 29
    sizes = {}
    for sample in samples:
        sizes[sample.staged] = sizes.get(sample.staged, 0) + sample.length
    assert max(sizes.values()) <= limit < sum(sizes.values()) / 10
    assert _scan(tmp_path, [item], **layout) == samples  # from the index
    first, second = (
        [write_shard(task).info for task in _plan(folder, found)]
        for folder, found in ((tmp_path / "whole", whole), (tmp_path, samples))
    )
    assert first == second  # with the checksum


def test_tiles_continue_where_an_account_may_not_replace_parts(tmp_path, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 4096, (64, 64), dtype=np.uint16)
    item = _item(tmp_path, "a", pixels)
    monkeypatch.setattr("data_prep.shards.staging._PART_BYTES", 5000)
    layout = {"geometry": "tile", "tile_overlap": 6}
    before = _scan(tmp_path, [item], **layout)
    staging = tmp_path / "out" / "prep-state"
    (staging / before[-1].staged).unlink()  # the last part, as after a stop
    written = {path: path.stat().st_mtime_ns for path in staging.iterdir()}
    assert _scan(tmp_path, [item], **layout) == before
    assert {path: path.stat().st_mtime_ns for path in written} == written


def test_staged_index_is_json(tmp_path):
    (found,) = _scan(tmp_path, [_item(tmp_path, "a", _grey(1))])
    data = (tmp_path / "out" / "prep-state" / found.staged).read_bytes()
    (entry,) = json.loads(data[found.offset + found.length : -12])
    assert (entry["kind"], entry["id"]) == ("EncodedSample", "a")
