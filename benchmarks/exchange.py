"""Compares workers that exchange gradients with workers that do not, one core each.

    python benchmarks/exchange.py [--image-size 256] [--batch-size 2] [--num-workers 2]
    python benchmarks/exchange.py --table

All processes run three kinds of step in turns: without exchange ("silent"), with all-reduce, and
with the planned exchange. The ratio of a turn is the images/s of all workers divided by their sum
without exchange; the prediction of the plan's cost model is printed too. Bytes are those of the
plan, and those that the loopback device counted. With more workers than cores, only the bytes are
meaningful, and steps without exchange are not measured.

`--table` trains nothing: it prints the predictions of the cost model for more workers.
"""

import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from machine import describe_machine, write_result

from job.config import ModelConfig, OptimizerConfig, TrainConfig
from job.distributed.process_group import ProcessGroup
from job.distributed.rendezvous import ProcessSpec

WAYS = ("silent", "all_reduce", "planned")
TABLE_WORKERS = (2, 4, 8, 16, 32, 64)
TABLE_GBIT_PER_S = (1.0, 10.0)


@click.command()
@click.option("--image-size", default=256, show_default=True, help="Side of the images, pixels.")
@click.option("--batch-size", default=2, show_default=True, help="Images per worker and step.")
@click.option("--precision", default="float32", show_default=True, help="float32, mixed_bfloat16.")
@click.option("--repeats", default=5, show_default=True, help="Turns, after one warm-up turn.")
@click.option("--num-layers", default=8, show_default=True, help="Levels of FlexUNet.")
@click.option("--num-workers", default=2, show_default=True, help="Processes.")
@click.option("--table", is_flag=True, help="Only print the table of the cost model.")
@click.option("--gflops", default=60.0, show_default=True, help="GFLOP/s of a worker, for --table.")
@click.option("--rank", type=int, hidden=True, help="Set for the workers, started by this command.")
@click.option("--addresses", default="", hidden=True, help="Set for the workers too.")
def main(
    image_size: int, batch_size: int, precision: str, repeats: int, num_layers: int,
    num_workers: int, table: bool, gflops: float, rank: int | None, addresses: str,
) -> None:  # fmt: skip
    """Measure the share of the workers' speed that is left when they exchange gradients."""
    network = {
        "image_size": image_size, "batch_size": batch_size, "precision": precision,
        "num_layers": num_layers,
    }  # fmt: skip
    if table:
        write_and_print_table(network, gflops)
        return
    if rank is not None:
        print(json.dumps(work(network, repeats, ProcessSpec(rank, tuple(addresses.split(","))))))
        return
    measured = run_workers(num_workers)
    first = measured[0]
    reported_by_plan = (
        *("plan_bytes", "all_reduce_bytes", "flops_per_byte"),
        *("step_flops", "extra_flops_share"),
    )
    result = {"machine": describe_machine(), **network, "num_workers": num_workers} | {
        "step_s": [each["step_s"] for each in measured],
        "first_step_s": first["first_step_s"],
        "share_of_silent": shares([each["step_s"] for each in measured]),
        "loopback_bytes_per_worker": {
            method: statistics.median(counts) / num_workers
            for method, counts in first["loopback_bytes"].items()
        },
        **{key: first[key] for key in reported_by_plan},
    }
    result["predicted_share"] = predicted(result)
    counted = result["loopback_bytes_per_worker"]
    result["sent_over_all_reduce"] = counted["planned"] / counted["all_reduce"]
    name = f"exchange-{image_size}-{precision}"
    write_result(name if num_workers == 2 else f"{name}-{num_workers}-workers", result)
    for method, values in result["share_of_silent"].items():
        print(f"{method}: {statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})")
    for method, times in first["step_s"].items():
        print(f"{method}: {statistics.median(times):.2f} s ({min(times):.2f}-{max(times):.2f})")
    print({key: result[key] for key in ("loopback_bytes_per_worker", *reported_by_plan)})
    print(f"sent, planned over all-reduce: {result['sent_over_all_reduce']:.4f}")
    for method, share in result["predicted_share"].items():
        print(f"{method}: the cost model predicts {share:.2f}")


def run_workers(num_workers: int) -> list[dict[str, Any]]:
    """Starts this command once per worker and returns their measurements."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    addresses = ",".join(free_addresses(num_workers))
    workers = [
        subprocess.Popen(
            [sys.executable, *sys.argv, "--addresses", addresses, "--rank", str(rank)],
            env=environment, stdout=subprocess.PIPE, text=True,
        )
        for rank in range(num_workers)
    ]  # fmt: skip
    outputs = [worker.communicate()[0] for worker in workers]
    if any(worker.returncode for worker in workers):
        raise SystemExit("a worker failed")
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def free_addresses(count: int) -> list[str]:
    """Returns `count` free addresses of this machine."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [f"127.0.0.1:{each.getsockname()[1]}" for each in sockets]


def shares(step_s: list[dict[str, list[float]]]) -> dict[str, list[float]]:
    """Returns the images/s of all workers over their sum without exchange, per kind and turn."""
    if "silent" not in step_s[0]:
        return {}
    silent = [sum(1 / time_s for time_s in turn) for turn in _turns(step_s, "silent")]
    return {
        method: [
            len(step_s) / max(turn) / rate
            for turn, rate in zip(_turns(step_s, method), silent, strict=True)
        ]
        for method in WAYS[1:]
    }


def predicted(result: dict[str, Any]) -> dict[str, float]:
    """Returns the share of the workers' speed that the plan's cost model predicts.

    Counts in FLOPs: those of a step, those that gathering adds, and the probe's FLOPs per byte.
    This assumes that the network is slower than the probe by the same factor as the step is slower
    than its multiplication.
    """
    step_flops = result["step_flops"]
    per_byte = result["flops_per_byte"]
    sent = result["plan_bytes"] * per_byte / step_flops
    return {
        "all_reduce": 1 / (1 + result["all_reduce_bytes"] * per_byte / step_flops),
        "planned": 1 / (1 + sent + result["extra_flops_share"]),
    }


def step_flops(model: Any, batch_size: int) -> int:
    """Returns the FLOPs of a worker's step without any exchange."""
    from step import convolution_flops

    return 3 * convolution_flops(model) * batch_size


def _turns(step_s: list[dict[str, list[float]]], method: str) -> Iterator[tuple[float, ...]]:
    return zip(*(each[method] for each in step_s), strict=True)


def work(network: dict[str, Any], repeats: int, spec: ProcessSpec) -> dict[str, Any]:
    """Returns what the worker at `spec` measured."""
    rank, num_workers = spec.rank, spec.size
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    ways = WAYS if num_workers <= len(cores) else WAYS[1:]
    from job.distributed.runtime import import_tensorflow
    from job.distributed.strategy import configure

    tf = import_tensorflow()
    batch_size: int = network["batch_size"]
    config = TrainConfig(global_batch_size=num_workers * batch_size, threads=1)
    strategy = configure(config, spec)
    from job.distributed.exchange_plan import make_plan, measured_rates
    from job.distributed.replica_sums import Criterion
    from job.losses import make_loss
    from job.optimization.optimizer import Adam
    from job.training.step import StepOptions, make_train_step

    reported: dict[str, Any] = {}
    shape = (network["image_size"], network["image_size"])
    batch = {
        "image": tf.zeros((batch_size, *shape, 3), tf.uint8),
        "mask": tf.zeros((batch_size, *shape), tf.uint8),
        "weight": tf.ones(batch_size),
        "key": tf.range(batch_size, dtype=tf.int64),
    }
    runs: dict[str, tuple[Any, Any]] = {}
    alone = tf.distribute.get_strategy()
    for used, its_ways in ((alone, ways[:-2]), (strategy, ways[-2:])):
        if not its_ways:
            continue
        with used.scope():
            model = make_network(network)
            optimizer = Adam(OptimizerConfig(), model.trainable_variables)
        loss = make_loss("categorical_crossentropy", num_classes=2)
        plan = None
        if used is strategy:
            ratio = measured_rates(strategy, model.compute_dtype).flops_per_byte
            reported["flops_per_byte"] = ProcessGroup(strategy, spec).run_on_primary(
                lambda ratio=ratio: ratio
            )
            plan = make_plan(
                model, batch_size=batch_size, num_replicas=num_workers,
                flops_per_byte=reported["flops_per_byte"],
            )  # fmt: skip
            reported.update(plan_bytes=plan.sent_bytes(), all_reduce_bytes=plan.all_reduce_bytes())
            reported["extra_flops_share"] = plan.extra_flops() / step_flops(model, batch_size)
            reported["step_flops"] = step_flops(model, batch_size)
        values = used.experimental_distribute_values_from_function(lambda context: batch)
        for method in its_ways:
            used_plan = plan if method == "planned" else None
            step = make_train_step(
                used, model, optimizer, Criterion(loss, {}), StepOptions(used_plan)
            )
            runs[method] = (step, values)
    seconds: dict[str, list[float]] = {method: [] for method in ways}
    counted: dict[str, list[int]] = {method: [] for method in ways}
    process_group = ProcessGroup(strategy, spec)
    for count in range(1 + repeats):
        for method, (step, values) in runs.items():
            process_group.any(False)
            started, sent = time.perf_counter(), loopback_bytes()
            sums = step(values, tf.constant(count, tf.int64), tf.constant(1e-4, tf.float64))
            float(sums["loss"][0])
            seconds[method].append(time.perf_counter() - started)
            counted[method].append(loopback_bytes() - sent)
            if rank == 0:
                # Shows progress: a turn of the large network takes a minute on a busy machine.
                print(f"turn {count}, {method}: {seconds[method][-1]:.1f} s", file=sys.stderr)
    # The first turn compiles.
    return reported | {
        "first_step_s": {method: values[0] for method, values in seconds.items()},
        "step_s": {method: values[1:] for method, values in seconds.items()},
        "loopback_bytes": {method: values[1:] for method, values in counted.items()},
    }


def make_network(network: dict[str, Any]) -> Any:
    """Returns the INbreast network, possibly with fewer levels."""
    from job.models.registry import build_model

    size = network["image_size"]
    return build_model(
        ModelConfig(num_layers=network["num_layers"]), image_shape=(size, size, 3), num_classes=2,
        precision=network["precision"],
    )  # fmt: skip


def loopback_bytes() -> int:
    """Returns the bytes that the loopback device has sent."""
    for line in Path("/proc/net/dev").read_text(encoding="utf-8").splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == "lo":
            return int(numbers.split()[8])
    raise RuntimeError("/proc/net/dev has no lo")


def write_and_print_table(network: dict[str, Any], gflops: float) -> None:
    """Writes and prints the cost model's predictions for `TABLE_WORKERS` at `TABLE_GBIT_PER_S`.

    Nothing overlaps in this model: `kept` is the step without exchange over the step with it.
    """
    from job.distributed.runtime import import_tensorflow

    import_tensorflow()
    from job.distributed.exchange_plan import make_plan

    model = make_network(network)
    flops_per_s = gflops * 1e9
    silent_s = step_flops(model, network["batch_size"]) / flops_per_s
    rows = []
    for gbit_per_s in TABLE_GBIT_PER_S:
        bytes_per_s = gbit_per_s * 1e9 / 8
        for num_workers in TABLE_WORKERS:
            planned, reduced = (
                make_plan(
                    model, batch_size=network["batch_size"], num_replicas=num_workers,
                    flops_per_byte=ratio,
                )
                for ratio in (flops_per_s / bytes_per_s, 0.0)
            )  # fmt: skip
            rows.append(
                {
                    "gbit_per_s": gbit_per_s,
                    "num_workers": num_workers,
                    "gathered_layers": len(planned.gathered),
                    "plan_mb": planned.sent_bytes() / 1e6,
                    "all_reduce_mb": reduced.sent_bytes() / 1e6,
                    "extra_flops_share": planned.extra_flops() / flops_per_s / silent_s,
                    "plan_kept": silent_s / (silent_s + planned.seconds(flops_per_s, bytes_per_s)),
                    "all_reduce_kept": silent_s
                    / (silent_s + reduced.seconds(flops_per_s, bytes_per_s)),
                }
            )
    size, precision = network["image_size"], network["precision"]
    write_result(
        f"exchange-table-{size}-{precision}",
        {**network, "worker_gflop_per_s": gflops, "silent_step_s": silent_s, "rows": rows},
    )
    print(f"{size}x{size}, {precision}, {gflops:.0f} GFLOP/s per worker, {silent_s:.2f} s per step")
    print("Gbit/s workers layers plan MB all-reduce MB ratio +FLOPs kept all-reduce kept")
    for row in rows:
        ratio = row["all_reduce_mb"] / row["plan_mb"]
        print(
            f"{row['gbit_per_s']:6.0f} {row['num_workers']:7} {row['gathered_layers']:6} "
            f"{row['plan_mb']:7.1f} {row['all_reduce_mb']:13.1f} {ratio:5.1f} "
            f"{100 * row['extra_flops_share']:5.1f}% {row['plan_kept']:4.2f} "
            f"{row['all_reduce_kept']:15.2f}"
        )


if __name__ == "__main__":
    main()
