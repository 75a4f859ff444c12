"""Checks training on a GPU and measures its speed, in one run; the output is the report.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --device cpu --small

Each section runs in its own process: if one fails, crashes or takes too long, its results so far
and the other sections remain. `agreement` compares the GPU with the CPU of the same machine,
without TensorFloat-32, which it measures separately; `placement` forbids TensorFlow to move an
operation without a GPU kernel to the CPU. `rate` is `benchmarks/step.py`, `input` is
`benchmarks/input.py`. `resume` trains with the real command and `--deterministic`, kills it,
resumes, and compares every bit with an uninterrupted run.

Exit code: 0; 1 if a section does not hold; 2 if TensorFlow finds no GPU.
"""

import contextlib
import dataclasses
import gc
import hashlib
import math
import multiprocessing
import os
import re
import resource
import signal
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import click
import numpy as np
from machine import describe_machine, write_result
from step import Network

from data_prep.config import PrepConfig
from data_prep.phantoms.images import write_phantoms
from data_prep.pipeline import prepare
from data_prep.sources.pairs import find_sources
from flexunet.errors import UsageError
from flexunet.settings import deep_merge, parse_settings
from flexunet.storage import open_store
from job.config import LossName, ModelConfig, TrainConfig
from job.runs.checkpoints import find_checkpoints
from job.runs.layout import CheckpointRef

PRECISIONS = tuple(
    name for name in get_args(TrainConfig.model_fields["precision"].annotation) if name != "auto"
)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The amount of work of the sections."""

    # Relative, for losses and gradients in float32; of gradients, the norm per weight.
    tolerance: float = 1e-3
    image_size: int = 512  # pixels per side in `rate`, `input` and the steps of `precisions`
    num_layers: int = 8  # levels of the network in `rate`
    num_small_layers: int = 3  # levels of the networks in the other sections
    batch_sizes: tuple[int, ...] = (2, 16)  # in `rate`
    repeats: int = 10  # measured steps
    matmul_size: int = 8192
    num_matmuls: int = 4  # consecutive ones per rate
    num_images: int = 128  # in `input`
    # In `agreement` and `placement`: each loss, and each normalisation except the first one, which
    # the losses use.
    losses: tuple[str, ...] = get_args(LossName)
    normalizations: tuple[str, ...] = get_args(ModelConfig.model_fields["normalization"].annotation)
    steps: int = 200  # steps of the run that is killed
    precisions: tuple[str, ...] = PRECISIONS
    rate_precisions: tuple[str, ...] = tuple(name for name in PRECISIONS if name != "float64")
    rate_xla: tuple[str, ...] = ("off", "on")


SMALL = Sizes(
    image_size=32,
    num_layers=2,
    num_small_layers=2,
    batch_sizes=(2,),
    repeats=2,
    matmul_size=64,
    num_images=12,
    losses=("ce_dice",),
    normalizations=("none",),
    steps=30,
    precisions=("mixed_bfloat16",),
    rate_precisions=("float32",),
    rate_xla=("off",),
)


class Budget:
    """The time limit of one section."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def allows(self, seconds: float) -> bool:
        """Returns whether at least `seconds` are left."""
        return time.monotonic() + seconds < self._end


@dataclasses.dataclass(frozen=True)
class Section:
    """A running section in its process.

    Attributes:
        device: the measured device, "GPU" or "CPU".
        report: receives a name and its result, which is kept even if the process crashes.
    """

    device: str
    sizes: Sizes
    budget: Budget
    report: Callable[[str, Any], None]
    start_method: str

    def check(self, name: str, value: float, limit: float) -> None:
        """Reports `value`, and a fault if it is above `limit`."""
        self.report(name, value)
        if not value <= limit:
            self.report(f"fault: {name}", f"{value:g}; at most {limit:g} is allowed")

    def expect(self, what: str, holds: bool) -> None:
        """Reports a fault unless `holds`."""
        if not holds:
            self.report(f"fault: {what}", "does not hold")

    def skip(self, name: str) -> None:
        """Reports that there is no time left for `name`."""
        self.report(f"skipped: {name}", "no time left")


# The sections.


def devices(section: Section) -> None:
    """Reports the devices of TensorFlow, and the versions of driver, CUDA and cuDNN."""
    from job.distributed.precision import resolve_precision
    from job.distributed.runtime import import_tensorflow
    from job.distributed.xla import why_not_xla

    tf = import_tensorflow()
    gpus = tf.config.list_physical_devices("GPU")
    section.report("gpus", len(gpus))
    details = [tf.config.experimental.get_device_details(gpu) for gpu in gpus]
    section.report("names", [detail.get("device_name", "unknown") for detail in details])
    section.report(
        "compute_capability",
        [".".join(map(str, detail.get("compute_capability", ()))) for detail in details],
    )
    build = tf.sysconfig.get_build_info()
    section.report("built_for", {key: build.get(f"{key}_version") for key in ("cuda", "cudnn")})
    driver = Path("/proc/driver/nvidia/version")
    section.report("driver", driver.read_text().splitlines()[0] if driver.exists() else None)
    section.report("tensor_float_32", tf.config.experimental.tensor_float_32_execution_enabled())
    section.report("bfloat16", resolve_precision("auto") == "mixed_bfloat16")
    section.report("why_not_xla", why_not_xla())


def agreement(section: Section) -> None:
    """Compares loss and gradients of the first step on the device with those on the CPU."""
    tf = _configured(section, TrainConfig(global_batch_size=4))
    allow_tensor_float_32 = tf.config.experimental.enable_tensor_float_32_execution
    with _dataset(12, 32, (0.5, 0.25, 0.25)) as data:
        for count, (name, case) in enumerate(_cases(section.sizes)):
            if not section.budget.allows(4):
                section.skip(name)
                continue
            with _session(section, tf, data, "CPU", case) as trainer:
                expected = _first_step(trainer)
            for allowed in (False, True) if count == 0 else (False,):
                allow_tensor_float_32(allowed)
                with _session(section, tf, data, section.device, case) as trainer:
                    distances = _distances(_first_step(trainer), expected)
                    weights_are_on = trainer.model.weights[0].value.device
                section.expect(f"{name}, weights are on it", section.device in weights_are_on)
                if allowed:
                    section.report(f"{name}, with TensorFloat-32", distances)
                    continue
                for what, value in distances.items():
                    section.check(f"{name}, {what}", value, section.sizes.tolerance)


def placement(section: Section) -> None:
    """Trains, evaluates and predicts while TensorFlow must not use another device."""
    tf = _configured(section, TrainConfig(global_batch_size=4))
    with _dataset(12, 32, (0.5, 0.25, 0.25)) as data:
        for count, (name, case) in enumerate(_cases(section.sizes)):
            if not section.budget.allows(4):
                section.skip(name)
                continue
            with _session(section, tf, data, section.device, case) as trainer:
                # Reading runs on the CPU, so it ends before.
                batch = next(_batches(trainer))
                step, rate = tf.constant(0, tf.int64), tf.constant(1e-3, tf.float64)
                tf.config.set_soft_device_placement(False)
                try:
                    total, number = trainer.train_step(batch, step, rate)["loss"]
                    if count == 0:
                        trainer.evaluator.step(batch)[1].numpy()
                        trainer.evaluator.local_step(batch)
                        trainer.evaluator.probabilities(batch["image"]).numpy()
                finally:
                    tf.config.set_soft_device_placement(True)
                section.report(f"{name}, loss", float(total) / float(number))


def precisions(section: Section) -> None:
    """Trains some steps in each precision; checks that losses are finite, and measures speed."""
    from job.distributed.precision import resolve_precision

    sizes, batch = section.sizes, 4
    tf = _configured(section, TrainConfig(global_batch_size=batch))
    with _dataset(8 * batch, sizes.image_size, (0.8, 0.1, 0.1)) as data:
        for precision in sizes.precisions:
            if not section.budget.allows(8):
                section.skip(precision)
                continue
            try:
                resolve_precision(precision)
            except UsageError as error:
                section.report(f"refused: {precision}", str(error))
                continue
            change = {"precision": precision, "global_batch_size": batch}
            with _session(section, tf, data, section.device, change) as trainer:
                steps = _steps(trainer, 2 + sizes.repeats)
            losses = [loss for loss, _ in steps]
            section.report(f"{precision}, loss", losses[-1])
            section.report(f"{precision}, images_per_s", batch / _median_s(steps))
            section.expect(f"{precision}, all losses are finite", all(map(math.isfinite, losses)))


def xla(section: Section) -> None:
    """Compares training with and without XLA compilation of the network."""
    tf = _configured(section, TrainConfig(global_batch_size=4))
    allow_tensor_float_32 = tf.config.experimental.enable_tensor_float_32_execution
    found = {}
    with _dataset(32, section.sizes.image_size, (0.8, 0.1, 0.1)) as data:
        for method in ("off", "on"):
            with _session(section, tf, data, section.device, {"xla": method}) as trainer:
                # So that the two differ only by the order of additions.
                allow_tensor_float_32(False)
                started = time.perf_counter()
                found[method] = _first_step(trainer)
                section.report(f"{method}, first_step_s", time.perf_counter() - started)
                allow_tensor_float_32(True)
                steps = _steps(trainer, 2 + section.sizes.repeats)
                section.report(f"{method}, step_s", _median_s(steps))
    for what, value in _distances(found["on"], found["off"]).items():
        section.check(what, value, section.sizes.tolerance)


def rate(section: Section) -> None:
    """Compares the reference implementation's INbreast network with the matmul rate."""
    sizes = section.sizes
    tf = _configured(section, TrainConfig())
    # XLA off first: with XLA, each measurement takes as long as its compilation.
    ways = [(method, precision) for method in sizes.rate_xla for precision in sizes.rate_precisions]
    for method, precision in ways:
        for batch_size in sizes.batch_sizes:
            name = f"{precision}, batch {batch_size}, XLA {method}"
            if not section.budget.allows(10 if method == "off" else 30):
                section.skip(name)
                continue
            network = Network(
                sizes.image_size,
                precision,
                sizes.num_layers,
                TrainConfig(global_batch_size=batch_size, xla=method),
                matmul_size=sizes.matmul_size,
                num_matmuls=sizes.num_matmuls,
            )
            gc.collect()  # frees the previous network
            _reset_peak(tf, section.device)
            found = network.work("ours", sizes.repeats)
            section.report(
                name,
                {
                    "step_s": statistics.median(found["step_s"]),
                    "first_step_s": found["first_step_s"],
                    "images_per_s": statistics.median(found["images_per_s"]),
                    "share_of_matmul_rate": statistics.median(found["share_of_matmul_rate"]),
                    "matmul_tflop_per_s": statistics.median(found["matmul_gflop_per_s"]) / 1e3,
                    "peak_memory_mb": _peak_mb(tf, section.device),
                },
            )


def input_alone(section: Section) -> None:
    """Measures the input pipeline without a network, up to the memory of the device."""
    from input import AUGMENTATION, Input, prepare_phantoms, timed

    from job.data.pipeline import one_ahead
    from job.data.shard_cache import open_reader
    from job.distributed.strategy import configure

    sizes = section.sizes
    batch_size = max(sizes.batch_sizes)
    strategy = configure(TrainConfig(global_batch_size=batch_size))
    with tempfile.TemporaryDirectory(prefix="flexunet-gpu-") as work:
        dataset = prepare_phantoms(work, sizes.num_images, sizes.image_size)
        reader = open_reader(dataset, dataset.split("train"), cache="full", cache_dir=None)
        measured = Input(dataset, reader, strategy, batch_size)
        section.report("batch_size", batch_size)
        for name, augmentation in (("plain", None), ("augmented", AUGMENTATION)):

            def take(limit: int, augmentation: Any = augmentation) -> None:
                for _ in one_ahead(measured.batches(augmentation, epoch=0, limit=limit)):
                    pass

            limit = 4 * measured.num_samples
            take(measured.num_samples)  # warms up
            rates = []
            for _ in range(sizes.repeats):
                if rates and not section.budget.allows(5):
                    section.skip(f"{name}, more repeats than {len(rates)}")
                    break
                rates.append(limit / timed(take, limit)[0])
            section.report(f"{name}, images_per_s", statistics.median(rates))


def resume(section: Section) -> None:
    """Kills a run with --deterministic, resumes it, and compares it with an uninterrupted run."""
    from job.runs.serialization import OPTIMIZER_NAME, WEIGHTS_NAME

    steps, steps_per_epoch, batch_size = section.sizes.steps, 10, 2
    with tempfile.TemporaryDirectory(prefix="flexunet-gpu-") as folder:
        # 20 of 28 groups are in the training split.
        data = _prepared(folder, 28, 64, (5 / 7, 1 / 7, 1 / 7))
        options = {
            "data": data,
            "output": f"{folder}/runs",
            "epochs": str(steps // steps_per_epoch),
            "global-batch-size": str(batch_size),
            "precision": "float32",
            "prediction-images": "0",
            "checkpoint-every-minutes": "0.0001",  # one right after the other
            "schedule.early-stopping-patience": "0",
            "preset": "reference",
            "model.num-layers": str(section.sizes.num_small_layers),
            "model.base-filters": "8",
            "model.base-kernels": "3,3",
            "model.dropout-rate": "0.1",
        }
        words = [part for key, value in options.items() for part in (f"--{key}", value)]
        words = ["train", "--local", "--deterministic", "--no-tensorboard", "--no-progress", *words]
        whole, killed = f"{folder}/runs/whole", f"{folder}/runs/killed"
        started = time.monotonic()
        _train(section, [*words, "--name", "whole"])
        section.report("whole_run_s", time.monotonic() - started)
        with _training(section, [*words, "--name", "killed"]) as process:
            while _steps_done(killed) < steps // 4:
                if not process.is_alive():
                    raise RuntimeError("training ended before it could be killed")
                time.sleep(0.02)
            process.kill()
            process.join()
        section.report("steps_before_the_kill", done := _steps_done(killed))
        section.expect("the kill came in the middle", 0 < done < steps)
        _train(section, [*words, "--name", "killed"])
        last = {name: max(find_checkpoints(open_store(name))) for name in (whole, killed)}
        section.report("steps", last[killed].step)
        section.expect("both did all steps", {each.step for each in last.values()} == {steps})
        section.expect("the second start went on", last[killed].attempt > last[whole].attempt)
        for member in (WEIGHTS_NAME, OPTIMIZER_NAME):
            first, second = (_arrays(url, ref, member) for url, ref in last.items())
            different = [name for name in first if first[name] != second.get(name)]
            section.report(f"{member}, arrays", len(first))
            section.check(f"{member}, arrays that differ", len(different), 0)
            section.expect(f"{member}, the same arrays", first.keys() == second.keys() != set())


# The function of a section, and its time limit in seconds if --minutes is MINUTES. The last section
# has all the time that is left.
SECTIONS: dict[str, tuple[Callable[[Section], None], float]] = {
    "devices": (devices, 40),
    "agreement": (agreement, 50),
    "placement": (placement, 35),
    "precisions": (precisions, 40),
    "resume": (resume, 60),
    "input": (input_alone, 25),
    "xla": (xla, 35),
    "rate": (rate, 65),
}
MINUTES = 6.0


# Functions that the sections share.


@dataclasses.dataclass(frozen=True)
class FirstStep:
    """The first step of a run: its loss and its gradients, one per weight."""

    loss: float
    gradients: list[np.ndarray]


def _cases(sizes: Sizes) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields name and options of each loss and normalisation to test."""
    for name in sizes.losses:
        yield name, {"loss": {"name": name}}
    for name in sizes.normalizations[1:]:
        yield f"{name} normalisation", {"model": {"normalization": name}}


def _configured(section: Section, config: TrainConfig) -> Any:
    """Returns TensorFlow, configured as in `train`."""
    from job.distributed.runtime import import_tensorflow
    from job.distributed.strategy import configure

    tf = import_tensorflow()
    configure(config)
    return tf


@contextlib.contextmanager
def _session(
    section: Section, tf: Any, data: Any, device: str, change: Mapping[str, Any]
) -> Iterator[Any]:
    """Yields the trainer of a small network on one device."""
    from job.distributed.process_group import ProcessGroup
    from job.training.setup import TrainingSetup
    from job.training.trainer_factory import open_trainer

    small = {
        "global_batch_size": 4,
        "precision": "float32",
        "xla": "off",
        "model": {
            "num_layers": section.sizes.num_small_layers,
            "base_filters": 8,
            "base_kernels": (5, 5),
            "dropout_rate": 0.1,
        },
        # Without clipping, the first moment after one step gives the gradient.
        "optimizer": {"clipvalue": None},
    }
    config = parse_settings(TrainConfig, deep_merge(small, change), "benchmark")
    strategy = tf.distribute.OneDeviceStrategy(f"{device}:0")
    with open_trainer(
        TrainingSetup(config, data, None, strategy, ProcessGroup(strategy))
    ) as trainer:
        yield trainer


def _first_step(trainer: Any) -> FirstStep:
    from job.training.state import TrainState

    loss, _ = next(trainer.train_steps(TrainState(learning_rate=1e-4)))
    moments = trainer.optimizer.named_variables()
    share = 1 - trainer.config.optimizer.beta_1
    gradients = [
        value.numpy() / share for name, value in moments.items() if name.startswith("first/")
    ]
    return FirstStep(loss, gradients)


def _distances(found: FirstStep, expected: FirstStep) -> dict[str, float]:
    """Returns the relative distance of two first steps; for gradients, of the worst weight."""
    whole = math.sqrt(sum(float(np.sum(np.square(each))) for each in expected.gradients))
    gradients = [
        float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-3 * whole))
        for a, b in zip(found.gradients, expected.gradients, strict=True)
    ]
    # `max` would ignore a NaN.
    worst = math.nan if any(map(math.isnan, gradients)) else max(gradients)
    loss = abs(found.loss - expected.loss) / abs(expected.loss)
    return {"loss": loss, "gradients": worst}


def _steps(trainer: Any, count: int) -> list[tuple[float, float]]:
    """Returns loss and seconds of `count` steps over as many epochs as needed."""
    from job.training.state import TrainState

    found: list[tuple[float, float]] = []
    state = TrainState(learning_rate=1e-4)
    while len(found) < count:
        last = time.perf_counter()
        for loss, _ in trainer.train_steps(state):
            now = time.perf_counter()
            found.append((loss, now - last))
            last = now
        state = TrainState(state.learning_rate, epoch=state.epoch + 1, step=state.step)
    return found[:count]


def _median_s(steps: Sequence[tuple[float, float]]) -> float:
    """Returns the median seconds of a step, without the first step, which compiles."""
    return statistics.median(seconds for _, seconds in steps[1:])


def _batches(trainer: Any) -> Iterator[Any]:
    from job.data.pipeline import EpochPlan, distributed_batches
    from job.data.sampling import global_batches

    split = trainer.dataset.split("train")
    plan = global_batches(np.arange(len(split)), trainer.config.global_batch_size)
    yield from distributed_batches(
        trainer.strategy, trainer.dataset, trainer.readers["train"], EpochPlan(plan, 1, 0)
    )


@contextlib.contextmanager
def _dataset(num_images: int, size: int, fractions: tuple[float, float, float]) -> Iterator[Any]:
    from job.data.dataset import open_dataset

    with tempfile.TemporaryDirectory(prefix="flexunet-gpu-") as folder:
        yield open_dataset(_prepared(folder, num_images, size, fractions))


def _prepared(
    folder: str, num_images: int, size: int, fractions: tuple[float, float, float]
) -> str:
    """Returns the URL of a dataset of phantoms."""
    write_phantoms(f"{folder}/source", num_images, size, 1)
    options = PrepConfig(image_size=size, fractions=fractions, num_processes=1)
    prepare(find_sources(f"{folder}/source"), f"{folder}/data", options, progress=False)
    return f"{folder}/data"


def _reset_peak(tf: Any, device: str) -> None:
    if device == "GPU":
        tf.config.experimental.reset_memory_stats("GPU:0")


def _peak_mb(tf: Any, device: str) -> float:
    """Returns the peak memory of the GPU, or the peak resident memory of this process."""
    if device == "GPU":
        return float(tf.config.experimental.get_memory_info("GPU:0")["peak"] / 1e6)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def _arrays(url: str, ref: CheckpointRef, member: str) -> dict[str, str]:
    """Returns a hash of the bits of each array in a checkpoint file, by name."""
    import io

    import h5py

    data = io.BytesIO(open_store(url).get(f"{ref.prefix}/{member}"))
    arrays: dict[str, np.ndarray] = {}
    if member.endswith(".npz"):
        arrays = dict(np.load(data))
    else:
        with h5py.File(data) as file:

            def keep(name: str, item: Any) -> None:
                if isinstance(item, h5py.Dataset):
                    arrays[name] = item[()]

            file.visititems(keep)
    return {name: hashlib.sha256(value.tobytes()).hexdigest() for name, value in arrays.items()}


def _steps_done(run_url: str) -> int:
    """Returns the step of the newest checkpoint of a run, 0 if it has none."""
    return max((ref.step for ref in find_checkpoints(open_store(run_url))), default=0)


@contextlib.contextmanager
def _training(section: Section, words: Sequence[str]) -> Iterator[Any]:
    """Yields the process of a `flexunet` command, and kills it after the block."""
    context = multiprocessing.get_context(section.start_method)
    process = context.Process(target=_command, args=(words,))
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def _train(section: Section, words: Sequence[str]) -> None:
    with _training(section, words) as process:
        process.join()
        if process.exitcode:
            raise RuntimeError(f"flexunet {words[0]} ended with {process.exitcode}")


def _command(words: Sequence[str]) -> None:
    from launcher.cli import main

    os.dup2(2, 1)  # its output is not part of the report
    raise SystemExit(main(list(words)))


# The report.


@click.command()
@click.option("--device", type=click.Choice(["gpu", "cpu"]), default="gpu", show_default=True)
@click.option("--small", is_flag=True, help="Small sizes, only to test the script.")
@click.option("--sections", default=",".join(SECTIONS), show_default=True, help="Sections to run.")
@click.option("--image-size", type=int, help="Side of images in rate, input, precisions, xla.")
@click.option("--num-layers", type=int, help="Levels of the network in rate.")
@click.option("--repeats", type=int, help="Steps to measure.")
@click.option("--tolerance", type=float, help="Relative tolerance of losses, gradients.")
@click.option("--steps", type=int, help="Steps of the run in resume, multiple of 10.")
@click.option("--minutes", default=MINUTES, show_default=True, help="Time limit.")
def main(device: str, small: bool, sections: str, minutes: float, **sizes: float | None) -> None:
    """Check and measure a GPU; print the report and write it to the results."""
    started = time.monotonic()
    deadline = started + 60 * minutes - 5  # leaves time to end a hanging process, and to write
    wanted = {"devices", *sections.split(",")}
    if unknown := sorted(wanted - set(SECTIONS)):
        raise click.BadParameter(f"--sections: {unknown[0]} is not one of {', '.join(SECTIONS)}")
    names = [name for name in SECTIONS if name in wanted]
    if device == "cpu":
        # The sections are forked from here and need not import these again. With a GPU, each
        # section starts a new process: CUDA does not survive a fork, and an import might start it.
        import keras  # noqa: F401
        import tensorflow  # noqa: F401
    changes = {name: value for name, value in sizes.items() if value is not None}
    plan = dataclasses.replace(SMALL if small else Sizes(), **changes)
    report: dict[str, Any] = {
        "machine": describe_machine(),
        "measured": device.upper(),
        "sizes": dataclasses.asdict(plan),
        "sections": {},
    }
    for name in names:
        left_s = deadline - time.monotonic()
        share_s = SECTIONS[name][1] * minutes / MINUTES if name != names[-1] else left_s
        ended = _ended(name, device.upper(), plan, min(share_s, left_s))
        report["sections"][name] = ended
        if name == "devices":
            _refuse_other_device(device, ended)
            names_found = ended["found"].get("names") or ["CPU"]
            report["name"] = names_found[0] if device == "gpu" else "CPU"
            _print_head(report)
        _print_section(name, ended)
        # After each section, so that results remain if the machine is lost.
        _write(report)
    failed = [name for name, each in report["sections"].items() if each["status"] != "holds"]
    report["seconds"] = time.monotonic() - started
    _write(report)
    verdict = f"does not hold: {', '.join(failed)}" if failed else "all sections hold"
    print(f"\n{report['seconds']:.0f} s; {verdict}")
    raise SystemExit(1 if failed else 0)


def _ended(name: str, device: str, sizes: Sizes, allowed_s: float) -> dict[str, Any]:
    """Runs a section; returns its status, results, error and duration."""
    if allowed_s < 5:
        return {"status": "not begun", "found": {}, "error": "no time left", "seconds": 0.0}
    start_method = "spawn" if device == "GPU" else "fork"
    context = multiprocessing.get_context(start_method)
    receiver, sender = context.Pipe(duplex=False)
    arguments = (name, device, sizes, allowed_s, start_method, sender)
    process = context.Process(target=_work, args=arguments)
    started = time.monotonic()
    process.start()
    sender.close()
    found: dict[str, Any] = {}
    error = None
    try:
        while error is None:
            if not receiver.poll(max(0.0, started + allowed_s - time.monotonic())):
                error = f"stopped after its limit of {allowed_s:.0f} s"
                break
            key, value = receiver.recv()
            found[key] = value
            error = value if key == "error" else None
    except EOFError:
        process.join(5)
        if process.exitcode != 0:
            error = f"its process ended with code {process.exitcode}"
    finally:
        # With all processes that it started: it leads its own process group.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()
    has_fault = any(key.startswith("fault: ") for key in found)
    status = "failed" if error else "does not hold" if has_fault else "holds"
    seconds = time.monotonic() - started
    return {"status": status, "found": found, "error": error, "seconds": seconds}


def _work(
    name: str, device: str, sizes: Sizes, allowed_s: float, start_method: str, sender: Any
) -> None:
    """Runs a section in this process; sends its results through `sender`."""
    os.setpgrp()
    # A tenth is left for parts of unknown duration.
    budget = Budget(0.9 * allowed_s)

    def report(key: str, value: Any) -> None:
        sender.send((key, value))

    try:
        SECTIONS[name][0](Section(device, sizes, budget, report, start_method))
    except Exception as error:
        traceback.print_exc()
        report("error", traceback.format_exception_only(error)[-1].strip().splitlines()[0])


def _refuse_other_device(device: str, ended: Mapping[str, Any]) -> None:
    """Exits if a GPU is to be measured but none is available."""
    if device == "gpu" and not ended["found"].get("gpus"):
        reason = ended["error"] or "it finds none"
        print(f"no GPU for TensorFlow ({reason}); --device cpu measures the CPU", file=sys.stderr)
        raise SystemExit(2)


def _write(report: Mapping[str, Any]) -> None:
    name = re.sub(r"[^a-z0-9]+", "-", report["name"].lower()).strip("-")
    write_result(f"gpu-{name}", dict(report))


def _print_head(report: Mapping[str, Any]) -> None:
    if report["measured"] == "CPU":
        print("No GPU was measured: with --device cpu, all results are of the CPU.")
    machine = report["machine"]
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    print(f"{report['name']}; {machine['cpu']}, {machine['cores']} cores; {packages}")


def _print_section(name: str, ended: Mapping[str, Any]) -> None:
    print(f"\n{name}: {ended['status']}, {ended['seconds']:.1f} s")
    for key, value in ended["found"].items():
        print(f"  {key:44} {_shown(value)}")
    if ended["error"] and "error" not in ended["found"]:
        print(f"  {'error':44} {ended['error']}")
    sys.stdout.flush()


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shown(each)}" for key, each in value.items())
    return str(value)


if __name__ == "__main__":
    main()
