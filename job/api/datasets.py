"""A dataset in Python: inspect a source, prepare, look at samples, hand them to TensorFlow."""

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Unpack

import numpy as np
import numpy.typing as npt

from data_prep.config import PrepConfig
from data_prep.inspection.config import InspectConfig
from data_prep.inspection.findings import Inspection
from data_prep.inspection.output import output_store, write_findings
from data_prep.inspection.pipeline import inspect_source
from data_prep.pipeline import prepare_source
from data_prep.shards.manifest import Manifest
from data_prep.shards.sample_table import read_samples
from data_prep.splits.names import SPLITS
from flexunet.errors import UsageError
from flexunet.settings import suggestion
from flexunet.storage import open_store
from job.api.keywords import StrPath, keyword_errors, path_text, settings_of
from job.api.log import shown_log
from job.api.options import InspectOptions, PrepOptions
from job.config import TrainConfig
from job.data import dataset as datasets
from job.data.folds import fold_words
from job.data.pipeline import EpochPlan, make_batches
from job.data.reader import RecordReader, read_sample
from job.data.sampling import epoch_order
from job.data.shard_cache import open_reader

if TYPE_CHECKING:
    import pandas as pd

_RANDOM_STREAMS = TrainConfig.model_fields["random_streams"].default


class Sample(NamedTuple):
    """A sample as it is stored.

    Attributes:
        image: (H, W, C) uint8 or uint16, C = 1 or 3; `Dataset.value_max` is full intensity.
        mask: (H, W) uint8, class ids; pixels of `Dataset.ignore_id` count nowhere.
    """

    image: npt.NDArray[Any]
    mask: npt.NDArray[np.uint8]


def _sample_of(batch: Mapping[str, Any]) -> tuple[Any, Any]:
    """Returns image and mask of a batch of one."""
    return batch["image"][0], batch["mask"][0]


class Dataset:
    """A dataset that `prepare` made; `open_dataset` returns it.

    Attributes:
        url: its folder or gs:// URL.
        splits: number of samples by split: "train", "valid", "test". For the run of a fold,
            `Run.open_dataset` returns the splits of that fold.
        classes: names of the classes by class id; 0 is the background.
        image_shape: (H, W, C) of every stored image.
        dtype: of the stored images, uint8 or uint16.
        value_max: raw value of full intensity.
        ignore_id: class id of mask pixels that count nowhere; None: there are none.
    """

    def __init__(self, dataset: datasets.Dataset) -> None:
        """Wraps an opened dataset; call `open_dataset`."""
        self._dataset = dataset
        self._readers: dict[tuple[str, str], RecordReader] = {}
        manifest = dataset.manifest
        self.url: str = dataset.url
        self.splits: Mapping[str, int] = {
            name: len(dataset.splits[name]) for name in SPLITS if name in dataset.splits
        }
        self.classes: tuple[str, ...] = tuple(each.name for each in manifest.classes)
        self.image_shape: tuple[int, int, int] = (
            manifest.image_height,
            manifest.image_width,
            manifest.channels,
        )
        self.dtype: np.dtype[Any] = np.dtype(f"uint{manifest.bit_depth}")
        self.value_max: int = manifest.value_max
        self.ignore_id: int | None = manifest.ignore_id

    def __repr__(self) -> str:
        splits = ", ".join(f"{count} {name}" for name, count in self.splits.items())
        fold = "" if self._dataset.fold is None else f"{fold_words(self._dataset.fold)}: "
        return f"<flexunet.Dataset {self.url}: {fold}{splits}, {self.image_shape} {self.dtype}>"

    @property
    def manifest(self) -> Manifest:
        """The content of `dataset.json`: classes, geometry, mean and std, options of prep."""
        return self._dataset.manifest

    @functools.cached_property
    def samples(self) -> "pd.DataFrame":
        """A row for each sample, index `id`: split, group, filename, geometry, pixels_per_class.

        The columns are those of `samples.parquet`. For the run of a fold, `split` is that of the
        fold, and the test samples of the dataset, which no fold uses, are left out.
        """
        table = read_samples(open_store(self.url), self._dataset.manifest)
        found = table.to_pandas().set_index("id")
        if self._dataset.fold is not None:
            found = found[found.index.isin(list(self._locations))]
            found["split"] = [self._locations[sample][0] for sample in found.index]
        return found

    def read(self, id: str) -> Sample:
        """Returns the stored image and mask of the sample `id`, an index of `samples`.

        In a bucket only this sample is read.

        Raises:
            UsageError: there is no such sample.
            ContentError: its record is damaged or missing.
            StorageError: storage is unavailable.

        Examples:
            >>> name = dataset.samples.index[0]
            >>> sample = dataset.read(name)
            >>> sample.image.shape, sample.image.dtype, sample.mask.shape
            ((32, 32, 1), dtype('uint8'), (32, 32))
        """
        found = self._locations.get(id)
        if found is None:
            raise UsageError(
                f"{self.url}: no sample {id!r}; {suggestion(id, list(self._locations))}"
            )
        split, index = found
        return Sample(*read_sample(self._reader(split, "ranges"), index))

    def as_tf_dataset(
        self,
        split: str,
        *,
        shuffle: bool = False,
        seed: int = 1234,
        epoch: int = 1,
        cache: Literal["full", "ranges"] = "full",
    ) -> Any:
        """Returns an unbatched `tf.data.Dataset` of (image, mask).

        Pixels are as stored: image (H, W, C) uint8 or uint16, mask (H, W) uint8 of class ids. No
        augmentation, no scaling. The order is the same every time.

        Args:
            split: "train", "valid" or "test".
            shuffle: False: the order of the sample table. True: exactly the order in which a run
                of `seed` takes the samples in `epoch`, without `foreground_share`.
            seed: of the run; the default is that of `train`.
            epoch: of the run, from 1.
            cache: of a dataset in a bucket: "full" copies the split to `~/.cache/flexunet` first,
                "ranges" reads one sample after the other over the network.

        Raises:
            UsageError: `split` has no sample, or an argument is wrong.
            ContentError: a shard is missing. A record that is damaged is an error of TensorFlow
                when it is read; its text says which.

        Examples:
            >>> batches = dataset.as_tf_dataset("train", shuffle=True, epoch=1).batch(4)
            >>> images, masks = next(iter(batches))
            >>> tuple(images.shape), tuple(masks.shape)
            ((4, 32, 32, 1), (4, 32, 32))
        """
        from job.distributed.runtime import import_tensorflow

        found = self._dataset.split(split)
        _check_sampling(seed, epoch, cache)
        tf = import_tensorflow()
        order = np.arange(len(found))
        if shuffle:
            order = epoch_order(
                found.has_foreground, None, seed=seed, epoch=epoch - 1, version=_RANDOM_STREAMS
            )
        plan = EpochPlan(order[:, np.newaxis], seed, epoch - 1)
        batches = make_batches(self._dataset, self._reader(split, cache), plan)
        samples = batches.map(tf.autograph.experimental.do_not_convert(_sample_of))
        return samples.apply(tf.data.experimental.assert_cardinality(len(order)))

    @functools.cached_property
    def _locations(self) -> dict[str, tuple[str, int]]:
        """The split of each sample and its index there, by id."""
        return {
            sample: (name, index)
            for name, split in self._dataset.splits.items()
            for index, sample in enumerate(split.ids)
        }

    def _reader(self, split: str, cache: str) -> RecordReader:
        if (split, cache) not in self._readers:
            found = self._dataset.split(split)
            reader = open_reader(self._dataset, found, cache=cache, cache_dir=None)
            self._readers[split, cache] = reader
        return self._readers[split, cache]


def _check_sampling(seed: int, epoch: int, cache: str) -> None:
    """Refuses arguments of `as_tf_dataset` that no run could have.

    Raises:
        UsageError: names the argument.
    """
    problems = {
        f"seed={seed!r}: give an integer from 0 to 2147483647": 0 <= seed < 2**31,
        f"epoch={epoch!r}: epochs count from 1": epoch >= 1,
        f"cache={cache!r}: give 'full' or 'ranges'": cache in ("full", "ranges"),
    }
    for problem, is_fine in problems.items():
        if not is_fine:
            raise UsageError(f"flexunet.Dataset.as_tf_dataset(): {problem}")


def open_dataset(url: StrPath) -> Dataset:
    """Returns the dataset at `url`; its tables are read and checked, no image is read yet.

    Args:
        url: folder or gs:// URL that `prepare` or `flexunet prep` made.

    Raises:
        UsageError: there is no dataset, or it was made by a later version.
        ContentError: it is damaged.
        StorageError: storage is unavailable.

    Examples:
        >>> dataset = flexunet.open_dataset("dataset")
        >>> dataset.splits, dataset.classes
        ({'train': 12, 'valid': 4, 'test': 4}, ('background', 'foreground'))
        >>> sorted(dataset.samples["split"].unique())
        ['test', 'train', 'valid']
    """
    return Dataset(datasets.open_dataset(path_text(url)))


def prepare(
    source: StrPath, output: StrPath, *, progress: bool = True, **options: Unpack[PrepOptions]
) -> Dataset:
    """Turns the images and masks of `source` into a dataset at `output`, as `flexunet prep` does.

    The same call continues where an interrupted one stopped; a finished dataset is opened.

    Args:
        source: folder or gs:// URL with images/ and masks/, or with train/, valid/ and test/ that
            each hold both.
        output: folder or gs:// URL of the dataset.
        progress: show a progress bar on a terminal, else lines of the log.
        options: the fields of `PrepConfig`: `image_size=256`, `fractions=(0.6, 0.2, 0.2)`.

    Returns:
        The dataset.

    Raises:
        UsageError: an option is unknown or wrong, the source is missing or empty, or `output`
            holds another dataset.
        ContentError: a file is bad or splits share a group; nothing was committed.
        StorageError: storage is unavailable, unwritable or full; the same call continues.

    Examples:
        >>> flexunet.prepare("source", "dataset", image_size=32, fractions=(0.6, 0.2, 0.2)).splits
        {'train': 12, 'valid': 4, 'test': 4}
        >>> flexunet.prepare("source", "dataset", img_size=32)
        Traceback (most recent call last):
        flexunet.errors.UsageError: ... unknown option 'img_size'; did you mean 'image_size'?
    """
    config = settings_of("prepare", PrepConfig, options, ("source", "output"))
    with keyword_errors(PrepConfig), shown_log(progress):
        url = path_text(output)
        prepare_source(path_text(source), url, config, progress=progress)
        return open_dataset(url)


def inspect(
    source: StrPath,
    output: StrPath | None = None,
    *,
    progress: bool = True,
    **options: Unpack[InspectOptions],
) -> Inspection:
    """Examines the images and masks of `source`, and proposes the `prep` command for them.

    Args:
        source: folder or gs:// URL; nothing is written into it.
        output: folder or gs:// URL for `inspect.json` and the contact sheet `inspect.png`; None:
            nothing is written.
        progress: show a progress bar on a terminal, else lines of the log.
        options: the fields of `InspectConfig`: `masks="labels"`, `sample=100`.

    Returns:
        The findings. If folders or masks have several readings, or files are bad, `questions` has
        what to decide, and `exit_code` is not 0.

    Raises:
        UsageError: an option is unknown or wrong, `source` does not exist, or `output` is in it.
        StorageError: the source cannot be read, or the output cannot be written.

    Examples:
        >>> found = flexunet.inspect("source")
        >>> found.layout.num_pairs, found.masks.classes
        (20, 'background=0,0,0;foreground=255,255,255')
        >>> found.command
        "flexunet prep source dataset-source ..."
    """
    config = settings_of("inspect", InspectConfig, options, ("source", "output"))
    with keyword_errors(InspectConfig), shown_log(progress):
        path = path_text(source)
        store = None if output is None else output_store(path, path_text(output))
        found, sheet = inspect_source(
            path, config, with_contact_sheet=store is not None, progress=progress
        )
        if store is not None:
            write_findings(store, found, sheet)
        return found
