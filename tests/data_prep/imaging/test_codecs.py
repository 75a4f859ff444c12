"""Every format, mode and bit depth by hand-known values; broken, hostile and turned files."""

import io
import struct
import zlib
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from data_prep.imaging.codecs import encode_png, read_image, read_mask_pixels
from data_prep.imaging.pixels import Pixels
from flexunet.errors import ContentError

REAL = Path(__file__).resolve().parents[4] / "shared" / "data" / "inbreast-mini"
GREY = np.array([[0, 1, 2], [100, 200, 255]], np.uint8)
RGB = np.dstack([GREY, GREY[::-1], 255 - GREY])
GREY16 = np.array([[0, 1, 256], [4095, 40000, 65535]], np.uint16)
RGB16 = np.dstack([GREY16, GREY16[::-1], 65535 - GREY16])


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def with_alpha(pixels: Pixels) -> Pixels:
    """Every alpha is 0: a reader that composites would lose the colours."""
    return np.dstack([pixels, np.zeros(pixels.shape[:2], pixels.dtype)])


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(
    width: int, height: int, depth: int, color: int, rows: bytes, *extra: bytes, level: int = 6
) -> bytes:
    """Returns a PNG of `rows` (each with its filter byte); extra chunks precede the pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(rows, level))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + pixels + chunk(b"IEND", b"")


def png16(pixels: Pixels, color: int, *extra: bytes) -> bytes:
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    return png(pixels.shape[1], pixels.shape[0], 16, color, rows, *extra)


def tiff(
    pixels: Pixels,
    *,
    photometric: int,
    bits: int,
    sample_format: int = 1,
    order: Literal["<", ">"] = "<",
) -> bytes:
    """A TIFF of one uncompressed strip, with the tags given whatever they mean."""
    channels = 1 if pixels.ndim == 2 else pixels.shape[2]
    body = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
    num_tags = 10
    end = 8 + 2 + 12 * num_tags + 4
    depths = struct.pack(f"{order}{channels}H", *[bits] * channels)
    formats = struct.pack(f"{order}{channels}H", *[sample_format] * channels)
    strip = end + len(depths) + len(formats)

    def tag(number: int, value: int, count: int = 1, kind: int = 4) -> bytes:
        short = kind == 3 and count == 1
        packed = struct.pack(f"{order}HH", value, 0) if short else struct.pack(f"{order}I", value)
        return struct.pack(f"{order}HHI", number, kind, count) + packed

    def shorts(number: int, at: int, value: int) -> bytes:
        return tag(number, value, kind=3) if channels == 1 else tag(number, at, channels, 3)

    tags = [
        tag(256, pixels.shape[1]),
        tag(257, pixels.shape[0]),
        shorts(258, end, bits),
        tag(259, 1, kind=3),
        tag(262, photometric, kind=3),
        tag(273, strip),
        tag(277, channels, kind=3),
        tag(278, pixels.shape[0]),
        tag(279, len(body)),
        shorts(339, end + len(depths), sample_format),
    ]
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8)
    directory = struct.pack(f"{order}H", num_tags) + b"".join(tags) + struct.pack(f"{order}I", 0)
    return head + directory + depths + formats + body


LOSSLESS = {
    "png-l": (saved(Image.fromarray(GREY), "PNG"), GREY),
    "png-la": (saved(Image.fromarray(with_alpha(GREY), "LA"), "PNG"), GREY),
    "png-rgb": (saved(Image.fromarray(RGB), "PNG"), RGB),
    "png-rgba": (saved(Image.fromarray(with_alpha(RGB)), "PNG"), RGB),
    "png-rgb-transparent-color": (
        saved(Image.fromarray(RGB), "PNG", transparency=tuple(int(v) for v in RGB[0, 0])),
        RGB,
    ),
    "png-l-interlaced": (
        png(1, 1, 8, 0, b"\0\x07").replace(
            chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)),
            chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 1)),
        ),
        np.array([[7]], np.uint8),
    ),
    "png-1": (saved(Image.fromarray(GREY > 100), "PNG"), np.where(GREY > 100, 255, 0)),
    # 2 bits: values 0..3 are steps of 85; 0b00011011 is 0, 1, 2, 3.
    "png-l2": (png(4, 1, 2, 0, b"\0\x1b"), np.array([[0, 85, 170, 255]])),
    # 4 bits: steps of 17.
    "png-l4": (png(2, 1, 4, 0, b"\0\x1f"), np.array([[17, 255]])),
    "png-l16": (saved(Image.fromarray(GREY16), "PNG"), GREY16),
    "png-la16": (png16(with_alpha(GREY16), 4), GREY16),
    "png-rgb16": (png16(RGB16, 2), RGB16),
    "png-rgba16": (png16(with_alpha(RGB16), 6), RGB16),
    "png-rgb16-gamma-profile": (
        png16(RGB16, 2, chunk(b"gAMA", struct.pack(">I", 10_000)), chunk(b"sRGB", b"\0")),
        RGB16,
    ),
    "tiff-l": (saved(Image.fromarray(GREY), "TIFF"), GREY),
    "tiff-rgb-lzw": (saved(Image.fromarray(RGB), "TIFF", compression="tiff_lzw"), RGB),
    "tiff-rgba": (saved(Image.fromarray(with_alpha(RGB)), "TIFF"), RGB),
    "tiff-1": (saved(Image.fromarray(GREY > 100), "TIFF"), np.where(GREY > 100, 255, 0)),
    "tiff-l16": (saved(Image.fromarray(GREY16), "TIFF"), GREY16),
    "tiff-l16-big-endian": (tiff(GREY16, photometric=1, bits=16, order=">"), GREY16),
    "tiff-l16-white-is-zero": (tiff(GREY16, photometric=0, bits=16), 65535 - GREY16),
    "tiff-l-white-is-zero": (tiff(GREY, photometric=0, bits=8), 255 - GREY),
    "tiff-rgb16": (tiff(RGB16, photometric=2, bits=16), RGB16),
    "tiff-rgb16-big-endian": (tiff(RGB16, photometric=2, bits=16, order=">"), RGB16),
    "tiff-rgb16-lzw": (cv2.imencode(".tiff", RGB16[..., ::-1])[1].tobytes(), RGB16),
    "gif-l": (saved(Image.fromarray(GREY), "GIF"), np.dstack([GREY] * 3)),
    "gif-p": (saved(Image.fromarray(RGB).quantize(6), "GIF"), RGB),
    "gif-p-interlaced": (saved(Image.fromarray(RGB).quantize(6), "GIF", interlace=1), RGB),
    "gif-p-transparent-color": (
        saved(Image.fromarray(RGB).quantize(6), "GIF", transparency=0),
        RGB,
    ),
    "gif-1": (saved(Image.fromarray(GREY > 100), "GIF"), np.where(GREY > 100, 255, 0)),
    "bmp-l": (saved(Image.fromarray(GREY), "BMP"), GREY),
    "bmp-rgb": (saved(Image.fromarray(RGB), "BMP"), RGB),
    "bmp-1": (saved(Image.fromarray(GREY > 100), "BMP"), np.where(GREY > 100, 255, 0)),
}


@pytest.mark.parametrize("kind", LOSSLESS)
def test_read_image_keeps_every_value_of_every_format(kind: str) -> None:
    data, expected = LOSSLESS[kind]
    pixels = read_image(data, name=kind)
    assert pixels.dtype == (np.uint16 if "16" in kind else np.uint8)
    assert pixels.shape == (expected if expected.ndim == 3 else expected[..., None]).shape
    np.testing.assert_array_equal(pixels.squeeze(), expected.squeeze())
    assert pixels.flags.writeable


@pytest.mark.parametrize("kind", LOSSLESS)
def test_read_image_survives_encode_png_bit_for_bit(kind: str) -> None:
    pixels = read_image(LOSSLESS[kind][0], name=kind)
    stored = encode_png(pixels)
    np.testing.assert_array_equal(read_image(stored, name=kind), pixels)
    assert encode_png(pixels) == stored


def test_read_image_decodes_jpeg_of_both_kinds() -> None:
    flat = np.full((16, 16, 3), (200, 50, 50), np.uint8)
    rgb = read_image(saved(Image.fromarray(flat), "JPEG", quality=95), name="a.jpg")
    assert rgb.shape == (16, 16, 3)
    assert np.abs(rgb.astype(int) - flat).max() <= 3  # JPEG rounds
    grey = read_image(saved(Image.fromarray(flat[..., 0]), "JPEG", quality=95), name="a.jpg")
    assert grey.shape == (16, 16, 1)
    assert np.abs(grey.astype(int) - 200).max() <= 3


def test_read_image_turns_cmyk_into_rgb() -> None:
    ink = np.zeros((8, 8, 4), np.uint8)
    ink[..., 0] = 255  # all cyan: no red is reflected
    data = saved(Image.fromarray(ink, "CMYK"), "TIFF")
    np.testing.assert_array_equal(read_image(data, name="a")[0, 0], (0, 255, 255))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP"])
def test_read_image_expands_a_palette_to_its_colors(kind: str) -> None:
    image = Image.fromarray(np.array([[0, 1, 1]], np.uint8), "P")
    image.putpalette([10, 20, 30, 200, 100, 0])
    data = saved(image, kind)
    np.testing.assert_array_equal(
        read_image(data, name="a")[0], [(10, 20, 30), (200, 100, 0), (200, 100, 0)]
    )
    np.testing.assert_array_equal(read_mask_pixels(data, name="a"), read_image(data, name="a"))


def test_read_mask_pixels_keeps_the_upper_bits_of_16_bit_colors() -> None:
    mask = read_mask_pixels(png16(RGB.astype(np.uint16) * 257, 2), name="a")
    assert mask.dtype == np.uint8
    np.testing.assert_array_equal(mask, RGB)


def test_read_mask_pixels_keeps_16_bit_grey() -> None:
    np.testing.assert_array_equal(read_mask_pixels(LOSSLESS["png-l16"][0], name="a"), GREY16)


def test_read_image_ignores_the_extension() -> None:
    data, expected = LOSSLESS["tiff-l"]
    np.testing.assert_array_equal(read_image(data, name="liar.png")[..., 0], expected)


BROKEN = {
    "empty": b"",
    "text": b"patient,laterality\n1,L\n",
    "avif": b"\0\0\0\x1cftypavif",
    "webp": saved(Image.fromarray(RGB), "WEBP"),
    "signature only": b"\x89PNG\r\n\x1a\n",
    "no end": LOSSLESS["png-l"][0][:-12],
    "rows missing": png(2, 40, 8, 0, b"\0\1\2" * 20),
    "no palette": png(4, 1, 8, 3, b"\0\0\0\0\0"),
    "no pixels": LOSSLESS["png-l"][0][:33] + chunk(b"IEND", b""),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_read_image_names_a_file_that_is_not_a_whole_image(kind: str) -> None:
    with pytest.raises(ContentError, match=r"^cases/7\.png: ") as caught:
        read_image(BROKEN[kind], name="cases/7.png")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "BMP", "GIF"])
@pytest.mark.parametrize("keep", [0.001, 0.02, 0.3, 0.6, 0.9, 0.9995])
def test_read_image_refuses_a_truncated_file(
    kind: str, keep: float, capfd: pytest.CaptureFixture[str]
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    data = saved(Image.fromarray(noise), kind)
    words = r"^a\.png: the image is truncated, damaged or of an unsupported kind \(.*\); rep"
    with pytest.raises(ContentError, match=words):
        read_image(data[: int(len(data) * keep)], name="a.png")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "GIF"])
def test_read_image_says_of_any_length_that_the_image_is_cut_off(kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8)
    data = saved(Image.fromarray(noise), kind)
    refused = 0
    for length in range(6, len(data)):
        try:
            read_image(data[:length], name="a")
        except ContentError as error:
            assert str(error).startswith("a: the image is truncated, damaged"), length
            refused += 1
    # Pillow reads a JPEG and a GIF without the last marker.
    assert refused >= len(data) - 6 - 2


def test_read_image_refuses_truncated_16_bit_colors_everywhere() -> None:
    noise = np.random.default_rng(0).integers(0, 65536, (16, 16, 3), np.uint16)
    for data in (png16(noise, 2), tiff(noise, photometric=2, bits=16)):
        for length in range(0, len(data) - 12, 97):
            with pytest.raises(ContentError, match=r"^a: "):
                read_image(data[:length], name="a")


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_read_image_of_a_damaged_png_writes_nothing_to_stderr(
    damage: str, capfd: pytest.CaptureFixture[str]
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)
    data = bytearray(encode_png(noise))
    if damage == "cut":
        del data[len(data) // 2 :]
    else:
        data[len(data) // 2] ^= 1
    with pytest.raises(ContentError, match=r"^a: "):
        read_image(bytes(data), name="a")
    assert capfd.readouterr().err == ""  # libpng would print there


@given(st.integers(0, 10**9))
def test_read_image_of_damaged_files_is_pixels_or_a_content_error(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sources = [LOSSLESS[kind][0] for kind in ("png-rgb16", "tiff-rgb16", "tiff-rgb-lzw", "bmp-l",
                                                  "gif-p-transparent-color")]  # fmt: skip
    data = bytearray(sources[seed % len(sources)])
    for position in rng.integers(0, len(data), 3):
        data[position] = rng.integers(256)
    try:
        pixels = read_image(bytes(data), name="a", max_pixels=10_000)
    except ContentError as error:
        assert str(error).startswith("a: ")
        assert "\n" not in str(error)
    else:
        assert pixels.ndim == 3
        assert pixels.dtype in (np.uint8, np.uint16)


def test_read_image_refuses_a_bomb_before_it_decodes() -> None:
    # 50000 x 50000 pixels of one bit would be 2.5 GB as bytes; the file is 1 kB.
    data = png(50_000, 50_000, 1, 0, bytes(100), chunk(b"tEXt", b"k\0" + b"x" * 900))
    assert len(data) < 1100
    with pytest.raises(ContentError, match=r"^a: 50000x50000 .* more than 100000000; downscale"):
        read_image(data, name="a")


def test_read_image_refuses_more_bytes_than_its_pixels_can_need() -> None:
    data = encode_png(GREY) + bytes(65 * 2**20)
    with pytest.raises(ContentError, match="bytes are more than an image of 4 pixels"):
        read_image(data, name="a", max_pixels=4)


def test_read_image_takes_an_image_of_exactly_max_pixels() -> None:
    data = encode_png(GREY)
    assert read_image(data, name="a", max_pixels=6).shape == (2, 3, 1)
    with pytest.raises(ContentError, match="3x2 is 6 pixels, more than 5"):
        read_image(data, name="a", max_pixels=5)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "GIF"])
def test_read_image_refuses_many_frames(kind: str) -> None:
    pages = [Image.fromarray(np.full((4, 4), i, np.uint8)) for i in range(50)]
    data = saved(pages[0], kind, save_all=True, append_images=pages[1:])
    with pytest.raises(ContentError, match=r"^a: has more than one frame"):
        read_image(data, name="a")


def gif(
    screen: tuple[int, int], box: tuple[int, int, int, int], codes: bytes, extra: bytes = b""
) -> bytes:
    """Returns a GIF of one frame at `box` (left, top, width, height) with codes of 9 bits."""
    head = b"GIF89a" + struct.pack("<HHBBB", *screen, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    frame = b"," + struct.pack("<4HB", *box, 0) + b"\x08" + bytes([len(codes)]) + codes + b"\0"
    return head + extra + frame + b";"


CLEAR_AND_END = struct.pack("<I", 256 | 257 << 9)
# Disposal to the background, for which Pillow fills the whole frame when it opens the file.
DISPOSED = b"!\xf9\x04\x08\0\0\0\0"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (gif((60_000, 60_000), (0, 0, 60_000, 60_000), b"", DISPOSED), "60000x60000 .* more than"),
        (gif((4, 4), (0, 0, 60_000, 60_000), b"", DISPOSED), "its frame: 60000x60000 .* more than"),
        (gif((4, 4), (1, 0, 3, 4), b""), "frame of 3x4 pixels at 1, 0 does not fill .* of 4x4; s"),
        (gif((4, 4), (0, 0, 5, 4), b""), "frame of 5x4 pixels at 0, 0 does not fill .* of 4x4; s"),
        (gif((4, 4), (0, 0, 4, 4), CLEAR_AND_END), "truncated, damaged"),
        (gif((4, 4), (0, 0, 4, 4), b""), "truncated, damaged"),
        (gif((0, 0), (0, 0, 0, 0), b""), "truncated, damaged"),
        (gif((4, 4), (0, 0, 4, 4), b"")[:19] + b";", "truncated, damaged.*no frame"),
        (gif((4, 4), (0, 0, 4, 4), b"")[:13], "truncated, damaged"),
    ],
    ids=["size", "frame", "left", "wide", "end", "no-codes", "no-pixels", "no-frame", "header"],
)
def test_read_image_refuses_hostile_gifs(data: bytes, message: str) -> None:
    with pytest.raises(ContentError, match=f"^a: .*{message}") as caught:
        read_image(data, name="a")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("screen", [(60_000, 60_000), (4, 4)])
def test_read_image_checks_a_gif_before_pillow_opens_it(
    screen: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("opened: 3.6 GB"))
    with pytest.raises(ContentError, match="60000x60000 is 3600000000 pixels, more than"):
        read_image(gif(screen, (0, 0, 60_000, 60_000), b"", DISPOSED), name="a")


FLOATS = GREY.astype(np.float32)


@pytest.mark.parametrize(
    "data",
    [
        saved(Image.fromarray(FLOATS, "F"), "TIFF"),
        saved(Image.fromarray(GREY.astype(np.int32), "I"), "TIFF"),
        tiff(GREY.astype(np.uint32), photometric=1, bits=32),
        tiff(GREY.astype(np.int16), photometric=1, bits=16, sample_format=2),
        tiff(FLOATS, photometric=1, bits=32, sample_format=3),
    ],
    ids=["float", "int32", "uint32", "int16", "float-by-hand"],
)
def test_read_image_refuses_values_other_than_unsigned_16_bit(data: bytes) -> None:
    with pytest.raises(ContentError, match=r"^a: .*(unsigned values of 8 or 16 bits|replace)"):
        read_image(data, name="a")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
def test_read_image_refuses_a_turned_image(kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = saved(Image.fromarray(RGB), kind, exif=exif)
    for read in (read_image, read_mask_pixels):
        with pytest.raises(ContentError, match=r"^a: EXIF orientation 6 .* save it upright"):
            read(data, name="a")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
def test_read_image_takes_an_upright_orientation(kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 1
    assert read_image(saved(Image.fromarray(RGB), kind, exif=exif), name="a").shape == (2, 3, 3)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
def test_encode_png_never_carries_metadata(kind: str) -> None:
    canary = "CANARY^PATIENT"
    exif = Image.Exif()
    exif[0x010E] = canary  # ImageDescription
    text = PngImagePlugin.PngInfo()
    text.add_text("Patient", canary)
    text.add_itxt("Name", canary)
    options = {"pnginfo": text} if kind == "PNG" else {"comment": canary} if kind == "JPEG" else {}
    data = saved(Image.fromarray(RGB), kind, exif=exif, icc_profile=canary.encode(), **options)
    assert canary.encode() in data
    stored = encode_png(read_image(data, name="a"))
    assert b"CANARY" not in stored
    assert [stored[i : i + 4] for i in (12, 37)] == [b"IHDR", b"IDAT"]
    assert Image.open(io.BytesIO(stored)).info == {}


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((2, 3), np.int32),
        np.zeros((2, 3), np.float32),
        np.zeros((2, 3, 2), np.uint8),
        np.zeros((2, 3, 4), np.uint8),
        np.zeros((0, 3), np.uint8),
        np.zeros(3, np.uint8),
    ],
    ids=lambda pixels: f"{pixels.shape} {pixels.dtype}",
)
def test_encode_png_refuses_what_it_would_change(pixels: Pixels) -> None:
    with pytest.raises(ValueError, match="cannot write"):
        encode_png(pixels)


def test_encode_png_accepts_pixels_that_are_not_contiguous() -> None:
    pixels = np.tile(RGB, (4, 4, 1))[::2, ::-1]
    np.testing.assert_array_equal(read_image(encode_png(pixels), name="a"), pixels)


@pytest.mark.skipif(not REAL.is_dir(), reason=f"real mammograms are not at {REAL}")
def test_read_image_of_real_mammograms_equals_pillow() -> None:
    for path in sorted((REAL / "images").iterdir())[:4]:
        with Image.open(path) as image:
            expected = np.asarray(image)
        np.testing.assert_array_equal(read_image(path.read_bytes(), name=path.name), expected)
