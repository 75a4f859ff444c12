"""Compares the FLOP rate of the training step with the machine's matrix-multiplication rate.

    python benchmarks/step.py [--image-size 512] [--batch-size 2] [--precision float32]

Trains the same network in four ways, each in its own process, one after the other:

ours       the step of `job/training/step.py`
naive      a `tf.function` with a tape, Keras' loss and Keras' Adam
reference  like the reference implementation (TensorFlow-FlexUNet): Keras' `fit` and Adam, one
           intra-op thread, float32
pinned     the same with one inter-op thread too: no two operations run at the same time

A step and a multiplication of large matrices in the same dtype run in turns; the ratio of their
FLOP rates is the share of the machine's rate that the step uses. The model's FLOPs are those of its
convolutions, 2 per multiply-add, forward once and backward twice. Last, every layer runs alone,
forward and backward: the sum of their best times is the lower limit for a step without overhead.
User time, system time and page faults show whether a step computes or waits for memory.
"""

import functools
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
from machine import describe_machine, shown, write_result

from job.config import ModelConfig, OptimizerConfig, TrainConfig
from job.distributed.precision import resolve_precision
from job.distributed.process_group import ProcessGroup

WAYS = ("ours", "naive", "reference", "pinned")
LAYER_REPEATS = 3
MATMUL_SIZE = 4096  # side of the matrices that are multiplied
LEARNING_RATE = 1e-4


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


def matmul_flops_per_s(tf: Any, dtype: Any, size: int = MATMUL_SIZE, count: int = 1) -> float:
    """Returns the rate of `count` multiplications of `size` x `size` matrices, FLOP/s.

    Reads back one element only: reading all of them would take a GPU longer than the product.
    """
    a, product = _matmul(tf, dtype, size)
    started = time.perf_counter()
    for _ in range(count):
        last = product(a, a)
    last.numpy()
    return float(count * 2 * size**3 / (time.perf_counter() - started))


@functools.cache
def _matmul(tf: Any, dtype: Any, size: int) -> tuple[Any, Any]:
    a = tf.cast(tf.random.stateless_normal((size, size), (1, 2)), dtype)
    # TensorFlow computes all elements, although only one is read.
    product = tf.function(lambda a, b: tf.matmul(a, b)[0, 0])
    product(a, a).numpy()
    return a, product


@click.command()
@click.option("--image-size", default=512, show_default=True, help="Side of the images, pixels.")
@click.option("--batch-size", default=2, show_default=True, help="Images per step.")
@click.option("--precision", default="float32", show_default=True, help="float32, mixed_bfloat16.")
@click.option("--repeats", default=5, show_default=True, help="Measurements of each.")
@click.option("--num-layers", default=8, show_default=True, help="Levels of FlexUNet.")
@click.option("--ways", default=",".join(WAYS), show_default=True, help="Ways to measure.")
@click.option(
    "--layers/--no-layers", default=True, show_default=True, help="Measure each layer alone."
)
@click.option("--keep-memory", is_flag=True, help="Measure ours with --keep-memory.")
@click.option(
    "--xla", default="off", show_default=True, help="Measure ours with --xla: auto, on, off."
)
@click.option("--matmul-size", default=MATMUL_SIZE, show_default=True, help="Side of the matrices.")
@click.option("--method", hidden=True, help="Set for the processes that this command starts.")
def main(
    image_size: int, batch_size: int, precision: str, repeats: int, num_layers: int, ways: str,
    layers: bool, keep_memory: bool, xla: Any, matmul_size: int, method: str | None,
) -> None:  # fmt: skip
    """Measure the training step of the INbreast network of the reference implementation."""
    if method is not None:
        config = TrainConfig(global_batch_size=batch_size, keep_memory=keep_memory, xla=xla)
        network = Network(image_size, precision, num_layers, config, matmul_size=matmul_size)
        print(json.dumps(network.work(method, repeats)))
        return
    if precision == "mixed_bfloat16" and resolve_precision("auto") != precision:
        print("mixed_bfloat16: this machine does not support it; nothing measured")
        return
    names = [*ways.split(","), *(["layers"] if layers else [])]
    measured = {name: _in_own_process(name) for name in names}
    rates = {name: statistics.median(measured[name]["images_per_s"]) for name in ways.split(",")}
    ours = rates.pop("ours", None)
    over = {name: ours / rate for name, rate in rates.items()} if ours else {}
    result = {
        "machine": describe_machine(),
        "image_size": image_size,
        "batch_size": batch_size,
        "precision": precision,
        "keep_memory": keep_memory,
        "xla": xla,
        "ours_over": over,
        **measured,
    }
    variant = ("-keep-memory" if keep_memory else "") + (f"-xla-{xla}" if xla != "off" else "")
    write_result(f"step-{image_size}-{precision}{variant}", result)
    for name in ways.split(","):
        each = measured[name]
        print(
            f"{name}: step {shown(each['step_s'])} s, {shown(each['images_per_s'])} images/s\n"
            f"  {shown(each['share_of_matmul_rate'])} of {shown(each['matmul_gflop_per_s'], 0)} "
            f"GFLOP/s; peak memory {each['peak_rss_mb']:.0f} MB\n"
            f"  user {shown(each['user_s'])} s, system {shown(each['system_s'])} s\n"
            f"  {shown(each['page_faults'], 0)} page faults"
        )
    for name, ratio in over.items():
        print(f"images/s, ours over {name}: {ratio:.2f}")
    if layers:
        total = measured["layers"]["sum_of_best_s"]
        print(f"layers alone: {total:.2f} s, {measured['layers']['share_of_matmul_rate']:.2f}")
        for name in ways.split(","):
            shares = [total / step_s for step_s in measured[name]["step_s"]]
            print(f"  share of the step, {name}: {shown(shares)}")


def _in_own_process(method: str) -> dict[str, Any]:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, *sys.argv, "--method", method]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    print(f"{method}: measured", file=sys.stderr)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


class Network:
    """The INbreast network of the reference implementation, and a batch for it."""

    def __init__(
        self,
        image_size: int,
        precision: str,
        num_layers: int,
        config: TrainConfig,
        *,
        matmul_size: int = MATMUL_SIZE,
        num_matmuls: int = 1,
    ) -> None:
        self.config = config
        self.matmul_size, self.num_matmuls = matmul_size, num_matmuls
        self.image_size, self.batch_size = image_size, config.global_batch_size
        self.precision, self.num_layers = precision, num_layers

    def work(self, method: str, repeats: int) -> dict[str, Any]:
        """Measures `method` in this process and returns the result."""
        if method in ("reference", "pinned"):
            self.precision = "float32"
        threads = {"naive": (0, 0), "reference": (1, 0), "pinned": (1, 1)}
        if method in threads:
            self.tf = self.plain_tensorflow(*threads[method])
        else:
            self.configure()
        self.dtype = self.compute_dtype()
        works: dict[str, Callable[[int], dict[str, Any]]] = {
            "ours": self.ours, "naive": self.naive, "reference": self.reference,
            "pinned": self.reference, "layers": self.layers,
        }  # fmt: skip
        return works[method](repeats)

    def plain_tensorflow(self, intra_op: int, inter_op: int) -> Any:
        """Returns TensorFlow with only the thread counts set; 0: TensorFlow's default."""
        import tensorflow as tf

        tf.config.threading.set_intra_op_parallelism_threads(intra_op)
        tf.config.threading.set_inter_op_parallelism_threads(inter_op)
        return tf

    def configure(self) -> None:
        """Configures TensorFlow like `train`."""
        from job.distributed.runtime import import_tensorflow
        from job.distributed.strategy import configure

        self.tf = import_tensorflow()
        self.strategy = configure(self.config)

    def model(self) -> Any:
        """Returns the model with logits as output."""
        from job.models.registry import build_model

        size = self.image_size
        return build_model(
            ModelConfig(num_layers=self.num_layers), image_shape=(size, size, 3), num_classes=2,
            precision=self.precision,
        )  # fmt: skip

    def keras_model(self) -> Any:
        """Returns the model in plain Keras: Keras' dropout, probabilities as output."""
        import keras

        from job.models.dropout import SampleDropout

        def cloned(layer: Any) -> Any:
            if isinstance(layer, SampleDropout):
                return keras.layers.Dropout(layer.rate, dtype=layer.dtype_policy)
            return type(layer).from_config(layer.get_config())

        model = keras.models.clone_model(self.model(), clone_function=cloned)
        probabilities = keras.layers.Softmax(dtype="float32")(model.output)
        return keras.Model(model.input, probabilities)

    def flops(self, model: Any) -> int:
        """Returns the FLOPs of a step."""
        return 3 * convolution_flops(model) * self.batch_size

    def compute_dtype(self) -> Any:
        """Returns the dtype of the model's convolutions."""
        import keras

        return self.tf.as_dtype(keras.DTypePolicy(self.precision).compute_dtype)

    def matmul_flops_per_s(self) -> float:
        """Returns the machine's rate of multiplication in this network's dtype, FLOP/s."""
        return matmul_flops_per_s(self.tf, self.dtype, self.matmul_size, self.num_matmuls)

    def ours(self, repeats: int) -> dict[str, Any]:
        """Measures the step of this package."""
        model, run = self.our_step()
        clock = StepClock(self, model)
        for count in range(1 + repeats):
            clock.begin()
            run(count)
            clock.end()
        return clock.result() | {
            "parameters": model.count_params(),
            "forward_gflop_per_image": convolution_flops(model) / 1e9,
        }

    def our_step(self) -> tuple[Any, Callable[[int], float]]:
        """Returns the model, and the step of this package: step number -> loss."""
        from job.distributed.replica_sums import Criterion
        from job.distributed.xla import uses_xla
        from job.losses import make_loss
        from job.metrics.batch import reference_metrics
        from job.optimization.loss_scale import loss_scale_for
        from job.optimization.optimizer import Adam
        from job.training.step import StepOptions, make_train_step

        tf = self.tf
        with self.strategy.scope():
            model = self.model()
            scale = loss_scale_for(self.precision)
            optimizer = Adam(OptimizerConfig(), model.trainable_variables, scale)
        loss = make_loss("categorical_crossentropy", num_classes=2)
        metrics = reference_metrics(["dice_coef_multiclass"])
        step = make_train_step(
            self.strategy,
            model,
            optimizer,
            Criterion(loss, metrics),
            StepOptions(uses_xla=uses_xla(self.config, ProcessGroup(self.strategy))),
        )
        shape = (self.batch_size, self.image_size, self.image_size)
        batch = {
            "image": tf.zeros((*shape, 3), tf.uint8),
            "mask": tf.zeros(shape, tf.uint8),
            "weight": tf.ones(self.batch_size),
            "key": tf.range(self.batch_size, dtype=tf.int64),
        }
        rate = tf.constant(LEARNING_RATE, tf.float64)
        return model, lambda count: step(batch, tf.constant(count, tf.int64), rate)["loss"][0]

    def naive(self, repeats: int) -> dict[str, Any]:
        """Measures a training loop as in TensorFlow's tutorials, on all cores."""
        import keras

        tf = self.tf
        model = self.keras_model()
        optimizer = keras.optimizers.Adam(LEARNING_RATE, clipvalue=0.4)
        loss = keras.losses.CategoricalCrossentropy()

        @tf.function
        def step(images: Any, labels: Any) -> Any:
            with tf.GradientTape() as tape:
                value = loss(labels, model(images, training=True))
            gradients = tape.gradient(value, model.trainable_variables)
            optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
            return value

        images, labels = self.images()
        clock = StepClock(self, model)
        for _ in range(1 + repeats):
            clock.begin()
            float(step(images, labels))
            clock.end()
        return clock.result()

    def reference(self, repeats: int) -> dict[str, Any]:
        """Measures Keras' `fit`."""
        import keras

        model = self.keras_model()
        model.compile(
            keras.optimizers.Adam(LEARNING_RATE, clipvalue=0.4), "categorical_crossentropy"
        )
        clock = StepClock(self, model)

        class Timer(keras.callbacks.Callback):
            def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
                clock.begin()

            def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
                clock.end()

        data = self.tf.data.Dataset.from_tensors(self.images()).repeat(1 + repeats)
        model.fit(data, callbacks=[Timer()], verbose=0)
        return clock.result()

    def images(self) -> tuple[Any, Any]:
        """Returns images and one-hot labels, float32."""
        shape = (self.batch_size, self.image_size, self.image_size)
        labels = self.tf.one_hot(self.tf.zeros(shape, self.tf.int32), 2)
        return self.tf.zeros((*shape, 3)), labels

    def layers(self, repeats: int) -> dict[str, Any]:
        """Measures every layer alone: forward, and backward if it needs a gradient."""
        import keras

        model = self.model()
        times = {
            layer.name: self.layer_times(layer, is_first=index <= 2)
            for index, layer in enumerate(model.layers)
            if not isinstance(layer, keras.layers.InputLayer)
        }
        total = sum(min(values) for values in times.values())
        rate = max(self.matmul_flops_per_s() for _ in range(repeats))
        return {
            "best_s": {name: min(values) for name, values in times.items()},
            "sum_of_best_s": total,
            "share_of_matmul_rate": self.flops(model) / total / rate,
        }

    def layer_times(self, layer: Any, *, is_first: bool) -> list[float]:
        """Returns the seconds of `layer` forward and backward, `LAYER_REPEATS` times.

        Args:
            is_first: no layer before it is trained, so its input needs no gradient.
        """
        from job.models.dropout import dropout

        tf = self.tf
        given = layer.input if isinstance(layer.input, list) else [layer.input]
        inputs = [self.noise(each) for each in given]
        backward = self.noise(layer.output)
        keys = tf.range(self.batch_size, dtype=tf.int64)

        @tf.function
        def run(inputs: list[Any], backward: Any) -> list[Any]:
            with dropout([layer], keys, self.config.random_streams), tf.GradientTape() as tape:
                tape.watch(inputs)
                # A layer with one input takes a tensor, not a list.
                output = layer(inputs if len(inputs) > 1 else inputs[0], training=True)
            sources = [weight.value for weight in layer.trainable_weights]
            sources += [] if is_first else inputs
            found = tape.gradient(output, sources, output_gradients=backward) if sources else []
            return [output, *found]

        times = []
        for _ in range(1 + LAYER_REPEATS):
            started = time.perf_counter()
            run(inputs, backward)[-1].numpy()
            times.append(time.perf_counter() - started)
        return times[1:]

    def noise(self, like: Any) -> Any:
        """Returns random values with the shape and dtype of a Keras tensor, for this batch."""
        values = self.tf.random.stateless_normal((self.batch_size, *like.shape[1:]), (3, 4))
        return self.tf.cast(values, like.dtype)


class StepClock:
    """Times steps, and a multiplication of matrices after each."""

    def __init__(self, network: Network, model: Any) -> None:
        self._network, self._flops = network, network.flops(model)
        self._rows: list[dict[str, float]] = []

    def begin(self) -> None:
        """Starts the clock at the beginning of a step."""
        self._started = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)

    def end(self) -> None:
        """Stops the clock at the end of a step, whose results must have been computed."""
        started, before = self._started
        step_s, now = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF)
        rate = self._network.matmul_flops_per_s()
        self._rows.append(
            {
                "step_s": step_s,
                "images_per_s": self._network.batch_size / step_s,
                "user_s": now.ru_utime - before.ru_utime,
                "system_s": now.ru_stime - before.ru_stime,
                "page_faults": now.ru_minflt - before.ru_minflt,
                "matmul_gflop_per_s": rate / 1e9,
                "share_of_matmul_rate": self._flops / step_s / rate,
            }
        )

    def result(self) -> dict[str, Any]:
        """Returns the columns of all steps except the first, which compiles."""
        peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        first, *rows = self._rows
        return {name: [row[name] for row in rows] for name in first} | {
            "first_step_s": first["step_s"],
            "peak_rss_mb": peak_kib * 1024 / 1e6,
        }


if __name__ == "__main__":
    main()
