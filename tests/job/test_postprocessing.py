"""Masks made of probabilities, and how that is fitted, on arrays without a network."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.imaging.geometry import Geometry
from flexunet.errors import ContentError, UsageError
from flexunet.storage import open_store
from job.metrics.confusion import count_pixels
from job.metrics.thresholds import THRESHOLDS
from job.postprocessing.masks import (
    Postprocessing,
    class_ids,
    class_ids_at_source,
    without_small,
)
from job.postprocessing.region_filter import FittedOn
from job.postprocessing.selection import Scores, select
from job.postprocessing.stored import (
    POSTPROCESSING_NAME,
    UNDO,
    ExplicitValues,
    FittedClass,
    FittedPostprocessing,
    FittedValue,
    PredictionKind,
    resolve_postprocessing,
)
from job.postprocessing.temperature import (
    DEFAULT_TEMPERATURE,
    TEMPERATURES,
    calibrated,
    log_likelihoods,
)
from job.postprocessing.threshold_counts import count_at_thresholds
from job.runs.loading import EnsembleMember


def test_without_small_removes_regions_of_each_class_by_its_size() -> None:
    ids = np.zeros((6, 8), np.uint8)
    ids[0, :3] = 1  # 3 pixels
    ids[2:4, :2] = 1  # 4 pixels
    ids[0, 5:7] = 2  # 2 pixels
    kept = without_small(ids, (4, 2))
    assert np.array_equal(kept, np.where(np.arange(6)[:, None] == 0, np.where(ids == 2, 2, 0), ids))
    # A mask of four pixels for each of the network's: 4 * 1 and 2 * 4 are needed.
    assert np.array_equal(without_small(ids, (1, 2), 4.0) == 2, np.zeros((6, 8), bool))
    assert np.array_equal(
        without_small(ids, (1, 2), 4.0) == 1, (ids == 1) & (np.arange(6) > 0)[:, None]
    )
    assert np.array_equal(without_small(ids, ()), ids)


def test_thresholds_of_a_half_predict_the_most_probable_class() -> None:
    random = np.random.default_rng(0)
    for num_outputs in (1, 2, 4):
        probabilities = random.random((9, 8, num_outputs), np.float32)
        for thresholds in ((), (0.5,) * max(1, num_outputs - 1)):
            found = class_ids(probabilities, thresholds)
            expected = (
                probabilities[..., 0] > 0.5 if num_outputs == 1 else probabilities.argmax(axis=-1)
            )
            assert np.array_equal(found, expected)


def test_a_threshold_of_two_classes_is_a_probability() -> None:
    mass = np.array([0.1, 0.35, 0.5, 0.9], np.float32)
    for probabilities in (mass[:, None], np.stack([1 - mass, mass], axis=-1)):
        assert class_ids(probabilities, (0.35,)).tolist() == [0, 1, 1, 1]
        assert class_ids(probabilities, (0.6,)).tolist() == [0, 0, 0, 1]


def test_a_class_of_many_needs_its_threshold_against_the_background_alone() -> None:
    # Between class 0 and class 1 alone, class 1 wins from its threshold on.
    for share, expected in ((0.19, 0), (0.21, 1)):
        probabilities = np.array([[1 - share, share, 0.0]], np.float32)
        assert class_ids(probabilities, (0.2, 0.5)).tolist() == [expected]
    # 0.3 * 4 and 0.4 * 1: the class with the low threshold wins.
    assert class_ids(np.array([[0.3, 0.3, 0.4]], np.float32), (0.2, 0.5)).tolist() == [1]
    assert class_ids(np.array([[0.3, 0.3, 0.4]], np.float32)).tolist() == [2]


def test_masks_at_source_use_the_thresholds() -> None:
    random = np.random.default_rng(2)
    geometry = Geometry("stretch", 8, 9, 0, 0, 8, 9)
    for thresholds in ((0.3,), (0.3, 0.7), ()):
        shares = random.random((8, 9, max(2, len(thresholds) + 1)), np.float32)
        found = class_ids_at_source(shares, geometry, thresholds)
        assert np.array_equal(found, class_ids(shares, thresholds))


@pytest.mark.parametrize("seed", range(20))
def test_counts_at_thresholds_are_those_of_the_masks(seed: int) -> None:
    random = np.random.default_rng(seed)
    num_outputs = int(random.integers(1, 6))
    num_classes = max(num_outputs, 2)
    probabilities = random.random((6, 9, num_outputs), np.float32)
    if seed % 2:  # ties, and values at thresholds
        probabilities = np.round(probabilities * 20) / np.float32(20)
    probabilities[random.random((6, 9)) < 0.1] = 0  # as where pixels are ignored
    truth = random.integers(0, num_classes, (6, 9)).astype(np.uint8)
    others = [float(random.choice([0.2, 0.5, 0.8])) for _ in range(num_classes - 1)]
    class_id = int(random.integers(1, num_classes))
    found = count_at_thresholds(truth, probabilities, others, class_id)
    for step, threshold in enumerate(THRESHOLDS):
        thresholds = [*others]
        thresholds[class_id - 1] = threshold
        counts = count_pixels(truth, class_ids(probabilities, thresholds), num_classes)
        for row, name in enumerate(("tp", "fp", "fn")):
            assert getattr(found, name)[:, step].tolist() == counts[1:, row].tolist()


def test_a_temperature_divides_logits() -> None:
    logits = np.random.default_rng(3).normal(0, 2, (50, 4))

    def softmax(values: np.ndarray) -> np.ndarray:
        shares = np.exp(values - values.max(axis=-1, keepdims=True))
        return np.asarray(shares / shares.sum(axis=-1, keepdims=True))

    found = calibrated(softmax(logits).astype(np.float32), 2.5)
    assert found.dtype == np.float32
    assert found == pytest.approx(softmax(logits / 2.5), abs=1e-6)
    one = 1 / (1 + np.exp(-logits[:, :1]))
    found = calibrated(one.astype(np.float32), 0.5)
    assert found == pytest.approx(1 / (1 + np.exp(-2 * logits[:, :1])), abs=1e-5)
    certain = np.array([[1.0, 0.0]], np.float32)
    assert np.isfinite(calibrated(certain, 3.0)).all()
    assert calibrated(certain, 1.0) is certain


def test_likelihood_is_highest_at_the_temperature_of_the_labels() -> None:
    # Labels are drawn from the softmax of logits; the network says twice these logits.
    random = np.random.default_rng(4)
    logits = random.normal(0, 1.5, (60, 70))
    truth = (random.random(logits.shape) < 1 / (1 + np.exp(-logits))).astype(np.uint8)
    said = (1 / (1 + np.exp(-2 * logits))).astype(np.float32)
    for probabilities in (said[..., None], np.stack([1 - said, said], axis=-1)):
        found = log_likelihoods(truth, probabilities, None)
        assert TEMPERATURES[int(found.argmax())] == pytest.approx(2, rel=0.1)
        plain = np.where(truth == 1, said, 1 - said)
        assert found[DEFAULT_TEMPERATURE] == pytest.approx(np.log(plain).mean(), rel=1e-5)
    ignored = np.full_like(truth, 7)
    assert not log_likelihoods(ignored, said[..., None], 7).any()


def scores_of(values: np.ndarray) -> Scores:
    """Returns the scores of one class, defined in all cases, from (cases, candidates)."""
    return Scores(values[:, None], np.ones((len(values), 1, values.shape[1])))


def test_selection_takes_a_clear_gain() -> None:
    random = np.random.default_rng(5)
    base = random.uniform(0.3, 0.6, 12)
    values = np.stack([base, base + random.uniform(0.05, 0.15, 12), base - 0.1], axis=1)
    found = select(scores_of(values), [f"g{i}" for i in range(12)], 0)
    assert (found.index, found.best) == (1, 1)
    assert found.low is not None
    assert found.low > 0.04
    assert found.gain == pytest.approx(values[:, 1].mean() - base.mean())
    assert found.score == pytest.approx(values[:, 1].mean())


def test_selection_keeps_the_default_where_the_gain_may_be_chance() -> None:
    random = np.random.default_rng(6)
    kept = 0
    for _ in range(40):
        # No candidate is better: of 19, the best on ten cases looks better by chance.
        values = random.normal(0.5, 0.1, (10, 19))
        found = select(scores_of(values), [str(i) for i in range(10)], 9)
        assert found.best != 9 or found.index == 9
        kept += found.index == 9
    assert kept >= 37


def test_selection_needs_five_groups_and_prefers_the_default() -> None:
    better = np.stack([np.full(8, 0.5), np.full(8, 0.9)], axis=1)
    found = select(scores_of(better), ["a", "a", "b", "b", "c", "c", "d", "d"], 0)
    assert (found.index, found.best, found.low, found.gain) == (0, 1, None, None)
    equal = np.full((8, 5), 0.7)
    assert select(scores_of(equal), [str(i) for i in range(8)], 2).best == 2
    undefined = Scores(np.zeros((8, 1, 3)), np.zeros((8, 1, 3)))
    found = select(undefined, [str(i) for i in range(8)], 1)
    assert (found.index, found.score, found.gain) == (1, None, None)


def test_a_group_has_no_part_in_the_choice_that_is_measured_on_it() -> None:
    # Each group likes its own candidate; on the others it is bad. There is nothing to gain.
    values = np.full((6, 7), 0.4)
    values[:, 0] = 0.5
    for group in range(6):
        values[group, group + 1] = 1.0
    found = select(scores_of(values), [str(i) for i in range(6)], 0)
    assert found.index == 0
    assert found.gain is not None
    assert found.gain <= 0


def fitted(**changes: Any) -> FittedPostprocessing:
    """Returns a fit with a threshold of 0.3 and regions of 20 pixels."""
    values = {"score_before": 0.5, "score": 0.6, "gain": 0.1, "low": 0.05, "high": 0.2}
    return FittedPostprocessing(
        fitted_on=FittedOn(split="valid", num_cases=8, dataset_sha256="d", fold=None),
        num_groups=8,
        checkpoint="checkpoints/step-00000004/a1",
        commit_sha256="abc",
        overlap=None,
        classes=(
            FittedClass(
                name="mass",
                threshold=FittedValue(value=0.3, best=0.3, **values),
                min_region=FittedValue(value=20, best=20, **values),
            ),
        ),
        temperature=FittedValue(value=1.5, best=1.5, **values),
        dice_before=0.5,
        dice=0.6,
        gain=0.1,
        low=0.05,
        high=0.2,
    ).model_copy(update=changes)


def resolved(
    folder: Path, *, sha: str = "abc", kind: dict[str, Any] | None = None, **explicit: Any
) -> Any:
    member = EnsembleMember("run", "checkpoints/step-00000004/a1", sha)
    options = {"members": (member,), "flips": "none", "overlap": None, **(kind or {})}
    return resolve_postprocessing(
        [open_store(str(folder))], ["mass"], PredictionKind(**options), ExplicitValues(**explicit)
    )


def test_predictions_use_the_stored_fit_unless_options_replace_it(tmp_path: Path) -> None:
    plain = resolved(tmp_path)
    assert (plain.values, plain.line, plain.record) == (Postprocessing(), None, None)
    (tmp_path / POSTPROCESSING_NAME).write_text(fitted().text())
    found = resolved(tmp_path)
    assert found.values == Postprocessing((0.3,), (20,), 1.5)
    assert "mass: threshold 0.3, mass: smallest region 20 pixels, temperature 1.5" in found.line
    assert UNDO in found.line
    assert found.record["fitted_on"]["num_cases"] == 8
    assert found.record["given"] == []
    partly = resolved(tmp_path, threshold=(0.5,))
    assert partly.values == Postprocessing((), (20,), 1.5)
    assert partly.record["given"] == ["thresholds"]
    assert "fitted on 8 validation images, but thresholds given: mass: smallest" in partly.line
    undone = resolved(tmp_path, threshold=(0.5,), min_region=(0,), temperature=1.0)
    assert (undone.values, undone.line) == (Postprocessing(), None)
    with pytest.raises(UsageError, match=r"--threshold=0\.1,0\.2: give one number, or 1, one for"):
        resolved(tmp_path, threshold=(0.1, 0.2))


def test_a_fit_is_used_for_its_own_predictions_only(tmp_path: Path) -> None:
    (tmp_path / POSTPROCESSING_NAME).write_text(fitted().text())
    member = EnsembleMember("run", "checkpoints/step-00000004/a1", "abc")
    for words, found in (
        ("not for checkpoints", resolved(tmp_path, sha="other")),
        ("an ensemble has other", resolved(tmp_path, kind={"members": (member, member)})),
        ("--flips none, not both", resolved(tmp_path, kind={"flips": "both"})),
        ("overlap of None, not 16", resolved(tmp_path, kind={"overlap": 16})),
        ("fitted on the valid split", resolved(tmp_path, kind={"split": "valid"})),
    ):
        assert found.values == Postprocessing()
        assert "is not used: " in found.line
        assert words in found.record["not_used"]


def test_a_damaged_or_later_fit_is_refused_with_a_remedy(tmp_path: Path) -> None:
    path = tmp_path / POSTPROCESSING_NAME
    for text, words in (
        ("{", "damaged"),
        ("[]", "not a JSON object"),
        (fitted(version=2).text(), "has version 2, and this FlexUNet reads version 1"),
        (fitted().text().replace('"mass"', '"cyst"'), "its classes are cyst, the run's mass"),
        (fitted().text().replace("0.3", '"x"'), "threshold"),
        (fitted().text().replace("0.3", "0.0"), "threshold 0 is not between 0 and 1"),
        (fitted().text().replace("0.3", "2"), "threshold 2 is not between 0 and 1"),
    ):
        path.write_text(text)
        with pytest.raises(ContentError, match=re.escape(words)) as error:
            resolved(tmp_path)
        assert UNDO in str(error.value)
        assert resolved(tmp_path, threshold=(0.5,), min_region=(0,), temperature=1.0)
