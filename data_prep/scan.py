"""Pass 1 of preparation: each pair is read once, checked, fitted, encoded and put aside.

The result of a scan is a staged object of finished records, and the facts that later decisions
need: channels, bit depth, statistics, checksums. A staged object is named by a digest of all that
went into it, so that an interrupted preparation finds its work again and never another's.
This module must not know of splits and shards.
"""

import dataclasses
import functools
import hashlib
import json
import struct
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import google_crc32c
import numpy as np

from data_prep import inbreast, schema
from data_prep.breast import Crop, Flip, frame
from data_prep.colormap import ClassColor, read_npz_mask, to_class_ids
from data_prep.dicom import Reader, read_dicom
from data_prep.dicom_frames import has_decoders
from data_prep.errors import ContentError
from data_prep.image import (
    Box,
    Geometry,
    apply_geometry,
    grey_channel,
    read_image,
    read_mask_pixels,
)
from data_prep.storage import Store, open_source, open_store, put_if_other
from data_prep.tiles import count, cut
from data_prep.vanished import RegionCounts, count_regions

_VERSION = 6  # of what is staged; another version's is not found
_TRAILER = struct.Struct("<QI")  # bytes of the index before it, and the CRC32C of the index
_MIN_PAIRS, _MAX_PAIRS = 4, 32  # of a chunk; each costs two fsyncs, or two requests
_MAX_TILES = 20_000  # of a picture; tiles of 64 that overlap by half cut 4096x3328 into 13081
_MAX_BYTES = 64 * 2**20  # of a chunk whose PNGs do not compress at all
_PART_BYTES = 32 * 2**20  # of records that a process holds; tiles of one picture take gigabytes
_SHOWN_COLORS = 3
_EXACT_PIXELS = 2**17  # of 65535**2 each


@dataclasses.dataclass(frozen=True)
class Layout:
    """How pictures are read and stored; every field is part of the dataset's identity.

    Attributes:
        format: "pairs" of picture and mask, or "inbreast": DICOM file and annotation.
        rois: kinds of annotations that are foreground.
        tile_overlap: of neighbouring tiles, pixels; counts where `geometry` is "tile".
        full_scale: raw value of full intensity of 16-bit pictures that do not say it; None: that
            is found.
    """

    height: int
    width: int
    geometry: Literal["stretch", "pad", "tile"]
    channels: Literal["auto", "grey", "rgb"]
    classes: tuple[ClassColor, ...]
    ignore_id: int | None
    off_map_limit: float
    max_pixels: int
    format: Literal["pairs", "inbreast"] = "pairs"
    rois: tuple[str, ...] = ()
    crop: Crop = "none"
    flip: Flip = "none"
    tile_overlap: int = 0
    full_scale: int | None = None


@dataclasses.dataclass(frozen=True)
class File:
    """One source file.

    Attributes:
        url, name: the store that holds it, and its name there.
        label: what errors call it.
    """

    url: str
    name: str
    label: str
    size: int
    generation: int


@dataclasses.dataclass(frozen=True)
class Item:
    """One pair to scan. `id`, `group` and `filename` are what the dataset shows.

    `mask` is None where a release says so that there is nothing to see.
    """

    id: str
    group: str
    filename: str
    split: str | None
    image: File
    mask: File | None


@dataclasses.dataclass(frozen=True)
class Moments:
    """Exact sums over the pixels of one or more pictures, per channel."""

    num_pixels: int
    sums: tuple[int, ...]
    squares: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Scanned:
    """What pass 1 found out about one sample of a good pair, and where its record is staged.

    Attributes:
        picture: id of the pair; the sample's own id where pictures are stored whole.
        picture_sha256: of the picture's pixels; `sha256` where it is stored whole.
        is_blank: all those pixels are alike.
        group: of the sample; `staged_group` is that of its record, before groups were joined.
        staged, offset, length: name of the staged object, place of the framed record in it, bytes.
        channels, bit_depth: as staged; `auto` keeps a picture as it is.
        max_value: largest raw value of the source; of full intensity where the file says it.
        value_max: raw value of full intensity, None where the file does not say it.
        num_above: pixels of the source above each of `full_scales`; empty where the file says its
            full scale, or has 8 bits.
        spacing_mm: size of a pixel of the source (y, x), where it is known.
        findings: annotations of a release.
        regions: of the source's mask, None where it is not made smaller.
        source_crcs: CRC32C of the image file and of the mask file, 0 where there is none.
    """

    id: str
    picture: str
    group: str
    filename: str
    split: str | None
    staged: str
    staged_group: str
    offset: int
    length: int
    channels: int
    bit_depth: int
    max_value: int
    geometry: Geometry
    pixels_per_class: tuple[int, ...]
    off_map_pixels: int
    sha256: str
    picture_sha256: str
    is_blank: bool
    moments: Moments
    value_max: int | None
    num_above: tuple[int, ...]
    spacing_mm: tuple[float, float] | None
    findings: tuple[inbreast.Finding, ...]
    regions: RegionCounts | None
    source_crcs: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Refused:
    """A pair that cannot be used: its id, the file at fault by its label, and why."""

    picture: str
    file: str
    reason: str
    source_crcs: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class ScanTask:
    """One call of `scan_chunk`.

    Attributes:
        staging_url: the store of staged objects.
        skip_bad: a bad pair becomes a `Refused` instead of an error.
        dicom_reader: what decodes DICOM files; the pixels are the same.
    """

    staging_url: str
    layout: Layout
    items: tuple[Item, ...]
    skip_bad: bool
    dicom_reader: Reader = "pydicom"


@dataclasses.dataclass(frozen=True)
class _Read:
    """One pair as it was read: (H, W, C) pixels, (H, W) class ids, and as in `Scanned`."""

    image: np.ndarray
    mask: np.ndarray
    off_map_pixels: int = 0
    value_max: int | None = None
    spacing_mm: tuple[float, float] | None = None
    findings: tuple[inbreast.Finding, ...] = ()


def chunked(items: Sequence[Item], layout: Layout) -> Iterator[tuple[Item, ...]]:
    """Yields `items` in chunks small enough for memory and many enough for all processes.

    The cut depends on nothing but the input, so that a restart finds what was staged before.
    """
    if layout.geometry == "tile":  # of pictures whose size is not known yet
        yield from ((item,) for item in items)
        return
    worst_bytes = layout.height * layout.width * 7  # three 16-bit channels and the mask
    wanted = min(_MAX_PAIRS, max(_MIN_PAIRS, len(items) // 48))
    size = max(1, min(wanted, _MAX_BYTES // worst_bytes))
    for start in range(0, len(items), size):
        yield tuple(items[start : start + size])


def scan_chunk(task: ScanTask) -> list[Scanned | Refused]:
    """Returns what is known about each sample of `task`, and stages their records.

    Raises:
        ContentError: an item is bad and `skip_bad` is off.
        StorageError: a file cannot be read, or the records not be staged.
    """
    import cv2

    cv2.setNumThreads(1)  # the processes are the parallelism
    staging = store_at(task.staging_url)
    name = _staged_name(task)
    found = _read_index(staging, name)
    if found is not None and (task.skip_bad or not any(isinstance(r, Refused) for r in found)):
        return found
    parts = _Parts(staging, name)
    for item in task.items:
        for result, record in _scan_item(item, task):
            parts.add(result, record)
    return parts.finish()


class _Parts:
    """Stages records in objects of bounded size; the last one has the index and the chunk's name.

    The index is what a later run looks for, and it is written when all else is there.
    """

    def __init__(self, staging: Store, name: str) -> None:
        self._staging, self._name = staging, name
        self._results: list[Scanned | Refused] = []
        self._records: list[bytes] = []
        self._num_bytes = self._num_parts = self._num_placed = 0

    def add(self, result: Scanned | Refused, record: bytes) -> None:
        """Takes the next record; it is at its place when `finish` returns."""
        if self._num_bytes + len(record) > _PART_BYTES and self._records:
            part = f"{self._name.removesuffix('.bin')}-{self._num_parts:05d}.bin"
            # After a stop it may be there; the account may create and not replace.
            put_if_other(self._staging, part, self._take(part))
            self._num_parts += 1
        self._results.append(result)
        self._records.append(record)
        self._num_bytes += len(record)

    def finish(self) -> list[Scanned | Refused]:
        """Stages the rest and the index, and returns the results with the places of the records."""
        records = self._take(self._name)
        index = json.dumps([_to_json(result) for result in self._results], default=vars).encode()
        trailer = _TRAILER.pack(len(index), google_crc32c.value(index))
        self._staging.put(self._name, b"".join((records, index, trailer)))
        return self._results

    def _take(self, staged: str) -> bytes:
        """Returns the records since the last call, whose place is in the object `staged`."""
        offset = 0
        for i, record in enumerate(self._records, self._num_placed):
            result = self._results[i]
            if isinstance(result, Scanned):
                self._results[i] = dataclasses.replace(result, staged=staged, offset=offset)
            offset += len(record)
        data = b"".join(self._records)
        self._num_placed = len(self._results)
        self._num_bytes = 0
        self._records.clear()
        return data


def full_scales(full_scale: int | None) -> tuple[int, ...]:
    """Returns the raw values that may be full intensity: the given one, or 255, 511 ... 65535."""
    return tuple(2**bits - 1 for bits in range(8, 17)) if full_scale is None else (full_scale,)


def source_crcs(item: Item) -> tuple[int, int]:
    """Returns the CRC32C of the item's two files, as `scan_chunk` finds them."""
    return _crcs(_read_both(item))


def _read_both(item: Item) -> tuple[bytes, bytes | None]:
    return _read(item.image), None if item.mask is None else _read(item.mask)


def _crcs(data: tuple[bytes, bytes | None]) -> tuple[int, int]:
    first, second = (0 if each is None else google_crc32c.value(each) for each in data)
    return first, second


def moments_of(image: np.ndarray) -> Moments:
    """Returns the exact sums of `image`, (H, W, C) uint8 or uint16.

    OpenCV sums in float64, and may square a root: blocks keep the squares below 2**50, where
    rounding mends that. It takes 0.02 ms for 512x512 pixels, a histogram of NumPy 1.3 ms.
    """
    import cv2

    height, width, _ = image.shape
    num_rows = max(1, _EXACT_PIXELS // width)
    sums, squares = [], []
    for channel in (image[..., 0],) if image.shape[2] == 1 else cv2.split(image):
        blocks = [channel[row : row + num_rows] for row in range(0, height, num_rows)]
        sums.append(sum(round(cv2.sumElems(block)[0]) for block in blocks))
        squares.append(sum(round(cv2.norm(block, cv2.NORM_L2SQR)) for block in blocks))
    return Moments(height * width, tuple(sums), tuple(squares))


@functools.lru_cache(maxsize=64)
def store_at(url: str) -> Store:
    """Returns the store at `url`, the same one for each call in a process."""
    return open_store(url)


@functools.lru_cache(maxsize=64)
def _source_at(url: str) -> Store:
    return open_source(url)


def _scan_item(item: Item, task: ScanTask) -> Iterator[tuple[Scanned | Refused, bytes]]:
    """Yields what is known about each sample of a pair, and its record, which has no place yet."""
    layout = task.layout
    data = _read_both(item)
    crcs = _crcs(data)
    try:
        read = _READERS[layout.format](item, task, *data)
        whole = _framed(item, layout, read)
    except ContentError as error:
        if not task.skip_bad:
            raise
        is_mask = item.mask is not None and str(error).startswith(item.mask.label)
        at_fault = item.mask if item.mask is not None and is_mask else item.image
        yield Refused(item.id, at_fault.label, str(error), crcs), b""
        return
    is_cut = layout.geometry == "tile"
    max_value = read.value_max or int(read.image.max())
    picture_sha256, is_blank = None, False
    if is_cut:
        # Of the picture: tiles of film without tissue are alike in strangers.
        pixels = apply_geometry(read.image, whole, whole.height, whole.width, nearest=False)
        picture_sha256, is_blank = schema.sha256_of_pixels(pixels), _is_blank(pixels)
        del pixels
    num_above = _num_above(read, layout)
    for sample in _samples(item, layout, read, whole):
        record = schema.frame_record(schema.encode_example(sample))
        image, mask = sample.image, sample.mask
        result = Scanned(
            id=sample.id,
            picture=item.id,
            group=item.group,
            filename=item.filename,
            split=item.split,
            staged="",
            staged_group=item.group,
            offset=0,
            length=len(record),
            channels=image.shape[2],
            bit_depth=image.dtype.itemsize * 8,
            max_value=max_value,
            geometry=sample.geometry,
            pixels_per_class=tuple(int(np.count_nonzero(mask == c.id)) for c in layout.classes),
            off_map_pixels=sample.off_map_pixels,
            sha256=sample.pixel_sha256,
            picture_sha256=picture_sha256 or sample.pixel_sha256,
            is_blank=is_blank if is_cut else _is_blank(_without_border(image, whole)),
            moments=moments_of(image),
            value_max=read.value_max,
            num_above=num_above,
            spacing_mm=read.spacing_mm,
            findings=read.findings,
            regions=count_regions(read.mask, sample.geometry, len(layout.classes)),
            source_crcs=crcs,
        )
        yield result, record


def _framed(item: Item, layout: Layout, read: _Read) -> Geometry:
    """Returns how the picture is stored; where it is cut, before that."""
    geometry = frame(
        read.image,
        height=layout.height,
        width=layout.width,
        kind=layout.geometry,
        crop=layout.crop,
        flip=layout.flip,
    )
    _refuse_lost_foreground(item, layout, read.mask, geometry)
    if layout.geometry == "tile":
        _refuse_many_tiles(item, layout, geometry)
    return geometry


def _refuse_many_tiles(item: Item, layout: Layout, whole: Geometry) -> None:
    num_tiles = count(whole, layout.height, layout.width, layout.tile_overlap)
    if num_tiles > _MAX_TILES:
        raise ContentError(
            f"{item.image.label}: {whole.height}x{whole.width} pixels would be {num_tiles} tiles, "
            f"more than {_MAX_TILES}; raise --tile or lower --tile-overlap"
        )


def _num_above(read: _Read, layout: Layout) -> tuple[int, ...]:
    if read.value_max is not None or read.image.dtype == np.uint8:
        return ()
    brightest = read.image.max(axis=2)
    top = int(brightest.max())
    return tuple(
        int(np.count_nonzero(brightest > scale)) if top > scale else 0
        for scale in full_scales(layout.full_scale)
    )


def _is_blank(pixels: np.ndarray) -> bool:
    """Returns whether all pixels of (H, W[, C]) are alike: film that was not exposed, a filler."""
    return bool(np.all(pixels == pixels[0, 0]))


def _without_border(image: np.ndarray, geometry: Geometry) -> np.ndarray:
    rows = slice(geometry.top, geometry.top + geometry.height)
    return image[rows, geometry.left : geometry.left + geometry.width]


def _samples(item: Item, layout: Layout, read: _Read, whole: Geometry) -> Iterator[schema.Sample]:
    """Yields the samples as they are stored: the picture, or its tiles."""
    if layout.geometry != "tile":
        yield _fitted_sample(item, layout, read, whole, item.id, None)
        return
    for place, geometry in cut(whole, layout.height, layout.width, layout.tile_overlap):
        name = f"{item.id}_y{place.top}_x{place.left}"
        yield _fitted_sample(item, layout, read, geometry, name, item.id)


def _fitted_sample(
    item: Item,
    layout: Layout,
    read: _Read,
    geometry: Geometry,
    sample_id: str,
    picture: str | None,
) -> schema.Sample:
    size = layout.height, layout.width
    image = apply_geometry(read.image, geometry, *size, nearest=False).reshape(*size, -1)
    return schema.Sample(
        id=sample_id,
        group=item.group,
        image=image,
        mask=apply_geometry(read.mask, geometry, *size, nearest=True),
        filename=item.filename,
        geometry=geometry,
        spacing_mm=read.spacing_mm,
        pixel_sha256=schema.sha256_of_pixels(image),
        off_map_pixels=read.off_map_pixels,
        picture=picture,
    )


def _refuse_lost_foreground(
    item: Item, layout: Layout, mask: np.ndarray, geometry: Geometry
) -> None:
    """A crop that cuts the truth would make every prediction look better than it is."""
    box = geometry.part
    is_foreground = mask > 0
    if layout.ignore_id is not None:
        is_foreground &= mask != layout.ignore_id
    inside = is_foreground[box.top : box.top + box.height, box.left : box.left + box.width]
    num_lost = np.count_nonzero(is_foreground) - np.count_nonzero(inside)
    if num_lost:
        raise ContentError(
            f"{item.image.label}: the crop to the breast would cut off {num_lost} pixels of "
            "foreground; look at the picture, and prepare without --crop if it is right"
        )


def _read_pair(item: Item, task: ScanTask, image_data: bytes, mask_data: bytes | None) -> _Read:
    layout = task.layout
    image = _read_picture(item, layout, image_data)
    if item.mask is None or mask_data is None:
        raise ValueError(f"{item.image.label}: a pair without a mask")
    mask, off_map = _read_mask(item, item.mask, layout, mask_data, image.shape[:2])
    return _Read(image, mask, off_map)


def _read_case(item: Item, task: ScanTask, image_data: bytes, mask_data: bytes | None) -> _Read:
    """Returns a picture of the INbreast release with the outlines of its annotation."""
    layout = task.layout
    found = read_dicom(
        image_data,
        name=item.image.label,
        max_pixels=layout.max_pixels,
        reader=task.dicom_reader,
    )
    image = to_rgb(found.pixels) if layout.channels == "rgb" else found.pixels
    rois: list[inbreast.Roi] = []
    if item.mask is not None and mask_data is not None:
        rois = inbreast.read_rois(mask_data, name=item.mask.label)
    label = item.image.label if item.mask is None else item.mask.label
    mask = inbreast.draw_rois(rois, layout.rois, *image.shape[:2], name=label)
    counts = inbreast.count_findings(rois)
    return _Read(image, mask, 0, found.value_max, found.spacing_mm, counts)


_READERS = {"pairs": _read_pair, "inbreast": _read_case}


def _read_picture(item: Item, layout: Layout, data: bytes) -> np.ndarray:
    """Returns (H, W, C) pixels in the channels of `layout`; grey RGB becomes one channel."""
    import cv2

    image = read_image(data, name=item.image.label, max_pixels=layout.max_pixels)
    if layout.channels == "rgb":
        return to_rgb(image)
    grey = grey_channel(image)
    if grey is not None:
        return grey[:, :, np.newaxis]
    if layout.channels == "grey":  # the luma of ITU-R BT.601
        return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[:, :, np.newaxis]
    return image


def to_rgb(image: np.ndarray) -> np.ndarray:
    """Returns (H, W, 3); a grey picture gets its channel three times."""
    return image if image.shape[2] == 3 else np.repeat(image, 3, axis=2)


def _read_mask(
    item: Item, file: File, layout: Layout, data: bytes, size: tuple[int, ...]
) -> tuple[np.ndarray, int]:
    """Returns (H, W) uint8 class ids of the whole mask, and its number of off-map pixels."""
    label = file.label
    if file.name.lower().endswith(".npz"):
        count = len(layout.classes)
        pixels = read_npz_mask(data, label, num_classes=count, max_pixels=layout.max_pixels)
    else:
        pixels = read_mask_pixels(data, name=label, max_pixels=layout.max_pixels)
    if pixels.shape[:2] != size:
        raise ContentError(
            f"{label}: mask of {pixels.shape[1]}x{pixels.shape[0]} pixels, but its image "
            f"{item.image.label} has {size[1]}x{size[0]}; both must have the same size"
        )
    ids, off_map, colors = to_class_ids(
        pixels, layout.classes, name=label, ignore_id=layout.ignore_id
    )
    if off_map > layout.off_map_limit * ids.size:
        share = 100 * off_map / ids.size
        shown = ", ".join(str(color) for color in colors[:_SHOWN_COLORS])
        raise ContentError(
            f"{label}: {share:.2f} % of the pixels have no class colour, more than "
            f"{100 * layout.off_map_limit:g} % allowed; most common: {shown}; name them in "
            "--classes, or raise --off-map-limit where they are blends along edges"
        )
    return ids, off_map


def _read(file: File) -> bytes:
    return _source_at(file.url).get(file.name)


def _staged_name(task: ScanTask) -> str:
    # Labels and places are left out: the same pair by another path is the same work.
    parts: list[Any] = [schema.FORMAT_VERSION, _VERSION, dataclasses.asdict(task.layout)]
    if task.layout.format == "inbreast":
        parts.append(has_decoders())  # with them fewer pictures are refused
    for item in task.items:
        files = [
            file and (file.url, file.name, file.size, file.generation)
            for file in (item.image, item.mask)
        ]
        parts.append((item.id, item.group, item.filename, item.split, files))
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    return f"scan-{digest[:32]}.bin"


def _read_index(staging: Store, name: str) -> list[Scanned | Refused] | None:
    """Returns the results of a staged object, None when it is not there or damaged."""
    stat = staging.stat(name)
    if stat is None or stat.size < _TRAILER.size:
        return None
    trailer = staging.get(name, stat.size - _TRAILER.size, _TRAILER.size)
    num_bytes, crc = _TRAILER.unpack(trailer)
    start = stat.size - _TRAILER.size - num_bytes
    if start < 0:
        return None
    index = staging.get(name, start, num_bytes)
    if google_crc32c.value(index) != crc:
        return None
    return [_from_json(values) for values in json.loads(index)]


def _to_json(result: Scanned | Refused) -> dict[str, Any]:
    return {"kind": type(result).__name__} | vars(result)


def _from_json(values: dict[str, Any]) -> Scanned | Refused:
    kind = values.pop("kind")
    crcs = tuple(values.pop("source_crcs"))
    if kind == Refused.__name__:
        return Refused(source_crcs=crcs, **values)
    geometry = values.pop("geometry")
    crop = geometry.pop("crop")
    geometry = Geometry(**geometry, crop=Box(**crop) if crop else None)
    moments = {key: _tuple(value) for key, value in values.pop("moments").items()}
    counts = tuple(values.pop("pixels_per_class"))
    num_above = tuple(values.pop("num_above"))
    findings = tuple(inbreast.Finding(**each) for each in values.pop("findings"))
    regions = values.pop("regions")
    if regions is not None:
        regions = RegionCounts(**{key: _tuple(value) for key, value in regions.items()})
    return Scanned(
        geometry=geometry,
        moments=Moments(**moments),
        pixels_per_class=counts,
        num_above=num_above,
        findings=findings,
        regions=regions,
        spacing_mm=_tuple(values.pop("spacing_mm")),
        source_crcs=crcs,
        **values,
    )


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
