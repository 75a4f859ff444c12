"""Writes phantoms in the form of the INbreast release: DICOM files and annotations, no patients.

Defines the form of the release: names, matrix sizes, bits, and kinds, spellings and numbers of
annotations. `images.py` draws the phantoms.

The shares are those of the release: of 115 cases, each of its own phantom patient, 90 have four
views and 25 have two, which gives 410 images; 107 of them have a mass, and nine of these a second
mass.
"""

import hashlib
import io
import plistlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from data_prep.phantoms.images import View, draw_view
from flexunet.errors import UsageError
from flexunet.storage import open_store

if TYPE_CHECKING:
    from pydicom.uid import UID

NUM_PATIENTS = 115

_FULL_PATIENTS = 90  # of NUM_PATIENTS, with four views
_NUM_IMAGES, _MASS_IMAGES, _SECOND_MASSES = 410, 107, 9
_FIRST_NUMBER, _NUMBER_STEP = 20586908, 26
_VIEWS = (("R", "CC"), ("L", "CC"), ("R", "ML"), ("L", "ML"))
_SPACING_MM = 0.07
# Rows, columns and bits of the two detectors; rows and columns as shares of the larger rows.
_ROWS, _COLUMNS, _SMALL_COLUMNS = 4084, 3328, 2560
_SPICULATED = ("Spiculated Region", "Espiculated Region", "Spiculated region")
_NUM_MARKS = 8
_UID_ROOT = "2.25."

Points = npt.NDArray[np.float64]
"""(N, 2) x, y in pixels; the centre of the first pixel is (0, 0)."""


@dataclass(frozen=True)
class _Plan:
    """One image of the release."""

    index: int
    patient: int
    side: str
    view: str
    num_masses: int

    @property
    def number(self) -> int:
        """The file number, which image and annotation share."""
        return _FIRST_NUMBER + _NUMBER_STEP * self.index


def write_release(folder: str, num_patients: int, size: int, seed: int) -> int:
    """Writes `AllDICOMs/` and `AllXML/`; returns the number of images.

    Args:
        folder: path or storage URL.
        size: rows of the larger detector, pixels.

    Raises:
        UsageError: the folder contains other files.
    """
    store = open_store(folder)
    plans = list(_plan(num_patients))
    names = {plan.index: _name(plan, seed) for plan in plans}
    ours = {f"AllDICOMs/{name}.dcm" for name in names.values()}
    ours |= {f"AllXML/{plan.number}.xml" for plan in plans}
    for place in ("AllDICOMs/", "AllXML/"):
        for stat in store.list(place):
            if stat.name not in ours:
                raise UsageError(
                    f"{store.url}/{stat.name} exists already and is not one of these phantoms; "
                    "choose another folder"
                )
    for plan in plans:
        pixels, bits, rois = draw_image(plan, size, seed)
        spacing_mm = _SPACING_MM * _ROWS / size
        data = dicom_bytes(pixels, bits, spacing_mm=spacing_mm, key=names[plan.index])
        store.put(f"AllDICOMs/{names[plan.index]}.dcm", data)
        if rois:
            store.put(f"AllXML/{plan.number}.xml", annotation_bytes(rois))
    return len(plans)


def dicom_bytes(
    pixels: npt.NDArray[np.uint16],
    bits: int,
    *,
    spacing_mm: float,
    key: str,
    photometric: str = "MONOCHROME2",
) -> bytes:
    """Returns an uncompressed DICOM mammogram; equal arguments give equal bytes.

    Args:
        pixels: (H, W), stored unchanged.
        bits: number of the 16 bits in use.
        key: source of the identifiers.
    """
    from pydicom import FileDataset
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import (
        DigitalMammographyXRayImageStorageForPresentation,
        ExplicitVRLittleEndian,
    )

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = DigitalMammographyXRayImageStorageForPresentation
    meta.MediaStorageSOPInstanceUID = _uid(key)
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    file = FileDataset("", {}, file_meta=meta, preamble=bytes(128))
    file.SOPClassUID, file.SOPInstanceUID = meta.MediaStorageSOPClassUID, _uid(key)
    file.StudyInstanceUID, file.SeriesInstanceUID = _uid(key + "study"), _uid(key + "series")
    file.Modality, file.Manufacturer = "MG", "Phantom"
    file.PatientName, file.PatientID, file.PatientIdentityRemoved = "removed", "removed", "YES"
    file.BurnedInAnnotation = "NO"
    file.SamplesPerPixel, file.PhotometricInterpretation = 1, photometric
    file.Rows, file.Columns = pixels.shape
    file.BitsAllocated, file.BitsStored, file.HighBit = 16, bits, bits - 1
    file.PixelRepresentation = 0
    file.ImagerPixelSpacing = [round(spacing_mm, 6)] * 2
    file.PixelData = pixels.astype("<u2").tobytes()
    file["PixelData"].VR = "OW"
    buffer = io.BytesIO()
    file.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def annotation_bytes(rois: Sequence[tuple[str, Points]]) -> bytes:
    """Returns annotations, (name, points) each, as an OsiriX property list."""
    listed = [
        {
            "IndexInImage": index,
            "Name": name,
            "NumberOfPoints": len(points),
            "Point_mm": [
                f"({x * _SPACING_MM:f}, {y * _SPACING_MM:f}, 0.000000)" for x, y in points
            ],
            "Point_px": [f"({x:f}, {y:f})" for x, y in points],
            "Type": 15 if len(points) > 2 else 19,
        }
        for index, (name, points) in enumerate(rois)
    ]
    image = {"ImageIndex": 0, "NumberOfROIs": len(listed), "ROIs": listed}
    return plistlib.dumps({"Images": [image]}, fmt=plistlib.FMT_XML)


def draw_image(
    plan: _Plan, size: int, seed: int
) -> tuple[npt.NDArray[np.uint16], int, list[tuple[str, Points]]]:
    """Returns pixels (H, W), the bits in use, and annotations (name, points) of one image."""
    is_small = plan.patient % 3 == 2
    rows = round(size * _COLUMNS / _ROWS) if is_small else size
    columns = round(size * (_SMALL_COLUMNS if is_small else _COLUMNS) / _ROWS)
    bits = 12 if is_small else 14
    body = np.random.default_rng([seed, 0, plan.patient])
    rng = np.random.default_rng([seed, 3, plan.index])
    view = draw_view(
        body,
        rng,
        rows,
        is_oblique=plan.view == "ML",
        num_masses=plan.num_masses,
        num_marks=_NUM_MARKS,
    )
    # The image is higher than wide: the removed columns are empty.
    pixels = np.round(np.clip(view.image[:, :columns], 0, 1) * (2**bits - 1)).astype(np.uint16)
    rois = [(name, points * rows - 0.5) for name, points in _annotations(plan.index, view)]
    if plan.side == "R":
        pixels = np.ascontiguousarray(pixels[:, ::-1])
        rois = [(name, points * (-1, 1) + (columns - 1, 0)) for name, points in rois]
    return pixels, bits, rois


def _plan(num_patients: int) -> Iterator[_Plan]:
    num_full = round(num_patients * _FULL_PATIENTS / NUM_PATIENTS)
    views = [
        (patient, *view)
        for patient in range(num_patients)
        for view in (_VIEWS if patient < num_full else _VIEWS[patient % 2 :: 2])
    ]
    num_with_mass = round(len(views) * _MASS_IMAGES / _NUM_IMAGES)
    num_seconds = round(len(views) * _SECOND_MASSES / _NUM_IMAGES)
    place = {i * len(views) // max(1, num_with_mass): i for i in range(num_with_mass)}
    for index, (patient, side, view) in enumerate(views):
        num_masses = 0 if index not in place else 2 if place[index] < num_seconds else 1
        yield _Plan(index, patient, side, view, num_masses)


def _annotations(index: int, view: View) -> Iterator[tuple[str, Points]]:
    """Yields (name, points as fractions of the size), in all spellings of the release."""
    for outline in view.outlines:
        yield "Mass", outline
    for i, outline in enumerate(view.outlines):
        if index % 2:
            middle = outline.mean(axis=0)
            yield _SPICULATED[(index // 2 + i) % 3], middle + 1.4 * (outline - middle)
    marks = [np.array([mark]) for mark in view.marks]
    if index % 4 != 1:
        for i in range(1 + index % 3):
            yield "Calcification" if i else "Calcifications", _ring(marks[i], 0.006)
        yield "Calcification", marks[3]
    singles = {9: "Unnamed", 4: "Point 1", 10: "Point 3"}
    if index % 12 in singles:
        yield singles[index % 12], marks[4]
    regions = {1: "Cluster", 6: "Asymmetry", 14: "Assymetry", 7: "Distortion"}
    if index % 32 in regions:
        yield regions[index % 32], _ring(marks[5], 0.03)
    if index % 32 == 9:
        yield "Calcifications", np.concatenate(marks[6:8])


def _ring(centre: Points, radius: float) -> Points:
    angle = np.linspace(0, 2 * np.pi, 12, endpoint=False)
    return centre + radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _name(plan: _Plan, seed: int) -> str:
    patient = hashlib.sha256(f"patient {seed} {plan.patient}".encode()).hexdigest()[:16]
    return f"{plan.number}_{patient}_MG_{plan.side}_{plan.view}_ANON"


def _uid(key: str) -> "UID":
    from pydicom.uid import UID

    return UID(_UID_ROOT + str(int(hashlib.sha256(key.encode()).hexdigest()[:32], 16)))
