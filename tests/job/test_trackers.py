"""What is sent to MLflow and to TensorBoard, and that training does not wait for either."""

import ast
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flexunet.errors import LockedError, StorageError, UsageError
from flexunet.paths import has_secret
from flexunet.settings import parse_settings
from flexunet.storage import LocalStore
from job.config import TrainConfig
from job.planning.options import resolve_config
from job.trackers import background
from job.trackers.background import AbandonedError, BackgroundTracker
from job.trackers.mlflow_run import MlflowRun, metric_names, mlflow_environment
from job.trackers.numbers import (
    CLASS_DICE_NAME,
    class_dice_row,
    class_dice_table,
    joined_rows,
    read_class_dice,
    stored_rows,
)
from job.trackers.opening import open_tracker, send_ended_run
from job.trackers.target import Target, find_target, without_secrets
from tests.job.tracked import client_of, only_run, values_of
from tests.source_tree import ROOT

HISTORY = "epoch,loss,val_loss\n0,0.5,\n1,0.25,0.125\n2,0.2,0.1\n"


@pytest.fixture
def run(tmp_path: Path) -> LocalStore:
    """Returns the folder of a run of three epochs, of which two are in a checkpoint."""
    store = LocalStore(str(tmp_path / "runs" / "first"))
    texts = {
        "config.yaml": "epochs: 2\nseed: 7\ntracking_uri: http://h\nmodel:\n  dilation: [1, 1]\n",
        "metrics/history.csv": HISTORY,
        "metrics/throughput.csv": "epoch,train_images_per_s\n0,8.0\n1,9.0\n",
        CLASS_DICE_NAME: "epoch,dice_a/b,dice_=c\n0,,0.5\n1,0.75,0.5\n",
        "metrics/foreground.png": "an image",
        "report.html": "a page",
        "evaluation/summary.json": json.dumps(
            {
                "loss": 0.5,
                "foreground_mean": {"dice": 0.5, "iou": None},
                "foreground_pooled": {"dice": 0.25},
                "classes": [{"id": 0, "name": "x", "dice": 1.0}, {"id": 1, "name": "c", "dice": 1}],
                "checkpoint": {"which": "best", "epochs": [2]},
            }
        ),
    }
    for name, text in texts.items():
        store.put(name, text.encode())
    return store


def test_the_tables_of_a_run_are_joined_by_epoch(run: LocalStore) -> None:
    rows = stored_rows(run, 2)
    assert rows == [
        {
            "epoch": 0,
            "loss": 0.5,
            "val_loss": None,
            "train_images_per_s": 8.0,
            "val_dice/a/b": None,
            "val_dice/=c": 0.5,
        },
        {
            "epoch": 1,
            "loss": 0.25,
            "val_loss": 0.125,
            "train_images_per_s": 9.0,
            "val_dice/a/b": 0.75,
            "val_dice/=c": 0.5,
        },
    ]
    assert len(stored_rows(run, 3)) == 3


def test_the_table_of_classes_goes_on_after_a_kill(
    run: LocalStore, caplog: pytest.LogCaptureFixture
) -> None:
    classes = [
        {"id": 0, "name": "background", "dice": 1.0},
        {"id": 1, "name": "epoch", "dice": None},  # a class may have any name
        {"id": 2, "name": "b", "dice": 0.5},
    ]
    rows = [class_dice_row(epoch, classes) for epoch in (0, 1)]
    run.put(CLASS_DICE_NAME, class_dice_table(rows).encode())
    assert read_class_dice(run, 1) == rows[:1]
    assert joined_rows([{"epoch": 0, "loss": 1}], class_dice=rows[:1]) == [
        {"epoch": 0, "loss": 1, "val_dice/epoch": None, "val_dice/b": 0.5}
    ]
    run.put(CLASS_DICE_NAME, b"epoch,dice_b\n0,x\n")
    assert read_class_dice(run, 1) == []
    assert "the table starts anew with epoch 2" in caplog.text


@pytest.mark.parametrize(
    ("uri", "is_secret", "shown"),
    [
        ("http://host:5000", False, "http://host:5000"),
        ("https://me:pass@host/a", True, "https://host/a"),
        ("https://host/?token=x", True, "https://host/"),
        ("runs@home/mlruns?", False, "runs@home/mlruns"),
        ("databricks", False, "databricks"),
        ("http://u:p@ss@host:5000/a", True, "http://host:5000/a"),
        ("postgresql://u:a/b@h/db", True, "postgresql://h/db"),
        ("http://u:p]'[x@h/?token=x", True, "http://h/"),
        ("http://u:p#x@h", True, "http://h"),
        ("http://u:p?x@h/db", True, "http://"),  # is the host "u" or "h"?
        ("https://host/?token=x@y", True, "https://"),
        ("http://@host", True, "http://host"),
        ("sqlite:////home/me@work/db", False, "sqlite:////home/me@work/db"),
        ("file:///home/me@work/runs", False, "file:///home/me@work/runs"),
    ],
)
def test_secrets_of_an_address_are_found_and_not_shown(
    uri: str, is_secret: bool, shown: str
) -> None:
    assert has_secret(uri) is is_secret
    assert without_secrets(f"to {uri} failed") == f"to {shown} failed"
    if is_secret:
        with pytest.raises(UsageError, match="would be stored with the run"):
            parse_settings(TrainConfig, {"tracking_uri": uri}, "options")


def test_the_target_is_that_of_the_options_then_of_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("URI", "EXPERIMENT_NAME", "EXPERIMENT_ID"):
        monkeypatch.delenv(f"MLFLOW_{name}", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert find_target(TrainConfig()) is None
    config = TrainConfig(tracker="mlflow")
    with pytest.raises(UsageError, match="no server is given; give --tracking-uri"):
        find_target(config)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:pass@host")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "5")
    target = find_target(config)
    assert target == Target("http://me:pass@host", None, "5")
    assert (target.shown, target.is_folder) == ("http://host", False)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "set")
    assert find_target(config) == Target("http://me:pass@host", "set")
    given = config.model_copy(update={"tracking_uri": "folder", "experiment": "own"})
    assert find_target(given) == Target("folder", "own")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"install flexunet\[mlflow\]"):
        find_target(given)


@pytest.mark.parametrize(
    ("uri", "is_folder", "stored"),
    [
        ("runs", True, "{cwd}/runs"),
        ("./databricks", True, "{cwd}/databricks"),
        ("file:mlruns", True, "{cwd}/mlruns"),
        ("file:/a/b", True, "/a/b"),
        ("file:///a/b", True, "file:///a/b"),
        ("databricks", False, "databricks"),
        ("databricks://profile", False, "databricks://profile"),
        ("databricks-uc", False, "databricks-uc"),
        ("http://host", False, "http://host"),
    ],
)
def test_a_relative_folder_becomes_absolute_and_an_address_stays(
    uri: str, is_folder: bool, stored: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = resolve_config({"data": "/d", "tracker": "mlflow", "tracking_uri": uri}, None)
    assert found.tracking_uri == stored.format(cwd=tmp_path)
    assert Target(uri).is_folder is is_folder
    assert Target(found.tracking_uri).is_folder is is_folder


def test_a_broken_installation_stops_a_new_run_and_only_warns_at_the_end(
    run: LocalStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "mlflow.tracking", None)  # its import fails
    config = TrainConfig(tracker="mlflow", tracking_uri="http://host")
    owned: Any = SimpleNamespace(store=run, put_bytes=run.put, lost=False)
    with (
        pytest.raises(UsageError, match=r"cannot be imported .* give --tracker none"),
        open_tracker(config, owned),
    ):
        pass
    assert "MLFLOW_DISABLE_TELEMETRY" not in os.environ
    send_ended_run(config, owned, {"epochs": 2})
    assert [each.levelname for each in caplog.records] == ["WARNING"]
    assert "mlflow cannot be imported" in caplog.text


def test_names_of_metrics_are_those_that_mlflow_allows() -> None:
    values = {"val_dice/a+b": 1, "val_dice/a*b": 2, "val_dice/..": 3, "loss": 4, "x" * 300: 5}
    assert metric_names(values) == {
        "val_dice/a_b": 1,
        "val_dice/a_b_2": 2,
        "val_dice/_": 3,
        "loss": 4,
        "x" * 250: 5,
    }


def test_a_run_without_a_tracker_does_not_import_mlflow() -> None:
    """In a process of its own; modules that are imported later must not import it at their top."""
    code = (
        "import sys, job.training.process, job.trackers.opening, job.trackers.mlflow_run; "
        "print('mlflow' in sys.modules)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert found.stdout == "False\n"
    for path in (*ROOT.glob("job/**/*.py"), *ROOT.glob("launcher/**/*.py")):
        tops = ast.parse(path.read_text()).body
        names = {
            ast.unparse(each) for each in tops if isinstance(each, ast.Import | ast.ImportFrom)
        }
        assert [name for name in names if " mlflow" in name] == [], path


# MLflow's file store, without a server.


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Target]:
    target = Target(str(tmp_path / "mlruns"), "trained")
    with mlflow_environment(target):
        yield target


def allow() -> None:
    """Lets everything be sent."""


def test_every_epoch_has_one_row_after_kills_and_a_changed_option(
    run: LocalStore, folder: Target, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "job")
    MlflowRun(folder, run, "own").send(1, None, allow)
    found = only_run(folder)
    place = f"experiment {found.info.experiment_id}, run {found.info.run_id}"
    assert caplog.messages == [f"tracked by MLflow: {folder.uri}, {place}"]
    assert (found.info.run_name, found.info.status) == ("first", "RUNNING")
    assert found.data.params == {"epochs": "2", "seed": "7", "model.dilation": "[1, 1]"}
    assert values_of(folder, "loss") == [(1, 0.5)]
    # Killed while it sent the second epoch: one of its numbers has arrived.
    client_of(folder).log_metric(found.info.run_id, "loss", 0.25, step=2)
    # The next process finds the run, and continues with more epochs.
    run.put("config.yaml", b"epochs: 3\nseed: 7\nmodel:\n  dilation: [1, 1]\n")
    second = MlflowRun(folder, run, "own")
    second.send(2, None, allow)
    assert only_run(folder).data.tags["flexunet.changed.epochs"] == "3"
    second.send(2, None, allow)
    second.send(3, "FINISHED", allow)
    assert values_of(folder, "loss") == [(1, 0.5), (2, 0.25), (3, 0.2)]
    assert values_of(folder, "val_loss") == [(2, 0.125), (3, 0.1)]
    assert values_of(folder, "val_dice/a_b") == [(2, 0.75)]
    assert values_of(folder, "test_foreground_mean/dice") == [(2, 0.5)]
    found = only_run(folder)
    assert (found.info.status, found.data.metrics["test_dice/c"]) == ("FINISHED", 1.0)
    names = {each.path for each in client_of(folder).list_artifacts(found.info.run_id)}
    assert names == {"config.yaml", "evaluation", "metrics", "report.html"}
    tables = client_of(folder).list_artifacts(found.info.run_id, "metrics")
    assert len(tables) == 4
    # Nothing is sent again.
    third = MlflowRun(folder, run, "own")
    third.send(3, "FINISHED", allow)
    assert only_run(folder).info.end_time == found.info.end_time
    # Another run of the same name is another run.
    MlflowRun(folder, run, "other").send(0, "KILLED", allow)
    assert len(client_of(folder).search_runs([found.info.experiment_id])) == 2


@pytest.mark.parametrize(
    ("prediction", "is_sent"), [({"postprocessing": {}}, True), ({"runs": ["first"]}, False)]
)
def test_an_evaluation_made_later_is_not_sent(
    prediction: dict[str, Any], is_sent: bool, run: LocalStore, folder: Target
) -> None:
    summary = json.loads(run.get("evaluation/summary.json")) | {"prediction": prediction}
    run.put("evaluation/summary.json", json.dumps(summary).encode())
    MlflowRun(folder, run, "own").send(2, "FINISHED", allow)
    found = only_run(folder)
    names = {each.path for each in client_of(folder).list_artifacts(found.info.run_id)}
    assert {"config.yaml", "metrics"} <= names
    assert ("evaluation" in names, "report.html" in names) == (is_sent, is_sent)
    assert any(name.startswith("test_") for name in found.data.metrics) is is_sent
    assert found.info.status == "FINISHED"


def test_a_tracker_that_loses_its_run_gets_everything_again(
    run: LocalStore, folder: Target
) -> None:
    sender = MlflowRun(folder, run, "own")
    sender.send(1, None, allow)
    client_of(folder).delete_run(only_run(folder).info.run_id)
    with pytest.raises(Exception, match=r"deleted|active"):
        sender.send(2, None, allow)
    sender.send(2, None, allow)
    assert values_of(folder, "loss") == [(1, 0.5), (2, 0.25)]


# The thread.


class Calls:
    """A function to send that fails as often as asked."""

    def __init__(self, num_failures: int = 0) -> None:
        self.found: list[tuple[int, str | None]] = []
        self.num_failures = num_failures

    def __call__(self, num_epochs: int, status: str | None, check: Any) -> None:
        check()
        self.found.append((num_epochs, status))
        if len(self.found) <= self.num_failures:
            raise OSError("no space at http://me:pass@host\nmore")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "_PAUSE_S", 0.01)


def wait_until(condition: Any) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_failure_is_logged_once_and_made_up_for(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    calls = Calls(num_failures=2)
    with BackgroundTracker(calls, "MLflow at x", lambda: False) as tracker:
        for epoch in (1, 2):
            tracker.notify(epoch)
            wait_until(lambda epoch=epoch: len(calls.found) == epoch)
        tracker.status = "FINISHED"
    assert calls.found == [(1, None), (2, None), (2, "FINISHED")]
    assert caplog.messages == [
        "MLflow at x: no space at http://host. Training does not need it; what is missing is sent "
        "after a later epoch, or by the same command later",
        "MLflow at x: everything is sent",
    ]


@pytest.mark.parametrize(
    ("error", "ends"),
    [
        (None, [(0, None)]),
        (StorageError("full"), [(0, "FAILED")]),
        (LockedError("another process"), []),
        (KeyboardInterrupt(), []),
    ],
)
def test_how_a_run_ends_is_sent(error: BaseException | None, ends: list[Any]) -> None:
    calls = Calls()
    try:
        with BackgroundTracker(calls, "MLflow", lambda: False):
            if error is not None:
                raise error
    except BaseException as found:
        assert found is error
    assert calls.found == ends


def test_a_stopped_process_waits_only_a_short_time(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(background, "_END_S", 9.0)
    monkeypatch.setattr(background, "_END_AFTER_FAILURE_S", 0.1)
    answer = threading.Event()
    with BackgroundTracker(lambda *_: answer.wait(20), "MLflow", lambda: False) as tracker:
        tracker.status = "KILLED"
    answer.set()
    assert "no answer within 0.1 s" in caplog.text


def test_a_process_that_lost_its_run_sends_nothing() -> None:
    calls = Calls()
    with BackgroundTracker(calls, "MLflow", lambda: True) as tracker:
        tracker.notify(1)
    assert calls.found == []
    with pytest.raises(AbandonedError):
        tracker.check()


@pytest.mark.parametrize("kind", ["refuses", "never answers"])
def test_a_dead_server_costs_a_training_nothing_but_a_warning(
    kind: str,
    run: LocalStore,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for name in ("_END_S", "_END_AFTER_FAILURE_S"):
        monkeypatch.setattr(background, name, 60.0 if kind == "refuses" else 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        if kind == "refuses":
            server.close()
        target = Target(f"http://me:pass@127.0.0.1:{port}")
        with mlflow_environment(target):
            sender = MlflowRun(target, run, "own")
            with BackgroundTracker(sender.send, "MLflow", lambda: False) as tracker:
                for epoch in range(1, 4):
                    tracker.notify(epoch)
                tracker.status = "FINISHED"
            # The end of a training does not wait for an answer.
            assert (kind == "refuses") is not any(
                each.name == "tracker" for each in threading.enumerate()
            )
    (line,) = caplog.messages
    assert "Training does not need it" in line
    assert "pass" not in line
