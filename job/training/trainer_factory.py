"""Makes a trainer: model, optimizer, compiled step, readers and run writer."""

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import tensorflow as tf

from data_prep.sources.dicom_files import stem_of
from flexunet.errors import ContentError
from flexunet.progress import Heartbeat, no_heartbeat
from flexunet.storage import open_store
from flexunet.text import pluralize
from job.config import TrainConfig
from job.config.groups import ModelConfig
from job.data.cases import read_case
from job.data.reader import RecordReader
from job.data.shard_cache import CacheOptions, open_readers
from job.distributed.exchange_plan import agreed_plan
from job.distributed.replica_sums import Criterion
from job.distributed.xla import uses_xla
from job.evaluation.evaluator import Evaluator, make_evaluator
from job.inference.inputs import find_images, read_any
from job.inference.preprocess import to_model_pixels
from job.losses import is_mean
from job.models.encoders.mobile import is_encoder_weight
from job.models.ensemble import network_of
from job.models.heads import main_model
from job.optimization.averaging import WeightAverage
from job.optimization.loss_scale import loss_scale_for
from job.optimization.optimizer import Adam, SlowWeights
from job.runs.loading import model_for
from job.runs.upload_queue import UploadQueue
from job.trackers.opening import open_tracker
from job.trackers.tensorboard import EventLog
from job.training.run_writer import PredictionInput, RunWriter
from job.training.setup import TrainingSetup
from job.training.staging import kept_if_unstored, staging_folder
from job.training.step import StepMessages, StepOptions, make_train_step
from job.training.trainer import Trainer

logger = logging.getLogger(__name__)

_MANY_PARAMETERS = 30_000_000  # slow without a GPU


@contextmanager
def open_trainer(setup: TrainingSetup, *, heartbeat: Heartbeat = no_heartbeat) -> Iterator[Trainer]:
    """Yields a trainer whose model, steps and readers are ready; trains nothing yet.

    Args:
        heartbeat: called for every shard that is found or copied, and of every batch of windows.

    Raises:
        UsageError: the model does not fit the dataset.
    """
    config, process_group = setup.config, setup.process_group
    with setup.strategy.scope():
        model = model_for(config, setup.dataset.manifest)
        if setup.run is not None:  # the first process
            has_gpu = bool(tf.config.list_logical_devices("GPU"))
            logger.info("%s", network_words(config.model, model.count_params(), has_gpu=has_gpu))
        scale = loss_scale_for(config.precision)
        momentum = config.optimizer.ema_momentum
        average = None if momentum is None else WeightAverage(momentum, model.variables)
        slow = _slow_weights(setup, model)
        optimizer = Adam(config.optimizer, model.trainable_variables, scale, average, slow)
    evaluator = make_evaluator(
        config,
        setup.strategy,
        setup.dataset,
        network_of([main_model(model)]),
        process_group=process_group,
    )
    readers = _open_readers(setup, heartbeat)
    step = _train_step(setup, model, optimizer, evaluator)
    run_writers: list[RunWriter] = []
    with ExitStack() as stack:

        def record() -> None:
            if setup.run is None:
                return
            run_writer = stack.enter_context(
                open_run_writer(
                    setup, evaluator, model, optimizer, readers["valid"], heartbeat=heartbeat
                )
            )
            run_writer.write_description(setup.dataset, setup.strategy)
            run_writers.append(run_writer)

        process_group.run_on_primary(record)
        run_writer = run_writers[0] if run_writers else None
        messages = StepMessages(process_group)
        yield Trainer(
            setup, readers, model, optimizer, step, evaluator, run_writer, heartbeat, messages
        )


def _slow_weights(setup: TrainingSetup, model: Any) -> SlowWeights | None:
    """Returns the weights of the encoder if they are trained later or slower than the others."""
    config = setup.config
    epochs, factor = (
        config.model.encoder_frozen_epochs,
        config.optimizer.encoder_learning_rate_factor,
    )
    if not config.model.has_encoder or (epochs == 0 and factor == 1.0):
        return None
    num_steps = -(-len(setup.dataset.split("train")) // config.global_batch_size)
    is_slow = tuple(is_encoder_weight(each) for each in model.trainable_variables)
    return SlowWeights(is_slow, epochs * num_steps, factor)


def network_words(model: ModelConfig, num_parameters: int, *, has_gpu: bool) -> str:
    """Returns the size of the network, and without a GPU a smaller one if it is large."""
    millions = f"{num_parameters / 1e6:.1f} million"
    shown = millions if num_parameters >= 1_000_000 else str(num_parameters)
    words = f"network: {pluralize(model.levels, 'level')}, {shown} parameters"
    if has_gpu or num_parameters <= _MANY_PARAMETERS:
        return words
    return (
        f"{words}; slow without a GPU: for a first try --model.num-layers 4 "
        "--model.base-filters 8 --model.base-kernels 3,3"
    )


def _open_readers(setup: TrainingSetup, heartbeat: Heartbeat) -> dict[str, RecordReader]:
    """Fills the cache and returns a reader of every split, by name."""
    config, dataset = setup.config, setup.dataset
    options = CacheOptions(config.cache, config.cache_dir, config.cache_size, config.progress)
    readers: dict[str, RecordReader] = {}

    def fill_cache(heartbeat: Heartbeat) -> None:
        readers.update(open_readers(dataset, dataset.splits, options, heartbeat=heartbeat))

    setup.process_group.all_gather_with_heartbeat(fill_cache, heartbeat)
    return readers


def _train_step(setup: TrainingSetup, model: Any, optimizer: Adam, evaluator: Evaluator) -> Any:
    """Returns the compiled training step, with the same gradient exchange in all processes."""
    config, strategy, process_group = setup.config, setup.strategy, setup.process_group
    is_compiled = uses_xla(config, process_group)
    plan = agreed_plan(config, strategy, process_group, model, uses_xla=is_compiled)
    return make_train_step(
        strategy,
        model,
        optimizer,
        Criterion(evaluator.loss, evaluator.metrics),
        StepOptions(
            plan,
            config.accumulate,
            is_mean(config.loss.name),
            is_compiled,
            has_messages=process_group.size > 1,
            has_clock=config.time_budget is not None,
            random_streams=config.random_streams,
            gradient_dtype=config.gradient_dtype,
        ),
    )


@contextmanager
def open_run_writer(
    setup: TrainingSetup,
    evaluator: Evaluator,
    model: Any,
    optimizer: Adam,
    reader: RecordReader,
    *,
    heartbeat: Heartbeat,
) -> Iterator[RunWriter]:
    """Yields the run writer of `setup`; leaving the block waits until everything is stored.

    Args:
        reader: of the validation split.
        heartbeat: called while that takes long and bytes move.
    """
    config, run = setup.config, setup.run
    assert run is not None  # noqa: S101 - only the primary has a run writer
    pending: list[Callable[[], dict[str, str]]] = []
    with staging_folder(run.url) as staging, kept_if_unstored(pending), ExitStack() as stack:
        tracker = stack.enter_context(open_tracker(config, run))  # left when everything is stored
        upload_queue = stack.enter_context(
            UploadQueue(budget_s=config.storage_timeout, heartbeat=heartbeat)
        )
        run_writer = RunWriter(
            config=config,
            run=run,
            upload_queue=upload_queue,
            evaluator=evaluator,
            model=model,
            optimizer=optimizer,
            prediction_inputs=_prediction_inputs(config, evaluator, reader),
            staging=staging,
            events=None,
            tracker=tracker,
            pending=pending,
        )
        if config.tensorboard:
            classes = evaluator.dataset.manifest.classes
            run_writer.events = EventLog(staging, run.attempt, classes, run_writer.put)
            stack.callback(run_writer.events.close)
        yield run_writer


def _prediction_inputs(
    config: TrainConfig, evaluator: Evaluator, reader: RecordReader
) -> dict[str, PredictionInput]:
    """Returns the images to predict after every epoch, by name, in the dataset's format."""
    count, dataset = config.prediction_images, evaluator.dataset
    if config.prediction_folder is None:
        chosen = evaluator.cases_of(dataset.split("valid"))[:count]
        return {each.id: PredictionInput(*read_case(reader, each)) for each in chosen}
    store = open_store(config.prediction_folder)
    prediction_inputs = {}
    for name in find_images(store, count):
        stem, url = stem_of(name).replace("/", "_"), f"{store.url}/{name}"
        try:
            image, value_max = read_any(store.get(name), name=url)
            pixels, _ = to_model_pixels(image, dataset.manifest, name=url, value_max=value_max)
        except ContentError as error:
            logger.warning("--prediction-folder: skipped an image: %s", error)
            continue
        prediction_inputs[stem] = PredictionInput(pixels)
    return prediction_inputs
