"""Defines the records of a dataset: features of `tf.train.Example`, and TFRecord framing.

The writer (`data_prep`) and the reader (`job`) share this definition. The module does not import
TensorFlow: its few lines of wire format are tested against TensorFlow's reader.
"""

import dataclasses
import hashlib
import struct
from collections.abc import Iterator, Mapping

import google_crc32c
import numpy as np

from data_prep.imaging.arrays import encode_image, has_planes
from data_prep.imaging.codecs import encode_png
from data_prep.imaging.geometry import Geometry
from flexunet.errors import ContentError

ID_FEATURE = "image/id"
IMAGE_FEATURE = "image/encoded"
MASK_FEATURE = "image/segmentation/class/encoded"
RECORD_OVERHEAD = 16  # bytes added by the framing: length, its CRC, the payload's CRC
_HEADER = struct.Struct("<QI")  # payload length, masked CRC32C of the length
_FOOTER = struct.Struct("<I")  # masked CRC32C of the payload


@dataclasses.dataclass(frozen=True)
class Sample:
    """A stored image and its mask.

    Attributes:
        id: stem of the file name, unique in the dataset.
        image: (H, W, C) uint8 or uint16.
        mask: (H, W) uint8, class ids.
        filename: name of the image file, without folders.
        spacing_mm: size of a pixel of the source (y, x), None if unknown.
        pixel_sha256: `sha256_of_pixels(image)`.
        unmapped_pixels: unmapped mask pixels: their colour was not exactly that of a class.
        image_id: for a tile, the id of the image that it was cut from.
    """

    id: str
    group: str
    image: np.ndarray
    mask: np.ndarray
    filename: str
    geometry: Geometry
    spacing_mm: tuple[float, float] | None
    pixel_sha256: str
    unmapped_pixels: int
    image_id: str | None = None


def sha256_of_pixels(pixels: np.ndarray) -> str:
    """Returns the sha256 (hex) of the raw values, row by row, little-endian, no header."""
    ordered = np.ascontiguousarray(pixels, dtype=pixels.dtype.newbyteorder("<"))
    return hashlib.sha256(ordered.data).hexdigest()


def encode_example(sample: Sample) -> bytes:
    """Returns the `tf.train.Example` of `sample`; equal samples give equal bytes.

    Features: image/{encoded,format,height,width,channels,filename,id,group} and
    image/segmentation/class/{encoded,format}; image and mask are lossless PNG. An image with other
    than 1 or 3 channels has the format png-planes, see `encode_image`. A tile also has
    `image/tile/picture`, the image's id, and image/tile/{top,left}, its position in it in pixels.
    """
    height, width, channels = sample.image.shape
    place: dict[str, bytes | int] = {}
    if sample.image_id is not None:
        box = sample.geometry.part
        place["image/tile/picture"] = sample.image_id.encode()
        place |= {"image/tile/top": box.top, "image/tile/left": box.left}
    return encode_features(
        {
            **place,
            "image/channels": channels,
            IMAGE_FEATURE: encode_image(sample.image),
            "image/filename": sample.filename.encode(),
            "image/format": b"png-planes" if has_planes(channels) else b"png",
            "image/group": sample.group.encode(),
            "image/height": height,
            ID_FEATURE: sample.id.encode(),
            MASK_FEATURE: encode_png(sample.mask, is_mask=True),
            "image/segmentation/class/format": b"png",
            "image/width": width,
        }
    )


def encode_features(features: Mapping[str, bytes | int]) -> bytes:
    """Returns a `tf.train.Example` with one value per key, keys sorted.

    Protobuf itself guarantees no order for maps, so its bytes may differ between processes.
    Source of the layout: tensorflow/core/example/{example,feature}.proto.
    """
    entries = []
    for key in sorted(features):
        value = features[key]
        if isinstance(value, int):
            packed = _field(1, _varint(value % 2**64))  # Int64List, packed
            feature = _field(3, packed)
        else:
            feature = _field(1, _field(1, value))  # BytesList
        entries.append(_field(1, _field(1, key.encode()) + _field(2, feature)))
    return _field(1, b"".join(entries))


def decode_example(payload: bytes) -> dict[str, bytes | int]:
    """Returns the features of an Example with one bytes or int64 value per key.

    Raises:
        ContentError: `payload` is not such an Example.
    """
    try:
        features: dict[str, bytes | int] = {}
        for entry in _values(_only(memoryview(payload), 1), 1):
            features[bytes(_only(entry, 1)).decode()] = _feature(_only(entry, 2))
        return features
    except (ValueError, IndexError) as error:
        raise ContentError(f"not a tf.train.Example of this format: {error}") from error


def frame_record(payload: bytes) -> bytes:
    """Returns `payload` as one TFRecord: length, its CRC, payload, its CRC (both masked)."""
    length = struct.pack("<Q", len(payload))
    footer = _FOOTER.pack(_masked_crc(payload))
    return b"".join((length, _FOOTER.pack(_masked_crc(length)), payload, footer))


def unframe_record(record: bytes, *, where: str) -> bytes:
    """Returns the payload of one complete TFRecord.

    Args:
        where: name of the record in errors.

    Raises:
        ContentError: the record is too short, too long, or a CRC differs.
    """
    if len(record) < RECORD_OVERHEAD:
        raise ContentError(
            f"{where}: record of {len(record)} bytes is truncated; prepare the dataset again"
        )
    length, length_crc = _HEADER.unpack_from(record)
    if _masked_crc(record[:8]) != length_crc or length != len(record) - RECORD_OVERHEAD:
        raise ContentError(f"{where}: damaged record header; prepare the dataset again")
    payload = record[_HEADER.size : -_FOOTER.size]
    if _masked_crc(payload) != _FOOTER.unpack(record[-_FOOTER.size :])[0]:
        raise ContentError(f"{where}: record checksum differs; prepare the dataset again")
    return payload


# Wire format of protobuf: fields of varints (type 0) and of length-delimited bytes (type 2).


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def _field(number: int, data: bytes) -> bytes:
    return b"".join((bytes((number << 3 | 2,)), _varint(len(data)), data))


def _read_varint(data: memoryview, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
    raise ValueError("a number is longer than 64 bits")


def _values(message: memoryview, number: int) -> Iterator[memoryview]:
    """Yields every length-delimited field `number` of `message`; no other field is allowed."""
    for found, value in _fields(message):
        if found != number:
            raise ValueError(f"field {found}, expected {number}")
        yield value


def _only(message: memoryview, number: int) -> memoryview:
    found = [value for key, value in _fields(message) if key == number]
    if len(found) != 1:
        raise ValueError(f"field {number} occurs {len(found)} times, expected once")
    return found[0]


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    position = 0
    while position < len(message):
        tag, position = _read_varint(message, position)
        if tag & 7 != 2:
            raise ValueError(f"wire type {tag & 7} of field {tag >> 3}")
        length, position = _read_varint(message, position)
        if position + length > len(message):
            raise ValueError("a field is truncated")
        yield tag >> 3, message[position : position + length]
        position += length


def _feature(feature: memoryview) -> bytes | int:
    ((kind, values),) = _fields(feature)
    if kind == 1:
        return bytes(_only(values, 1))
    if kind != 3:
        raise ValueError(f"value of kind {kind}, expected bytes or int64")
    packed = _only(values, 1)
    value, end = _read_varint(packed, 0)
    if end != len(packed):
        raise ValueError("more than one number in a feature")
    return value - 2**64 if value >= 2**63 else value


def _masked_crc(data: bytes) -> int:
    # Source: tensorflow/core/lib/hash/crc32c.h, Mask().
    crc = int(google_crc32c.value(data))
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
