"""Measures the training step against the machine's own matrix-multiplication rate.

    python benchmarks/step.py [--image-size 512] [--batch-size 2] [--precision float32]

Both are measured in turns in one run: a step, then multiplications of large matrices in the same
dtype. The ratio of their FLOP rates is the share of the machine that the step uses. The model's
FLOPs are those of its convolutions, 2 per multiply-add, forward once and backward twice.
"""

import statistics
import time
from typing import Any

import click
import numpy as np
from machine import describe_machine, write_result

from data_prep.errors import UsageError
from job.config import ModelConfig, OptimizerConfig, TrainConfig


def convolution_flops(model: Any) -> int:
    """Returns the FLOPs of one forward pass of one image."""
    total = 0
    for layer in model.layers:
        kind = type(layer).__name__
        if kind not in ("Conv2D", "Conv2DTranspose"):
            continue
        # A transposed convolution applies its kernel once per input pixel, a plain one per output.
        pixels = layer.output.shape if kind == "Conv2D" else layer.input.shape
        total += 2 * int(pixels[1]) * int(pixels[2]) * int(np.prod(layer.kernel.shape))
    return total


def matmul_flops_per_s(tf: Any, dtype: Any, size: int = 4096) -> float:
    """Returns the rate of one `size`³ multiplication, FLOP/s."""
    a = tf.cast(tf.random.stateless_normal((size, size), (1, 2)), dtype)
    product = tf.function(lambda x: tf.matmul(x, x))
    product(a).numpy()
    started = time.perf_counter()
    product(a).numpy()
    return float(2 * size**3 / (time.perf_counter() - started))


@click.command()
@click.option("--image-size", default=512, show_default=True, help="Side of the images, pixels.")
@click.option("--batch-size", default=2, show_default=True, help="Images per step.")
@click.option("--precision", default="float32", show_default=True, help="float32, mixed_bfloat16.")
@click.option("--repeats", default=5, show_default=True, help="Measurements of each.")
@click.option("--num-layers", default=8, show_default=True, help="Levels of FlexUNet.")
def main(image_size: int, batch_size: int, precision: str, repeats: int, num_layers: int) -> None:
    """Measures the training step of the reference's INbreast network."""
    from job import runtime

    runtime.import_tensorflow()
    import tensorflow as tf

    from job.losses import make_loss
    from job.metrics import reference_metrics
    from job.model import build_model
    from job.optimizer import Adam
    from job.step import make_train_step

    if precision == "mixed_bfloat16" and not runtime.supports_bfloat16():
        raise UsageError("mixed_bfloat16: not computed by this hardware")
    strategy = runtime.configure(TrainConfig(global_batch_size=batch_size))
    config = ModelConfig(num_layers=num_layers)
    with strategy.scope():
        model = build_model(
            config, image_shape=(image_size, image_size, 3), num_classes=2, precision=precision
        )
        optimizer = Adam(OptimizerConfig(), model.trainable_variables)
    metrics = reference_metrics(["dice_coef_multiclass"])
    step = make_train_step(
        strategy, model, optimizer, make_loss("categorical_crossentropy", num_classes=2), metrics
    )
    shape = (batch_size, image_size, image_size)
    batch = {
        "image": tf.zeros((*shape, 3), tf.uint8),
        "mask": tf.zeros(shape, tf.uint8),
        "weight": tf.ones(batch_size),
        "key": tf.range(batch_size, dtype=tf.int64),
    }
    rate = tf.constant(1e-4, tf.float64)
    started = time.perf_counter()
    float(step(batch, tf.constant(0, tf.int64), rate)["loss"][0])
    first_s = time.perf_counter() - started
    dtype = tf.bfloat16 if precision == "mixed_bfloat16" else tf.float32
    flops = 3 * convolution_flops(model) * batch_size
    steps, rates = [], []
    for count in range(1, repeats + 1):
        started = time.perf_counter()
        float(step(batch, tf.constant(count, tf.int64), rate)["loss"][0])
        steps.append(time.perf_counter() - started)
        rates.append(matmul_flops_per_s(tf, dtype))
    shares = [flops / time_s / rate for time_s, rate in zip(steps, rates, strict=True)]
    result = {
        "machine": describe_machine(),
        "image_size": image_size,
        "batch_size": batch_size,
        "precision": precision,
        "parameters": model.count_params(),
        "forward_gflop_per_image": convolution_flops(model) / 1e9,
        "first_step_s": first_s,
        "step_s": steps,
        "images_per_s": batch_size / statistics.median(steps),
        "matmul_gflop_per_s": [rate / 1e9 for rate in rates],
        "share_of_matmul_rate": shares,
        "share_of_matmul_rate_median": statistics.median(shares),
    }
    write_result(f"step-{image_size}-{precision}", result)
    print(
        f"step {statistics.median(steps):.2f} s ({min(steps):.2f}-{max(steps):.2f}), "
        f"{result['images_per_s']:.2f} images/s, "
        f"{statistics.median(shares):.2f} of the matmul rate ("
        f"{min(shares):.2f}-{max(shares):.2f}), {statistics.median(rates) / 1e9:.0f} GFLOP/s"
    )


if __name__ == "__main__":
    main()
