"""What must hold on a GPU, and how fast it is there, in one run; its output is the report.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --device cpu --small

Each section runs in a process of its own: one that fails, crashes or takes too long leaves the
others, and what it had found until then. `agreement` compares the GPU with the CPU of the same
machine, without TensorFloat-32, which it measures beside; `placement` forbids TensorFlow to place
on the CPU what has no kernel for the GPU. `rate` is `benchmarks/step.py`, `input` is
`benchmarks/input.py`. `resume` trains with the real command and `--deterministic`, kills it, goes
on, and compares every bit with a run to which nothing happened.

Exit code: 0, 1 where a section did not hold, 2 where no GPU is seen.
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
    """How much is done."""

    # Of losses and gradients in float32, relative; of gradients by the norm of each weight's.
    tolerance: float = 1e-3
    image_size: int = 512  # pixels a side, of `rate`, `input` and the steps of `precisions`
    num_layers: int = 8  # levels of the network of `rate`
    num_small_layers: int = 3  # of the networks of the other sections
    batch_sizes: tuple[int, ...] = (2, 16)  # of `rate`
    repeats: int = 10  # steps that are measured
    matmul_size: int = 8192
    num_matmuls: int = 4  # one after the other, for one rate
    num_images: int = 128  # of the input
    # Of `agreement` and `placement`: each loss, and each normalisation but the first, which the
    # losses have.
    losses: tuple[str, ...] = get_args(LossName)
    normalizations: tuple[str, ...] = get_args(ModelConfig.model_fields["normalization"].annotation)
    steps: int = 200  # of the training that is killed
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
    normalizations=("none", "group"),
    steps=30,
    precisions=("float32", "mixed_bfloat16"),
    rate_precisions=("float32",),
    rate_xla=("off",),
)


class Budget:
    """The time of one section."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def allows(self, seconds: float) -> bool:
        """Returns whether so much is left."""
        return time.monotonic() + seconds < self._end


@dataclasses.dataclass(frozen=True)
class Section:
    """A section at work in its process.

    Attributes:
        device: "GPU" or "CPU", what is measured.
        tell: takes a name and what was found of it; kept even when the process ends badly.
    """

    device: str
    sizes: Sizes
    budget: Budget
    tell: Callable[[str, Any], None]
    start_method: str

    def check(self, name: str, value: float, limit: float) -> None:
        """Tells `value`, and that the section does not hold where it is above `limit`."""
        self.tell(name, value)
        if not value <= limit:
            self.tell(f"fault: {name}", f"{value:g}; at most {limit:g} is allowed")

    def expect(self, what: str, holds: bool) -> None:
        """Tells that the section does not hold where `what` does not."""
        if not holds:
            self.tell(f"fault: {what}", "is not so")

    def skip(self, name: str) -> None:
        """Tells that there is no time for `name`."""
        self.tell(f"skipped: {name}", "no time left")


# The sections.


def devices(section: Section) -> None:
    """Finds what TensorFlow computes on, and the versions of what is below it."""
    from job.distributed.precision import resolve_precision
    from job.distributed.runtime import import_tensorflow
    from job.distributed.xla import why_not_xla

    tf = import_tensorflow()
    gpus = tf.config.list_physical_devices("GPU")
    section.tell("gpus", len(gpus))
    details = [tf.config.experimental.get_device_details(gpu) for gpu in gpus]
    section.tell("names", [detail.get("device_name", "unknown") for detail in details])
    section.tell(
        "compute_capability",
        [".".join(map(str, detail.get("compute_capability", ()))) for detail in details],
    )
    build = tf.sysconfig.get_build_info()
    section.tell("built_for", {key: build.get(f"{key}_version") for key in ("cuda", "cudnn")})
    driver = Path("/proc/driver/nvidia/version")
    section.tell("driver", driver.read_text().splitlines()[0] if driver.exists() else None)
    section.tell("tensor_float_32", tf.config.experimental.tensor_float_32_execution_enabled())
    section.tell("bfloat16", resolve_precision("auto") == "mixed_bfloat16")
    section.tell("why_not_xla", why_not_xla())


def agreement(section: Section) -> None:
    """Compares the first step on the device with that on the CPU: loss and gradients."""
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
                    section.tell(f"{name}, with TensorFloat-32", distances)
                    continue
                for what, value in distances.items():
                    section.check(f"{name}, {what}", value, section.sizes.tolerance)


def placement(section: Section) -> None:
    """Trains, evaluates and predicts where TensorFlow may not leave the device."""
    tf = _configured(section, TrainConfig(global_batch_size=4))
    with _dataset(12, 32, (0.5, 0.25, 0.25)) as data:
        for count, (name, case) in enumerate(_cases(section.sizes)):
            if not section.budget.allows(4):
                section.skip(name)
                continue
            with _session(section, tf, data, section.device, case) as trainer:
                # Reading is for the CPU: it is over before.
                batch = next(_batches(trainer))
                step, rate = tf.constant(0, tf.int64), tf.constant(1e-3, tf.float64)
                tf.config.set_soft_device_placement(False)
                try:
                    total, number = trainer.train_step(batch, step, rate)["loss"]
                    if count == 0:
                        trainer.evaluator.step(batch)[1].numpy()
                        trainer.evaluator.probabilities(batch["image"]).numpy()
                finally:
                    tf.config.set_soft_device_placement(True)
                section.tell(f"{name}, loss", float(total) / float(number))


def precisions(section: Section) -> None:
    """Trains some steps in each precision: the loss stays finite, and how fast it is."""
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
                section.tell(f"refused: {precision}", str(error))
                continue
            change = {"precision": precision, "global_batch_size": batch}
            with _session(section, tf, data, section.device, change) as trainer:
                steps = _steps(trainer, 2 + sizes.repeats)
            losses = [loss for loss, _ in steps]
            section.tell(f"{precision}, loss", losses[-1])
            section.tell(f"{precision}, images_per_s", batch / _median_s(steps))
            section.expect(f"{precision}, all losses are finite", all(map(math.isfinite, losses)))


def xla(section: Section) -> None:
    """Compares training whose network XLA compiles with training without it."""
    tf = _configured(section, TrainConfig(global_batch_size=4))
    allow_tensor_float_32 = tf.config.experimental.enable_tensor_float_32_execution
    found = {}
    with _dataset(32, section.sizes.image_size, (0.8, 0.1, 0.1)) as data:
        for way in ("off", "on"):
            with _session(section, tf, data, section.device, {"xla": way}) as trainer:
                # The two shall differ by the order of their additions alone.
                allow_tensor_float_32(False)
                started = time.perf_counter()
                found[way] = _first_step(trainer)
                section.tell(f"{way}, first_step_s", time.perf_counter() - started)
                allow_tensor_float_32(True)
                steps = _steps(trainer, 2 + section.sizes.repeats)
                section.tell(f"{way}, step_s", _median_s(steps))
    for what, value in _distances(found["on"], found["off"]).items():
        section.check(what, value, section.sizes.tolerance)


def rate(section: Section) -> None:
    """Measures the reference's INbreast network against the rate of matrix multiplication."""
    sizes = section.sizes
    tf = _configured(section, TrainConfig())
    # First what must be known; each of the others takes as long as XLA needs for this network.
    ways = [(way, precision) for way in sizes.rate_xla for precision in sizes.rate_precisions]
    for way, precision in ways:
        for batch_size in sizes.batch_sizes:
            name = f"{precision}, batch {batch_size}, XLA {way}"
            if not section.budget.allows(10 if way == "off" else 30):
                section.skip(name)
                continue
            network = Network(
                sizes.image_size,
                precision,
                sizes.num_layers,
                TrainConfig(global_batch_size=batch_size, xla=way),
                matmul_size=sizes.matmul_size,
                num_matmuls=sizes.num_matmuls,
            )
            gc.collect()  # the network before it
            _reset_peak(tf, section.device)
            found = network.work("ours", sizes.repeats)
            section.tell(
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
    """Measures the input without a network, up to the memory of the device."""
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
        section.tell("batch_size", batch_size)
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
            section.tell(f"{name}, images_per_s", statistics.median(rates))


def resume(section: Section) -> None:
    """Kills a training with --deterministic, goes on, and compares it with one left alone."""
    from job.runs.serialization import OPTIMIZER_NAME, WEIGHTS_NAME

    steps, steps_per_epoch, batch_size = section.sizes.steps, 10, 2
    with tempfile.TemporaryDirectory(prefix="flexunet-gpu-") as folder:
        # 20 of 28 groups train.
        data = _prepared(folder, 28, 64, (5 / 7, 1 / 7, 1 / 7))
        options = {
            "data": data,
            "output": f"{folder}/runs",
            "epochs": str(steps // steps_per_epoch),
            "global-batch-size": str(batch_size),
            "precision": "float32",
            "prediction-images": "0",
            "checkpoint-every-minutes": "0.0001",  # one after the other
            "schedule.early-stopping-patience": "0",
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
        section.tell("whole_run_s", time.monotonic() - started)
        with _training(section, [*words, "--name", "killed"]) as process:
            while _steps_done(killed) < steps // 4:
                if not process.is_alive():
                    raise RuntimeError("training ended before it could be killed")
                time.sleep(0.02)
            process.kill()
            process.join()
        section.tell("steps_before_the_kill", done := _steps_done(killed))
        section.expect("the kill came in the middle", 0 < done < steps)
        _train(section, [*words, "--name", "killed"])
        last = {name: max(find_checkpoints(open_store(name))) for name in (whole, killed)}
        section.tell("steps", last[killed].step)
        section.expect("both did all steps", {each.step for each in last.values()} == {steps})
        section.expect("the second start went on", last[killed].attempt > last[whole].attempt)
        for member in (WEIGHTS_NAME, OPTIMIZER_NAME):
            first, second = (_arrays(url, ref, member) for url, ref in last.items())
            different = [name for name in first if first[name] != second.get(name)]
            section.tell(f"{member}, arrays", len(first))
            section.check(f"{member}, arrays that differ", len(different), 0)
            section.expect(f"{member}, the same arrays", first.keys() == second.keys() != set())


# What a section does, and its share of the time, seconds of all MINUTES. The last that is run has
# what the others left.
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


# What they share.


@dataclasses.dataclass(frozen=True)
class FirstStep:
    """The first step of a training: its loss and its gradients, one per weight."""

    loss: float
    gradients: list[np.ndarray]


def _cases(sizes: Sizes) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the losses and normalisations that are tried, by name."""
    for name in sizes.losses:
        yield name, {"loss": {"name": name}}
    for name in sizes.normalizations[1:]:
        yield f"{name} normalisation", {"model": {"normalization": name}}


def _configured(section: Section, config: TrainConfig) -> Any:
    """Returns TensorFlow, set up as `train` does."""
    from job.distributed.runtime import import_tensorflow
    from job.distributed.strategy import configure

    tf = import_tensorflow()
    configure(config)
    return tf


@contextlib.contextmanager
def _session(
    section: Section, tf: Any, data: Any, device: str, change: Mapping[str, Any]
) -> Iterator[Any]:
    """Yields a small network in training on one device."""
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
        # With the gradient alone in it, the first moment tells what the gradient was.
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
    """Returns how far two first steps are apart, relative; of gradients the worst weight."""
    whole = math.sqrt(sum(float(np.sum(np.square(each))) for each in expected.gradients))
    gradients = [
        float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-3 * whole))
        for a, b in zip(found.gradients, expected.gradients, strict=True)
    ]
    # `max` would pass over one that is no number.
    worst = math.nan if any(map(math.isnan, gradients)) else max(gradients)
    loss = abs(found.loss - expected.loss) / abs(expected.loss)
    return {"loss": loss, "gradients": worst}


def _steps(trainer: Any, count: int) -> list[tuple[float, float]]:
    """Returns loss and seconds of `count` steps, epoch after epoch."""
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
    """Returns the seconds of a step; the first compiles, and that of each epoch waits for input."""
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
    """Returns the most memory that was in use: of the GPU, or resident of this process so far."""
    if device == "GPU":
        return float(tf.config.experimental.get_memory_info("GPU:0")["peak"] / 1e6)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def _arrays(url: str, ref: CheckpointRef, member: str) -> dict[str, str]:
    """Returns a hash of the bits of each array of a checkpoint's member, by name."""
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
    """Returns the steps of the newest checkpoint of a run that may not have begun."""
    return max((ref.step for ref in find_checkpoints(open_store(run_url))), default=0)


@contextlib.contextmanager
def _training(section: Section, words: Sequence[str]) -> Iterator[Any]:
    """Yields the process of a `flexunet` command, which does not outlive the block."""
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

    os.dup2(2, 1)  # what it prints is not of the report
    raise SystemExit(main(list(words)))


# The report.


@click.command()
@click.option("--device", type=click.Choice(["gpu", "cpu"]), default="gpu", show_default=True)
@click.option("--small", is_flag=True, help="Sizes that only show that it runs.")
@click.option("--sections", default=",".join(SECTIONS), show_default=True, help="Some of them.")
@click.option("--image-size", type=int, help="Side of the images of rate, input, precisions, xla.")
@click.option("--num-layers", type=int, help="Levels of the network of rate.")
@click.option("--repeats", type=int, help="Steps that are measured.")
@click.option("--tolerance", type=float, help="Of losses and gradients, relative.")
@click.option("--steps", type=int, help="Of the training that is killed, a multiple of 10.")
@click.option("--minutes", default=MINUTES, show_default=True, help="All of it at most.")
def main(device: str, small: bool, sections: str, minutes: float, **sizes: float | None) -> None:
    """Checks and measures a GPU, prints the report and writes it into the results."""
    started = time.monotonic()
    deadline = started + 60 * minutes - 5  # to end what hangs, and to write
    wanted = {"devices", *sections.split(",")}
    if unknown := sorted(wanted - set(SECTIONS)):
        raise click.BadParameter(f"--sections: {unknown[0]} is none of {', '.join(SECTIONS)}")
    names = [name for name in SECTIONS if name in wanted]
    if device == "cpu":
        # Forked from here, the sections need not import them again. With a GPU each starts anew:
        # CUDA does not outlive a fork, and nobody has seen whether an import begins with it.
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
        # After each, so that what was found stays when the machine is taken away.
        _write(report)
    failed = [name for name, each in report["sections"].items() if each["status"] != "holds"]
    report["seconds"] = time.monotonic() - started
    _write(report)
    verdict = f"does not hold: {', '.join(failed)}" if failed else "all of it holds"
    print(f"\n{report['seconds']:.0f} s; {verdict}")
    raise SystemExit(1 if failed else 0)


def _ended(name: str, device: str, sizes: Sizes, allowed_s: float) -> dict[str, Any]:
    """Returns how a section ended, what it found, and how long it took."""
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
                error = f"stopped after its {allowed_s:.0f} s"
                break
            key, value = receiver.recv()
            found[key] = value
            error = value if key == "error" else None
    except EOFError:
        process.join(5)
        if process.exitcode != 0:
            error = f"its process ended with code {process.exitcode}"
    finally:
        # With what it has started; it leads a group of its own.
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
    """Does a section in this process; what it finds goes through `sender`."""
    os.setpgrp()
    # Left for what cannot be asked how long it takes.
    budget = Budget(0.9 * allowed_s)

    def tell(key: str, value: Any) -> None:
        sender.send((key, value))

    try:
        SECTIONS[name][0](Section(device, sizes, budget, tell, start_method))
    except Exception as error:
        traceback.print_exc()
        tell("error", traceback.format_exception_only(error)[-1].strip().splitlines()[0])


def _refuse_other_device(device: str, ended: Mapping[str, Any]) -> None:
    """Ends the command where a GPU was to be measured and there is none."""
    if device == "gpu" and not ended["found"].get("gpus"):
        reason = ended["error"] or "it sees none"
        print(f"no GPU for TensorFlow ({reason}); --device cpu measures the CPU", file=sys.stderr)
        raise SystemExit(2)


def _write(report: Mapping[str, Any]) -> None:
    name = re.sub(r"[^a-z0-9]+", "-", report["name"].lower()).strip("-")
    write_result(f"gpu-{name}", dict(report))


def _print_head(report: Mapping[str, Any]) -> None:
    if report["measured"] == "CPU":
        print("No GPU was measured: all of this is of the CPU, as --device cpu asks for.")
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
