"""Every benchmark runs at its smallest size and writes its numbers.

The measured values have no meaning at this size; the tests only check that the scripts run.
"""

import importlib
import json
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from flexunet.settings import parse_settings
from job.config import TrainConfig
from tests import commands

PROJECT = Path(__file__).resolve().parents[2]
SCRIPTS = PROJECT / "benchmarks"
ELSEWHERE = {
    "machine.py": "shared functions, not a script",
    "peers.py": "needs its own environment",
    "peer_step.py": "needs its own environment",
    "quality.py": "see test_quality.py",
    "quality_peers.py": "needs its own environment",
    "quality_table.py": "a part of quality.py",
}
TIMEOUT_S = 300
TINY = ("--image-size", "32", "--repeats", "1")
TINY_NETWORK = (*TINY, "--num-layers", "2")
# Long enough not to fail on a busy machine.
GPU_SMALL = ("--device", "cpu", "--small", "--minutes", "30")


@dataclass(frozen=True)
class Smoke:
    """A script at its smallest size.

    Attributes:
        writes: name of the result.
        numbers: paths of values in it, joined by ">", that must exist and be positive.
        forks: fork the processes in which it imports TensorFlow.
    """

    script: str
    arguments: tuple[str, ...]
    writes: str
    numbers: tuple[str, ...] = ()
    forks: bool = False

    def __str__(self) -> str:
        return self.script.removesuffix(".py") + ("-table" if "--table" in self.arguments else "")


SMOKES = [
    Smoke(
        "step.py",
        (*TINY_NETWORK, "--matmul-size", "64", "--ways", "ours,naive,pinned"),
        "step-32-float32.json",
        (
            "ours_over>naive",
            "ours_over>pinned",
            "ours>share_of_matmul_rate",
            "layers>sum_of_best_s",
        ),
        forks=True,
    ),
    Smoke(
        "gpu.py",
        (*GPU_SMALL, "--sections", "agreement,placement,precisions,resume,rate"),
        "gpu-cpu.json",
        (
            "sections>precisions>found>mixed_bfloat16, images_per_s",
            "sections>resume>found>optimizer.npz, arrays",
            "sections>rate>found>float32, batch 2, XLA off>share_of_matmul_rate",
            "sections>rate>found>float32, batch 2, XLA off>peak_memory_mb",
        ),
    ),
    Smoke(
        "start.py",
        (*TINY_NETWORK, "--warm-ups", "0"),
        "start.json",
        ("command_over_core", "seconds>command"),
        forks=True,
    ),
    Smoke(
        "exchange.py",
        TINY_NETWORK,
        "exchange-32-float32.json",
        ("share_of_silent>planned", "predicted_share>planned", "sent_over_all_reduce"),
        forks=True,
    ),
    Smoke(
        "exchange.py",
        ("--table", "--image-size", "32", "--num-layers", "2"),
        "exchange-table-32-float32.json",
        ("silent_step_s", "rows>0>plan_kept"),
    ),
    Smoke(
        "rounding.py",
        (
            *("--image-size", "32", "--steps", "2", "--seeds", "0", "--replicas", "2"),
            *("--methods", "float32,restarted"),
        ),
        "rounding.json",
        ("methods>float32>loss", "methods>restarted>gradient_error"),
    ),
    Smoke(
        "recipe.py",
        ("--steps", "2", "--phantoms", "10", "--seeds", "0", "--arm", "recipe"),
        "recipe.json",
        ("phantoms, 2 steps>samples>train", "phantoms, 2 steps>foreground_dice>recipe>most"),
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
        (
            "wall_ms_of_epoch_of_10>input>median",
            "cpu_ms_of_augmentation>noise>median",
            "rss_mb_after_epoch",
        ),
    ),
    Smoke(
        "cache.py",
        ("--num-shards", "3", "--shard-mb", "0.01", "--latency-ms", "1", "--repeats", "1"),
        "cache.json",
        ("seconds>one>median", "times_as_fast>median", "share_of_streams>median"),
    ),
    Smoke(
        "records.py",
        (*TINY, "--num-images", "12", "--step-ms", "1", "--latency-ms", "1"),
        "records.json",
        ("images_per_s>half>median", "over_all>one at a time>median", "mean_record_kb"),
    ),
    Smoke(
        "prep.py",
        (*TINY, "--num-images", "24"),
        "prep.json",
        ("images_per_s>prep_1>median", "images_per_s>inspect_2>median", "peak_worker_rss_mb>24"),
    ),
    Smoke(
        "metrics.py",
        (*TINY, "--masks", "5", "--samples", "2"),
        "metrics.json",
        (
            "num_compared",
            "measures>hd95_and_surface_dice>ours_over_theirs>median",
            "measures>intervals>ours_over_theirs>median",
        ),
    ),
    Smoke(
        "bucket.py",
        ("--num-images", "4", "--image-size", "32", "--delay-ms", "1", "--num-processes", "1"),
        "bucket.json",
        (
            "plain_requests_per_s>16_at_once>before",
            "prep>first>source_downloads",
            "prep>again>wall_s",
        ),
    ),
    Smoke(
        "optimizer.py",
        ("--parameters", "1", "--repeats", "1"),
        "optimizer.json",
        ("over_copy>ours", "over_copy>keras"),
    ),
    Smoke(
        "normalization.py",
        ("--sides", "16", "--batch-sizes", "1", "--channels", "8", "--repeats", "1"),
        "normalization.json",
        ("cases>0>errors>keras>gamma", "cases>0>time_over_keras>forward_backward>median"),
    ),
    Smoke(
        "evaluation.py",
        (
            *("--images", "2", "--large-images", "0", "--shrink", "4", "--repeats", "1"),
            *("--only", "evaluate"),
        ),
        "evaluation.json",
        ("scenes>street>evaluate>head>0>cpu",),
        forks=True,
    ),
    Smoke("plot.py", (), "ratios.png"),
]


@dataclass(frozen=True)
class Ended:
    """A script that has ended."""

    exit_code: int
    results: Path
    output: str


def ended(smoke: Smoke, folder: Path, **environment: str) -> Ended:
    """Runs `smoke` in its own process and returns how it ended."""
    results = folder / "results"
    results.mkdir(parents=True)
    if smoke.script == "plot.py":
        for path in (SCRIPTS / "results").glob("*.json"):
            shutil.copy(path, results)
    environment = os.environ | environment | {"FLEXUNET_BENCHMARK_RESULTS": str(results)}
    forks = ["--forks"] if smoke.forks else []
    words = ["tests.script", *forks, str(SCRIPTS / smoke.script), *smoke.arguments]
    done = commands.run(*words, environment=environment, timeout=TIMEOUT_S)
    return Ended(done.returncode, results, done.stdout + done.stderr)


@pytest.mark.parametrize("smoke", SMOKES, ids=str)
def test_a_benchmark_still_runs(smoke: Smoke, tmp_path: Path) -> None:
    found = ended(smoke, tmp_path)
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
    for key in name.split(">"):
        result = result[int(key)] if isinstance(result, list) else result[key]
    numbers = result if isinstance(result, list) else [result]
    assert numbers, name
    assert all(type(number) in (int, float) for number in numbers), name
    return numbers


def test_every_benchmark_is_run_here() -> None:
    scripts = {path.name for path in SCRIPTS.glob("*.py")}
    assert scripts == {smoke.script for smoke in SMOKES} | set(ELSEWHERE)


def test_every_section_of_a_gpu_report_is_run_here_with_options_that_exist(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    gpu = importlib.import_module("gpu")
    (smoke,) = (each for each in SMOKES if each.script == "gpu.py")
    here = {"devices", *smoke.arguments[-1].split(","), "input", "xla"}  # two in the next tests
    assert set(gpu.SECTIONS) == here
    sizes = gpu.Sizes()
    cases = dict(gpu._cases(sizes))  # `--small` has one
    assert len(cases) == len(sizes.losses) + len(sizes.normalizations) - 1
    configs = {str(parse_settings(TrainConfig, each, name)) for name, each in cases.items()}
    assert len(configs) == len(cases)


def test_a_gpu_report_goes_on_after_a_section_that_failed(tmp_path: Path) -> None:
    # A side that is not divisible by the factor of the network's levels.
    arguments = (*GPU_SMALL, "--image-size", "33", "--sections", "precisions,input")
    smoke = Smoke("gpu.py", arguments, "gpu-cpu.json")
    found = ended(smoke, tmp_path)
    assert found.exit_code == 1, found.output
    result = json.loads((found.results / smoke.writes).read_text())
    assert all(
        each > 0 for each in numbers_at(result, "sections>input>found>augmented, images_per_s")
    )
    sections = result["sections"]
    assert {name: each["status"] for name, each in sections.items()} == {
        "devices": "holds",
        "precisions": "failed",
        "input": "holds",
    }
    assert sections["precisions"]["error"].startswith("flexunet.errors.UsageError: --model.num")
    assert "does not hold: precisions" in found.output


def test_a_gpu_report_shows_what_does_not_agree(tmp_path: Path) -> None:
    smoke = Smoke("gpu.py", (*GPU_SMALL, "--sections", "xla", "--tolerance", "0"), "gpu-cpu.json")
    found = ended(smoke, tmp_path)
    assert found.exit_code == 1, found.output
    section = json.loads((found.results / smoke.writes).read_text())["sections"]["xla"]
    assert section["status"] == "does not hold"
    assert section["found"]["fault: gradients"].endswith("at most 0 is allowed")
    assert 0 < section["found"]["gradients"] < 1e-5  # XLA adds in another order
    assert section["found"]["on, step_s"] > 0


def test_without_a_gpu_the_report_of_one_is_refused_in_a_line(tmp_path: Path) -> None:
    found = ended(Smoke("gpu.py", (), "none"), tmp_path, CUDA_VISIBLE_DEVICES="")
    assert found.exit_code == 2, found.output
    last = found.output.splitlines()[-1]
    assert last == "no GPU for TensorFlow (it finds none); --device cpu measures the CPU"
    assert list(found.results.iterdir()) == []
