"""Measures two workers that train together against two that do not talk, one core each.

    python benchmarks/exchange.py [--image-size 256] [--batch-size 2] [--precision float32]

Both processes take the three steps in turns: without talking, with all-reduce, with the planned
exchange. The ratio of a turn is the images/s of both together over the sum of what they reach
without talking. Bytes are those of the plan and those that the loopback device counted.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
from machine import describe_machine, write_result

from job.config import ModelConfig, OptimizerConfig, TrainConfig
from job.team import Place, Team

WAYS = ("silent", "all_reduce", "planned")


@click.command()
@click.option("--image-size", default=256, show_default=True, help="Side of the images, pixels.")
@click.option("--batch-size", default=2, show_default=True, help="Images per worker and step.")
@click.option("--precision", default="float32", show_default=True, help="float32, mixed_bfloat16.")
@click.option("--repeats", default=5, show_default=True, help="Turns.")
@click.option("--num-layers", default=8, show_default=True, help="Levels of FlexUNet.")
@click.option("--port", default=41873, show_default=True, help="First of two free ports.")
@click.option("--rank", type=int, help="Set for the workers, which this command starts.")
def main(
    image_size: int, batch_size: int, precision: str, repeats: int, num_layers: int, port: int,
    rank: int | None,
) -> None:  # fmt: skip
    """Measures how much of two workers' speed is left when they exchange gradients."""
    if rank is not None:
        measured = work(image_size, batch_size, precision, repeats, num_layers, port, rank)
        print(json.dumps(measured))
        return
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    workers = [
        subprocess.Popen(
            [sys.executable, *sys.argv, "--rank", str(rank)],
            env=environment, stdout=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [worker.communicate()[0] for worker in workers]
    if any(worker.returncode for worker in workers):
        raise SystemExit("a worker failed")
    first, second = (json.loads(output.splitlines()[-1]) for output in outputs)
    result = {
        "machine": describe_machine(),
        "image_size": image_size,
        "batch_size": batch_size,
        "precision": precision,
        "step_s": [first["step_s"], second["step_s"]],
        "share_of_silent": shares(first["step_s"], second["step_s"]),
        "loopback_bytes_per_worker": {
            way: statistics.median(first["loopback_bytes"][way]) / 2 for way in WAYS
        },
        **{key: first[key] for key in ("plan_bytes", "all_reduce_bytes", "flops_per_byte")},
    }
    write_result(f"exchange-{image_size}-{precision}", result)
    for way, values in result["share_of_silent"].items():
        print(f"{way}: {statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})")
    print({key: result[key] for key in list(result)[-4:]})


def shares(first: dict[str, list[float]], second: dict[str, list[float]]) -> dict[str, Any]:
    """Returns for both ways of talking the images/s of both over the silent sum, per turn."""
    silent = [1 / a + 1 / b for a, b in zip(first["silent"], second["silent"], strict=True)]
    return {
        way: [
            2 / max(a, b) / rate for a, b, rate in zip(first[way], second[way], silent, strict=True)
        ]
        for way in WAYS[1:]
    }


def work(
    image_size: int, batch_size: int, precision: str, repeats: int, num_layers: int, port: int,
    rank: int,
) -> dict[str, Any]:  # fmt: skip
    """Returns what the worker `rank` measured."""
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank]})
    from job import runtime

    tf = runtime.import_tensorflow()
    place = Place(rank, (f"127.0.0.1:{port}", f"127.0.0.1:{port + 1}"))
    config = TrainConfig(global_batch_size=2 * batch_size, threads=1)
    strategy = runtime.configure(config, place)
    from job.exchange import make_plan, measured_flops_per_byte
    from job.losses import make_loss
    from job.model import build_model
    from job.optimizer import Adam
    from job.step import make_train_step

    shape = (image_size, image_size)

    def make_step(strategy: Any, ways: tuple[str, ...]) -> tuple[Any, dict[str, Any]]:
        with strategy.scope():
            model = build_model(
                ModelConfig(num_layers=num_layers), image_shape=(*shape, 3), num_classes=2,
                precision=precision,
            )  # fmt: skip
            optimizer = Adam(OptimizerConfig(), model.trainable_variables)
        loss = make_loss("categorical_crossentropy", num_classes=2)
        plan = None
        if "planned" in ways:
            ratio = measured_flops_per_byte(strategy, model.compute_dtype)
            ratio = Team(strategy, place).on_first(lambda: ratio)
            told["flops_per_byte"] = ratio
            plan = make_plan(model, batch_size=batch_size, num_replicas=2, flops_per_byte=ratio)
            told.update(plan_bytes=plan.sent_bytes(), all_reduce_bytes=plan.all_reduce_bytes())
        plans = {"planned": plan}
        return strategy, {
            way: make_train_step(strategy, model, optimizer, loss, {}, plans.get(way))
            for way in ways
        }

    told: dict[str, Any] = {}
    steps = [make_step(tf.distribute.get_strategy(), WAYS[:1]), make_step(strategy, WAYS[1:])]

    def batch_for(strategy: Any) -> Any:
        batch = {
            "image": tf.zeros((batch_size, *shape, 3), tf.uint8),
            "mask": tf.zeros((batch_size, *shape), tf.uint8),
            "weight": tf.ones(batch_size),
            "key": tf.range(batch_size, dtype=tf.int64),
        }
        return strategy.experimental_distribute_values_from_function(lambda context: batch)

    runs = {
        way: (step, batch_for(strategy)) for strategy, made in steps for way, step in made.items()
    }
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    counted: dict[str, list[int]] = {way: [] for way in WAYS}
    meeting = Team(strategy, place)
    for count in range(1 + repeats):
        for way in WAYS:
            step, batch = runs[way]
            meeting.any(False)
            started, sent = time.perf_counter(), loopback_bytes()
            sums = step(batch, tf.constant(count, tf.int64), tf.constant(1e-4, tf.float64))
            float(sums["loss"][0])
            seconds[way].append(time.perf_counter() - started)
            counted[way].append(loopback_bytes() - sent)
    # The first turn compiles.
    return told | {
        "step_s": {way: values[1:] for way, values in seconds.items()},
        "loopback_bytes": {way: values[1:] for way, values in counted.items()},
    }


def loopback_bytes() -> int:
    """Returns the bytes that the loopback device has sent."""
    for line in Path("/proc/net/dev").read_text(encoding="utf-8").splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == "lo":
            return int(numbers.split()[8])
    raise RuntimeError("/proc/net/dev has no lo")


if __name__ == "__main__":
    main()
