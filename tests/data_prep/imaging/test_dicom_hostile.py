"""Compressed DICOM files that are hostile or broken: one error each, and nothing is decoded."""

import io
import struct
import tracemalloc

import imagecodecs
import numpy as np
import pytest
from PIL import Image
from pydicom import uid

from data_prep.imaging.dicom.frames import CODECS, Bits, _unpacked, decode_frame
from flexunet.errors import ContentError
from tests.data_prep.imaging.compressed_dicom import (
    DECODED,
    HEIGHT,
    LOSSLESS,
    LOSSY,
    WIDTH,
    changed,
    compressed,
    frame_of,
    pixels_of,
    read,
    with_frame,
)


@pytest.fixture
def no_decoding(monkeypatch):
    """Returns a list of the decoders that were called; none of them does anything."""
    called = []
    for name in ("jpeg8_decode", "jpegls_decode", "jpeg2k_decode"):
        monkeypatch.setattr(imagecodecs, name, lambda *_, _name=name, **__: called.append(_name))
    return called


@pytest.mark.parametrize("syntax", DECODED)
def test_a_codestream_of_another_size_is_refused_before_it_is_decoded(
    syntax, tmp_path, no_decoding
):
    def change(dataset):
        dataset.Rows, dataset.Columns = 20, 30

    data = changed(compressed(syntax, 8, tmp_path), change)
    with pytest.raises(ContentError, match="pixels are 50x40, but its header states 30x20"):
        read(data)
    assert not no_decoding


@pytest.mark.parametrize("syntax", DECODED)
def test_a_codestream_that_says_to_be_huge_is_refused_before_it_is_decoded(
    syntax, tmp_path, no_decoding
):
    data = compressed(syntax, 8, tmp_path)
    frame = bytearray(frame_of(data))
    if syntax in (uid.JPEG2000, uid.JPEG2000Lossless):
        struct.pack_into(">II", frame, 8, 60000, 60000)
    else:
        place = frame.index(struct.pack(">HH", HEIGHT, WIDTH))
        struct.pack_into(">HH", frame, place, 60000, 60000)
    with pytest.raises(ContentError, match="pixels are 60000x60000, but its header states 50x40"):
        read(with_frame(data, bytes(frame)))

    def change(dataset):
        dataset.Rows, dataset.Columns = 60000, 60000

    with pytest.raises(ContentError, match="is 3600000000 pixels, more than 10000"):
        read(changed(with_frame(data, bytes(frame)), change))
    assert not no_decoding


def test_jpeg_2000_in_tiny_tiles_is_refused_before_it_is_decoded(tmp_path, no_decoding):
    data = compressed(uid.JPEG2000Lossless, 12, tmp_path)
    frame = bytearray(frame_of(data))
    struct.pack_into(">II", frame, 24, 1, 1)
    with pytest.raises(ContentError, match="JPEG 2000 lossless pixels are damaged"):
        read(with_frame(data, bytes(frame)))
    assert not no_decoding


def with_segment(frame: bytes, place: int, segment: bytes) -> bytes:
    return frame[:place] + segment + frame[place:]


@pytest.mark.parametrize("kind", ["blocks", "precincts", "component", "tile", "no end"])
def test_jpeg_2000_in_tiny_blocks_is_refused_before_it_is_decoded(kind, tmp_path, no_decoding):
    data = compressed(uid.JPEG2000Lossless, 12, tmp_path)
    frame = frame_of(data)
    cod = frame.index(b"\xff\x52")
    length = struct.unpack_from(">H", frame, cod + 2)[0]
    segment = bytearray(frame[cod : cod + 2 + length])
    part = frame.index(b"\xff\x90")
    levels = segment[9]
    if kind == "precincts":
        segment[4] |= 1
        segment[2:4] = struct.pack(">H", length + levels + 1)
        hostile = frame[:cod] + segment + b"\x11" * (levels + 1) + frame[cod + 2 + length :]
    elif kind == "component":
        coc = struct.pack(">HHBBBBBBB", 0xFF53, 9, 0, 0, levels, 0, 0, 0, 1)
        hostile = with_segment(frame, part, coc)
    elif kind == "no end":
        # The data of a part that ends before they begin would be looked for for ever.
        hostile = frame[: part + 6] + struct.pack(">I", 2) + frame[part + 10 :]
    else:
        segment[10] = segment[11] = 0
        changed_segment = bytes(segment)
        if kind == "tile":
            (size,) = struct.unpack_from(">I", frame, part + 6)
            longer = struct.pack(">I", size + len(segment) if size else 0)
            whole = frame[: part + 6] + longer + frame[part + 10 :]
            hostile = with_segment(whole, part + 12, changed_segment)
        else:
            hostile = frame[:cod] + changed_segment + frame[cod + 2 + length :]
    with pytest.raises(ContentError, match="JPEG 2000 lossless pixels are damaged"):
        read(with_frame(data, bytes(hostile)))
    assert not no_decoding


def test_rle_is_unpacked_no_further_than_wanted(tmp_path):
    bomb = bytes([129, 7]) * 10**6  # 128 million bytes
    tracemalloc.start()
    assert _unpacked(bomb, 100) == bytes([7]) * 100
    assert tracemalloc.get_traced_memory()[1] < 10_000
    tracemalloc.stop()
    header = struct.pack("<16I", 1, 64, *[0] * 14)
    data = with_frame(compressed(uid.RLELossless, 8, tmp_path), header + bomb)
    assert set(read(data).pixels.ravel()) == {7}


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        bytes(64),
        struct.pack("<16I", 2, 64, 164, *[0] * 13) + bytes([129, 7]) * 100,  # two for 8 bits
        struct.pack("<16I", 1, 10, *[0] * 14) + bytes([129, 7]) * 100,  # begins in its header
        struct.pack("<16I", 1, 9999, *[0] * 14) + bytes([129, 7]) * 100,
        struct.pack("<16I", 1, 64, *[0] * 14) + bytes([129, 7]) * 10,  # 1280 of 2000
        struct.pack("<16I", 1, 64, *[0] * 14) + bytes([128]) * 10,
    ],
)
def test_broken_rle_is_one_error(frame, tmp_path):
    data = with_frame(compressed(uid.RLELossless, 8, tmp_path), frame)
    with pytest.raises(ContentError, match=r"^a\.dcm: its RLE lossless pixels are damaged"):
        read(data)


@pytest.mark.parametrize("syntax", [*LOSSLESS, *LOSSY])
def test_a_codestream_that_is_cut_off_is_refused(syntax, tmp_path):
    data = compressed(syntax, 8, tmp_path)
    frame = frame_of(data)
    for length in (0, 1, 2, 20, len(frame) // 2, len(frame) - 20):
        with pytest.raises(ContentError, match=r"^a\.dcm: its .* pixels are damaged, truncated"):
            read(with_frame(data, frame[:length]))


@pytest.mark.parametrize("syntax", DECODED)
def test_a_codestream_of_another_kind_is_refused(syntax, tmp_path, no_decoding):
    data = compressed(syntax, 8, tmp_path)
    family = CODECS[str(syntax)].family
    for other in (uid.JPEGBaseline8Bit, uid.JPEGLSLossless, uid.JPEG2000, uid.JPEGLossless):
        is_alike = CODECS[str(other)].frame_headers[:1] == CODECS[str(syntax)].frame_headers[:1]
        if (is_alike and CODECS[str(other)].family == family) or syntax == uid.JPEGExtended12Bit:
            continue
        with pytest.raises(ContentError, match="of another kind; replace the file"):
            read(with_frame(data, frame_of(compressed(other, 8, tmp_path))))
    assert not no_decoding


def test_colour_and_more_bits_than_the_file_has_are_refused(tmp_path, no_decoding):
    data = compressed(uid.JPEGBaseline8Bit, 8, tmp_path)
    buffer = io.BytesIO()
    Image.new("RGB", (WIDTH, HEIGHT)).save(buffer, "JPEG")
    with pytest.raises(ContentError, match="have 3 samples of 8 bits, but its header states 1 of"):
        read(with_frame(data, buffer.getvalue()))
    for syntax in (uid.JPEGLSLossless, uid.JPEG2000Lossless, uid.JPEGLossless):
        deep = frame_of(compressed(syntax, 12, tmp_path))
        with pytest.raises(
            ContentError, match=r"1 samples of \d+ bits, but its header states 1 of"
        ):
            read(with_frame(compressed(syntax, 8, tmp_path), deep))
    assert not no_decoding


def test_a_second_frame_header_is_refused(tmp_path, no_decoding):
    data = compressed(uid.JPEGBaseline8Bit, 8, tmp_path)
    frame = frame_of(data)
    place = frame.index(b"\xff\xc0")
    header = frame[place : place + 2 + struct.unpack_from(">H", frame, place + 2)[0]]
    with pytest.raises(ContentError, match="damaged"):
        read(with_frame(data, frame[:place] + header + frame[place:]))
    assert not no_decoding


JPEGS = [syntax for syntax in DECODED if CODECS[str(syntax)].family != "jpeg 2000"]
# No segment follows these: 0 is no marker, TEM, restarts, a second start and an early end.
NO_SEGMENT = (0x00, 0x01, 0x02, 0xBF, *range(0xD0, 0xDA))


@pytest.mark.parametrize("syntax", JPEGS)
def test_a_frame_header_is_not_hidden_from_us_behind_what_has_no_segment(
    syntax, tmp_path, no_decoding
):
    """libjpeg reads on behind the two bytes, and would see the frame of 60000x60000 alone."""
    data = compressed(syntax, 8, tmp_path)
    frame = frame_of(data)
    marker = CODECS[str(syntax)].frame_headers[0]
    hidden = struct.pack(">BBHBHHB", 0xFF, marker, 11, 8, 60000, 60000, 1) + bytes([1, 0x11, 0])
    segment = struct.pack(">H", 2 + len(hidden)) + hidden
    for code in NO_SEGMENT:
        for fillers in (b"\xff", b"\xff\xff\xff"):
            hostile = frame[:2] + fillers + bytes([code]) + segment + frame[2:]
            with pytest.raises(ContentError, match="pixels are damaged"):
                read(with_frame(data, hostile))
    assert not no_decoding


@pytest.mark.parametrize("syntax", JPEGS)
def test_a_segment_shorter_than_its_own_length_is_refused(syntax, tmp_path, no_decoding):
    data = compressed(syntax, 8, tmp_path)
    frame = frame_of(data)
    for length in (0, 1):
        short = struct.pack(">BBH", 0xFF, 0xE1, length)
        with pytest.raises(ContentError, match="pixels are damaged"):
            read(with_frame(data, frame[:2] + short + frame[2:]))
    assert not no_decoding


def test_pixels_that_are_not_in_fragments_are_refused(tmp_path):
    frame = frame_of(compressed(uid.JPEG2000Lossless, 12, tmp_path))
    table = struct.pack("<4sI", b"\xfe\xff\x00\xe0", 0)
    item = struct.pack("<4sI", b"\xfe\xff\x00\xe0", len(frame))
    end = struct.pack("<4sI", b"\xfe\xff\xdd\xe0", 0)

    def decoded(pixel_data):
        codec = CODECS[str(uid.JPEG2000Lossless)]
        values = decode_frame(pixel_data, codec, (HEIGHT, WIDTH), Bits(16, 12), name="a.dcm")
        return np.array_equal(values, pixels_of(12))

    assert decoded(table + item + frame)
    assert decoded(table + item + frame + end + b"more")
    for broken in (
        *(b"", frame, table, item + frame, table + end + item + frame),
        *(table + item + frame[:-9], table + b"abcd" + item[4:] + frame, table + item[:6]),
    ):
        with pytest.raises(ContentError, match=r"^a\.dcm: its JPEG 2000 lossless pixels are dam"):
            decoded(broken)


@pytest.mark.parametrize("syntax", [*LOSSLESS, *LOSSY])
def test_a_damaged_codestream_is_one_error_or_an_image(syntax, tmp_path):
    bits = 8 if syntax == uid.JPEGBaseline8Bit else 12
    data = compressed(syntax, bits, tmp_path)
    frame = frame_of(data)
    start = data.index(frame)
    rng = np.random.default_rng(1)
    num_refused = 0
    for i in range(300):
        broken = bytearray(data)
        stop = start + (100 if i % 2 else len(frame))  # the header, or anything
        for position in rng.integers(start, stop, 1 + i % 4):
            broken[position] = rng.integers(256)
        try:
            assert read(bytes(broken)).pixels.shape == (HEIGHT, WIDTH, 1)
        except ContentError as error:
            num_refused += 1
            assert str(error).startswith("a.dcm: ")
    assert num_refused > 20
