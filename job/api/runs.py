"""A trained run in Python: its numbers, its weights, and what it predicts."""

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal, Unpack, overload

import numpy as np
import numpy.typing as npt

from flexunet.errors import ContentError, UsageError
from flexunet.json_files import read_json
from flexunet.storage import ObjectStore, open_store
from job.api.datasets import Dataset
from job.api.keywords import StrPath, keyword_errors, path_text, settings_of
from job.api.log import each_with_log, shown_log
from job.api.options import ImageOptions
from job.api.prediction import ArrayPredictor, Prediction, PredictorCache
from job.api.tables import read_frame
from job.config import TrainConfig
from job.data.folds import open_folded
from job.inference.inputs import open_images, refuse_missing, select_images
from job.inference.options import ImageConfig
from job.reporting.phrases import headline_words
from job.runs import loading
from job.runs.layout import RESTORE
from job.runs.status import run_status

if TYPE_CHECKING:
    import keras
    import pandas as pd

Image = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]

_EVALUATE_AGAIN = "evaluate the run again: flexunet.evaluate(run)"


class EvaluationSummary(dict[str, Any]):
    """The summary of an evaluation: the content of its `summary.json`, by name.

    `summary["foreground_mean"]["dice"]` is the foreground Dice.

    Attributes:
        url: folder or gs:// URL of the evaluation's tables and images.
    """

    def __init__(self, values: dict[str, Any], url: str) -> None:
        """Takes the values of `summary.json` in the folder `url`."""
        super().__init__(values)
        self.url = url

    def __repr__(self) -> str:
        """Returns a line with the foreground Dice; `print(dict(summary))` shows all values."""
        try:
            return f"<EvaluationSummary: {headline_words(self)}>"
        except (KeyError, TypeError):  # some values are missing
            return f"<EvaluationSummary: {self.url}>"

    @property
    def cases(self) -> "pd.DataFrame":
        """A row for each case, index `id`: the columns of `per_case.csv`.

        Raises:
            ContentError: the file is missing or damaged.
        """
        store = open_store(self.url)
        if store.stat("per_case.csv") is None:
            raise ContentError(f"{store.url}/per_case.csv: is missing; {_EVALUATE_AGAIN}")
        names = ("id", "filename", "group")
        return read_frame(store, "per_case.csv", _EVALUATE_AGAIN, index="id", text=names)


def read_evaluation(store: ObjectStore) -> EvaluationSummary | None:
    """Returns the summary of the evaluation in the folder `store`; None: there is none."""
    values = read_json(store, "summary.json", _EVALUATE_AGAIN)
    return None if values is None else EvaluationSummary(values, store.url)


class Run:
    """A run that has a checkpoint; `open_run` and `train` return it.

    It reads the run and does not own it: a run that is being trained can be opened, too. The runs
    of a cross-validation are one `Run`, whose probabilities are the mean of the folds.

    Attributes:
        url: its folder or gs:// URL.
        config: the options of the run, every one of them.
        runs: the URL of the run, or of the run of each fold.
    """

    def __init__(self, run: loading.TrainedRun, *folds: loading.TrainedRun, url: str = "") -> None:
        """Wraps an opened run; call `open_run`.

        Args:
            run: the run, or that of the first fold.
            folds: the runs of the other folds.
            url: of the cross-validation.
        """
        self._run, self._members = run, (run, *folds)
        self._predictors = PredictorCache()
        self._warned: set[str] = set()
        self.url: str = url or run.store.url
        self.config: TrainConfig = run.config
        self.runs: tuple[str, ...] = tuple(each.store.url for each in self._members)
        if folds:
            name = self.url.rstrip("/").rpartition("/")[2]
            self.config = run.config.model_copy(update={"fold": None, "name": name})

    @property
    def _store(self) -> ObjectStore:
        return self._run.store if len(self._members) == 1 else open_store(self.url)

    def __repr__(self) -> str:
        return f"<flexunet.Run {self.url}: {self.status}>"

    @property
    def status(self) -> Literal["finished", "diverged", "stopped", "open"]:
        """The status of the run; "open": it is being trained, or its process was killed.

        A cross-validation can be opened only if all folds are finished.
        """
        return run_status(self._run.store)

    @property
    def history(self) -> "pd.DataFrame":
        """A row for each finished epoch, index `epoch` from 1: `loss`, `val_loss` and others.

        The columns are those of `metrics/history.csv`, which counts epochs from 0.

        Raises:
            UsageError: each fold of a cross-validation has its own; open one of `runs`.
            ContentError: the file is damaged.
        """
        if len(self._members) > 1:
            raise UsageError(
                f"{self.url}: each fold of a cross-validation has its own history; open one of its "
                f"runs: flexunet.open_run({self.runs[0]!r})"
            )
        table = read_frame(self._run.store, "metrics/history.csv", RESTORE, index="epoch")
        table.index += 1
        return table

    @property
    def summary(self) -> EvaluationSummary | None:
        """The newest evaluation of the test split, or None."""
        return read_evaluation(self._store.subpath("evaluation"))

    def open_dataset(self) -> Dataset:
        """Returns the dataset of the run, at the location stored in its config.

        The run of fold k has the splits of its fold: "test" is fold k, "valid" is fold k + 1, and
        "train" has the others. A cross-validation has the plain splits.

        Raises:
            UsageError: there is none any more, or another dataset is there now.
        """
        dataset = open_folded(self.config)
        loading.check_dataset(
            self._run,
            dataset,
            "bring it back there; `flexunet.open_dataset` opens it at another place, with the "
            "plain splits",
        )
        return Dataset(dataset)

    def load_model(self, checkpoint: Literal["best", "last"] = "best") -> "keras.Model":
        """Returns a Keras model: stored pixels in, probabilities out.

        Its input is (B, H, W, C) uint8 or uint16, pixels as the dataset stores them, of any batch
        B; see `Dataset.image_shape`. Its output is (B, H, W, K) float32: softmax over K classes, or
        the sigmoid where K = 1. `predict` takes images of any size and kind. `flexunet.export`
        writes files that need no FlexUNet; to load what `model.save(file)` wrote, import
        `job.models.flexunet` before, which knows its layers.

        Args:
            checkpoint: "best": of the lowest validation loss; "last": the newest.

        Raises:
            UsageError: no epoch has ended, so no checkpoint is the best.
            ContentError: the checkpoint is damaged.

        Examples:
            >>> model = run.load_model()
            >>> model.input_shape, model.output_shape
            ((None, 32, 32, 1), (None, 32, 32, 2))
            >>> images, masks = next(iter(run.open_dataset().as_tf_dataset("test").batch(4)))
            >>> tuple(model(images).shape)
            (4, 32, 32, 2)
        """
        from job.distributed.runtime import import_tensorflow

        import_tensorflow()
        from job.models.ensemble import mean_model, probability_model

        channels, bit_depth = self._run.manifest.channels, self._run.manifest.bit_depth
        models = [
            probability_model(loading.load_model(each, which=checkpoint)[0], channels, bit_depth)
            for each in self._members
        ]
        return models[0] if len(models) == 1 else mean_model(models)

    @overload
    def predict(
        self,
        image: Image,
        *,
        probabilities: Literal[False] = False,
        **options: Unpack[ImageOptions],
    ) -> npt.NDArray[np.uint8]: ...

    @overload
    def predict(
        self, image: Image, *, probabilities: Literal[True], **options: Unpack[ImageOptions]
    ) -> Prediction: ...

    @overload
    def predict(
        self, image: StrPath, *, probabilities: bool = False, **options: Unpack[ImageOptions]
    ) -> Any: ...

    def predict(
        self,
        image: Image | StrPath,
        *,
        probabilities: bool = False,
        **options: Unpack[ImageOptions],
    ) -> Any:
        """Returns the mask of an image at its own size, as `infer` writes it.

        The first call loads the weights. They stay in memory until a call with another checkpoint,
        `ensemble` or `flips` loads others; `checkpoint="last"` is the newest at each call.

        Args:
            image: an array (h, w), (h, w, 1) or (h, w, 3) of uint8 or uint16 (RGB, pixels as an
                image file has them); or a file; or a folder of images. Files and folders may be
                gs:// URLs.
            probabilities: return the probabilities, too; not of a folder.
            options: the fields of `ImageConfig`: `flips="both"`, `full_scale=4095`.

        Returns:
            Of an array or a file: class ids (h, w) uint8, or a `Prediction`. Of a folder: an
            iterator of (name, class ids) for each image, sorted by name.

        Raises:
            UsageError: an option is unknown or wrong, an array is no image, or no image is there.
            ContentError: an image cannot be read; `infer` lists such images and does the others.
            StorageError: storage is unavailable.

        Examples:
            >>> import numpy as np
            >>> run.predict(np.zeros((40, 50), np.uint8)).shape
            (40, 50)
            >>> mask, probabilities = run.predict("source/images/disc-00.png", probabilities=True)
            >>> mask.shape, probabilities.shape
            ((32, 32), (32, 32, 2))
            >>> len(dict(run.predict("source/images", flips="both")))
            20
        """
        config = settings_of("Run.predict", ImageConfig, options, ("image",))
        with keyword_errors(ImageConfig), shown_log(False):
            return self._predict(image, config, probabilities=probabilities)

    def _predict(self, image: Image | StrPath, config: ImageConfig, *, probabilities: bool) -> Any:
        if isinstance(image, str | os.PathLike):
            source, name = open_images(path_text(image))
            refuse_missing(source)
            if name is None:
                return self._predict_folder(source, config, probabilities=probabilities)
            select_images(source, name)
            predictor = self._predictor(config)
            found = predictor.images(source, [name])
        else:
            predictor = self._predictor(config)
            found = iter([predictor.image(np.asarray(image))])
        (checked,) = predictor.watched(found, self._warned)
        return predictor.predict_one(checked, probabilities=probabilities)

    def _predict_folder(
        self, source: ObjectStore, config: ImageConfig, *, probabilities: bool
    ) -> Iterator[tuple[str, npt.NDArray[np.uint8]]]:
        if probabilities:
            raise UsageError(
                "flexunet.Run.predict(): probabilities=True is for an array or a file; call it for "
                "each file of the folder"
            )
        images, _ = select_images(source, None)
        predictor = self._predictor(config)
        found = predictor.images(source, [each.name for each in images])
        predicted = predictor.predict(predictor.watched(found, self._warned))
        return each_with_log(((image.name, mask) for image, mask in predicted), is_shown=False)

    def _predictor(self, config: ImageConfig) -> ArrayPredictor:
        return self._predictors.open([self.url, *config.ensemble], config)


def open_run(url: StrPath) -> Run:
    """Returns the run at `url`; neither weights nor TensorFlow are loaded.

    Args:
        url: folder or gs:// URL: RUNS/NAME, of a run or of a cross-validation, whose folds then
            predict together.

    Raises:
        UsageError: there is no run, it has no checkpoint yet, or a fold is not finished.
        ContentError: one of its files is damaged.
        StorageError: storage is unavailable.

    Examples:
        >>> run = flexunet.open_run("runs/first")
        >>> run.config.epochs, len(run.history), run.summary["num_cases"]
        (1, 1, 4)
    """
    text = path_text(url)
    runs = loading.open_ensemble([text])
    return Run(*runs, url=open_store(text).url if len(runs) > 1 else "")
