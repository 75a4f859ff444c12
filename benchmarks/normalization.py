"""Measures normalisation against float64 and against Keras' layers.

    python benchmarks/normalization.py [--sides 128,512,1024] [--batch-sizes 1,2] [--repeats 9]

Errors are relative to the largest exact value: of the outputs, and of the gradients of inputs,
gamma and beta, in float32. Times are of forward and backward and of forward alone; both layers take
turns. `--sides 16 --repeats 1` takes seconds.
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
@click.option("--sides", default="128,512,1024", show_default=True, help="Of the images, pixels.")
@click.option("--batch-sizes", default="1,2", show_default=True, help="Images at once.")
@click.option("--channels", default=16, show_default=True, help="A multiple of 8.")
@click.option("--repeats", default=9, show_default=True, help="Turns; one more comes before them.")
def main(sides: str, batch_sizes: str, channels: int, repeats: int) -> None:
    """Measures errors and times of group and batch normalisation."""
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
        times = {way: f"{each['median']:.2f}" for way, each in row["time_over_keras"].items()}
        print(f"  time over Keras': {times}")


def measured(name: str, shape: tuple[int, ...], repeats: int) -> dict[str, Any]:
    """Returns errors and times of one layer, ours and Keras'."""
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
        for way, index in (("forward_backward", 0), ("forward", 1)):
            took = {whose: seconds(runs[whose][index], tensors) for whose in runs}
            ratios[way].append(took["ours"] / took["keras"])
    return {
        "layer": name,
        "shape": list(shape),
        "errors": errors,
        "time_over_keras": {way: spread(values[1:]) for way, values in ratios.items()},
    }


def running(name: str, shape: tuple[int, ...], whose: str) -> tuple[Any, Any]:
    """Returns what computes outputs and gradients, and what computes outputs alone."""
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
    """Returns outputs and gradients in float64, gamma being 1 and beta 0."""
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
    """Returns how long a run takes until its results are there."""
    started = time.perf_counter()
    run(*tensors)[-1].numpy().flat[0]
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
