"""Layouts of a source, pairing by stem, and a reason for every file left over."""

import re
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.sources.pairs import (
    Pair,
    PairOptions,
    Reject,
    Source,
    find_pairs,
    find_sources,
)
from flexunet.errors import ContentError, UsageError


def fill(root: Path, *names: str) -> str:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return str(root)


def test_find_sources_finds_a_folder_to_be_split(tmp_path: Path) -> None:
    url = fill(tmp_path, "images/a.png", "masks/a.png")
    assert find_sources(url) == (Source(f"{url}/images", f"{url}/masks", None),)
    assert find_sources(f"file://{url}/") == find_sources(url)


@pytest.mark.parametrize("name", ["valid", "val", "validation"])
def test_find_sources_finds_ready_made_splits(tmp_path: Path, name: str) -> None:
    url = fill(
        tmp_path,
        *("train/images/a.png", "train/masks/a.png"),
        *(f"{name}/images/b.png", f"{name}/masks/b.png"),
        *("test/images/c.png", "test/masks/c.png"),
        "README.txt",
    )
    assert find_sources(url) == (
        Source(f"{url}/train/images", f"{url}/train/masks", "train"),
        Source(f"{url}/{name}/images", f"{url}/{name}/masks", "valid"),
        Source(f"{url}/test/images", f"{url}/test/masks", "test"),
    )


def test_find_sources_follows_a_linked_folder(tmp_path: Path) -> None:
    fill(tmp_path / "elsewhere", "images/a.png", "masks/a.png")
    (tmp_path / "source").mkdir()
    for name in ("images", "masks"):
        (tmp_path / "source" / name).symlink_to(tmp_path / "elsewhere" / name)
    pairs, rejects = find_pairs(find_sources(str(tmp_path / "source")))
    assert [pair.id for pair in pairs] == ["a"]
    assert rejects == []


def test_find_sources_follows_linked_splits_and_files(tmp_path: Path) -> None:
    elsewhere = Path(fill(tmp_path / "elsewhere", "images/a.png", "masks/a.png", "b.png"))
    source = tmp_path / "source"
    for split in ("train", "valid"):
        (source / split).mkdir(parents=True)
    for kind in ("images", "masks"):
        (source / "train" / kind).symlink_to(elsewhere / kind)
        (source / "valid" / kind).mkdir()
        (source / "valid" / kind / "b.png").symlink_to(elsewhere / "b.png")
    (source / "valid" / "masks" / "gone.png").symlink_to(elsewhere / "gone.png")
    pairs, rejects = find_pairs(find_sources(str(source)))
    assert [(pair.id, pair.split) for pair in pairs] == [("a", "train"), ("b", "valid")]
    reason = "is a broken symbolic link; fix it or delete it"
    assert rejects == [Reject(f"{source}/valid/masks/gone.png", reason)]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "no files in images/ and masks/, nor in train/images/"),
        (["images/.gitkeep", "masks/.gitkeep"], "no files in images/ and masks/"),
        (["other/a.png"], "no files in images/ and masks/"),
        (["images/a.png"], "/masks: missing or empty"),
        (["masks/a.png"], "/images: missing or empty"),
        (["images/a.png", "masks/.DS_Store"], "/masks: missing or empty"),
        (
            ["valid/images/a.png", "valid/masks/a.png"],
            "no folder train/ or training/ beside valid/",
        ),
        (["train/images/a.png"], "/train/masks: missing or empty"),
        (
            ["train/images/a.png", "train/masks/a.png", "test/a.png"],
            "no folder of masks belongs to test/",
        ),
        (["train/images/a.png", "images/a.png"], "keep one of the two layouts"),
        (["train/a.png", "val/a.png", "valid/a.png"], "valid/ and val/ mean the same split"),
    ],
)
def test_find_sources_names_what_is_missing(tmp_path: Path, names: list[str], message: str) -> None:
    url = fill(tmp_path, *names)
    with pytest.raises(UsageError, match=f"^{url}.*{message}"):
        find_sources(url)


def test_find_sources_of_a_missing_folder_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="/nowhere: no files"):
        find_sources(str(tmp_path / "nowhere"))


def test_find_pairs_pairs_by_stem_whatever_the_ending(tmp_path: Path) -> None:
    url = fill(
        tmp_path,
        *("images/10.JPG", "images/9.png", "images/a.b.tif"),
        *("masks/9.npz", "masks/10.bmp", "masks/a.b.png"),
        *("images/Thumbs.db", "masks/.hidden.png"),
    )
    images, masks = f"{url}/images", f"{url}/masks"
    pairs, rejects = find_pairs(find_sources(url))
    assert pairs == [
        Pair("10", images, "10.JPG", masks, "10.bmp", None),
        Pair("9", images, "9.png", masks, "9.npz", None),
        Pair("a.b", images, "a.b.tif", masks, "a.b.png", None),
    ]
    assert rejects == []


def test_find_pairs_gives_a_reason_for_every_file_left_over(tmp_path: Path) -> None:
    url = fill(
        tmp_path,
        *("images/ok.png", "masks/ok.png"),
        *("images/alone.png", "masks/lost.png"),
        *("images/twice.png", "images/twice.jpg", "masks/twice.png"),
        *("images/many.png", "masks/many.png", "masks/many.npz"),
        *("images/deep/x.png", "images/notes.txt", "images/mask.npz"),
    )
    pairs, rejects = find_pairs(find_sources(url))
    assert [pair.id for pair in pairs] == ["ok"]
    images, masks = f"{url}/images", f"{url}/masks"
    endings = "its ending is not one of .bmp, .gif, .jpeg, .jpg, .png, .tif, .tiff"
    double = "2 files in its folder differ only in the ending; keep one"
    partner = "its partner exists more than once, with different endings; keep one"
    assert rejects == [
        Reject(f"{images}/alone.png", f"no mask of this name in {masks}"),
        Reject(f"{images}/deep/x.png", "is in a subfolder; move it up"),
        Reject(f"{images}/many.png", partner),
        Reject(f"{images}/mask.npz", endings),
        Reject(f"{images}/notes.txt", endings),
        Reject(f"{images}/twice.jpg", double),
        Reject(f"{images}/twice.png", double),
        Reject(f"{masks}/lost.png", f"no image of this name in {images}"),
        Reject(f"{masks}/many.npz", double),
        Reject(f"{masks}/many.png", double),
        Reject(f"{masks}/twice.png", partner),
    ]


def test_dicom_files_as_images_of_pairs_are_refused_with_what_to_do(tmp_path: Path) -> None:
    url = fill(tmp_path, "images/a.DCM", "images/IM000001", "masks/a.png", "masks/IM000001.dicom")
    pairs, rejects = find_pairs(find_sources(url))
    assert pairs == []
    convert = "DICOM files are not read as pairs; convert them to 16-bit PNG or TIFF, or give a"
    reasons = {reject.file.removeprefix(f"{url}/"): reject.reason for reject in rejects}
    assert reasons["images/a.DCM"].startswith(convert)
    assert reasons["masks/IM000001.dicom"].startswith(convert)
    assert reasons["images/IM000001"] == (
        "it has no ending, expected .bmp, .gif, .jpeg, .jpg, .png, .tif, .tiff; convert DICOM "
        "files to 16-bit PNG or TIFF"
    )


def test_folders_without_a_rule_say_what_the_masks_are_called(tmp_path: Path) -> None:
    url = fill(tmp_path, "images/b.png", "images/a.jpg", "masks/x1.png", "masks/y.png")
    expected = "the first image is a.jpg, the first mask x1.png; rename the files, or give a rule"
    with pytest.raises(ContentError, match=rf"/masks: no image .*: {re.escape(expected)}"):
        find_pairs(find_sources(url))


def test_masks_with_a_common_suffix_are_paired(tmp_path: Path) -> None:
    url = fill(tmp_path, "images/b.png", "images/a.jpg", "masks/b_mask.png", "masks/a_mask.png",
               "masks/c.png", "images/c_old.png")  # fmt: skip
    pairs, rejects = find_pairs(find_sources(url))
    assert [(pair.id, pair.image_name, pair.mask_name) for pair in pairs] == [
        ("a", "a.jpg", "a_mask.png"),
        ("b", "b.png", "b_mask.png"),
    ]
    assert rejects == [
        Reject(f"{url}/images/c_old.png", f"no mask of this name in {url}/masks"),
        Reject(
            f"{url}/masks/c.png",
            f'no image of this name in {url}/images with --mask-name "{{stem}}_mask"',
        ),
    ]


def test_a_given_rule_is_preferred_to_equal_names(tmp_path: Path) -> None:
    url = fill(tmp_path, "images/a.png", "masks/a.png", "masks/a_1.png", "masks/a_2.png")
    (pair,), rejects = find_pairs(find_sources(url), None, PairOptions(mask_name="{stem}_*"))
    assert (pair.mask_name, pair.more_masks) == ("a_1.png", ("a_2.png",))
    assert [reject.file for reject in rejects] == [f"{url}/masks/a.png"]
    with pytest.raises(
        UsageError, match=r"--mask-name '\{stem\}_x': no mask of .*first mask a.png"
    ):
        find_pairs(find_sources(url), None, PairOptions(mask_name="{stem}_x"))


def test_an_image_without_a_mask_may_have_no_finding(tmp_path: Path) -> None:
    names = ("images/a_i.png", "images/b_i.png", "images/logo.png", "masks/a.png", "masks/c.png")
    url = fill(tmp_path, *names)
    for missing, ids in (("error", ["a_i"]), ("empty", ["a_i", "b_i"])):
        options = PairOptions("{stem}_i", None, missing)  # type: ignore[arg-type]
        pairs, rejects = find_pairs(find_sources(url), None, options)
        assert [pair.id for pair in pairs] == ids
        files = {reject.file.removeprefix(f"{url}/") for reject in rejects}
        assert files == {"images/logo.png", "masks/c.png"} | (
            {"images/b_i.png"} if missing == "error" else set()
        )
    assert pairs[1].mask_name is None


ENDINGS = st.sampled_from([".png", ".jpg", ".npz", ".txt", ""])
FILES = st.lists(
    st.tuples(st.sampled_from(["a", "b", "c", "a_mask", "deep/a"]), ENDINGS),
    max_size=9,
    unique=True,
)


@settings(max_examples=40)
@given(FILES, FILES)
def test_equal_names_are_paired_and_every_other_file_has_a_reason(
    images: list[tuple[str, str]], masks: list[tuple[str, str]]
) -> None:
    images, masks = [("x", ".png"), *images], [("x", ".png"), *masks]
    with tempfile.TemporaryDirectory() as folder:
        url = fill(Path(folder), *(f"images/{stem}{end}" for stem, end in images),
                   *(f"masks/{stem}{end}" for stem, end in masks))  # fmt: skip
        pairs, rejects = find_pairs(find_sources(url))
    usable = [
        {(stem, end) for stem, end in files if "/" not in stem and end in allowed}
        for files, allowed in ((images, (".png", ".jpg")), (masks, (".png", ".jpg", ".npz")))
    ]
    counts = [Counter(stem for stem, _ in files) for files in usable]
    expected = {stem for stem in counts[0] if counts[0][stem] == counts[1][stem] == 1}
    assert [pair.id for pair in pairs] == sorted(expected)
    assert all(pair.image_name.split(".")[0] == (pair.mask_name or "").split(".")[0] == pair.id
               for pair in pairs)  # fmt: skip
    left = {f"{url}/images/{stem}{end}" for stem, end in images if stem not in expected} | {
        f"{url}/masks/{stem}{end}" for stem, end in masks if stem not in expected
    }
    others = {f"{url}/{kind}/{stem}{end}" for number, (kind, files) in
              enumerate((("images", images), ("masks", masks))) for stem, end in files
              if stem in expected and (stem, end) not in usable[number]}  # fmt: skip
    assert {reject.file for reject in rejects} == left | others
    known = {
        f"no mask of this name in {url}/masks", f"no image of this name in {url}/images",
        "is in a subfolder; move it up", "its partner exists more than once, with different "
        "endings; keep one", *(f"{n} files in its folder differ only in the ending; keep one"
                               for n in (2, 3)),
    }  # fmt: skip
    assert {r.reason for r in rejects if "ending is not" not in r.reason
            and "no ending" not in r.reason} <= known  # fmt: skip


def test_find_pairs_rejects_a_name_that_two_splits_share(tmp_path: Path) -> None:
    url = fill(
        tmp_path,
        *("train/images/a.png", "train/masks/a.png", "train/images/b.png", "train/masks/b.png"),
        *("test/images/a.png", "test/masks/a.png"),
    )
    pairs, rejects = find_pairs(find_sources(url))
    assert [(pair.id, pair.split) for pair in pairs] == [("b", "train")]
    assert [reject.file for reject in rejects] == [
        f"{url}/test/images/a.png",
        f"{url}/train/images/a.png",
    ]
    assert "more than one split" in rejects[0].reason


def test_find_pairs_of_an_empty_source_is_a_usage_error(tmp_path: Path) -> None:
    url = fill(tmp_path, "images/a.png")
    with pytest.raises(UsageError, match="/masks: missing or empty"):
        find_pairs([Source(f"{url}/images", f"{url}/masks", None)])
