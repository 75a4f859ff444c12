"""Measures the files of pairs in worker processes: images, values of masks, regions.

Two calls: `scan_files` reads all files once, and `scan_regions` reads the classes of a sample of
the pairs after the meaning of the masks is known. A bad file is a result, not an error.
"""

import contextlib
import functools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from data_prep.imaging.arrays import is_npy, read_npy
from data_prep.imaging.codecs import read_image
from data_prep.imaging.dicom.reader import read_dicom
from data_prep.imaging.geometry import fit
from data_prep.imaging.lost_regions import regions_at
from data_prep.imaging.pixels import Pixels, grey_channel, is_uniform
from data_prep.imaging.stored_sizes import MIN_AREA, StoredSize
from data_prep.imaging.tiff import TIFF_SIGNATURES
from data_prep.inspection.mask_values import Values, values_of
from data_prep.masks.color_map import Color
from data_prep.masks.files import MaskFile, is_jpeg, read_mask_file
from data_prep.masks.npz import read_npz_file
from data_prep.masks.reading import MaskReading
from data_prep.masks.rules import NoClassError
from data_prep.masks.statistics import MaskStatistics, statistics_of
from data_prep.shards.encode import most_bytes, one_thread
from data_prep.shards.pair_reader import check_size, read_file, read_masks, read_pair
from data_prep.shards.pixel_format import num_above
from data_prep.shards.records import sha256_of_pixels
from data_prep.shards.source_pairs import File, Layout, ScanTask, SourcePair
from flexunet.errors import ContentError, StorageError
from flexunet.process_pool import in_order_ahead, request_threads
from flexunet.storage import NotFound, open_store

_FILE_KINDS = {
    b"\x89PNG": "PNG",
    b"\xff\xd8": "JPEG",
    b"BM": "BMP",
    b"GIF8": "GIF",
    b"\x93NUMPY": "NPY",
    b"PK": "NPZ",
    **dict.fromkeys(TIFF_SIGNATURES, "TIFF"),
}
_NUM_BATCHES = 8  # per worker, so that the progress is shown often
_MAX_BATCH = 32
_Read = bytes | str  # a file, or why it cannot be read


@dataclass(frozen=True)
class BadFile:
    """A file that `prep` would reject, and why.

    Attributes:
        colors: values of no class in a mask; see `NoClassError`.
    """

    file: str
    reason: str
    colors: tuple[Color, ...] = ()


@dataclass(frozen=True)
class ImageFacts:
    """The facts about one image.

    Attributes:
        image_id: id of the pair.
        file_kind: PNG, JPEG, TIFF, BMP, GIF, NPY or DICOM.
        channels: as `prep` would store them: 1 if all are equal.
        file_channels: as in the file.
        sha256: digest of the pixels, with equal channels as one.
    """

    image_id: str
    filename: str
    split: str | None
    file_kind: str
    height: int
    width: int
    channels: int
    file_channels: int
    bit_depth: int
    max_value: int
    num_above: tuple[int, ...]
    sha256: str
    is_blank: bool

    @property
    def num_source_pixels(self) -> int:
        """Pixels of the image."""
        return self.height * self.width


@dataclass(frozen=True)
class FilesScan:
    """The facts about some pairs; scans can be added.

    Attributes:
        num_pairs: pairs that were read, with those of bad files.
        mask_kinds: number of mask files by kind of file.
        values: values of the masks of each pair by its id; None: too many to list.
    """

    num_pairs: int = 0
    images: tuple[ImageFacts, ...] = ()
    masks: MaskStatistics = field(default_factory=MaskStatistics)
    mask_kinds: Counter[str] = field(default_factory=Counter)
    bad: tuple[BadFile, ...] = ()
    values: Mapping[str, Values | None] = field(default_factory=dict)


@dataclass(frozen=True)
class InspectTask:
    """Some pairs and how to read them.

    Attributes:
        image_sizes: (height, width) of each image; this and the rest only for `scan_regions`.
        sizes: stored sizes to compare.
        min_area: smallest region that counts as lost, pixels.
        is_check: only whether the masks can be read; without regions.
    """

    items: tuple[SourcePair, ...]
    layout: Layout
    num_requests: int
    image_sizes: tuple[tuple[int, int], ...] = ()
    sizes: tuple[StoredSize, ...] = ()
    min_area: int = MIN_AREA
    is_check: bool = False


@dataclass
class ClassRegions:
    """The regions of a class in some masks.

    Attributes:
        areas: number of regions by area, pixels.
        lost: by stored size: lost regions that are not tiny.
    """

    num_images: int = 0
    num_pixels: int = 0
    areas: Counter[int] = field(default_factory=Counter)
    lost: Counter[StoredSize] = field(default_factory=Counter)

    def add(self, other: "ClassRegions") -> None:
        """Adds the regions of other masks."""
        self.num_images += other.num_images
        self.num_pixels += other.num_pixels
        self.areas.update(other.areas)
        self.lost.update(other.lost)


@dataclass
class RegionsScan:
    """The regions of some pairs by class id.

    Attributes:
        num_pixels: pixels of the masks.
        num_unmapped, num_unexplained: as in `MaskReading`.
        pixels: by id of the pair: pixels of each class.
    """

    num_pairs: int = 0
    num_pixels: int = 0
    num_unexplained: int = 0
    num_unmapped: int = 0
    classes: dict[int, ClassRegions] = field(default_factory=dict)
    pixels: dict[str, tuple[int, ...]] = field(default_factory=dict)
    bad: list[BadFile] = field(default_factory=list)

    def add(self, other: "RegionsScan") -> None:
        """Adds the regions of other pairs."""
        self.num_pairs += other.num_pairs
        self.num_pixels += other.num_pixels
        self.num_unexplained += other.num_unexplained
        self.num_unmapped += other.num_unmapped
        for class_id, found in other.classes.items():
            self.classes.setdefault(class_id, ClassRegions()).add(found)
        self.pixels.update(other.pixels)
        self.bad.extend(other.bad)


def batches(
    items: Sequence[SourcePair], task: InspectTask, num_workers: int
) -> Iterator[InspectTask]:
    """Yields `task` for all `items`, a part of them each."""
    size = max(1, min(_MAX_BATCH, len(items) // (_NUM_BATCHES * num_workers)))
    for start in range(0, len(items), size):
        part = slice(start, start + size)
        yield replace(task, items=tuple(items[part]), image_sizes=task.image_sizes[part])


def scan_files(task: InspectTask) -> FilesScan:
    """Returns the facts about the images and masks of a task.

    Raises:
        StorageError: a bucket cannot be read.
    """
    images: list[ImageFacts] = []
    bad: list[BadFile] = []
    masks, kinds = MaskStatistics(), Counter[str]()
    values: dict[str, Values | None] = {}
    for item, data in _read_ahead(task):
        image: ImageFacts | None = None
        try:
            image = _image_facts(item, task.layout, _bytes(data[0]))
            images.append(image)
        except ContentError as error:
            bad.append(BadFile(item.image.label, str(error)))
        if task.layout.format == "inbreast":
            continue
        of_pair = MaskStatistics()
        for file, read in zip(item.masks, data[1:], strict=False):
            try:
                mask = _read_mask_file(file, _bytes(read), task.layout.max_pixels)
                of_pair += statistics_of(mask, is_jpeg_file=is_jpeg(_bytes(read)))
                kinds[file_kind(_bytes(read))] += 1
                if image is not None:
                    check_size(item, file, mask.pixels.shape[:2], (image.height, image.width))
            except ContentError as error:
                bad.append(BadFile(file.label, str(error)))
        masks += of_pair
        values[item.id] = values_of(of_pair)
    return FilesScan(len(task.items), tuple(images), masks, kinds, tuple(bad), values)


def scan_regions(task: InspectTask) -> RegionsScan:
    """Returns the regions of the pairs of a task, read as `prep` reads them.

    Raises:
        StorageError: a bucket cannot be read.
    """
    result = RegionsScan(num_pairs=len(task.items))
    is_pairs = task.layout.format == "pairs"
    for number, (item, data) in enumerate(_read_ahead(task, with_images=not is_pairs)):
        try:
            files = tuple(_bytes(each) for each in data)
            if is_pairs:
                reading = read_masks(item, task.layout, files, task.image_sizes[number])
            else:
                scan = ScanTask("", task.layout, (item,), skip_bad=True)
                reading = read_pair(item, scan, files).reading
        except ContentError as error:
            result.bad.append(_bad_file(item, error))
            continue
        if not task.is_check:
            _add_regions(result, item, reading, task)
    return result


def _add_regions(
    result: RegionsScan, item: SourcePair, reading: MaskReading, task: InspectTask
) -> None:
    result.num_pixels += reading.ids.size
    result.num_unexplained += reading.unexplained_pixels
    result.num_unmapped += reading.unmapped_pixels
    result.pixels[item.id] = tuple(
        int(np.count_nonzero(reading.ids == each.id)) for each in task.layout.classes
    )
    for class_id, found in _regions(reading.ids, task).items():
        result.classes.setdefault(class_id, ClassRegions()).add(found)


def _bad_file(item: SourcePair, error: ContentError) -> BadFile:
    masks = (file.label for file in item.files[1:] if str(error).startswith(file.label))
    colors = error.colors if isinstance(error, NoClassError) else ()
    return BadFile(next(masks, item.image.label), str(error), colors)


def file_kind(data: bytes) -> str:
    """Returns the kind of a readable image or mask file, by its first bytes."""
    return next((kind for start, kind in _FILE_KINDS.items() if data.startswith(start)), "DICOM")


def _read_mask_file(file: File, data: bytes, max_pixels: int) -> MaskFile:
    if file.name.lower().endswith(".npz"):
        return read_npz_file(data, file.label, max_pixels=max_pixels)
    return read_mask_file(data, name=file.label, max_pixels=max_pixels)


def _regions(mask: Pixels, task: InspectTask) -> dict[int, ClassRegions]:
    size = mask.shape[0], mask.shape[1]
    places = [fit(size, (each.height, each.width), kind=each.kind) for each in task.sizes]
    found = {}
    for class_id, (areas, is_lost) in regions_at(mask, places, len(task.layout.classes)).items():
        if not len(areas):
            continue
        counts = (int(np.count_nonzero(lost & (areas >= task.min_area))) for lost in is_lost)
        found[class_id] = ClassRegions(
            1,
            int(areas.sum()),
            Counter(areas.tolist()),
            Counter(dict(zip(task.sizes, counts, strict=True))),
        )
    return found


def _image_facts(item: SourcePair, layout: Layout, data: bytes) -> ImageFacts:
    label, max_pixels = item.image.label, layout.max_pixels
    stated = None
    if layout.format == "inbreast":
        dicom = read_dicom(data, name=label, max_pixels=max_pixels)
        image, stated = dicom.pixels, dicom.value_max
    else:
        read = read_npy if is_npy(data) else read_image
        image = read(data, name=label, max_pixels=max_pixels)
    grey = grey_channel(image) if image.shape[2] == 3 else None
    pixels = image if grey is None else grey[:, :, np.newaxis]
    return ImageFacts(
        image_id=item.id,
        filename=item.filename,
        split=item.split,
        file_kind=file_kind(data),
        height=image.shape[0],
        width=image.shape[1],
        channels=pixels.shape[2],
        file_channels=image.shape[2],
        bit_depth=image.dtype.itemsize * 8,
        max_value=stated or int(image.max()),
        num_above=() if stated else num_above(pixels, layout.full_scale),
        sha256=sha256_of_pixels(pixels),
        is_blank=is_uniform(pixels),
    )


def _read_ahead(
    task: InspectTask, *, with_images: bool = True
) -> Iterator[tuple[SourcePair, tuple[_Read, ...]]]:
    """Yields each pair of a task with its files."""
    first = 0 if with_images else 1
    files = [file for item in task.items for file in item.files[first:]]
    with one_thread(), request_threads(task.num_requests) as reader:
        ahead = in_order_ahead(reader, _read_or_reason, files, size_of=most_bytes)
        with contextlib.closing(ahead) as data:
            for item in task.items:
                yield item, tuple(next(data) for _ in item.files[first:])


@functools.lru_cache(maxsize=64)
def _is_local(url: str) -> bool:
    return open_store(url).local_root is not None


def _read_or_reason(file: File) -> _Read:
    """Returns the bytes of a file, or why this file cannot be read.

    Raises:
        StorageError: the bucket cannot be read, so that other files cannot either.
    """
    try:
        return read_file(file)
    except (ContentError, NotFound) as error:
        return str(error)
    except StorageError as error:
        if not _is_local(file.url):
            raise
        return str(error)


def _bytes(data: _Read) -> bytes:
    if isinstance(data, str):
        raise ContentError(data)
    return data
