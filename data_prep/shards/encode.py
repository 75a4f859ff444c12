"""Runs pass 1 of preparation: reads, checks, fits, encodes and stages each pair once.

A scan returns a staged object of finished records, and the facts for later decisions: channels, bit
depth, statistics, checksums. The name of a staged object is a digest of all its inputs, so that an
interrupted preparation finds its own work again and no other. The module does not depend on splits
and shards.
"""

import contextlib
import dataclasses
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager

import numpy as np

from data_prep.imaging.arrays import NPY_ENDING
from data_prep.imaging.breast import frame
from data_prep.imaging.geometry import Geometry, apply_geometry
from data_prep.imaging.lost_regions import count_regions
from data_prep.imaging.pixels import MAX_CHANNELS, is_uniform
from data_prep.imaging.tiles import count, cut
from data_prep.shards.pair_reader import PairData, ReadPair, crcs_of, read_file, read_pair
from data_prep.shards.pixel_format import num_above
from data_prep.shards.records import Sample, encode_example, frame_record, sha256_of_pixels
from data_prep.shards.source_pairs import (
    EncodedSample,
    File,
    Layout,
    Moments,
    RejectedPair,
    ScanBatch,
    ScanTask,
    SourcePair,
)
from data_prep.shards.staging import BackgroundPuts, Parts, read_index, staged_name, store_at
from flexunet.errors import ContentError, FlexUNetError
from flexunet.process_pool import (
    MAX_BYTES_AHEAD,
    MAX_REQUESTS,
    in_order,
    in_order_ahead,
    request_threads,
)

_MIN_PAIRS, _MAX_PAIRS = 4, 32  # per chunk; each chunk needs two fsyncs or two requests
_MAX_CHUNKS = 8  # per batch, so that the progress is shown often
_READS_PER_PUT = 4  # at once; a staged object is one request, but larger than a source file
_MAX_TILES = 20_000  # per image; tiles of 64 with half overlap cut 4096x3328 into 13081
_MAX_BYTES = 64 * 2**20  # per chunk, for PNGs that do not compress at all
_EXACT_PIXELS = 2**17  # of 65535**2 each


def chunked(items: Sequence[SourcePair], layout: Layout) -> Iterator[tuple[SourcePair, ...]]:
    """Yields `items` in chunks that fit into memory, and enough chunks for all processes.

    The chunks depend only on the input, so that a restart finds staged objects again.
    """
    if layout.geometry == "tile":  # the size of the images is not known yet
        yield from ((item,) for item in items)
        return
    # Three 16-bit channels and the mask; the header of an array is not read here.
    is_array = any(item.image.name.lower().endswith(NPY_ENDING) for item in items)
    pixel_bytes = 2 * MAX_CHANNELS + 1 if is_array else 7
    worst_bytes = layout.height * layout.width * pixel_bytes
    wanted = min(_MAX_PAIRS, max(_MIN_PAIRS, len(items) // 48))
    size = max(1, min(wanted, _MAX_BYTES // worst_bytes))
    for start in range(0, len(items), size):
        yield tuple(items[start : start + size])


def batched(
    chunks: Sequence[ScanTask], staged: Collection[str], num_workers: int, num_requests: int
) -> Iterator[ScanBatch]:
    """Yields `chunks` in batches: a worker reads ahead and stages without pauses inside of one.

    Args:
        staged: names of the objects that are staged already.
        num_workers: each of them gets several batches, if there are enough chunks.
        num_requests: see `ScanBatch`.
    """
    size = max(1, min(_MAX_CHUNKS, len(chunks) // (4 * num_workers)))
    for start in range(0, len(chunks), size):
        batch = tuple(chunks[start : start + size])
        yield ScanBatch(batch, tuple(staged_name(c) in staged for c in batch), num_requests)


def scan_chunks(batch: ScanBatch) -> list[EncodedSample | RejectedPair]:
    """Returns the facts of each sample of `batch`, and stages their records.

    Raises:
        ContentError: an item is bad and `skip_bad` is off.
        StorageError: a file cannot be read, or the records cannot be staged.
    """
    num_puts = max(1, batch.num_requests // _READS_PER_PUT)
    puts = BackgroundPuts(store_at(batch.chunks[0].staging_url), num_puts)
    try:
        with one_thread(), request_threads(batch.num_requests) as reader:
            return _scan_batch(batch, reader, puts)
    except FlexUNetError:
        puts.wait()  # the chunks before are complete, and the same command finds them
        raise
    finally:
        puts.close()


@contextmanager
def one_thread() -> Iterator[None]:
    """Makes OpenCV use one thread in the block, because the processes already run in parallel."""
    import cv2

    before = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(before)


def _scan_batch(
    batch: ScanBatch, reader: Executor, puts: BackgroundPuts
) -> list[EncodedSample | RejectedPair]:
    places = zip(batch.chunks, batch.is_staged, strict=True)
    staged = list(in_order(reader, _staged_results, places, num_waiting=MAX_REQUESTS))
    files = [
        file
        for task, found in zip(batch.chunks, staged, strict=True)
        if found is None
        for item in task.items
        for file in item.files
    ]
    results: list[EncodedSample | RejectedPair] = []
    ahead = in_order_ahead(reader, read_file, files, size_of=most_bytes)
    with contextlib.closing(ahead) as data:
        for task, found in zip(batch.chunks, staged, strict=True):
            results += _scan_chunk(task, data, puts) if found is None else found
    puts.wait()
    return results


def most_bytes(file: File) -> int:
    """Returns an upper limit of a file's bytes in memory; the limit of all files if unknown.

    The server decompresses an object without a listed checksum. Such a file is read alone.
    """
    return file.size if file.crc32c is not None else MAX_BYTES_AHEAD


def _staged_results(place: tuple[ScanTask, bool]) -> list[EncodedSample | RejectedPair] | None:
    """Returns the results of a chunk that an interrupted run has staged, None if they are missing.

    Without --skip-bad, a chunk with a rejected pair is scanned again to get the error.
    """
    task, may_exist = place
    found = read_index(store_at(task.staging_url), staged_name(task)) if may_exist else None
    if found is None or task.skip_bad or not any(isinstance(r, RejectedPair) for r in found):
        return found
    return None


def _scan_chunk(
    task: ScanTask, data: Iterator[bytes], puts: BackgroundPuts
) -> list[EncodedSample | RejectedPair]:
    """Returns the results of a chunk; `data` yields its files."""
    parts = Parts(puts, staged_name(task))
    for item in task.items:
        files = tuple(next(data) for _ in item.files)
        for result, record in _scan_item(item, task, files):
            parts.add(result, record)
        del files
    return parts.finish()


def moments_of(image: np.ndarray) -> Moments:
    """Returns the exact sums of `image`, (H, W, C) uint8 or uint16.

    OpenCV sums in float64, and `norm` may square a root. In blocks, the squares stay below 2**50,
    where rounding gives the exact value. Takes 0.02 ms for 512x512 pixels; a NumPy histogram takes
    1.3 ms.
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


@dataclasses.dataclass(frozen=True)
class _FramedImage:
    """One pair as read, and the facts shared by all samples cut from it.

    Attributes:
        whole: geometry of the stored image; with tiles, before cutting.
        cut_sha256: digest of the cropped image's pixels if it is cut into tiles, else None.
        cut_is_blank: all these pixels are equal.
        max_value, num_above, source_crcs: as in `EncodedSample`.
    """

    item: SourcePair
    read: ReadPair
    whole: Geometry
    cut_sha256: str | None
    cut_is_blank: bool
    max_value: int
    num_above: tuple[int, ...]
    source_crcs: tuple[int, int]


def _scan_item(
    item: SourcePair, task: ScanTask, data: PairData
) -> Iterator[tuple[EncodedSample | RejectedPair, bytes]]:
    """Yields the facts of each sample of a pair, and its record, which has no offset yet."""
    layout = task.layout
    crcs = crcs_of(data)
    try:
        read = read_pair(item, task, data)
        whole = _framed(item, layout, read)
    except ContentError as error:
        if not task.skip_bad:
            raise
        yield _refused(item, str(error), crcs), b""
        return
    framed = _frame_image(item, layout, read, whole, crcs)
    colors = read.reading.unmapped_colors
    for sample in _samples(framed, layout):
        record = frame_record(encode_example(sample))
        scanned = _scanned(framed, layout, sample, len(record))
        yield dataclasses.replace(scanned, unmapped_colors=colors), record
        colors = ()  # the first sample has those of the whole mask


def _refused(item: SourcePair, reason: str, crcs: tuple[int, int]) -> RejectedPair:
    masks = (file for file in item.files[1:] if reason.startswith(file.label))
    at_fault = next(masks, item.image)
    return RejectedPair(item.id, at_fault.label, reason, crcs)


def _frame_image(
    item: SourcePair, layout: Layout, read: ReadPair, whole: Geometry, crcs: tuple[int, int]
) -> _FramedImage:
    sha256, is_blank = None, False
    if layout.geometry == "tile":
        # Digest of the whole image: tiles of empty film are equal in images of different patients.
        pixels = apply_geometry(read.image, whole, whole.height, whole.width, nearest=False)
        sha256, is_blank = sha256_of_pixels(pixels), is_uniform(pixels)
    return _FramedImage(
        item=item,
        read=read,
        whole=whole,
        cut_sha256=sha256,
        cut_is_blank=is_blank,
        max_value=read.value_max or int(read.image.max()),
        num_above=_num_above(read, layout),
        source_crcs=crcs,
    )


def _scanned(framed: _FramedImage, layout: Layout, sample: Sample, num_bytes: int) -> EncodedSample:
    """Returns the facts of a sample whose record has `num_bytes` bytes and no offset yet."""
    item, read = framed.item, framed.read
    image, mask = sample.image, sample.mask
    if framed.cut_sha256 is None:
        is_blank = is_uniform(_without_border(image, framed.whole))
    else:
        is_blank = framed.cut_is_blank
    return EncodedSample(
        id=sample.id,
        image_id=item.id,
        group=item.group,
        filename=item.filename,
        split=item.split,
        staged="",
        staged_group=item.group,
        offset=0,
        length=num_bytes,
        channels=image.shape[2],
        bit_depth=image.dtype.itemsize * 8,
        max_value=framed.max_value,
        geometry=sample.geometry,
        pixels_per_class=tuple(int(np.count_nonzero(mask == c.id)) for c in layout.classes),
        unmapped_pixels=sample.unmapped_pixels,
        unmapped_colors=(),
        unexplained_pixels=read.reading.unexplained_pixels,
        sha256=sample.pixel_sha256,
        image_sha256=framed.cut_sha256 or sample.pixel_sha256,
        is_blank=is_blank,
        moments=moments_of(image),
        value_max=read.value_max,
        num_above=framed.num_above,
        spacing_mm=read.spacing_mm,
        findings=read.findings,
        regions=count_regions(read.mask, sample.geometry, len(layout.classes)),
        source_crcs=framed.source_crcs,
    )


def _framed(item: SourcePair, layout: Layout, read: ReadPair) -> Geometry:
    """Returns the geometry of the stored image; with tiles, before cutting."""
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


def _refuse_many_tiles(item: SourcePair, layout: Layout, whole: Geometry) -> None:
    num_tiles = count(whole, layout.height, layout.width, layout.tile_overlap)
    if num_tiles > _MAX_TILES:
        raise ContentError(
            f"{item.image.label}: {whole.height}x{whole.width} pixels would give {num_tiles} "
            f"tiles, more than {_MAX_TILES}; increase --tile or reduce --tile-overlap"
        )


def _num_above(read: ReadPair, layout: Layout) -> tuple[int, ...]:
    return () if read.value_max is not None else num_above(read.image, layout.full_scale)


def _without_border(image: np.ndarray, geometry: Geometry) -> np.ndarray:
    rows = slice(geometry.top, geometry.top + geometry.height)
    return image[rows, geometry.left : geometry.left + geometry.width]


def _samples(framed: _FramedImage, layout: Layout) -> Iterator[Sample]:
    """Yields the samples to store: the image, or its tiles."""
    item, whole = framed.item, framed.whole
    if layout.geometry != "tile":
        yield _fitted_sample(framed, layout, whole, item.id)
        return
    for place, geometry in cut(whole, layout.height, layout.width, layout.tile_overlap):
        name = f"{item.id}_y{place.top}_x{place.left}"
        yield _fitted_sample(framed, layout, geometry, name)


def _fitted_sample(
    framed: _FramedImage, layout: Layout, geometry: Geometry, sample_id: str
) -> Sample:
    item, read, size = framed.item, framed.read, (layout.height, layout.width)
    image = apply_geometry(read.image, geometry, *size, nearest=False).reshape(*size, -1)
    return Sample(
        id=sample_id,
        group=item.group,
        image=image,
        mask=apply_geometry(read.mask, geometry, *size, nearest=True),
        filename=item.filename,
        geometry=geometry,
        spacing_mm=read.spacing_mm,
        pixel_sha256=sha256_of_pixels(image),
        unmapped_pixels=read.reading.unmapped_pixels,
        image_id=item.id if layout.geometry == "tile" else None,
    )


def _refuse_lost_foreground(
    item: SourcePair, layout: Layout, mask: np.ndarray, geometry: Geometry
) -> None:
    """Rejects a crop that removes foreground, which would make all metrics optimistic."""
    box = geometry.part
    is_foreground = mask > 0
    if layout.ignore_id is not None:
        is_foreground &= mask != layout.ignore_id
    inside = is_foreground[box.top : box.top + box.height, box.left : box.left + box.width]
    num_lost = np.count_nonzero(is_foreground) - np.count_nonzero(inside)
    if num_lost:
        raise ContentError(
            f"{item.image.label}: the crop to the breast would remove {num_lost} pixels of "
            "foreground; check the image, and if it is correct, prepare without --crop"
        )
