"""Measures the memory and time of a training step in a process of its own.

python -m runs this module in that process: it reads a config from stdin and writes the result to
stdout, as JSON. So a step that needs too much memory ends that process alone.
"""

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any, Literal

from flexunet.errors import FlexUNetError, StoppedError, error_of, kind_of
from flexunet.progress import Heartbeat, no_heartbeat
from flexunet.python_path import safe_environment
from job.config import TrainConfig
from job.data.dataset import open_dataset
from job.models.compatibility import check_compatible
from job.planning.facts import MachineFacts, dataset_facts, machine_facts, own_memory_bytes
from job.planning.plan_file import Plan
from job.planning.settle import DryStep, fitted_plan, preview

logger = logging.getLogger(__name__)

# auto: only if the estimated memory is not far below that of the machine.
DryStepMode = Literal["auto", "always", "never"]

# The process is ended at this share of the memory, so that the machine does not run out.
_KILL_SHARE = 0.92
_TICK_S = 0.02
_NUM_STEPS = 3  # the first one compiles
_KEPT_CHARS = 2000  # of the output of a failed process
# In the output of a process whose allocation failed: of TensorFlow, Python, C++, CUDA and libc.
_MEMORY_ERRORS = (
    *("ResourceExhaustedError", "RESOURCE_EXHAUSTED", "OOM when allocating", "MemoryError"),
    *("std::bad_alloc", "CUDA_ERROR_OUT_OF_MEMORY", "Cannot allocate memory"),
    *("STATUS_ALLOC_FAILED", "CUDA error: out of memory"),
)


def measure_step(
    config: TrainConfig,
    machine: MachineFacts,
    should_stop: Callable[[], bool],
    heartbeat: Heartbeat = no_heartbeat,
) -> DryStep:
    """Returns the memory and time of a training step of `config`, on real samples.

    Args:
        machine: its replicas of this process train their part of the batch.
        should_stop: whether to end the step.
        heartbeat: called while the step runs.

    Raises:
        StoppedError: `should_stop` returned true.
        FlexUNetError: training fails for another reason than memory.
    """
    logger.info("dry step: measuring the memory of a training step")
    of_process = max(1, config.global_batch_size // machine.num_replicas) * machine.local_replicas
    changes = {"global_batch_size": of_process, "progress": False, "epochs": config.epochs or 1}
    # The clock of a time budget changes the rate only.
    no_clock = {"time_budget": None, "time_schedule": None}
    request = config.model_copy(update=changes | no_clock)
    with tempfile.TemporaryFile() as question, tempfile.TemporaryFile() as answer:
        question.write(request.model_dump_json().encode())
        question.seek(0)
        with tempfile.TemporaryFile() as log:
            process = subprocess.Popen(  # noqa: S603 - ours
                [sys.executable, "-m", __name__],
                stdin=question,
                stdout=answer,
                stderr=log,
                env=safe_environment() | {"TF_CONFIG": ""},
                start_new_session=True,  # Ctrl-C reaches this process, which ends the other
            )
            try:
                # On a GPU, the memory of the machine limits only what the process has in RAM.
                is_on_gpu = machine.device == "gpu"
                memory = own_memory_bytes() if is_on_gpu else machine.memory_bytes
                limit = int(_KILL_SHARE * memory)
                peak = _watched(process, limit, should_stop, heartbeat)
            finally:
                process.kill()
                process.wait()
            return result_of(process.returncode, _text(answer), _text(log), peak)


def plan_dataset(
    config: TrainConfig, dry_step: DryStepMode, should_stop: Callable[[], bool]
) -> Plan:
    """Returns the plan of a new run of `config` on this machine; stores nothing.

    Args:
        config: `data` is set.

    Raises:
        UsageError: an option does not fit the dataset, or no network fits into memory.
    """
    config = config.model_copy(update={"preset": "auto"})
    machine, dataset = machine_facts(config), open_dataset(str(config.data))

    def measure(config: TrainConfig, machine: MachineFacts) -> DryStep:
        return measure_step(config, machine, should_stop)

    check_compatible(preview(config, machine), dataset)
    facts = dataset_facts(dataset, config.folds)
    trying = None if dry_step == "never" else measure
    plan = fitted_plan(facts, machine, config, trying, always=dry_step == "always")
    return plan.model_copy(update={"dataset_digest": dataset.digest})


def _watched(
    process: "subprocess.Popen[bytes]",
    limit: int,
    should_stop: Callable[[], bool],
    heartbeat: Heartbeat,
) -> int:
    """Waits for the process and returns its peak memory; kills it above `limit` bytes.

    Raises:
        StoppedError: `should_stop` returned true.
    """
    peak = 0
    while process.poll() is None:
        peak = max(peak, _own_bytes(process.pid))
        if peak > limit:
            process.kill()
        if should_stop():
            raise StoppedError("stopped before training began; the same command starts it")
        heartbeat()
        time.sleep(_TICK_S)
    return peak


def _own_bytes(pid: int) -> int:
    """Returns the memory of a process without its pages of files, which the kernel can drop."""
    try:
        with open(f"/proc/{pid}/statm", encoding="ascii") as file:
            _, resident, of_files, *_ = map(int, file.read().split())
    except (OSError, ValueError):
        return 0
    return (resident - of_files) * os.sysconf("SC_PAGE_SIZE")


def _file_bytes() -> int:
    """Returns the pages of files in the memory of this process, in bytes."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[2]) * os.sysconf("SC_PAGE_SIZE")


def _text(file: Any) -> str:
    file.seek(0)
    return str(file.read().decode(errors="replace"))


def result_of(code: int, answer: str, log: str, peak: int) -> DryStep:
    """Returns the result of a process that ended with `code`.

    Args:
        answer: its standard output.
        log: its standard error.
        peak: its peak memory, bytes.

    Raises:
        FlexUNetError: it failed for another reason than memory.
    """
    lines = answer.strip().splitlines()
    if code == 0 and lines:
        values = json.loads(lines[-1])
        if "error" in values:
            raise error_of(values["error"], values["text"])
        return DryStep(**values)
    # The kernel and this process kill what needs too much; a crash alone says nothing of memory.
    if code == -signal.SIGKILL or any(each in log for each in _MEMORY_ERRORS):
        return DryStep(fits=False, memory_bytes=peak, step_s=0.0)
    last = (log.strip()[-_KEPT_CHARS:].splitlines() or ["no output"])[-1]
    raise FlexUNetError(
        f"the dry step failed with exit code {code}: {last}; to train without a plan, give "
        "--preset recipe"
    )


def main() -> int:
    """Trains a few steps of the config on stdin; writes the result to stdout."""
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # out of memory, the kernel ends this process first
    config = TrainConfig.model_validate_json(sys.stdin.read())
    try:
        result = json.dumps(_measured(config))
    except FlexUNetError as error:
        result = json.dumps({"error": kind_of(error), "text": str(error)})
    print(result, flush=True)  # noqa: T201 - the answer to the other process
    os._exit(0)  # to remove the modules of TensorFlow takes a second


def _measured(config: TrainConfig) -> dict[str, Any]:
    """Returns the values of a `DryStep`."""
    import resource

    from job.data.folds import open_folded
    from job.distributed.precision import resolve_precision
    from job.distributed.process_group import ProcessGroup
    from job.distributed.strategy import configure
    from job.models.compatibility import input_max
    from job.training.setup import TrainingSetup
    from job.training.state import TrainState
    from job.training.trainer_factory import open_trainer

    dataset = open_folded(config)
    strategy = configure(config)
    precision = resolve_precision(config.precision, input_max(config, dataset.manifest))
    config = config.model_copy(update={"precision": precision})
    setup = TrainingSetup(config, dataset, None, strategy, ProcessGroup(strategy, None))
    durations: list[float] = []
    with open_trainer(setup) as trainer:
        state = TrainState(learning_rate=config.optimizer.learning_rate)
        while len(durations) < _NUM_STEPS:
            began = time.monotonic()
            for _ in trainer.train_steps(state):
                durations.append(time.monotonic() - began)
                began = time.monotonic()
                if len(durations) == _NUM_STEPS:
                    break
            state.epoch, state.step_in_epoch = state.epoch + 1, 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - _file_bytes()
    gpus = _gpu_peaks()
    return {"fits": True, "memory_bytes": max(gpus, default=peak), "step_s": min(durations[1:])}


def _gpu_peaks() -> list[int]:
    """Returns the peak memory of each GPU, in bytes."""
    import tensorflow as tf

    return [
        int(tf.config.experimental.get_memory_info(device.name.split("device:")[-1])["peak"])
        for device in tf.config.list_logical_devices("GPU")
    ]


if __name__ == "__main__":
    raise SystemExit(main())
