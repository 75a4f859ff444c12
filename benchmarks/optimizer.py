"""Compares the optimizer's update with a copy of the same number of bytes.

    python benchmarks/optimizer.py [--parameters 125] [--repeats 7]

An update reads and writes the weight and both moments, and reads the gradient: 7 times the bytes of
the parameters. A copy of 3.5 times the parameters moves as much. The copy (one thread per core),
this project's Adam and Keras' Adam run in turns.
"""

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import click
import numpy as np
from machine import describe_machine, shown, write_result

from job.config import OptimizerConfig, TrainConfig

COLUMNS = 1024
NUM_WEIGHTS = 40  # about the number in FlexUNet


@click.command()
@click.option(
    "--parameters", default=125.0, show_default=True, help="Millions of float32 parameters."
)
@click.option("--repeats", default=7, show_default=True, help="Turns, after one warm-up turn.")
def main(parameters: float, repeats: int) -> None:
    """Measure the update of Adam with clipped values."""
    from job.distributed.runtime import import_tensorflow
    from job.distributed.strategy import configure

    tf = import_tensorflow()
    configure(TrainConfig())
    rows = int(parameters * 1e6 / NUM_WEIGHTS / COLUMNS)
    runs: dict[str, Callable[[], object]] = {
        "copy": copying(int(3.5 * rows * COLUMNS * NUM_WEIGHTS)),
        "ours": updating(tf, rows, is_keras=False),
        "keras": updating(tf, rows, is_keras=True),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(1 + repeats):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - started)
    times = {name: values[1:] for name, values in times.items()}
    ratios = {
        name: [a / b for a, b in zip(times[name], times["copy"], strict=True)]
        for name in ("ours", "keras")
    }
    write_result(
        "optimizer",
        {
            "machine": describe_machine(),
            "parameters": rows * COLUMNS * NUM_WEIGHTS,
            "seconds": times,
            "over_copy": ratios,
        },
    )
    for name, values in times.items():
        print(f"{name}: {shown(values, 3)} s")
    for name, values in ratios.items():
        print(f"{name} over copy: {shown(values)}")


def copying(num_values: int) -> Callable[[], object]:
    """Returns a function that copies `num_values` float32, a part in each thread."""
    source, target = np.ones(num_values, np.float32), np.empty(num_values, np.float32)
    cores = os.cpu_count() or 1
    pool = ThreadPoolExecutor(cores)
    parts = list(zip(np.array_split(target, cores), np.array_split(source, cores), strict=True))
    return lambda: list(pool.map(lambda part: np.copyto(*part), parts))


def updating(tf: Any, rows: int, *, is_keras: bool) -> Callable[[], object]:
    """Returns a function that updates `NUM_WEIGHTS` weights of `rows` x `COLUMNS` once."""
    import keras

    from job.optimization.optimizer import Adam

    weights = [keras.Variable(np.zeros((rows, COLUMNS), np.float32)) for _ in range(NUM_WEIGHTS)]
    gradients = [tf.random.stateless_normal((rows, COLUMNS), (5, i)) for i in range(NUM_WEIGHTS)]
    rate = tf.constant(1e-4, tf.float64)
    if is_keras:
        optimizer = keras.optimizers.Adam(1e-4, clipvalue=0.4)
        optimizer.build(weights)
        update = tf.function(lambda: optimizer.apply(gradients, weights))
    else:
        adam = Adam(OptimizerConfig(clipvalue=0.4), weights)
        step = tf.constant(3, tf.int64)
        update = tf.function(lambda: adam.apply(gradients, step=step, learning_rate=rate))

    def run() -> None:
        update()
        weights[-1].value[-1, -1].numpy()

    return run


if __name__ == "__main__":
    main()
