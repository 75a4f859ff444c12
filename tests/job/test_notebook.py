"""Training in a process that has used TensorFlow before, as a notebook does in an earlier cell."""

import json
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from jupyter_client.manager import start_new_kernel

from tests import commands
from tests.job.discs import prepare_discs

pytestmark = pytest.mark.cluster  # kernels of Jupyter, and interrupts
PROJECT = Path(__file__).resolve().parents[2]

# Prints what `configure` made or raised, and what it warned of, for each set of options.
CONFIGURED = """
import json, logging, sys
import tensorflow as tf

tf.constant(1.0) + 1
from flexunet.errors import UsageError
from job.config import TrainConfig
from job.distributed.strategy import check_devices, configure
from job.distributed.process_group import ProcessSpec

warned = []
logging.basicConfig(level=logging.WARNING)
logging.getLogger().handlers[0].emit = lambda record: warned.append(record.getMessage())

def found(options, spec):
    warned.clear()
    try:
        config = TrainConfig(**options)
        check_devices(config, spec, None)
        made = configure(config, spec).num_replicas_in_sync
    except UsageError as error:
        made = str(error)
    return {"made": made, "warned": list(warned)}

results = []
for options, size in json.loads(sys.argv[1]):
    spec = ProcessSpec(0, tuple(f"localhost:{1 + rank}" for rank in range(size))) if size else None
    results.append(found(options, spec))
print(json.dumps(results))
"""

# Options, processes of a cluster (0: none), what is made or said, what is warned of.
TABLE: list[tuple[dict[str, Any], int, int | str, str | None]] = [
    ({}, 0, 1, None),
    ({"threads": 2}, 0, 1, "so --threads=2 cannot be set; training continues without"),
    ({"keep_memory": True}, 0, 1, "so --keep-memory cannot be set; training"),
    (
        {"threads": 2, "keep_memory": True},
        1,
        1,
        "so --keep-memory and --threads=2 cannot be set; training",
    ),
    (
        {"threads": 2, "deterministic": True},
        0,
        "one thread per core, so --threads=2 cannot be set",
        None,
    ),
    ({"cpu_replicas": 2}, 0, "with 1 CPU device, and cannot create more", None),
    ({}, 2, "cannot join a cluster of 2 processes", None),
    ({"deterministic": True}, 0, 1, None),
    ({}, 0, 1, "TensorFlow was made deterministic before"),
]

# Trains as `flexunet train` does, where TensorFlow has so many CPUs; prints the exit codes.
TRAINED = """
import json, sys
import tensorflow as tf

cpu = tf.config.list_physical_devices("CPU")[0]
number = int(sys.argv[1])
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * number)
tf.constant(1.0) + 1
from job.train import main

print([main(["--local", *arguments]) for arguments in json.loads(sys.argv[2])])
"""


def python(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    done = commands.run("tests.script", "-c", script, *arguments)
    assert done.returncode == 0, done.stderr
    return done


def test_what_comes_too_late_is_reported_and_refused_where_it_changes_the_result() -> None:
    asked = [(options, size) for options, size, _, _ in TABLE]
    results = json.loads(python(CONFIGURED, json.dumps(asked)).stdout)
    for (options, _, made, warned), found in zip(TABLE, results, strict=True):
        if isinstance(made, int):
            assert found["made"] == made, options
        else:
            assert made in found["made"], options
            assert "restart the kernel" in found["made"]
            assert "\n" not in found["made"]
        # One line for all that is too late, and none where nothing is.
        assert len(found["warned"]) == (warned is not None), options
        if warned is not None:
            assert warned in found["warned"][0]
            assert "restart the kernel" in found["warned"][0]


@pytest.mark.parametrize(("num_cpus", "names"), [(1, ["first"]), (2, ["first", "second"])])
def test_a_run_trains_after_tensorflow_was_used(
    num_cpus: int, names: list[str], tmp_path: Path
) -> None:
    options = [
        *("--data", prepare_discs(tmp_path), "--output", str(tmp_path / "runs"), "--epochs", "1"),
        *("--global-batch-size", "4", "--cpu-replicas", str(num_cpus), "--threads", "0"),
        *(
            "--preset",
            "reference",
            "--model.num-layers",
            "2",
            "--model.base-filters",
            "4",
            "--model.base-kernels",
            "3,3",
        ),
        *("--no-tensorboard", "--no-progress", "--prediction-images", "0"),
    ]
    # The second has other shapes.
    other = {"first": [], "second": ["--model.base-filters", "8"]}
    runs = [[*options, "--name", name, *other[name]] for name in names]
    done = python(TRAINED, str(num_cpus), json.dumps(runs))
    assert json.loads(done.stdout.strip().splitlines()[-1]) == [0] * len(names), done.stderr
    assert not re.search("already in use|Collective ops", done.stderr)
    for name in names:
        folder = tmp_path / "runs" / name
        assert json.loads((folder / "environment.json").read_text())["replicas"] == num_cpus
        assert json.loads((folder / "outcome.json").read_text())["status"] == "finished"


# What a person runs in the cells of a notebook; `interrupt` is there when steps are done.
CELL = """
import tensorflow as tf

tf.constant(1.0) + 1
import flexunet

def on_event(event):
    if isinstance(event, flexunet.StepEnded):
        open("step", "w").close()

run = flexunet.train(
    data={data!r},
    output="runs",
    name="a",
    epochs={epochs},
    global_batch_size=1,
    preset="reference",
    model={{"num_layers": 2, "base_filters": 2, "base_kernels": (3, 3)}},
    prediction_images=0,
    tensorboard=False,
    on_event=on_event,
)
print(run.status, len(run.history))
"""


@pytest.mark.filterwarnings("ignore")  # Jupyter's own
def test_an_interrupt_of_the_kernel_saves_and_the_cell_resumes(
    discs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(PROJECT))
    manager, client = start_new_kernel(kernel_name="python3", cwd=str(tmp_path))
    try:
        # Without stop_on_error=False the kernel may abort a cell that is sent soon after an error.
        sent = client.execute(CELL.format(data=discs, epochs=100_000), stop_on_error=False)
        while not (tmp_path / "step").exists():
            time.sleep(0.1)
        manager.interrupt_kernel()
        message = client.get_shell_msg(timeout=300)
        while message["parent_header"]["msg_id"] != sent:
            message = client.get_shell_msg(timeout=300)
        reply = message["content"]
        assert (reply["status"], reply.get("ename")) == ("error", "StoppedError"), reply
        assert "stopped and saved at epoch" in reply["evalue"]
        outcome = tmp_path / "runs" / "a" / "outcome.json"
        assert not outcome.exists()
        saved = int(re.search(r"epoch (\d+)", reply["evalue"])[1])  # type: ignore[index]
        # The same process goes on, also with fewer epochs than it was begun with.
        reply = client.execute_interactive(
            CELL.format(data=discs, epochs=saved + 1), timeout=300, output_hook=lambda message: None
        )["content"]
        assert reply["status"] == "ok", reply
        found = json.loads(outcome.read_text())
        assert (found["status"], found["epochs"]) == ("finished", saved + 1)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
