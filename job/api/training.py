"""Trains in this process, as `flexunet train --local` does."""

from collections.abc import Callable
from typing import Any, Unpack

from flexunet.errors import DivergedError, StoppedError, UsageError
from flexunet.settings import parse_settings
from job.api.events import Event, EventSender
from job.api.keywords import StrPath, keyword_errors, keyword_values, path_text
from job.api.log import shown_log
from job.api.options import PrepOptions, TrainOptions
from job.api.runs import Run, open_run
from job.compat.ini_prep import PreparationConfig
from job.config import TrainConfig
from job.data.folds import is_cross_validation
from job.planning.options import resolve_config
from job.planning.plan_file import Plan
from job.runs.layout import run_url
from job.training.dry_step import DryStepMode, plan_dataset
from job.training.process import run_local, stop_signals


def train(
    *,
    config: StrPath | None = None,
    on_event: Callable[[Event], object] | None = None,
    skip_bad: bool = False,
    allow_leaks: bool = False,
    prep: PrepOptions | None = None,
    **options: Unpack[TrainOptions],
) -> Run:
    """Trains a network on a prepared dataset in this process, then evaluates it.

    The same call again resumes the run, and returns at once where it is finished. Ctrl-C (in a
    notebook: interrupt the kernel) stops after the step in progress, stores a checkpoint and raises
    StoppedError; a second one raises KeyboardInterrupt at once, without saving.

    An exception that `on_event` raises ends the run as Ctrl-C does: a checkpoint is stored, then
    the exception is raised; if the run fails or diverges then, it is the cause of that error. It
    gets no event after that. Events are sent in this thread, between two steps: training waits for
    `on_event`.

    `deterministic=True` makes TensorFlow deterministic until the process ends.

    Args:
        config: YAML file with any of the options, or a .config file of the reference
            implementation; options win over it.
        on_event: called with each event: `TrainingStarted`, `StepEnded`, `EpochEnded`,
            `CheckpointStored`, `EvaluationEnded`, `TrainingEnded`. A run that is finished already
            sends none.
        skip_bad: with a .config file: leave bad images out of the dataset.
        allow_leaks: with a .config file: accept splits that share a group or an image.
        prep: with a .config file: options of the preparation, as for `flexunet.prepare`:
            `prep={"group_regex": "patient([0-9]+)"}`.
        options: the fields of `TrainConfig`: `data="dataset"`, `epochs=5`,
            `model={"num_layers": 5}`. With `progress` (the default) a bar or lines of the log show
            how far it is; a program that has set up logging decides itself what is shown.

    Returns:
        The run; `run.summary` is its evaluation.

    Raises:
        UsageError: an option is unknown or wrong, there is no dataset, or the run was started with
            other options.
        ContentError: the dataset is damaged.
        LockedError: another process trains this run.
        StorageError: storage is unavailable or full; the same call resumes.
        StoppedError: it was stopped; a checkpoint is stored.
        DivergedError: the loss became NaN or infinite.

    Examples:
        >>> def show(event):
        ...     if isinstance(event, flexunet.EpochEnded):
        ...         print(event.epoch, sorted(event.metrics)[-1], event.metrics["val_loss"] > 0)
        >>> options = {"epochs": 1, "model": {"num_layers": 2}}
        >>> run = flexunet.train(
        ...     data="dataset", output="runs", name="first", on_event=show, **options
        ... )
        1 val_loss True
        >>> run.status
        'finished'
    """
    values = keyword_values("train", TrainConfig, options, ("config",))
    flags = {"allow_leaks": allow_leaks, "skip_bad": skip_bad}
    prep_options = {
        **keyword_values("train", PreparationConfig, prep or {}),
        **{name: True for name, is_given in flags.items() if is_given},
    }
    flag_names = ("allow_leaks", "skip_bad")
    with (
        keyword_errors(TrainConfig, flag_names),
        shown_log(bool(values.get("progress", True))),
    ):
        file = None if config is None else path_text(config)
        settings = resolve_config(values, file, prep_options, function="flexunet.train()")
        if is_cross_validation(settings):
            raise UsageError(
                f"flexunet.train(folds={settings.folds}) would train several runs, each in its own "
                "process; give fold=0, then fold=1 and so on, or use `flexunet train --local "
                f"--folds {settings.folds}`"
            )
        _run_with_events(settings, on_event or _ignore)
        return open_run(run_url(settings))


def plan(
    *,
    dry_step: DryStepMode = "auto",
    **options: Unpack[TrainOptions],
) -> Plan:
    """Returns the options that `train` with `preset="auto"` would choose for a new run, and why.

    Stores nothing. A run that exists keeps its own options.

    Args:
        dry_step: train a few steps in another process, to measure memory and time. auto: only if
            the estimated memory is not far below that of this machine.
        options: fields of `TrainConfig`, which keep their values; the others are planned around
            them. `data` is required.

    Raises:
        UsageError: an option is unknown or wrong, there is no dataset, or no network fits into
            memory.
        ContentError: the dataset is damaged.

    Examples:
        >>> found = flexunet.plan(data="dataset", model={"num_layers": 2}, dry_step="never")
        >>> [(each.option, each.value) for each in found.choices if each.source == "given"]
        [('model.num_layers', 2)]
    """
    values = keyword_values("plan", TrainConfig, options, ("dry_step",)) | {"preset": "auto"}
    if values.get("data") is None:
        raise UsageError("flexunet.plan(): no dataset: give data, a folder written by prep")
    with keyword_errors(TrainConfig, ("dry_step",)), stop_signals() as should_stop:
        config = parse_settings(TrainConfig, values, "flexunet.plan()")
        return plan_dataset(config, dry_step, should_stop)


def _add_cause(error: BaseException, failure: Exception | None) -> None:
    """Adds what `on_event` raised as the first cause of `error`, so that tracebacks show both."""
    while error.__cause__ is not None:
        error = error.__cause__
    if failure is not None and error is not failure:
        error.__cause__ = failure


def _ignore(event: Event) -> Any:
    """Ignores an event: the default of `on_event`."""


def _run_with_events(config: TrainConfig, on_event: Callable[[Event], object]) -> None:
    """Trains; raises what `on_event` raised when the run has ended."""
    sender = EventSender(on_event, run_url(config))
    try:
        # Training must not end a notebook's process when it stalls.
        run_local(config, sender.callbacks, ends_process=False)
    except StoppedError as error:
        sender.end("stopped")
        if sender.failure is not None:
            raise sender.failure from error
        raise
    except DivergedError as error:
        sender.end("diverged")
        _add_cause(error, sender.failure)
        raise
    except BaseException as error:
        sender.end("failed")
        _add_cause(error, sender.failure)
        raise
    sender.end("finished")
    if sender.failure is not None:
        raise sender.failure
