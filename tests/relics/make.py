"""Made what is in `v0.1.0`, with the code of that version: runs that are not over, for later code.

python make.py

It worked on that version alone, in a folder /data that held phantoms in /data/source. Pictures were
deleted afterwards, and the name of the machine.
"""

import shutil
import subprocess
import sys
from typing import Any

from job.planning.options import resolve_config
from job.training.process import run_process
from job.training.setup import Callbacks

OPTIONS: dict[str, Any] = {
    "data": "/data/dataset",
    "output": "/data/runs",
    "epochs": 3,
    "global_batch_size": 2,
    "precision": "float64",
    "deterministic": True,
    "threads": 1,
    "prediction_images": 0,
    "tensorboard": False,
    "progress": False,
    "checkpoint_every_minutes": 0.0,
    "model": {"num_layers": 2, "base_filters": 2, "base_kernels": (3, 3), "dropout_rate": 0.1},
    "optimizer": {"learning_rate": 0.003},
    "augmentation": {"enabled": True, "deformation_probability": 0.5},
}
GROUP = {"model": OPTIONS["model"] | {"normalization": "group"}}
FOLDS = {"folds": 3, "keep_checkpoints": 1}


def train(name: str, stop_after: int | None = None, **changes: Any) -> None:
    """Trains a run; stops it after so many steps."""
    steps = []

    def report(event: Any) -> None:
        steps.extend([event] * (event["event"] == "step"))

    config = resolve_config(OPTIONS | changes | {"name": name}, None)
    run_process(config, None, Callbacks(report, lambda: len(steps) == stop_after))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        train(**eval(sys.argv[1]))  # noqa: S307
        raise SystemExit
    prep = "flexunet prep /data/source /data/dataset --image-size 32 --fractions 0.6,0.2,0.2"
    subprocess.run([*prep.split(), "--group-regex", "phantom-p[0-9]+"], check=True)
    shutil.rmtree("/data/dataset/report")
    for task in (
        dict(name="whole", **GROUP),
        dict(name="stopped", stop_after=7, **GROUP),
        *(dict(name=f"whole-folds-fold-{k}", fold=k, **FOLDS) for k in range(3)),
        dict(name="folds-fold-0", fold=0, **FOLDS),
        dict(name="folds-fold-1", fold=1, stop_after=5, **FOLDS),
    ):
        subprocess.run([sys.executable, __file__, repr(task)])
