"""The INbreast release: names, annotations with their spellings, contours, hostile lists."""

import os
import plistlib

import numpy as np
import pytest

from data_prep.phantoms.inbreast_release import annotation_bytes
from data_prep.sources import inbreast
from data_prep.sources.inbreast import Finding, Roi, draw_rois, fill_polygon, find_cases, read_rois
from data_prep.sources.pairs import Reject
from flexunet.errors import ContentError, UsageError
from flexunet.storage import LocalStore

SQUARE = np.array([[1, 1], [4, 1], [4, 4], [1, 4]], float)


def _list(**changes):
    """Returns an annotation with one mass, after `changes` of its one ROI, image or root."""
    roi = {"Name": "Mass", "NumberOfPoints": 3, "Point_px": ["(1, 2)", "(3, 4)", "(5, 6)"]}
    roi |= changes.get("roi", {})
    image = {"NumberOfROIs": 1, "ROIs": [roi]} | changes.get("image", {})
    return plistlib.dumps({"Images": [image]} | changes.get("root", {}))


def _fill(points, height=6, width=6):
    mask = np.zeros((height, width), np.uint8)
    fill_polygon(mask, np.array(points, float))
    return mask


# Contours


def test_fill_polygon_takes_pixels_whose_centre_is_inside():
    # From 1 to 4: the centres 1, 2 and 3; 4 is on the right and the lower border.
    expected = np.zeros((6, 6), np.uint8)
    expected[1:4, 1:4] = 1
    assert np.array_equal(_fill(SQUARE), expected)
    assert np.array_equal(_fill(SQUARE[::-1]), expected)
    assert np.array_equal(_fill(SQUARE - 0.4), expected)  # 0.6 to 3.6: the centres 1, 2, 3


def test_fill_polygon_of_a_triangle():
    # Right angle at (0, 0), legs of 4: the centres with x + y < 4.
    expected = [[1, 1, 1, 1, 0], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0], [0] * 5]
    assert _fill([[0, 0], [4, 0], [0, 4]], 5, 5).tolist() == expected


def test_fill_polygon_of_a_letter_u_leaves_its_gap_open():
    points = [[0, 0], [1, 0], [1, 2], [3, 2], [3, 0], [4, 0], [4, 4], [0, 4]]
    expected = [[1, 0, 0, 1], [1, 0, 0, 1], [1, 1, 1, 1], [1, 1, 1, 1]]
    assert _fill(points, 4, 4).tolist() == expected


def test_fill_polygon_shares_no_pixel_with_its_neighbour_and_stays_inside():
    whole = np.array([[0.5, 0.5], [5.2, 1.3], [4.1, 5.0], [0.9, 4.4]])
    parts = _fill(whole[[0, 1, 2]]) + _fill(whole[[0, 2, 3]])
    assert np.array_equal(parts, _fill(whole))
    assert _fill(SQUARE + 4).sum() == 1  # only (5, 5) is still in the image
    assert _fill(SQUARE + 9).sum() == _fill(SQUARE - 9).sum() == 0
    assert _fill([[1, 1], [4, 1], [2, 1]]).sum() == 0


def test_fill_polygon_has_the_area_of_a_circle():
    angle = np.linspace(0, 2 * np.pi, 400, endpoint=False)
    circle = np.stack([150.3 + 100 * np.cos(angle), 140.7 + 100 * np.sin(angle)], axis=1)
    assert _fill(circle, 300, 300).sum() == pytest.approx(np.pi * 100**2, rel=2e-3)


def test_draw_rois_draws_the_kinds_asked_for_and_no_marks():
    rois = [
        Roi("mass", SQUARE),
        Roi("cluster", np.add(SQUARE, (0, 4))),
        Roi("mass", SQUARE[:2] + 5),
    ]
    assert draw_rois(rois, ["mass"], 10, 6, name="a").sum() == 9
    assert draw_rois(rois, ["mass", "cluster"], 10, 6, name="a").sum() == 18
    assert draw_rois(rois, ["asymmetry"], 10, 6, name="a").sum() == 0


def test_draw_rois_refuses_the_contour_of_another_image():
    # 6 columns: the last centre is 5, and 5 % of 6 are 0.3.
    assert draw_rois([Roi("mass", np.add(SQUARE, (1.2, 0)))], ["mass"], 6, 6, name="a").sum() == 9
    with pytest.raises(ContentError, match=r"^a\.xml: a contour extends beyond its image of 6x6"):
        draw_rois([Roi("mass", np.add(SQUARE, (1.4, 0)))], ["mass"], 6, 6, name="a.xml")


# Annotations


def test_read_rois_knows_every_spelling():
    names = {
        "mass": ["Mass", "mass", " MASS "],
        "spiculated": ["Spiculated Region", "Spiculated region", "Espiculated  Region"],
        "cluster": ["Cluster"],
        "calcification": ["Calcification", "Calcifications"],
        "asymmetry": ["Asymmetry", "Assymetry"],
        "distortion": ["Distortion"],
        "other": ["Unnamed", "Point 1", "Point 3", "Mass of Mrs Doe"],
    }
    assert tuple(names) == inbreast.KINDS
    for kind, spellings in names.items():
        found = read_rois(annotation_bytes([(each, SQUARE) for each in spellings]), name="a")
        assert [roi.kind for roi in found] == [kind] * len(spellings)


def test_read_rois_reads_points_in_pixels():
    points = ["(2270.560059, 2004.709961)", " ( -1 ,+2.5e1 ) ", "(3,4.)"]
    (roi,) = read_rois(_list(roi={"Point_px": points}), name="a")
    assert roi.points.tolist() == [[2270.560059, 2004.709961], [-1, 25], [3, 4]]
    assert roi.is_outline


def test_count_findings_separates_outlines_from_marks():
    rois = [Roi("mass", SQUARE), Roi("mass", SQUARE[:2]), Roi("mass", SQUARE[:3])]
    rois += [Roi("other", SQUARE[:1]), Roi("cluster", SQUARE[:0])]
    assert inbreast.count_findings(rois) == (
        Finding("mass", 2, 1), Finding("cluster", 0, 1), Finding("other", 0, 1),
    )  # fmt: skip


def test_count_rows_counts_images_of_points_but_not_of_masses():
    findings = {
        "a": (Finding("mass", 1, 1), Finding("other", 0, 2)),
        "b": (Finding("mass", 0, 1), Finding("calcification", 1, 0)),
        "c": (Finding("calcification", 0, 3),),
        "d": (),
    }
    patients = {"a": "p", "b": "p", "c": "q", "d": "r"}
    rows = {row[0]: row[1:-1] for row in inbreast.count_rows(findings, patients, ["d"])}
    assert rows["all"] == ("", "", "4", "3")
    assert rows["no annotation"] == ("", "", "1", "1")
    # Contours, points, images, patients; the mark of b is no mass.
    assert rows["mass"] == ("1", "2", "1", "1")
    assert rows["calcification"] == ("1", "3", "2", "2")
    assert rows["other"] == ("0", "2", "1", "1")


_ENTITY = b"""<?xml version="1.0"?><!DOCTYPE plist [<!ENTITY a SYSTEM "file:///etc/passwd">]>
<plist version="1.0"><dict><key>Images</key><string>&a;</string></dict></plist>"""
_LAUGHS = b"""<?xml version="1.0"?><!DOCTYPE plist [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;">]>
<plist version="1.0"><string>&b;</string></plist>"""


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not an XML property list"),
        (b"<plist><dict><key>secret", "not an XML property list"),
        (b"<plist version='1.0'><integer>secret</integer></plist>", "not an XML property list"),
        (_ENTITY, "not an XML property list"),
        (_LAUGHS, "not an XML property list"),
        (plistlib.dumps({"Images": []}, fmt=plistlib.FMT_BINARY), "not an XML property list"),
        (b" " * (16 * 2**20 + 1), "an annotation has at most 16777216"),
        (plistlib.dumps(["secret"]), "Images is missing or has a wrong type"),
        (_list(root={"Images": []}), "annotations of 0 images"),
        (_list(image={"NumberOfROIs": 2}), "NumberOfROIs differs from the number"),
        (_list(image={"ROIs": "secret"}), "ROIs is missing or has a wrong type"),
        (_list(roi={"NumberOfPoints": 2}), "NumberOfPoints differs from the number"),
        (_list(roi={"NumberOfPoints": True}), "NumberOfPoints is missing or has a wrong type"),
        (_list(roi={"Name": 3}), "Name is missing or has a wrong type"),
        (_list(roi={"Point_px": ["(1, 2)", "(3, secret)", "(5, 6)"]}), "does not have the form"),
        (
            _list(roi={"Point_px": ["(1, 2)", "__import__('os')", "(5, 6)"]}),
            "does not have the form",
        ),
        (_list(roi={"Point_px": ["(1, 2)", [3, 4], "(5, 6)"]}), "does not have the form"),
    ],
)
def test_read_rois_refuses_in_one_line_that_quotes_nothing(data, message):
    with pytest.raises(ContentError, match=rf"^a\.xml: .*{message}") as caught:
        read_rois(data, name="a.xml")
    assert "secret" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_read_rois_refuses_too_many_points(monkeypatch):
    monkeypatch.setattr(inbreast, "_MAX_POINTS", 2)
    with pytest.raises(ContentError, match="more than 2 points"):
        read_rois(_list(), name="a")


def test_read_rois_takes_a_point_at_infinity_for_outside():
    points = ["(1, 2)", "(3, 1e999)", "(5, 6)"]
    rois = read_rois(_list(roi={"Point_px": points}), name="a")
    with pytest.raises(ContentError, match="extends beyond its image"):
        draw_rois(rois, ["mass"], 6, 6, name="a")


# Files


def _release(folder, images, annotations):
    for place, names in (("AllDICOMs", images), ("AllXML", annotations)):
        (folder / place).mkdir(parents=True)
        for name in names:
            (folder / place / name).write_bytes(b"x")
    return inbreast.find_release(str(folder))


def test_find_cases_rejects_names_that_storage_refuses(tmp_path):
    for folder, name in (("AllDICOMs", "1_a_MG_L_CC_ANON.dcm"), ("AllXML", "1.xml")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_bytes(b"x")
    odd = os.fsdecode(b"2_a_caf\xe9.dcm")
    (tmp_path / "AllDICOMs" / odd).write_bytes(b"x")
    pairs, rejects = find_cases(inbreast.find_release(str(tmp_path)))
    assert [pair.id for pair in pairs] == ["1_a_MG_L_CC_ANON"]
    reason = "its name is not allowed: it is not UTF-8; rename it"
    assert rejects == [Reject(f"{tmp_path}/AllDICOMs/{odd}", reason)]


def test_find_cases_joins_by_number_and_keeps_what_has_no_annotation(tmp_path):
    images = ["20_aa_MG_R_CC_ANON.dcm", "21_aa_MG_L_CC_ANON.DCM", "22_bb_MG_R_ML_ANON.dcm"]
    sources = _release(tmp_path, [*images, "readme.txt"], ["20.xml", "22_extra.xml", "x.pdf"])
    pairs, rejects = find_cases(sources)
    assert [(pair.image_name, pair.mask_name) for pair in pairs] == [
        (images[0], "20.xml"), (images[1], None), (images[2], "22_extra.xml"),
    ]  # fmt: skip
    assert [pair.id for pair in pairs] == [name[:-4] for name in images]
    assert rejects == []
    assert [inbreast.patient_of(name) for name in images] == ["aa", "aa", "bb"]


def test_find_cases_lists_each_folder_once(tmp_path, monkeypatch):
    sources = _release(tmp_path, ["20_aa_MG_R_CC_ANON", "21_aa_MG_L_CC_ANON.dcm"], ["20.xml"])
    listed = []
    true = LocalStore.list

    def pluralize(self, prefix=""):
        listed.append(self.url)
        return true(self, prefix)

    monkeypatch.setattr(LocalStore, "list", pluralize)
    find_cases(sources)
    assert listed == [f"{tmp_path}/AllDICOMs", f"{tmp_path}/AllXML"]


@pytest.mark.parametrize(
    ("images", "annotations", "rejected"),
    [
        # Two images of one number: which one is annotated is unknown.
        (["20_aa_MG.dcm", "20_aa_MG_2.dcm"], ["20.xml"],
         {"20_aa_MG.dcm": "several images", "20_aa_MG_2.dcm": "several images",
          "20.xml": "several images"}),
        (["20_aa_MG.dcm"], ["20.xml", "20 copy.xml"],
         {"20_aa_MG.dcm": "several annotations", "20.xml": "several annotations",
          "20 copy.xml": "several annotations"}),
        (["20_aa_MG.dcm"], ["21.xml"], {"21.xml": "no image with this number"}),
        (["20.dcm", "x_aa_MG.dcm"], ["a.xml"],
         {"20.dcm": "patient is unknown", "x_aa_MG.dcm": "patient is unknown",
          "a.xml": "patient is unknown"}),
    ],
)  # fmt: skip
def test_find_cases_reports_what_is_in_none(tmp_path, images, annotations, rejected):
    pairs, rejects = find_cases(_release(tmp_path, images, annotations))
    found = {each.file.split("/")[-1]: each.reason for each in rejects}
    assert found.keys() == rejected.keys()
    assert all(text in found[name] for name, text in rejected.items())
    assert not {pair.image_name for pair in pairs} & rejected.keys()


def test_find_release_names_the_folder_that_is_missing(tmp_path):
    (tmp_path / "AllDICOMs").mkdir()
    (tmp_path / "AllDICOMs" / "20_aa_MG.dcm").write_bytes(b"x")
    with pytest.raises(UsageError, match=r"AllXML: missing or empty; give the folder of the rel"):
        inbreast.find_release(str(tmp_path))


def test_patient_of_another_name_is_an_error():
    with pytest.raises(ContentError, match=r"^b\.dcm: its name is not NUMBER_PATIENT"):
        inbreast.patient_of("b.dcm")
