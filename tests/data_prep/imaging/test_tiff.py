"""Every kind of TIFF that tifffile writes, against the pixels that it was given."""

import io
import itertools
import re
import struct

import numpy as np
import pytest
import tifffile

from data_prep.imaging.codecs import read_image, read_mask_pixels
from data_prep.imaging.pixels import Pixels
from data_prep.imaging.tiff import tiff_kind
from flexunet.errors import ContentError

HEIGHT, WIDTH = 37, 53  # neither a whole number of strips nor of tiles
PHOTOMETRICS = {
    "grey": "minisblack",
    "grey+alpha": "minisblack",
    "rgb": "rgb",
    "rgba": "rgb",
    "palette": "palette",
    "white-is-zero": "miniswhite",
}
NUM_SAMPLES = {"grey+alpha": 2, "rgb": 3, "rgba": 4}
COMPRESSIONS = ("none", "lzw", "lzw+predictor", "deflate", "deflate+predictor", "packbits")
LAYOUTS = ("strip", "tile", "one strip")
PLANAR, PAGE_NAME = 284, 285


def tiff_of(
    bits: int,
    kind: str,
    planar: str = "contig",
    order: str = "<",
    layout: str = "strip",
    compression: str = "none",
    **options: object,
) -> tuple[bytes, Pixels]:
    """Returns a file of random pixels and what is to be read: (H, W, 1 or 3)."""
    rng = np.random.default_rng(len(kind) + bits)
    largest = 2**bits - 1
    samples = NUM_SAMPLES.get(kind, 1)
    stored = rng.integers(0, largest, (HEIGHT, WIDTH, samples), f"u{bits // 8}", endpoint=True)
    meant = stored[:, :, : 3 if samples > 2 else 1]
    if kind == "white-is-zero":
        meant = largest - stored
    if kind == "palette":
        colors = rng.integers(0, 256, (3, largest + 1), np.uint16)
        options["colormap"] = colors * 257
        meant = np.moveaxis(colors.astype(np.uint8)[:, stored[:, :, 0]], 0, -1)
    if kind in ("grey+alpha", "rgba"):
        options["extrasamples"] = ["unassalpha"]
    if samples > 1:
        options["planarconfig"] = planar
    elif planar == "separate":
        options["extratags"] = [(PAGE_NAME, "H", 1, 2, True)]
    if layout != "one strip":
        options |= {"tile": (16, 32)} if layout == "tile" else {"rowsperstrip": 8}
    method, _, predictor = compression.partition("+")
    file = io.BytesIO()
    tifffile.imwrite(
        file,
        np.moveaxis(stored, -1, 0) if planar == "separate" and samples > 1 else stored.squeeze(),
        photometric=PHOTOMETRICS[kind],
        byteorder=order,
        compression=None if method == "none" else method,
        predictor=predictor == "predictor",
        metadata=None,
        **options,
    )
    data = file.getvalue()
    if planar == "separate" and samples == 1:  # tifffile leaves the tag out; the pixels are alike
        before, after = (struct.pack(f"{order}HH", tag, 3) for tag in (PAGE_NAME, PLANAR))
        assert data.count(before) == 1
        data = data.replace(before, after)
    return data, meant


def outcome(data: bytes, meant: Pixels) -> str:
    """Returns "exact", "wrong", or the error without its beginning."""
    try:
        pixels = read_image(data, name="a")
    except ContentError as error:
        return str(error)
    same = pixels.dtype == meant.dtype and np.array_equal(pixels, meant)
    return "exact" if same and pixels.flags.writeable else "wrong"


@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("kind", PHOTOMETRICS)
@pytest.mark.parametrize("bits", [8, 16])
def test_read_image_is_exact_whatever_writes_the_tiff(
    bits: int, kind: str, planar: str, capfd: pytest.CaptureFixture[str]
) -> None:
    table = {}
    for order, layout, compression in itertools.product("<>", LAYOUTS, COMPRESSIONS):
        data, meant = tiff_of(bits, kind, planar, order, layout, compression)
        table[order, layout, compression] = outcome(data, meant)
    assert {row: read for row, read in table.items() if read != "exact"} == {}
    assert len(table) == 36
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("kind", PHOTOMETRICS)
def test_read_image_is_exact_of_a_bigtiff_or_names_it(kind: str, planar: str) -> None:
    data, meant = tiff_of(16, kind, planar, compression="lzw", bigtiff=True)
    assert data.startswith(b"II+")
    assert outcome(data, meant) == "exact"
    data, meant = tiff_of(16, kind, planar, order=">", compression="lzw", bigtiff=True)
    assert "unsupported kind (big-endian BigTIFF; save it as little-endian)" in outcome(data, meant)


def test_read_mask_pixels_of_planes_keeps_the_upper_bits_of_colors() -> None:
    data, meant = tiff_of(16, "rgb", "separate")
    np.testing.assert_array_equal(read_mask_pixels(data, name="a"), meant >> 8)


def written(pixels: Pixels, **options: object) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, pixels, metadata=None, **options)
    return file.getvalue()


U16 = np.zeros((16, 16, 5), np.uint16)
REFUSED = {
    "float": (
        written(U16[..., 0].astype(np.float32), photometric="minisblack"),
        "32-bit grey of 1 sample, contiguous, not compressed, little-endian",
    ),
    "signed planes": (
        written(
            np.zeros((3, 16, 16), np.int16),
            photometric="rgb",
            planarconfig="separate",
            byteorder=">",
        ),
        "16-bit RGB of 3 samples, planar, not compressed, big-endian",
    ),
    "five samples": (
        written(U16, photometric="rgb", extrasamples=[0, 0], compression="lzw"),
        "16-bit RGB of 5 samples, contiguous, LZW, little-endian",
    ),
    "three greys": (
        written(
            U16[..., :3],
            photometric="minisblack",
            planarconfig="contig",
            extrasamples=[0, 0],
            compression="deflate",
            predictor=True,
        ),
        "16-bit grey of 3 samples, contiguous, deflate with predictor 2, little-endian",
    ),
    "CIELab": (
        written(U16[..., :3], photometric="cielab"),
        "16-bit CIELab of 3 samples, contiguous, not compressed, little-endian",
    ),
    "JPEG 2000": (
        written(U16[..., 0], photometric="minisblack", compression="jpeg2000"),
        "16-bit grey of 1 sample, contiguous, compression 34712, little-endian",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_read_image_names_the_kind_of_tiff_that_it_refuses(kind: str) -> None:
    data, words = REFUSED[kind]
    assert tiff_kind(data) == words
    with pytest.raises(ContentError, match=rf"^a: [^\n]*{re.escape(words)}") as caught:
        read_image(data, name="a")
    assert " at 0x" not in str(caught.value)


RESTATED = [("rgb", "separate"), ("grey+alpha", "contig"), ("palette", "contig")]


@pytest.mark.parametrize(("kind", "planar"), RESTATED)
def test_read_image_refuses_a_restated_tiff_that_is_cut_off(kind: str, planar: str) -> None:
    for compression in ("none", "lzw"):
        data, _ = tiff_of(16, kind, planar, compression=compression)
        # Half a pixel, or the last code of a strip.
        for end in (*range(5, len(data) - 1, 997), len(data) - 1):
            with pytest.raises(ContentError, match=r"^a: the image is truncated") as caught:
                read_image(data[:end], name="a")
            assert " at 0x" not in str(caught.value)


def test_read_image_says_that_the_tags_of_a_tiff_are_cut_off() -> None:
    data, _ = tiff_of(16, "grey+alpha")
    for end in (8, 9, 100):
        with pytest.raises(
            ContentError, match=r"^a: .*unsupported kind \(the tags are truncated\); replace"
        ):
            read_image(data[:end], name="a")


@pytest.mark.parametrize(("kind", "planar"), RESTATED[:2])
def test_read_image_of_a_damaged_restated_tiff_is_pixels_or_a_content_error(
    kind: str, planar: str
) -> None:
    intact, _ = tiff_of(16, kind, planar, compression="lzw")
    rng = np.random.default_rng(0)
    num_refused = 0
    for _ in range(200):
        data = bytearray(intact)
        data[rng.integers(4, 300)] = rng.integers(256)  # the tags are there
        try:
            pixels = read_image(bytes(data), name="a", max_pixels=10_000)
        except ContentError as error:
            assert re.match(r"a: [^\n]*$", str(error))
            assert " at 0x" not in str(error)
            num_refused += 1
        else:
            assert pixels.dtype in (np.uint8, np.uint16)
    assert num_refused > 20


def test_read_image_measures_a_tiff_before_it_restates_it() -> None:
    data, _ = tiff_of(16, "rgb", "separate", compression="lzw")
    file = io.BytesIO(data)
    with tifffile.TiffFile(file, mode="r+b") as opened:
        opened.pages[0].tags["ImageWidth"].overwrite(2**31)
    with pytest.raises(ContentError, match=r"^a: 2147483648x37 .* more than 100000000; downscale"):
        read_image(file.getvalue(), name="a")


def test_read_image_measures_a_tile_before_it_decodes() -> None:
    data, meant = tiff_of(8, "grey", layout="tile", compression="lzw")
    assert outcome(data, meant) == "exact"
    file = io.BytesIO(data)
    with tifffile.TiffFile(file, mode="r+b") as opened:
        for side in ("TileWidth", "TileLength"):
            opened.pages[0].tags[side].overwrite(60_000)
    with pytest.raises(ContentError, match=r"^a: a tile: 60000x60000 is .* more than 100000000"):
        read_image(file.getvalue(), name="a")


@pytest.mark.parametrize("kind", ["grey", "grey+alpha"])
def test_read_image_refuses_frames_of_a_tiff_that_it_restates(kind: str) -> None:
    file = io.BytesIO()
    for _ in range(2):
        file.seek(0)
        tifffile.imwrite(
            file,
            U16[..., : NUM_SAMPLES.get(kind, 1)].squeeze(),
            photometric="minisblack",
            metadata=None,
            append=bool(file.getvalue()),
            **({"planarconfig": "contig", "extrasamples": ["unassalpha"]} if "+" in kind else {}),
        )
    with pytest.raises(ContentError, match=r"^a: has more than one frame"):
        read_image(file.getvalue(), name="a")


def test_read_image_refuses_a_turned_tiff_that_it_restates() -> None:
    data = written(
        U16[..., :2],
        photometric="minisblack",
        planarconfig="contig",
        extrasamples=["unassalpha"],
        extratags=[(274, "H", 1, 6, True)],
    )
    with pytest.raises(ContentError, match=r"^a: EXIF orientation 6 "):
        read_image(data, name="a")
