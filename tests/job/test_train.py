"""The seam and the command: outputs, resuming, stopping, locking, divergence."""

import csv
import json
import logging
import math
import os
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from flexunet.errors import (
    DivergedError,
    LockedError,
    StoppedError,
    UsageError,
)
from flexunet.storage import join_url, open_store
from job.config import ModelConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from job.optimization.time_schedule import RECORD_NAME, TrainingClock
from job.postprocessing.masks import Postprocessing
from job.postprocessing.stored import read_postprocessing
from job.reporting.html_report import render
from job.reporting.training_display import TrainingDisplay
from job.runs.checkpoints import find_checkpoints
from job.runs.lease import LeaseTiming
from job.runs.loading import find_checkpoint
from job.runs.run import Run
from job.runs.status import read_ends, run_status
from job.training import trainer
from job.training.loop import train_and_evaluate
from job.training.setup import Callbacks
from tests import commands
from tests.job.discs import prepare_discs
from tests.job.rival import take_over
from tests.job.setups import one_process_setup
from tests.job.tracked import steps_by_run, tracked_values

MODEL = ModelConfig(num_layers=2, base_filters=4, base_kernels=(3, 3), dropout_rate=0.2)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    return prepare_discs(tmp_path_factory.mktemp("discs"))  # 12 train, 4 valid, 4 test


def config_for(dataset: str, output: Path, **changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "data": dataset,
        "output": str(output),
        "name": "run",
        "epochs": 2,
        "global_batch_size": 4,
        "precision": "float64",
        "tensorboard": False,
        "prediction_images": 1,
        "model": MODEL,
    }
    return TrainConfig(**(values | changes))


def train(
    config: TrainConfig, strategy: Any, *, stop_after: int | None = None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Returns the outcome and the reported events; asks to stop after `stop_after` steps."""
    events: list[dict[str, Any]] = []

    def should_stop() -> bool:
        return stop_after is not None and len(steps_of(events)) >= stop_after

    with Run.open(config.output, str(config.name)) as run:
        outcome = train_and_evaluate(
            one_process_setup(config, run, strategy),
            Callbacks(lambda event: events.append(dict(event)), should_stop),
        )
    return outcome, events


def steps_of(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [event for event in events if event["event"] == "step"]


def table_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def history_of(output: Path) -> list[dict[str, str]]:
    return table_of(output / "run" / "metrics" / "history.csv")


def assert_same_history(first: Path, second: Path) -> None:
    for a, b in zip(history_of(first), history_of(second), strict=True):
        for name in a:
            assert float(a[name]) == pytest.approx(float(b[name]), rel=1e-9), name


@pytest.fixture(scope="module")
def one_cpu() -> Any:
    return tf.distribute.OneDeviceStrategy("CPU:0")


@pytest.fixture(scope="module")
def finished(
    dataset: str, one_cpu: Any, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TrainConfig, dict[str, Any], list[dict[str, Any]]]:
    """Returns config, outcome and events of a run of 2 epochs, 3 steps each.

    It averages its weights, so that the tests that resume it see whether the average does.
    """
    output = tmp_path_factory.mktemp("finished")
    average = OptimizerConfig(ema_momentum=0.5)
    config = config_for(dataset, output, tensorboard=True, keep_checkpoints=1, optimizer=average)
    tracked = {"tracker": "mlflow", "tracking_uri": str(output / "mlruns"), "experiment": "own"}
    config = config.model_copy(update={"fit_postprocessing": True, **tracked})
    return config, *train(config, one_cpu)


def test_one_device_two_replicas_xla_and_a_restart_compute_the_same(
    finished: Any, one_cpu: Any, two_cpus: Any, tmp_path: Path
) -> None:
    config, _, events = finished
    assert len(steps_of(events)) == 6
    # Stopped inside the first epoch on one device, then inside the second on two.
    again = config.model_copy(update={"output": str(tmp_path)})
    for strategy, stop_after, xla in ((one_cpu, 2, "on"), (two_cpus, 3, "off")):
        with pytest.raises(StoppedError, match="same command resumes"):
            train(again.model_copy(update={"xla": xla}), strategy, stop_after=stop_after)
    again = again.model_copy(update={"tracking_uri": str(tmp_path / "mlruns")})
    _, rest = train(again, one_cpu)
    assert len(steps_of(rest)) == 1
    assert_same_history(Path(config.output), tmp_path)
    check_tracked(Path(config.output), tmp_path)


def check_tracked(first: Path, moved: Path) -> None:
    """Checks what trackers have of `first`, and of a run that sends to a new folder at its end."""
    losses = [float(row["val_loss"]) for row in history_of(first)]
    assert tracked_values(moved / "mlruns", "own", "val_loss") == [
        (1, pytest.approx(losses[0])),
        (2, pytest.approx(losses[1])),
    ]
    found = steps_by_run(moved / "run" / "tensorboard")
    assert set(found) == {"attempt-3", "validation"}
    dice = found["attempt-3"]["val_dice/mass"]
    assert dice == found["attempt-3"]["train_images_per_s"] == [0, 1]
    assert set(map(tuple, found["validation"].values())) == {(0, 1)}
    table = table_of(moved / "run" / "metrics" / "class_dice.csv")
    assert [float(row["dice_mass"]) for row in table] == pytest.approx(
        [float(row["val_foreground_dice"]) for row in history_of(first)]
    )


def test_progress_of_a_resumed_run_is_that_of_the_whole_run(
    dataset: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    step = {"epoch": 1, "step": 2, "num_epochs": 3, "epoch_images": 12, "num_images": 4, "loss": 1}
    with TrainingDisplay(config_for(dataset, tmp_path)) as display:
        display.report({"event": "step", **step})
        # The workers of a cluster died, and the next ones resume from an earlier checkpoint.
        display.report({"event": "started"})
        display.report({"event": "step", **step, "epoch": 0})
    # An epoch of 12, a step of 4, and this one.
    first, *_, last = caplog.messages
    assert first == "train: 20/36 images, epoch 2/3 step loss 1.0000"
    assert last == "train: 8/36 images, epoch 1/3 step loss 1.0000"


def test_a_run_on_a_plateau_learns_slower_then_stops_early_and_says_what_goes_on(
    dataset: str, one_cpu: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    config = config_for(
        dataset,
        tmp_path,
        epochs=4,
        optimizer={"learning_rate": 1e-30},  # too small to change a weight
        schedule={"reducer_patience": 1, "reducer_factor": 0.5, "early_stopping_patience": 2},
    )
    outcome, _ = train(config, one_cpu)
    assert (outcome["epochs"], outcome["stopped_early"]) == (3, True)
    rates = [float(row["learning_rate"]) for row in history_of(tmp_path)]
    assert rates == [1e-30, 1e-30, 5e-31]
    words = "stopped early after 3 epochs: the validation loss has not fallen since epoch 1"
    (line,) = (text for text in caplog.messages if words in text)
    assert line == f"{words} (--schedule.early-stopping-patience)"
    url = f"{tmp_path}/run"
    assert f"Status: finished ({words})" in render(open_store(url))

    again, events = train(config, one_cpu)
    assert (again["epochs"], events) == (3, [])
    assert caplog.messages[-1].startswith(f"{url}: finished already: {words}; to continue")
    # The next tests start from a finished run that way.
    assert caplog.messages[-1].endswith(f"give another --name and --init-from {url}")


def test_a_finished_cosine_that_is_trained_on_is_warned_of(
    dataset: str, one_cpu: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    schedule = ScheduleConfig(cosine=True, reduce_on_plateau=False)
    config = config_for(dataset, tmp_path, epochs=1, schedule=schedule)
    train(config, one_cpu)
    train(config, one_cpu)
    assert "cosine" not in caplog.text
    outcome, _ = train(config.model_copy(update={"epochs": 2}), one_cpu)
    assert (
        "schedule.cosine spans all epochs: the learning rate is 0 after epoch 1 and now jumps"
        in caplog.text
    )
    assert outcome["epochs"] == 2
    last = [float(row["learning_rate"]) for row in history_of(tmp_path)]
    # 3 steps each: the last is 2/3 of the way in the first epoch alone, then 5/6 of both.
    rate = config.optimizer.learning_rate
    assert last == pytest.approx(
        [rate * (1 + math.cos(math.pi * part)) / 2 for part in (2 / 3, 5 / 6)]
    )


def test_a_time_budget_ends_within_an_epoch_that_is_validated_after_a_restart(
    dataset: str, one_cpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock shows the number of steps that this process has trained, in seconds."""
    events: list[dict[str, Any]] = []
    monkeypatch.setattr(
        trainer,
        "TrainingClock",
        lambda before_s: TrainingClock(before_s, lambda: float(len(steps_of(events)))),
    )
    schedule = ScheduleConfig(cosine=True, reduce_on_plateau=False)
    config = config_for(dataset, tmp_path, epochs=None, time_budget=5 / 60, schedule=schedule)

    def attempt(*, stops: bool = False) -> dict[str, Any]:
        """Trains; may stop in the validation of the second epoch."""
        events.clear()
        with Run.open(config.output, str(config.name)) as run:
            return train_and_evaluate(
                one_process_setup(config, run, one_cpu),
                Callbacks(
                    lambda event: events.append(dict(event)),
                    lambda: stops and events[-1].get("name") == "validation of epoch 2",
                ),
            )

    with pytest.raises(StoppedError):
        attempt(stops=True)
    # 3 steps, of which the last and the validation take 1 s; then 2 steps until 4 s are used.
    numbers = [(each["step"], each["num_epochs"]) for each in steps_of(events)]
    assert numbers == [(1, None), (2, None), (3, None), (1, None), (2, None)]
    outcome = attempt()
    assert steps_of(events) == []
    assert (outcome["epochs"], outcome["is_time_over"], outcome["time_used_s"]) == (2, True, 5.0)
    run = tmp_path / "run"
    record = (run / RECORD_NAME).read_text().splitlines()
    assert record == ["step,time_fraction", "2,0.2", "3,0.75", "5,1.0"]
    rates = [float(row["learning_rate"]) for row in history_of(tmp_path)]
    rate = config.optimizer.learning_rate
    assert rates == pytest.approx(
        [rate * (1 + math.cos(math.pi * part)) / 2 for part in (0.2, 0.75)]
    )
    assert "Status: finished" in render(open_store(str(run)))
    again = attempt()
    assert (again["time_used_s"], events) == (5.0, [])


def test_a_stop_during_validation_keeps_the_epoch(
    finished: Any, one_cpu: Any, tmp_path: Path
) -> None:
    config, _, _ = finished
    again = config.model_copy(update={"output": str(tmp_path)})
    asked = iter([False] * 3)  # after each of the 3 steps; the next one asks in validation
    with (
        pytest.raises(StoppedError, match="same command resumes"),
        Run.open(again.output, str(again.name)) as run,
    ):
        train_and_evaluate(
            one_process_setup(again, run, one_cpu),
            Callbacks(lambda event: None, lambda: next(asked, True)),
        )
    store = open_store(again.output).subpath(str(again.name))
    assert read_ends(store) == {1: {"end": "stopped", "epoch": 1, "step": 3}}
    assert run_status(store) == "stopped"
    _, rest = train(again, one_cpu)
    assert len(steps_of(rest)) == 3
    assert_same_history(Path(config.output), tmp_path)
    assert run_status(store) == "finished"


def test_a_run_leaves_all_its_outputs(finished: Any) -> None:
    config, outcome, _ = finished
    run = Path(config.output) / "run"
    names = {stat.name for stat in open_store(str(run)).list()}
    tables = ("train_losses", "train_metrics")
    assert {
        *("config.yaml", "environment.json", "dataset.json", "identity.json", "outcome.json"),
        *("tracker.json", "metrics/class_dice.csv"),
        *(f"metrics/{name}{ending}" for name in tables for ending in (".csv", ".png")),
        *("metrics/history.csv", "metrics/foreground.png", "metrics/throughput.csv"),
        *(f"evaluation/{name}" for name in ("evaluation.csv", "per_case.csv", "summary.json")),
    } <= names
    predictions = [name for name in names if name.startswith("epoch_change_infer/")]
    assert sorted(re.sub(r"disc-\d+", "X", name) for name in predictions) == [
        "epoch_change_infer/Epoch_1_X.png",
        "epoch_change_infer/Epoch_2_X.png",
    ]
    assert any(name.startswith("tensorboard/attempt-1/events") for name in names)
    summary = json.loads((run / "evaluation" / "summary.json").read_text())
    assert summary == outcome["evaluation"]
    assert summary["num_cases"] == 4
    check_best_is_fitted(run)
    assert summary["prediction"]["postprocessing"]["fitted_on"]["num_cases"] == 4
    header = (run / "metrics" / "train_losses.csv").read_text().splitlines()[0]
    assert header == "epoch, loss, val_loss"


def check_best_is_fitted(run: Path) -> None:
    """Checks that the fit of a run is of its best checkpoint."""
    fitted = read_postprocessing(open_store(str(run)), ["mass"])
    best = find_checkpoint(open_store(str(run)), which="best")
    assert fitted is not None
    assert (fitted.checkpoint, fitted.commit_sha256) == (best.prefix, best.sha256)
    # Four validation images are too few for an interval.
    assert fitted.values() == Postprocessing()
    assert fitted.temperature.low is None


def test_another_setting_under_the_same_name_is_refused(finished: Any, one_cpu: Any) -> None:
    with pytest.raises(UsageError, match=r"seed.*1234.*5"):
        train(finished[0].model_copy(update={"seed": 5}), one_cpu)


def test_a_finished_run_trains_again_only_for_more_epochs(finished: Any, one_cpu: Any) -> None:
    config, outcome, _ = finished
    again, events = train(config, one_cpu)
    assert again["best"] == outcome["best"]
    assert events == []
    longer, events = train(config.model_copy(update={"epochs": 3}), one_cpu)
    assert longer["epochs"] == 3
    assert len(steps_of(events)) == 3
    # The last checkpoint and the best are left: 3 steps an epoch.
    store = open_store(join_url(config.output, "run"))
    steps = {ref.step for ref in find_checkpoints(store)}
    assert steps == {3 * (longer["best"]["epoch"] + 1), 9}
    assert longer["best"] != outcome["best"]
    check_best_is_fitted(Path(config.output) / "run")


def test_a_run_that_is_lost_during_evaluation_ends_as_lost(
    dataset: str, one_cpu: Any, tmp_path: Path
) -> None:
    config = config_for(dataset, tmp_path, epochs=1)
    store = open_store(join_url(config.output, "run"))

    def lose(event: Any) -> None:
        if event.get("name") == "evaluation":
            take_over(run)

    with (
        pytest.raises(LockedError, match="has taken the run over"),
        Run.acquire(store, by_lease=True, timing=LeaseTiming(renew_s=0.05, expire_s=5)) as run,
    ):
        train_and_evaluate(one_process_setup(config, run, one_cpu), Callbacks(lose, lambda: False))


def test_weights_start_from_another_run(finished: Any, one_cpu: Any, tmp_path: Path) -> None:
    config, _, cold = finished
    changes = {"output": str(tmp_path), "epochs": 1, "init_from": join_url(config.output, "run")}
    _, warm = train(config.model_copy(update=changes), one_cpu)
    assert steps_of(warm)[0]["loss"] < steps_of(cold)[0]["loss"]


def test_divergence_ends_the_run_for_good(dataset: str, one_cpu: Any, tmp_path: Path) -> None:
    config = config_for(dataset, tmp_path, optimizer={"learning_rate": 1e300, "clipvalue": 0})
    with pytest.raises(DivergedError, match=r"lower --optimizer\.learning-rate"):
        train(config, one_cpu)
    outcome = json.loads((tmp_path / "run" / "outcome.json").read_text())
    assert (outcome["status"], outcome["exit_code"]) == ("diverged", 7)
    with pytest.raises(DivergedError, match="another name"):
        train(config, one_cpu)


def command(*arguments: str) -> list[str]:
    return ["job.train", "--local", "--no-progress", *arguments]


def wait_for(path: Path, process: commands.Process) -> None:
    """Waits until `path` exists.

    Raises:
        AssertionError: the process ended, or two minutes passed.
    """
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.005)


def arrays_of(run: Path) -> dict[str, np.ndarray]:
    """Returns the weights of the newest checkpoint by file and name, with the raw ones."""
    import h5py

    ref = max(find_checkpoints(open_store(str(run))))
    arrays: dict[str, np.ndarray] = {}
    for path in (run / ref.prefix).glob("*.weights.h5"):
        with h5py.File(path) as file:
            file.visititems(
                lambda name, item, path=path: (
                    arrays.update({f"{path.name}/{name}": item[()]})
                    if isinstance(item, h5py.Dataset)
                    else None
                )
            )
    return arrays


@pytest.mark.cluster
def test_killed_stopped_and_resumed_equals_never_stopped_bit_by_bit(
    dataset: str, tmp_path: Path
) -> None:
    options = [
        *("--data", dataset, "--output", str(tmp_path), "--epochs", "6", "--deterministic"),
        *("--preset", "reference", "--global-batch-size", "2"),
        *("--model.num-layers", "3", "--model.base-filters", "4"),
        *("--model.base-kernels", "3,3", "--model.dropout-rate", "0.1", "--augmentation.enabled"),
        *("--augmentation.deformation-probability", "0.5", "--no-tensorboard"),
    ]
    arguments = [*options, "--name", "control", "--progress"]
    control = commands.run(*command(*arguments))
    assert control.returncode == 0, control.stderr
    reported = control.stderr.splitlines()
    assert reported.count("building the network") == 1
    assert sum(line.startswith("network: 3 levels, ") for line in reported) == 1
    assert reported.count("compiling the first step of epoch 1") == 1
    # The bar is over before: what it says of the last step is no end of the run.
    is_bar = [line.startswith("train: ") for line in reported]
    assert any(is_bar)
    assert not any(is_bar[reported.index("evaluating the test split with the best checkpoint") :])

    tracked = ["--tracker", "mlflow", "--tracking-uri", str(tmp_path / "mlruns"), "--tensorboard"]
    broken = command(*options, *tracked, "--name", "broken")
    run = tmp_path / "broken"

    temporary = tmp_path / "temporary"
    temporary.mkdir()

    def start() -> commands.Process:
        environment = os.environ | {"TMPDIR": str(temporary)}
        return commands.start(*broken, environment=environment)

    process = start()
    wait_for(run / "checkpoints" / "step-00000006" / "a1" / "COMMIT.json", process)
    second = commands.run(*broken)
    assert second.returncode == 4, second.stderr
    assert str(process.pid) in second.stderr
    assert len(second.stderr.strip().splitlines()) == 1
    process.kill()
    process.communicate()
    # Sources that TensorFlow generates, which a killed process leaves behind.
    assert list(temporary.glob("*.py")) == []

    process = start()
    wait_for(run / "checkpoints" / "step-00000018" / "a2" / "COMMIT.json", process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 6, errors
    assert "the same command resumes" in errors.strip().splitlines()[-1]

    last = commands.run(*broken)
    assert last.returncode == 0, last.stderr
    assert re.search(r"resuming from \S+, after \d epochs? and \d steps?", last.stderr)

    expected, found = arrays_of(tmp_path / "control"), arrays_of(run)
    assert expected.keys() == found.keys()
    for name, values in expected.items():
        assert np.array_equal(values, found[name]), name
    for table in ("history.csv", "train_losses.csv", "train_metrics.csv"):
        path = Path("metrics") / table
        assert (tmp_path / "control" / path).read_text() == (run / path).read_text()
    per_case = Path("evaluation") / "per_case.csv"
    assert (tmp_path / "control" / per_case).read_text() == (run / per_case).read_text()
    losses = [float(row["val_loss"]) for row in table_of(run / "metrics" / "history.csv")]
    assert tracked_values(tmp_path / "mlruns", "Default", "val_loss") == list(enumerate(losses, 1))
    numbers, images = steps_by_run(run / "tensorboard").values()
    assert numbers["val_dice/mass"] == numbers["loss"] == list(range(6))
    assert set(map(tuple, images.values())) == {tuple(range(6))}


@pytest.mark.cluster
def test_averaged_and_timed_a_killed_run_and_a_repeated_one_equal_the_first_bit_by_bit(
    dataset: str, tmp_path: Path
) -> None:
    options = [
        *("--local", "--no-progress", "--threads", "1", "--deterministic", "--no-tensorboard"),
        *("--data", dataset, "--output", str(tmp_path), "--global-batch-size", "2"),
        *("--model.num-layers", "2", "--model.base-filters", "4", "--model.base-kernels", "3,3"),
        *("--model.normalization", "batch", "--preset", "recipe", "--time-budget", "0.3"),
        *("--optimizer.ema-momentum", "0.8", "--augmentation.preset", "strong"),
        *("--foreground-share", "0.9", "--foreground-share-end", "0.1"),
        *("--checkpoint-every-minutes", "0.0001"),
    ]

    def attempt(name: str, last: int = 0) -> str:
        found = commands.run("tests.job.stepping", str(last), *options, "--name", name)
        assert found.returncode == (-signal.SIGKILL if last else 0), found.stderr
        return found.stderr

    attempt("control")
    outcome = json.loads((tmp_path / "control" / "outcome.json").read_text())
    # 6 steps an epoch, the last of which and the validation take a second: 17 of 18 s for steps.
    assert (outcome["epochs"], outcome["best"]["step"] <= 18) == (3, True)
    attempt("killed", last=11)
    assert "resuming from" in attempt("killed")
    # Without the clock of the steps: by the record alone.
    followed = ["--name", "repeated", "--time-schedule", str(tmp_path / "control")]
    found = commands.run("job.train", *options, *followed)
    assert found.returncode == 0, found.stderr
    expected = arrays_of(tmp_path / "control")
    for name in ("killed", "repeated"):
        arrays = arrays_of(tmp_path / name)
        assert expected.keys() == arrays.keys()
        for path, values in expected.items():
            assert np.array_equal(values, arrays[path]), (name, path)
        for table in ("metrics/history.csv", RECORD_NAME, "evaluation/per_case.csv"):
            first, second = (tmp_path / run / table for run in ("control", name))
            assert first.read_text() == second.read_text(), (name, table)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--local"], "no dataset: give --data"),
        ([], "give --local"),
        (["--local", "--data", "nowhere"], "no dataset at"),
        (["--local", "--epoch", "3"], "--epochs"),
        (["--local", "--data", "x", "--epochs", "0"], "--epochs=0"),
        (["--local", "--data", "x", "--name", "Not OK"], "--name='Not OK'"),
        (["--local", "--config", "missing.yaml"], r"--config missing\.yaml: does not exist"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, tmp_path: Path
) -> None:
    result = commands.run("job.train", *arguments, folder=tmp_path)
    assert result.returncode == 2, result.stderr
    assert re.search(message, result.stderr)
    assert len(result.stderr.strip().splitlines()) == 1


def test_micro_batches_that_do_not_fit_the_replicas_begin_no_run(
    dataset: str, tmp_path: Path
) -> None:
    sizes = ["--global-batch-size", "4", "--accumulate", "4", "--cpu-replicas", "2"]
    network = ["--model.num-layers", "2", "--output", str(tmp_path), "--name", "new"]
    result = commands.run("job.train", "--local", "--data", dataset, *sizes, *network)
    assert result.returncode == 2, result.stderr
    assert (
        "--accumulate=4 does not divide 2, the batch of each of" in result.stderr.splitlines()[-1]
    )
    assert not (tmp_path / "new" / "identity.json").exists()


def test_a_command_that_is_refused_is_no_restart(
    finished: Any, one_cpu: Any, tmp_path: Path
) -> None:
    config, _, _ = finished
    folder = tmp_path / "run"
    shutil.copytree(Path(config.output) / "run", folder)
    (folder / "outcome.json").unlink()
    again = config.model_copy(update={"output": str(tmp_path), "seed": 5})
    with pytest.raises(UsageError, match="--seed was 1234, now 5"):
        train(again, one_cpu)
    ends = read_ends(open_store(str(folder)))
    assert ends[max(ends)] == {"end": "looked"}
