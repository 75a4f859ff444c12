"""Probabilities as files beside the masks."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from data_prep.imaging.geometry import Box, Geometry
from flexunet.errors import UsageError
from job.inference.options import InferConfig
from job.inference.pipeline import infer
from job.inference.prediction import probabilities_at_source
from job.inference.probability_files import probability_file, probability_names
from tests.job.test_infer import disc, mask_of, write


def shares_of(height: int, width: int, num_outputs: int) -> np.ndarray:
    random = np.random.default_rng(num_outputs)
    logits = random.normal(0, 2, (height, width, num_outputs))
    if num_outputs == 1:
        return (1 / (1 + np.exp(-logits))).astype(np.float32)
    shares = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    return np.asarray(shares, np.float32)


@pytest.mark.parametrize("num_outputs", [1, 2, 5])
@pytest.mark.parametrize("is_cropped", [False, True])
def test_files_have_the_probabilities_at_the_size_of_the_image(
    num_outputs: int, is_cropped: bool
) -> None:
    shares = shares_of(16, 16, num_outputs)
    crop = Box(2, 10, 20, 30) if is_cropped else None
    geometry = Geometry("stretch", 24, 40, 0, 0, 16, 16, crop, is_flipped=is_cropped)
    expected = probabilities_at_source(shares, geometry)
    assert expected.shape == (24, 40, num_outputs)
    pages = tifffile.imread(io.BytesIO(probability_file(shares, geometry, 1.0, "tiff")))
    pages = pages.reshape(num_outputs, 24, 40)
    assert pages.dtype == np.uint16
    assert np.abs(np.moveaxis(pages, 0, -1) / 65535 - expected).max() <= 0.5 / 65535 + 1e-7
    for name, most in (("float32", 0.0), ("float16", 2**-11)):
        found = np.load(io.BytesIO(probability_file(shares, geometry, 1.0, name)))  # type: ignore[arg-type]
        assert (found.dtype, found.shape) == (np.dtype(name), expected.shape)
        assert np.abs(found.astype(np.float32) - expected).max() <= most
    # The same input gives the same bytes.
    again = probability_file(shares, geometry, 1.0, "tiff")
    assert again == probability_file(shares, geometry, 1.0, "tiff")
    hot = np.load(io.BytesIO(probability_file(shares, geometry, 4.0, "float32")))
    assert np.abs(hot - 0.5).mean() < np.abs(expected - 0.5).mean() or num_outputs > 2


def test_names_of_other_formats() -> None:
    names = ["a.png", "b/c.tif"]
    assert probability_names(names, without="float16") == [
        "probabilities/a.tif",
        "probabilities/b/c.tif",
    ]
    assert len(probability_names(names)) == 4


def test_probabilities_are_written_before_masks_and_continue_with_them(
    trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, output = tmp_path / "images", tmp_path / "output"
    for name, size in (("a", (32, 32)), ("wide", (30, 50))):
        write(images / f"{name}.png", disc(*size)[0])

    def predict(**options: Any) -> Any:
        config = InferConfig(overlays=False, progress=False, batch_size=2, **options)
        return infer(str(trained_run), str(images), str(output), config)

    from job.inference import chunk

    def fail(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(chunk, "_put_mask", fail)
        predict(probabilities="tiff")
    assert list(output.glob("*.png")) == []
    assert (output / "probabilities" / "a.tif").exists()
    # A call that was killed in between has no mask yet, so it predicts again.
    assert predict(probabilities="tiff").num_written == 2
    pages = tifffile.imread(output / "probabilities" / "wide.tif")
    assert pages.shape == (2, 30, 50)
    assert np.array_equal(mask_of(output, "wide.png"), pages.argmax(axis=0))
    assert abs(pages.astype(int).sum(axis=0) - 65535).max() <= 1
    assert predict(probabilities="tiff").num_kept == 2

    with pytest.raises(UsageError, match="--probabilities was tiff, now none"):
        predict()
    predict(probabilities="float16", overwrite=True)
    names = sorted(path.name for path in (output / "probabilities").iterdir())
    assert names == ["a.npy", "wide.npy"]  # those of before are out of date

    write(images / "probabilities" / "b.png", disc(32, 32)[0])
    with pytest.raises(UsageError, match=r"among the probabilities; .*--probabilities none"):
        predict(probabilities="tiff")
