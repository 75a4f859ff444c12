"""Fits the size below which predicted regions are removed, per class.

The size is fitted on the validation split only, by Dice, mean over images, and stored with its
evaluation; `infer` reads it there. No test image influences it.

Dice alone could choose a size above most lesions if a few images gain by it, and small lesions of
new images would be removed. So no size is above the 5th percentile of the true lesions of the
split: at most one in twenty is smaller, and none if there are fewer than 21. The limit is not the
minimum, because one annotation error would then forbid every size. Tiny regions are not lesions,
see `job/metrics/lesions.py`.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from flexunet.errors import ContentError, UsageError
from flexunet.settings import Settings, parse_settings
from flexunet.storage import ObjectStore
from job.metrics.lesions import MIN_PIXELS, label_regions
from job.models.flips import Flips
from job.postprocessing.masks import Ids
from job.runs.loading import EnsembleMember

FILE_NAME = "small_regions.json"

_MAX_BYTES = 2**20
_CAP_PERCENTILE = 5  # of the sizes of true lesions
_MEASURE = "Dice, mean over the validation images"


class ClassFit(Settings):
    """The fit of one class: regions of fewer than `min_pixels` are removed.

    `dice` is the mean over the validation images, None if none has the class.
    """

    name: str
    min_pixels: int = Field(ge=0, lt=2**31)
    dice_before: float | None
    dice: float | None


class FittedOn(Settings):
    """The cases on which a fit was made."""

    split: str
    num_cases: int
    dataset_sha256: str
    fold: int | None


class SmallRegions(Settings):
    """A stored fit, and the predictions for which it is valid.

    Attributes:
        overlap: of windows, pixels; None if images are predicted whole.
        pixels: which pixels the sizes count.
    """

    fitted_on: FittedOn
    runs: tuple[EnsembleMember, ...]
    flips: Flips
    overlap: int | None
    pixels: Literal["of the network's size"] = "of the network's size"
    classes: tuple[ClassFit, ...]


@dataclass(frozen=True)
class CaseRegions:
    """The predicted regions of a class in one case, in order of size.

    Attributes:
        sizes: pixels of each predicted region.
        hits: true pixels of each.
        true_sizes: pixels of each true region.
    """

    sizes: npt.NDArray[np.int64]
    hits: npt.NDArray[np.int64]
    true_sizes: npt.NDArray[np.int64]

    @classmethod
    def of(cls, truth: Ids, prediction: Ids, class_id: int) -> "CaseRegions":
        """Returns the regions of one class of two masks (H, W) without ignored pixels."""
        true = truth == class_id
        labels, sizes = label_regions(prediction == class_id)
        hits = np.bincount(labels[true], minlength=len(sizes))[1:]
        order = np.argsort(sizes[1:], kind="stable")
        return cls(sizes[1:][order], hits[order], label_regions(true)[1][1:])

    @property
    def num_true(self) -> int:
        """The number of true pixels."""
        return int(self.true_sizes.sum())

    def dice_terms(
        self, limits: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
        """Returns Dice and whether it is defined, (L,) each, without regions below each limit."""
        num_gone = np.searchsorted(self.sizes, limits)
        pixels, hits = (
            sum_ - np.concatenate([[0], np.cumsum(each)])[num_gone]
            for each, sum_ in ((self.sizes, self.sizes.sum()), (self.hits, self.hits.sum()))
        )
        both = pixels + self.num_true
        return 2 * hits / np.maximum(both, 1), both > 0


class RegionTally:
    """Collects the regions of validation cases and fits the best size."""

    def __init__(self, names: Sequence[str]) -> None:
        """Starts without cases; `names` are those of the foreground classes."""
        self._names = names
        self._cases: list[list[CaseRegions]] = [[] for _ in names]

    @property
    def num_cases(self) -> int:
        """The number of added cases."""
        return len(self._cases[0]) if self._cases else 0

    def add(self, truth: Ids, prediction: Ids) -> None:
        """Adds a case, two masks (H, W) of class ids without ignored pixels."""
        for index, cases in enumerate(self._cases):
            cases.append(CaseRegions.of(truth, prediction, index + 1))

    def fit(self) -> list[ClassFit]:
        """Returns the best size for each class, the smallest of equally good ones."""
        return [_fit(name, cases) for name, cases in zip(self._names, self._cases, strict=True)]

    def describe(self, fits: Sequence[ClassFit]) -> list[str]:
        """Returns a line for each class: removed regions, change of Dice, lesions at risk."""
        return [
            _described(fit, _lesion_sizes(cases))
            for fit, cases in zip(fits, self._cases, strict=True)
        ]


def _lesion_sizes(cases: Sequence[CaseRegions]) -> npt.NDArray[np.int64]:
    sizes = np.concatenate([case.true_sizes for case in cases])
    return sizes[sizes >= MIN_PIXELS]


def _described(fit: ClassFit, lesions: npt.NDArray[np.int64]) -> str:
    if fit.dice is None or fit.dice_before is None:
        return f"{fit.name}: no image of valid has this class; all regions are kept"
    if fit.min_pixels == 0:
        return f"{fit.name}: all regions are kept ({_MEASURE}: {fit.dice:.4f})"
    num_smaller = int(np.count_nonzero(lesions < fit.min_pixels))
    return (
        f"{fit.name}: removes predicted regions of fewer than {fit.min_pixels} pixels; "
        f"{_MEASURE}: {fit.dice_before:.4f} before, {fit.dice:.4f} after; "
        f"{num_smaller} of {len(lesions)} lesions of valid are smaller"
    )


def candidate_limits(cases: Sequence[CaseRegions]) -> npt.NDArray[np.int64]:
    """Returns the sizes, in pixels, that a fit may choose: 0, then one for each predicted size.

    None is above the 5th percentile of the true lesions.
    """
    found = np.unique(np.concatenate([case.sizes for case in cases]))
    limits = np.concatenate([[0], found + 1])  # remove nothing; remove all regions up to a size
    lesions = _lesion_sizes(cases)
    largest = np.percentile(lesions, _CAP_PERCENTILE, method="lower") if len(lesions) else 0
    return limits[limits <= largest]


def _fit(name: str, cases: Sequence[CaseRegions]) -> ClassFit:
    limits = candidate_limits(cases)
    total, count = np.zeros(len(limits)), np.zeros(len(limits))
    for case in cases:
        dice, is_defined = case.dice_terms(limits)
        total += dice
        count += is_defined
    if not count.any():
        return ClassFit(name=name, min_pixels=0, dice_before=None, dice=None)
    dice = total / np.maximum(count, 1)
    best = int(np.argmax(dice))
    return ClassFit(
        name=name,
        min_pixels=int(limits[best]),
        dice_before=float(dice[0]),
        dice=float(dice[best]),
    )


def read_min_pixels(
    store: ObjectStore,
    names: Sequence[str],
    members: Sequence[EnsembleMember],
    flips: Flips,
    overlap: int | None,
) -> tuple[int, ...]:
    """Returns the sizes stored with the evaluation in `store`, for each of `names`.

    Args:
        names: of the foreground classes.
        overlap: of windows, pixels; None if images are predicted whole.

    Raises:
        UsageError: no sizes are stored, or they are for other weights, flips or overlap.
        ContentError: the file is damaged.
    """
    where = f"{store.url}/{FILE_NAME}"
    found = _read(store, where)
    if [each.name for each in found.classes] != list(names):
        raise ContentError(
            f"{where}: damaged (its classes are {', '.join(each.name for each in found.classes)}, "
            f"the run's {', '.join(names)}); evaluate again"
        )
    other = []
    if {each.commit_sha256 for each in found.runs} != {each.commit_sha256 for each in members}:
        other.append("other weights")
    if found.flips != flips:
        other.append(f"flips {found.flips}, not {flips}")
    if found.overlap != overlap:
        other.append(f"overlap {found.overlap}, not {overlap}")
    if other:
        raise UsageError(
            f"{where}: was fitted for {' and '.join(other)}; evaluate again with the options of "
            "this prediction and --remove-small-regions"
        )
    return tuple(each.min_pixels for each in found.classes)


def _read(store: ObjectStore, where: str) -> SmallRegions:
    stat = store.stat(FILE_NAME)
    if stat is None:
        raise UsageError(
            f"{where} is missing; flexunet evaluate --remove-small-regions fits and writes it"
        )
    if stat.size > _MAX_BYTES:
        raise ContentError(f"{where}: damaged ({stat.size} bytes); evaluate again")
    try:
        values = json.loads(store.get(FILE_NAME))
        if not isinstance(values, dict):
            raise ContentError(f"{where}: damaged (not a JSON object); evaluate again")
        return parse_settings(SmallRegions, values, where)
    except (ValueError, RecursionError) as error:
        raise ContentError(f"{where}: damaged ({error}); evaluate again") from error
    except UsageError as error:
        raise ContentError(f"{error}; evaluate again") from error
