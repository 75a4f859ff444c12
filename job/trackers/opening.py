"""Opens the tracker of a run, if it has one."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from flexunet.errors import FlexUNetError
from job.config import TrainConfig
from job.runs.run import Run
from job.trackers.background import BackgroundTracker
from job.trackers.target import find_target

logger = logging.getLogger(__name__)


@contextmanager
def open_tracker(config: TrainConfig, run: Run) -> Iterator[BackgroundTracker | None]:
    """Yields the tracker of an owned run; None without one. Leaving the block sends the rest.

    Raises:
        UsageError: MLflow is not installed or cannot be imported, or no address is given.
    """
    target = find_target(config)
    if target is None:
        yield None
        return
    # Not at the start of the module: it takes a second and is needed by few.
    from job.trackers.mlflow_run import (
        RECORD_NAME,
        MlflowRun,
        mlflow_environment,
        new_record,
        tracking_id,
    )

    own_id = tracking_id(run.store)
    if own_id is None:
        own_id, record = new_record()
        run.put_bytes(RECORD_NAME, record)
    with mlflow_environment(target):
        sender = MlflowRun(target, run.store, own_id)
        name = f"MLflow at {target.shown}"
        with BackgroundTracker(sender.send, name, lambda: run.lost) as tracker:
            yield tracker


def send_ended_run(config: TrainConfig, run: Run, outcome: Mapping[str, Any]) -> None:
    """Sends what the tracker of a finished run lacks; waits for a while. Logs what fails."""
    try:
        with open_tracker(config, run) as tracker:
            if tracker is not None:
                tracker.status = "FINISHED"
                tracker.notify(outcome["epochs"])
    except FlexUNetError as error:
        logger.warning("%s", error)
