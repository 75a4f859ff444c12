"""A project of the reference family trains from its own file, found from anywhere."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from data_prep.config import PrepConfig
from data_prep.shards.manifest import read_manifest
from flexunet.errors import ContentError, StoppedError, UsageError
from flexunet.settings import flag_of
from flexunet.storage import open_store
from job.compat.ini_prep import prep_config
from job.config import TrainConfig
from job.planning.options import resolve_config
from job.train import command, main
from launcher.commands.train import command as launch_command
from tests.job.discs import write_discs

CONFIG = """\
; train_eval_infer.config
[model]
model         = "TensorFlowFlexUNet"
generator     = False
image_width   = 32
image_height  = 32
image_channels = 3
input_normalize = True
num_classes   = 2
base_filters  = 4
base_kernels  = (3,3)
num_layers    = 3
dropout_rate  = 0.04
learning_rate = 0.001
loss          = "categorical_crossentropy"
metrics       = ["dice_coef_multiclass"]
[train]
epochs        = 1
batch_size    = 2
metrics       = ["dice_coef_multiclass", "val_dice_coef_multiclass"]
model_dir     = "./models/"
images_dir    = "../../../dataset/Discs/train/images/"
masks_dir     = "../../../dataset/Discs/train/masks/"
poch_change_infer = True
[valid]
images_dir    = "../../../dataset/Discs/valid/images/"
masks_dir     = "../../../dataset/Discs/valid/masks/"
[test]
images_dir    = "../../../dataset/Discs/test/images/"
masks_dir     = "../../../dataset/Discs/test/masks/"
[mask]
mask_file_format = ".png"
rgb_map = {(0,0,0):0,(255,255,255):1,}
"""
FOLDERS = re.compile(r"^(images|masks)_dir.*\n", re.MULTILINE)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Returns the file of a project: 4 training, 2 validation and 2 test pictures."""
    for seed, (split, num_images) in enumerate({"train": 4, "valid": 2, "test": 2}.items()):
        folder = tmp_path / "dataset" / "Discs" / split
        write_discs(folder, num_images=num_images, seed=seed)
        for path in folder.glob("*/*.png"):
            path.rename(path.with_name(f"{split}-{path.name}"))
    config = tmp_path / "projects" / "TensorFlowFlexUNet" / "Discs" / "train_eval_infer.config"
    config.parent.mkdir(parents=True)
    config.write_text(CONFIG)
    return config


def leak(project: Path) -> None:
    """Files a training picture as a test picture too."""
    dataset = project.parents[3] / "dataset" / "Discs"
    for kind in ("images", "masks"):
        data = (dataset / "train" / kind / "train-disc-00.png").read_bytes()
        (dataset / "test" / kind / "copy.png").write_bytes(data)


def test_a_project_trains_with_nothing_but_its_file(project: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "job.train", "--local", "--config", str(project)],
        cwd=elsewhere,
        env=os.environ | {"PYTHONPATH": str(root), "COLUMNS": "120"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    # Every key of the file is accounted for; the misspelt one is named with the right spelling.
    (misspelt,) = [line for line in done.stderr.splitlines() if "train.poch_change_infer" in line]
    assert "unknown" in misspelt
    assert "did you mean 'epoch" in misspelt
    # The dataset lies beside the run, and the end says where the run is.
    assert (elsewhere / "runs" / "discs-dataset" / "dataset.json").is_file()
    run = elsewhere / "runs" / "discs"
    assert f"run: {run}\n" in done.stdout
    # The tables have the form of the reference implementation's.
    losses = (run / "metrics" / "train_losses.csv").read_text().splitlines()
    assert losses[0] == "epoch, loss, val_loss"
    assert re.fullmatch(r"0, \d+\.\d{4}, \d+\.\d{4}", losses[1])
    metrics = (run / "metrics" / "train_metrics.csv").read_text().splitlines()
    assert metrics[0] == "epoch,dice_coef_multiclass,val_dice_coef_multiclass,"
    evaluation = (run / "evaluation" / "evaluation.csv").read_text().splitlines()
    names = [re.split(r",\s*", line)[0] for line in evaluation]
    assert names == ["categorical_crossentropy", "dice_coef_multiclass"]
    for name in ("metrics/train_losses.png", "config.yaml", "outcome.json"):
        assert (run / name).stat().st_size > 0, name


def test_without_image_folders_a_dataset_must_be_given(
    project: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    project.write_text(FOLDERS.sub("", CONFIG))
    with pytest.raises(UsageError, match=r"\[train\] names no images_dir.*--data DATASET"):
        resolve_config({"output": str(tmp_path / "runs")}, str(project))
    capsys.readouterr()
    assert main(["--local", "--config", str(project), "--output", str(tmp_path / "runs")]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"flexunet train: {project}: no da")
    config = resolve_config({"data": "/data/discs"}, str(project))
    assert (config.data, config.name) == ("/data/discs", "discs")


def test_folders_that_are_missing_are_named(project: Path, tmp_path: Path) -> None:
    (tmp_path / "dataset" / "Discs").rename(tmp_path / "dataset" / "Other")
    with pytest.raises(UsageError, match=r"Discs/train/images.*missing or empty"):
        resolve_config({"output": str(tmp_path / "runs")}, str(project))


def test_masks_without_a_colour_map_are_not_prepared(project: Path, tmp_path: Path) -> None:
    text = CONFIG.replace("rgb_map = {(0,0,0):0,(255,255,255):1,}", "")
    project.write_text(text.replace("num_classes   = 2", "num_classes   = 3"))
    with pytest.raises(UsageError, match=r"mask\.rgb_map is missing; .*of the 3 classes"):
        resolve_config({"output": str(tmp_path / "runs")}, str(project))
    assert not (tmp_path / "runs").exists()


def test_splits_that_leak_are_refused_until_they_are_accepted(
    project: Path, tmp_path: Path
) -> None:
    leak(project)
    options = {"output": str(tmp_path / "runs")}
    with pytest.raises(ContentError, match=r"train-disc-00.*copy.*the leaks with --allow-leaks"):
        resolve_config(options, str(project), {"num_processes": 1})
    accepting = {"allow_leaks": True, "num_processes": 1}
    config = resolve_config(options, str(project), accepting)
    assert config.data == str(tmp_path / "runs" / "discs-dataset")
    assert '"leaky": true' in (Path(config.data) / "dataset.json").read_text()


def test_bad_images_can_be_left_out(project: Path, tmp_path: Path) -> None:
    (tmp_path / "dataset" / "Discs" / "train" / "masks" / "train-disc-00.png").unlink()
    options = {"output": str(tmp_path / "runs")}
    with pytest.raises(ContentError, match=r"train-disc-00.*--skip-bad"):
        resolve_config(options, str(project), {"num_processes": 1})
    skipping = {"skip_bad": True, "num_processes": 1}
    config = resolve_config(options, str(project), skipping)
    rejects = (Path(str(config.data)) / "report" / "rejects.csv").read_text()
    assert "train-disc-00.png" in rejects


def test_every_option_of_preparation_is_an_option_of_training() -> None:
    flags = {flag for each in command.params for flag in each.opts}
    expected = {flag_of([name]) for name in PrepConfig.model_fields}
    # The only name that means something else in training.
    assert expected - {"--seed"} <= flags
    assert set(PrepConfig.model_fields) & set(TrainConfig.model_fields) == {"seed"}
    assert {"--prep.seed", "--seed", "--no-skip-bad"} <= flags | {
        flag for each in command.params for flag in each.secondary_opts
    }
    of_launch = {flag for each in launch_command.params for flag in each.opts}
    assert flags - {"--local"} <= of_launch


def test_options_of_preparation_win_over_the_file(project: Path, tmp_path: Path) -> None:
    argv = ["--image-size", "16", "--group-regex", "[a-z]+-disc", "--prep.seed", "3", "--seed", "4"]
    argv += ["--classes", "background=0,0,0;disc=255,255,255", "--allow-leaks", "--shard-size", "9"]
    argv += ["--num-processes", "1"]
    with patch("job.train.run_local", side_effect=StoppedError) as run_local:
        assert main(["--local", "--config", str(project), "--output", str(tmp_path), *argv]) == 6
    (config,) = run_local.call_args.args
    assert config.seed == 4
    manifest, _ = read_manifest(open_store(config.data))
    assert (manifest.image_height, manifest.image_width) == (16, 16)
    assert [each.name for each in manifest.classes] == ["background", "disc"]
    found = {name: manifest.options[name] for name in ("group_regex", "seed", "shard_size")}
    assert found == {"group_regex": "[a-z]+-disc", "seed": 3, "shard_size": 9.0}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (16, 32)),
        ({"image_size": 64}, (64, 64)),
        ({"image_width": 48}, (16, 48)),
        ({"tile": 24}, (24, 24)),
        ({"tile": None}, (16, 32)),
    ],
)
def test_sizes_of_options_replace_those_of_the_file(
    options: dict[str, Any], expected: tuple[int, int]
) -> None:
    config = prep_config({"image_height": 16, "image_width": 32}, options, "a.config")
    assert (config.height, config.width) == expected


def test_the_same_command_resumes_with_options_of_preparation(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = "job.planning.options._stored_values"
    small = {"image_size": 16, "num_processes": 1}
    first = resolve_config({}, str(project), small)
    with patch(name, return_value={"data": first.data}):
        assert resolve_config({}, str(project), small).data == first.data
        assert resolve_config({}, str(project)).data == first.data
        with pytest.raises(UsageError, match=r"\(--image-size was 16, now 32"):
            resolve_config({}, str(project), {**small, "image_size": 32})
    with (
        patch(name, return_value={"data": "other"}),
        pytest.raises(UsageError, match=r"--image-size needs a \.config file without --data"),
    ):
        resolve_config({}, str(project), small)


def test_a_dataset_of_another_size_is_a_warning(
    project: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = str(
        resolve_config({"output": str(tmp_path / "runs")}, str(project), {"num_processes": 1}).data
    )
    options = {"output": str(tmp_path / "other"), "data": data}
    caplog.clear()
    resolve_config(options, str(project))
    assert "images of" not in caplog.text
    project.write_text(CONFIG.replace("image_height  = 32", "image_height  = 64"))
    resolve_config(options, str(project))
    expected = f"{data} has images of 32x32 pixels (height x width), but {project} asks for 64x32"
    assert expected in caplog.text


def test_a_missing_test_split_is_a_warning(
    project: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    test = tmp_path / "dataset" / "Discs" / "test"
    test.rename(tmp_path / "elsewhere")
    data = resolve_config({"output": str(tmp_path / "a")}, str(project), {"num_processes": 1}).data
    manifest, _ = read_manifest(open_store(str(data)))
    found = {name: split.num_samples for name, split in manifest.splits.items()}
    assert found == {"train": 4, "valid": 2, "test": 0}
    assert f"the folders of [test] do not exist ({test}/images)" in caplog.text
    (test / "images").mkdir(parents=True)  # one of the two is there: an accident
    with pytest.raises(UsageError, match=r"test/images: missing or empty"):
        resolve_config({"output": str(tmp_path / "b")}, str(project), {"num_processes": 1})


def test_patterns_of_folders_stand_for_all_that_fit(project: Path, tmp_path: Path) -> None:
    for split in ("train", "valid", "test"):
        folder = tmp_path / "dataset" / "Discs" / split
        for number, path in enumerate(sorted((folder / "images").iterdir())):
            for kind in ("images", "masks"):
                place = folder / f"source-{number % 2}" / kind
                place.mkdir(parents=True, exist_ok=True)
                (folder / kind / path.name).rename(place / path.name)
        for kind in ("images", "masks"):
            (folder / kind).rmdir()
    globbed = re.sub(r"/(train|valid|test)/(images|masks)/", r"/\1/*/\2/", CONFIG)
    assert globbed.count("/*/") == 6
    project.write_text(globbed)
    options = {"output": str(tmp_path / "runs")}
    data = resolve_config(options, str(project), {"num_processes": 1}).data
    manifest, _ = read_manifest(open_store(str(data)))
    found = {name: split.num_samples for name, split in manifest.splits.items()}
    assert found == {"train": 4, "valid": 2, "test": 2}
    project.write_text(globbed.replace("/test/*/images", "/test/*/pics"))
    with pytest.raises(UsageError, match=r"--images '\*/pics': no images there in .*Discs/test"):
        resolve_config({"output": str(tmp_path / "other")}, str(project), {"num_processes": 1})


def test_the_folders_of_a_file_are_changed_in_the_file(project: Path, tmp_path: Path) -> None:
    options = {"output": str(tmp_path / "runs")}
    for name in ("images", "masks", "field_of_view"):
        with pytest.raises(UsageError, match=f"{flag_of([name])}: .* names the folders itself"):
            resolve_config(options, str(project), {name: "a", "ignore_id": 9})


@pytest.mark.parametrize("flag", ["--allow-leaks", "--skip-bad"])
def test_flags_of_preparation_are_refused_where_nothing_is_prepared(
    project: Path, capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    for config in ([], ["--config", str(project)]):
        assert main(["--local", "--data", "dataset", flag, *config]) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert f"{flag} needs a .config file without --data; give it to `flexunet prep`" in line


def test_a_preset_is_refused_beside_a_file_of_the_reference(project: Path) -> None:
    # Its missing keys have the reference's defaults, which a preset would lie below too.
    with pytest.raises(
        UsageError, match=r"--preset recipe: .* would override it.*schedule.reduce_on_plat"
    ):
        resolve_config({"preset": "recipe", "data": "d"}, str(project))
