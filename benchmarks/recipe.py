"""The recipe against the reference's preset: the same network, pictures and number of steps.

python benchmarks/recipe.py [--pictures FOLDER]

FOLDER holds images/ and masks/ whose names end in the number of their source, as those of
--group-preset augmented. A seed draws the splits and trains; both presets get the same seeds.
"""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import click
from machine import RESULTS, describe_machine, write_result

from data_prep.config import PrepConfig
from data_prep.phantoms.images import write_phantoms
from data_prep.pipeline import prepare
from data_prep.sources.pairs import find_sources
from flexunet.settings import deep_merge, parse_settings
from job.config import TrainConfig
from job.data.dataset import open_dataset
from job.distributed.process_group import ProcessGroup
from job.training.state import TrainState

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

# What two cores can do; the network of the reference's INbreast project is 512 x 512 with 8 levels.
SIDE = 64
NETWORK = {"num_layers": 4, "base_filters": 8, "base_kernels": (5, 5)}
BATCH_SIZE = 2
SEEDS = "0,1,2"
ARMS: dict[str, dict[str, Any]] = {
    "reference": {"preset": "reference"},
    # How much of a difference is the learning rate alone.
    "reference, rate of the recipe": {
        "preset": "reference",
        "optimizer": {"learning_rate": 1e-3},
    },
    "recipe": {"preset": "recipe"},
}


def prepared(folder: str, source: str, seed: int, **groups: str) -> str:
    """Returns the URL of a dataset whose splits are drawn by `seed`."""
    url = f"{folder}/dataset-{seed}"
    fractions = (0.6, 0.2, 0.2)
    config = PrepConfig(image_size=SIDE, fractions=fractions, seed=seed, **groups)
    prepare(find_sources(source), url, config, progress=False)
    return url


def trained(data: str, num_steps: int, seed: int, arm: dict[str, Any]) -> float:
    """Returns the foreground Dice on the test split of the best epoch of about `num_steps` steps.

    The loop is that of `flexunet train`, without tables, pictures and checkpoints.
    """
    import tensorflow as tf

    from job.training.setup import TrainingSetup
    from job.training.trainer_factory import open_trainer

    dataset = open_dataset(data)
    epochs = max(1, round(num_steps / -(-len(dataset.split("train")) // BATCH_SIZE)))
    budget = {
        "data": data,
        "epochs": epochs,
        "global_batch_size": BATCH_SIZE,
        "seed": seed,
        "precision": "float32",
        "model": NETWORK,
        # The same steps for all: none stops early.
        "schedule": {"early_stopping_patience": 0},
        "augmentation": {"enabled": True, "shrink_probability": 0.0},
    }
    config = parse_settings(TrainConfig, deep_merge(budget, arm), "benchmark")
    strategy = tf.distribute.OneDeviceStrategy("CPU:0")
    setup = TrainingSetup(config, dataset, None, strategy, ProcessGroup(strategy, None))
    with open_trainer(setup) as trainer:
        state = TrainState(learning_rate=config.optimizer.learning_rate)
        best = trainer.model.get_weights()
        while state.epoch < epochs:
            for _ in trainer.train_steps(state):
                pass
            row = trainer.validate(state, lambda: False)
            assert row is not None
            trainer.finish_epoch(state, row, images_per_s=0.0)
            if state.best and state.best["epoch"] == row["epoch"]:
                best = trainer.model.get_weights()
        trainer.model.set_weights(best)
        summary = trainer.evaluator.evaluate("test", trainer.readers["test"]).summary
    return float(summary["foreground_mean"]["dice"] or 0.0)


def compared(
    folder: str,
    source: str,
    num_steps: int,
    arms: Sequence[str],
    seeds: Sequence[int],
    **groups: str,
) -> dict[str, Any]:
    """Returns the foreground Dice of the test split for each arm and seed."""
    found: dict[str, list[float]] = {name: [] for name in arms}
    for seed in seeds:
        data = prepared(folder, source, seed, **groups)
        for name in arms:
            started = time.monotonic()
            dice = trained(data, num_steps, seed, ARMS[name])
            found[name].append(dice)
            seconds = time.monotonic() - started
            click.echo(f"seed {seed}, {name}: {dice:.3f} ({seconds:.0f} s)")
    sizes = {name: len(split) for name, split in open_dataset(data).splits.items()}
    return {
        "steps": num_steps,
        "samples": sizes,
        "foreground_dice": {name: _spread(values) for name, values in found.items()},
    }


def _spread(values: list[float]) -> dict[str, Any]:
    return {
        "mean": statistics.mean(values),
        "least": min(values),
        "most": max(values),
        "by_seed": values,
    }


@click.command()
@click.option("--pictures", help="Folder of real pictures, grouped by source.")
@click.option("--steps", default=400, help="Steps of each training.")
@click.option("--phantoms", default=60, help="Synthetic pictures; 0: none.")
@click.option("--arm", "arms", multiple=True, type=click.Choice(list(ARMS)), help="Only these.")
@click.option("--seeds", default=SEEDS, show_default=True, help="Of the splits and trainings.")
def main(images: str | None, steps: int, phantoms: int, arms: tuple[str, ...], seeds: str) -> None:
    """Prints the foreground Dice and stores it in benchmarks/results/recipe.json.

    What is not measured now stays there as it was.
    """
    path = RESULTS / "recipe.json"
    result: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    setting = {"machine": describe_machine(), "side": SIDE, "network": NETWORK}
    drawn = [int(seed) for seed in seeds.split(",")]
    chosen = arms or tuple(ARMS)
    setting |= {"batch_size": BATCH_SIZE, "seeds": drawn}
    with tempfile.TemporaryDirectory(prefix="flexunet-recipe-") as folder:
        if phantoms:
            source = f"{folder}/phantoms/source"
            write_phantoms(source, num_images=phantoms, size=SIDE, seed=1)
            regex = {"group_regex": "phantom-p[0-9]+"}
            found = compared(f"{folder}/phantoms", source, steps, chosen, drawn, **regex)
            result[f"phantoms, {steps} steps"] = {**setting, **found}
        if images is not None:
            place, preset = f"{folder}/pictures", {"group_preset": "augmented"}
            found = compared(place, images, steps, chosen, drawn, **preset)
            result[f"pictures, {steps} steps"] = {**setting, **found}
    write_result("recipe", result)


if __name__ == "__main__":
    main()
