"""Compressed DICOM files: what other programs wrote is read, and what is hostile or broken is not.

pydicom writes RLE, CharLS (pyjpegls) JPEG-LS, OpenJPEG JPEG 2000, GDCM lossless JPEG and Pillow
baseline JPEG: none of them is what reads the files, but for the libraries within.
"""

import io
import struct
import sys
import tracemalloc

import imagecodecs
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom import uid
from pydicom.encaps import encapsulate, generate_frames

from data_prep.imaging.dicom.frames import CODECS, Bits, _unpacked, decode_frame, has_decoders
from data_prep.imaging.dicom.reader import read_dicom
from data_prep.phantoms.inbreast_release import dicom_bytes
from flexunet.errors import ContentError

HEIGHT, WIDTH = 40, 50
LOSSLESS = [
    *(uid.RLELossless, uid.JPEGLossless, uid.JPEGLosslessSV1),
    *(uid.JPEGLSLossless, uid.JPEG2000Lossless),
]
# By how much of the full scale a value may be off.
LOSSY = {
    uid.JPEGBaseline8Bit: 0.03,
    uid.JPEGExtended12Bit: 0.03,
    uid.JPEGLSNearLossless: 3 / 255,
    uid.JPEG2000: 0.03,
}
BITS = {uid.JPEGBaseline8Bit: (8,), uid.JPEGExtended12Bit: (8, 12)}
TABLE = [
    (syntax, bits)
    for syntax in (*LOSSLESS, *LOSSY)
    for bits in BITS.get(syntax, (8, 10, 12, 14, 16))
]
DECODED = [syntax for syntax in (*LOSSLESS, *LOSSY) if syntax != uid.RLELossless]


def _pixels(bits):
    """Returns (H, W) uint16: a slope with noise, 0 and the largest value."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    top = 2**bits - 1
    noise = np.random.default_rng(bits).integers(0, top // 20 + 1, y.shape)
    pixels = (0.9 * top * (y + x) / (HEIGHT + WIDTH) + noise).astype(np.uint16)
    pixels[0, 0], pixels[-1, -1] = 0, top
    return pixels


def _dataset(pixels, bits, photometric="MONOCHROME2"):
    data = dicom_bytes(pixels, bits, spacing_mm=0.07, key="x", photometric=photometric)
    dataset = pydicom.dcmread(io.BytesIO(data))
    if bits == 8:
        dataset.BitsAllocated = 8
        dataset.PixelData = pixels.astype(np.uint8).tobytes()
        dataset["PixelData"].VR = "OB"
    return dataset


def _saved(dataset):
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def _jpeg(pixels, bits):
    if bits != 8:
        return imagecodecs.jpeg8_encode(pixels, level=98, bitspersample=bits)
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, "JPEG", quality=98)
    # Extended differs from baseline in the marker: it may have more tables.
    return buffer.getvalue()


def _by_gdcm(dataset, syntax, folder):
    import gdcm

    plain, packed = str(folder / "plain.dcm"), str(folder / "packed.dcm")
    dataset.save_as(plain, enforce_file_format=True)
    reader, change, writer = (
        gdcm.ImageReader(),
        gdcm.ImageChangeTransferSyntax(),
        gdcm.ImageWriter(),
    )
    reader.SetFileName(plain)
    assert reader.Read()
    change.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.GetTSType(str(syntax))))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer.SetFileName(packed)
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()
    return pydicom.dcmread(packed)


def _compressed(syntax, bits, folder, photometric="MONOCHROME2"):
    """Returns the file of `_pixels(bits)` as another program compresses it."""
    pixels = _pixels(bits)
    dataset = _dataset(pixels, bits, photometric)
    if syntax in (uid.JPEGLossless, uid.JPEGLosslessSV1):
        dataset = _by_gdcm(dataset, syntax, folder)
    elif syntax in (uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit):
        dataset.PixelData = encapsulate([_jpeg(pixels, bits)])
        dataset["PixelData"].VR = "OB"
        dataset["PixelData"].is_undefined_length = True
        dataset.file_meta.TransferSyntaxUID = syntax
    else:
        options = {
            uid.JPEGLSNearLossless: {"jls_error": min(255, 3 * 2 ** max(0, bits - 8))},
            uid.JPEG2000: {"j2k_psnr": [50]},
        }
        dataset.compress(syntax, **options.get(syntax, {}))
    assert dataset.file_meta.TransferSyntaxUID == syntax
    return _saved(dataset)


def _changed(data, change):
    dataset = pydicom.dcmread(io.BytesIO(data))
    change(dataset)
    return _saved(dataset)


def _frame(data):
    return next(generate_frames(pydicom.dcmread(io.BytesIO(data)).PixelData, number_of_frames=1))


def _with_frame(data, frame):
    """Returns the file with another codestream: one, or a list of fragments."""
    fragments = frame if isinstance(frame, list) else [frame]

    def change(dataset):
        items = b"".join(
            struct.pack("<4sI", b"\xfe\xff\x00\xe0", len(each)) + each for each in fragments
        )
        dataset.PixelData = struct.pack("<4sI", b"\xfe\xff\x00\xe0", 0) + items
        dataset["PixelData"].VR = "OB"
        dataset["PixelData"].is_undefined_length = True

    return _changed(data, change)


def _read(data, max_pixels=10**4):
    return read_dicom(data, name="a.dcm", max_pixels=max_pixels)


@pytest.fixture
def no_decoding(monkeypatch):
    """Returns a list of the decoders that were called; none of them does anything."""
    called = []
    for name in ("jpeg8_decode", "jpegls_decode", "jpeg2k_decode"):
        monkeypatch.setattr(imagecodecs, name, lambda *_, _name=name, **__: called.append(_name))
    return called


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize(("syntax", "bits"), TABLE)
def test_what_other_programs_compressed_is_read(syntax, bits, photometric, tmp_path):
    found = _read(_compressed(syntax, bits, tmp_path, photometric))
    top = 2**bits - 1
    true = _pixels(bits) if photometric == "MONOCHROME2" else top - _pixels(bits)
    assert found.pixels.dtype == (np.uint8 if bits == 8 else np.uint16)
    assert (found.pixels.shape, found.value_max) == ((HEIGHT, WIDTH, 1), top)
    error = np.abs(found.pixels[:, :, 0].astype(int) - true).max()
    assert error <= LOSSY.get(syntax, 0) * top
    assert (error > 0) == (syntax in LOSSY)


def test_the_table_has_every_compression_that_is_read():
    assert {str(syntax) for syntax, _ in TABLE} == CODECS.keys()


@pytest.mark.parametrize("syntax", LOSSLESS)
def test_values_in_more_bits_than_are_stored_are_read_as_of_uncompressed_files(syntax, tmp_path):
    """8 bits stored in 16, and 12 bits of which the header has 11: the highest is an overlay."""
    for bits, stored in ((8, 8), (12, 11)):
        pixels = _pixels(bits)
        plain = dicom_bytes(pixels, bits, spacing_mm=0.07, key="x")
        dataset = pydicom.dcmread(io.BytesIO(plain))
        if syntax in (uid.JPEGLSLossless, uid.JPEG2000Lossless):
            dataset.compress(syntax)
        else:  # pydicom writes RLE of 8 bits in 16 as of 8 in 8
            dataset = _by_gdcm(dataset, syntax, tmp_path)

        def change(dataset, stored=stored):
            dataset.BitsStored, dataset.HighBit = stored, stored - 1

        first, second = _read(_changed(plain, change)), _read(_changed(_saved(dataset), change))
        assert np.array_equal(first.pixels, second.pixels)
        assert first.pixels.dtype == second.pixels.dtype == np.uint16


def test_a_lossy_value_beyond_the_bits_stored_is_the_largest():
    codestream = imagecodecs.jpegls_encode(np.full((HEIGHT, WIDTH), 4095 + 20, np.uint16))
    dataset = _dataset(_pixels(12), 12)
    dataset.compress(uid.JPEGLSNearLossless, jls_error=1)
    assert set(_read(_with_frame(_saved(dataset), codestream)).pixels.ravel()) == {4095}


@pytest.mark.parametrize("syntax", [*LOSSLESS, *LOSSY])
def test_fragments_are_joined(syntax, tmp_path):
    data = _compressed(syntax, 8, tmp_path)
    frame = _frame(data)
    third = len(frame) // 6 * 2
    pieces = [frame[:third], frame[third : 2 * third], frame[2 * third :]]
    assert np.array_equal(_read(_with_frame(data, pieces)).pixels, _read(data).pixels)


# Missing decoders


@pytest.mark.parametrize("syntax", DECODED)
def test_without_the_extra_it_says_what_to_do(syntax, tmp_path, monkeypatch):
    data = _compressed(syntax, 8, tmp_path)
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    assert not has_decoders()
    with pytest.raises(ContentError) as found:
        _read(data)
    codec = CODECS[str(syntax)]
    assert str(found.value) == (
        f"a.dcm: compressed as {codec.name}; pip install 'flexunet[dicom]' for its decoder, or "
        f"decompress it, as with {codec.tool}"
    )


def test_the_tools_are_those_that_decode_it():
    tools = {codec.family: codec.tool for codec in CODECS.values()}
    assert tools == {
        "rle": "dcmdrle of DCMTK",
        "jpeg": "dcmdjpeg of DCMTK",
        "jpeg-ls": "dcmdjpls of DCMTK",
        "jpeg 2000": "gdcmconv --raw of GDCM",
    }


def test_rle_needs_no_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    found = _read(_compressed(uid.RLELossless, 12, tmp_path))
    assert np.array_equal(found.pixels[:, :, 0], _pixels(12))


@pytest.mark.parametrize(
    ("syntax", "said"),
    [
        (uid.DeflatedExplicitVRLittleEndian, "stored deflated, .*dcmconv \\+te of DCMTK"),
        (uid.ExplicitVRBigEndian, "stored big endian, .*dcmconv \\+te of DCMTK"),
        (uid.MPEG2MPML, "in a way that is not read"),
        ("1.2.3.4.99999", "in a way that is not read"),
    ],
)
def test_other_syntaxes_are_refused_before_they_are_parsed(syntax, said, tmp_path, monkeypatch):
    data = _saved(_dataset(_pixels(12), 12))
    old, new = (str(each).encode() for each in (uid.ExplicitVRLittleEndian, syntax))
    new = new if len(new) % 2 == 0 else new + b"\0"
    place = data.index(b"\x02\x00\x10\x00UI")
    length = struct.unpack_from("<H", data, place + 6)[0]
    assert data[place + 8 : place + 8 + length].rstrip(b"\0") == old
    data = data[: place + 6] + struct.pack("<H", len(new)) + new + data[place + 8 + length :]
    # The length of the meta information.
    size = struct.unpack_from("<I", data, 140)[0] + len(new) - length
    data = data[:140] + struct.pack("<I", size) + data[144:]
    monkeypatch.setattr("zlib.decompress", None)
    with pytest.raises(ContentError, match=said) as found:
        _read(data)
    assert "99999" not in str(found.value)


# Hostile and broken codestreams


@pytest.mark.parametrize("syntax", DECODED)
def test_a_codestream_of_another_size_is_refused_before_it_is_decoded(
    syntax, tmp_path, no_decoding
):
    def change(dataset):
        dataset.Rows, dataset.Columns = 20, 30

    data = _changed(_compressed(syntax, 8, tmp_path), change)
    with pytest.raises(ContentError, match="pixels are 50x40, but its header says 30x20"):
        _read(data)
    assert not no_decoding


@pytest.mark.parametrize("syntax", DECODED)
def test_a_codestream_that_says_to_be_huge_is_refused_before_it_is_decoded(
    syntax, tmp_path, no_decoding
):
    data = _compressed(syntax, 8, tmp_path)
    frame = bytearray(_frame(data))
    if syntax in (uid.JPEG2000, uid.JPEG2000Lossless):
        struct.pack_into(">II", frame, 8, 60000, 60000)
    else:
        place = frame.index(struct.pack(">HH", HEIGHT, WIDTH))
        struct.pack_into(">HH", frame, place, 60000, 60000)
    with pytest.raises(ContentError, match="pixels are 60000x60000, but its header says 50x40"):
        _read(_with_frame(data, bytes(frame)))

    def change(dataset):
        dataset.Rows, dataset.Columns = 60000, 60000

    with pytest.raises(ContentError, match="is 3600000000 pixels, more than 10000"):
        _read(_changed(_with_frame(data, bytes(frame)), change))
    assert not no_decoding


def test_jpeg_2000_in_tiny_tiles_is_refused_before_it_is_decoded(tmp_path, no_decoding):
    data = _compressed(uid.JPEG2000Lossless, 12, tmp_path)
    frame = bytearray(_frame(data))
    struct.pack_into(">II", frame, 24, 1, 1)
    with pytest.raises(ContentError, match="JPEG 2000 lossless pixels are damaged"):
        _read(_with_frame(data, bytes(frame)))
    assert not no_decoding


def test_rle_is_unpacked_no_further_than_wanted(tmp_path):
    bomb = bytes([129, 7]) * 10**6  # 128 million bytes
    tracemalloc.start()
    assert _unpacked(bomb, 100) == bytes([7]) * 100
    assert tracemalloc.get_traced_memory()[1] < 10_000
    tracemalloc.stop()
    header = struct.pack("<16I", 1, 64, *[0] * 14)
    data = _with_frame(_compressed(uid.RLELossless, 8, tmp_path), header + bomb)
    assert set(_read(data).pixels.ravel()) == {7}


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
    data = _with_frame(_compressed(uid.RLELossless, 8, tmp_path), frame)
    with pytest.raises(ContentError, match=r"^a\.dcm: its RLE lossless pixels are damaged"):
        _read(data)


@pytest.mark.parametrize("syntax", [*LOSSLESS, *LOSSY])
def test_a_codestream_that_is_cut_off_is_refused(syntax, tmp_path):
    data = _compressed(syntax, 8, tmp_path)
    frame = _frame(data)
    for length in (0, 1, 2, 20, len(frame) // 2, len(frame) - 20):
        with pytest.raises(ContentError, match=r"^a\.dcm: its .* pixels are damaged, cut off"):
            _read(_with_frame(data, frame[:length]))


@pytest.mark.parametrize("syntax", DECODED)
def test_a_codestream_of_another_kind_is_refused(syntax, tmp_path, no_decoding):
    data = _compressed(syntax, 8, tmp_path)
    family = CODECS[str(syntax)].family
    for other in (uid.JPEGBaseline8Bit, uid.JPEGLSLossless, uid.JPEG2000, uid.JPEGLossless):
        is_alike = CODECS[str(other)].frame_headers[:1] == CODECS[str(syntax)].frame_headers[:1]
        if (is_alike and CODECS[str(other)].family == family) or syntax == uid.JPEGExtended12Bit:
            continue
        with pytest.raises(ContentError, match="of another kind; replace the file"):
            _read(_with_frame(data, _frame(_compressed(other, 8, tmp_path))))
    assert not no_decoding


def test_colour_and_more_bits_than_the_file_has_are_refused(tmp_path, no_decoding):
    data = _compressed(uid.JPEGBaseline8Bit, 8, tmp_path)
    buffer = io.BytesIO()
    Image.new("RGB", (WIDTH, HEIGHT)).save(buffer, "JPEG")
    with pytest.raises(ContentError, match="have 3 samples of 8 bits, but its header says 1 of"):
        _read(_with_frame(data, buffer.getvalue()))
    for syntax in (uid.JPEGLSLossless, uid.JPEG2000Lossless, uid.JPEGLossless):
        deep = _frame(_compressed(syntax, 12, tmp_path))
        with pytest.raises(ContentError, match=r"1 samples of \d+ bits, but its header says 1 of"):
            _read(_with_frame(_compressed(syntax, 8, tmp_path), deep))
    assert not no_decoding


def test_a_second_frame_header_is_refused(tmp_path, no_decoding):
    data = _compressed(uid.JPEGBaseline8Bit, 8, tmp_path)
    frame = _frame(data)
    place = frame.index(b"\xff\xc0")
    header = frame[place : place + 2 + struct.unpack_from(">H", frame, place + 2)[0]]
    with pytest.raises(ContentError, match="damaged"):
        _read(_with_frame(data, frame[:place] + header + frame[place:]))
    assert not no_decoding


def test_pixels_that_are_not_in_fragments_are_refused(tmp_path):
    frame = _frame(_compressed(uid.JPEG2000Lossless, 12, tmp_path))
    table = struct.pack("<4sI", b"\xfe\xff\x00\xe0", 0)
    item = struct.pack("<4sI", b"\xfe\xff\x00\xe0", len(frame))
    end = struct.pack("<4sI", b"\xfe\xff\xdd\xe0", 0)

    def decoded(pixel_data):
        codec = CODECS[str(uid.JPEG2000Lossless)]
        values = decode_frame(pixel_data, codec, (HEIGHT, WIDTH), Bits(16, 12), name="a.dcm")
        return np.array_equal(values, _pixels(12))

    assert decoded(table + item + frame)
    assert decoded(table + item + frame + end + b"more")
    for broken in (
        *(b"", frame, table, item + frame, table + end + item + frame),
        *(table + item + frame[:-9], table + b"abcd" + item[4:] + frame, table + item[:6]),
    ):
        with pytest.raises(ContentError, match=r"^a\.dcm: its JPEG 2000 lossless pixels are dam"):
            decoded(broken)


@pytest.mark.parametrize("syntax", [*LOSSLESS, *LOSSY])
def test_a_damaged_codestream_is_one_error_or_a_picture(syntax, tmp_path):
    bits = 8 if syntax == uid.JPEGBaseline8Bit else 12
    data = _compressed(syntax, bits, tmp_path)
    frame = _frame(data)
    start = data.index(frame)
    rng = np.random.default_rng(1)
    num_refused = 0
    for i in range(300):
        broken = bytearray(data)
        stop = start + (100 if i % 2 else len(frame))  # the header, or anything
        for position in rng.integers(start, stop, 1 + i % 4):
            broken[position] = rng.integers(256)
        try:
            assert _read(bytes(broken)).pixels.shape == (HEIGHT, WIDTH, 1)
        except ContentError as error:
            num_refused += 1
            assert str(error).startswith("a.dcm: ")
    assert num_refused > 20
