"""Every benchmark runs at its smallest size and writes the numbers it is there for.

What it measures there says nothing; that it still runs is the point. Each runs in a process of its
own, two at a time, forked from one that has imported TensorFlow and done nothing with it: half of
the time would be that import.
"""

import json
import math
import multiprocessing
import os
import runpy
import shutil
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

PROJECT = Path(__file__).resolve().parents[2]
SCRIPTS = PROJECT / "benchmarks"
ELSEWHERE = {
    "machine.py": "what the others share",
    "peers.py": "needs an environment of its own",
}
TIMEOUT_S = 300
TINY = ("--image-size", "32", "--repeats", "1")
TINY_NETWORK = (*TINY, "--num-layers", "2")


@dataclass(frozen=True)
class Smoke:
    """A script at its smallest size.

    Attributes:
        writes: name of the result.
        numbers: paths of values in it, joined by ".", that must be there and positive.
    """

    script: str
    arguments: tuple[str, ...]
    writes: str
    numbers: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.script.removesuffix(".py") + ("-table" if "--table" in self.arguments else "")


SMOKES = [
    Smoke(
        "step.py",
        (*TINY_NETWORK, "--matmul-size", "64", "--ways", "ours,naive,pinned"),
        "step-32-float32.json",
        (
            "ours_over.naive",
            "ours_over.pinned",
            "ours.share_of_matmul_rate",
            "layers.sum_of_best_s",
        ),
    ),
    Smoke(
        "start.py",
        (*TINY_NETWORK, "--warm-ups", "0"),
        "start.json",
        ("command_over_core", "seconds.command"),
    ),
    Smoke(
        "exchange.py",
        TINY_NETWORK,
        "exchange-32-float32.json",
        ("share_of_silent.planned", "predicted_share.planned", "sent_over_all_reduce"),
    ),
    Smoke(
        "exchange.py",
        ("--table", "--image-size", "32", "--num-layers", "2"),
        "exchange-table-32-float32.json",
        ("silent_step_s", "rows.0.plan_kept"),
    ),
    Smoke(
        "recipe.py",
        ("--steps", "2", "--phantoms", "10", "--seeds", "0", "--arm", "recipe"),
        "recipe.json",
        ("phantoms, 2 steps.samples.train", "phantoms, 2 steps.foreground_dice.recipe.most"),
    ),
    Smoke(
        "checkpoint.py",
        ("--image-size", "32", "--num-layers", "2", "--steps-per-save", "4", "--saves", "1"),
        "checkpoint-local.json",
        ("stored_s", "slowdown", "share_of_time"),
    ),
    Smoke(
        "inference.py",
        (*TINY_NETWORK, "--num-images", "3", "--matmul-size", "64"),
        "inference-32.json",
        ("share_of_matmul_rate", "path_over_step"),
    ),
    Smoke(
        "input.py",
        (*TINY, "--num-images", "12", "--epochs", "2"),
        "input.json",
        ("cpu_rate_ratios.input / decode.median", "rss_mb_after_epoch"),
    ),
    Smoke(
        "prep.py",
        (*TINY, "--num-images", "24"),
        "prep.json",
        ("images_per_s.prep_1.median", "peak_worker_rss_mb.24"),
    ),
    Smoke("metrics.py", ("--masks", "5"), "metrics.json", ("num_compared",)),
    Smoke(
        "optimizer.py",
        ("--parameters", "1", "--repeats", "1"),
        "optimizer.json",
        ("over_copy.ours", "over_copy.keras"),
    ),
    Smoke(
        "normalization.py",
        ("--sides", "16", "--batch-sizes", "1", "--channels", "8", "--repeats", "1"),
        "normalization.json",
        ("cases.0.errors.keras.gamma", "cases.0.time_over_keras.forward_backward.median"),
    ),
    Smoke("plot.py", (), "ratios.png"),
]


def run_script(path: Path, arguments: tuple[str, ...], results: Path, log: Path) -> None:
    """Runs a script in this process as Python would, with its output in the file `log`."""
    with log.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.environ["FLEXUNET_BENCHMARK_RESULTS"] = str(results)
    os.chdir(PROJECT)
    sys.path.insert(0, str(SCRIPTS))
    sys.argv = [str(path), *arguments]
    runpy.run_path(str(path), run_name="__main__")


@dataclass(frozen=True)
class Ended:
    """A script that has ended, or was ended."""

    exit_code: int | None  # None: it took too long
    results: Path
    output: str


def ended(smoke: Smoke, folder: Path) -> Ended:
    """Returns how `smoke` ended, run in a process of its own."""
    results, log = folder / "results", folder / "log.txt"
    results.mkdir(parents=True)
    if smoke.script == "plot.py":
        for path in (SCRIPTS / "results").glob("*.json"):
            shutil.copy(path, results)
    context = multiprocessing.get_context("forkserver")
    # Only what does not belong to the project: it would be found in another place there.
    context.set_forkserver_preload(["tensorflow", "keras", "matplotlib.pyplot", "pyarrow"])
    process = context.Process(
        target=run_script, args=(SCRIPTS / smoke.script, smoke.arguments, results, log)
    )
    process.start()
    process.join(TIMEOUT_S)
    exit_code = process.exitcode
    if exit_code is None:
        process.kill()
        process.join()
    return Ended(exit_code, results, log.read_text())


@pytest.fixture(scope="module")
def all_ended(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Mapping[str, Future[Ended]]]:
    """Yields how those that are asked for ended, by name; they have begun, two at a time."""
    wanted = [
        item.callspec.params["smoke"]
        for item in request.session.items
        if item.path == request.path and "smoke" in getattr(item, "fixturenames", ())
    ]
    with ThreadPoolExecutor(2) as pool:
        yield {
            str(smoke): pool.submit(ended, smoke, tmp_path_factory.mktemp(str(smoke)))
            for smoke in wanted
        }


@pytest.mark.parametrize("smoke", SMOKES, ids=str)
def test_a_benchmark_still_runs(smoke: Smoke, all_ended: Mapping[str, Future[Ended]]) -> None:
    found = all_ended[str(smoke)].result()
    assert found.exit_code == 0, found.output
    assert "Traceback" not in found.output, found.output
    path = found.results / smoke.writes
    assert path.is_file(), [each.name for each in found.results.iterdir()]
    if path.suffix == ".json":
        result = json.loads(path.read_text())
        for name in smoke.numbers:
            assert all(0 < number < math.inf for number in numbers_at(result, name)), name


def numbers_at(result: Any, name: str) -> list[float]:
    """Returns the number or numbers at the path `name`."""
    for key in name.split("."):
        result = result[int(key)] if isinstance(result, list) else result[key]
    numbers = result if isinstance(result, list) else [result]
    assert numbers, name
    assert all(type(number) in (int, float) for number in numbers), name
    return numbers


def test_every_benchmark_is_run_here() -> None:
    scripts = {path.name for path in SCRIPTS.glob("*.py")}
    assert scripts == {smoke.script for smoke in SMOKES} | set(ELSEWHERE)
