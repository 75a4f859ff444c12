"""Phantoms: deterministic, plausible, not solved by a threshold, written as a source of pairs."""

from pathlib import Path

import numpy as np
import pytest

from data_prep.imaging.codecs import read_image, read_mask_pixels
from data_prep.masks.color_map import DEFAULT_CLASSES
from data_prep.masks.reading import read_classes
from data_prep.masks.rules import MaskRules
from data_prep.phantoms.cli import main
from data_prep.phantoms.images import make_phantom, write_phantoms
from data_prep.sources.pairs import find_pairs, find_sources
from data_prep.splits.groups import group_of
from flexunet.errors import UsageError

SIZE = 128


def test_make_phantom_is_a_function_of_seed_and_index() -> None:
    image, mask = make_phantom(3, 5, SIZE)
    again, mask_again = make_phantom(3, 5, SIZE)
    np.testing.assert_array_equal(image, again)
    np.testing.assert_array_equal(mask, mask_again)
    for other in (make_phantom(3, 6, SIZE), make_phantom(4, 5, SIZE)):
        assert not np.array_equal(image, other[0])
    assert image.shape == mask.shape == (SIZE, SIZE)
    assert image.dtype == mask.dtype == np.uint8
    assert set(np.unique(mask)) <= {0, 1}


def test_make_phantom_has_masses_of_plausible_number_and_size() -> None:
    masks = [make_phantom(1, i, SIZE)[1] for i in range(80)]
    share_empty = np.mean([not mask.any() for mask in masks])
    assert 0.03 < share_empty < 0.2  # 10 % are drawn without a mass
    areas = np.array([mask.mean() for mask in masks if mask.any()])
    # Diameters of 3 to 12 % of the side: discs of 0.07 to 1.1 % of the area, some with two.
    assert 0.0003 < areas.min() < areas.max() < 0.04
    assert 0.003 < np.median(areas) < 0.012


def test_make_phantom_looks_like_a_mammogram() -> None:
    for i in range(12):
        image, mask = make_phantom(2, i, SIZE)
        breast = image > 25
        assert 0.15 < breast.mean() < 0.7
        # The chest wall is one side, the other side is empty film.
        columns = breast.mean(axis=0)
        sides = sorted((columns[:4].mean(), columns[-4:].mean()))
        assert sides[0] < 0.02 < 0.4 < sides[1]
        if mask.any():
            assert image[mask == 1].mean() > image[breast & (mask == 0)].mean() + 20


def test_make_phantom_is_not_solved_by_a_threshold() -> None:
    pairs = [make_phantom(1, i, SIZE) for i in range(40)]
    images = np.stack([image for image, _ in pairs])
    masks = np.stack([mask for _, mask in pairs]) == 1

    def dice(threshold: int) -> float:
        found = images >= threshold
        return float(2 * (found & masks).sum() / (found.sum() + masks.sum()))

    assert max(dice(threshold) for threshold in range(60, 256, 5)) < 0.65


def test_make_phantom_of_one_patient_shares_the_outline() -> None:
    def num_outlines(patients: list[int]) -> int:
        areas = [
            float((make_phantom(1, index, SIZE, patient=patient)[0] > 25).mean())
            for index, patient in enumerate(patients)
        ]
        return 1 + int(np.count_nonzero(np.diff(np.sort(areas)) > 0.015))

    # One patient has at most two: the oblique and the craniocaudal view.
    assert num_outlines([7] * 10) == 2
    assert num_outlines(list(range(10))) > 2
    alone, same = make_phantom(1, 4, SIZE), make_phantom(1, 4, SIZE, patient=4)
    np.testing.assert_array_equal(alone[0], same[0])


def test_make_phantom_refuses_a_size_that_shows_nothing() -> None:
    with pytest.raises(ValueError, match="size 16 is too small"):
        make_phantom(1, 0, 16)


def test_write_phantoms_writes_a_source_of_pairs_with_patients(tmp_path: Path) -> None:
    folder = str(tmp_path / "phantoms")
    write_phantoms(folder, 5, 64, 1, num_patients=2)
    pairs, rejects = find_pairs(find_sources(folder))
    assert rejects == []
    # 5 images of 2 patients: i * 2 // 5 is 0, 0, 0, 1, 1.
    names = [*(f"phantom-p000-{i}" for i in (1, 2, 3)), "phantom-p001-1", "phantom-p001-2"]
    assert [pair.id for pair in pairs] == names
    groups = [group_of(regex=r"-(p\d+)-")(pair.image_name) for pair in pairs]
    assert groups == ["p000"] * 3 + ["p001"] * 2
    for i, pair in enumerate(pairs):
        image, mask = make_phantom(1, i, 64, patient=i * 2 // 5)
        stored = (Path(pair.image_url) / pair.image_name).read_bytes()
        np.testing.assert_array_equal(read_image(stored, name="a")[..., 0], image)
        colors = read_mask_pixels((Path(pair.mask_url) / pair.mask_name).read_bytes(), name="a")
        assert colors.shape == (64, 64, 3)
        reading = read_classes(colors, MaskRules(DEFAULT_CLASSES), name="a")
        np.testing.assert_array_equal(reading.ids, mask)
        assert reading.unmapped_pixels == 0


def test_write_phantoms_again_gives_the_same_files(tmp_path: Path) -> None:
    def contents() -> dict[str, bytes]:
        files = sorted(path for path in tmp_path.rglob("*") if path.is_file())
        return {str(path): path.read_bytes() for path in files}

    write_phantoms(str(tmp_path), 3, 64, 1)
    first = contents()
    write_phantoms(str(tmp_path), 3, 64, 1)
    assert contents() == first
    assert len(first) >= 6


def test_write_phantoms_refuses_to_mix_with_other_files(tmp_path: Path) -> None:
    write_phantoms(str(tmp_path), 3, 64, 1)
    with pytest.raises(UsageError, match=r"images/phantom-p002-1\.png exists already"):
        write_phantoms(str(tmp_path), 2, 64, 1)


def test_main_writes_and_says_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), "--num-images", "2", "--size", "48", "--seed", "9"]) == 0
    assert capsys.readouterr().out == f"2 phantoms of 48x48 pixels in {tmp_path}\n"
    assert len(list((tmp_path / "images").glob("*.png"))) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--num-images", "2", "--num-patients", "3"],
            "--num-patients=3: give a number from 1 to --num-images (2)",
        ),
        (["--size", "8"], "8 is not in the range x>=32"),
    ],
)
def test_main_refuses_wrong_options_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert main([str(tmp_path / "new"), *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "new").exists()
