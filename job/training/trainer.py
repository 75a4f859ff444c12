"""Holds the objects of one training process: model, optimizer, compiled steps, readers.

`job/training/loop.py` is the loop over it. Everything that must survive the process is in
`TrainState` and in the weights; a trainer can be rebuilt from a checkpoint at any step. Every
process has a trainer and computes the same; only that of the first process has a run writer.
"""

import dataclasses
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import tensorflow as tf

from flexunet.errors import DivergedError, StoppedError
from flexunet.progress import Heartbeat, is_watched
from flexunet.text import pluralize
from job.config import TrainConfig
from job.data.dataset import Dataset
from job.data.pipeline import distributed_batches, one_ahead, plan_epoch
from job.data.reader import RecordReader
from job.distributed.process_group import ProcessGroup
from job.evaluation.artifacts import draw_examples
from job.evaluation.evaluator import Evaluation, Evaluator, means_of
from job.evaluation.rank_evaluation import Watch
from job.evaluation.validation_fit import fit_postprocessing, log_fit
from job.metrics.batch import RunningSums
from job.optimization.loss_scale import MOST_SKIPPED
from job.optimization.optimizer import Adam
from job.optimization.schedule import stopped_early_words
from job.optimization.time_schedule import TrainingClock, read_record
from job.postprocessing.stored import POSTPROCESSING_NAME
from job.runs.layout import ORIGIN_NAME
from job.runs.provenance import Origin, as_record, origin_json, read_origin, set_initial_weights
from job.runs.run import Run
from job.trackers.numbers import class_dice_row
from job.training.run_writer import RunWriter
from job.training.setup import TrainingSetup
from job.training.state import EpochNumbers, TrainState, diverged_words
from job.training.step import SKIPPED, StepMessages

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclasses.dataclass
class Trainer:
    """Trains one run in one process; made by `trainer_factory.open_trainer`."""

    setup: TrainingSetup
    readers: dict[str, RecordReader]
    model: Any
    optimizer: Adam
    train_step: Any  # a `TrainStep`
    evaluator: Evaluator
    run_writer: RunWriter | None  # of the first process
    heartbeat: Heartbeat  # called during long work in this process
    messages: StepMessages  # of the processes, with each step
    attempt: int = 0  # of the run, known from `restore` on
    init_from: list[dict[str, str]] = dataclasses.field(default_factory=list)  # likewise
    skipped_in_row: int = 0  # steps until now, see `LossScale`
    clock: TrainingClock | None = None  # with a time budget, from `restore` on

    @property
    def config(self) -> TrainConfig:
        """The config of the setup."""
        return self.setup.config

    @property
    def dataset(self) -> Dataset:
        """The dataset of the setup."""
        return self.setup.dataset

    @property
    def strategy(self) -> tf.distribute.Strategy:
        """The strategy of the setup."""
        return self.setup.strategy

    @property
    def process_group(self) -> ProcessGroup:
        """The process group of the setup."""
        return self.setup.process_group

    @property
    def num_steps(self) -> int:
        """Number of steps per epoch."""
        return -(-len(self.dataset.split("train")) // self.config.global_batch_size)

    @property
    def has_failed(self) -> bool:
        """Whether this process must end; `end_stopped` raises the reason."""
        return self.run_writer is not None and self.run_writer.has_failed

    @property
    def is_stuck(self) -> bool:
        """Whether no loss scale keeps the gradient finite; `end_diverged` reports it."""
        return self.skipped_in_row >= MOST_SKIPPED

    @property
    def _shows_bar(self) -> bool:
        return self.config.progress and self.process_group.is_primary and is_watched()

    def restore(self) -> TrainState:
        """Returns the state of the newest verified checkpoint, or of a new run."""

        def read(heartbeat: Heartbeat) -> dict[str, Any]:
            if self.run_writer is None:
                return {}
            run, state = self.run_writer.run, self.run_writer.restore(heartbeat)
            if state is None:
                origin = self._initialize(run, heartbeat)
            else:
                origin = read_origin(run.store, self.config)
            known = as_record([origin], self.dataset)
            followed = self.config.time_schedule
            record = None if followed is None else read_record(followed)
            return {"state": state, "attempt": run.attempt, "init_from": known, "record": record}

        found = self.process_group.all_gather_with_heartbeat(read, self.heartbeat)[0]
        self.attempt, self.init_from = found["attempt"], found["init_from"]
        # Random weights of a new run are the same everywhere: they depend on the seed.
        config = self.config
        if found["state"] or config.init_from or config.model.pretrained_encoder:
            self.process_group.broadcast([*self.model.variables, *self.optimizer.variables])
        new = {"learning_rate": self.config.optimizer.learning_rate}
        state = TrainState(**(found["state"] or new))
        state.begin(self.config, found["record"])
        if state.time is not None:
            self.clock = TrainingClock(state.time.used_s)
        return state

    def _initialize(self, run: Run, heartbeat: Heartbeat) -> Origin | None:
        """Reads the initial weights of a new run; stores and returns their origin."""
        origin = set_initial_weights(self.model, self.config, self.dataset, heartbeat)
        if self.optimizer.average is not None:
            self.optimizer.average.restart()
        if origin is not None:
            run.put_text(ORIGIN_NAME, origin_json(origin))
        return origin

    def train_steps(self, state: TrainState) -> Iterator[tuple[float, int]]:
        """Trains the rest of the current epoch; yields (loss, images) of every step."""
        if state.is_time_over():  # a restart before the validation
            return
        plan = plan_epoch(
            self.config,
            self.dataset.split("train"),
            epoch=state.epoch,
            first_step=state.step_in_epoch,
            share=state.foreground_share(self.config),
        )
        batches = distributed_batches(
            self.strategy,
            self.dataset,
            self.readers["train"],
            plan,
            first_replica=self.process_group.first_replica,
        )
        running = RunningSums()
        running.load_state(state.sums)
        skipped_before = state.skipped

        for batch in one_ahead(batches):
            # Tensors: a Python number would compile a new step for each value.
            step = tf.constant(state.updates, tf.int64)
            rate = tf.constant(state.rate(self.config, self.num_steps), tf.float64)
            arguments = (batch, step, rate)
            sums, used_s = self.messages.run_step(self.train_step, arguments, self._used_s())
            self._count_skipped(state, sums)
            running.add(sums)
            state.sums = running.state()
            state.end_step(used_s)
            total, count = sums["loss"]
            yield total / count, int(count)
            if state.is_time_over():
                break
        self._log_skipped(state, state.skipped - skipped_before)

    def _count_skipped(self, state: TrainState, sums: Any) -> None:
        """Removes the `SKIPPED` entry from `sums`, and counts a skipped step."""
        total, count = sums.pop(SKIPPED, (0.0, 1.0))
        self.skipped_in_row = int(total / count)
        state.skipped += self.skipped_in_row > 0

    def _log_skipped(self, state: TrainState, number: int) -> None:
        scale = self.optimizer.loss_scale
        if number and scale is not None and self.process_group.is_primary:
            logger.info(
                "epoch %d: skipped %s because gradients overflowed float16; the loss scale is now "
                "%g",
                state.epoch + 1,
                pluralize(number, "step"),
                scale.value,
            )

    def validate(self, state: TrainState, should_stop: Callable[[], bool]) -> EpochNumbers | None:
        """Validates; returns the numbers of the epoch; None if stopped."""
        running = RunningSums()
        running.load_state(state.sums)
        try:
            with self.optimizer.averaged_weights():
                validation = self.evaluator.evaluate(
                    "valid",
                    self.readers["valid"],
                    should_stop=should_stop,
                    heartbeat=self.heartbeat,
                )
        except StoppedError:
            return None
        rate = state.rate(self.config, self.num_steps, offset=-1)
        row: dict[str, Any] = {"epoch": state.epoch, "learning_rate": rate}
        row |= means_of(running, self.evaluator.metrics)
        row |= {f"val_{name}": value for name, value in validation.means.items()}
        foreground = validation.summary["foreground_mean"]
        row |= {f"val_foreground_{name}": foreground[name] for name in ("dice", "iou")}
        return EpochNumbers(row, class_dice_row(state.epoch, validation.summary["classes"]))

    def finish_epoch(
        self, state: TrainState, numbers: EpochNumbers, *, images_per_s: float
    ) -> None:
        """Ends the current epoch: updates the schedules, then stores its results.

        All processes wait for the first, which may have to wait for earlier checkpoints.

        Raises:
            FlexUNetError: the processes no longer have the same weights.
        """
        averages = self.optimizer.average.variables if self.optimizer.average else []
        self.process_group.check_same([*self.model.variables, *averages])
        row = numbers.row
        is_best = state.watch(row["val_loss"], self.config.schedule)
        state.rows.append(row)
        state.epoch, state.step_in_epoch, state.sums = state.epoch + 1, 0, {}
        if is_best:
            best = {"epoch": row["epoch"], "val_loss": row["val_loss"]}
            state.best = best | {"step": state.step, "attempt": self.attempt}
        state.throughput.append({"epoch": row["epoch"], "train_images_per_s": images_per_s})
        run_writer = self.run_writer

        def store(run_writer: RunWriter, heartbeat: Heartbeat) -> float | None:
            with self.optimizer.averaged_weights():
                run_writer.write_predictions(row["epoch"], heartbeat)
            used_s = self._used_s()
            state.note_epoch_end(used_s)
            run_writer.end_epoch(state, numbers.class_dice, heartbeat)
            return used_s

        # Images of many windows take long, and so does a slow connection to storage.
        used_s = self._recorded(store)
        if run_writer is None:
            state.note_epoch_end(used_s)
        if state.stopped_early and state.best is not None and run_writer is not None:
            words = stopped_early_words(state.epoch, state.best["epoch"])
            logger.info("%s (--schedule.early-stopping-patience)", words)

    def save(self, state: TrainState) -> None:
        """Takes a checkpoint that is stored while training continues.

        Takes none while two are in upload, so that no step waits for storage.
        """
        if self.run_writer is not None and self.run_writer.has_capacity:
            state.note_used(self._used_s())
            self.run_writer.save(state, self.heartbeat)

    def _used_s(self) -> float | None:
        return None if self.clock is None else self.clock.used_s()

    def take_stored(self) -> Iterator[dict[str, Any]]:
        """Yields the checkpoints that were stored since the last call; on the first process."""
        if self.run_writer is not None:
            while self.run_writer.stored:
                yield self.run_writer.stored.popleft()

    def end_stopped(self, state: TrainState) -> StoppedError:
        """Stores a checkpoint and returns the error to raise.

        Raises:
            LockedError, StorageError: the run was lost, or could not be stored.
        """

        def store(run_writer: RunWriter, heartbeat: Heartbeat) -> None:
            state.note_used(self._used_s())
            run_writer.save(state, heartbeat)
            run_writer.write_stop(state, heartbeat)

        self._recorded(store)
        return StoppedError(
            f"stopped and saved at epoch {state.epoch + 1}, step {state.step_in_epoch}; "
            "the same command resumes"
        )

    def end_diverged(self, state: TrainState, loss: float) -> DivergedError:
        """Ends the run permanently and returns the error to raise."""
        problem = f"the loss became {loss}"
        if self.is_stuck and math.isfinite(loss):
            problem = f"the gradient was not finite in {self.skipped_in_row} steps in a row"
        reason = diverged_words(self.config, state, problem)
        self._write_outcome("diverged", DivergedError.exit_code, {"reason": reason})
        return DivergedError(reason)

    def evaluate_best(
        self, state: TrainState, should_stop: Callable[[], bool]
    ) -> Evaluation | None:
        """Returns the evaluation of the test split with the best weights; None if it is empty.

        Args:
            should_stop: whether this process requests a stop.

        Raises:
            StoppedError: `should_stop` returned true in one of the processes.
            LockedError, StorageError: the run was lost, or the checkpoint could not be stored.
        """
        has_test, fits = "test" in self.dataset.splits, self.config.fit_postprocessing
        if state.best is None or not (has_test or fits):
            return None
        best = self._recorded(lambda run_writer, heartbeat: run_writer.read_best(state, heartbeat))
        self.process_group.broadcast(self.model.variables)
        try:
            evaluator = self._fitted(best, should_stop) if fits and best else self.evaluator
            if not has_test:
                return None
            evaluation = evaluator.evaluate(
                "test",
                self.readers["test"],
                measured=True,
                shown=self._shows_bar,
                should_stop=should_stop,
                heartbeat=self.heartbeat,
            )
        except StoppedError:
            # A failure may be the cause, which the first process knows.
            self._recorded(lambda run_writer, heartbeat: run_writer.write_stop(state, heartbeat))
            raise
        epochs = state.best["epoch"] + 1 if best else state.epoch
        used = {"which": "best" if best else "last", "epochs": [epochs]}
        evaluation.summary["checkpoint"] = used
        evaluation.summary["init_from"] = self.init_from
        examples: dict[str, bytes] = {}

        def draw(run_writer: RunWriter, heartbeat: Heartbeat) -> None:
            examples.update(draw_examples(evaluator, evaluation, self.readers["test"], heartbeat))

        self._recorded(draw)
        return dataclasses.replace(evaluation, examples=examples)

    def _fitted(self, checkpoint: list[str], should_stop: Callable[[], bool]) -> Evaluator:
        """Fits and stores the postprocessing of the best weights; returns an evaluator with it."""
        watch = Watch(self._shows_bar, should_stop, self.heartbeat)
        valid = self.readers["valid"]
        fitted = fit_postprocessing(self.evaluator, valid, checkpoint, watch)
        if self.run_writer is not None:
            log_fit(fitted)
            self.run_writer.put(POSTPROCESSING_NAME, fitted.text().encode())
        return self.evaluator.with_postprocessing(fitted)

    def end_finished(self, state: TrainState, evaluation: Evaluation | None) -> dict[str, Any]:
        """Stores the evaluation of the test split, ends the run, returns the outcome.

        Raises:
            LockedError, StorageError: the run was lost, or could not be stored.
        """
        outcome: dict[str, Any] = {
            "epochs": state.epoch,
            "stopped_early": state.stopped_early,
            "best": state.best,
            "skipped_steps": state.skipped,
            "evaluation": dict(evaluation.summary) if evaluation else {},
        }
        outcome |= state.time_outcome()
        if self.run_writer is not None and evaluation is not None:
            self.run_writer.write_evaluation(evaluation)
        self._write_outcome("finished", 0, outcome)
        return outcome

    def _write_outcome(self, status: str, exit_code: int, details: dict[str, Any]) -> None:
        self._recorded(
            lambda run_writer, heartbeat: run_writer.write_outcome(
                status, exit_code, details, heartbeat
            )
        )

    def _recorded(self, work: Callable[[RunWriter, Heartbeat], T]) -> T | None:
        """Runs `work` in the first process, which has the run writer; returns its result to all.

        The other processes wait while it makes progress.
        """
        run_writer = self.run_writer

        def of_first(heartbeat: Heartbeat) -> T | None:
            return work(run_writer, heartbeat) if run_writer is not None else None

        return self.process_group.all_gather_with_heartbeat(of_first, self.heartbeat)[0]
