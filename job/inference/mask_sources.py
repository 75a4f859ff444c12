"""Records the source image of each mask in a folder, and finds the masks that are out of date.

A call that predicts writes one record of all masks before its first mask: `inference-images-N.json`
with N one higher than before. Then it deletes older records. So each call writes at most one
record, and an account that may create objects but not replace them can write it.

An image is the same if its name, size and checksum are the same. A local folder has no checksums;
there the modification time counts. The record also names the generation of a mask that
the call replaces: if the call is killed before it replaces the mask, the next call finds that
generation and predicts again.
"""

import contextlib
import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace

from flexunet.storage import Forbidden, ObjectMeta, ObjectStore, PreconditionFailed
from flexunet.text import legible, pluralize
from job.inference.inputs import OVERLAYS_FOLDER, mask_name

logger = logging.getLogger(__name__)

_RECORD_PREFIX = "inference-images-"
_RECORD_NAME = re.compile(r"inference-images-([0-9]{6,12})\.json")
_COLUMNS = ("image", "size", "generation", "crc32c", "old_mask")


@dataclass(frozen=True)
class MaskSource:
    """The source image of a mask.

    Attributes:
        image: the name of the image.
        size: bytes of the image.
        generation: of the image; in a local folder its modification time in ns.
        crc32c: of the image, None in a local folder.
        old_mask: generation of an earlier mask of another image; 0: there was none.
    """

    image: str
    size: int
    generation: int
    crc32c: int | None
    old_mask: int

    def is_of(self, image: ObjectMeta) -> bool:
        """Returns whether `image` is the recorded image."""
        if (self.image, self.size) != (image.name, image.size):
            return False
        if self.crc32c is not None and image.crc32c is not None:
            return self.crc32c == image.crc32c
        return self.generation == image.generation


@dataclass(frozen=True)
class MaskPlan:
    """The images to predict, and the record to write.

    Attributes:
        todo: images to predict.
        changed: those of `todo` that changed after their mask was made.
        unknown: those of `todo` that have a mask, but no record of its image.
        gone: masks whose image is no longer there.
        sources: the new record, by the name of the mask.
        holds_masks: whether the folder has masks of these images or of the old record.
    """

    todo: tuple[str, ...]
    changed: tuple[str, ...]
    unknown: tuple[str, ...]
    gone: tuple[str, ...]
    sources: Mapping[str, MaskSource]
    holds_masks: bool


def plan_masks(
    images: Sequence[ObjectMeta],
    objects: Mapping[str, ObjectMeta],
    sources: Mapping[str, MaskSource],
    *,
    overwrite: bool,
    is_other: bool = False,
) -> MaskPlan:
    """Selects the images to predict.

    Args:
        objects: all objects of the folder of masks, by name.
        sources: the record of that folder, see `read_sources`.
        overwrite: predict all images.
        is_other: the masks of that folder were made in another way, see `made_otherwise`.
    """
    todo, changed, unknown = [], [], []
    recorded: dict[str, MaskSource] = {}
    for image in images:
        name = mask_name(image.name)
        mask, source = objects.get(name), sources.get(name)
        if mask and not overwrite:
            if source is None:
                unknown.append(image.name)
            elif not source.is_of(image) or source.old_mask == mask.generation:
                changed.append(image.name)
            else:
                recorded[name] = source
                continue
        todo.append(image.name)
        old_mask = mask.generation if mask else 0
        recorded[name] = MaskSource(
            image.name, image.size, image.generation, image.crc32c, old_mask
        )
    gone = [name for name in sources if name not in recorded and name in objects]
    for name in gone:
        # A mask of another run is out of date if its image comes back.
        source, mask = sources[name], objects[name]
        recorded[name] = replace(source, old_mask=mask.generation) if is_other else source
    if not is_other:
        # Another call with the same run and options may be about to write these masks.
        recorded = {**sources, **recorded}
    holds_masks = any(name in objects for name in recorded)
    return MaskPlan(tuple(todo), tuple(changed), tuple(unknown), tuple(gone), recorded, holds_masks)


def report_plan(output: ObjectStore, plan: MaskPlan) -> None:
    """Logs which masks are predicted again, and why."""
    if plan.changed:
        logger.info(
            "%s: %s changed after the mask was made, first %s; predicted again",
            output.url,
            pluralize(len(plan.changed), "image"),
            legible(plan.changed[0]),
        )
    if plan.unknown:
        logger.warning(
            "%s: no record of the image of %s (earlier versions of flexunet wrote none), first %s; "
            "predicted again",
            output.url,
            pluralize(len(plan.unknown), "mask"),
            legible(mask_name(plan.unknown[0])),
        )


def read_sources(output: ObjectStore, objects: Iterable[str]) -> dict[str, MaskSource]:
    """Returns the newest record in `output` by the name of the mask, or an empty one.

    Args:
        objects: the names of all objects in `output`.

    Raises:
        NotFound: another call has deleted the record; list the objects again.
    """
    records = _records(objects)
    if not records:
        return {}
    try:
        return _parsed(output.get(records[-1]))
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError):
        logger.warning("%s/%s: damaged, not used", output.url, records[-1])
        return {}


def newest_record(output: ObjectStore) -> str | None:
    """Returns the name of the newest record in `output`; a record never changes under its name."""
    records = _records(each.name for each in output.list(_RECORD_PREFIX))
    return records[-1] if records else None


def write_sources(
    output: ObjectStore, objects: Iterable[str], sources: Mapping[str, MaskSource]
) -> None:
    """Writes a new record and deletes older ones if the credentials allow it.

    Raises:
        PreconditionFailed: another call wrote a record at the same time; plan again.
    """
    records = _records(objects)
    number = _number_of(records[-1]) + 1 if records else 1
    rows = {name: astuple(source) for name, source in sorted(sources.items())}
    lines = [f"{json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items()]
    text = f'{{"columns": {json.dumps(_COLUMNS)},\n"masks": {{\n' + ",\n".join(lines) + "\n}}\n"
    name = f"inference-images-{number:06d}.json"
    output.put(name, text.encode(), if_generation=0)
    # The number is free again if other calls wrote it, then a higher one, and deleted it.
    newest = newest_record(output)
    if newest and newest != name:
        with contextlib.suppress(Forbidden):
            output.delete(name)
        raise PreconditionFailed(f"{output.url}: another infer wrote {newest} after {name}")
    try:
        for record in records:
            output.delete(record)
    except Forbidden:
        logger.debug("%s: older records stay; no permission to delete them", output.url)


def delete_outdated(output: ObjectStore, objects: Iterable[str], names: Iterable[str]) -> None:
    """Deletes those of `names` that are in `objects`; no new file replaces them."""
    outdated = sorted(set(objects).intersection(names))
    try:
        for name in outdated:
            output.delete(name)
    except Forbidden:
        logger.warning(
            "%s: these credentials cannot delete %s out of date, first %s; ignore or delete them",
            output.url,
            pluralize(len(outdated), "object"),
            legible(outdated[0]),
        )


def overlay_names(images: Iterable[str]) -> list[str]:
    """Returns the object names of the overlays of `images`."""
    return [f"{OVERLAYS_FOLDER}/{mask_name(name)}" for name in images]


def _parsed(data: bytes) -> dict[str, MaskSource]:
    """Parses a record; raises if it is damaged."""
    found = {}
    for mask, (image, size, generation, crc32c, old_mask) in json.loads(data)["masks"].items():
        checksum = None if crc32c is None else int(crc32c)
        found[mask] = MaskSource(str(image), int(size), int(generation), checksum, int(old_mask))
    return found


def _records(objects: Iterable[str]) -> list[str]:
    """Returns the names of the records in `objects`, the newest last."""
    return sorted((name for name in objects if _RECORD_NAME.fullmatch(name)), key=_number_of)


def _number_of(name: str) -> int:
    return int(name.removesuffix(".json").rpartition("-")[2])
