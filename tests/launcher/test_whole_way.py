"""From images to masks on a cluster that was started by hand, with all data in a bucket.

`pytest -m faults -s tests/launcher/test_whole_way.py` shows the objects in the bucket at the end.
"""

import secrets
import sys
from pathlib import Path
from typing import Any

import pytest

from data_prep.phantoms.images import write_phantoms
from flexunet.storage import ObjectStore, open_store
from job.planning.plan_file import read_plan
from tests.launcher.conftest import PROJECT, Launch
from tests.launcher.head import ray_head

MAMMOGRAMS = PROJECT.parent / "shared" / "data" / "inbreast-mini"
_TRAIN = (
    *("--num-workers", 2, "--epochs", 2, "--global-batch-size", 4, "--precision", "float32"),
    *(
        "--model.num-layers",
        3,
        "--model.base-filters",
        4,
        "--model.base-kernels",
        "3,3",
    ),
)


def _phantoms(tmp_path: Path) -> tuple[Path, list[str], int]:
    write_phantoms(str(tmp_path / "source"), 24, 64, 1)
    return tmp_path / "source", ["--group-regex", "phantom-p[0-9]+"], 24


def _mammograms(tmp_path: Path) -> tuple[Path, list[str], int]:
    if not MAMMOGRAMS.exists():
        pytest.skip(f"no mammograms in {MAMMOGRAMS}")
    return MAMMOGRAMS, ["--group-preset", "augmented"], 24


@pytest.mark.faults
@pytest.mark.timeout(900)
@pytest.mark.parametrize("make_source", [_phantoms, _mammograms])
def test_a_cluster_started_by_hand_goes_the_whole_way(
    make_source: Any, flexunet: Launch, bucket_url: str, tmp_path: Path
) -> None:
    source, grouping, num_images = make_source(tmp_path)
    data, runs, run = f"{bucket_url}/dataset", f"{bucket_url}/runs", f"{bucket_url}/runs/first"
    steps = [
        ["prep", source, data, "--image-size", 64, "--fractions", "0.5,0.25,0.25", *grouping],
        ["train", "--data", data, "--output", runs, "--name", "first", *_TRAIN],
        ["evaluate", run, "--split", "valid"],
        ["infer", run, source / "images", f"{bucket_url}/masks"],
    ]
    with ray_head(secrets.token_hex(32), num_nodes=2) as head:
        where = ("submit", "--address", head.address, "--follow", "--")
        for words in steps:
            done = flexunet(*where, *words, **head.environment)
            assert done.returncode == 0, done.stderr + done.stdout
    store = open_store(bucket_url)
    names = _show(store)
    found = {name.split("/")[2] for name in names if name.startswith("runs/first/")}
    assert {"checkpoints", "metrics", "evaluation", "epoch_change_infer", "outcome.json"} <= found
    plan = read_plan(store.subpath("runs/first"))  # of the first of both workers
    assert plan is not None
    assert plan.machine.num_replicas == 2
    assert plan.chose("optimizer.name")
    masks = [name for name in names if name.startswith("masks/") and name.count("/") == 1]
    assert sum(name.endswith(".png") for name in masks) == num_images
    assert {"dataset/dataset.json", "dataset/samples.parquet"} <= set(names)


def _show(store: ObjectStore) -> list[str]:
    sizes = {stat.name: stat.size for stat in store.list()}
    lines = [f"{size:>10,}  {name}" for name, size in sorted(sizes.items())]
    sys.stdout.write("\n".join(["", store.url, *lines, ""]))
    return sorted(sizes)
