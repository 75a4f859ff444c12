"""Keeps the records of a folder of masks: how masks were made, and unreadable images."""

import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from data_prep.sources.dicom_files import why_no_image
from flexunet.errors import StorageError, UsageError
from flexunet.settings import flag_of
from flexunet.storage import Forbidden, NotFound, ObjectStore
from flexunet.tables import csv_table
from flexunet.text import legible
from job.inference.mask_sources import MaskSource, newest_record, read_sources
from job.inference.options import InferConfig
from job.postprocessing.masks import Postprocessing
from job.runs.loading import EnsembleMember

logger = logging.getLogger(__name__)

UNREADABLE_NAME = "unreadable.csv"
PASSED_OVER_NAME = "passed_over.csv"
MAX_PASSED_OVER = 10_000  # rows of the table
RECORD_NAME = "inference.json"  # run, weights and images of the masks

# The keys of a record and their defaults; None: there is no option with this name.
_RECORDED = {
    "run": None,
    "checkpoint": None,
    "images": None,
    "ensemble": "none",
    "flips": "none",
    "window": "auto",
    "small_regions": "none",
    "full_scale": "the dataset's",
    "threshold": "0.5",
    "min_region": "0",
    "probabilities": "none",
    "temperature": "1",
}
_MAX_CHANGES = 3  # in a message
_CHECK_S = 2.0  # between two checks of a claim


def record_of(
    members: Sequence[EnsembleMember],
    source: ObjectStore,
    config: InferConfig,
    postprocessing: Postprocessing,
    overlap: int | None,
) -> dict[str, Any]:
    """Returns the record of the masks in OUTPUT; options that are not used are left out."""
    first, *others = members
    record: dict[str, Any] = {
        "run": first.run,
        "checkpoint": first.checkpoint,
        "images": source.url,
    }
    if others:
        record["ensemble"] = [f"{each.run}/{each.checkpoint}" for each in others]
    if config.flips != "none":
        record["flips"] = config.flips
    if overlap is not None:
        record |= {"window": "sliding", "overlap": overlap}
    if config.small_regions is not None:
        # The file may change before the next call.
        sizes = list(postprocessing.min_pixels)
        record |= {"small_regions": config.small_regions, "min_pixels": sizes}
    elif postprocessing.min_pixels:
        record["min_region"] = list(postprocessing.min_pixels)
    if postprocessing.thresholds:
        record["threshold"] = list(postprocessing.thresholds)
    if config.probabilities != "none":
        record["probabilities"] = config.probabilities
        if postprocessing.temperature != 1:
            record["temperature"] = postprocessing.temperature
    if config.full_scale is not None:
        record["full_scale"] = config.full_scale
    return record


def refuse_other_masks(
    output: ObjectStore, record: Mapping[str, Any], *, is_continued: bool
) -> None:
    """Refuses to keep masks that were made with other weights, images or options.

    Args:
        is_continued: whether OUTPUT has masks that stay.

    Raises:
        UsageError: the record of OUTPUT differs.
    """
    found = _read_record(output)
    if is_continued and found != record:
        if found and "images" in found and found | {"images": record["images"]} == record:
            before, now = _worded(found["images"]), str(record["images"])
            other = f"{output.url}-{now.rpartition('/')[2] or 'other'}"
            raise UsageError(
                f"{output.url} has masks of images from {before}, and this call has images from "
                f"{now}; give another OUTPUT (for example {other}), or --overwrite to replace "
                "masks of the same name"
            )
        changes = _changes(found or {}, record)
        raise UsageError(
            f"{output.url}: holds masks made in another way: {'; '.join(changes[:_MAX_CHANGES])}; "
            "give another OUTPUT, or --overwrite to predict them again"
        )


def made_otherwise(output: ObjectStore, record: Mapping[str, Any]) -> bool:
    """Returns whether the masks in OUTPUT were made with other weights, images or options."""
    return _read_record(output) != record


def claim_output(output: ObjectStore, record: Mapping[str, Any]) -> None:
    """Writes the record of the masks in OUTPUT."""
    if _read_record(output) != record:
        output.put(RECORD_NAME, (json.dumps(record, indent=1) + "\n").encode())


class OutputClaim:
    """Notices that another call with another run or other options has begun to write into OUTPUT.

    A call with the same run, images and options writes the same masks and takes over nothing.
    """

    def __init__(
        self, output: ObjectStore, record: Mapping[str, Any], sources: Mapping[str, MaskSource]
    ) -> None:
        self._output, self._record, self._sources = output, record, sources
        self._checked_at = -math.inf
        self._agreed: str | None = None  # the newest record that was read and agrees

    def check_often(self) -> None:
        """Like `check`, but at most every few seconds; for each mask."""
        if time.monotonic() - self._checked_at >= _CHECK_S:
            self.check()

    def check(self) -> None:
        """Checks that the newest records are those of this call, or agree with them.

        Raises:
            StorageError: they do not.
        """
        self._checked_at = time.monotonic()
        is_taken = made_otherwise(self._output, self._record)
        # The record of many images is large: read it only when another one is the newest.
        newest = None if is_taken else newest_record(self._output)
        if newest is not None and newest != self._agreed:
            is_taken = self._disagrees(newest)
        if is_taken:
            raise StorageError(
                f"{self._output.url}: another infer took over OUTPUT; masks of both may be in it: "
                "when the other call has ended, run it again with --overwrite, and give this call "
                "another OUTPUT"
            )
        self._agreed = newest

    def _disagrees(self, record: str) -> bool:
        try:
            found = read_sources(self._output, [record])
        except NotFound:  # other calls replace it now
            return False
        return any(
            name in found and replace(found[name], old_mask=0) != replace(source, old_mask=0)
            for name, source in self._sources.items()
        )


def _read_record(output: ObjectStore) -> dict[str, Any] | None:
    """Returns the record of OUTPUT, or None if it is missing or damaged."""
    try:
        found = json.loads(output.get(RECORD_NAME))
    except (NotFound, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Describes the differences between two records (see `record_of`)."""
    changes = []
    for name, default in _RECORDED.items():
        before, now = (_worded(record.get(name, default)) for record in (old, new))
        if before != now:
            changes.append(
                f"{name if default is None else flag_of([name])} was {before}, now {now}"
            )
    # Report a consequence of these options only if the options are the same.
    both = [record for record in (old, new) if "overlap" in record]
    if len(both) == 2 and old["overlap"] != new["overlap"]:
        changes.append(f"--overlap was {old['overlap']}, now {new['overlap']}")
    if old.get("small_regions") == new.get("small_regions"):
        sizes = [record.get("min_pixels") for record in (old, new)]
        if sizes[0] != sizes[1]:
            where = new.get("small_regions")
            changes.append(f"the sizes of {where} were {sizes[0]}, now {sizes[1]}")
    return changes or ["by another version"]


def _worded(value: Any) -> str:
    if value is None:
        return "unknown"
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def list_unreadable(output: ObjectStore, unreadable: Sequence[tuple[str, str]]) -> None:
    """Writes the table of unreadable images, or deletes one of an earlier call."""
    _write_table(output, UNREADABLE_NAME, unreadable, "all images were read")


def list_passed_over(output: ObjectStore, names: Sequence[str]) -> None:
    """Writes the table of files that are no images, or deletes one of an earlier call.

    The table has the first `MAX_PASSED_OVER` files.
    """
    rows = [(name, why_no_image(name)) for name in names[:MAX_PASSED_OVER]]
    _write_table(output, PASSED_OVER_NAME, rows, "no file was skipped")


def _write_table(
    output: ObjectStore, name: str, rows: Sequence[tuple[str, str]], if_empty: str
) -> None:
    """Writes a table of (file, reason), or deletes one of an earlier call if there are no rows.

    A correct table is not touched. If the credentials do not allow to replace or delete a table, a
    warning names it: an account may be allowed to create objects but not to replace them.
    """
    shown = [(legible(file), legible(reason)) for file, reason in rows]
    data = csv_table(["file", "reason"], shown).encode() if rows else None
    try:
        found = output.get(name)
    except NotFound:
        found = None
    if data == found:
        return
    try:
        if data is not None:
            output.put(name, data)
        else:
            output.delete(name)
    except Forbidden:
        if found is None:
            raise
        logger.warning(
            "%s/%s is of an earlier call and stays, as these credentials have no permission to %s",
            output.url,
            name,
            "replace objects" if rows else f"delete; {if_empty}",
        )
