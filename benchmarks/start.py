"""Compares the start of `flexunet train`, until its first step has ended, with the necessary part.

    python benchmarks/start.py [--image-size 256]

command: a new process runs the real command on a prepared dataset of phantoms, and ends after the
first step. core: a new process imports TensorFlow, builds the same network and optimizer, traces
the step and runs it once. They run in turns.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
from machine import describe_machine, shown, write_result

from data_prep.config import PrepConfig
from data_prep.phantoms.images import write_phantoms
from data_prep.pipeline import prepare
from data_prep.sources.pairs import find_sources

COMMAND = """
import os
import job.train
from launcher.cli import main

def end(self, event):
    if event["event"] == "step":
        os._exit(0)

job.reporting.training_display.TrainingDisplay.report = end
raise SystemExit(main(["train", *__import__("sys").argv[1:]]) or 1)
"""

CORE = """
import sys
from job.distributed.runtime import import_tensorflow
from job.distributed.strategy import configure
from job.config import ModelConfig, OptimizerConfig, TrainConfig

size, levels = map(int, sys.argv[1:])
tf = import_tensorflow()
strategy = configure(TrainConfig())
from job.distributed.replica_sums import Criterion
from job.losses import make_loss
from job.metrics.batch import reference_metrics
from job.models.registry import build_model
from job.optimization.optimizer import Adam
from job.training.step import make_train_step

with strategy.scope():
    model = build_model(
        ModelConfig(num_layers=levels), image_shape=(size, size, 3), num_classes=2
    )
    optimizer = Adam(OptimizerConfig(), model.trainable_variables)
loss = make_loss("categorical_crossentropy", num_classes=2)
metrics = reference_metrics(["dice_coef_multiclass"])
step = make_train_step(strategy, model, optimizer, Criterion(loss, metrics))
batch = {
    "image": tf.zeros((2, size, size, 1), tf.uint8),
    "mask": tf.zeros((2, size, size), tf.uint8),
    "weight": tf.ones(2),
    "key": tf.range(2, dtype=tf.int64),
}
float(step(batch, tf.constant(0, tf.int64), tf.constant(1e-4, tf.float64))["loss"][0])
__import__("os")._exit(0)
"""


@click.command()
@click.option("--image-size", default=256, show_default=True, help="Side of the images, pixels.")
@click.option("--repeats", default=5, show_default=True, help="Measured starts of each.")
@click.option("--warm-ups", default=1, show_default=True, help="Starts of each before measuring.")
@click.option("--num-layers", default=8, show_default=True, help="Levels of FlexUNet.")
def main(image_size: int, repeats: int, warm_ups: int, num_layers: int) -> None:
    """Measure the start of training with the INbreast network of the reference implementation."""
    times: dict[str, list[float]] = {"command": [], "core": []}
    with tempfile.TemporaryDirectory(prefix="flexunet-bench-") as folder:
        write_phantoms(f"{folder}/source", 20, image_size, 1)
        options = PrepConfig(image_size=image_size, num_processes=1)
        prepare(find_sources(f"{folder}/source"), f"{folder}/data", options, progress=False)
        for count in range(warm_ups + repeats):
            command = [
                "--local", "--preset", "reference", "--data", f"{folder}/data",
                "--output", f"{folder}/runs",
                "--name", f"start-{count}", "--precision", "float32",
                "--model.num-layers", str(num_layers), "--model.image-channels", "3",
            ]  # fmt: skip
            times["command"].append(seconds_of(COMMAND, command))
            times["core"].append(seconds_of(CORE, [str(image_size), str(num_layers)]))
    times = {name: values[warm_ups:] for name, values in times.items()}
    ratios = [a / b for a, b in zip(times["command"], times["core"], strict=True)]
    write_result(
        "start",
        {
            "machine": describe_machine(),
            "image_size": image_size,
            "num_layers": num_layers,
            "seconds": times,
            "command_over_core": ratios,
        },
    )
    for name, values in times.items():
        print(f"{name}: {shown(values, 1)} s")
    print(f"command over core: {shown(ratios)}")


def seconds_of(program: str, arguments: list[str]) -> float:
    """Returns the duration of `program` in a new Python process."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", program, *arguments], env=environment, check=True)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
