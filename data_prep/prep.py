"""Images and masks -> a committed dataset: its options, the steps in order, the `prep` command.

    flexunet prep SOURCE OUTPUT        the same as        python -m data_prep SOURCE OUTPUT

Owns the order of the steps and the identity of a dataset. How pictures are read, split and
stored is decided elsewhere.
"""

import csv
import dataclasses
import functools
import hashlib
import hmac
import importlib.metadata
import io
import json
import logging
import os
import re
import textwrap
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar

import click
from pydantic import field_validator, model_validator

from data_prep import inbreast, report, scan, schema, shards, split
from data_prep.breast import Crop, Flip
from data_prep.colormap import check_ignore_id, parse_color_map
from data_prep.command import PATH, SettingsCommand, given, run_command, settings_options
from data_prep.dicom import DICOM_ENDINGS, Reader
from data_prep.errors import ContentError, StorageError, UsageError
from data_prep.image import DEFAULT_MAX_PIXELS, read_image, read_mask_pixels
from data_prep.interrupts import quiet_interrupts
from data_prep.pairs import Pair, Reject, Source, find_pairs, find_sources, folder_made_by
from data_prep.pool import OpenWorkers, Workers, available_cores, local_workers
from data_prep.progress import Progress
from data_prep.settings import Settings, merged, option, read_yaml, validated
from data_prep.storage import (
    Store,
    crc32c_of,
    folder_problem,
    is_file,
    join_url,
    lies_in,
    open_source,
    open_store,
    probe_writable,
    put_if_other,
)
from data_prep.table import csv_table
from data_prep.words import as_utf8, counted, legible, listed

logger = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")

HASH_KEY_VARIABLE = "FLEXUNET_HASH_KEY"
_HASH_LENGTH = 16  # hex digits: 64 bits, a clash among a million names has odds of 1 to 37 million
_PAIRS_PER_SHEET = 6
_MAX_LISTED = 5
_COUNTS_WIDTH = 84  # columns of a terminal
_LOG_WIDTH = 80  # likewise, where there is none
_FEW_GROUPS = 5  # one of them moves the mean by a fifth and more


class PrepConfig(Settings):
    """The options of `prep`. All but the free ones are the identity of a dataset."""

    format: Literal["pairs", "inbreast"] = option(
        "pairs",
        "pairs: pictures and masks; inbreast: the original INbreast release, AllDICOMs/ and "
        "AllXML/, where the patient in the file name is the group and a picture without an XML "
        "file has no finding.",
    )
    rois: tuple[inbreast.Kind, ...] = option(
        ("mass",),
        f"Annotations of INbreast that are foreground: {', '.join(inbreast.KINDS)}. They name the "
        "class where --classes is not given: mass+spiculated.",
        min_length=1,
    )
    image_size: int = option(
        512,
        "Height and width of the stored images, pixels. A network of 8 levels, as training's "
        "default is, needs a multiple of 128; each level less halves that.",
        ge=8,
        le=16384,
    )
    image_height: int | None = option(
        None, "Height where it differs from --image-size, pixels.", ge=8, le=16384
    )
    image_width: int | None = option(
        None, "Width where it differs from --image-size, pixels.", ge=8, le=16384
    )
    geometry: Literal["stretch", "pad"] = option(
        "stretch", "stretch: fill the stored image; pad: keep the aspect, the rest is 0."
    )
    tile: int | None = option(
        None,
        "Cut pictures, at their own size, into tiles of so many pixels a side; unset: each is "
        "resized to --image-size.",
        ge=8,
        le=16384,
    )
    tile_overlap: int = option(
        0, "Pixels by which neighbouring tiles overlap at least; with --tile.", ge=0
    )
    crop: Crop = option(
        "none",
        "breast: leave out the film around the breast; undone where masks are predicted.",
    )
    flip: Flip = option(
        "none",
        "Side on which the chest wall shall be; other pictures are mirrored, undone likewise.",
    )
    channels: Literal["auto", "grey", "rgb"] = option(
        "auto", "Channels of the stored images; auto: grey when every picture is grey."
    )
    full_scale: int | None = option(
        None,
        "Raw value of full intensity of 16-bit pictures whose files do not say it, as DICOM files "
        "do; larger values become it. Unset: 2^bits - 1 of the bits that the pictures need, but "
        "for a few pixels of a few pictures.",
        ge=255,
        le=65535,
    )
    classes: str = option(
        "background=0,0,0;mass=255,255,255",
        "Colours of the masks in the order of the class ids: name=R,G,B;... or name=#rrggbb;...",
    )
    ignore_id: int | None = option(
        None, "Id in index masks of pixels that count nowhere; above the class ids.", ge=1, le=255
    )
    off_map_limit: float = option(
        0.01, "Largest share of a mask's pixels whose colour is of no class, 0 to 1.", ge=0, le=1
    )
    skip_bad: bool = option(
        False, "Leave bad files out and list them in report/rejects.csv, instead of stopping."
    )
    group_preset: Literal["augmented"] | None = option(
        None,
        "How names say which samples belong together; augmented: the source number at the end "
        "(barrdistorted_1001_0.3_0.3_23 is of 23). Unset, and no other --group option: every "
        "file is a group.",
    )
    group_regex: str | None = option(
        None,
        "Regular expression, found in the file name: its first group, or all of it, is the group.",
    )
    group_csv: str | None = option(None, "CSV file with the columns file and group.", path=True)
    fractions: tuple[float, float, float] = option(
        (0.80, 0.15, 0.05), "Shares of samples for train, valid and test; whole groups each."
    )
    seed: int = option(1, "Seed of splits, folds and the order in the shards.", ge=0)
    num_folds: int | None = option(
        None, "Folds for cross-validation over train and valid; column fold of the sample table.",
        ge=2, le=100,
    )  # fmt: skip
    allow_leaks: bool = option(
        False, "Accept ready-made splits that share a group or a picture; marked leaky: true."
    )
    hash_names: bool = option(
        False,
        "Replace names and groups by 16 hex digits of their HMAC-SHA256; the key is in "
        f"{HASH_KEY_VARIABLE}, without it names that can be guessed can be found again.",
    )
    shard_size: float = option(64.0, "Size of a shard to aim at, MB.", gt=0, le=1024)
    max_pixels: int = option(
        DEFAULT_MAX_PIXELS, "Largest picture that is read, pixels.", ge=1, le=2**31
    )
    dicom_reader: Reader = option(
        "pydicom",
        "What decodes DICOM files that are not compressed, to the same pixels; tfio: "
        "tensorflow-io, of the extra tfio.",
        free=True,
    )
    num_processes: int | None = option(
        None, "Processes that read and encode; 1: this one. Unset: one per CPU.", free=True, ge=1
    )

    @model_validator(mode="before")
    @classmethod
    def _class_is_named_after_rois(cls, values: Any) -> Any:
        if not isinstance(values, dict) or "rois" not in values or "classes" in values:
            return values
        rois = values["rois"]
        # Others are refused below.
        is_known = isinstance(rois, list | tuple) and all(roi in inbreast.KINDS for roi in rois)
        if values.get("format") != "inbreast" or not rois or not is_known:
            return values
        name = "+".join(dict.fromkeys(rois))
        return values | {"classes": f"background=0,0,0;{name}=255,255,255"}

    @field_validator("fractions", mode="before")
    @classmethod
    def _fractions_are_three(cls, values: Any) -> Any:
        if isinstance(values, list | tuple) and len(values) != 3:
            raise ValueError("three shares are needed: of train, valid and test")
        return values

    @field_validator("fractions")
    @classmethod
    def _fractions_add_up(cls, values: tuple[float, float, float]) -> tuple[float, float, float]:
        if min(values) < 0 or abs(sum(values) - 1) > 1e-6:
            raise ValueError("three shares of at least 0 that add up to 1 are needed")
        if values[0] == 0:
            raise ValueError("the share of train must be above 0")
        return values

    @field_validator("group_regex")
    @classmethod
    def _regex_compiles(cls, text: str | None) -> str | None:
        try:
            re.compile(text or "")
        except re.error as error:
            raise ValueError(f"not a regular expression ({error})") from error
        return text

    @model_validator(mode="after")
    def _classes_fit(self) -> "PrepConfig":
        check_ignore_id(parse_color_map(self.classes), self.ignore_id)
        return self

    @model_validator(mode="after")
    def _format_fits(self) -> "PrepConfig":
        if self.format == "pairs":
            if self.rois != PrepConfig.model_fields["rois"].default:
                raise ValueError("--rois is an option of --format inbreast")
        elif len(parse_color_map(self.classes)) != 2:
            raise ValueError(
                "--format inbreast has a background and one foreground class; name two --classes"
            )
        elif (self.group_preset, self.group_regex, self.group_csv) != (None, None, None):
            raise ValueError("the groups of --format inbreast are its patients; leave out --group")
        return self

    @model_validator(mode="after")
    def _tiles_fit(self) -> "PrepConfig":
        if self.tile is None:
            if self.tile_overlap:
                raise ValueError("--tile-overlap needs --tile")
            return self
        if self.tile_overlap >= self.tile:
            raise ValueError(f"--tile-overlap must be below --tile, which is {self.tile}")
        sizes = ("image_size", "image_height", "image_width", "geometry")
        for name in sizes:
            if getattr(self, name) != PrepConfig.model_fields[name].default:
                raise ValueError(
                    f"--{name.replace('_', '-')} is for pictures that are resized, and --tile "
                    f"{self.tile} stores them at their own size; leave out one of the two"
                )
        return self

    @model_validator(mode="after")
    def _one_group_rule(self) -> "PrepConfig":
        rules = ("group_preset", "group_regex", "group_csv")
        found = [f"--{name.replace('_', '-')}" for name in rules if getattr(self, name) is not None]
        if len(found) > 1:
            raise ValueError(f"{' and '.join(found)} exclude each other; give one")
        return self

    @property
    def height(self) -> int:
        """Height of the stored images, pixels."""
        return self.tile or self.image_height or self.image_size

    @property
    def width(self) -> int:
        """Width of the stored images, pixels."""
        return self.tile or self.image_width or self.image_size

    @property
    def kind(self) -> Literal["stretch", "pad", "tile"]:
        """Kind of geometry of the stored images."""
        return "tile" if self.tile else self.geometry


@dataclasses.dataclass(frozen=True)
class _Assignment:
    """Where each sample id goes; `groups` are the joined ones, `folds` only of those with one."""

    groups: dict[str, str]
    splits: dict[str, str]
    folds: dict[str, int]
    is_leaky: bool


def prepare(
    sources: Sequence[Source],
    output_url: str,
    config: PrepConfig,
    *,
    open_workers: OpenWorkers | None = None,
    progress: bool = True,
    has_options: bool = True,
) -> schema.Manifest:
    """Returns the manifest of the dataset at `output_url`, prepared now or found finished.

    Args:
        open_workers: opens the workers that read and encode, after all else was checked. None:
            processes of this machine.
        progress: show it on stderr.
        has_options: whether the command that is running has the options of `prep`.

    Raises:
        UsageError: a source is missing or empty, the output is a file or in a source, or another
            preparation is in it.
        ContentError: a file is bad or splits leak; nothing was committed.
        StorageError: storage is unavailable, unwritable or full; the same call continues.
    """
    if not sources:
        raise UsageError("prep: no sources were given; give at least one folder of pictures")
    store = open_store(output_url)
    if is_file(store):
        raise UsageError(f"{store.url}: is a file; give OUTPUT a folder, which prep makes")
    _refuse_overlap(store, sources)
    find = inbreast.find_cases if config.format == "inbreast" else find_pairs
    pairs, rejects = find(sources)
    grouped, ungrouped = _grouped(pairs, config, has_options=has_options)
    refused = _refused([*rejects, *ungrouped], config)
    items = _items_of(grouped, config)
    is_finished = store.stat(schema.MANIFEST_NAME) is not None
    if not is_finished:
        # Beside what prep stages, with which it goes or stays.
        probe_writable(store.below(shards.STATE_PREFIX), may_stay=True)
    with (open_workers or _processes(config, len(items)))() as workers:
        work = _Work(store, config, workers, progress)
        if is_finished:
            manifest = _finished(work, items, refused)
        else:
            manifest = _prepare(work, items, refused, _dataset_name(sources, config))
    _warn_of_vanished(manifest)
    return manifest


def _processes(config: PrepConfig, num_items: int) -> OpenWorkers:
    wanted = config.num_processes or available_cores()
    return functools.partial(local_workers, max(1, min(wanted, num_items)))


@dataclasses.dataclass(frozen=True)
class _Work:
    """What every step needs."""

    store: Store
    config: PrepConfig
    workers: Workers
    progress: bool


def _prepare(
    work: _Work, items: Sequence[scan.Item], refused: list[tuple[str, str]], name: str
) -> schema.Manifest:
    results = _scan(work, items)
    samples = [result for result in results if isinstance(result, scan.Scanned)]
    crcs = {result.picture: result.source_crcs for result in results}
    source_sha256 = _source_digest(items, [crcs[item.id] for item in items], refused)
    refused = refused + [(r.file, r.reason) for r in results if isinstance(r, scan.Refused)]
    if not samples:
        raise ContentError(f"none of {len(refused)} files is usable: {_named(refused)}")
    if refused:
        # Now, because what follows may fail, and rejects.csv comes with the dataset.
        logger.warning("%s left out: %s", counted(len(refused), "file"), _named(refused))
    _refuse_all_empty(samples)
    assignment = _assign(samples, work.config)
    _warn_of_missing_classes(samples, assignment, work.config)
    samples = [dataclasses.replace(s, group=assignment.groups[s.id]) for s in samples]
    target = _target(samples, work.config)
    above = _clipped(samples, target, work.config)
    _tell_mixed(samples, target, work.config)
    tasks = shards.plan_shards(
        samples,
        assignment.splits,
        target=target,
        output_url=work.store.url,
        shard_size_mb=work.config.shard_size,
        seed=work.config.seed,
    )
    plan = {"options": identity_of(work.config), "source_sha256": source_sha256}
    shards.claim_output(work.store, plan)
    written = _write(work, tasks)
    rows = list(shards.sample_rows(tasks, written, assignment.folds))
    table = schema.samples_to_parquet(rows)
    manifest = _manifest(work.config, name, target, tasks, written, assignment, table, plan)
    _write_report(work, manifest, rows, refused)
    if above:
        lines = [(picture.filename, count, picture.max_value) for picture, count in above]
        put_if_other(work.store, report.CLIPPED_NAME, report.clipped_csv(lines).encode())
    if work.config.format == "inbreast":
        without = {item.id for item in items if item.mask is None}
        _write_counts(work.store, samples, without)
    shards.commit(work.store, manifest, table)
    shards.remove_state(work.store)
    if refused:
        logger.warning("list of the files left out: %s/%s", work.store.url, report.REJECTS_NAME)
    return manifest


def identity_of(config: PrepConfig) -> dict[str, Any]:
    """Returns the options that decide what is written, as JSON values."""
    values = config.model_dump(mode="json")
    for name, field in PrepConfig.model_fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, dict) and extra.get("free"):
            del values[name]
    if config.full_scale is None:
        del values["full_scale"]  # as before there was such an option
    return values


def _finished(
    work: _Work, items: Sequence[scan.Item], refused: Sequence[tuple[str, str]]
) -> schema.Manifest:
    """Returns the manifest that is there, if it is of these options and files."""
    manifest, _ = schema.read_manifest(work.store)
    # An option that an earlier version did not have was at its default.
    options = identity_of(PrepConfig()) | manifest.options
    found = {"options": options, "source_sha256": manifest.source_sha256}
    plan = {"options": identity_of(work.config), "source_sha256": manifest.source_sha256}
    if found["options"] == plan["options"]:
        crcs = _run(work, scan.source_crcs, items, "comparing", len(items), lambda _: 1)
        plan["source_sha256"] = _source_digest(items, crcs, refused)
    if found != plan:
        raise UsageError(
            f"{work.store.url}: holds a dataset already ({shards.describe_difference(found, plan)})"
            "; choose another folder or delete it"
        )
    shards.remove_state(work.store)
    logger.info("%s: finished already with these options and files", work.store.url)
    return manifest


# Before the first pass


def _items_of(grouped: Sequence[tuple[Pair, str]], config: PrepConfig) -> list[scan.Item]:
    urls = {url for pair, _ in grouped for url in (pair.image_url, pair.mask_url)}
    stats = {url: {stat.name: stat for stat in open_source(url).list()} for url in urls}

    def file(url: str, name: str) -> scan.File:
        stat = stats[url].get(name)
        if stat is None:
            raise StorageError(f"{url}/{name}: vanished since it was listed; run it again")
        # A reason that goes into rejects.csv must not carry a hidden name; one that ends the
        # command is for the user alone.
        secret = config.hash_names and config.skip_bad
        label = _hidden_name(name, config) if secret else join_url(url, name)
        return scan.File(url, name, label, stat.size, stat.generation)

    items = [
        scan.Item(
            id=_hidden(pair.id, config),
            group=_hidden(group, config),
            filename=_hidden_name(pair.image_name, config),
            split=pair.split,
            image=file(pair.image_url, pair.image_name),
            mask=file(pair.mask_url, pair.mask_name) if pair.mask_name else None,
        )
        for pair, group in grouped
    ]
    return sorted(items, key=lambda item: item.id)


def _grouped(
    pairs: Sequence[Pair], config: PrepConfig, *, has_options: bool
) -> tuple[list[tuple[Pair, str]], list[Reject]]:
    """Returns the pairs with their groups, and those whose name gives none."""
    table = None
    if config.group_csv is not None:
        table = (_read_text(config.group_csv, "--group-csv"), config.group_csv)
    rule = split.group_of(preset=config.group_preset, regex=config.group_regex, table=table)
    if config.format == "inbreast":
        rule = inbreast.patient_of
    elif (config.group_preset, config.group_regex, config.group_csv) == (None, None, None):
        _warn_of_files_as_groups(pairs, has_options=has_options)
    grouped, rejects = [], []
    for pair in pairs:
        try:
            grouped.append((pair, rule(pair.image_name)))
        except ContentError as error:
            rejects.append(Reject(join_url(pair.image_url, pair.image_name), str(error)))
    if rejects and not grouped:
        raise ContentError(
            f"{rejects[0].file}: {rejects[0].reason} (so with all {counted(len(rejects), 'file')})"
        )
    return grouped, rejects


def _warn_of_files_as_groups(pairs: Sequence[Pair], *, has_options: bool) -> None:
    elsewhere = "prepare them with `flexunet prep ... %s` and give the dataset with --data"
    augmented = [pair for pair in pairs if split.is_augmented_copy(pair.image_name)]
    if augmented:
        logger.warning(
            "%d of %d names look like augmented copies (%s), and every file is a group of its own: "
            "copies of one picture may lie in several splits; %s",
            *(len(augmented), len(pairs), augmented[0].image_name),
            "see --group-preset augmented"
            if has_options
            else elsewhere % "--group-preset augmented",
        )
    elif has_options:
        logger.warning(
            "no --group option: every file is a group of its own; give one where a patient has "
            "several pictures"
        )
    else:
        logger.warning(
            "every file is a group of its own; where a patient has several pictures, %s",
            elsewhere % "--group-regex REGEX",
        )


def _refused(rejects: Sequence[Reject], config: PrepConfig) -> list[tuple[str, str]]:
    """Returns (file, reason) of the files that are in no pair, as the report may show them."""
    if rejects and not config.skip_bad:
        first = rejects[0]
        num_more = len(rejects) - 1
        more = f" (and {counted(num_more, 'more file')})" if num_more else ""
        raise ContentError(
            f"{legible(f'{first.file}: {first.reason}')}{more}; mend it, or leave such files out "
            "with --skip-bad"
        )
    if not config.hash_names:
        return [(reject.file, reject.reason) for reject in rejects]
    return [(_hidden_name(r.file, config), _without_name(r, config)) for r in rejects]


def _named(refused: Sequence[tuple[str, str]]) -> str:
    """Returns the first (file, reason) in words, and how many more there are."""
    return listed([_worded(*each) for each in refused], _MAX_LISTED)


def _worded(file: str, reason: str) -> str:
    return reason if reason.startswith(file) else f"{file}: {reason}"


def _without_name(reject: Reject, config: PrepConfig) -> str:
    name = os.path.basename(reject.file)
    hidden = reject.reason.replace(name, _hidden_name(name, config))
    stem = os.path.splitext(name)[0]
    return hidden.replace(stem, _hidden(stem, config))


def _hidden(text: str, config: PrepConfig) -> str:
    """Returns `text`, or what stands for it with --hash-names."""
    if not config.hash_names:
        return text
    key = os.environ.get(HASH_KEY_VARIABLE, "").encode()
    return hmac.new(key, os.fsencode(text), hashlib.sha256).hexdigest()[:_HASH_LENGTH]


def _hidden_name(name: str, config: PrepConfig) -> str:
    """Returns the file name without folders; with --hash-names its stem is hidden."""
    base = os.path.basename(name)
    stem, ending = os.path.splitext(base)
    # What follows the last dot of a DICOM file without an ending is part of its name.
    if config.format == "inbreast" and ending.lower() not in (*DICOM_ENDINGS, ".xml"):
        stem, ending = base, ""
    return _hidden(stem, config) + ending


def _refuse_overlap(store: Store, sources: Sequence[Source]) -> None:
    for source in sources:
        for url in (source.images, source.masks):
            if lies_in(store, open_store(url)):
                raise UsageError(
                    f"{store.url}: the output lies in the source folder {url}; choose another"
                )


def _dataset_name(sources: Sequence[Source], config: PrepConfig) -> str:
    """Returns the name of the folder that holds the sources; it is part of the manifest's bytes."""
    first = sources[0]
    parents = open_store(first.images).url.split("/")[:-1]
    if first.split is not None:
        parents = parents[:-1]
    return "dataset" if config.hash_names or not parents else as_utf8(parents[-1]) or "dataset"


def _source_digest(
    items: Sequence[scan.Item],
    crcs: Sequence[tuple[int, int]],
    refused: Sequence[tuple[str, str]],
) -> str:
    parts = [
        (item.id, item.group, item.filename, item.split, *_sizes(item), *crc)
        for item, crc in zip(items, crcs, strict=True)
    ]
    alone = sorted(os.path.basename(file) for file, _ in refused)
    return hashlib.sha256(json.dumps([parts, alone]).encode()).hexdigest()


def _sizes(item: scan.Item) -> tuple[int, int | None]:
    return item.image.size, None if item.mask is None else item.mask.size


# The passes


def _scan(work: _Work, items: Sequence[scan.Item]) -> list[scan.Scanned | scan.Refused]:
    config = work.config
    layout = scan.Layout(
        height=config.height,
        width=config.width,
        geometry=config.kind,
        channels=config.channels,
        classes=parse_color_map(config.classes),
        ignore_id=config.ignore_id,
        off_map_limit=config.off_map_limit,
        max_pixels=config.max_pixels,
        format=config.format,
        rois=config.rois,
        crop=config.crop,
        flip=config.flip,
        tile_overlap=config.tile_overlap,
        full_scale=config.full_scale,
    )
    staging = shards.staging_url(work.store.url)
    tasks = [
        scan.ScanTask(staging, layout, chunk, config.skip_bad, config.dicom_reader)
        for chunk in scan.chunked(items, layout)
    ]
    try:
        results = _run(work, scan.scan_chunk, tasks, "encoding", len(items), _num_pictures)
    except ContentError as error:
        raise ContentError(f"{error}; --skip-bad leaves such files out") from error
    return [result for chunk in results for result in chunk]


def _refuse_all_empty(samples: Sequence[scan.Scanned]) -> None:
    """Refuses masks that hold something, of which not one pixel was read as foreground.

    Noise, as JPEG adds it, hides an area of another colour from the check of a single mask.
    """
    has_foreground = any(
        any(s.pixels_per_class[1:]) or (s.regions is not None and any(s.regions.regions))
        for s in samples
    )
    pictures = {s.picture: s for s in samples}.values()
    others = [s.filename for s in pictures if s.off_map_pixels]
    if others and not has_foreground:
        raise ContentError(
            f"all {len(pictures)} masks would be read as empty, but {len(others)} of them have "
            f"pixels of colours that are no class's, as that of {others[0]}; give the colours of "
            "these masks with --classes"
        )


def _num_pictures(results: Sequence[scan.Scanned | scan.Refused]) -> int:
    return len({result.picture for result in results})


def _write(work: _Work, tasks: Sequence[shards.ShardTask]) -> list[shards.WrittenShard]:
    num_images = sum(len(task.records) for task in tasks)
    return _run(
        work, shards.write_shard, tasks, "writing", num_images, lambda shard: len(shard.records)
    )


def _run(
    work: _Work,
    function: Callable[[T], R],
    tasks: Sequence[T],
    title: str,
    num_images: int,
    images_in: Callable[[R], int],
) -> list[R]:
    """Returns `function` of each task, in order; shows progress in images."""
    results = []
    with Progress(title, num_images, shown=work.progress) as bar:
        for result in work.workers.in_order(function, tasks):
            bar.advance(images_in(result))
            results.append(result)
    return results


# Splits


def _assign(samples: Sequence[scan.Scanned], config: PrepConfig) -> _Assignment:
    _tell_blank(samples)
    groups, joined = _joined_groups(samples)
    try:
        return _divided(samples, groups, config)
    except UsageError as error:
        if not joined:
            raise
        raise UsageError(
            f"{error} ({counted(len(joined), 'group')} joined with others, as they hold the same "
            f"picture: {listed(joined, _MAX_LISTED)})"
        ) from error


def _divided(
    samples: Sequence[scan.Scanned], groups: dict[str, str], config: PrepConfig
) -> _Assignment:
    if samples[0].split is None:
        fractions: dict[str, float] = dict(zip(schema.SPLITS, config.fractions, strict=True))
        splits = split.assign_splits(groups, fractions=fractions, seed=config.seed)
        _warn_of_small_splits(groups, splits)
        is_leaky = False
    else:
        splits = {sample.id: str(sample.split) for sample in samples}
        is_leaky = _check_leaks(samples, config)
    folds = {}
    if config.num_folds is not None:
        members = {name: group for name, group in groups.items() if splits[name] != "test"}
        folds = split.assign_folds(members, num_folds=config.num_folds, seed=config.seed)
    return _Assignment(groups, splits, folds, is_leaky)


def _tell_blank(samples: Sequence[scan.Scanned]) -> None:
    blank = {sample.picture: sample.filename for sample in samples if sample.is_blank}
    if blank:
        logger.warning(
            "%s blank (all pixels alike) and no evidence of which groups belong together: %s",
            "1 picture is" if len(blank) == 1 else f"{len(blank)} pictures are",
            listed(list(blank.values()), _MAX_LISTED),
        )


def _warn_of_small_splits(groups: Mapping[str, str], splits: Mapping[str, str]) -> None:
    for name in ("valid", "test"):
        num_groups = len({groups[sample] for sample, its in splits.items() if its == name})
        if 0 < num_groups < _FEW_GROUPS:
            logger.warning(
                "split %s has %s, so its figures say little: raise its part of --fractions, or "
                "train with --folds",
                *(name, counted(num_groups, "group")),
            )


def _warn_of_missing_classes(
    samples: Sequence[scan.Scanned], assignment: _Assignment, config: PrepConfig
) -> None:
    names = [each.name for each in parse_color_map(config.classes)]
    in_splits = [(f"split {assignment.splits[s.id]}", s.pixels_per_class) for s in samples]
    in_folds = [
        (f"fold {assignment.folds[s.id]}", s.pixels_per_class)
        for s in samples
        if s.id in assignment.folds
    ]
    for line in split.classes_missing([*in_splits, *in_folds], names):
        logger.warning("%s", line)


def _joined_groups(samples: Sequence[scan.Scanned]) -> tuple[dict[str, str], list[str]]:
    """Returns the group of each id, and which were joined: groups that hold the same picture.

    A picture that was filed twice would otherwise be trained on and tested with. A blank one says
    nothing: it is alike in strangers.
    """
    parents: dict[str, str] = {}

    def root(group: str) -> str:
        while parents.setdefault(group, group) != group:
            group = parents[group]
        return group

    first_with: dict[str, str] = {}
    joined: list[str] = []
    for sample in samples:
        if sample.is_blank:
            continue
        first = first_with.setdefault(sample.picture_sha256, sample.group)
        group, other = root(sample.group), root(first)
        if group != other:
            joined.append(f"{sample.group} with {first}")
            parents[max(group, other)] = min(group, other)
    if joined:
        logger.warning(
            "%s a picture of another group and %s joined with it: %s",
            "1 group holds" if len(joined) == 1 else f"{len(joined)} groups hold",
            "is" if len(joined) == 1 else "are",
            listed(joined, _MAX_LISTED),
        )
    return {sample.id: root(sample.group) for sample in samples}, joined


def _check_leaks(samples: Sequence[scan.Scanned], config: PrepConfig) -> bool:
    """Returns whether the ready-made splits leak; that is an error unless it is allowed."""
    pictures = {s.picture: s for s in samples}.values()
    leaks = split.find_leaks(
        (s.picture, str(s.split), s.group, None if s.is_blank else s.picture_sha256)
        for s in pictures
    )
    if leaks and not config.allow_leaks:
        more = f"; and {len(leaks) - _MAX_LISTED} more" if len(leaks) > _MAX_LISTED else ""
        raise ContentError(
            f"the ready-made splits leak: {'; '.join(leaks[:_MAX_LISTED])}{more}; mend them or "
            "accept it with --allow-leaks"
        )
    for leak in leaks[:_MAX_LISTED]:
        logger.warning("leak: %s", leak)
    return bool(leaks)


def _target(samples: Sequence[scan.Scanned], config: PrepConfig) -> shards.Target:
    target = shards.common_target(samples, config.full_scale)
    if config.full_scale is not None and target.bit_depth == 8:
        raise UsageError(
            f"--full-scale {config.full_scale}: it is for pictures of 16 bits, and all of these "
            "have 8; leave it out"
        )
    return target


def _clipped(
    samples: Sequence[scan.Scanned], target: shards.Target, config: PrepConfig
) -> list[tuple[scan.Scanned, int]]:
    """Returns the pictures with pixels above the full scale, and their number; tells them."""
    if target.bit_depth == 8:
        return []
    found = shards.clipped(samples, target.value_max, config.full_scale)
    less = None if config.full_scale else shards.sparing_scale(samples, target.value_max)
    if less is not None:
        above = shards.clipped(samples, less, None)
        logger.warning(
            "the full scale is %d for few pixels: no picture has more than a thousandth of its "
            "pixels above %d; if they are markers, --full-scale %d makes the pictures %d times "
            "brighter: %s",
            *(target.value_max, less, less, round(target.value_max / less)),
            listed([each.filename for each, _ in above], _MAX_LISTED),
        )
    if found:
        pictures = {sample.picture for sample in samples if sample.num_above}
        named = [f"{s.filename} ({counted(n, 'pixel')}, up to {s.max_value})" for s, n in found]
        logger.warning(
            "%d of %d pictures have pixels above the full scale %d%s, which become %d (see %s; "
            "--full-scale gives another): %s",
            *(len(found), len(pictures), target.value_max),
            "" if config.full_scale else " that the others need",
            *(target.value_max, report.CLIPPED_NAME, listed(named, _MAX_LISTED)),
        )
    return found


def _full_scale_info(
    samples: Sequence[scan.Scanned], target: shards.Target, config: PrepConfig
) -> schema.FullScaleInfo | None:
    pictures = [sample for sample in samples if sample.num_above]
    if not pictures:
        return None
    above = shards.clipped(pictures, target.value_max, config.full_scale)
    return schema.FullScaleInfo(
        rule="found" if config.full_scale is None else "given",
        lowest_max=min(
            (picture.max_value for picture in pictures if not picture.is_blank), default=0
        ),
        highest=max(picture.max_value for picture in pictures),
        num_clipped_pictures=len(above),
        num_clipped_pixels=sum(count for _, count in above),
    )


def _tell_mixed(samples: Sequence[scan.Scanned], target: shards.Target, config: PrepConfig) -> None:
    """Says which few pictures decided the format of all."""
    samples = list({sample.picture: sample for sample in samples}.values())
    coloured = [sample.filename for sample in samples if sample.channels == 3]
    if config.channels == "auto" and 0 < len(coloured) < len(samples):
        logger.warning(
            "%d of %d pictures have colour, so all are stored as RGB (--channels grey would store "
            "one channel): %s", len(coloured), len(samples), _listed(coloured),
        )  # fmt: skip
    shallow = [sample.filename for sample in samples if sample.bit_depth < target.bit_depth]
    if shallow:
        logger.warning(
            "%d of %d pictures have 8 bits, the others 16: 255 becomes %d in them: %s",
            len(shallow), len(samples), target.value_max, _listed(shallow),
        )  # fmt: skip
    scaled = [s.filename for s in samples if s.value_max not in (None, target.value_max)]
    if scaled and not shallow:
        logger.warning(
            "%d of %d pictures are of detectors of fewer bits; their full scale becomes %d: %s",
            len(scaled), len(samples), target.value_max, _listed(scaled),
        )  # fmt: skip


def _listed(names: Sequence[str]) -> str:
    more = ", ..." if len(names) > _MAX_LISTED else ""
    return ", ".join(names[:_MAX_LISTED]) + more


# The commit


def _manifest(
    config: PrepConfig,
    name: str,
    target: shards.Target,
    tasks: Sequence[shards.ShardTask],
    written: Sequence[shards.WrittenShard],
    assignment: _Assignment,
    table: bytes,
    plan: Mapping[str, Any],
) -> schema.Manifest:
    train = [r.moments for shard in written if shard.info.split == "train" for r in shard.records]
    every = [r.moments for shard in written for r in shard.records]
    mean, std = shards.mean_and_std(train or every)
    samples = [sample for task in tasks for sample in task.records]
    return schema.Manifest(
        name=name,
        image_height=config.height,
        image_width=config.width,
        channels=target.channels,
        bit_depth=target.bit_depth,
        value_max=target.value_max,
        classes=parse_color_map(config.classes),
        ignore_id=config.ignore_id,
        geometry=config.kind,
        crop=config.crop,
        flip=config.flip,
        split_rule="drawn" if samples[0].split is None else "ready-made",
        group_rule=schema.group_rule_of(plan["options"]),
        seed=config.seed,
        num_folds=config.num_folds,
        leaky=assignment.is_leaky,
        splits=_split_infos(samples, assignment.splits),
        shards=tuple(shard.info for shard in written),
        samples_num_bytes=len(table),
        samples_crc32c=crc32c_of(table),
        mean=mean,
        std=std,
        tool_version=importlib.metadata.version("flexunet"),
        options=dict(plan["options"]),
        reduced=_reduced(samples, assignment.splits),
        source_sha256=plan["source_sha256"],
        full_scale=_full_scale_info(samples, target, config),
    )


def _split_infos(
    samples: Sequence[scan.Scanned], splits: Mapping[str, str]
) -> dict[schema.Split, schema.SplitInfo]:
    infos = {}
    for name in schema.SPLITS:
        members = [sample for sample in samples if splits[sample.id] == name]
        num_groups = len({sample.group for sample in members})
        infos[name] = schema.SplitInfo(num_samples=len(members), num_groups=num_groups)
    return infos


def _reduced(
    samples: Sequence[scan.Scanned], splits: Mapping[str, str]
) -> dict[schema.Split, schema.ReducedInfo]:
    infos = {}
    for name in schema.SPLITS:
        counts = [s.regions for s in samples if splits[s.id] == name and s.regions is not None]
        if counts:
            infos[name] = schema.ReducedInfo(
                num_pictures=len(counts),
                num_emptied=sum(each.is_emptied for each in counts),
                num_regions=_sums(each.regions for each in counts),
                num_vanished=_sums(each.vanished for each in counts),
            )
    return infos


def _sums(rows: Iterable[Sequence[int]]) -> tuple[int, ...]:
    return tuple(sum(column) for column in zip(*rows, strict=True))


def _warn_of_vanished(manifest: schema.Manifest) -> None:
    infos = manifest.reduced.values()
    num_vanished = sum(sum(info.num_vanished) for info in infos)
    if num_vanished:
        logger.warning(
            "%d of %s of the masks have no pixel in the stored masks, which are smaller, and %s "
            "lost all foreground: training does not see them, and no evaluation counts them as "
            "missed; raise --image-size, or cut tiles (--tile)",
            num_vanished,
            counted(sum(sum(info.num_regions) for info in infos), "region"),
            counted(sum(info.num_emptied for info in infos), "picture"),
        )


def _write_report(
    work: _Work,
    manifest: schema.Manifest,
    rows: Sequence[Mapping[str, Any]],
    refused: Sequence[tuple[str, str]],
) -> None:
    store = work.store
    # After a stop it may be there; the account may create and not replace.
    put_if_other(store, report.REJECTS_NAME, report.rejects_csv(sorted(refused)).encode())
    statistics: dict[str, report.SplitStatistics] = {}
    for name in schema.SPLITS:
        members = [row for row in rows if row["split"] == name]
        if not members:
            continue
        counts = zip(*(row["pixels_per_class"] for row in members), strict=True)
        pixels = tuple(sum(column) for column in counts)
        statistics[name] = report.SplitStatistics(len(members), pixels)
        pairs = [_read_pair(store, row) for row in _shown(members)]
        title = f"{manifest.name}: {name}, {len(pairs)} of {len(members)} samples, foreground first"
        sheet = report.sheet_png(pairs, manifest.classes, manifest.value_max, title)
        put_if_other(store, report.sheet_name(name), sheet)
    plot = report.statistics_png(statistics, manifest.classes, manifest.name)
    put_if_other(store, report.STATISTICS_NAME, plot)


def _shown(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Returns the samples for a sheet, those with foreground first.

    A sheet shows whether masks fit their pictures, and most tiles have nothing of it.
    """
    ordered = sorted(rows, key=lambda row: not any(row["pixels_per_class"][1:]))
    return ordered[:_PAIRS_PER_SHEET]


def _write_counts(
    store: Store, samples: Sequence[scan.Scanned], unannotated: Collection[str]
) -> None:
    findings = {sample.picture: sample.findings for sample in samples}
    groups = {sample.picture: sample.group for sample in samples}
    found = [picture for picture in findings if picture in unannotated]
    table = csv_table(inbreast.COUNTS_COLUMNS, inbreast.count_rows(findings, groups, found))
    put_if_other(store, inbreast.COUNTS_NAME, table.encode())


def _read_pair(store: Store, row: Mapping[str, Any]) -> report.Pair:
    """Returns a sample as a reader of the dataset would see it."""
    where = f"{store.url}/{row['shard']} at {row['offset']}"
    record = store.get(row["shard"], row["offset"], row["length"])
    features = schema.decode_example(schema.unframe_record(record, where=where))
    image, mask = features["image/encoded"], features["image/segmentation/class/encoded"]
    if not isinstance(image, bytes) or not isinstance(mask, bytes):
        raise ContentError(f"{where}: pictures are not bytes; prepare the dataset again")
    image_pixels = read_image(image, name=where, max_pixels=2**31)
    mask_pixels = read_mask_pixels(mask, name=where, max_pixels=2**31)
    return report.Pair(str(row["id"]), image_pixels, mask_pixels)


# The command


@click.command("prep", cls=SettingsCommand)
@click.argument("source", type=PATH)
@click.argument("output", type=PATH)
@click.option("--config", "config_file", type=PATH, metavar="FILE", help="YAML file of options.")
@settings_options(PrepConfig)
def command(source: str, output: str, config_file: str | None, **options: Any) -> None:
    """Turns the images and masks of SOURCE into a dataset at OUTPUT.

    SOURCE holds images/ and masks/, or train/, valid/ and test/ that each hold both; with --format
    inbreast AllDICOMs/ and AllXML/. Both may be folders or gs:// URLs. The same command continues
    where an interrupted one stopped.
    """
    config = read_config(config_file, options)
    with quiet_interrupts():
        run(source, output, config)


def read_config(config_file: str | None, options: dict[str, Any]) -> PrepConfig:
    """Returns the options of the command line, laid over those of the YAML file.

    Args:
        options: as click hands over those that `settings_options` made.

    Raises:
        UsageError: the file cannot be read, or an option is wrong.
    """
    values: dict[str, Any] = {}
    if config_file:
        values = read_yaml(_read_text(config_file, "--config"), config_file)
    where = f"prep options and {config_file}" if config_file else "prep options"
    typed = given(options)
    return validated(PrepConfig, merged(values, typed), where, typed=typed)


def run(
    source: str, output: str, config: PrepConfig, open_workers: OpenWorkers | None = None
) -> None:
    """Prepares the dataset and prints what it holds; see `prepare`."""
    sources = sources_of(source, config)
    _refuse_other_layout(source, output, config)
    manifest = prepare(sources, output, config, open_workers=open_workers)
    store = open_store(output)
    _print_summary(manifest, store.url)
    if config.format == "inbreast":
        _print_counts(store)


def sources_of(source: str, config: PrepConfig) -> tuple[Source, ...]:
    """Returns the folders that hold what is prepared.

    Raises:
        UsageError: one is missing or empty.
    """
    url = open_store(source).url
    problem = folder_problem(open_store(source))
    if problem:
        raise UsageError(f"{url}: {problem}; give the folder that holds the source")
    if config.format == "inbreast":
        return inbreast.find_release(source)
    try:
        return find_sources(source)
    except UsageError as error:
        if not inbreast.is_release(source):
            raise
        raise UsageError(
            f"{url}: no images/ and masks/, but a release of INbreast; give --format inbreast"
        ) from error


def _refuse_other_layout(source: str, output: str, config: PrepConfig) -> None:
    store = open_store(output)
    folder = folder_made_by(store, source) if config.format == "pairs" else None
    if folder:
        raise UsageError(
            f"{store.url}: the output would make {folder}, where the next prep looks for pictures; "
            "choose another"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return run_command(command, argv, "flexunet prep")


def _read_text(path: str, flag: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{flag} {path}: cannot be read ({error}); give a text file") from error


def _print_summary(manifest: schema.Manifest, url: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("split", "samples", "groups", "shards", "MB", title=f"{manifest.name} at {url}")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, info in manifest.splits.items():
        files = [shard for shard in manifest.shards if shard.split == name]
        size = sum(shard.num_bytes for shard in files) / 1e6
        numbers = (info.num_samples, info.num_groups, len(files))
        table.add_row(name, *(str(number) for number in numbers), f"{size:.1f}")
    console = Console(soft_wrap=True)
    console.print(table)
    console.print(f"report: {url}/{report.STATISTICS_NAME}", markup=False, highlight=False)


def _print_counts(store: Store) -> None:
    """Prints what the release holds beside what was published of it."""
    from rich.console import Console
    from rich.table import Table

    rows = list(csv.reader(io.StringIO(store.get(inbreast.COUNTS_NAME).decode())))
    title = "found in the release, and published"
    note = textwrap.fill(inbreast.PUBLISHED_NOTE, _LOG_WIDTH)
    table = Table(*rows[0], title=title, caption=note, caption_justify="left")
    for column in table.columns[1:-1]:
        column.justify = "right"
    for row in rows[1:]:
        # An earlier version wrote other words into the last column.
        table.add_row(*row[:-1], inbreast.PUBLISHED.get(row[0], ""))
    # A log has fewer columns, which break the last of these.
    Console(soft_wrap=True, width=max(Console().width, _COUNTS_WIDTH)).print(table)
