"""Compares what methods of training reach in the same time: presets, a peer, a random forest.

    make bench-results DATA=FOLDER          # creates .venv-results and runs this script in it
    python benchmarks/quality.py FOLDER [--sets drive] [--methods auto] [--folds 0] [--minutes 10]

FOLDER has a folder for each of `SETS`, with the images as they were published. Each set is divided
into three folds by image. In each fold, every method trains on the same images, may choose its best
moment on the same validation images, and predicts the images of the fold at their own size. These
masks are measured twice: by this project, and by ten lines of NumPy that know nothing of it.

One method in one fold is a cell, a file in benchmarks/results/quality. A cell that exists is not
measured again, so the command goes on where it was interrupted. Each cell records how busy others
kept the machine meanwhile: their share of the time of all cores, which should be near 0.
"""

import csv
import itertools
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
import psutil
from machine import FLEXUNET, RESULTS, describe_machine
from PIL import Image
from quality_table import write_tables

import flexunet
from job.data.dataset import open_dataset
from job.data.folds import fold_of
from job.metrics.confusion import count_pixels, dice

HERE = Path(__file__).parent
CELLS = "quality"  # the folder of the cells, in the folder of results
NUM_FOLDS = 3
PEER_PACKAGES = ("torch", "segmentation-models-pytorch", "timm", "albumentations", "scikit-learn")

Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class ImageSet:
    """Images and masks of others.

    Attributes:
        images: pattern of the images, within the folder of the set.
        mask: pattern of the mask of an image whose stem is "{stem}"; "{number}": the digits at the
            start of the stem.
        object_level: the grey level of the object in the masks.
        field_of_view: as `mask`, of the mask of the field of view; pixels outside are not
            measured. "": none.
        options: of `flexunet.prepare`.
    """

    images: str
    mask: str
    object_level: int
    options: dict[str, Any]
    field_of_view: str = ""


_WHITE = {"classes": "background=0,0,0;foreground=255,255,255", "mask_encoding": "colour"}
_BLACK = {"classes": "background=255,255,255;foreground=0,0,0", "mask_encoding": "colour"}
SETS = {
    # 30 sections of an electron microscope; the object is the membrane, which is black.
    "isbi-membrane": ImageSet("image/*.png", "label/{stem}.png", 0, _BLACK),
    # 20 photographs of the retina with their vessels.
    "drive": ImageSet(
        "training/images/*.tif",
        "training/1st_manual/{number}_manual1.gif",
        255,
        {
            **_WHITE,
            "images": "training/images",
            "masks": "training/1st_manual",
            "field_of_view": "training/mask",
        },
        "training/mask/{number}_training_mask.gif",
    ),
    # 24 augmented images of mammograms; groups are source images, not patients: no claim.
    "inbreast-mini": ImageSet(
        "images/*.*", "masks/{stem}.*", 255, {**_WHITE, "group_preset": "augmented"}
    ),
}

ENCODER = ("--model.name", "encoder-unet", "--model.encoder", "efficientnet-lite0")
OURS = {  # options of `flexunet train`
    "reference": ("--preset", "reference"),
    "recipe": ("--preset", "recipe"),
    "auto": ("--preset", "auto"),
    "auto, encoder": ("--preset", "auto", *ENCODER),
    "auto, encoder from random weights": (
        *("--preset", "auto", *ENCODER, "--model.encoder-weights", "none"),
    ),
}
PEERS = ("smp", "smp, encoder", "random forest")  # see quality_peers.py
DEFAULT_METHODS = ("reference", "recipe", "auto", "auto, encoder", *PEERS)


@dataclass(frozen=True)
class Cell:
    """One method to train in one fold of a set, with one seed."""

    set_name: str
    method: str
    fold: int
    seed: int
    minutes: float

    @property
    def path(self) -> Path:
        """The file of its result; the minutes and the seed are named if they are not usual."""
        method = self.method.replace(", ", "-").replace(" ", "-")
        unusual = "" if self.minutes == 10 else f"-{self.minutes:g}min"
        seeded = f"-seed{self.seed}" if self.seed else ""
        return RESULTS / CELLS / f"{self.set_name}-{method}-fold{self.fold}{seeded}{unusual}.json"


def dice_by_numpy(truth_file: Path, mask_file: Path, level: int, view_file: Path | None) -> float:
    """Returns the Dice coefficient of a mask file; knows nothing of this project."""
    truth = np.asarray(Image.open(truth_file).convert("L")) == level
    mask = np.asarray(Image.open(mask_file).convert("L")) > 127
    if view_file is not None:
        view = np.asarray(Image.open(view_file).convert("L")) > 127
        truth, mask = truth[view], mask[view]
    both = np.sum(truth & mask)
    total = np.sum(truth) + np.sum(mask)
    return float(2 * both / total) if total else float("nan")


def dice_by_us(truth_file: Path, mask_file: Path, level: int, view_file: Path | None) -> float:
    """Returns the Dice coefficient of a mask file, measured as `flexunet evaluate` does."""
    truth = (np.asarray(Image.open(truth_file).convert("L")) == level).astype(np.uint8)
    mask = (np.asarray(Image.open(mask_file).convert("L")) > 127).astype(np.uint8)
    if view_file is not None:
        truth[np.asarray(Image.open(view_file).convert("L")) <= 127] = 255
    tp, fp, fn, _ = count_pixels(truth, mask, 2, ignore_id=255)[1]
    return float(dice(tp, fp, fn))


def files_of(folder: Path, images: ImageSet) -> dict[str, tuple[Path, Path, Path | None]]:
    """Returns image, mask and field of view of each image, by the stem of its name."""

    def named(pattern: str, stem: str) -> Path:
        number = stem.split("_")[0]
        [found] = folder.glob(pattern.format(stem=stem, number=number))
        return found

    paths = sorted(folder.glob(images.images))
    return {
        path.stem: (
            path,
            named(images.mask, path.stem),
            named(images.field_of_view, path.stem) if images.field_of_view else None,
        )
        for path in paths
    }


def fold_stems(dataset: str, fold: int) -> dict[str, list[str]]:
    """Returns the stems of the images of each split of a fold."""
    splits = fold_of(open_dataset(dataset), NUM_FOLDS, fold).splits
    return {name: [Path(sample).stem for sample in split.ids] for name, split in splits.items()}


def measure_cell(cell: Cell, source: Path, work: Path) -> dict[str, Any]:
    """Trains and predicts; returns the Dice of each image of the fold and the curve of training."""
    images = SETS[cell.set_name]
    dataset = str(work / "data" / cell.set_name)
    flexunet.prepare(str(source), dataset, fractions=(0.7, 0.3, 0.0), **images.options)
    files, stems = files_of(source, images), fold_stems(dataset, cell.fold)
    output = work / "cells" / cell.path.stem
    train = _train_ours if cell.method in OURS else _train_peer
    started, cpu_s, busy_s = time.monotonic(), _cpu_seconds(), _busy_seconds()
    curve = train(cell, dataset, output, {name: [files[s] for s in stems[name]] for name in stems})
    wall_s = time.monotonic() - started
    others_s = _busy_seconds() - busy_s - (_cpu_seconds() - cpu_s)
    scores = {"numpy": dice_by_numpy, "ours": dice_by_us}
    cases = {
        stem: {
            name: score(files[stem][1], output / "masks" / f"{stem}.png", images.object_level, view)
            for name, score in scores.items()
        }
        for stem, view in ((stem, files[stem][2]) for stem in stems["test"])
    }
    assert all(abs(case["numpy"] - case["ours"]) < 1e-9 for case in cases.values())
    return {
        "set": cell.set_name,
        "method": cell.method,
        "fold": cell.fold,
        "seed": cell.seed,
        "minutes": cell.minutes,
        "num_images": {name: len(split) for name, split in stems.items()},
        "dice": {stem: case["numpy"] for stem, case in cases.items()},
        "mean_dice": float(np.mean([case["numpy"] for case in cases.values()])),
        "curve": curve,
        "wall_s": round(wall_s, 1),
        "share_of_others": round(max(0.0, others_s) / wall_s / (os.cpu_count() or 1), 2),
        "machine": describe_machine(),
        "peer_packages": _peer_packages(),
    }


def _train_ours(cell: Cell, dataset: str, output: Path, files: dict[str, Any]) -> list[list[float]]:
    """Trains by the command, predicts the fold by the command; returns minutes and Dice."""
    run, images = output / "runs" / "run", output / "images"
    fold = ("--folds", str(NUM_FOLDS), "--fold", str(cell.fold), "--seed", str(cell.seed))
    place = ("--local", "--data", dataset, "--output", str(run.parent), "--name", run.name)
    budget = ("--time-budget", f"{cell.minutes:g}")
    _command(output, "train", *place, *fold, *budget, *OURS[cell.method])
    images.mkdir(exist_ok=True)
    for path, *_ in files["test"]:
        shutil.copy(path, images)
    _command(output, "infer", str(run), str(images), str(output / "inference"))
    (output / "masks").mkdir(exist_ok=True)
    for path, *_ in files["test"]:
        # Masks have the colours of the dataset, so the object has its own level.
        mask = np.asarray(Image.open(output / "inference" / f"{path.stem}.png").convert("L"))
        is_object = mask == SETS[cell.set_name].object_level
        Image.fromarray(is_object.astype(np.uint8) * 255).save(
            output / "masks" / f"{path.stem}.png"
        )
    return _curve_of(run, cell.minutes)


def _curve_of(run: Path, minutes: float) -> list[list[float]]:
    """Returns the minutes at the end of each epoch, and its validation Dice."""
    with (run / "metrics" / "history.csv").open(newline="") as file:
        values = [float(row["val_foreground_dice"]) for row in csv.DictReader(file)]
    with (run / "metrics" / "time_schedule.csv").open(newline="") as file:
        record = [(int(row["step"]), float(row["time_fraction"])) for row in csv.DictReader(file)]
    steps, fractions = zip(*record, strict=True)
    ends = np.arange(1, len(values) + 1) * steps[-1] / max(len(values), 1)
    return [
        [round(float(part) * minutes, 2), value]
        for part, value in zip(np.interp(ends, steps, fractions), values, strict=True)
    ]


def _command(output: Path, command: str, *options: str) -> None:
    """Runs a command of this project; its output goes to a log, whose end is shown if it fails."""
    output.mkdir(parents=True, exist_ok=True)
    log = output / f"{command}.log"
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent)}
    with log.open("ab") as file:
        done = subprocess.run(
            [sys.executable, *FLEXUNET, command, *options],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            check=False,
        )
    if done.returncode:
        raise click.ClickException(f"{command} failed:\n{log.read_text(errors='replace')[-2000:]}")


def _train_peer(cell: Cell, dataset: str, output: Path, files: dict[str, Any]) -> list[list[float]]:
    """Trains and predicts in a process without TensorFlow; returns minutes and Dice."""
    output.mkdir(parents=True, exist_ok=True)
    names = {
        name: [[str(p) if p else "" for p in row] for row in rows] for name, rows in files.items()
    }
    task = {
        "method": cell.method,
        "minutes": cell.minutes,
        "seed": cell.seed + cell.fold,
        "level": SETS[cell.set_name].object_level,
        "files": names,
        "output": str(output),
    }
    (output / "task.json").write_text(json.dumps(task))
    subprocess.run([sys.executable, HERE / "quality_peers.py", output / "task.json"], check=True)
    curve: list[list[float]] = json.loads((output / "curve.json").read_text())
    return curve


def _cpu_seconds() -> float:
    """Returns the CPU time of this process and of all its children that ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def _busy_seconds() -> float:
    """Returns the CPU time of all processes of the machine since it was started."""
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - times.iowait - times.guest - times.guest_nice)


def _peer_packages() -> dict[str, str | None]:
    def found(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    return {name: found(name) for name in PEER_PACKAGES}


def cells(
    sets: Iterable[str], methods: Iterable[str], folds: Iterable[int], seed: int, minutes: float
) -> list[Cell]:
    """Returns the cells fold by fold, so that an interrupted table has whole folds."""
    order = itertools.product(folds, sets, methods)
    return [Cell(set_name, method, fold, seed, minutes) for fold, set_name, method in order]


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--sets", default="isbi-membrane,drive", show_default=True, help="Sets of images.")
@click.option(
    "--methods", default=";".join(DEFAULT_METHODS), show_default=True, help='Joined by ";".'
)
@click.option("--folds", default="0,1,2", show_default=True, help="Folds.")
@click.option("--seed", default=0, show_default=True, help="Seed of the weights and the order.")
@click.option("--minutes", default=10.0, show_default=True, help="Time of a training.")
@click.option("--until", help="Begin no cell after this time of the day, as 17:30.")
def main(
    folder: Path, sets: str, methods: str, folds: str, seed: int, minutes: float, until: str | None
) -> None:
    """Measure the cells that are missing, then write the tables and curves of all."""
    chosen = (sets.split(","), methods.split(";"), [int(fold) for fold in folds.split(",")])
    for cell in cells(*chosen, seed, minutes):
        if cell.path.exists():
            continue
        if until and time.strftime("%H:%M") >= until:
            print("the time is over; the same command goes on")
            break
        with tempfile.TemporaryDirectory(prefix="flexunet-quality-") as work:
            result = measure_cell(cell, folder / cell.set_name, Path(work))
        cell.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(result, indent=1) + "\n"
        cell.path.with_suffix(".part").write_text(text, encoding="utf-8")
        cell.path.with_suffix(".part").rename(cell.path)
        print(f"{cell.path.stem}: Dice {result['mean_dice']:.4f}", flush=True)
    write_tables(RESULTS / CELLS)


if __name__ == "__main__":
    main()
