"""Compares the normalisation layers with float64 and with Keras' layers.

    python benchmarks/normalization.py [--sides 128,512,1024] [--batch-sizes 1,2] [--repeats 9]

Errors, in float32, are relative to the largest exact value of the outputs and of the gradients of
inputs, gamma and beta. Times are measured for forward plus backward and for forward alone, with the
two layers in turns. `--sides 16 --repeats 1` takes seconds.
"""

import time
from collections.abc import Callable
from typing import Any

import click
import numpy as np
from machine import describe_machine, spread, write_result

from job.config import TrainConfig

NUM_GROUPS = 8
GRADIENTS = ("inputs", "gamma", "beta")


@click.command()
@click.option(
    "--sides", default="128,512,1024", show_default=True, help="Sides of the images, pixels."
)
@click.option("--batch-sizes", default="1,2", show_default=True, help="Batch sizes.")
@click.option("--channels", default=16, show_default=True, help="Channels, a multiple of 8.")
@click.option("--repeats", default=9, show_default=True, help="Turns, after one warm-up turn.")
def main(sides: str, batch_sizes: str, channels: int, repeats: int) -> None:
    """Measure errors and times of group and batch normalisation."""
    from job.distributed.runtime import import_tensorflow
    from job.distributed.strategy import configure

    import_tensorflow()
    configure(TrainConfig())
    rows = [
        measured(name, (int(batch), int(side), int(side), channels), repeats)
        for name in ("group", "batch")
        for side in sides.split(",")
        for batch in batch_sizes.split(",")
    ]
    write_result("normalization", {"machine": describe_machine(), "cases": rows})
    for row in rows:
        print(f"{row['layer']} normalisation of {row['shape']}")
        for whose in ("keras", "ours"):
            found = row["errors"][whose].items()
            print(f"  {whose}: " + ", ".join(f"{name} {error:.1e}" for name, error in found))
        times = {method: f"{each['median']:.2f}" for method, each in row["time_over_keras"].items()}
        print(f"  time over Keras': {times}")


def measured(name: str, shape: tuple[int, ...], repeats: int) -> dict[str, Any]:
    """Returns errors and times of one layer, for this project and for Keras."""
    import tensorflow as tf

    random = np.random.default_rng(0)
    inputs = np.maximum(random.normal(0.5, 1 + np.arange(shape[-1]) / shape[-1], shape), 0)
    arrays = [inputs, random.normal(0.1, 1, shape) + 0.1 * inputs]
    arrays = [each.astype(np.float32) for each in arrays]
    exact = exactly(name, *arrays)
    tensors = [tf.constant(each) for each in arrays]
    runs: dict[str, Any] = {whose: running(name, shape, whose) for whose in ("keras", "ours")}
    errors = {
        whose: {
            part: float(np.abs(found.numpy() - right).max() / np.abs(right).max())
            for part, found, right in zip(
                ("outputs", *GRADIENTS), both(*tensors), exact, strict=True
            )
        }
        for whose, (both, _) in runs.items()
    }
    ratios: dict[str, list[float]] = {"forward_backward": [], "forward": []}
    for _ in range(1 + repeats):
        for method, index in (("forward_backward", 0), ("forward", 1)):
            took = {whose: seconds(runs[whose][index], tensors) for whose in runs}
            ratios[method].append(took["ours"] / took["keras"])
    return {
        "layer": name,
        "shape": list(shape),
        "errors": errors,
        "time_over_keras": {method: spread(values[1:]) for method, values in ratios.items()},
    }


def running(name: str, shape: tuple[int, ...], whose: str) -> tuple[Any, Any]:
    """Returns two functions: one for outputs and gradients, one for outputs alone."""
    import keras
    import tensorflow as tf

    from job.models import normalization

    module = keras.layers if whose == "keras" else normalization
    if name == "group":
        layer = module.GroupNormalization(NUM_GROUPS)
    else:
        layer = module.BatchNormalization(synchronized=True)
    layer.build(shape)
    options = {} if name == "group" else {"training": True}

    @tf.function(autograph=False)
    def both(inputs: Any, output_gradient: Any) -> list[Any]:
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            outputs = layer(inputs, **options)
        of = [inputs, layer.gamma.value, layer.beta.value]
        return [outputs, *tape.gradient(outputs, of, output_gradient)]

    @tf.function(autograph=False)
    def forward(inputs: Any, _: Any) -> list[Any]:
        return [layer(inputs, **options)]

    return both, forward


def exactly(name: str, inputs: np.ndarray, output_gradient: np.ndarray) -> list[np.ndarray]:
    """Returns outputs and gradients in float64, for gamma 1 and beta 0."""
    size = inputs.shape[-1]
    grouped = (*inputs.shape[:3], NUM_GROUPS, size // NUM_GROUPS)
    axes = (1, 2, 4) if name == "group" else (0, 1, 2)
    x, g = (each.astype(np.float64).reshape(grouped) for each in (inputs, output_gradient))

    def mean(values: np.ndarray) -> np.ndarray:
        found: np.ndarray = values.mean(axes, keepdims=True)
        return found

    centred = x - mean(x)
    inverse = 1 / np.sqrt(mean(centred**2) + 1e-3)
    outputs = centred * inverse
    gradient = inverse * (g - mean(g) - outputs * mean(g * outputs))
    sums = [(g * outputs).sum((0, 1, 2)), g.sum((0, 1, 2))]
    return [
        *(each.reshape(inputs.shape) for each in (outputs, gradient)),
        *(each.reshape(size) for each in sums),
    ]


def seconds(run: Callable[..., list[Any]], tensors: list[Any]) -> float:
    """Returns how long a run takes until its results are computed."""
    started = time.perf_counter()
    run(*tensors)[-1].numpy().flat[0]
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
