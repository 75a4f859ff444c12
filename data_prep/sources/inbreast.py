"""Reads the original INbreast release: pairs its files and parses its annotations.

    AllDICOMs/20586908_6c613a14b80a8591_MG_R_CC_ANON.dcm
    AllXML/20586908.xml

The module handles names, annotations and their spellings, and the pixels of contours. It does not
depend on how datasets are stored.

- Image and annotation share the first part of the name. The second part identifies the patient, who
  may have several of the published cases. An image without an annotation has no finding; such
  images are counted, because a missing file looks the same.
- An annotation is a property list exported by OsiriX. It is not trusted: its size is limited before
  it is parsed, entities are rejected, and points are parsed with a pattern.
- A contour of one or two points is a mark, not an outline: it is counted, but never drawn.

Source: Moreira et al., INbreast: toward a full-field digital mammographic database, 2012,
doi:10.1016/j.acra.2011.09.014.
"""

import math
import plistlib
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from data_prep.imaging.dicom.reader import DICOM_ENDINGS
from data_prep.sources.dicom_files import dicom_without_ending, stem_of
from data_prep.sources.listings import Listings
from data_prep.sources.pairs import Pair, Reject, Source, is_broken_link, refused_name
from flexunet.errors import ContentError, UsageError
from flexunet.storage import (
    BROKEN_LINK,
    ObjectMeta,
    join_url,
    name_problem,
    open_source,
    open_store,
)

Kind = Literal["mass", "spiculated", "cluster", "calcification", "asymmetry", "distortion", "other"]
KINDS: tuple[Kind, ...] = (
    *("mass", "spiculated", "cluster", "calcification", "asymmetry", "distortion", "other"),
)
COUNTS_NAME = "report/findings.csv"
COUNTS_COLUMNS = ("finding", "contours", "points", "images", "patients", "published")

_IMAGES, _ANNOTATIONS = "AllDICOMs", "AllXML"
_NAME = re.compile(r"([0-9]+)_([0-9A-Za-z]+)_")
_NUMBER_NAME = re.compile(r"([0-9]+)")
_SPELLINGS: dict[str, Kind] = {
    "mass": "mass",
    "spiculated region": "spiculated",
    "espiculated region": "spiculated",
    "cluster": "cluster",
    "calcification": "calcification",
    "calcifications": "calcification",
    "asymmetry": "asymmetry",
    "assymetry": "asymmetry",
    "distortion": "distortion",
}
# By finding. Images and cases are from the paper's abstract (90 cases of both breasts with four
# images, 25 of mastectomy patients with two); masses are from later work that quotes the paper.
PUBLISHED = {"all": "410 images, 115 cases", "mass": "116 in 107 images"}
PUBLISHED_NOTE = (
    "Published: images and cases from Moreira et al. 2012, masses as quoted in later work; other "
    "findings are not compared. Images and patients are those with a contour or point of the "
    "finding; for masses, like the published number, only those with a contour. A patient may have "
    "several cases. An image without an annotation counts as healthy: if AllXML/ is incomplete, "
    "some are not."
)

_MAX_BYTES = 16 * 2**20  # of an annotation; the largest has a few hundred calcifications
_MAX_POINTS = 200_000  # of an annotation
_NUMBER = r"([-+]?[0-9]{1,12}(?:\.[0-9]{0,12})?(?:[eE][-+]?[0-9]{1,3})?)"
_POINT = re.compile(rf"\s*\(\s*{_NUMBER}\s*,\s*{_NUMBER}\s*\)\s*")
_MARGIN = 0.05  # of a side: how far a contour may extend beyond the image
_MIN_OUTLINE = 3


@dataclass(frozen=True)
class Roi:
    """One annotation: its kind, and (N, 2) float64 points (x, y) in pixels of the image."""

    kind: Kind
    points: npt.NDArray[np.float64]

    @property
    def is_outline(self) -> bool:
        """Whether the points enclose an area."""
        return len(self.points) >= _MIN_OUTLINE


@dataclass(frozen=True)
class Finding:
    """The number of outlines and marks of one kind in an image."""

    kind: Kind
    num_contours: int
    num_points: int


def find_release(source_url: str, listings: Listings | None = None) -> tuple[Source, ...]:
    """Returns the folders of images and annotations of a release.

    Raises:
        UsageError: one of the two is missing or empty.
    """
    url = open_store(source_url).url
    source = Source(join_url(url, _IMAGES), join_url(url, _ANNOTATIONS), None)
    listings = listings or Listings()
    for folder in (source.images, source.masks):
        if not listings.files(folder):
            raise UsageError(
                f"{folder}: missing or empty; give the folder of the release that contains "
                f"{_IMAGES}/ and {_ANNOTATIONS}/"
            )
    return (source,)


def is_release(source_url: str, listings: Listings) -> bool:
    """Returns whether both folders of a release contain files."""
    return all(listings.files(join_url(source_url, name)) for name in (_IMAGES, _ANNOTATIONS))


def find_cases(
    sources: Sequence[Source], listings: Listings | None = None
) -> tuple[list[Pair], list[Reject]]:
    """Returns the images with their annotations, sorted by id, and the files without a pair.

    The `mask_name` of an image without an annotation is None.
    """
    pairs: list[Pair] = []
    rejects: list[Reject] = []
    listings = listings or Listings()
    for source in sources:
        stats = listings.files(source.images)
        images = _by_number(source.images, stats, DICOM_ENDINGS, _NAME, rejects)
        stats = listings.files(source.masks)
        annotations = _by_number(source.masks, stats, (".xml",), _NUMBER_NAME, rejects)
        for number in images.keys() | annotations.keys():
            of_image, of_mask = images.get(number, []), annotations.get(number, [])
            if len(of_image) == 1 and len(of_mask) <= 1:
                stem = stem_of(of_image[0])
                mask = of_mask[0] if of_mask else None
                pairs.append(Pair(stem, source.images, of_image[0], source.masks, mask, None))
                continue
            reason = _why_alone(of_image, of_mask, source)
            rejects += [Reject(join_url(source.images, name), reason) for name in of_image]
            rejects += [Reject(join_url(source.masks, name), reason) for name in of_mask]
    return sorted(pairs, key=lambda pair: pair.id), sorted(rejects, key=lambda each: each.file)


def patient_of(filename: str) -> str:
    """Returns the second part of an image's name, which identifies the patient.

    Raises:
        ContentError: the name has another form.
    """
    found = _NAME.match(filename)
    if not found:
        raise ContentError(f"{filename}: {_WRONG_NAME}")
    return found[2]


_WRONG_NAME = (
    "its name is not NUMBER_PATIENT_MG_SIDE_VIEW_ANON, so the patient is unknown; restore the name "
    "that it has in the release"
)


def _by_number(
    url: str,
    stats: Sequence[ObjectMeta],
    endings: Sequence[str],
    pattern: re.Pattern[str],
    rejects: list[Reject],
) -> dict[str, list[str]]:
    """Returns the object names of each file number; adds files with a wrong name to `rejects`.

    Skips files with other endings, which are not part of the release, unless they have a name as in
    the release and start like DICOM files.
    """
    names: dict[str, list[str]] = {}
    unnamed: set[str] = set()
    if endings == DICOM_ENDINGS:
        named = (stat for stat in stats if pattern.match(stat.name))
        unnamed = dicom_without_ending(open_source(url), named)
    for name in (each.name for each in stats):
        if not name.lower().endswith(tuple(endings)) and name not in unnamed:
            continue
        found = pattern.match(name)
        if found is None or "/" in name:
            wrong = "is in a subfolder; move it up" if "/" in name else _WRONG_NAME
            rejects.append(Reject(join_url(url, name), wrong))
        elif problem := name_problem(name):
            rejects.append(Reject(join_url(url, name), refused_name(problem)))
        elif is_broken_link(url, name):
            rejects.append(Reject(join_url(url, name), BROKEN_LINK))
        else:
            names.setdefault(found[1], []).append(name)
    return names


def _why_alone(images: Sequence[str], annotations: Sequence[str], source: Source) -> str:
    if not images:
        return f"no image with this number in {source.images}"
    what = "images" if len(images) > 1 else "annotations"
    return f"several {what} have its number; keep one"


# Annotations


def read_rois(data: bytes, *, name: str) -> list[Roi]:
    """Returns the annotations of an OsiriX property list.

    Args:
        name: name of the file in errors, which quote nothing else of the file.

    Raises:
        ContentError: the file is too large, not a property list, has entities or another form.
    """
    if len(data) > _MAX_BYTES:
        raise ContentError(
            f"{name}: {len(data)} bytes, an annotation has at most {_MAX_BYTES}; export it again"
        )
    images = _member(_parsed(data, name), "Images", list, name)
    if len(images) != 1:
        raise ContentError(
            f"{name}: annotations of {len(images)} images, expected one; export it again"
        )
    image = images[0]
    rois = _member(image, "ROIs", list, name)
    if _member(image, "NumberOfROIs", int, name) != len(rois):
        raise ContentError(f"{name}: NumberOfROIs differs from the number of ROIs; export it again")
    found = [_roi_of(roi, name) for roi in rois]
    if sum(len(roi.points) for roi in found) > _MAX_POINTS:
        raise ContentError(f"{name}: more than {_MAX_POINTS} points; export it again")
    return found


def count_findings(rois: Iterable[Roi]) -> tuple[Finding, ...]:
    """Returns the number of annotations of each kind, in the order of `KINDS`."""
    count = Counter((roi.kind, roi.is_outline) for roi in rois)
    return tuple(
        Finding(kind, count[kind, True], count[kind, False])
        for kind in KINDS
        if count[kind, True] or count[kind, False]
    )


def draw_rois(
    rois: Iterable[Roi], kinds: Sequence[str], height: int, width: int, *, name: str
) -> npt.NDArray[np.uint8]:
    """Returns (height, width) uint8: 1 inside an outline of one of `kinds`, else 0.

    Raises:
        ContentError: an outline is outside the image.
    """
    mask = np.zeros((height, width), np.uint8)
    limits = np.array([width, height], np.float64)
    for roi in rois:
        if roi.kind not in kinds or not roi.is_outline:
            continue
        outside = np.maximum(-roi.points, roi.points - (limits - 1))
        if (outside > _MARGIN * limits).any():
            raise ContentError(
                f"{name}: a contour extends beyond its image of {width}x{height} pixels by more "
                f"than {100 * _MARGIN:g} %; is it the annotation of another image?"
            )
        fill_polygon(mask, roi.points)
    return mask


def fill_polygon(mask: npt.NDArray[np.uint8], points: npt.NDArray[np.float64]) -> None:
    """Sets the pixels of `mask` (H, W) whose centre is inside the polygon to 1.

    The centre of the first pixel is (0, 0). Uses the even-odd rule. If a border runs through
    centres, the upper and left border belong to the polygon, so that neighbours share no pixel.

    Args:
        points: (N, 2) x, y; the last point connects to the first.
    """
    left, top = np.maximum(0, np.ceil(points.min(axis=0))).astype(int)
    right, bottom = np.minimum(mask.shape[::-1], np.ceil(points.max(axis=0))).astype(int)
    if left >= right or top >= bottom:
        return
    # For each row, the columns where inside and outside change.
    changes = np.zeros((bottom - top, right - left + 1), np.uint8)
    for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, axis=0), strict=True):
        first, end = sorted((math.ceil(y0), math.ceil(y1)))
        rows = np.arange(max(first, top), min(end, bottom))
        if len(rows):
            columns = np.ceil(x0 + (rows - y0) * ((x1 - x0) / (y1 - y0))).astype(int)
            changes[rows - top, np.clip(columns, left, right) - left] ^= 1
    inside = np.bitwise_xor.accumulate(changes, axis=1)[:, :-1]
    mask[top:bottom, left:right] |= inside


def _parsed(data: bytes, name: str) -> Any:
    try:
        # XML only: a binary list may refer to itself. plistlib rejects entities.
        return plistlib.loads(data, fmt=plistlib.FMT_XML)
    except MemoryError:
        raise
    # Damaged files raise ExpatError, ValueError, KeyError, IndexError, AttributeError and more;
    # some of them quote the file.
    except Exception:
        raise ContentError(f"{name}: not an XML property list; export it again") from None


def _member(values: Any, key: str, kind: type, name: str) -> Any:
    found = values.get(key) if isinstance(values, dict) else None
    if not isinstance(found, kind) or isinstance(found, bool):
        raise ContentError(
            f"{name}: {key} is missing or has a wrong type; export it from OsiriX again"
        )
    return found


def _roi_of(values: Any, name: str) -> Roi:
    points = _member(values, "Point_px", list, name)
    if _member(values, "NumberOfPoints", int, name) != len(points):
        raise ContentError(
            f"{name}: NumberOfPoints differs from the number of points; export it again"
        )
    spelled = " ".join(_member(values, "Name", str, name).casefold().split())
    array = np.array([_point_of(point, name) for point in points], np.float64).reshape(-1, 2)
    return Roi(_SPELLINGS.get(spelled, "other"), array)


def _point_of(text: Any, name: str) -> tuple[float, float]:
    found = _POINT.fullmatch(text) if isinstance(text, str) else None
    if found is None:
        raise ContentError(f"{name}: a point does not have the form (x, y); export it again")
    return float(found[1]), float(found[2])


# Counts


def count_rows(
    findings: Mapping[str, Sequence[Finding]],
    groups: Mapping[str, str],
    unannotated: Collection[str],
) -> Iterator[tuple[str, ...]]:
    """Yields the rows of `COUNTS_COLUMNS`: the counted findings beside the published numbers.

    Images and patients of a finding are those with a contour or point of it; for masses only those
    with a contour, because the published masses are outlined.

    Args:
        findings: findings of each image.
        groups: patient of each image.
        unannotated: images without an annotation file.
    """
    counts = ("", "", str(len(findings)), str(len(set(groups.values()))))
    yield "all", *counts, PUBLISHED["all"]
    num_patients = len({groups[id_] for id_ in unannotated})
    yield "no annotation", "", "", str(len(unannotated)), str(num_patients), ""
    for kind in KINDS:
        of_kind = [(id_, each) for id_, all_ in findings.items() for each in all_
                   if each.kind == kind]  # fmt: skip
        having = {id_ for id_, each in of_kind if each.num_contours or kind != "mass"}
        counts = (
            str(sum(each.num_contours for _, each in of_kind)),
            str(sum(each.num_points for _, each in of_kind)),
            str(len(having)),
            str(len({groups[id_] for id_ in having})),
        )
        yield kind, *counts, PUBLISHED.get(kind, "")
