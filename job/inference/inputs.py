"""Finds and reads the images that `infer` predicts, and refuses folders that do not fit."""

import contextlib
import posixpath
from collections.abc import Sequence

import numpy as np

from data_prep.imaging.arrays import NPY_ENDING, is_npy, read_npy
from data_prep.imaging.codecs import DEFAULT_MAX_PIXELS, is_image, read_image
from data_prep.imaging.dicom.preamble import is_dicom
from data_prep.imaging.dicom.reader import DICOM_ENDINGS, read_dicom
from data_prep.sources.dicom_files import dicom_without_ending, stem_of
from data_prep.sources.pairs import IMAGE_ENDINGS
from flexunet.errors import UsageError
from flexunet.storage import (
    Forbidden,
    ObjectMeta,
    ObjectStore,
    folder_problem,
    is_file,
    is_subpath,
    join_url,
    open_source,
)

OVERLAYS_FOLDER = "overlays"
_ENDINGS = (*IMAGE_ENDINGS, *DICOM_ENDINGS)


def open_images(url: str) -> tuple[ObjectStore, str | None]:
    """Returns the folder of the images at `url`, and the name of the file if it is one image.

    In a bucket an object with this name takes precedence over a folder.
    """
    source = open_source(url)
    parent, _, name = source.url.rpartition("/")
    if is_file(source):
        return open_source(parent or "/"), name
    if source.local_root is None and "://" in parent:
        folder = open_source(parent)
        with contextlib.suppress(Forbidden):
            found = folder.stat(name)
            if found is not None and found.size:
                return folder, name
    return source, None


def select_images(
    source: ObjectStore, file: str | None
) -> tuple[list[ObjectMeta], tuple[str, ...]]:
    """Returns only the image `file` of `source`, or all images like `sort_images`.

    Raises:
        UsageError: `file` is not an image, or an error of `sort_images`.
    """
    if file is None:
        return sort_images(source)
    found = source.stat(file)
    is_named = file.lower().endswith((*_ENDINGS, NPY_ENDING))
    if found is None or not (is_named or dicom_without_ending(source, [found])):
        raise UsageError(
            f"{join_url(source.url, file)}: not an image; expected a file ending in "
            f"{', '.join((*_ENDINGS, NPY_ENDING))}, or a DICOM file of any name"
        )
    return [found], ()


def find_images(source: ObjectStore, count: int | None = None) -> list[str]:
    """Returns the names of all images below `source`, sorted; see `sort_images`.

    Args:
        count: return only the first `count` images. Files after them are not read, so DICOM files
            without an ending are no reason there to refuse the folder.
    """
    return _names_of_images(source, source.list(), count)[:count]


def sort_images(source: ObjectStore) -> tuple[list[ObjectMeta], tuple[str, ...]]:
    """Returns all images below `source`, sorted by name, and the names of other files.

    DICOM files without an ending are found by their first bytes. Hidden files are left out.

    Raises:
        UsageError: there are no images, the folder also has masks, or two images would get the
            same mask.
    """
    stats = source.list()
    names = _names_of_images(source, stats, None)
    by_name = {each.name: each for each in stats}
    images = [by_name.pop(name) for name in names]
    return images, tuple(name for name in by_name if not posixpath.basename(name).startswith("."))


def _names_of_images(
    source: ObjectStore, stats: Sequence[ObjectMeta], count: int | None
) -> list[str]:
    """Returns the names of all images; without endings, at least of the first `count`."""
    named = [each.name for each in stats if each.name.lower().endswith(_ENDINGS)]
    # Beside images, arrays are features or labels.
    named = named or [each.name for each in stats if each.name.lower().endswith(NPY_ENDING)]
    wanted = None if count is None else max(count, 1)  # a folder without images is refused
    if wanted is not None and len(named) >= wanted:
        stats = [each for each in stats if each.name < named[wanted - 1]]
    names = sorted([*named, *dicom_without_ending(source, stats, wanted)])
    if not names:
        raise UsageError(
            f"{source.url}: no images here; expected files ending in "
            f"{', '.join((*_ENDINGS, NPY_ENDING))}, or DICOM files of any name"
        )
    if {"images", "masks"} <= {name.rpartition("/")[0] for name in names}:
        raise UsageError(
            f"{source.url}: has images/ and masks/, and masks are not images to predict; give "
            f"{join_url(source.url, 'images')}"
        )
    by_mask: dict[str, str] = {}
    for name in names:
        other = by_mask.setdefault(mask_name(name), name)
        if other != name:
            raise UsageError(
                f"{source.url}: {other} and {name} would both become {mask_name(name)}; rename one"
            )
    return names


def mask_name(image_name: str) -> str:
    """Returns the object name of the mask of `image_name`."""
    return stem_of(image_name) + ".png"


def read_any(
    data: bytes, *, name: str, max_pixels: int = DEFAULT_MAX_PIXELS
) -> tuple[np.ndarray, int | None]:
    """Reads (h, w, c) pixels of an image, .npy or DICOM file, and their full scale if it has one.

    A file with a DICOM ending may lack the preamble.

    Raises:
        ContentError: the file cannot be read.
    """
    is_named_dicom = name.lower().endswith(DICOM_ENDINGS)
    if is_dicom(data) or (is_named_dicom and not is_image(data)):
        found = read_dicom(data, name=name, max_pixels=max_pixels)
        return found.pixels, found.value_max
    if is_npy(data):
        return read_npy(data, name=name, max_pixels=max_pixels), None
    return read_image(data, name=name, max_pixels=max_pixels), None


def refuse_missing(source: ObjectStore) -> None:
    """Refuses images that do not exist; in a bucket `sort_images` finds that there are none.

    Raises:
        UsageError: the local folder does not exist.
    """
    problem = folder_problem(source)
    if problem:
        raise UsageError(f"{source.url}: {problem}; give an image or a folder of images")


def refuse_files(source: ObjectStore, file: str | None, output: ObjectStore) -> None:
    """Refuses missing IMAGES, and an OUTPUT that is a file or is named like one.

    Args:
        file: the one image, see `open_images`.

    Raises:
        UsageError: one of them does not fit.
    """
    refuse_missing(source)
    if is_file(output):
        raise UsageError(f"{output.url}: is a file; give OUTPUT a folder; infer creates it")
    if file is not None and output.url.lower().endswith(IMAGE_ENDINGS):
        raise UsageError(
            f"{output.url}: OUTPUT must be a folder, also for one image, but this is the name of a "
            f"file; give a folder: the mask becomes OUTPUT/{mask_name(file)}"
        )


def refuse_overlap(source: ObjectStore, file: str | None, output: ObjectStore) -> None:
    """Refuses masks among the images: the next call would predict or replace them.

    Args:
        file: the one image, see `open_images`; its mask could replace it only in OUTPUT.

    Raises:
        UsageError: one folder contains the other.
    """
    if file is not None:
        if is_subpath(source, output):
            raise UsageError(
                f"{output.url}: the image {file} is in the output, where its mask could replace "
                "it; give another OUTPUT"
            )
        return
    if is_subpath(source, output) or is_subpath(output, source):
        raise UsageError(
            f"{output.url}: the output and the images in {source.url} must not "
            "contain each other; give another OUTPUT"
        )


def refuse_folder(source: ObjectStore, names: Sequence[str], folder: str, remedy: str) -> None:
    """Refuses images in a folder such as `overlays`: their masks would be among the overlays.

    Args:
        folder: of OUTPUT that has other files than masks.
        remedy: the option that writes no such files.

    Raises:
        UsageError: there are such images.
    """
    for name in names:
        if name.startswith(f"{folder}/"):
            raise UsageError(
                f"{source.url}: the masks of its folder {folder} would be among the {folder}; "
                f"rename the folder or give {remedy}"
            )
