"""What a dataset that was opened knows of its samples."""

import re
import shutil
from pathlib import Path

import pytest

from data_prep.config import PrepConfig
from data_prep.imaging.breast import frame
from data_prep.imaging.codecs import read_image
from data_prep.phantoms.images import write_phantoms
from data_prep.pipeline import prepare
from data_prep.sources.pairs import find_sources
from flexunet.errors import ContentError, UsageError
from job.data.dataset import open_dataset
from job.data.reader import read_sample
from job.data.shard_cache import open_reader
from tests.job.discs import prepare_discs
from tests.source_tree import ROOT


def test_split_knows_which_samples_have_foreground(tmp_path: Path) -> None:
    data = prepare_discs(tmp_path, num_images=10, side=64, tile=16)
    dataset = open_dataset(data)
    split = dataset.split("train")
    reader = open_reader(dataset, split, cache="full", cache_dir=None)
    found = [bool(read_sample(reader, index)[1].any()) for index in range(len(split))]
    assert split.has_foreground.tolist() == found
    assert len(set(found)) == 2


def test_split_without_samples_is_refused(discs: str) -> None:
    dataset = open_dataset(discs)
    with pytest.raises(UsageError, match="split 'holdout' has no samples; the dataset has"):
        dataset.split("holdout")


def test_open_dataset_knows_the_part_of_each_image_that_is_stored(tmp_path: Path) -> None:
    write_phantoms(str(tmp_path / "source"), 6, 64, 1)
    config = PrepConfig(
        image_size=32, crop="breast", flip="left", fractions=(0.5, 0.25, 0.25), num_processes=1
    )
    prepare(find_sources(str(tmp_path / "source")), str(tmp_path / "out"), config, progress=False)
    dataset = open_dataset(str(tmp_path / "out"))
    found = []
    for split in dataset.splits.values():
        for name, geometry in zip(split.filenames, split.geometries, strict=True):
            data = (tmp_path / "source" / "images" / name).read_bytes()
            pixels = read_image(data, name=name)
            expected = frame(
                pixels, height=32, width=32, kind="stretch", crop="breast", flip="left"
            )
            assert geometry == expected
            assert geometry.crop is not None
            found.append(geometry.is_flipped)
    assert True in found
    assert False in found


def test_a_run_is_no_dataset(tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(ROOT / "tests/relics/v0.1.0/runs/folds-fold-0", run)
    (data,) = re.findall("^data: (.+)$", (run / "config.yaml").read_text(), re.MULTILINE)
    message = re.escape(f"{run} is a run, not a dataset; its dataset is {data}")
    with pytest.raises(UsageError, match=f"^{message}$"):
        open_dataset(str(run))
    (run / "config.yaml").write_text("epochs: 3")
    with pytest.raises(UsageError, match=r"not a dataset; give the dataset of the run$"):
        open_dataset(str(run))


def test_a_dataset_without_its_table_is_damaged(discs: str, tmp_path: Path) -> None:
    shutil.copy(Path(discs) / "dataset.json", tmp_path)
    message = r"samples\.parquet is missing; prepare the dataset again$"
    with pytest.raises(ContentError, match=message):
        open_dataset(str(tmp_path))
