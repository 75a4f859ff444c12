"""Compares the presets recipe and reference: same network, images and number of steps.

python benchmarks/recipe.py [--images FOLDER]

FOLDER has images/ and masks/ with file names that end in the number of their source, as for
--group-preset augmented. Each seed sets the splits and the training; both presets use the same
seeds.
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

# Small enough for two cores. The INbreast network of the reference implementation
# (TensorFlow-FlexUNet) has 512 x 512 pixels and 8 levels.
SIDE = 64
NETWORK = {"num_layers": 4, "base_filters": 8, "base_kernels": (5, 5)}
BATCH_SIZE = 2
SEEDS = "0,1,2"
ARMS: dict[str, dict[str, Any]] = {
    "reference": {"preset": "reference"},
    # Shows the effect of the learning rate alone.
    "reference, rate of the recipe": {
        "preset": "reference",
        "optimizer": {"learning_rate": 1e-3},
    },
    "recipe": {"preset": "recipe"},
}


def prepared(folder: str, source: str, seed: int, **groups: str) -> str:
    """Returns the URL of a dataset with splits drawn from `seed`."""
    url = f"{folder}/dataset-{seed}"
    fractions = (0.6, 0.2, 0.2)
    config = PrepConfig(image_size=SIDE, fractions=fractions, seed=seed, num_processes=1, **groups)
    prepare(find_sources(source), url, config, progress=False)
    return url


def trained(data: str, num_steps: int, seed: int, arm: dict[str, Any]) -> float:
    """Returns the test foreground Dice of the best epoch after about `num_steps` steps.

    The loop is that of `flexunet train`, without tables, prediction images and checkpoints.
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
        # No early stopping: the same number of steps for all.
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
            numbers = trainer.validate(state, lambda: False)
            assert numbers is not None
            trainer.finish_epoch(state, numbers, images_per_s=0.0)
            if state.best and state.best["epoch"] == numbers.row["epoch"]:
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
    """Returns the test foreground Dice for each arm and seed."""
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
@click.option("--images", help="Folder of real images, grouped by source.")
@click.option("--steps", default=400, help="Steps per training.")
@click.option("--phantoms", default=60, help="Synthetic images; 0: none.")
@click.option(
    "--arm", "arms", multiple=True, type=click.Choice(list(ARMS)), help="Train only these."
)
@click.option("--seeds", default=SEEDS, show_default=True, help="Seeds of splits and training.")
def main(images: str | None, steps: int, phantoms: int, arms: tuple[str, ...], seeds: str) -> None:
    """Print the foreground Dice and store it in benchmarks/results/recipe.json.

    Keeps the results in that file that are not measured now.
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
