"""Folders of images and masks: found by random and known names, selected, ambiguous, incomplete."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.sources import source_folders
from data_prep.sources.folder_patterns import FolderOptions, choose_folders, select_folders
from data_prep.sources.layout import (
    IMAGE_WORDS,
    SPLIT_WORDS,
    FolderPair,
    Meaning,
    find_folders,
    folders_of,
    meaning_of,
)
from data_prep.sources.name_rules import MASK_WORDS
from data_prep.sources.pairs import (
    IMAGE_ENDINGS,
    MASK_ENDINGS,
    PairOptions,
    find_pairs,
    find_sources,
)
from flexunet.errors import ContentError, UsageError

REAL = Path(__file__).resolve().parents[4] / "shared" / "data"
real_data = pytest.mark.skipif(not REAL.is_dir(), reason=f"real data sets are not at {REAL}")
DRIVE = ("training/images/21_training.tif", "training/1st_manual/21_manual1.gif",
         "training/mask/21_training_mask.gif")  # fmt: skip


def found(*names: str) -> tuple[FolderPair, ...] | None:
    return find_folders(folders_of("SOURCE", names, IMAGE_ENDINGS, MASK_ENDINGS))


def selected(names: Sequence[str], images: str | None, masks: str | None) -> list[FolderPair]:
    folders = folders_of("SOURCE", names, IMAGE_ENDINGS, MASK_ENDINGS)
    return list(select_folders(folders, images, masks))


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["imgs/a.png", "labels/a.png"], [("imgs", "labels", None)]),
        (["Image/a.png", "LABEL/a.png"], [("Image", "LABEL", None)]),
        (["JPEGImages/a.jpg", "SegmentationClass/a.png", "SegmentationClassNpy/a.npy"],
         [("JPEGImages", "SegmentationClass", None)]),
        (["images/a.png", "Ground Truth/a.png"], [("images", "Ground Truth", None)]),
        (["images/a.png", "ground_truth/a.png"], [("images", "ground_truth", None)]),
        (["a.png", "masks/a.png"], [("", "masks", None)]),
        (["release/img/a.png", "release/gt/a.png"], [("release/img", "release/gt", None)]),
        (["images/train/a.png", "masks/train/a.png", "images/val/b.png", "masks/val/b.png"],
         [("images/train", "masks/train", "train"), ("images/val", "masks/val", "valid")]),
        (["Testing/Images/a.png", "Testing/Masks/a.png", "Training/Images/b.png",
          "Training/Masks/b.png"],
         [("Training/Images", "Training/Masks", "train"),
          ("Testing/Images", "Testing/Masks", "test")]),
        (["train_images/a.png", "train_masks/a.png", "test_images/b.png", "test_masks/b.png"],
         [("train_images", "train_masks", "train"), ("test_images", "test_masks", "test")]),
        (["train/a.jpg", "train_masks/a_mask.gif"], [("train", "train_masks", None)]),
        (["train/x/images/a.png", "train/x/masks/a.png", "train/y/images/b.png",
          "train/y/masks/b.png", "test/x/images/c.png", "test/x/masks/c.png"],
         [("train/x/images", "train/x/masks", "train"), ("train/y/images", "train/y/masks",
          "train"), ("test/x/images", "test/x/masks", "test")]),
        (["training/images/a.tif", "training/1st_manual/a.gif"],
         [("training/images", "training/1st_manual", None)]),
        (["images/a.png", "labels/a.png", "docs/figure.png", "logo.png"],
         [("images", "labels", None)]),
        (["images/a.png", "mask_images/a.png"], [("images", "mask_images", None)]),
        (["a.png", "a_mask.png", "b.png", "b_mask.png", "report/figure.png"], [("", "", None)]),
        (["train/a.png", "train/a_mask.png", "test/b.png", "test/b_mask.png"],
         [("train", "train", "train"), ("test", "test", "test")]),
        (["images/a.png", "images/a_mask.png"], [("images", "images", None)]),
        (["images/a.png", "labels/a.npz"], [("images", "labels", None)]),
    ],
)  # fmt: skip
def test_folders_are_found_by_their_names(
    names: list[str], expected: list[tuple[str, str, str | None]]
) -> None:
    assert found(*names) == tuple(FolderPair(*each) for each in expected)


@pytest.mark.parametrize(
    "names",
    [
        [],
        ["images/a.png"],
        ["masks/a.png"],
        ["images/a.png", "labels/a.txt"],  # boxes of YOLO
        ["photographs/a.png", "drawings/a.png"],
        ["train/a.png", "test/b.png"],
        ["left/images/a.png", "right/masks/a.png"],
    ],
)
def test_folders_without_a_pair_are_not_found(names: list[str]) -> None:
    assert found(*names) is None


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (DRIVE, "training/1st_manual/ and training/mask/ may be the masks; choose one, for "
                "example --masks training/1st_manual"),
        (["images/a.png", "imgs/a.png", "gt/a.png"],
         "images/ and imgs/ may be the images; choose one, for example --images images"),
        (["images/a.png", "gt/a.png", "val/images/b.png", "val/gt/b.png"],
         "val/images/ is in a folder of a split and images/ is not"),
        (["val/images/a.png", "val/gt/a.png", "validation/images/b.png", "validation/gt/b.png"],
         "val/images/ and validation/images/ may be the images"),
        (["training/images/a.png", "training/gt/a.png", "test/images/b.png"],
         "no folder of masks belongs to test/images/; add it"),
        (["training/images/a.png", "training/gt/a.png", "test/b.png"],
         "no folder of masks belongs to test/; add it"),
        (["imgs/a.png", "gt/a.png", "other/gt/b.png"],
         "no folder of images belongs to other/gt/; add it"),
        (["val/imgs/a.png", "val/gt/a.png"], "no folder train/ or training/ beside val/imgs/"),
        (["train/a.png", "train/a_mask.png", "test/b.png"],
         "no folder of masks belongs to test/; add it"),
    ],
)  # fmt: skip
def test_names_with_several_readings_are_asked_for(names: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=r"^SOURCE: ") as caught:
        found(*names)
    assert message in str(caught.value)
    assert "--masks" in str(caught.value) or "--images" in str(caught.value)
    assert "\n" not in str(caught.value)


@st.composite
def cased(draw: st.DrawFn, words: frozenset[str]) -> str:
    """Draws a word in random case."""
    word = draw(st.sampled_from(sorted(words)))
    return "".join(draw(st.sampled_from([c.lower(), c.upper()])) for c in word)


@settings(max_examples=40)
@given(
    cased(frozenset(IMAGE_WORDS)),
    cased(frozenset(MASK_WORDS)),
    st.lists(cased(frozenset(SPLIT_WORDS)), unique_by=lambda word: SPLIT_WORDS[word.lower()]),
    st.lists(st.sampled_from(["case 1", "b", "2021"]), max_size=2),
    st.permutations(range(3)),
)
def test_random_words_in_any_order_and_case_are_found(
    images: str, masks: str, splits: list[str], rest: list[str], order: Sequence[int]
) -> None:
    splits = [word for word in splits if SPLIT_WORDS[word.lower()] != "train"]
    splits = [*splits, "Train"] if splits else [""]

    def path(role: str, split: str) -> str:
        parts = ([role], [split] if split else [], rest)
        return "/".join(itertools.chain.from_iterable(parts[i] for i in order))

    names = [f"{path(role, split)}/a.png" for split in splits for role in (images, masks)]
    pairs = found(*names)
    assert pairs is not None
    assert {(pair.images, pair.masks, pair.split) for pair in pairs} == {
        (path(images, split), path(masks, split), SPLIT_WORDS.get(split.lower()))
        for split in splits
    }


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("", Meaning(None, None)),
        ("images", Meaning("images", None)),
        ("a/Val/GT", Meaning("masks", "valid", ("a",))),
        ("left_images", Meaning(None, None, ("left_images",))),
        ("train_test", Meaning(None, None, ("train_test",))),
        ("train/test/masks", Meaning("masks", "train", ("test",))),
        ("labels/images", Meaning("images", None, ("masks",))),
    ],
)
def test_the_parts_of_a_path_have_a_meaning(path: str, expected: Meaning) -> None:
    assert meaning_of(path) == expected


@pytest.mark.parametrize(
    ("names", "images", "masks", "expected"),
    [
        (DRIVE, None, "training/1st_manual", [("training/images", "training/1st_manual", None)]),
        (DRIVE, "training/images/", "./training/mask", [("training/images", "training/mask",
                                                          None)]),
        (["x/a.png", "y/a.png", "z/a.png"], "x", "z", [("x", "z", None)]),
        (["train/p/images/a.png", "train/p/masks/a.png", "train/q/images/b.png",
          "train/q/masks/b.png"], "train/*/images/", "train/*/masks/",
         [("train/p/images", "train/p/masks", None), ("train/q/images", "train/q/masks", None)]),
        (["x/train/a.png", "y/train/a.png", "x/test/b.png", "y/test/b.png"], "x/*", "y/*",
         [("x/train", "y/train", "train"), ("x/test", "y/test", "test")]),
        (["a.jpg", "a.png"], "*.jpg", "*.png", [("", "", None, "*.jpg", "*.png")]),
        (["p/a_x.png", "p/a_y.png"], "p/*_x.*", "p/*_y.*", [("p", "p", None, "*_x.*", "*_y.*")]),
        (["a.png", "b_1.png"], ".", ".", [("", "", None)]),
        (["a.png", "old/gt/b.png", "lesions/a.png"], None, "lesions", [("", "lesions", None)]),
        (["s1/images/a.png", "s1/tumour/a.png", "s2/images/b.png", "s2/tumour/b.png"],
         None, "*/tumour", [("s1/images", "s1/tumour", None), ("s2/images", "s2/tumour", None)]),
        (["scans/a.png", "masks/a.png", "old/a.png"], "scans", None, [("scans", "masks", None)]),
        (["x/valid/images/a.png", "x/valid/masks/a.png", "x/test/images/b.png"],
         "x/valid/images", None, [("x/valid/images", "x/valid/masks", None)]),
    ],
)  # fmt: skip
def test_patterns_select_folders_and_files(
    names: list[str], images: str | None, masks: str | None, expected: list[tuple[str, str, None]]
) -> None:
    assert selected(names, images, masks) == [FolderPair(*each) for each in expected]


@pytest.mark.parametrize(
    ("images", "masks", "message"),
    [
        ("nothing", None, "--images 'nothing': no images there in SOURCE; folders with images: x/"),
        ("x", "*/masks", "--masks '*/masks': no masks there"),
        ("../x", None, "--images '../x': leaves SOURCE"),
        ("x/../..", None, "leaves SOURCE"),
        ("/x", None, "must be relative to SOURCE"),
        ("gs://bucket/x", None, "must be relative to SOURCE"),
        ("~/x", None, "must be relative to SOURCE"),
        ("", None, "must be relative to SOURCE"),
        ("**/x", None, "** is not supported"),
        ("[b-a]", None, "is not a pattern"),
        ("*", "y", "--images and --masks select 2 folders and 1 folder, and x/ has no partner"),
        ("x", None, "no folder of masks belongs to x/"),
        ("[xy]", "[zw]", "--images and --masks select 2 folders and 2 folders, and x/ has no"),
    ],
)
def test_a_wrong_pattern_says_what_is_wrong(images: str, masks: str | None, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        selected(["x/a.png", "y/a.png", "z/a.npz", "w/a.npz"], images, masks)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("names", "options", "expected"),
    [
        (DRIVE, FolderOptions(field_of_view="training/mask"),
         [("training/images", "training/1st_manual", None, None, None, "training/mask")]),
        (["x/images/a.png", "x/gt/a.png", "x/fov/a.png", "y/images/b.png", "y/gt/b.png",
          "y/fov/b.png"], FolderOptions(field_of_view="*/fov"),
         [("x/images", "x/gt", None, None, None, "x/fov"),
          ("y/images", "y/gt", None, None, None, "y/fov")]),
        (["images/a.png", "masks/a.png", "other/deep/a.png"],
         FolderOptions("images", "masks", "other/deep"),
         [("images", "masks", None, None, None, "other/deep")]),
        (["images/a.png", "gt/a.png", "gt/a_fov.png"], FolderOptions(field_of_view="gt/*_fov.png"),
         [("images", "gt", None, None, None, "gt", "*_fov.png")]),
    ],
)  # fmt: skip
def test_a_folder_of_the_field_of_view_is_selected(
    names: Sequence[str], options: FolderOptions, expected: list[tuple[str | None, ...]]
) -> None:
    folders = folders_of("SOURCE", names, IMAGE_ENDINGS, MASK_ENDINGS)
    assert choose_folders(folders, options) == tuple(FolderPair(*e) for e in expected)  # type: ignore[arg-type]


def test_a_field_of_view_must_belong_to_one_folder_of_images() -> None:
    names = ("x/images/a.png", "x/gt/a.png", "y/images/b.png", "y/gt/b.png", "x/fov/a.png")
    folders = folders_of("SOURCE", names, IMAGE_ENDINGS, MASK_ENDINGS)
    with pytest.raises(UsageError, match="--field-of-view selects 0 folders for y/images/; give"):
        choose_folders(folders, FolderOptions(field_of_view="x/fov"))
    more = folders_of(
        "SOURCE", [*names, "y/fov/b.png", "y/fov2/b.png"], IMAGE_ENDINGS, IMAGE_ENDINGS
    )
    with pytest.raises(UsageError, match="--field-of-view selects 2 folders for y/images/; give"):
        choose_folders(more, FolderOptions(field_of_view="*/fov*"))
    with pytest.raises(UsageError, match=r"^--field-of-view 'z': no masks there in SOURCE"):
        choose_folders(folders, FolderOptions(field_of_view="z"))


def make(root: Path, *names: str) -> str:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return str(root)


def paired(url: str, **options: str) -> dict[str, tuple[str | None, ...]]:
    """Returns the masks of each image of the source `url`, by path, and no rejects."""
    keys = ("images", "masks", "field_of_view")
    folders = FolderOptions(**{key: options.pop(key, None) for key in keys})
    sources = find_sources(url, None, folders)
    pairs, rejects = find_pairs(sources, None, PairOptions(**options))  # type: ignore[arg-type]
    assert rejects == []
    return {
        f"{pair.image_url.removeprefix(url)}/{pair.image_name}".lstrip("/"): tuple(
            f"{pair.mask_url.removeprefix(url)}/{name}".lstrip("/")
            for name in (pair.mask_name, *pair.more_masks)
            if name
        )
        for pair in pairs
    }


def test_a_found_layout_is_that_of_the_whole_folder_and_reads_no_subfolders(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    url = make(tmp_path, "a.png", "b.png", "labels/a_gt.png", "labels/b_gt.png", "old/c.png")
    assert paired(url) == {"a.png": ("labels/a_gt.png",), "b.png": ("labels/b_gt.png",)}
    line = f'{url}: images in /, masks in labels/, --mask-name "{{stem}}_gt": 2 pairs'
    assert line in caplog.messages


def test_the_search_for_folders_ends_at_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_folders, "_MAX_FILES", 4)
    url = make(tmp_path, "imgs/a.png", "imgs/b.png", "gt/a.png", "gt/b.png")
    assert paired(url) == {"imgs/a.png": ("gt/a.png",), "imgs/b.png": ("gt/b.png",)}
    make(tmp_path, "other/a.txt")
    with pytest.raises(UsageError, match=r"contains more than 4 files.*give a folder inside of it"):
        find_sources(url)
    usual = make(tmp_path / "usual", *(f"{each}/{n}.png" for each in ("images", "masks")
                                       for n in range(3)))  # fmt: skip
    assert len(find_pairs(find_sources(usual))[0]) == 3


def test_images_and_masks_in_one_folder_are_divided(tmp_path: Path) -> None:
    url = make(tmp_path, "a (1).png", "a (1)_mask.png", "a (2).png", "a (2)_mask.png")
    assert paired(url) == {
        "a (1).png": ("a (1)_mask.png",),
        "a (2).png": ("a (2)_mask.png",),
    }


def test_several_masks_in_one_folder_are_joined(tmp_path: Path) -> None:
    url = make(tmp_path, "a.png", "b.png", "a_mask.png", "a_mask_1.png", "b_mask.png")
    pairs, rejects = find_pairs(find_sources(url))
    assert [(pair.id, pair.mask_name) for pair in pairs] == [("a", "a_mask.png"),
                                                              ("b", "b_mask.png")]  # fmt: skip
    assert [reject.file for reject in rejects] == [f"{url}/a_mask_1.png"]
    assert rejects[0].reason.endswith('with --mask-name "{stem}_mask"')
    expected = {"a.png": ("a_mask.png", "a_mask_1.png"), "b.png": ("b_mask.png",)}
    assert paired(url, mask_name="{stem}_mask*") == expected


def test_endings_tell_images_and_masks_apart(tmp_path: Path) -> None:
    url = make(tmp_path, "a.jpg", "a.png", "b.jpg", "b.png")
    expected = {"a.jpg": ("a.png",), "b.jpg": ("b.png",)}
    assert paired(url, images="*.jpg", masks="*.png") == expected


def test_folders_of_one_image_have_masks_of_any_name(tmp_path: Path) -> None:
    url = make(tmp_path, "1/images/1.png", "1/masks/x.png", "1/masks/y.png", "2/images/2.png",
               "2/masks/z.png")  # fmt: skip
    expected = {"1/images/1.png": ("1/masks/x.png", "1/masks/y.png"),
                "2/images/2.png": ("2/masks/z.png",)}  # fmt: skip
    assert paired(url, mask_name="*") == expected


def test_splits_inside_of_the_usual_folders_are_found(tmp_path: Path) -> None:
    url = make(tmp_path, "images/train/a.png", "masks/train/a.png", "images/test/b.png",
               "masks/test/b.png")  # fmt: skip
    assert {pair.id: pair.split for pair in find_pairs(find_sources(url))[0]} == {
        "a": "train",
        "b": "test",
    }


def test_an_image_without_a_field_of_view_is_a_bad_file(tmp_path: Path) -> None:
    names = [f"{folder}/{n}{end}.png" for folder, end in (("images", "_i"), ("gt", ""), ("v", "_v"))
             for n in range(1, 5) if (folder, n) != ("v", 2)]  # fmt: skip
    url = make(tmp_path, *names, "v/9_v.png")
    pairs, rejects = find_pairs(find_sources(url, None, FolderOptions(field_of_view="v")))
    assert [(p.id, p.mask_name, p.view_url, p.view_name) for p in pairs] == [
        (f"{n}_i", f"{n}.png", f"{url}/v", f"{n}_v.png") for n in (1, 3, 4)
    ]
    assert [(reject.file, reject.reason) for reject in rejects] == [
        (f"{url}/gt/2.png", "its image has no field of view"),
        (f"{url}/images/2_i.png", f"no field of view of this name in {url}/v"),
    ]
    for name in names[-3:]:
        (tmp_path / name).rename((tmp_path / name).with_name(f"{name[2]}{name[2]}q.png"))
    with pytest.raises(ContentError, match=r"/v: no image has a mask of the same.*; rename the f"):
        find_pairs(find_sources(url, None, FolderOptions(field_of_view="v")))


def test_a_second_folder_of_masks_beside_the_usual_ones_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url = make(tmp_path, "images/a.png", "masks/a.png", "manual1/a.png", "test_images_old/a.png")
    assert paired(url) == {"images/a.png": ("masks/a.png",)}
    assert f"{url}: masks/ is used, not manual1/; choose with --masks" in caplog.messages


@real_data
@pytest.mark.parametrize(
    ("folder", "options", "count", "first"),
    [
        ("isbi-membrane", {}, 30, ("image/0.png", "label/0.png")),
        ("drive", {"masks": "training/1st_manual"}, 20,
         ("training/images/21_training.tif", "training/1st_manual/21_manual1.gif")),
        ("labelme/data_dataset_voc", {}, 3,
         ("JPEGImages/2011_000003.jpg", "SegmentationClass/2011_000003.png")),
        ("family/Leukocyte/dataset/Leukocyte",
         {"images": "*/*/images/", "masks": "*/*/masks/"}, 6,
         ("train/a/images/barrdistorted_101_0.3_0.3_baso_11.png",
          "train/a/masks/barrdistorted_101_0.3_0.3_baso_11.png")),
        ("family/Leukocyte/dataset/Leukocyte", {}, 6,
         ("train/a/images/barrdistorted_101_0.3_0.3_baso_11.png",
          "train/a/masks/barrdistorted_101_0.3_0.3_baso_11.png")),
        ("family/Tiled-IDRiD/dataset/Tiled-IDRiD-HardExudates", {}, 4,
         ("train/images/IDRiD_01.jpg", "train/masks/IDRiD_01_EX.jpg")),
    ],
)  # fmt: skip
def test_the_folders_of_real_data_are_found(
    folder: str, options: dict[str, str], count: int, first: tuple[str, str]
) -> None:
    pairs = paired(str(REAL / folder), **options)
    assert len(pairs) == count
    assert next(iter(pairs.items())) == (first[0], (first[1],))


@real_data
def test_the_masks_of_real_data_are_asked_for_if_there_are_two() -> None:
    with pytest.raises(UsageError, match=r"1st_manual/ and training/mask/ may be the masks"):
        find_sources(str(REAL / "drive"))
