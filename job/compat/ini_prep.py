"""Maps the image and mask keys of reference files to data_prep, and prepares the dataset."""

import contextlib
import dataclasses
import itertools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from data_prep.config import PrepConfig
from data_prep.shards.manifest import Manifest, read_manifest
from data_prep.sources.folder_patterns import FolderOptions
from data_prep.sources.pairs import Source, find_sources
from flexunet.errors import FlexUNetError, UsageError
from flexunet.settings import flag_of, parse_settings
from flexunet.storage import folder_problem, open_store
from job.compat.ini_reader import KeyReader
from job.compat.ini_values import folder_from, optional, same, whole

logger = logging.getLogger(__name__)

_SAMPLE_CLASSES = (
    "The reference implementation replaces a map that it cannot read by "
    "{(0,0,0):0,(0,255,0):1,(255,0,0):2,(0,0,255):3}, without a message"
)


def read_image_size(reader: KeyReader) -> None:
    """Sets the size of the stored images and masks."""
    width = reader.take("model", "image_width", whole(1), 512)
    height = reader.take("model", "image_height", whole(1), 512)
    if width == height:
        reader.set("prep.image_size", width)
        for key in ("image_width", "image_height"):
            reader.describe("model", key, f"image_size = {width}")
        return
    for key, side in (("image_width", width), ("image_height", height)):
        reader.set(f"prep.{key}", side)
        reader.describe("model", key, f"{key} = {side}")


def read_masks(reader: KeyReader) -> None:
    """Sets the classes from the mask colours; `num_classes` must be set already."""
    # Some projects write color_map, which the reference implementation does not read.
    key = reader.first_of("mask", ("rgb_map", "color_map"))
    try:
        colors = reader.take("mask", key, optional(_color_map), None)
    except UsageError as error:
        raise UsageError(f"{error}. {_SAMPLE_CLASSES}") from error
    if key == "rgb_map":
        with reader.without_effect(True, "the key that takes effect is rgb_map"):
            reader.take("mask", "color_map", same, None)
    if colors is None:
        return
    num_classes = reader.settings["model"]["num_classes"]
    if len(colors) != max(num_classes, 2):
        raise reader.file.error(
            reader.file.entries["mask", key],
            f"{len(colors)} classes, but model.num_classes = {num_classes}; make them equal",
        )
    names = ["background", *(f"class_{index}" for index in range(1, len(colors)))]
    text = ";".join(
        f"{name}={','.join(str(part) for part in color)}"
        for name, color in zip(names, colors, strict=True)
    )
    reader.set("prep.classes", text)
    reader.describe("mask", key, f"classes = {text}")


def read_source(reader: KeyReader, split: str) -> Source | None:
    """Returns the folders of one split; None if the file names neither."""
    folders = {}
    # Early reference projects have the older spelling.
    for key, older in (("images_dir", "image_datapath"), ("masks_dir", "mask_datapath")):
        name = reader.first_of(split, (key, older))
        folders[key] = reader.take(split, name, optional(folder_from(reader.file.path)), None)
        reader.describe(split, name, f"{split} split, prepared unless --data is given")
    images, masks = folders["images_dir"], folders["masks_dir"]
    if images is None and masks is None:
        return None
    if images is None or masks is None:
        missing = next(key for key, folder in folders.items() if folder is None)
        raise UsageError(f"{reader.file.path}: {split}.{missing} is missing; add it")
    return Source(images=images, masks=masks, split=split)


class PreparationConfig(PrepConfig):
    """With a .config file, without --data: how to prepare its images. Options win over the file."""


def prep_config(
    of_file: Mapping[str, Any], options: Mapping[str, Any], path: str, *, is_typed: bool = True
) -> PrepConfig:
    """Returns how the images of the file at `path` are prepared; options win over the file.

    Args:
        of_file: values of the file.
        options: values for PrepConfig from the command line or a program.
        is_typed: whether `options` are from the command line.

    Raises:
        UsageError: a value is not allowed, or two contradict.
    """
    sizes = {"image_height", "image_width"} if "image_size" in options else set()
    if options.get("tile") is not None:
        sizes = {"image_size", "image_height", "image_width"}
    kept = {name: value for name, value in of_file.items() if name not in sizes}
    typed = options if is_typed else None
    return parse_settings(PrepConfig, {**kept, **options}, path, typed=typed)


def warn_of_other_size(data: str, of_file: Mapping[str, Any], path: str) -> None:
    """Warns if the dataset at `data` has another image size than the file at `path`.

    A dataset that cannot be read is an error of training.
    """
    with contextlib.suppress(FlexUNetError):
        config = prep_config(of_file, {}, path)
        manifest, _ = read_manifest(open_store(data))
        found = (manifest.image_height, manifest.image_width)
        if found != (config.height, config.width):
            logger.warning(
                "%s has images of %dx%d pixels (height x width), but %s asks for %dx%d; training "
                "uses those of the dataset",
                data,
                *found,
                path,
                config.height,
                config.width,
            )


def prepare_sources(
    sources: Sequence[Source], config: PrepConfig, output_url: str, path: str
) -> Manifest:
    """Prepares a dataset from the image folders of the file at `path`, unless it is finished.

    Returns its manifest.

    Args:
        sources: image folders of the file.
        config: see `prep_config`.

    Raises:
        UsageError: the file names no image folders, or a folder is missing or empty.
        ContentError: images are bad or splits leak.
    """
    from data_prep.pipeline import prepare

    if "train" not in {source.split for source in sources}:
        raise UsageError(
            f"{path}: no dataset: [train] names no images_dir and masks_dir; "
            "add them, or give --data DATASET, a folder or gs:// URL written by prep"
        )
    for name in ("images", "masks", "field_of_view"):
        if getattr(config, name) is not None:
            raise UsageError(
                f"{flag_of([name])}: {path} names the folders itself, as images_dir and masks_dir; "
                "change them there, or give the option to `flexunet prep`"
            )
    logger.info("preparing the images of %s in %s", path, output_url)
    return prepare(_without_globs(_existing(sources, path)), output_url, config)


def _existing(sources: Sequence[Source], path: str) -> list[Source]:
    """Returns `sources` without a test split that does not exist; training does not need it."""
    found = []
    for source in sources:
        roots = [url.partition("*")[0] for url in (source.images, source.masks)]
        if source.split == "test" and all(folder_problem(open_store(root)) for root in roots):
            logger.warning(
                "%s: the folders of [test] do not exist (%s); the dataset has no test split",
                path,
                source.images,
            )
            continue
        found.append(source)
    return found


def _without_globs(sources: Sequence[Source]) -> list[Source]:
    """Returns the folders that match patterns such as `train/*/images`.

    Raises:
        UsageError: a pattern fits no folder.
    """
    found: list[Source] = []
    for source in sources:
        if not any("*" in url for url in (source.images, source.masks)):
            found.append(source)
            continue
        images, masks = source.images.split("/"), source.masks.split("/")
        parts = zip(images, masks, strict=False)
        shared = itertools.takewhile(lambda pair: pair[0] == pair[1] and "*" not in pair[0], parts)
        num_shared = len(list(shared))
        root = "/".join(images[:num_shared])
        patterns = FolderOptions(
            images="/".join(images[num_shared:]), masks="/".join(masks[num_shared:])
        )
        folders = find_sources(root, options=patterns)
        found += [dataclasses.replace(folder, split=source.split) for folder in folders]
    return found


def _color_map(value: Any) -> list[tuple[int, ...]]:
    """Returns the colour of each class by id; `{(r,g,b): id}` must name each id 0..n-1 once."""
    if not isinstance(value, dict) or not value:
        raise ValueError("expected {(r,g,b): class, ...}")
    colors: dict[int, tuple[int, ...]] = {}
    for color, class_id in value.items():
        if not isinstance(color, tuple) or len(color) != 3:
            raise ValueError(f"expected (r,g,b), got {color!r}")
        if any(whole(0)(part) > 255 for part in color):
            raise ValueError(f"expected 0..255, got {color!r}")
        if colors.setdefault(whole(0)(class_id), color) != color:
            raise ValueError(f"class {class_id} has two colours; keep one")
    if sorted(colors) != list(range(len(colors))):
        raise ValueError(f"classes must be 0..{len(colors) - 1}, got {sorted(colors)}")
    return [colors[class_id] for class_id in sorted(colors)]
