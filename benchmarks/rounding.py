"""Compares methods to send gradients in bfloat16 with float32, for a small network.

    python benchmarks/rounding.py [--steps 500] [--replicas 4] [--seeds 0,1,2]

One process computes what the replicas would: each has one image per step. All methods start with
the same weights and see the same images.

float32         the sum of the parts
nearest         each part rounded to the nearest bfloat16, summed in bfloat16 as in a ring; this is
                `--gradient-dtype bfloat16`
stochastic      each part rounded up or down at random, so that its mean is exact; summed likewise
error feedback  each replica adds what it rounded off to its part of the next step
restarted       error feedback, but after half of the steps the replicas lose what they keep, as
                after a kill with a checkpoint of weights and moments alone

The table has the loss, the Dice of new images, and the root mean square error of the gradient
relative to the sum in float32 of the same parts.
"""

from typing import Any

import click
import numpy as np
from machine import describe_machine, shown, write_result

from data_prep.phantoms.images import make_phantom
from job.config import ModelConfig, OptimizerConfig, TrainConfig

METHODS = ("float32", "nearest", "stochastic", "error feedback", "restarted")
NETWORK = ModelConfig(num_layers=3, base_filters=6, base_kernels=(3, 3), dropout_rate=0.0)
LEARNING_RATE = 1e-3
NUM_VALIDATION = 40  # images
LAST = 50  # steps whose loss is averaged


@click.command()
@click.option("--image-size", default=48, show_default=True, help="Side of the images, pixels.")
@click.option("--steps", default=500, show_default=True, help="Steps of each method.")
@click.option("--replicas", default=4, show_default=True, help="Replicas; one image each.")
@click.option("--seeds", default="0,1,2", show_default=True, help="Of weights and images.")
@click.option("--methods", default=",".join(METHODS), show_default=True, help="Methods to compare.")
def main(image_size: int, steps: int, replicas: int, seeds: str, methods: str) -> None:
    """Compare methods to send gradients, and write `results/rounding.json`."""
    from job.distributed.runtime import import_tensorflow
    from job.distributed.strategy import configure

    import_tensorflow()
    configure(TrainConfig(global_batch_size=replicas))
    rows: dict[str, list[dict[str, Any]]] = {method: [] for method in methods.split(",")}
    final: dict[tuple[str, int], list[np.ndarray]] = {}
    for seed in map(int, seeds.split(",")):
        images, masks = phantoms(seed, image_size)
        for method in rows:
            trained = Trained(method, seed, image_size, replicas)
            trained.train(images, masks, steps)
            rows[method].append(trained.result(images, masks))
            final[method, seed] = [weight.numpy() for weight in trained.model.weights]
            print(f"seed {seed}, {method}: {rows[method][-1]}", flush=True)
    columns = ("loss", "dice", "gradient_error")
    table = {
        method: {key: [row[key] for row in found] for key in columns}
        for method, found in rows.items()
    }
    same = {
        f"seed {seed}": all(map(np.array_equal, weights, final["error feedback", seed]))
        for (method, seed), weights in final.items()
        if method == "restarted" and ("error feedback", seed) in final
    }
    write_result(
        "rounding",
        {
            "machine": describe_machine(),
            "image_size": image_size,
            "steps": steps,
            "replicas": replicas,
            "restarted_has_the_bits_of_error_feedback": same,
            "methods": table,
        },
    )
    print(f"{'':16}{'loss':>24}{'Dice':>24}{'gradient error':>24}")
    for method, found in table.items():
        cells = "".join(f"{shown(found[key], 4):>24}" for key in columns)
        print(f"{method:16}{cells}")
    print(f"restarted error feedback ends with the same bits: {same}")


def phantoms(seed: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns images (200, H, W, 1) and masks (200, H, W) uint8; the last ones are for the Dice."""
    pairs = [make_phantom(seed, index, size) for index in range(200)]
    images, masks = (np.stack(each) for each in zip(*pairs, strict=True))
    return images[..., np.newaxis], masks


class Trained:
    """A network whose gradients are summed over replicas in one of the methods."""

    def __init__(self, method: str, seed: int, image_size: int, replicas: int) -> None:
        import tensorflow as tf

        from job.losses import make_loss
        from job.models.registry import build_model
        from job.optimization.optimizer import Adam

        self.tf, self.method, self.seed, self.replicas = tf, method, seed, replicas
        shape = (image_size, image_size, 1)
        self.model = build_model(NETWORK, image_shape=shape, num_classes=2, seed=seed)
        self.optimizer = Adam(OptimizerConfig(clipvalue=None), self.model.trainable_variables)
        self.loss = make_loss("ce_dice", num_classes=2)
        weights = self.model.trainable_variables
        self.residuals = [
            [tf.Variable(tf.zeros(weight.shape)) for weight in weights] for _ in range(replicas)
        ]
        self.losses: list[float] = []
        self.errors: list[float] = []
        self.step = tf.function(self._step, autograph=False)

    def train(self, images: np.ndarray, masks: np.ndarray, steps: int) -> None:
        """Trains so many steps on random images."""
        tf, random = self.tf, np.random.default_rng(self.seed)
        for count in range(steps):
            if self.method == "restarted" and count == steps // 2:
                for residual in (each for part in self.residuals for each in part):
                    residual.assign(tf.zeros_like(residual))
            chosen = random.integers(0, len(images) - NUM_VALIDATION, self.replicas)
            loss, error = self.step(
                tf.constant(images[chosen]),
                tf.constant(masks[chosen]),
                tf.constant(count, tf.int64),
            )
            self.losses.append(float(loss))
            self.errors.append(float(error))

    def result(self, images: np.ndarray, masks: np.ndarray) -> dict[str, Any]:
        """Returns the loss of the last steps, the Dice, and the error of the gradient."""
        logits = self.model(images[-NUM_VALIDATION:]).numpy()
        found, truth = logits.argmax(-1) == 1, masks[-NUM_VALIDATION:] == 1
        dice = 2 * np.sum(found & truth) / max(np.sum(found) + np.sum(truth), 1)
        return {
            "loss": float(np.mean(self.losses[-LAST:])),
            "dice": float(dice),
            "gradient_error": float(np.mean(self.errors[-LAST:])),
        }

    def _step(self, images: Any, masks: Any, count: Any) -> tuple[Any, Any]:
        tf = self.tf
        weights = [weight.value for weight in self.model.trainable_variables]
        parts, losses = [], []
        for at in range(self.replicas):
            one = slice(at, at + 1)
            with tf.GradientTape() as tape:
                logits = self.model(images[one], training=True)
                labels = tf.cast(masks[one], tf.int32)
                loss = self.loss(labels, logits, tf.ones(1), tf.identity) / self.replicas
            losses.append(loss)
            parts.append(tape.gradient(loss, weights))
        exact = [tf.add_n(list(each)) for each in zip(*parts, strict=True)]
        total = exact if self.method == "float32" else self._sent(parts, count)
        self.optimizer.apply(
            total, step=count, learning_rate=tf.constant(LEARNING_RATE, tf.float64)
        )
        wrong = tf.linalg.global_norm([a - b for a, b in zip(total, exact, strict=True)])
        return tf.add_n(losses), wrong / tf.linalg.global_norm(exact)

    def _sent(self, parts: list[list[Any]], count: Any) -> list[Any]:
        """Returns the sums of parts that were rounded to bfloat16, in the order of a ring."""
        tf = self.tf
        totals = []
        for index, tensors in enumerate(zip(*parts, strict=True)):
            rounded = [
                self._rounded(tensor, replica, index, count)
                for replica, tensor in enumerate(tensors)
            ]
            total = rounded[0]
            for each in rounded[1:]:
                total += each
            totals.append(tf.cast(total, tf.float32))
        return totals

    def _rounded(self, part: Any, replica: int, index: int, count: Any) -> Any:
        tf = self.tf
        if self.method == "nearest":
            return tf.cast(part, tf.bfloat16)
        if self.method == "stochastic":
            # The upper half of the bits, after a random number is added to the lower half.
            seed = tf.stack([tf.cast(count, tf.int32), replica * 1000 + index])
            noise = tf.random.stateless_uniform(part.shape, seed, 0, 2**16, tf.int32)
            bits = tf.bitwise.bitwise_and(tf.bitcast(part, tf.int32) + noise, -(2**16))
            return tf.cast(tf.bitcast(bits, tf.float32), tf.bfloat16)
        residual = self.residuals[replica][index]
        whole = part + residual
        rounded = tf.cast(whole, tf.bfloat16)
        residual.assign(whole - tf.cast(rounded, tf.float32))
        return rounded


if __name__ == "__main__":
    main()
