import io
import os
import random
from pathlib import Path
from typing import Any, get_args

import pytest
from rich.console import Console

from data_prep.config import PrepConfig
from data_prep.sources.pairs import Source
from flexunet.errors import UsageError
from flexunet.settings import parse_settings
from job.compat.ini_mapping import ReferenceConfig, is_reference_config, read_reference_config
from job.compat.ini_reader import KeyNote, format_notes
from job.config import AugmentationConfig, MetricName, TrainConfig

INBREAST = (
    Path(__file__).resolve().parents[3]
    / "shared"
    / "data"
    / "inbreast-mini"
    / "train_eval_infer.config"
)
MINIMAL = """
[model]
model = "TensorFlowFlexUNet"
num_classes = 2
dropout_rate = 0.04
"""


def read(folder: Path, text: str) -> ReferenceConfig:
    path = folder / "train_eval_infer.config"
    path.write_text(text, encoding="utf-8")
    return read_reference_config(str(path))


def note_of(config: ReferenceConfig, key: str) -> KeyNote:
    (note,) = [note for note in config.notes if note.key == key]
    return note


def inbreast() -> ReferenceConfig:
    if not INBREAST.exists():
        pytest.skip("the INbreast configuration file is not beside the project")
    return read_reference_config(str(INBREAST))


def test_tiled_inference_becomes_windows(tmp_path: Path) -> None:
    text = '[tiledinfer]\noverlapping = 64\nimages_dir = "./large"\noutput_dir = "./masks"\n'
    config = read(tmp_path, MINIMAL + text)
    assert TrainConfig.model_validate(config.train).window_overlap == 64
    assert note_of(config, "tiledinfer.overlapping").detail == "window_overlap = 64"
    images = note_of(config, "tiledinfer.images_dir")
    assert (images.status, images.value) == ("mapped", '"./large"')
    assert "--window sliding" in images.detail
    assert "--window sliding" in note_of(config, "tiledinfer.output_dir").detail
    assert TrainConfig.model_validate(read(tmp_path, MINIMAL).train).window_overlap is None
    with pytest.raises(UsageError, match=r"line 7: tiledinfer\.overlapping"):
        read(tmp_path, MINIMAL + "[tiledinfer]\noverlapping = -1\n")


def test_inbreast_file_becomes_our_settings() -> None:
    train = inbreast().train
    # Copied by hand from the file; num_images 6 and everything it does not name are defaults.
    assert train["model"] == {
        "name": "flexunet",
        "image_channels": 3,
        "num_classes": 2,
        "base_filters": 16,
        "num_layers": 8,
        "base_kernels": [9, 9],
        "dilation": [1, 1],
        "dropout_rate": 0.04,
        "input_scaling": "none",
        "normalization": "none",
        "activation": "relu",
    }
    assert train["optimizer"] == {"name": "adam", "learning_rate": 0.00007, "clipvalue": 0.4}
    assert train["loss"] == {"name": "categorical_crossentropy"}
    assert train["schedule"] == {
        "early_stopping_patience": 10,
        "reduce_on_plateau": True,
        "reducer_factor": 0.4,
        "reducer_patience": 4,
        "min_learning_rate": 0.0,
    }
    assert train["metrics"] == ["dice_coef_multiclass"]
    assert (train["epochs"], train["global_batch_size"]) == (100, 2)
    assert train["prediction_images"] == 6


def test_inbreast_file_is_valid_for_the_settings_classes() -> None:
    config = inbreast()
    assert parse_settings(TrainConfig, config.train, "train").model.base_kernels == (9, 9)
    prep = parse_settings(PrepConfig, config.prep, "prep")
    assert prep.image_size == 512
    assert prep.classes == "background=0,0,0;class_1=255,255,255"


def test_inbreast_file_names_its_folders_from_its_own_place() -> None:
    config = inbreast()
    dataset = os.path.normpath(INBREAST.parent / "../../../dataset/INbreast")
    assert config.sources == tuple(
        Source(images=f"{dataset}/{split}/images", masks=f"{dataset}/{split}/masks", split=split)
        for split in ("train", "valid", "test")
    )
    assert config.infer_images == str(INBREAST.parent / "mini_test/images")


def test_inbreast_file_leaves_no_key_without_a_word() -> None:
    config = inbreast()
    lines = INBREAST.read_text(encoding="utf-8").splitlines()
    given = [line for line in lines if "=" in line and not line.startswith(";")]
    # Counted from the text itself, so that no key can be lost.
    assert len([note for note in config.notes if note.line]) == len(given)
    assert all(note.detail for note in config.notes)
    assert [note.key for note in config.notes if note.status == "unknown"] == []


def test_missing_keys_have_the_defaults_of_the_reference(tmp_path: Path) -> None:
    config = read(tmp_path, MINIMAL)
    assert config.train["model"]["base_filters"] == 16
    assert config.train["model"]["num_layers"] == 6
    assert config.train["model"]["base_kernels"] == [3, 3]
    assert config.train["model"]["input_scaling"] == "unit"
    assert config.train["optimizer"] == {"name": "adam", "learning_rate": 0.0001, "clipvalue": 0.2}
    assert config.train["schedule"]["reduce_on_plateau"] is False
    assert config.train["global_batch_size"] == 4
    assert config.train["prediction_images"] == 0
    assert config.prep == {"image_size": 512}
    assert config.sources == ()
    assert config.infer_images is None
    note = note_of(config, "model.num_layers")
    assert (note.status, note.value, note.line) == ("default", "6", 0)


def test_comments_and_trailing_commas_are_read_as_the_family_writes_them(tmp_path: Path) -> None:
    config = read(
        tmp_path,
        """; train_eval_infer.config
# another comment
[model]
model = "TensorFlowFlexUNet" ; the network
num_classes    = 3      ;1+2
dropout_rate: 0.04
base_kernels = (9,9,)   # odd
[infer]
images_dir = "./mini;test/#1"   ; a semicolon in quotes is no comment
[mask]
rgb_map = {(0,0,0):0,
           (0,255,0):1, ; green
   (255,0,0):2,}
""",
    )
    assert config.train["model"]["base_kernels"] == [9, 9]
    assert config.train["model"]["dropout_rate"] == 0.04
    assert config.prep["classes"] == "background=0,0,0;class_1=0,255,0;class_2=255,0,0"
    assert config.infer_images == str(tmp_path / "mini;test/#1")


def test_interpolation_is_off(tmp_path: Path) -> None:
    config = read(tmp_path, MINIMAL + '[infer]\nimages_dir = "./100%(model)s"\n')
    assert config.infer_images == str(tmp_path / "100%(model)s")


def test_comments_in_another_encoding_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "a.ini"
    path.write_bytes(b"\xef\xbb\xbf; \x8a\xc5\x8e\x8e\n" + MINIMAL.encode())
    assert read_reference_config(str(path)).train["model"]["num_classes"] == 2
    path.write_bytes(MINIMAL.encode() + b'[infer]\nimages_dir = "\x8a\xc5"\n')
    with pytest.raises(UsageError, match=r"line 7: infer\.images_dir.*not UTF-8"):
        read_reference_config(str(path))


@pytest.mark.parametrize(
    ("text", "key", "suggested"),
    [
        ("[train]\npoch_change_infer = True\n", "train.poch_change_infer", "'epoch_change_infer'"),
        ('[mask]\nmask_datatyoe = "categorized"\n', "mask.mask_datatyoe", "'mask_datatype'"),
        ("[train]\nbase_filters = 32\n", "train.base_filters", "belongs in [model]"),
        ("[trian]\nepochs = 3\n", "trian.epochs", "'train'"),
        ("[train]\nxyzzy = 3\n", "train.xyzzy", "known: "),
        # Nothing reads the value, so it may be anything, but it is never executed.
        ("[train]\nxyzzy = open('EXECUTED', 'w')\n", "train.xyzzy", "known: "),
        ("[train]\nxyzzy = [1, 2\nepochs = 3\n", "train.xyzzy", "known: "),
    ],
)
def test_misspelt_keys_are_reported_and_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, key: str, suggested: str
) -> None:
    monkeypatch.chdir(tmp_path)
    note = note_of(read(tmp_path, MINIMAL + text), key)
    assert note.status == "unknown"
    assert suggested in note.detail
    assert note.line == 7
    assert not (tmp_path / "EXECUTED").exists()


def test_keys_without_effect_are_reported_with_a_reason(tmp_path: Path) -> None:
    config = read(
        tmp_path,
        MINIMAL
        + """show_summary = True
[train]
save_weights_only = True
num_infer_images = 3
[augmentor]
hflip = True
""",
    )
    assert note_of(config, "model.show_summary").status == "not used"
    assert "no effect" in note_of(config, "train.save_weights_only").detail
    assert note_of(config, "train.num_infer_images").detail == "train.epoch_change_infer is False"
    assert note_of(config, "augmentor.hflip").detail == "model.generator is False"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        # Code is refused, whatever the key.
        ("epochs = __import__('os').system('touch EXECUTED')", r"line 7: train\.epochs = __imp"),
        ("images_dir = open('EXECUTED', 'w')", r"train\.images_dir = open.*not a literal"),
        ("epochs = 10**9", r"train\.epochs = 10\*\*9: not a literal"),
        ("epochs = (lambda: 1)()", "not a literal"),
        ("epochs = [x for x in (1,)]", "not a literal"),
        ("epochs = f'{1}'", "not a literal"),
        # Broken or of the wrong kind.
        ("epochs = ", r"line 7: train\.epochs = : not a literal"),
        ("epochs = 1 2", "not a literal"),
        (
            "epochs = " + "(" * 1000,
            r"the bracket \( of `\(` is not closed; write \) at its end",
        ),
        ("epochs = 1)", r"the bracket \) after `1` closes nothing"),
        ("metrics = ['dice_coef]", "the quote ' is not closed"),
        ("base_filters = 1\nmetrics = ['a' 1]", "not a literal"),
        ("epochs = " + "9" * 5000, "longer than 4096 characters"),
        ("epochs = 'ten'", r"train\.epochs = 'ten': expected a whole number of at least 1"),
        ("epochs = True", "expected a whole number"),
        ("epochs = 0", "of at least 1"),
        ("reducer_factor = 1e999", "expected a number"),
        ("learning_rate_reducer = 1", "expected True or False"),
        ("metrics = ['dice_coeff']", r"unknown; did you mean 'dice_coef'\?"),
        ("images_dir = 3", "expected a folder in quotes"),
        ("images_dir = './a'", r"train\.masks_dir is missing"),
        (r"images_dir = '..\data\train'", "write folders with /"),
        ("epochs = 1 is 1", "not a literal"),
        # Not INI.
        ("epochs", "line 7: epochs: expected"),
        ("epochs = 1\nepochs = 2", r"line 8: train\.epochs is already in line 7"),
        ("[train]", r"line 7: \[train\] is already in line 6"),
        (
            "epochs = [1, 2\npatience = 3",
            r"line 7: train\.epochs = \[1, 2: the bracket \[ of `\[1, 2` is not closed; write \]",
        ),
    ],
)
def test_bad_values_are_refused_with_their_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=message) as caught:
        read(tmp_path, MINIMAL + "[train]\n" + text + "\n")
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 1000 + len(str(tmp_path))
    assert not (tmp_path / "EXECUTED").exists()


FULL = (
    MINIMAL
    + """generator = True
base_kernels = (9,9)
metrics = ["dice_coef_multiclass"]
[train]
epochs = 100
images_dir = "../dataset/train/images/"
masks_dir = "../dataset/train/masks/"
poch_change_infer = True
[mask]
mask_datatyoe = "categorized"
rgb_map = {(0,0,0):0,(255,255,255):1,}
[augmentor]
angles = [90, 180,]
[deformation]
alpah = 1300
"""
)


def mutated(text: str, chance: random.Random) -> str:
    """Returns `text` with one or two accidents: cuts, doubled lines, strange characters, code."""
    odd = [
        "(",
        ")",
        "{",
        "'",
        '"',
        ";",
        "#",
        "[",
        "=",
        "\\",
        "\x00",
        "\u2028",
        "\r",
        "%(x)s",
        "1e999",
    ]
    odd += ["__import__('os').system('touch EXECUTED')", "None", "\n  ", "9" * 5000, "-", "\ufffd"]
    for _ in range(chance.randint(1, 2)):
        start = chance.randrange(len(text))
        end = start + chance.choice([0, 1, 3, 40])
        insert = chance.choice([*odd, text[start:end] * 2, ""])
        text = text[:start] + insert + text[end:]
    return text


def test_odd_files_are_read_or_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    chance = random.Random(7)
    num_read = 0
    for _ in range(1500):
        text = mutated(FULL, chance)
        try:
            config = read(tmp_path, text)
        except UsageError as error:
            assert len(str(error).splitlines()) == 1, text
        else:
            num_read += 1
            assert all(note.detail for note in config.notes), text
    # Some accidents leave a file that can be read, most do not.
    assert 50 < num_read < 1450
    assert not (tmp_path / "EXECUTED").exists()


@pytest.mark.parametrize(
    ("rgb_map", "message"),
    [
        (
            "{(0,0,0):0,(255,255,255):1)",
            r"the bracket \{ of `\{\(0,0,0\):0,\(` is closed by \) after `5,255,255\):1`; write",
        ),
        (
            "{(0,0,0):0,(255,255,255:1}\nmask_file_format = '.png'",
            r"the bracket \( of `\(255,255,255` is closed by \} after `55,255,255:1`; write \) ",
        ),
        (
            "{(0,0,0):0,(255,255,255):1\nblur = True",
            r"the bracket \{ of .* is not closed; write \}",
        ),
        ("{(0,0,0):0 (255,255,255):1}", r"not a literal .*; the first error is at `:1}`"),
        ("{(0,0,0):0,(255,255,255):1,(9,9,9):2}", "3 classes, but model.num_classes = 2"),
        ("{(0,0,0):0,(255,255,255):2}", r"classes must be 0\.\.1, got \[0, 2\]"),
        ("{(0,0,0):0,(255,255,255):0}", "class 0 has two colours"),
        ("{(0,0,0):0,(0,0,0):1}", "the dict has a key twice"),
        ("{(0,0,0):0,(0,0,256):1}", r"expected 0\.\.255"),
        ("{(0,0):0,(0,0,255):1}", r"expected \(r,g,b\)"),
        ("[(0,0,0)]", "expected {"),
    ],
)
def test_colour_maps_that_contradict_are_refused(
    tmp_path: Path, rgb_map: str, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        read(tmp_path, MINIMAL + f"[mask]\nrgb_map = {rgb_map}\n")


def test_a_broken_colour_map_names_what_the_reference_takes_instead(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"\{\(0,0,0\):0,\(0,255,0\):1,\(255,0,0\):2,\(0,0,255\):3\}"
    ):
        read(tmp_path, MINIMAL + "[mask]\nrgb_map = {(0,0,0):0,(255,255,255):1)\n")


def test_a_colour_map_goes_on_after_a_backslash_or_an_indent(tmp_path: Path) -> None:
    expected = "background=0,0,0;class_1=9,9,9"
    for text in (
        "rgb_map = {(0,0,0):0,\\\n(9,9,9):1}",
        "rgb_map = {(0,0,0):0, \\\n   (9,9,9):1\n   }",
        "rgb_map =\n    {(0,0,0):0,\n  (9,9,9):1}",
    ):
        assert read(tmp_path, MINIMAL + f"[mask]\n{text}\n").prep["classes"] == expected


def test_color_map_is_another_name_of_rgb_map(tmp_path: Path) -> None:
    text = MINIMAL + "[mask]\ncolor_map = {(0,0,0):0,(9,9,9):1}\n"
    config = read(tmp_path, text)
    assert config.prep["classes"] == "background=0,0,0;class_1=9,9,9"
    assert note_of(config, "mask.color_map").status == "mapped"
    both = read(tmp_path, text + "rgb_map = {(0,0,0):0,(8,8,8):1}\n")
    assert both.prep["classes"] == "background=0,0,0;class_1=8,8,8"
    assert note_of(both, "mask.color_map").detail == "the key that takes effect is rgb_map"
    with pytest.raises(UsageError, match=r"mask\.color_map = .*The reference implementation"):
        read(tmp_path, MINIMAL + "[mask]\ncolor_map = {(0,0,0):0,(9,9,9):1\n")


def test_sections_that_training_never_reads_may_hold_anything(tmp_path: Path) -> None:
    text = (
        "[infer3d]\nslice_rotation = cv2.ROTATE_90_CLOCKWISE\nslice_resize = (512,512)\n"
        "[infer]\nnpy_slice_index = 3\n[tiledinfer]\nsplit_size = 512\n"
    )
    config = read(tmp_path, MINIMAL + text)
    broken = note_of(config, "infer3d.slice_rotation")
    assert broken.status == "not used"
    assert "line 7: infer3d.slice_rotation = cv2.ROTATE_90_CLOCKWISE: not a lit" in broken.problem
    assert [note.key for note in config.notes if note.problem] == ["infer3d.slice_rotation"]
    assert {note.status for note in config.notes if note.line > 6} == {"not used"}


def test_augmentation_that_is_off_may_have_broken_values(tmp_path: Path) -> None:
    text = "[augmentor]\nangles = [90. 180, 270,]\nshrinks = 'no'\n"
    config = read(tmp_path, MINIMAL + text)
    assert config.train["augmentation"] == {"enabled": False}
    problem = note_of(config, "augmentor.angles").problem
    assert "angles = [90. 180, 270,]: not a literal: a comma is missing in `90. 180`" in problem
    assert "expected a list" in note_of(config, "augmentor.shrinks").problem
    with pytest.raises(UsageError, match=r"line 8: augmentor\.angles = .*a comma is missing"):
        read(tmp_path, MINIMAL + "generator = True\n" + text)


def test_weights_of_the_hybrid_metric_are_read_where_it_is_used(tmp_path: Path) -> None:
    text = MINIMAL + 'metrics = ["dice_coef_hybrid"]\n'
    assert read(tmp_path, text).train["hybrid_weights"] == [1.5, 0.5]
    given = read(tmp_path, text + "hybrid_alpha = 1.6\nhybrid_beta = 0.4\n")
    assert parse_settings(TrainConfig, given.train, "train").hybrid_weights == (1.6, 0.4)
    assert note_of(given, "model.hybrid_beta").detail == "hybrid_weights = 1.6,0.4"
    with pytest.raises(UsageError, match=r"line 7: model\.hybrid_alpha .*2\.1; they must add up"):
        read(tmp_path, text + "hybrid_alpha = 1.6\n")
    unused = read(tmp_path, MINIMAL + "hybrid_alpha = 'a'\n")
    assert "hybrid_weights" not in unused.train
    assert note_of(unused, "model.hybrid_alpha").detail == "no metric is dice_coef_hybrid"


@pytest.mark.parametrize(("num_channels", "prep"), [(1, "grey"), (3, None), (4, None), (64, None)])
def test_any_number_of_channels_is_read(
    tmp_path: Path, num_channels: int, prep: str | None
) -> None:
    config = read(tmp_path, MINIMAL + f"image_channels = {num_channels}\n")
    assert config.train["model"]["image_channels"] == num_channels
    assert config.prep.get("channels") == prep
    with pytest.raises(
        UsageError, match=r"image_channels = 65: expected 1 \(grey\), 3 \(RGB\), or"
    ):
        read(tmp_path, MINIMAL + "image_channels = 65\n")


FAMILY = sorted(
    [
        *(INBREAST.parents[1] / "family-configs").glob("*.config"),
        *(INBREAST.parents[1] / "family").glob("*/projects/*/*/*.config"),
    ]
)


@pytest.mark.skipif(not FAMILY, reason="the projects are not beside this project")
@pytest.mark.parametrize("path", FAMILY, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_files_of_the_family_are_read_as_they_are(path: Path) -> None:
    config = read_reference_config(str(path))
    parse_settings(TrainConfig, config.train, "train")
    prep = parse_settings(PrepConfig, config.prep, "prep")
    assert prep.classes.count("=") == config.train["model"]["num_classes"]
    assert {source.split for source in config.sources} == {"train", "valid", "test"}
    assert {note.key for note in config.notes if note.status == "unknown"} <= {"mask.mask_datatyoe"}
    assert all(note.detail for note in config.notes)


def test_unregistered_models_are_refused_with_the_registered_ones(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"TensorFlowTransUNet.*registered: TensorFlowFlexUNet"):
        read(tmp_path, '[model]\nmodel = "TensorFlowTransUNet"\n')


@pytest.mark.parametrize("key", ["model", "num_classes", "dropout_rate"])
def test_required_keys_are_named(tmp_path: Path, key: str) -> None:
    kept = [line for line in MINIMAL.splitlines() if not line.startswith(f"{key} ")]
    with pytest.raises(UsageError, match=rf"model\.{key} is required"):
        read(tmp_path, "\n".join(kept))


def test_names_of_losses_metrics_and_layers_are_mapped(tmp_path: Path) -> None:
    train = read(
        tmp_path,
        MINIMAL
        + """loss = "bce_dice_loss"
metrics = ["dice_coef"]
optimizer = "AdamW"
clipvalue = None
normalization = True
activation = "mish"
image_channels = 1
[train]
metrics = ["dice_coef", "val_dice_coef", "iou_coef", "val_iou_coef"]
patience = -1
""",
    ).train
    assert train["loss"]["name"] == "bce_dice"
    assert train["metrics"] == ["dice_coef", "iou_coef"]
    assert train["optimizer"]["name"] == "adamw"
    assert train["optimizer"]["clipvalue"] is None
    assert train["model"]["normalization"] == "batch"
    assert train["model"]["activation"] == "mish"
    assert train["schedule"]["early_stopping_patience"] == 0


def test_sizes_and_channels_go_to_the_dataset(tmp_path: Path) -> None:
    text = "image_width = 256\nimage_height = 512\nimage_channels = 1\n"
    assert read(tmp_path, MINIMAL + text).prep == {
        "image_width": 256,
        "image_height": 512,
        "channels": "grey",
    }


def test_one_class_is_a_sigmoid_over_two_kinds_of_pixels(tmp_path: Path) -> None:
    text = MINIMAL.replace("num_classes = 2", 'num_classes = 1\nfinal_activation = "sigmoid"')
    config = read(tmp_path, text + "[mask]\nrgb_map = {(0,0,0):0,(255,0,0):1}\n")
    assert config.train["model"]["num_classes"] == 1
    assert config.prep["classes"] == "background=0,0,0;class_1=255,0,0"


def test_older_names_of_folders_are_read(tmp_path: Path) -> None:
    text = '[train]\nimage_datapath = "a/images"\nmask_datapath = "gs://bucket/masks/"\n'
    assert read(tmp_path, MINIMAL + text).sources == (
        Source(images=str(tmp_path / "a/images"), masks="gs://bucket/masks/", split="train"),
    )


def test_predictions_after_an_epoch_use_the_folder_where_it_exists(tmp_path: Path) -> None:
    text = MINIMAL + (
        '[infer]\nimages_dir = "./mini"\n[train]\nepoch_change_infer = True\nnum_infer_images = 3\n'
    )
    without = read(tmp_path, text)
    assert without.train["prediction_images"] == 3
    assert "prediction_folder" not in without.train
    assert "does not exist" in note_of(without, "infer.images_dir").detail
    (tmp_path / "mini").mkdir()
    assert read(tmp_path, text).train["prediction_folder"] == str(tmp_path / "mini")


AUGMENTOR = """
[generator]
debug = False
augmentation = True
[augmentor]
vflip = False
hflip = True
rotation = True
angles = [90, 270,]
shrinks = [0.6, 0.8]
shears = []
deformation = True
distortion = False
barrdistortion = True
[deformation]
alpah = 1100
sigmoid = 9
[distortion]
distortions = [0.03]
[barrdistortion]
radius = 0.3
amount = 0.3
centers = [(0.3, 0.3), (0.7, 0.5)]
"""


def test_augmentation_is_mapped_when_the_generator_is_on(tmp_path: Path) -> None:
    config = read(tmp_path, MINIMAL + "generator = True\n" + AUGMENTOR)
    assert config.train["augmentation"] == {
        "enabled": True,
        "hflip_probability": 0.5,
        "vflip_probability": 0.0,
        "rotation_probability": 0.5,
        "rotation_angles": [90.0, 270.0],
        "shrink_probability": 0.25,
        "shrink_ratios": [0.6, 0.8],
        "shear_probability": 0.0,
        "deformation_probability": 0.25,
        "deformation_alpha": 1100.0,
        "deformation_sigmas": [9.0],
        "distortion_probability": 0.0,
        "sharpening_probability": 0.0,
        "brightening_probability": 0.0,
        "barrel_probability": 0.25,
        "barrel_radius": 0.3,
        "barrel_amount": 0.3,
        "barrel_centers": [0.3, 0.3, 0.7, 0.5],
        "pincushion_probability": 0.0,
    }
    assert parse_settings(TrainConfig, config.train, "train").augmentation.enabled
    assert note_of(config, "distortion.distortions").detail == "augmentor.distortion is False"
    assert note_of(config, "augmentor.shrinks").detail == (
        "augmentation.shrink_probability = 0.25 of 0.6,0.8"
    )


EVERYTHING = """
[generator]
augmentation = True
[augmentor]
vflip = True
hflip = True
rotation = True
angles = [5, 355]
shrinks = [0.7]
shears = [0.2]
deformation = True
distortion = True
sharpening = True
brightening = True
barrdistortion = True
pincdistortion = True
[deformation]
alpha = 1300
sigmoids = [7.0, 9.0]
[distortion]
gaussian_filter_rsigma = 30
gaussian_filter_sigma = 0.5
distortions = [0.02, 0.03]
[sharpening]
k = 2
[brightening]
alpha = 1.1
beta = 5
[barrdistortion]
radius = 0.4
amount = 0.3
centers = [(0.3, 0.3), (0.7, 0.7)]
[pincdistortion]
radius = 0.2
amount = -0.3
centers = [(0.5, 0.4)]
"""


def test_every_kind_of_augmentation_is_mapped(tmp_path: Path) -> None:
    config = read(tmp_path, MINIMAL + "generator = True\n" + EVERYTHING)
    ours = parse_settings(TrainConfig, config.train, "train").augmentation
    # Flips and rotation 0.5, every other kind 0.25; the amounts are those of the text above.
    assert ours.model_dump() == AugmentationConfig().model_dump() | {
        "enabled": True,
        "hflip_probability": 0.5,
        "vflip_probability": 0.5,
        "rotation_probability": 0.5,
        "rotation_angles": (5.0, 355.0),
        "shrink_probability": 0.25,
        "shrink_ratios": (0.7,),
        "shear_probability": 0.25,
        "shear_factors": (0.2,),
        "deformation_probability": 0.25,
        "deformation_alpha": 1300.0,
        "deformation_sigmas": (7.0, 9.0),
        "distortion_probability": 0.25,
        "distortion_sigma": 30.0,
        "distortion_sizes": (0.02, 0.03),
        "barrel_probability": 0.25,
        "barrel_radius": 0.4,
        "barrel_amount": 0.3,
        "barrel_centers": (0.3, 0.3, 0.7, 0.7),
        "pincushion_probability": 0.25,
        "pincushion_radius": 0.2,
        "pincushion_amount": -0.3,
        "pincushion_centers": (0.5, 0.4),
        "sharpening_probability": 0.25,
        "sharpening_k": 2.0,
        "brightening_probability": 0.25,
        "brightening_alpha": 1.1,
        "brightening_beta": 5.0,
    }
    unused = note_of(config, "distortion.gaussian_filter_sigma")
    assert unused.status == "not used"
    assert "gaussian_filter_rsigma" in unused.detail
    assert {note.status for note in config.notes if note.line} == {"mapped", "not used"}


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("categorical_crossentropy", "categorical_crossentropy"),
        ("dice_loss", "dice"),
        ("bce_dice_loss", "bce_dice"),
        ("iou_loss", "iou"),
        ("bce_iou_loss", "bce_iou"),
        ("basnet_hybrid_loss", "basnet_hybrid"),
        ("dice_loss_multiclass", "dice_multiclass"),
        ("categorical_focal_dice_loss", "categorical_focal_dice"),
        ("dice_loss_foreground", "dice_foreground"),
    ],
)
def test_every_loss_is_valid_here(tmp_path: Path, theirs: str, ours: str) -> None:
    config = read(tmp_path, MINIMAL + f'loss = "{theirs}"\n')
    assert parse_settings(TrainConfig, config.train, "train").loss.name == ours


@pytest.mark.parametrize("name", get_args(MetricName))
def test_every_metric_is_valid_here(tmp_path: Path, name: str) -> None:
    config = read(tmp_path, MINIMAL + f'metrics = ["{name}", "val_{name}"]\n')
    assert parse_settings(TrainConfig, config.train, "train").metrics == (name,)


def test_augmentation_defaults_are_those_of_the_reference(tmp_path: Path) -> None:
    augmentation = read(tmp_path, MINIMAL + "generator = True\n").train["augmentation"]
    on = {name for name, value in augmentation.items() if "probability" in name and value}
    assert on == {f"{kind}_probability" for kind in ("hflip", "vflip", "rotation", "shrink")}
    assert augmentation["rotation_angles"] == [90.0, 180.0, 270.0]
    assert augmentation["shrink_ratios"] == [0.8]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (AUGMENTOR, "model.generator is False"),
        (
            "generator = True\n" + AUGMENTOR.replace("augmentation = True", "augmentation = False"),
            "generator.augmentation is False",
        ),
    ],
)
def test_augmentation_that_is_off_is_reported_key_by_key(
    tmp_path: Path, text: str, reason: str
) -> None:
    config = read(tmp_path, MINIMAL + text)
    assert config.train["augmentation"] == {"enabled": False}
    assert note_of(config, "augmentor.shrinks").detail == reason
    assert note_of(config, "deformation.alpah").detail == reason
    # Off for two reasons: the outer one is named.
    assert note_of(config, "distortion.distortions").detail == reason
    assert not any(note.key.startswith("augmentor") and not note.line for note in config.notes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[augmentor]\nangles = []", r"augmentor\.angles = \[\]: expected one or more numbers"),
        ("[augmentor]\nshrinks = 0.8", r"augmentor\.shrinks = 0\.8: expected a list of numbers"),
        (
            "[augmentor]\nbarrdistortion = True\n[barrdistortion]\ncenters = [(0.5,)]",
            r"expected a list of \(x,y\)",
        ),
    ],
)
def test_augmentation_values_of_the_wrong_kind_are_refused(
    tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        read(tmp_path, MINIMAL + "generator = True\n" + text + "\n")


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.config: cannot be read: No such file"):
        read_reference_config(str(tmp_path / "none.config"))
    (tmp_path / "big.config").write_bytes(b";" * 1_000_001)
    with pytest.raises(UsageError, match="larger than"):
        read_reference_config(str(tmp_path / "big.config"))


@pytest.mark.parametrize(
    ("path", "expected"),
    [("a/train_eval_infer.config", True), ("A.INI", True), ("a.yaml", False), ("config", False)],
)
def test_is_reference_config_goes_by_the_name(path: str, expected: bool) -> None:
    assert is_reference_config(path) is expected


def printed(value: Any, width: int = 200) -> str:
    file = io.StringIO()
    Console(width=width, file=file).print(value)
    return file.getvalue()


def test_format_notes_fits_100_columns_and_starts_with_what_is_wrong(tmp_path: Path) -> None:
    text = MINIMAL + "[train]\npoch_change_infer = [0.8]\nxyzzy = '[red]" + "x" * 300 + "'\n"
    notes = read(tmp_path, text).notes
    table = printed(format_notes(notes))
    assert max(len(line) for line in table.splitlines()) <= 100
    # Nothing is cut off on a narrow terminal: the words go on in the next line.
    narrow = "".join(line[-24:].strip() for line in printed(format_notes(notes), 80).splitlines())
    assert "epoch_change_infer" in narrow
    rows = [line for line in table.splitlines() if "." in line]
    assert "poch_change_infer" in rows[0]
    assert "[0.8]" in rows[0]
    assert "'[red]xxx" in table


def test_format_notes_joins_unused_keys_of_a_section(tmp_path: Path) -> None:
    text = "[infer3d]\nvideo_fps = 10\nmask_overlay = True\nslice_rotation = cv2.X\n"
    table = printed(format_notes(read(tmp_path, MINIMAL + text).notes))
    rows = [line for line in table.splitlines() if "not used" in line]
    assert ["infer3d: video_fps," in rows[0], "2 keys" in rows[0]] == [True, True]
    assert "infer3d.slice_rotation" in rows[1]  # a value that cannot be read has its own row
