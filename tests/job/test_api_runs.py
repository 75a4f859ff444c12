"""What `flexunet.Run` and its tables return for datasets and files that have changed."""

from pathlib import Path

import pytest

import flexunet
from job.config import TrainConfig
from job.data.folds import fold_of
from job.runs import loading
from tests.job.discs import prepare_discs


@pytest.fixture
def dataset_url(trained_run: Path) -> str:
    return str(trained_run.parents[1] / "dataset")


def with_options(run: Path, **options: object) -> flexunet.Run:
    """Returns the run with other stored options."""
    found = loading.open_run(str(run))
    values = found.config.model_dump() | options
    return flexunet.Run(
        loading.TrainedRun(
            found.store, TrainConfig.model_validate(values), found.manifest, found.dataset_digest
        )
    )


def test_the_dataset_of_a_fold_has_the_splits_of_the_fold(
    trained_run: Path, dataset_url: str
) -> None:
    dataset = with_options(trained_run, folds=4, fold=1).open_dataset()
    expected = fold_of(flexunet.open_dataset(dataset_url)._dataset, 4, 1).splits
    assert dataset.splits == {name: len(split) for name, split in expected.items()}
    assert "fold 2 of 4" in repr(dataset)
    table = dataset.samples
    for name, split in expected.items():
        assert set(table.index[table["split"] == name]) == set(split.ids)
    assert len(table) == sum(dataset.splits.values()) == 16
    image, _ = next(iter(dataset.as_tf_dataset("test")))
    assert (image == dataset.read(expected["test"].ids[0]).image).numpy().all()


def test_another_dataset_in_the_place_of_that_of_the_run_is_refused(
    trained_run: Path, tmp_path: Path
) -> None:
    other = prepare_discs(tmp_path, num_images=16)
    with pytest.raises(flexunet.UsageError, match=r"not the dataset of this run .*open_dataset"):
        with_options(trained_run, data=other).open_dataset()
