"""Layouts of a source, pairing by stem, and a reason for every file left over."""

import re
from pathlib import Path

import pytest

from data_prep.sources.pairs import Pair, Reject, Source, find_pairs, find_sources
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
        (["valid/images/a.png", "valid/masks/a.png"], "no files in"),
        (["train/images/a.png"], "/train/masks: missing or empty"),
        (["train/images/a.png", "train/masks/a.png", "test/a.png"], "/test/images: missing or"),
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


def test_folders_without_one_common_name_say_what_the_masks_are_called(tmp_path: Path) -> None:
    url = fill(tmp_path, "images/b.png", "images/a.jpg", "masks/b_mask.png", "masks/a_mask.png")
    expected = "a.jpg needs a.png, but the masks are a_mask.png and so on; rename the files"
    with pytest.raises(ContentError, match=rf"/masks: .*: {re.escape(expected)}"):
        find_pairs(find_sources(url))


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
