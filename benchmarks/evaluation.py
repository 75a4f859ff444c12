"""Compares the whole evaluation of a run, and `infer` of one image, with another version.

    python benchmarks/evaluation.py [--base FOLDER] [--images 233]

The images are like street scenes at 128x192 (11 classes in soft regions), and like lesions at
512x512 (one class). The network is tiny, so measuring takes most of the time. evaluate: a new
process runs the real command. one, two: one or two processes evaluate as at the end of training;
the time starts when the network is ready. infer: a new process runs the real command on one image;
core: a new process imports TensorFlow, builds the same network and predicts one image. They run in
turns, of the checkout in --base as well. Without it, only this version runs.
"""

import contextlib
import csv
import json
import math
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import cv2
import numpy as np
from machine import FLEXUNET, describe_machine, shown, write_result

HERE = Path(__file__).parents[1]

Times = dict[str, float]  # "wall" and "cpu", seconds

COLORS = [
    *((128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (60, 40, 222), (128, 128, 0)),
    *((192, 128, 128), (64, 64, 128), (64, 0, 128), (64, 64, 0), (0, 128, 192)),
]

# Evaluates as training does at its end; prints the seconds and the images that passed the network.
AT_THE_END = """
import inspect, json, sys, time
from job.distributed.runtime import import_tensorflow
tf = import_tensorflow()
from flexunet.storage import open_store
from job.data.folds import open_folded
from job.data.shard_cache import open_reader
from job.distributed.process_group import ProcessGroup
from job.distributed.rendezvous import process_spec_from_environment, rendezvous
from job.distributed.strategy import configure
from job.evaluation.artifacts import draw_examples, write_evaluation
from job.evaluation.evaluator import make_evaluator
from job.models.ensemble import network_of
from job.runs.loading import load_model, open_run

run, output, is_counted, batch = sys.argv[1], sys.argv[2], sys.argv[3] == "count", int(sys.argv[4])
trained = open_run(run)
config = trained.config.model_copy(update={"threads": 1, "global_batch_size": batch})
spec = process_spec_from_environment()
if spec is not None:
    rendezvous(spec, 600)
strategy = configure(config, spec)
group = ProcessGroup(strategy, spec)
dataset = open_folded(config)
with strategy.scope():
    model = load_model(trained, which="best")[0]
network, num_images = network_of([model]), [0]

def counted(images):
    def add(values):
        num_images[0] += int(values.shape[0])
    tf.py_function(add, [images], [])
    return network(images)

network_to_use = counted if is_counted else network
options = {"process_group": group}
if "process_group" not in inspect.signature(make_evaluator).parameters:
    options = {"first_replica": group.first_replica}
evaluator = make_evaluator(config, strategy, dataset, network_to_use, **options)
reader = open_reader(dataset, dataset.split("test"), cache="full", cache_dir=None)
group.any(False)
started, started_cpu = time.perf_counter(), time.process_time()
evaluation = evaluator.evaluate("test", reader, measured=True)
times = {"wall": time.perf_counter() - started, "cpu": time.process_time() - started_cpu}
if group.is_primary:
    import dataclasses
    examples = draw_examples(evaluator, evaluation, reader)
    evaluation = dataclasses.replace(evaluation, examples=examples)
    write_evaluation(open_store(output), evaluation, evaluator)
    found = {**times, "images": num_images[0], "cases": len(evaluation.cases)}
    print("RESULT", json.dumps(found))
group.any(False)
"""

# Imports TensorFlow, builds the network of a run and predicts one image.
CORE = """
import sys
from job.distributed.runtime import import_tensorflow
tf = import_tensorflow()
from job.models.ensemble import make_probability_step, network_of
from job.runs.loading import load_model, open_run
run = open_run(sys.argv[1])
model, _ = load_model(run, which="best")
step = make_probability_step(network_of([model]))
size = run.manifest.image_height, run.manifest.image_width, run.manifest.channels
step(tf.zeros((1, *size), tf.uint8)).numpy()
__import__("os")._exit(0)
"""


SCENES = {  # (height, width), classes with background
    "street": ((128, 192), 11),
    "lesions": ((512, 512), 2),
}


@click.command()
@click.option("--base", type=click.Path(exists=True), help="Checkout of the version to compare.")
@click.option("--images", default=233, show_default=True, help="Cases of street scenes.")
@click.option("--large-images", default=24, show_default=True, help="Cases of 512x512; 0: none.")
@click.option("--batch-size", default=4, show_default=True, help="Images of a step.")
@click.option("--repeats", default=3, show_default=True, help="Runs of each.")
@click.option("--only", type=click.Choice(["evaluate", "team", "infer"]), help="Only this part.")
@click.option("--shrink", default=1, help="Divides the sides of all images, for a test.")
def main(
    base: str | None, images: int, large_images: int, batch_size: int, repeats: int,
    only: str | None, shrink: int,
) -> None:  # fmt: skip
    """Measure evaluation of synthetic images, and `infer` of one image."""
    versions = {"head": HERE} | ({"base": Path(base).resolve()} if base else {})
    result: dict[str, Any] = {"machine": describe_machine(), "scenes": {}}
    for scene, ((height, width), classes) in SCENES.items():
        number = images if scene == "street" else large_images
        if not number:
            continue
        size = height // shrink, width // shrink
        print(f"{scene}: {number} images of {size[0]} x {size[1]} pixels, {classes} classes")
        found: dict[str, Any] = {"cases": number, "size": size, "classes": classes}
        with tempfile.TemporaryDirectory(prefix="flexunet-bench-") as name:
            folder = Path(name)
            run = make_run(folder, number, size, classes, versions.get("base", HERE))
            if only in (None, "evaluate"):
                found |= compare_commands(versions, run, folder, repeats, batch_size)
            if only in (None, "team"):
                found |= compare_teams(versions, run, folder, repeats, batch_size)
            if only in (None, "infer") and scene == "street":
                found |= compare_infer(versions, run, folder, repeats)
        result["scenes"][scene] = found
    result["machine"] = describe_machine()
    write_result("evaluation", result)


def compare_commands(
    versions: Mapping[str, Path], run: Path, folder: Path, repeats: int, batch_size: int
) -> dict[str, Any]:
    """Runs the command `evaluate` of each version in turns; compares what they write."""
    times: dict[str, list[Times]] = {name: [] for name in versions}
    for _ in range(repeats):
        for name, checkout in versions.items():
            words = ["-m", "job.evaluate", str(run), "--no-progress"]
            words += ["--batch-size", str(batch_size), "--output", str(folder / f"command-{name}")]
            times[name].append(times_of(checkout, words))
    result: dict[str, Any] = {"evaluate": times}
    for name in times:
        show_times(f"evaluate, {name}", times[name])
    if "base" in versions:
        result["evaluate_base_over_head"] = ratios_of(times["base"], times["head"])
        result["evaluate_difference"] = difference(folder / "command-base", folder / "command-head")
        show_ratios("evaluate, base over head", result["evaluate_base_over_head"])
        print(f"largest difference of the tables: {result['evaluate_difference']:g}")
    return result


def compare_teams(
    versions: Mapping[str, Path], run: Path, folder: Path, repeats: int, batch_size: int
) -> dict[str, Any]:
    """Evaluates with one and two processes of each version in turns, one thread each."""
    sizes = {"one": 1, "two": 2}
    times: dict[str, dict[str, list[Times]]] = {
        name: {size: [] for size in sizes} for name in versions
    }
    for _ in range(repeats):
        for name, checkout in versions.items():
            for words, size in sizes.items():
                output = folder / f"{words}-{name}"
                found = evaluate_at_the_end(checkout, size, run, output, batch_size)
                times[name][words].append({key: found[key] for key in ("wall", "cpu")})
    passes = {
        name: evaluate_at_the_end(checkout, 1, run, folder / "count", batch_size, "count")
        for name, checkout in versions.items()
    }
    per_case = {name: each["images"] / each["cases"] for name, each in passes.items()}
    result: dict[str, Any] = {"team": times, "passes_per_case": per_case}
    for name, of_version in times.items():
        for words in sizes:
            show_times(f"{words}, {name}", of_version[words])
        result[f"one_over_two_{name}"] = ratios_of(of_version["one"], of_version["two"])
        show_ratios(f"one process over two, {name}", result[f"one_over_two_{name}"])
        print(f"passes through the network per case, {name}: {per_case[name]:.2f}")
    differences = {"two": difference(folder / "one-head", folder / "two-head")}
    for words in sizes if "base" in versions else ():
        ratios = ratios_of(times["base"][words], times["head"][words])
        result[f"{words}_base_over_head"] = ratios
        show_ratios(f"{words}, base over head", ratios)
        other = difference(folder / f"{words}-base", folder / f"{words}-head")
        differences[f"{words} of base"] = other
    result["team_differences"] = differences
    print(f"largest differences of the tables: {differences}")
    return result


def compare_infer(
    versions: Mapping[str, Path], run: Path, folder: Path, repeats: int
) -> dict[str, Any]:
    """Predicts one image with each version in turns, and with what is necessary."""
    image = str(next((folder / "source" / "test" / "images").iterdir()))
    times: dict[str, list[Times]] = {name: [] for name in [*versions, "core"]}
    for count in range(repeats + 1):
        for name, checkout in versions.items():
            output = str(folder / f"masks-{name}-{count}")
            words = [*FLEXUNET, "infer", str(run), image, output, "--no-progress"]
            times[name].append(times_of(checkout, words))
        times["core"].append(times_of(HERE, ["-c", CORE, str(run)]))
    times = {name: values[1:] for name, values in times.items()}  # the first reads from the disk
    result: dict[str, Any] = {"infer": times}
    for name, values in times.items():
        show_times(f"infer of one image, {name}", values)
    for name in versions:
        result[f"infer_over_core_{name}"] = ratios_of(times[name], times["core"])
        show_ratios(f"infer over core, {name}", result[f"infer_over_core_{name}"])
    return result


def ratios_of(above: Sequence[Times], below: Sequence[Times]) -> dict[str, list[float]]:
    """Returns the ratios of runs next to each other, of wall and CPU time."""
    pairs = list(zip(above, below, strict=True))
    return {key: [a[key] / b[key] for a, b in pairs] for key in ("wall", "cpu")}


def show_times(title: str, times: Sequence[Times]) -> None:
    """Prints wall and CPU time."""
    wall, cpu = (shown([each[key] for each in times]) for key in ("wall", "cpu"))
    print(f"{title}: wall {wall} s, cpu {cpu} s", flush=True)


def show_ratios(title: str, ratios: Mapping[str, Sequence[float]]) -> None:
    """Prints the ratios of wall and CPU time."""
    print(f"{title}: wall {shown(ratios['wall'])}, cpu {shown(ratios['cpu'])}", flush=True)


def times_of(checkout: Path, words: Sequence[str]) -> Times:
    """Returns wall and CPU seconds of Python with these arguments, in a new process."""
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    started = time.perf_counter()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            [sys.executable, *words], env=environment, cwd=checkout, stdout=output, stderr=output
        )
        # The usage counts the child and its own children.
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        wall = time.perf_counter() - started
        if process.returncode:
            output.seek(0)
            raise SystemExit(output.read().decode())
    return {"wall": wall, "cpu": usage.ru_utime + usage.ru_stime}


def evaluate_at_the_end(
    checkout: Path, size: int, run: Path, output: Path, batch_size: int, mode: str = "time"
) -> dict[str, float]:
    """Evaluates in `size` processes; returns what the first one prints."""
    sockets = [socket.socket() for _ in range(size)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    addresses = [f"127.0.0.1:{each.getsockname()[1]}" for each in sockets]
    for each in sockets:
        each.close()
    words = [sys.executable, "-c", AT_THE_END, str(run), str(output), mode, str(batch_size)]
    processes = []
    for rank in range(size):
        task = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": rank}}
        environment = os.environ | {"PYTHONPATH": str(checkout)}
        environment.pop("TF_CONFIG", None)
        if size > 1:
            environment["TF_CONFIG"] = json.dumps(task)
        processes.append(
            subprocess.Popen(
                words,
                env=environment,
                cwd=checkout,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        )
    ends = [process.communicate() for process in processes]
    for process, (_, errors) in zip(processes, ends, strict=True):
        if process.returncode:
            raise SystemExit(errors)
    line = next(each for each in ends[0][0].splitlines() if each.startswith("RESULT "))
    found: dict[str, float] = json.loads(line.removeprefix("RESULT "))
    return found


def difference(old: Path, new: Path) -> float:
    """Returns the largest difference of a number that the evaluation `old` has from that in `new`.

    A later version may add tables, columns and keys.

    Raises:
        SystemExit: `new` lacks something, or another value than a number differs.
    """
    largest = 0.0
    for name in sorted(path.name for path in old.glob("*.csv")):
        ours, theirs = (list(csv.DictReader((each / name).open())) for each in (old, new))
        largest = max(largest, _difference(ours, theirs, name))
    ours, theirs = (json.loads((each / "summary.json").read_text()) for each in (old, new))
    return max(largest, _difference(ours, theirs, "summary.json"))


def _difference(ours: Any, theirs: Any, where: str) -> float:
    if isinstance(ours, dict) and isinstance(theirs, dict) and ours.keys() <= theirs.keys():
        return max((_difference(ours[k], theirs[k], f"{where}, {k}") for k in ours), default=0.0)
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        pairs = enumerate(zip(ours, theirs, strict=True))
        return max((_difference(*pair, f"{where}, {index}") for index, pair in pairs), default=0.0)
    if ours == theirs:
        return 0.0
    with contextlib.suppress(TypeError, ValueError):
        found = abs(float(ours) - float(theirs))
        if math.isfinite(found):
            return found
    raise SystemExit(f"{where}: {ours!r} and {theirs!r}")


def make_run(
    folder: Path, num_cases: int, size: tuple[int, int], num_classes: int, checkout: Path
) -> Path:
    """Trains a tiny network for one epoch on synthetic images; returns the folder of the run.

    Args:
        checkout: of the oldest version; later ones read its runs.
    """
    random = np.random.default_rng(0)
    for split, number in (("train", 24), ("valid", 4), ("test", num_cases)):
        for kind in ("images", "masks"):
            (folder / "source" / split / kind).mkdir(parents=True)
        for index in range(number):
            image, mask = draw_pair(random, size, num_classes)
            for kind, pixels in (("images", image), ("masks", mask)):
                path = folder / "source" / split / kind / f"{split}-{index:04d}.png"
                cv2.imwrite(str(path), pixels[..., ::-1])
    names = ";".join(
        f"class{index}={','.join(map(str, color))}"
        for index, color in enumerate(COLORS[:num_classes])
    )
    words = [*FLEXUNET, "prep", str(folder / "source"), str(folder / "data")]
    words += ["--image-height", str(size[0]), "--image-width", str(size[1])]
    times_of(checkout, [*words, "--num-processes", "1", "--classes", names])
    options = {
        "data": str(folder / "data"),
        "output": str(folder / "runs"),
        "name": "tiny",
        "epochs": "1",
        "global-batch-size": "1",
        "precision": "float32",
        "prediction-images": "0",
        "preset": "reference",
        "model.num-layers": "2",
        "model.base-filters": "8",
        "model.base-kernels": "3,3",
        "optimizer.learning-rate": "0.01",
    }
    flags = [part for name, value in options.items() for part in (f"--{name}", value)]
    times_of(checkout, ["-m", "job.train", "--local", "--no-tensorboard", "--no-progress", *flags])
    return folder / "runs" / "tiny"


def draw_pair(
    random: np.random.Generator, size: tuple[int, int], num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns image and mask, (H, W, 3) uint8: smooth regions, and colours with noise."""
    side = max(size)
    fields = random.standard_normal((num_classes, *size)).astype(np.float32)
    smooth = [cv2.GaussianBlur(each, (0, 0), side / 16) for each in fields]
    # Some classes are rare, as in street scenes.
    order = np.linspace(1.0, 0.6, num_classes)[:, None, None]
    ids = np.argmax(np.stack(smooth) / np.std(smooth, axis=(1, 2), keepdims=True) * order, axis=0)
    colors = np.array(COLORS[:num_classes], np.uint8)
    mask = colors[ids]
    soft = cv2.GaussianBlur(mask.astype(np.float32), (0, 0), 1.5)
    noise = cv2.GaussianBlur(random.standard_normal(mask.shape).astype(np.float32), (0, 0), 1.0)
    image = np.clip(soft + 60 * noise, 0, 255).astype(np.uint8)
    return image, mask


if __name__ == "__main__":
    main()
