"""The generated release: counts and names of the real one, contours where the masses are."""

import io

import numpy as np
import pydicom
import pytest

from data_prep.phantoms import inbreast_release
from data_prep.phantoms.cli import main
from data_prep.phantoms.images import draw_view
from data_prep.phantoms.inbreast_release import write_release
from data_prep.sources import inbreast
from flexunet.errors import UsageError


def _files(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_a_full_release_has_the_published_counts():
    plans = list(inbreast_release._plan(115))
    assert len(plans) == 410
    num_views = [sum(plan.patient == patient for plan in plans) for patient in range(115)]
    assert (num_views.count(4), num_views.count(2)) == (90, 25)
    assert sum(plan.num_masses for plan in plans) == 116
    assert sum(plan.num_masses > 0 for plan in plans) == 107


def test_write_release_writes_files_like_the_real_ones(tmp_path):
    assert write_release(str(tmp_path), 3, 64, 1) == 10
    pairs, rejects = inbreast.find_cases(inbreast.find_release(str(tmp_path)))
    assert rejects == []
    assert pairs[0].id.startswith("20586908_")
    views = ["_".join(pair.id.split("_")[2:]) for pair in pairs[:4]]
    assert views == ["MG_R_CC_ANON", "MG_L_CC_ANON", "MG_R_ML_ANON", "MG_L_ML_ANON"]
    patients = [inbreast.patient_of(pair.image_name) for pair in pairs]
    assert [len(patient) for patient in set(patients)] == [16] * 3
    assert patients == [patients[0]] * 4 + [patients[4]] * 4 + [patients[8]] * 2
    assert any(pair.mask_name is None for pair in pairs)
    kinds = set()
    for pair in pairs:
        data = (tmp_path / "AllDICOMs" / pair.image_name).read_bytes()
        image = pydicom.dcmread(io.BytesIO(data))
        # 64 * 3328 / 4084 = 52 and 52 * 2560 / 3328 = 40.
        shape = (image.Rows, image.Columns, image.BitsStored)
        assert shape in ((64, 52, 14), (52, 40, 12))
        kinds.add(shape)
        assert image.Modality == "MG"
    assert len(kinds) == 2


def test_the_contour_of_a_mass_fits_its_pixels():
    body, rng = (np.random.default_rng(seed) for seed in (1, 2))
    view = draw_view(body, rng, 256, is_oblique=True, num_masses=2)
    mask = np.zeros((256, 256), np.uint8)
    for outline in view.outlines:
        inbreast.fill_polygon(mask, outline * 256 - 0.5)
    both = (mask & view.mask).sum()
    assert 2 * both / (mask.sum() + view.mask.sum()) > 0.95


def test_contours_lie_on_the_masses_of_both_sides():
    """A mass is brighter than the tissue around it; a contour at the wrong side would not be."""
    for plan in inbreast_release._plan(12):
        if not plan.num_masses:
            continue
        pixels, _, rois = inbreast_release.draw_image(plan, 192, 1)
        outline = next(points for name, points in rois if name == "Mass")
        inside, around = (np.zeros(pixels.shape, np.uint8) for _ in range(2))
        inbreast.fill_polygon(inside, outline)
        middle = outline.mean(axis=0)
        inbreast.fill_polygon(around, middle + 2 * (outline - middle))
        around &= (inside == 0) & (pixels > 0)
        assert pixels[inside == 1].mean() > pixels[around == 1].mean()


def test_write_release_again_gives_the_same_files_and_refuses_others(tmp_path):
    write_release(str(tmp_path), 2, 48, 1)
    first = _files(tmp_path)
    write_release(str(tmp_path), 2, 48, 1)
    assert _files(tmp_path) == first
    with pytest.raises(UsageError, match="exists already"):
        write_release(str(tmp_path), 2, 48, 2)  # other patients


def test_command_writes_a_release(tmp_path, capsys):
    arguments = [str(tmp_path / "a"), "--format", "inbreast", "--size", "48"]
    assert main([*arguments, "--num-patients", "2"]) == 0
    assert capsys.readouterr().out == f"8 phantoms as an INbreast release in {tmp_path}/a\n"
    assert main([*arguments, "--num-images", "2"]) == 2
    assert "not for --format inbreast; give --num-patients" in capsys.readouterr().err
