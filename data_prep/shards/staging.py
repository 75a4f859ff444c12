"""Stages finished records of pass 1 until pass 2 copies them into shards.

The name of a staged object is a digest of all its inputs, so that an interrupted preparation finds
its own work again and no other. The module does not depend on the content of records.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import struct
from concurrent.futures import Future
from typing import Any

import google_crc32c

from data_prep.imaging.dicom.frames import has_decoders
from data_prep.imaging.geometry import Box, Geometry
from data_prep.imaging.lost_regions import RegionCounts
from data_prep.masks.reading import UnmappedColor
from data_prep.masks.rules import READING_RULES
from data_prep.shards.manifest import FORMAT_VERSION
from data_prep.shards.source_pairs import EncodedSample, Moments, RejectedPair, ScanTask
from data_prep.sources import inbreast
from flexunet.process_pool import RequestThreads
from flexunet.storage import ObjectStore, open_store, put_probably_new

_VERSION = 9  # of the staged format; objects of other versions are not found
_TRAILER = struct.Struct("<QI")  # bytes of the index before it, and the CRC32C of the index
_PART_BYTES = 32 * 2**20  # of records in memory; the tiles of one image may take gigabytes
_MAX_STAGING_BYTES = 2 * _PART_BYTES  # in memory until they are stored, unless one object is larger


class Parts:
    """Stages records in objects of bounded size; the last one has the index and the chunk's name.

    A later run looks for the index, which is written after all other objects.
    """

    def __init__(self, puts: "BackgroundPuts", name: str) -> None:
        self._puts, self._name = puts, name
        self._results: list[EncodedSample | RejectedPair] = []
        self._records: list[bytes] = []
        self._num_bytes = self._num_parts = self._num_placed = 0

    def add(self, result: EncodedSample | RejectedPair, record: bytes) -> None:
        """Adds the next record; its offset is final when `finish` returns."""
        if self._num_bytes + len(record) > _PART_BYTES and self._records:
            part = f"{self._name.removesuffix('.bin')}-{self._num_parts:05d}.bin"
            self._puts.put(part, self._take(part))
            self._num_parts += 1
        self._results.append(result)
        self._records.append(record)
        self._num_bytes += len(record)

    def finish(self) -> list[EncodedSample | RejectedPair]:
        """Stages the rest and the index; returns the results with the offsets of the records.

        They are stored when `BackgroundPuts.wait` has returned.
        """
        records = self._take(self._name)
        index = json.dumps([_to_json(result) for result in self._results], default=vars).encode()
        trailer = _TRAILER.pack(len(index), google_crc32c.value(index))
        if self._num_parts:
            self._puts.wait()  # the index promises that all parts exist
        self._puts.put(self._name, b"".join((records, index, trailer)))
        return self._results

    def _take(self, staged: str) -> bytes:
        """Returns the records since the last call; sets their offsets in the object `staged`."""
        offset = 0
        for i, record in enumerate(self._records, self._num_placed):
            result = self._results[i]
            if isinstance(result, EncodedSample):
                self._results[i] = dataclasses.replace(result, staged=staged, offset=offset)
            offset += len(record)
        data = b"".join(self._records)
        self._num_placed = len(self._results)
        self._num_bytes = 0
        self._records.clear()
        return data


class BackgroundPuts:
    """Stages objects in its own threads while the next ones are computed.

    An object may exist from an interrupted run, and the account may not replace objects. Reads have
    other threads: an object would wait for all the files that are read ahead.
    """

    def __init__(self, staging: ObjectStore, num_threads: int) -> None:
        self._staging, self._num_threads = staging, num_threads
        self._threads = RequestThreads(num_threads)
        self._running: collections.deque[tuple[Future[None], int]] = collections.deque()
        self._num_bytes = 0

    def put(self, name: str, data: bytes) -> None:
        """Starts to stage `data` as soon as a thread is idle and few bytes are in memory.

        Raises:
            StorageError: an object before it could not be stored.
        """
        while self._running and (
            len(self._running) == self._num_threads
            or self._num_bytes + len(data) > _MAX_STAGING_BYTES
        ):
            self._finish_oldest()
        future = self._threads.submit(put_probably_new, self._staging, name, data)
        self._running.append((future, len(data)))
        self._num_bytes += len(data)

    def wait(self) -> None:
        """Waits until all objects are stored.

        Raises:
            StorageError: one of them could not be stored.
        """
        concurrent.futures.wait([future for future, _ in self._running])
        while self._running:
            self._finish_oldest()

    def close(self) -> None:
        """Ends the threads after their last object, without waiting for them."""
        self._threads.shutdown()

    def _finish_oldest(self) -> None:
        future, num_bytes = self._running.popleft()
        self._num_bytes -= num_bytes
        future.result()


@functools.lru_cache(maxsize=64)
def store_at(url: str) -> ObjectStore:
    """Returns the store at `url`, cached per process."""
    return open_store(url)


def staged_name(task: ScanTask) -> str:
    """Returns the name of the staged object with the index of `task`."""
    # Without labels: the same pair through another path is the same work.
    versions = [FORMAT_VERSION, _VERSION, READING_RULES]
    parts: list[Any] = [*versions, dataclasses.asdict(task.layout)]
    if task.layout.format == "inbreast":
        parts.append(has_decoders())  # with decoders, fewer images are rejected
    for item in task.items:
        files = [
            file and (file.url, file.name, file.size, file.generation)
            for file in (
                item.image,
                item.mask,
                *item.more_masks,
                *([item.view] if item.view else []),
            )
        ]
        parts.append((item.id, item.group, item.filename, item.split, files))
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    return f"scan-{digest[:32]}.bin"


def read_index(staging: ObjectStore, name: str) -> list[EncodedSample | RejectedPair] | None:
    """Returns the results of a staged object, None if it is missing or damaged."""
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


def _to_json(result: EncodedSample | RejectedPair) -> dict[str, Any]:
    return {"kind": type(result).__name__} | vars(result)


def _from_json(values: dict[str, Any]) -> EncodedSample | RejectedPair:
    kind = values.pop("kind")
    crcs = tuple(values.pop("source_crcs"))
    if kind == RejectedPair.__name__:
        return RejectedPair(source_crcs=crcs, **values)
    geometry = values.pop("geometry")
    crop = geometry.pop("crop")
    geometry = Geometry(**geometry, crop=Box(**crop) if crop else None)
    moments = {key: _tuple(value) for key, value in values.pop("moments").items()}
    counts = tuple(values.pop("pixels_per_class"))
    unmapped = tuple(
        UnmappedColor(_tuple(color), *rest) for color, *rest in values.pop("unmapped_colors")
    )
    num_above = tuple(values.pop("num_above"))
    findings = tuple(inbreast.Finding(**each) for each in values.pop("findings"))
    regions = values.pop("regions")
    if regions is not None:
        regions = RegionCounts(**{key: _tuple(value) for key, value in regions.items()})
    return EncodedSample(
        geometry=geometry,
        moments=Moments(**moments),
        pixels_per_class=counts,
        unmapped_colors=unmapped,
        num_above=num_above,
        findings=findings,
        regions=regions,
        spacing_mm=_tuple(values.pop("spacing_mm")),
        source_crcs=crcs,
        **values,
    )


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
