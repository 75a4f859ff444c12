"""Images of four channels from .npy files: prepared, trained on, evaluated and predicted."""

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

import flexunet
from data_prep.config import PrepConfig
from data_prep.pipeline import prepare_source
from data_prep.shards.manifest import Manifest
from flexunet.errors import ContentError, UsageError
from flexunet.storage import open_store
from job.data.pipeline import decode_image
from job.inference.inputs import find_images
from job.planning.options import resolve_config
from tests.job.discs import write_discs
from tests.job.test_reference_train import CONFIG

CHANNELS = 4


def write_arrays(folder: Path, num_images: int, seed: int = 0, side: int = 32) -> None:
    """Writes discs as arrays (H, W, 4) uint8: only the last channel shows the disc."""
    import cv2

    write_discs(folder, num_images=num_images, side=side, seed=seed)
    rng = np.random.default_rng(seed)
    for path in sorted((folder / "images").glob("*.png")):
        disc = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
        noise = rng.integers(0, 255, (side, side, CHANNELS - 1))
        np.save(path.with_suffix(".npy"), np.dstack([noise.astype(np.uint8), disc]))
        path.unlink()


def prepared(source: Path, output: Path, **options: object) -> Manifest:
    values = {"image_size": 32, "num_processes": 1, "fractions": (0.6, 0.2, 0.2)} | options
    config = PrepConfig.model_validate(values)
    return prepare_source(str(source), str(output), config, progress=False)


@pytest.fixture(scope="module")
def arrays(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with 10 pairs in source/, and their dataset."""
    folder = tmp_path_factory.mktemp("arrays")
    write_arrays(folder / "source", 10)
    prepared(folder / "source", folder / "dataset")
    return folder


def test_a_dataset_has_every_value_of_the_arrays(arrays: Path) -> None:
    dataset = flexunet.open_dataset(arrays / "dataset")
    assert (dataset.image_shape, dataset.dtype) == ((32, 32, CHANNELS), np.uint8)
    for name in dataset.samples.index:
        expected = np.load(arrays / "source" / "images" / f"{name}.npy", allow_pickle=False)
        assert np.array_equal(dataset.read(name).image, expected)
    whole = np.stack(
        [dataset.read(name).image for name in dataset.samples.query("split=='train'").index]
    )
    assert dataset.manifest.mean == pytest.approx(whole.mean(axis=(0, 1, 2)))
    assert dataset.manifest.std == pytest.approx(whole.std(axis=(0, 1, 2)))
    # The batches of training are decoded by TensorFlow.
    for image, _ in dataset.as_tf_dataset("valid"):
        assert any(
            np.array_equal(image, dataset.read(name).image) for name in dataset.samples.index
        )


@pytest.mark.parametrize("channels", [2, 4, 5])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_tensorflow_decodes_what_is_stored(channels: int, dtype: type) -> None:
    from data_prep.imaging.arrays import encode_image

    values = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (5, 7, channels))
    pixels = values.astype(dtype)
    found = decode_image(tf.constant(encode_image(pixels)), channels, tf.as_dtype(dtype))
    assert np.array_equal(found.numpy(), pixels)


def test_16_bits_and_tiles_are_stored_losslessly(tmp_path: Path) -> None:
    write_arrays(tmp_path / "source", 5, side=48)
    for path in (tmp_path / "source" / "images").iterdir():
        np.save(path, np.load(path, allow_pickle=False).astype(np.uint16) * 16)
    options = {"image_size": 512, "tile": 32, "tile_overlap": 8}
    manifest = prepared(tmp_path / "source", tmp_path / "dataset", **options)
    assert (manifest.channels, manifest.bit_depth, manifest.value_max) == (4, 16, 4095)
    dataset = flexunet.open_dataset(tmp_path / "dataset")
    for name, row in dataset.samples.iterrows():
        path = tmp_path / "source" / "images" / f"{row['picture']}.npy"
        top, left = row["crop_top"], row["crop_left"]
        expected = np.load(path, allow_pickle=False)[
            int(top) : int(top) + 32, int(left) : int(left) + 32
        ]
        found = dataset.read(str(name)).image[: expected.shape[0], : expected.shape[1]]
        assert np.array_equal(found, expected)


def test_numbers_of_channels_do_not_mix(tmp_path: Path) -> None:
    write_arrays(tmp_path, 5)
    path = tmp_path / "images" / "disc-03.npy"
    np.save(path, np.load(path, allow_pickle=False)[..., :3])
    with pytest.raises(ContentError, match=r"disc-03\.npy has 3.*disc-00\.npy has 4; give all the"):
        prepared(tmp_path, tmp_path / "out")
    with pytest.raises(ContentError, match="has 4 channels, but --channels grey is"):
        prepared(tmp_path, tmp_path / "grey", channels="grey")


def test_arrays_beside_images_are_no_images(tmp_path: Path) -> None:
    write_discs(tmp_path / "source", num_images=5)
    np.save(tmp_path / "source" / "images" / "disc-00.npy", np.zeros((4, 4)))
    with pytest.raises(ContentError, match=r"disc-00\.npy: its ending is not one of"):
        prepared(tmp_path / "source", tmp_path / "out")
    prepared(tmp_path / "source", tmp_path / "out", skip_bad=True)
    images = open_store(str(tmp_path / "source" / "images"))
    assert find_images(images) == [f"disc-{index:02d}.png" for index in range(5)]


def project_of(folder: Path) -> Path:
    """Returns the file of a project with .npy images in the folders named there."""
    for seed, (split, count) in enumerate({"train": 4, "valid": 2, "test": 2}.items()):
        target = folder / "dataset" / "Discs" / split
        write_arrays(target, count, seed)
        for path in target.glob("*/*.*"):
            path.rename(path.with_name(f"{split}-{path.name}"))
    config = folder / "projects" / "TensorFlowFlexUNet" / "Discs" / "train_eval_infer.config"
    config.parent.mkdir(parents=True)
    config.write_text(
        CONFIG.replace("image_channels = 3", "image_channels = 4")
        + '[image]\nfile_format = "NPY"\n[infer]\nnpy_slice_index = 3\n'
    )
    return config


def test_a_project_with_arrays_trains_and_predicts(tmp_path: Path) -> None:
    config = project_of(tmp_path)
    run = flexunet.train(
        config=config,
        output=tmp_path / "runs",
        prep={"num_processes": 1},
        prediction_images=1,
        augmentation={"enabled": True, "shrink_probability": 1.0, "sharpening_probability": 1.0},
        tensorboard=False,
        progress=False,
    )
    assert run.status == "finished"
    assert run.load_model().input_shape == (None, 32, 32, CHANNELS)
    report = (tmp_path / "runs" / "discs" / "report.html").read_text()
    assert "4 channels (figures show channel 1)" in report
    image = np.load(tmp_path / "dataset/Discs/test/images/test-disc-00.npy", allow_pickle=False)
    mask = run.predict(image)
    assert mask.shape == (32, 32)
    output = tmp_path / "masks"
    flexunet.infer(run, tmp_path / "dataset/Discs/test/images", output, progress=False)
    import cv2

    assert sorted(path.name for path in output.glob("*.png")) == [
        "test-disc-00.png",
        "test-disc-01.png",
    ]
    assert cv2.imread(str(output / "overlays" / "test-disc-00.png")).shape[2] == 3
    with pytest.raises(ContentError, match="an image of 3 channels, but the run was trained on im"):
        run.predict(image[..., :3])
    with pytest.raises(UsageError, match=r"array of shape \(32, 32, 2\)"):
        run.predict(image[..., :2])


def test_a_file_that_asks_for_other_channels_is_refused(tmp_path: Path) -> None:
    config = project_of(tmp_path)
    config.write_text(config.read_text().replace("image_channels = 4", "image_channels = 5"))
    with pytest.raises(UsageError, match=r"image_channels = 5, but the images have 4 channels"):
        resolve_config({"output": str(tmp_path / "runs")}, str(config), {"num_processes": 1})
