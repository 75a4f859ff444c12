"""Mask files with a palette or alpha: read by what carries the classes, or rejected."""

import io
import struct
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from data_prep.imaging.codecs import encode_png
from data_prep.masks.class_names import id_color
from data_prep.masks.color_map import DEFAULT_CLASSES, parse_color_map
from data_prep.masks.files import MaskFile, read_mask, read_mask_file
from data_prep.masks.npz import read_npz_file
from data_prep.masks.rules import Encoding, MaskRules
from flexunet.errors import ContentError
from tests.data_prep.masks.made_masks import grey_png, packed_rows

VOC = parse_color_map("background=0,0,0;aeroplane=128,0,0;bicycle=0,128,0")
IDS = np.array([[0, 1, 1], [2, 0, 2]], np.uint8)
PALETTE = [0, 0, 0, 128, 0, 0, 0, 128, 0]


def saved(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def with_palette(ids: np.ndarray, palette: list[int]) -> Image.Image:
    image = Image.fromarray(ids)
    image.putpalette(palette)
    return image


def read(data: bytes, rules: MaskRules) -> list[list[int]]:
    file = read_mask_file(data, name="m.png", max_pixels=100)
    ids: list[list[int]] = read_mask(file, rules, name="m.png").ids.tolist()
    return ids


@pytest.mark.parametrize("kind", ["PNG", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("encoding", ["auto", "index", "colour"])
def test_a_palette_is_read_by_its_colors_or_its_indices(kind: str, encoding: Encoding) -> None:
    data = saved(with_palette(IDS, PALETTE), kind)
    assert read(data, MaskRules(VOC, encoding=encoding)) == IDS.tolist()


@pytest.mark.parametrize("encoding", ["auto", "index"])
def test_a_palette_of_other_colors_is_read_by_its_indices(encoding: Encoding) -> None:
    data = saved(with_palette(IDS, [9, 9, 9, 90, 80, 70, 30, 200, 40]), "PNG")
    assert read(data, MaskRules(VOC, encoding=encoding)) == IDS.tolist()


def test_a_palette_whose_colors_and_indices_differ_is_rejected() -> None:
    swapped = [0, 0, 0, 0, 128, 0, 128, 0, 0]  # index 1 has the colour of class 2
    data = saved(with_palette(IDS, swapped), "PNG")
    with pytest.raises(ContentError, match="index 1 of its palette has the colour 0,128,0 of cla"):
        read(data, MaskRules(VOC))
    assert read(data, MaskRules(VOC, encoding="colour")) == [[0, 2, 2], [1, 0, 1]]
    assert read(data, MaskRules(VOC, encoding="index")) == IDS.tolist()


def test_indices_of_one_color_are_rejected() -> None:
    data = saved(with_palette(IDS, [0] * 9), "PNG")
    with pytest.raises(ContentError, match="different indices of its palette have the same colour"):
        read(data, MaskRules(VOC))
    assert read(data, MaskRules(VOC, encoding="index")) == IDS.tolist()


def test_a_shape_in_the_transparency_of_a_palette_is_read_or_rejected() -> None:
    image = with_palette((IDS > 0).astype(np.uint8), [255] * 6)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", transparency=bytes([0, 255]))
    with pytest.raises(ContentError, match="its shape is in the alpha channel"):
        read(buffer.getvalue(), MaskRules(DEFAULT_CLASSES))
    rules = MaskRules(DEFAULT_CLASSES, encoding="alpha")
    assert read(buffer.getvalue(), rules) == [[0, 1, 1], [1, 0, 1]]


def grey_tiff(levels: np.ndarray, bits: int) -> bytes:
    height, width = levels.shape
    pixels = b"".join(packed_rows(levels, bits))
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: 1, 273: 8, 277: 1, 278: height}
    tags[279] = len(pixels)
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    start = struct.pack("<2sHI", b"II", 42, 8 + len(pixels))
    return start + pixels + struct.pack("<H", len(tags)) + entries + bytes(4)


def test_a_bmp_of_4_bits_with_a_grey_palette_is_refused() -> None:
    palette = b"".join(bytes((i, i, i, 0)) for i in range(16))  # Pillow reads two pixels as one
    pixels = b"\x01\x10\0\0"
    header = struct.pack("<IiiHHIIiiII", 40, 4, 1, 1, 4, 0, len(pixels), 0, 0, 16, 16)
    data = b"BM" + struct.pack("<IHHI", 118 + len(pixels), 0, 0, 118) + header + palette + pixels
    with pytest.raises(ContentError, match="grey of 4 bits"):
        read(data, MaskRules(VOC))


FEW_BITS = [(made, bits) for made in (grey_png, grey_tiff) for bits in (1, 2, 4)]
THREE = parse_color_map("background=0,0,0;a=255,0,0;b=0,0,255")


@pytest.mark.parametrize(("made", "bits"), FEW_BITS)
@pytest.mark.parametrize("encoding", ["auto", "index"])
def test_grey_of_few_bits_is_read_as_the_levels_of_the_file(
    made: Callable[[np.ndarray, int], bytes], bits: int, encoding: Encoding
) -> None:
    rng = np.random.default_rng(bits)
    ids = rng.integers(0, min(3, 1 << bits), (7, 9))
    assert read(made(ids, bits), MaskRules(THREE, encoding=encoding)) == ids.tolist()
    if bits > 1:
        ids[3, 3] = top = (1 << bits) - 1
        rules = MaskRules(THREE, 9, ((top,) * 3,), encoding)
        assert read(made(ids, bits), rules) == np.where(ids == top, 9, ids).tolist()


@pytest.mark.parametrize(("made", "bits"), FEW_BITS)
def test_grey_of_few_bits_is_read_as_scaled_if_these_are_the_colors(
    made: Callable[[np.ndarray, int], bytes], bits: int
) -> None:
    top = (1 << bits) - 1
    levels = np.random.default_rng(bits).integers(0, 2, (7, 9)) * top
    for encoding in ("auto", "colour"):
        reading = read(made(levels, bits), MaskRules(DEFAULT_CLASSES, encoding=encoding))
        assert reading == (levels // top).tolist()
    if bits > 1:
        with pytest.raises(ContentError, match=rf"has ids of no class: {top} \(.*--ignore {top}$"):
            read(made(levels, bits), MaskRules(DEFAULT_CLASSES, encoding="index"))
    else:
        assert (
            read(made(levels, 1), MaskRules(DEFAULT_CLASSES, encoding="index")) == levels.tolist()
        )


def test_grey_of_few_bits_with_two_readings_is_rejected() -> None:
    classes = parse_color_map("background=0,0,0;a=170,170,170;b=85,85,85")
    data = grey_png(np.array([[0, 1, 2]]), 2)
    with pytest.raises(
        ContentError, match="level 1 of a file with few bits has the colour 85,85,8"
    ):
        read(data, MaskRules(classes))
    assert read(data, MaskRules(classes, encoding="colour")) == [[0, 2, 1]]
    assert read(data, MaskRules(classes, encoding="index")) == [[0, 1, 2]]


def test_an_index_beyond_the_palette_has_the_color_of_its_pixel() -> None:
    pixels = np.array([[[0, 0, 0], [128, 0, 0], [0, 128, 0]]], np.uint8)
    file = MaskFile(pixels, np.array([[7, 8, 9]], np.uint8), palette=((0, 0, 0),) * 8)
    assert read_mask(file, MaskRules(VOC), name="m").ids.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("kind", ["PNG", "GIF", "BMP", "TIFF"])
def test_the_palette_has_the_colors_of_the_pixels(kind: str) -> None:
    file = read_mask_file(saved(with_palette(IDS, PALETTE), kind), name="m", max_pixels=100)
    assert file.indices is not None
    assert np.array_equal(np.array(file.palette)[file.indices], file.pixels)


def png_16(pixels: np.ndarray) -> bytes:
    return encode_png(pixels.astype(np.uint16))


@pytest.mark.parametrize("factor", [256, 257])
def test_16_bit_colors_are_read_if_they_are_8_bit_values(factor: int) -> None:
    colors = np.array(PALETTE, np.uint16).reshape(3, 3)[IDS] * factor
    assert read(png_16(colors), MaskRules(VOC)) == IDS.tolist()
    colors[1, 2, 1] += 1
    with pytest.raises(ContentError, match=r"16-bit colour .* at row 1, column 2 has no equal"):
        read(png_16(colors), MaskRules(VOC))


@pytest.mark.parametrize("encoding", ["auto", "index"])
def test_16_bit_grey_ids_in_three_channels_are_ids(encoding: Encoding) -> None:
    data = png_16(np.stack([IDS] * 3, axis=2))
    assert read(data, MaskRules(VOC, encoding=encoding)) == IDS.tolist()


def test_one_hot_classes_are_ids_whatever_the_colors_are() -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, mask=np.eye(2, dtype=np.uint8)[np.array([[0, 1], [1, 1]])])
    classes = parse_color_map("cell=255,255,255;membrane=0,0,0")
    file = read_npz_file(buffer.getvalue(), "m.npz", num_classes=2)
    reading = read_mask(file, MaskRules(classes, encoding="colour"), name="m.npz")
    assert reading.ids.tolist() == [[0, 1], [1, 1]]


def test_an_ignored_index_of_a_palette_is_the_ignore_id() -> None:
    ids = np.array([[0, 1], [255, 2]], np.uint8)
    palette = PALETTE + [7] * 252 * 3 + [224, 224, 192]
    data = saved(with_palette(ids, palette), "PNG")
    assert read(data, MaskRules(VOC, 250, ((255, 255, 255),), "index")) == [[0, 1], [250, 2]]
    assert read(data, MaskRules(VOC, 250, ((224, 224, 192),))) == [[0, 1], [250, 2]]
    with pytest.raises(
        ContentError, match=r"has ids of no class: 255 \(1 pixels\); .*--ignore 255"
    ):
        read(data, MaskRules(VOC, encoding="index"))


@pytest.mark.parametrize("plane", [IDS, IDS.astype(np.uint16)])
def test_grey_ids_are_read_as_index_whatever_the_colors_are(plane: np.ndarray) -> None:
    data = saved(Image.fromarray(plane), "PNG")
    assert read(data, MaskRules(VOC, encoding="index")) == IDS.tolist()
    with pytest.raises(ContentError, match="of no class"):
        read(saved(Image.fromarray(plane * 60), "PNG"), MaskRules(VOC, encoding="index"))


def test_level_1_is_no_id_if_the_encoding_is_colour() -> None:
    mask = np.zeros((8, 8), np.uint8)
    mask[2:6, 2:6] = 1
    data = saved(Image.fromarray(mask), "PNG")
    assert read(data, MaskRules(DEFAULT_CLASSES)) == mask.tolist()
    with pytest.raises(ContentError, match="16 pixels of colour 1,1,1"):
        read(data, MaskRules(DEFAULT_CLASSES, encoding="colour"))


def test_black_is_foreground_if_the_first_class_is_white() -> None:
    classes = parse_color_map("cell=255,255,255;membrane=0,0,0")
    data = saved(Image.fromarray(np.array([[255, 0], [200, 255]], np.uint8)), "PNG")
    assert read(data, MaskRules(classes, encoding="colour")) == [[0, 1], [0, 0]]


@pytest.mark.parametrize(("mode", "kind"), [("LA", "PNG"), ("RGBA", "PNG"), ("RGBA", "TIFF")])
def test_a_shape_in_the_alpha_channel_is_read_or_rejected(mode: str, kind: str) -> None:
    alpha = np.array([[0, 255, 200], [0, 90, 255]], np.uint8)
    image = Image.new(mode, (3, 2), "white")
    image.putalpha(Image.fromarray(alpha))
    data = saved(image, kind)
    with pytest.raises(ContentError, match=r"m\.png: .*alpha channel; .*--mask-encoding alpha"):
        read(data, MaskRules(DEFAULT_CLASSES))
    file = read_mask_file(data, name="m.png", max_pixels=100)
    reading = read_mask(file, MaskRules(DEFAULT_CLASSES, encoding="alpha"), name="m.png")
    assert reading.ids.tolist() == [[0, 1, 1], [0, 0, 1]]
    assert reading.unmapped_pixels == 2
    assert reading.unmapped_colors == (((200,) * 3, 1, 1), ((90,) * 3, 1, 0))


def test_colors_under_a_varying_alpha_channel_are_read_as_colors() -> None:
    colors = np.array(PALETTE, np.uint8).reshape(3, 3)[IDS]
    image = Image.fromarray(np.dstack([colors, (IDS > 0).astype(np.uint8) * 255]))
    assert read(saved(image, "PNG"), MaskRules(VOC)) == IDS.tolist()


@pytest.mark.parametrize(
    ("image", "encoding", "message"),
    [
        (Image.fromarray(IDS), "alpha", "has no alpha channel, or one value in it"),
        (Image.new("RGBA", (2, 2), (9, 9, 9, 255)), "alpha", "has no alpha channel, or one value"),
        (Image.new("RGB", (2, 2), (9, 80, 9)), "index", "is a colour image without a palette"),
    ],
)
def test_a_file_without_what_the_encoding_names_is_rejected(
    image: Image.Image, encoding: Encoding, message: str
) -> None:
    with pytest.raises(ContentError, match=rf"^m\.png: {message}"):
        read(saved(image, "PNG"), MaskRules(DEFAULT_CLASSES, encoding=encoding))


def test_a_mask_that_is_transparent_everywhere_is_empty() -> None:
    empty = saved(Image.new("RGBA", (3, 2), (9, 9, 9, 0)), "PNG")
    assert read(empty, MaskRules(DEFAULT_CLASSES, encoding="alpha")) == [[0] * 3] * 2
    black = saved(Image.new("RGBA", (3, 2), (0, 0, 0, 0)), "PNG")
    assert read(black, MaskRules(DEFAULT_CLASSES)) == [[0] * 3] * 2
    drawn = Image.fromarray(np.dstack([np.array(PALETTE, np.uint8).reshape(3, 3)[IDS], IDS * 0]))
    with pytest.raises(ContentError, match="has no alpha channel, or one value in it"):
        read(saved(drawn, "PNG"), MaskRules(DEFAULT_CLASSES, encoding="alpha"))
    assert read(saved(drawn, "PNG"), MaskRules(VOC)) == IDS.tolist()


@pytest.mark.parametrize("kind", ["grey", "16 bits", "palette", "colours"])
def test_nonzero_values_are_the_second_class(kind: str) -> None:
    ids = np.array([[0, 1, 7], [40, 0, 3]], np.uint8)
    colors = np.array([id_color(i) for i in range(256)], np.uint8)
    image = {
        "grey": Image.fromarray(ids),
        "16 bits": Image.fromarray(ids.astype(np.uint16) * 300),
        "palette": with_palette(ids, [9, 9, 9, *colors[1:].ravel().tolist()]),
        "colours": Image.fromarray(colors[ids]),
    }[kind]
    data = saved(image, "PNG")
    expected = (ids > 0).astype(int)
    rules = MaskRules(DEFAULT_CLASSES, encoding="nonzero")
    assert read(data, rules) == expected.tolist()
    moved = MaskRules(DEFAULT_CLASSES, encoding="nonzero", file_ids=(1, 0))
    assert read(data, moved) == (1 - expected).tolist()
    ignored = {"16 bits": (900, 900, 900), "colours": id_color(3)}
    given = {ignored.get(kind, (3, 3, 3)), *([id_color(3)] if kind == "palette" else [])}
    for color in given:
        with_void = MaskRules(DEFAULT_CLASSES, 9, (color,), "nonzero")
        assert read(data, with_void) == np.where(ids == 3, 9, expected).tolist()


def test_a_colour_of_the_palette_is_ignored_where_indices_are_read() -> None:
    ids = np.array([[0, 1, 2], [255, 0, 255]], np.uint8)
    palette = [*PALETTE[:6], 9, 9, 9, *[0] * 756]
    palette[765:] = [224, 224, 192]
    data = saved(with_palette(ids, palette), "PNG")
    # Grey is an index: class 2 has the colour 9,9,9.
    rules = MaskRules(VOC, 7, ((224, 224, 192), (9, 9, 9)), "index")
    assert read(data, rules) == np.where(ids == 255, 7, ids).tolist()
