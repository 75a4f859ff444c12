"""Records and their framing, against TensorFlow's own reader and writer."""

import dataclasses
import hashlib

import numpy as np
import pytest

from data_prep.imaging.geometry import Geometry
from data_prep.shards.records import (
    RECORD_OVERHEAD,
    Sample,
    decode_example,
    encode_example,
    encode_features,
    frame_record,
    sha256_of_pixels,
    unframe_record,
)
from flexunet.errors import ContentError


def _sample(height=4, width=6, channels=1, dtype=np.uint8):
    image = np.arange(height * width * channels).reshape(height, width, channels).astype(dtype)
    mask = np.zeros((height, width), np.uint8)
    mask[1:3, 2:4] = 1
    geometry = Geometry("stretch", 8, 12, 0, 0, height, width)
    return Sample(
        id="a1",
        group="17",
        image=image,
        mask=mask,
        filename="a1.png",
        geometry=geometry,
        spacing_mm=None,
        pixel_sha256=sha256_of_pixels(image),
        unmapped_pixels=0,
    )


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_record_is_read_by_tensorflow(tmp_path, channels, dtype):
    import tensorflow as tf

    sample = _sample(channels=channels, dtype=dtype)
    path = tmp_path / "x.tfrecord"
    record = frame_record(encode_example(sample))
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
    payload = encode_features(values)
    message = tf.train.Example.FromString(payload)
    expected = tf.train.Example()
    for key, value in values.items():
        if isinstance(value, int):
            expected.features.feature[key].int64_list.value.append(value)
        else:
            expected.features.feature[key].bytes_list.value.append(value)
    assert message == expected
    assert decode_example(payload) == values
    assert decode_example(expected.SerializeToString()) == values


def test_encode_features_does_not_depend_on_order():
    # Example{Features{entry{"a", int64_list packed [1]}}}, written out by hand:
    # 0a len, 0a len, 0a 01 'a', 12 len, 1a 03 (int64_list), 0a 01 01 (packed)
    entry = bytes.fromhex("0a0161" + "1205" + "1a03" + "0a0101")
    hand = bytes([0x0A, len(entry) + 2, 0x0A, len(entry)]) + entry
    assert encode_features({"a": 1}) == hand
    forward = encode_features({"a": 1, "b": b"2"})
    assert forward == encode_features({"b": b"2", "a": 1})


def test_decode_example_refuses_damage():
    payload = encode_features({"a": 1, "b": b"22"})
    for damaged in (payload[:-1], payload + b"\x08", b"\xff" * 12, b"\x0a\x7f"):
        with pytest.raises(ContentError, match=r"not a tf\.train\.Example"):
            decode_example(damaged)


def test_unframe_record_finds_every_flipped_byte():
    record = frame_record(b"hello")
    assert len(record) == 5 + RECORD_OVERHEAD
    assert unframe_record(record, where="x") == b"hello"
    for i in range(len(record)):
        damaged = bytearray(record)
        damaged[i] ^= 1
        with pytest.raises(ContentError, match="shard 7"):
            unframe_record(bytes(damaged), where="shard 7")
    for wrong in (record[:-1], record + b"\0", b""):
        with pytest.raises(ContentError, match="shard 7"):
            unframe_record(wrong, where="shard 7")


def test_sha256_of_pixels_is_that_of_little_endian_rows():
    pixels = np.array([[1, 256]], np.uint16)  # 01 00, 00 01
    expected = hashlib.sha256(bytes([1, 0, 0, 1])).hexdigest()
    assert sha256_of_pixels(pixels) == expected
    assert sha256_of_pixels(pixels.astype(">u2")) == expected


def test_sample_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        _sample().id = "b"
