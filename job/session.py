"""What lives as long as one training process: model, optimizer, compiled steps, readers, files.

`job/train.py` is the loop over it. Everything that must survive the process is in `TrainState` and
in the weights; a session can be rebuilt from a checkpoint at any step.
"""

import dataclasses
import json
import logging
import os
import platform
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from typing import Any

import numpy as np
import tensorflow as tf

from data_prep.image import read_image
from data_prep.schema import MANIFEST_NAME
from data_prep.settings import write_yaml
from data_prep.storage import open_store
from data_prep.table import csv_table
from job import checkpoint, plots
from job.config import TrainConfig
from job.data import (
    Dataset,
    RecordReader,
    distributed_batches,
    global_batches,
    open_reader,
    read_sample,
    sample_order,
)
from job.evaluate import (
    Evaluation,
    Evaluator,
    make_evaluator,
    means_of,
    write_evaluation,
)
from job.history import History
from job.infer import find_images, to_model_pixels
from job.metrics import RunningSums
from job.optimizer import Adam
from job.run import Place, Run, commit_prefix, fetch_commit
from job.schedule import EarlyStopping, PlateauReducer
from job.state import TrainState
from job.step import make_train_step
from job.trained import initialize_from, model_for

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class Session:
    """One training process at work on one run; made by `open_session`."""

    config: TrainConfig
    run: Run
    strategy: tf.distribute.Strategy
    dataset: Dataset
    readers: dict[str, RecordReader]
    model: Any
    optimizer: Adam
    train_step: Any
    evaluator: Evaluator
    pictures: dict[str, np.ndarray]  # predicted after every epoch, by name, (H, W, C)
    staging: str
    events: Any  # a tf.summary writer, or None

    @property
    def num_steps(self) -> int:
        """Steps of an epoch."""
        return -(-len(self.dataset.split("train")) // self.config.global_batch_size)

    def restore(self) -> TrainState:
        """Returns the state of the newest verified checkpoint, or of a new run."""
        with tempfile.TemporaryDirectory(dir=self.staging) as folder:
            found = self.run.restore(folder)
            if found is None:
                if self.config.init_from is not None:
                    initialize_from(self.model, self.config.init_from)
                return TrainState(learning_rate=self.config.optimizer.learning_rate)
            commit, members = found
            checkpoint.read_weights(self.model, members[checkpoint.WEIGHTS_NAME])
            checkpoint.read_optimizer(self.optimizer, members[checkpoint.OPTIMIZER_NAME])
            state = TrainState(**checkpoint.read_state(members[checkpoint.STATE_NAME]))
        logger.info(
            "resuming %s: epoch %d, step %d of %d",
            commit.prefix,
            state.epoch + 1,
            state.step_in_epoch,
            self.num_steps,
        )
        self._write_tables(state)
        return state

    def train_steps(self, state: TrainState) -> Iterator[tuple[float, int]]:
        """Does the rest of the epoch in progress; yields (loss, images) of every update."""
        split = self.dataset.split("train")
        order = sample_order(len(split), seed=self.config.seed, epoch=state.epoch)
        plan = global_batches(order, self.config.global_batch_size)[state.step_in_epoch :]
        batches = distributed_batches(
            self.strategy,
            self.dataset,
            self.readers["train"],
            plan,
            seed=self.config.seed,
            epoch=state.epoch,
            augmentation=self.config.augmentation,
        )
        running = RunningSums()
        running.load_state(state.sums)
        for batch in batches:
            # Tensors, because a Python number would be compiled into a step of its own.
            step = tf.constant(state.step, tf.int64)
            sums = self.train_step(batch, step, tf.constant(state.learning_rate, tf.float64))
            running.add(sums)
            state.sums = running.state()
            state.step += 1
            state.step_in_epoch += 1
            total, count = sums["loss"]
            yield float(total) / float(count), int(count)

    def validate(self, state: TrainState, should_stop: Callable[[], bool]) -> dict[str, Any]:
        """Returns the numbers of the epoch whose steps are done.

        Raises:
            StoppedError: `should_stop` answered yes.
        """
        running = RunningSums()
        running.load_state(state.sums)
        validation = self.evaluate("valid", should_stop)
        row: dict[str, Any] = {"epoch": state.epoch, "learning_rate": state.learning_rate}
        row |= means_of(running, self.evaluator.metrics)
        row |= {f"val_{name}": value for name, value in validation.means.items()}
        foreground = validation.summary["foreground_mean"]
        return row | {f"val_foreground_{name}": foreground[name] for name in ("dice", "iou")}

    def finish_epoch(self, state: TrainState, row: dict[str, Any], *, images_per_s: float) -> None:
        """Ends the epoch in progress: schedules, tables, pictures, checkpoint.

        The checkpoint comes last: an epoch whose pictures are missing is done again.
        """
        is_best = self._schedule(state, row)
        state.rows.append(row)
        state.epoch, state.step_in_epoch, state.sums = state.epoch + 1, 0, {}
        if is_best:
            best = {"epoch": row["epoch"], "val_loss": row["val_loss"]}
            state.best = best | {"step": state.step, "attempt": self.run.attempt}
        state.throughput.append(
            {
                "epoch": row["epoch"],
                "train_images_per_s": images_per_s,
            }
        )
        self._write_tables(state)
        self._write_predictions(row["epoch"])
        self._write_events(row)
        self.commit(state)

    def commit(self, state: TrainState) -> None:
        """Writes a checkpoint of `state` and the weights; drops those no longer needed."""
        values = dataclasses.asdict(state)
        members = checkpoint.write_members(self.staging, self.model, self.optimizer, values)
        self.run.commit(state.step, state.epoch, members, {"step_in_epoch": state.step_in_epoch})
        keep = [commit_prefix(state.best["step"], state.best["attempt"])] if state.best else []
        self.run.collect_garbage(self.config.keep_checkpoints, keep)

    def evaluate(self, split: str, should_stop: Callable[[], bool]) -> Evaluation:
        """Returns the evaluation of `split` with the present weights."""
        return self.evaluator.evaluate(split, self.readers[split], should_stop=should_stop)

    def evaluate_best(self, state: TrainState, should_stop: Callable[[], bool]) -> dict[str, Any]:
        """Writes and returns the evaluation of the test split with the best weights.

        Empty where there is no test split.

        Raises:
            StoppedError: `should_stop` answered yes.
        """
        if state.best is None or "test" not in self.dataset.splits:
            return {}
        step, attempt = state.best["step"], state.best["attempt"]
        place = Place(attempt, step, commit_prefix(step, attempt))
        with tempfile.TemporaryDirectory(dir=self.staging) as folder:
            _, members = fetch_commit(
                self.run.store, place, folder, names=[checkpoint.WEIGHTS_NAME]
            )
            checkpoint.read_weights(self.model, members[checkpoint.WEIGHTS_NAME])
        evaluation = self.evaluate("test", should_stop)
        write_evaluation(self.run.store, evaluation, self.evaluator, self.readers["test"])
        return dict(evaluation.summary)

    def _schedule(self, state: TrainState, row: dict[str, Any]) -> bool:
        """Lets both schedules see the validation loss; returns whether it is the best so far."""
        settings, loss = self.config.schedule, row["val_loss"]
        if settings.reduce_on_plateau:
            reducer = PlateauReducer(
                factor=settings.reducer_factor,
                patience=settings.reducer_patience,
                min_lr=settings.min_learning_rate,
            )
            if state.reducer is not None:
                reducer.load_state(state.reducer)
            state.learning_rate = reducer.update(loss, state.learning_rate)
            state.reducer = reducer.state()
        stopping = EarlyStopping(patience=settings.early_stopping_patience)
        if state.stopping is not None:
            stopping.load_state(state.stopping)
        state.stopped_early = stopping.update(loss, row["epoch"])
        state.stopping = stopping.state()
        return state.best is None or loss < state.best["val_loss"]

    def _write_tables(self, state: TrainState) -> None:
        metrics = self.evaluator.metrics
        names = [*metrics, *(f"val_{name}" for name in metrics)]
        for name, text in History(state.rows, metrics=names).tables().items():
            self.run.put_bytes(f"metrics/{name}", text.encode())
        if not state.rows:
            return
        names_s = list(state.throughput[0])
        text = csv_table(names_s, ([row[name] for name in names_s] for row in state.throughput))
        self.run.put_bytes("metrics/throughput.csv", text.encode())
        curves = {
            "train_losses": ("loss", "val_loss"),
            "train_metrics": tuple(names),
            "foreground": ("val_foreground_dice", "val_foreground_iou"),
        }
        epochs = [row["epoch"] for row in state.rows]
        for stem, columns in curves.items():
            series = {
                name: [float("nan") if row[name] is None else row[name] for row in state.rows]
                for name in columns
            }
            if series:
                picture = plots.curve_png(
                    stem, epochs, series, "loss" if "loss" in stem else "value"
                )
                self.run.put_bytes(f"metrics/{stem}.png", picture)

    def _write_predictions(self, epoch: int) -> None:
        for name, pixels in self.pictures.items():
            ids = self.evaluator.predict(pixels[np.newaxis])[0]
            picture = plots.mask_png(ids, self.dataset.manifest.classes)
            # The reference counts epochs from 1 here.
            self.run.put_bytes(f"epoch_change_infer/Epoch_{epoch + 1}_{name}.png", picture)

    def _write_events(self, row: dict[str, Any]) -> None:
        if self.events is None:
            return
        with self.events.as_default():
            for name, value in row.items():
                if name != "epoch" and value is not None:
                    tf.summary.scalar(name, value, step=row["epoch"])
        self.events.flush()
        folder = os.path.join(self.staging, "tensorboard")
        for name in os.listdir(folder):
            path = os.path.join(folder, name)
            self.run.store.put_file(f"tensorboard/attempt-{self.run.attempt}/{name}", path)


@contextmanager
def open_session(
    config: TrainConfig, run: Run, strategy: tf.distribute.Strategy, dataset: Dataset
) -> Iterator[Session]:
    """Yields a session whose model, steps and readers are ready; nothing is trained yet.

    Writes what describes the run: `config.yaml`, `environment.json`, a copy of the manifest.

    Raises:
        UsageError: a split without samples, or a model that does not fit the dataset.
    """
    for name in ("train", "valid"):
        dataset.split(name)
    with strategy.scope():
        model = model_for(config, dataset.manifest)
        optimizer = Adam(config.optimizer, model.trainable_variables)
    evaluator = make_evaluator(config, strategy, dataset, model)
    _describe(config, run, dataset, strategy)
    with ExitStack() as stack:
        staging = stack.enter_context(tempfile.TemporaryDirectory(prefix="flexunet-"))
        readers = {}
        for name, split in dataset.splits.items():
            readers[name] = open_reader(
                dataset, split, cache=config.cache, cache_dir=config.cache_dir
            )
        events = None
        if config.tensorboard:
            events = tf.summary.create_file_writer(os.path.join(staging, "tensorboard"))
            stack.callback(events.close)
        yield Session(
            config=config,
            run=run,
            strategy=strategy,
            dataset=dataset,
            readers=readers,
            model=model,
            optimizer=optimizer,
            train_step=make_train_step(
                strategy, model, optimizer, evaluator.loss, evaluator.metrics
            ),
            evaluator=evaluator,
            pictures=_pictures(config, dataset, readers["valid"]),
            staging=staging,
            events=events,
        )


def _pictures(config: TrainConfig, dataset: Dataset, reader: RecordReader) -> dict[str, np.ndarray]:
    """Returns the pictures to predict after every epoch, by name, at the model's size."""
    count = config.prediction_images
    if config.prediction_folder is None:
        split = dataset.split("valid")
        return {split.ids[i]: read_sample(reader, i)[0] for i in range(min(count, len(split)))}
    store = open_store(config.prediction_folder)
    pictures = {}
    for name in find_images(store)[:count]:
        image = read_image(store.get(name), name=f"{store.url}/{name}")
        stem = os.path.splitext(name)[0].replace("/", "_")
        pictures[stem] = to_model_pixels(image, dataset.manifest, name=name)[0]
    return pictures


def _describe(
    config: TrainConfig, run: Run, dataset: Dataset, strategy: tf.distribute.Strategy
) -> None:
    run.put_bytes("config.yaml", write_yaml(config).encode())
    run.put_bytes(MANIFEST_NAME, open_store(dataset.url).get(MANIFEST_NAME))
    packages = ("flexunet", "tensorflow", "keras", "numpy", "opencv-python-headless")
    environment = {
        "packages": {name: version(name) for name in packages},
        "commit": _source_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "devices": [device.name for device in tf.config.list_logical_devices()],
        "replicas": strategy.num_replicas_in_sync,
        "precision": config.precision,
        "dataset": dataset.url,
        "dataset_sha256": dataset.digest,
        "attempt": run.attempt,
    }
    run.put_bytes("environment.json", (json.dumps(environment, indent=2) + "\n").encode())


def _source_commit() -> str | None:
    """Returns the git commit that this package runs from; None where it was installed."""
    folder = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    if not os.path.exists(os.path.join(folder, ".git")):
        return None
    arguments = ["git", "-C", folder, "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        found = subprocess.run(arguments, capture_output=True, text=True, timeout=10, check=True)  # noqa: S603 - fixed arguments
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()
