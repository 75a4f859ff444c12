"""The dataset contract, against TensorFlow's own reader and writer."""

import dataclasses
import hashlib
import json

import google_crc32c
import numpy as np
import pytest

from data_prep.imaging.geometry import Geometry
from data_prep.shards import schema
from flexunet.errors import ContentError, UsageError
from flexunet.storage import open_store


def _sample(height=4, width=6, channels=1, dtype=np.uint8):
    image = np.arange(height * width * channels).reshape(height, width, channels).astype(dtype)
    mask = np.zeros((height, width), np.uint8)
    mask[1:3, 2:4] = 1
    geometry = Geometry("stretch", 8, 12, 0, 0, height, width)
    return schema.Sample(
        id="a1",
        group="17",
        image=image,
        mask=mask,
        filename="a1.png",
        geometry=geometry,
        spacing_mm=None,
        pixel_sha256=schema.sha256_of_pixels(image),
        off_map_pixels=0,
    )


def _manifest(**changes):
    values = {
        "name": "d",
        "image_height": 4,
        "image_width": 6,
        "channels": 1,
        "bit_depth": 8,
        "value_max": 255,
        "classes": [
            {"id": 0, "name": "background", "color": [0, 0, 0]},
            {"id": 1, "name": "mass", "color": [255, 255, 255]},
        ],
        "geometry": "stretch",
        "split_rule": "file",
        "seed": 1,
        "splits": {"train": {"num_samples": 1, "num_groups": 1}},
        "shards": [
            {
                "name": "train-00000-of-00001.tfrecord",
                "split": "train",
                "num_records": 1,
                "num_bytes": 100,
                "crc32c": 5,
            }
        ],
        "samples_num_bytes": 10,
        "samples_crc32c": 7,
        "mean": [1.5],
        "std": [0.5],
        "tool_version": "0.1.0",
    }
    return values | changes


def _row(**changes):
    values = {
        "split": "train",
        "shard": "train-00000-of-00001.tfrecord",
        "offset": 0,
        "length": 100,
        "id": "a1",
        "group": "17",
        "filename": "a1.png",
        "source_height": 8,
        "source_width": 12,
        "spacing_y_mm": None,
        "spacing_x_mm": None,
        "geometry_kind": "stretch",
        "top": 0,
        "left": 0,
        "height": 4,
        "width": 6,
        "pixels_per_class": [20, 4],
        "off_map_pixels": 0,
        "sha256": "00",
        "fold": None,
        "crop_top": None,
        "crop_left": None,
        "crop_height": None,
        "crop_width": None,
        "is_flipped": False,
        "picture": None,
    }
    return values | changes


def _stored(tmp_path, rows, **changes):
    store = open_store(str(tmp_path))
    data = schema.samples_to_parquet(rows)
    store.put(schema.SAMPLES_NAME, data)
    sizes = {"samples_num_bytes": len(data), "samples_crc32c": google_crc32c.value(data)}
    return store, schema.Manifest.model_validate(_manifest(**sizes, **changes))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_record_is_read_by_tensorflow(tmp_path, channels, dtype):
    import tensorflow as tf

    sample = _sample(channels=channels, dtype=dtype)
    path = tmp_path / "x.tfrecord"
    record = schema.frame_record(schema.encode_example(sample))
    path.write_bytes(record + record)
    spec = {
        "image/encoded": tf.io.FixedLenFeature([], tf.string),
        "image/segmentation/class/encoded": tf.io.FixedLenFeature([], tf.string),
        "image/height": tf.io.FixedLenFeature([], tf.int64),
        "image/width": tf.io.FixedLenFeature([], tf.int64),
        "image/channels": tf.io.FixedLenFeature([], tf.int64),
        "image/id": tf.io.FixedLenFeature([], tf.string),
        "image/group": tf.io.FixedLenFeature([], tf.string),
        "image/filename": tf.io.FixedLenFeature([], tf.string),
        "image/format": tf.io.FixedLenFeature([], tf.string),
        "image/segmentation/class/format": tf.io.FixedLenFeature([], tf.string),
    }
    records = list(tf.data.TFRecordDataset(str(path)))
    assert len(records) == 2
    parsed = tf.io.parse_single_example(records[1], spec)
    image = tf.io.decode_png(parsed["image/encoded"], dtype=tf.as_dtype(dtype)).numpy()
    mask = tf.io.decode_png(parsed["image/segmentation/class/encoded"]).numpy()
    assert np.array_equal(image, sample.image)
    assert image.dtype == dtype
    assert np.array_equal(mask[:, :, 0], sample.mask)
    assert [int(parsed[f"image/{key}"]) for key in ("height", "width", "channels")] == [
        4,
        6,
        channels,
    ]
    assert parsed["image/id"] == b"a1"
    assert parsed["image/group"] == b"17"
    assert parsed["image/filename"] == b"a1.png"
    assert parsed["image/format"] == parsed["image/segmentation/class/format"] == b"png"


def test_encode_features_equals_tensorflow_message():
    import tensorflow as tf

    values = {"b": 300, "a": b"x" * 200, "zero": 0, "minus": -1, "empty": b""}
    payload = schema.encode_features(values)
    message = tf.train.Example.FromString(payload)
    expected = tf.train.Example()
    for key, value in values.items():
        if isinstance(value, int):
            expected.features.feature[key].int64_list.value.append(value)
        else:
            expected.features.feature[key].bytes_list.value.append(value)
    assert message == expected
    assert schema.decode_example(payload) == values
    assert schema.decode_example(expected.SerializeToString()) == values


def test_encode_features_does_not_depend_on_order():
    # Example{Features{entry{"a", int64_list packed [1]}}}, written out by hand:
    # 0a len, 0a len, 0a 01 'a', 12 len, 1a 03 (int64_list), 0a 01 01 (packed)
    entry = bytes.fromhex("0a0161" + "1205" + "1a03" + "0a0101")
    hand = bytes([0x0A, len(entry) + 2, 0x0A, len(entry)]) + entry
    assert schema.encode_features({"a": 1}) == hand
    forward = schema.encode_features({"a": 1, "b": b"2"})
    assert forward == schema.encode_features({"b": b"2", "a": 1})


def test_decode_example_refuses_damage():
    payload = schema.encode_features({"a": 1, "b": b"22"})
    for damaged in (payload[:-1], payload + b"\x08", b"\xff" * 12, b"\x0a\x7f"):
        with pytest.raises(ContentError, match=r"not a tf\.train\.Example"):
            schema.decode_example(damaged)


def test_unframe_record_finds_every_flipped_byte():
    record = schema.frame_record(b"hello")
    assert len(record) == 5 + schema.RECORD_OVERHEAD
    assert schema.unframe_record(record, where="x") == b"hello"
    for i in range(len(record)):
        damaged = bytearray(record)
        damaged[i] ^= 1
        with pytest.raises(ContentError, match="shard 7"):
            schema.unframe_record(bytes(damaged), where="shard 7")
    for wrong in (record[:-1], record + b"\0", b""):
        with pytest.raises(ContentError, match="shard 7"):
            schema.unframe_record(wrong, where="shard 7")


def test_sha256_of_pixels_is_that_of_little_endian_rows():
    pixels = np.array([[1, 256]], np.uint16)  # 01 00, 00 01
    expected = hashlib.sha256(bytes([1, 0, 0, 1])).hexdigest()
    assert schema.sha256_of_pixels(pixels) == expected
    assert schema.sha256_of_pixels(pixels.astype(">u2")) == expected


def test_shard_name_matches_its_pattern():
    assert schema.shard_name("train", 0, 8) == "train-00000-of-00008.tfrecord"
    assert schema.SHARD_PATTERN.fullmatch(schema.shard_name("test", 3, 12))


def test_manifest_survives_writing_and_is_named_by_its_digest(tmp_path):
    manifest = schema.Manifest.model_validate(_manifest())
    store = open_store(str(tmp_path))
    store.put(schema.MANIFEST_NAME, manifest.to_json())
    found, digest = schema.read_manifest(store)
    assert found == manifest
    assert digest == hashlib.sha256(manifest.to_json()).hexdigest()


def test_manifest_of_a_version_that_counted_no_regions_is_read():
    values = json.loads(schema.Manifest.model_validate(_manifest()).to_json())
    del values["reduced"]
    assert schema.parse_manifest(json.dumps(values).encode(), "here").reduced == {}


def test_read_manifest_says_how_to_make_a_dataset(tmp_path):
    with pytest.raises(
        UsageError, match=r"dataset\.json is missing; give --data, the folder that flexunet prep"
    ):
        schema.read_manifest(open_store(str(tmp_path)))


def test_read_manifest_refuses_a_huge_file(tmp_path):
    with open(tmp_path / schema.MANIFEST_NAME, "wb") as file:
        file.truncate(schema.MAX_MANIFEST_BYTES + 1)
    with pytest.raises(ContentError, match="67108865 bytes"):
        schema.read_manifest(open_store(str(tmp_path)))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"format_version": 2}, "format_version 2"),
        ({"mean": [1.0, 2.0]}, "mean and std must have 1"),
        ({"splits": {"train": {"num_samples": 2, "num_groups": 1}}}, "do not add up"),
        ({"surprise": 1}, "surprise"),
        ({"classes": [{"id": 1, "name": "x", "color": [0, 0, 0]}]}, "ids of classes"),
    ],
)
def test_parse_manifest_names_the_problem(changes, problem):
    values = {"format_version": 1} | _manifest(**changes)
    with pytest.raises(ContentError, match=problem):
        schema.parse_manifest(json.dumps(values).encode(), "here")


@pytest.mark.parametrize("name", ["../train-00000-of-00001.tfrecord", "x", "test-00000-of-1.x"])
def test_parse_manifest_refuses_shard_names_that_lead_elsewhere(name):
    values = {"format_version": 1} | _manifest()
    values["shards"][0]["name"] = name
    with pytest.raises(ContentError, match="shard name"):
        schema.parse_manifest(json.dumps(values).encode(), "here")


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff"])
def test_parse_manifest_refuses_what_is_not_json(data):
    with pytest.raises(ContentError, match="here"):
        schema.parse_manifest(data, "here")


def test_samples_survive_writing_and_have_stable_bytes(tmp_path):
    rows = [
        _row(fold=2, spacing_y_mm=0.07, spacing_x_mm=0.07, crop_top=3, is_flipped=True, picture="a")
    ]
    assert schema.samples_to_parquet(rows) == schema.samples_to_parquet(rows)
    store, manifest = _stored(tmp_path, rows)
    assert schema.read_samples(store, manifest).to_pylist() == rows


def test_read_samples_refuses_another_checksum(tmp_path):
    store, manifest = _stored(tmp_path, [_row()])
    data = bytearray(store.get(schema.SAMPLES_NAME))
    data[len(data) // 2] ^= 1
    store.put(schema.SAMPLES_NAME, bytes(data))
    with pytest.raises(ContentError, match="checksum differs"):
        schema.read_samples(store, manifest)


def test_read_samples_refuses_another_size(tmp_path):
    store, manifest = _stored(tmp_path, [_row()])
    store.put(schema.SAMPLES_NAME, b"short")
    with pytest.raises(ContentError, match="5 bytes"):
        schema.read_samples(store, manifest)


@pytest.mark.parametrize(
    "change",
    [{"offset": 1}, {"offset": -1}, {"length": 0}, {"shard": "other"}, {"split": "test"}],
)
def test_read_samples_refuses_records_outside_their_shard(tmp_path, change):
    store, manifest = _stored(tmp_path, [_row(**change)])  # the shard has 100 bytes
    with pytest.raises(ContentError, match="'a1' lies outside"):
        schema.read_samples(store, manifest)


def test_read_samples_refuses_missing_rows(tmp_path):
    store, manifest = _stored(tmp_path, [])
    with pytest.raises(ContentError, match="0 rows"):
        schema.read_samples(store, manifest)


def test_read_samples_refuses_other_columns(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet

    path = tmp_path / schema.SAMPLES_NAME
    pyarrow.parquet.write_table(pa.table({"id": ["a"]}), path)
    data = path.read_bytes()
    sizes = {"samples_num_bytes": len(data), "samples_crc32c": google_crc32c.value(data)}
    manifest = schema.Manifest.model_validate(_manifest(**sizes))
    with pytest.raises(ContentError, match="columns differ"):
        schema.read_samples(open_store(str(tmp_path)), manifest)


def test_read_samples_reads_a_table_without_the_later_columns(tmp_path):
    import pyarrow.parquet

    whole = _row()
    added = {f"crop_{name}" for name in ("top", "left", "height", "width")}
    added |= {"is_flipped", "picture"}
    store, _ = _stored(tmp_path, [whole])
    table = pyarrow.parquet.ParquetFile(tmp_path / schema.SAMPLES_NAME).read()
    old = table.drop_columns(sorted(added))
    pyarrow.parquet.write_table(old, tmp_path / schema.SAMPLES_NAME, compression="zstd")
    data = (tmp_path / schema.SAMPLES_NAME).read_bytes()
    sizes = {"samples_num_bytes": len(data), "samples_crc32c": google_crc32c.value(data)}
    manifest = schema.Manifest.model_validate(_manifest(**sizes))
    (row,) = schema.read_samples(store, manifest).to_pylist()
    assert row == whole | dict.fromkeys(added)


def test_sample_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        _sample().id = "b"


@pytest.mark.parametrize(
    ("earlier", "rule"),
    [
        ({"split_rule": "by file"}, "by file"),
        ({"split_rule": "by group, preset augmented"}, "by preset augmented"),
        ({"split_rule": "by group, patient of the release"}, "by patient of the release"),
        (
            {
                "split_rule": "ready-made",
                "options": {"group_preset": None, "group_regex": None, "group_csv": None},
            },
            "by file",
        ),
        (
            {
                "split_rule": "ready-made",
                "options": {"group_preset": None, "group_regex": None, "group_csv": "a.csv"},
            },
            "by table",
        ),
        ({"split_rule": "ready-made"}, "not recorded"),
        ({"split_rule": "ready-made", "options": {}}, "not recorded"),
    ],
)
def test_groups_of_earlier_manifests_are_told_from_what_they_say(earlier, rule):
    data = json.dumps({**_manifest(**earlier), "format_version": 1}).encode()
    assert schema.parse_manifest(data, "x").group_rule == rule
