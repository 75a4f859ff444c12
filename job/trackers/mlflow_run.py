"""Sends a run to MLflow: options, the numbers of each epoch, the evaluation, and files.

Everything comes from the files of the run, which stay the truth. MLflow keeps what it has: each
call finds out what is missing there and sends that. So each epoch has one row, however often the
training was killed. The run is found again by a tag with an id that is stored in the run's folder.
"""

import importlib
import json
import logging
import os
import re
import tempfile
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from flexunet.errors import ContentError, UsageError
from flexunet.json_files import read_json
from flexunet.settings import flat_values, read_yaml
from flexunet.storage import NotFound, ObjectStore
from job.config import TRACKER_OPTIONS
from job.runs.layout import evaluate_again
from job.trackers.background import Status
from job.trackers.numbers import stored_rows
from job.trackers.target import Target

logger = logging.getLogger(__name__)

RECORD_NAME = "tracker.json"
_TAG = "flexunet.run_id"
_SENT_TAG = "flexunet.sent"  # epochs and status, set when everything was sent
_CHANGED = "flexunet.changed."  # begins the tag of an option that has another value now
_SUMMARY_NAME = "evaluation/summary.json"
_ARTIFACTS = (
    "config.yaml",
    "environment.json",
    _SUMMARY_NAME,
    "outcome.json",
    "plan.json",
    "report.html",
)
_OF_EVALUATION = (_SUMMARY_NAME, "report.html")  # files that show the evaluation
_MAX_ARTIFACT_BYTES = 64 << 20
_MAX_NAME_LENGTH = 250  # of a metric; a limit of MLflow
_NOT_IN_NAMES = re.compile(r"[^\w.\- :]")

# For the client in this process, unless the user has set them. A call that fails is repeated after
# the next epoch.
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


@contextmanager
def mlflow_environment(target: Target) -> Iterator[None]:
    """Sets MLflow's environment variables and imports its client.

    To be entered before other threads call C code that reads the environment.

    Raises:
        UsageError: the import fails.
    """
    values = dict(_ENVIRONMENT)
    if target.is_folder:
        values["MLFLOW_ALLOW_FILE_STORE"] = "true"  # the user has chosen it
    added = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(added)
    log = logging.getLogger("mlflow")
    level = log.level
    try:
        _import_client()
        log.setLevel(logging.ERROR)
        yield
    finally:
        log.setLevel(level)
        for name in added:
            os.environ.pop(name, None)


def _import_client() -> None:
    try:
        importlib.import_module("mlflow.tracking")
    except Exception as error:  # other libraries than those that it was built for: any error
        raise UsageError(
            f"--tracker mlflow: the installed package mlflow cannot be imported ({error}); install "
            "flexunet[mlflow] again, or give --tracker none"
        ) from error


def tracking_id(run: ObjectStore) -> str | None:
    """Returns the id by which trackers find the run again; None if it has none yet."""
    try:
        record = read_json(run, RECORD_NAME, "a new id is chosen, and all epochs are sent again")
        return None if record is None else str(record["id"])
    except ContentError as error:
        logger.warning("%s", error)
        return None


def new_record() -> tuple[str, bytes]:
    """Returns a new id, and the content of `RECORD_NAME` with it."""
    own = uuid.uuid4().hex
    return own, (json.dumps({"version": 1, "id": own}) + "\n").encode()


@dataclass
class _Known:
    """A run of MLflow, with the steps that it has of each metric.

    Attributes:
        sent: the value of `_SENT_TAG`.
    """

    run_id: str
    sent: str | None
    steps: dict[str, set[int]] = field(default_factory=dict)


class MlflowRun:
    """Sends one run to MLflow, from one thread."""

    def __init__(self, target: Target, run: ObjectStore, own_id: str) -> None:
        """Contacts nobody yet.

        Args:
            run: the folder of the run.
            own_id: see `tracking_id`.
        """
        self._target = target
        self._run = run
        self._own_id = own_id
        self._check: Callable[[], None] = lambda: None
        self._made_client: Any = None
        self._known: _Known | None = None
        self._times: dict[int, int] = {}  # of the first try to send a step, ms
        self._is_shown = False  # where the run is

    def send(self, num_epochs: int, status: Status | None, check: Callable[[], None]) -> None:
        """Sends what MLflow lacks; with a status also the evaluation and files, and ends the run.

        Args:
            num_epochs: the number of epochs in the newest checkpoint.
            status: how the run ended; None: it goes on.
            check: called before each request; raises if no more may be sent.

        Raises:
            Exception: of MLflow, of its libraries, or of storage.
        """
        self._check = check
        try:
            known = self._known or self._find(is_running=status is None)
            is_new = self._send_rows(known, num_epochs)
            if status is not None:
                summary = read_json(self._run, _SUMMARY_NAME, evaluate_again(self._run)) or {}
                is_later = "runs" in (summary.get("prediction") or {})  # by the evaluate command
                is_new = (not is_later and self._send_evaluation(known, summary)) or is_new
                mark = f"{num_epochs} {status}"
                if is_new or known.sent != mark:
                    self._end(known, status, mark, _OF_EVALUATION if is_later else ())
        except BaseException:
            self._known = None  # nobody knows what has arrived
            raise
        self._known = known

    @property
    def _client(self) -> Any:
        self._check()
        if self._made_client is None:
            from mlflow.tracking import MlflowClient

            self._made_client = MlflowClient(tracking_uri=self._target.uri)
        return self._made_client

    def _find(self, *, is_running: bool) -> _Known:
        """Returns the run of MLflow, which is created if there is none, with its options."""
        experiment = self._experiment()
        found = self._client.search_runs([experiment], f"tags.`{_TAG}` = '{self._own_id}'")
        if found:
            # A request whose answer was lost may have created a second one.
            first = min(found, key=lambda each: (each.info.start_time, each.info.run_id))
            entry = self._client.get_run(first.info.run_id)
            if is_running and entry.info.status != "RUNNING":
                self._client.update_run(entry.info.run_id, status="RUNNING")
        else:
            name = self._run.url.rstrip("/").rpartition("/")[2]
            tags = {_TAG: self._own_id, "mlflow.source.name": "flexunet train"}
            entry = self._client.create_run(experiment, tags=tags, run_name=name)
        known = _Known(entry.info.run_id, entry.data.tags.get(_SENT_TAG))
        for name in entry.data.metrics:
            history = self._client.get_metric_history(known.run_id, name)
            known.steps[name] = {point.step for point in history}
        self._send_options(known, entry.data)
        self._show(experiment, known.run_id)
        return known

    def _show(self, experiment: str, run_id: str) -> None:
        """Logs once where the run is."""
        target = self._target
        place = f"/#/experiments/{experiment}/runs/{run_id}"
        if target.is_folder:
            place = f", experiment {experiment}, run {run_id}"
        if not self._is_shown:
            logger.info("tracked by MLflow: %s%s", target.shown.rstrip("/"), place)
        self._is_shown = True

    def _experiment(self) -> str:
        """Returns the id of the experiment, which is created if there is none."""
        target = self._target
        if target.experiment_id is not None:
            return target.experiment_id
        name = target.experiment or "Default"
        found = self._client.get_experiment_by_name(name)
        if found is None:
            return str(self._client.create_experiment(name))
        return str(found.experiment_id)

    def _send_options(self, known: _Known, data: Any) -> None:
        """Sends the options as parameters; one that has changed since is a tag, as MLflow asks."""
        from mlflow.entities import Param, RunTag

        text = self._run.get("config.yaml").decode()
        options = _option_texts(read_yaml(text, f"{self._run.url}/config.yaml"))
        params = [Param(name, value) for name, value in options.items() if name not in data.params]
        tags = {"flexunet.url": self._run.url} | {
            f"{_CHANGED}{name}": value
            for name, value in options.items()
            if data.params.get(name, value) != value or f"{_CHANGED}{name}" in data.tags
        }
        new = [RunTag(name, value) for name, value in tags.items() if data.tags.get(name) != value]
        if params or new:
            self._client.log_batch(known.run_id, params=params, tags=new)

    def _send_rows(self, known: _Known, num_epochs: int) -> bool:
        rows = stored_rows(self._run, num_epochs)
        # People count epochs from 1.
        return self._send_numbers(known, {row.pop("epoch") + 1: row for row in rows})

    def _send_evaluation(self, known: _Known, summary: Mapping[str, Any]) -> bool:
        epoch = max((summary.get("checkpoint") or {}).get("epochs") or [0])
        return self._send_numbers(known, {epoch: dict(_evaluation_numbers(summary))})

    def _send_numbers(self, known: _Known, steps: Mapping[int, Mapping[str, Any]]) -> bool:
        """Sends the numbers of steps that MLflow lacks; returns whether it lacked some."""
        from mlflow.entities import Metric

        metrics = []
        for step, values in steps.items():
            # Equal rows with equal times are one for a server that has received both.
            now = self._times.setdefault(step, int(time.time() * 1000))
            for name, value in metric_names(values).items():
                if value is not None and step not in known.steps.get(name, ()):
                    metrics.append(Metric(name, float(value), now, step))
        if metrics:
            self._client.log_batch(known.run_id, metrics=metrics)
        for metric in metrics:
            known.steps.setdefault(metric.key, set()).add(metric.step)
        return bool(metrics)

    def _end(self, known: _Known, status: Status, mark: str, left_out: Collection[str]) -> None:
        """Sends files and the status; a file that cannot be sent does not hold back the status."""
        failure: Exception | None = None
        try:
            self._send_files(known, left_out)
        except Exception as error:
            failure = error
        self._client.set_terminated(known.run_id, status)
        if failure is not None:
            raise failure
        self._client.set_tag(known.run_id, _SENT_TAG, mark)
        known.sent = mark

    def _send_files(self, known: _Known, left_out: Collection[str]) -> None:
        names = [name for name in _ARTIFACTS if name not in left_out]
        names += [each.name for each in self._run.list("metrics/")]
        with tempfile.TemporaryDirectory(prefix="flexunet-tracker-") as folder:
            for name in names:
                stat = self._run.stat(name)
                if stat is None or stat.size > _MAX_ARTIFACT_BYTES:
                    continue
                path = os.path.join(folder, os.path.basename(name))
                try:
                    self._run.get_file(name, path)
                except NotFound:
                    continue  # replaced meanwhile
                self._client.log_artifact(known.run_id, path, os.path.dirname(name) or None)


def metric_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `values` under names that MLflow allows; names of classes may be anything."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        parts = [_NOT_IN_NAMES.sub("_", part).strip(". ") or "_" for part in name.split("/", 1)]
        allowed = "/".join(parts)[:_MAX_NAME_LENGTH]
        number = 2
        while allowed in found:  # of two classes whose names differ in other characters
            allowed = f"{'/'.join(parts)[: _MAX_NAME_LENGTH - 5]}_{number}"
            number += 1
        found[allowed] = value
    return found


def _evaluation_numbers(summary: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields name and value of the measures of the test split."""
    yield "test_loss", summary.get("loss")
    for kind in ("foreground_mean", "foreground_pooled"):
        for measure, value in (summary.get(kind) or {}).items():
            yield f"test_{kind}/{measure}", value
    for each in summary.get("classes", ()):
        if each["id"] != 0:
            yield f"test_dice/{each['name']}", each["dice"]


def _option_texts(values: Mapping[str, Any]) -> dict[str, str]:
    """Returns the text of each option by its dotted path; where the run is sent is none."""
    return {
        path: value if isinstance(value, str) else "none" if value is None else json.dumps(value)
        for path, value in flat_values(values).items()
        if path not in TRACKER_OPTIONS
    }
