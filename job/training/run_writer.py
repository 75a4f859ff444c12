"""Writes the results of a run: tables, curves, predictions, events, checkpoints, evaluation.

Only the first process writes them. Everything goes through an upload queue, in order, so that
training does not wait for storage. The checkpoint is last, so that an epoch with missing tables or
images is trained again.
"""

import collections
import dataclasses
import functools
import json
import logging
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any

import numpy as np
import tensorflow as tf

from data_prep.shards.manifest import MANIFEST_NAME
from flexunet.errors import ContentError, FlexUNetError, StorageError
from flexunet.progress import Heartbeat
from flexunet.settings import write_yaml
from flexunet.storage import NotFound, ObjectStore, open_store
from flexunet.tables import csv_table
from flexunet.text import pluralize
from job.config import TrainConfig
from job.data.dataset import Dataset
from job.evaluation.artifacts import evaluation_folder, write_evaluation
from job.evaluation.evaluator import Evaluation, Evaluator
from job.optimization.optimizer import Adam
from job.optimization.time_schedule import RECORD_NAME
from job.postprocessing.masks import masked
from job.reporting import plots
from job.reporting.csv_tables import CURVE_LABELS, CURVE_TITLES, History
from job.reporting.html_report import renew_report
from job.runs import serialization
from job.runs.checkpoints import download_checkpoint
from job.runs.layout import CheckpointRef, checkpoint_prefix
from job.runs.provenance import source_commit
from job.runs.run import Run
from job.runs.upload_queue import UploadQueue
from job.trackers.background import BackgroundTracker, Status
from job.trackers.numbers import (
    CLASS_DICE_NAME,
    Row,
    class_dice_table,
    joined_rows,
    read_class_dice,
)
from job.trackers.tensorboard import EventLog, shows_epoch
from job.training.staging import kept_words
from job.training.state import TrainState

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class PredictionInput:
    """An image (H, W, C) in the format of the dataset, and its true class ids (H, W), if known."""

    image: np.ndarray
    truth: np.ndarray | None = None


@dataclasses.dataclass
class RunWriter:
    """Writes the results of one run; made by `trainer_factory.open_run_writer`."""

    config: TrainConfig
    run: Run
    upload_queue: UploadQueue
    evaluator: Evaluator
    model: Any
    optimizer: Adam
    prediction_inputs: dict[str, PredictionInput]  # predicted after every epoch, by name
    staging: str
    events: EventLog | None
    tracker: BackgroundTracker | None
    # Rows of CLASS_DICE_NAME, of the finished epochs.
    class_dice: list[Row] = dataclasses.field(default_factory=list)
    # Functions that complete the checkpoints that are not stored yet, oldest first.
    pending: list[Callable[[], dict[str, str]]] = dataclasses.field(default_factory=list)
    memory: serialization.Memory = dataclasses.field(default_factory=list)
    # The checkpoints that were stored and not yet reported, oldest first; filled by the queue.
    stored: collections.deque[dict[str, Any]] = dataclasses.field(default_factory=collections.deque)

    @property
    def has_failed(self) -> bool:
        """Whether an upload failed or the run was lost; `flush` raises the error."""
        return self.upload_queue.has_failed or self.run.lost

    @property
    def _store(self) -> ObjectStore:
        """The folder of the run, for the upload thread; reports moved bytes."""
        return self.run.store.watched(self.upload_queue.moved)

    @property
    def has_capacity(self) -> bool:
        """Whether a checkpoint can be taken without waiting for earlier ones."""
        return self.upload_queue.has_capacity

    def restore(self, heartbeat: Heartbeat) -> dict[str, Any] | None:
        """Reads the newest verified checkpoint into model and optimizer and returns its state.

        None for a new run.

        Args:
            heartbeat: called while bytes move.
        """
        with tempfile.TemporaryDirectory(dir=self.staging) as folder:
            found = self.run.restore(folder, moved=heartbeat)
            if found is None:
                self._notify_tracker(0)
                return None
            commit, members = found
            serialization.read_trained_weights(self.model, self.optimizer, members)
            serialization.read_optimizer(self.optimizer, members[serialization.OPTIMIZER_NAME])
            values = serialization.read_state(members[serialization.STATE_NAME])
        state = TrainState(**values)
        logger.info(
            "resuming from %s, after %s and %s of the next",
            commit.prefix,
            pluralize(state.epoch, "epoch"),
            pluralize(state.step_in_epoch, "step"),
        )
        self.class_dice = read_class_dice(self.run.store, state.epoch)
        self.write_tables(state)
        self._rewrite_events(state)
        self._notify_tracker(state.epoch)
        return values

    def save(self, state: TrainState, heartbeat: Heartbeat) -> None:
        """Takes a checkpoint of `state` and the current weights, and queues its upload.

        Waits while two others are in upload. `flush` raises a failure.

        Args:
            heartbeat: called while it waits and bytes move.
        """
        try:
            self._save(state, heartbeat)
        except FlexUNetError as error:
            self.upload_queue.fail(error)

    def flush(self, heartbeat: Heartbeat) -> None:
        """Waits until everything is stored.

        Args:
            heartbeat: called while bytes move.

        Raises:
            LockedError: this process has lost the run.
            StorageError: storage is full, or could not be reached for too long.
        """
        try:
            self.upload_queue.flush(heartbeat)
        except StorageError as error:
            raise StorageError(f"{error}{self._kept()}") from error
        self.run.check_owned()

    def _kept(self) -> str:
        """Completes the checkpoints that were not stored; returns words on the newest one."""
        try:
            return kept_words(self.pending)
        except StorageError:
            return ""

    def write_predictions(self, epoch: int, heartbeat: Heartbeat) -> None:
        """Stores the masks of some images, predicted with the current weights.

        Args:
            heartbeat: called for every batch of windows.
        """
        evaluator, events = self.evaluator, self.events if shows_epoch(epoch) else None
        for name, each in self.prediction_inputs.items():
            probabilities = evaluator.predict(each.image, heartbeat)
            ids = masked(probabilities, evaluator.postprocessing)
            mask_png = plots.mask_png(ids, evaluator.dataset.manifest.classes)
            # The reference counts epochs from 1 here.
            self.put(f"epoch_change_infer/Epoch_{epoch + 1}_{name}.png", mask_png)
            if events is not None:
                events.add_case(name, each.image, each.truth, ids, probabilities)
        if events is not None:
            events.put_epoch(epoch)

    def end_epoch(self, state: TrainState, class_dice: Row, heartbeat: Heartbeat) -> None:
        """Stores the results of an epoch except predictions, with a checkpoint last.

        Args:
            heartbeat: as for `save`.
        """
        self.class_dice.append(class_dice)
        self.write_tables(state)
        if self.events is not None:
            self.events.write_numbers(self._joined_rows(state)[-1:])
        self.save(state, heartbeat)

    def write_tables(self, state: TrainState) -> None:
        """Stores the tables and curves of the finished epochs."""
        metrics = self.evaluator.metrics
        names = [*metrics, *(f"val_{name}" for name in metrics)]
        for name, text in History(state.rows, metrics=names).tables().items():
            self.put(f"metrics/{name}", text.encode())
        if state.time is not None:
            self.put(RECORD_NAME, state.time.table().encode())
        if not state.rows:
            return
        columns = list(state.throughput[0])
        rows = ([row[name] for name in columns] for row in state.throughput)
        self.put("metrics/throughput.csv", csv_table(columns, rows).encode())
        if self.class_dice:
            self.put(CLASS_DICE_NAME, class_dice_table(self.class_dice).encode())
        curves = {
            "train_losses": ("loss", "val_loss"),
            "train_metrics": tuple(names),
            "foreground": ("val_foreground_dice", "val_foreground_iou"),
        }
        epochs = [row["epoch"] + 1 for row in state.rows]
        for stem, lines in curves.items():
            series = {
                name: [float("nan") if row[name] is None else row[name] for row in state.rows]
                for name in lines
            }
            if series:
                ylabel = "loss" if "loss" in stem else "score"
                png = plots.curve_png(CURVE_TITLES[stem], epochs, series, ylabel, CURVE_LABELS)
                self.put(f"metrics/{stem}.png", png)

    def read_best(self, state: TrainState, heartbeat: Heartbeat) -> list[str]:
        """Reads the weights of the best checkpoint into the model.

        Returns folder and digest of the checkpoint; nothing if it is damaged: the newest weights
        stay, averaged if the run averages them. `state.best` must be set.

        Args:
            heartbeat: called while bytes move.
        """
        self.flush(heartbeat)
        assert state.best is not None  # noqa: S101 - the caller's promise
        step, attempt = state.best["step"], state.best["attempt"]
        ref = CheckpointRef(attempt, step, checkpoint_prefix(step, attempt))
        with tempfile.TemporaryDirectory(dir=self.staging) as folder:
            try:
                store = self.run.store.watched(heartbeat)
                commit, members = download_checkpoint(
                    store, ref, folder, names=[serialization.WEIGHTS_NAME]
                )
            except (ContentError, NotFound) as error:
                logger.warning(
                    "the best checkpoint is damaged, evaluating the newest instead: %s", error
                )
                if self.optimizer.average is not None:
                    self.optimizer.average.move_to_weights()
                return []
            serialization.read_weights(self.model, members[serialization.WEIGHTS_NAME])
        return [commit.prefix, commit.sha256]

    def write_evaluation(self, evaluation: Evaluation) -> None:
        """Stores the evaluation of a split."""
        target = evaluation_folder(self._store, evaluation.split.name)
        self.upload_queue.post(lambda: write_evaluation(target, evaluation, self.evaluator))

    def write_stop(self, state: TrainState, heartbeat: Heartbeat) -> None:
        """Records, after all earlier uploads, that this attempt was stopped."""
        ref = {"epoch": state.epoch + 1, "step": state.step_in_epoch}
        self.upload_queue.post(lambda: self.run.note_end("stopped", **ref))
        self.flush(heartbeat)
        self._note_status("KILLED")

    def write_outcome(
        self, status: str, exit_code: int, details: Mapping[str, Any], heartbeat: Heartbeat
    ) -> None:
        """Stores the outcome of the run and the report, after all earlier uploads."""
        self.upload_queue.post(lambda: self.run.write_outcome(status, exit_code, **details))
        self.upload_queue.post(lambda: renew_report(self._store))
        self.flush(heartbeat)
        self._note_status("FINISHED" if status == "finished" else "FAILED")

    def write_description(self, dataset: Dataset, strategy: Any) -> None:
        """Stores the config, the environment and a copy of the manifest."""
        environment = _environment(self.config, dataset, strategy, self.run.attempt)
        self.put("config.yaml", write_yaml(self.config).encode())
        self.put(MANIFEST_NAME, open_store(dataset.url).get(MANIFEST_NAME))
        self.put("environment.json", (json.dumps(environment, indent=2) + "\n").encode())

    def put(self, name: str, data: bytes) -> None:
        """Queues a file of the run."""
        self.upload_queue.post(lambda: self._store.put(name, data))

    def _save(self, state: TrainState, heartbeat: Heartbeat) -> None:
        self.upload_queue.wait_for_capacity(heartbeat)
        with serialization.disk_errors(self.staging):
            folder = tempfile.mkdtemp(prefix="checkpoint-", dir=self.staging)
        values = state.as_values()
        finish = functools.cache(
            serialization.take(folder, self.model, self.optimizer, values, self.memory)
        )
        step, epoch, position = state.step, state.epoch, {"step_in_epoch": state.step_in_epoch}
        prefix = checkpoint_prefix(step, self.run.attempt)
        stored = {"epoch": epoch, "step": state.step_in_epoch, "checkpoint": prefix}
        keep = [checkpoint_prefix(state.best["step"], state.best["attempt"])] if state.best else []

        def store() -> None:
            members, moved = finish(), self.upload_queue.moved
            self.run.commit(step, epoch, members, position, keep=keep, moved=moved)
            self.run.collect_garbage(self.config.keep_checkpoints)
            self.pending.remove(finish)
            self.stored.append(stored)
            if self.tracker is not None:
                self.tracker.notify(epoch)
            shutil.rmtree(folder, ignore_errors=True)

        self.pending.append(finish)
        self.upload_queue.post(store, is_large=True)

    def _rewrite_events(self, state: TrainState) -> None:
        """Writes the numbers of all epochs as those of this attempt, each epoch once."""
        events, run, num_epochs = self.events, self.run, state.epoch
        if events is not None:
            events.write_numbers(self._joined_rows(state))
            self.upload_queue.post(lambda: events.forget_others(run.store, num_epochs))

    def _joined_rows(self, state: TrainState) -> list[dict[str, Any]]:
        return joined_rows(state.rows, state.throughput, class_dice=self.class_dice)

    def _notify_tracker(self, num_epochs: int) -> None:
        """Notifies the tracker when everything so far is stored."""
        tracker = self.tracker
        if tracker is not None:
            self.upload_queue.post(lambda: tracker.notify(num_epochs))

    def _note_status(self, status: Status) -> None:
        if self.tracker is not None:
            self.tracker.status = status


def _environment(
    config: TrainConfig, dataset: Dataset, strategy: Any, attempt: int
) -> dict[str, Any]:
    packages = ("flexunet", "tensorflow", "keras", "numpy", "opencv-python-headless")
    return {
        "packages": {name: version(name) for name in packages},
        "commit": source_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "devices": [device.name for device in tf.config.list_logical_devices()],
        "replicas": strategy.num_replicas_in_sync,
        "precision": config.precision,
        "dataset": dataset.url,
        "dataset_sha256": dataset.digest,
        "attempt": attempt,
    }
