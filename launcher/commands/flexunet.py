"""The `flexunet` command: one group over the commands of the other rooms.

Knows their names alone; what a command does and takes is in its module.
"""

import click

from launcher.commands.group import LazyGroup

_HERE = "launcher.commands"

# name -> (module with `command`, line for the list of commands)
COMMANDS = {
    "prep": ("data_prep.cli", "Images and masks into a dataset of TFRecord shards."),
    "train": ("job.train", "Train on a dataset, then evaluate; the same command resumes."),
    "evaluate": ("job.evaluate", "Evaluate a run on one split of its dataset."),
    "report": ("job.report", "One page about a run: metrics, cases, curves, what failed."),
    "infer": ("job.infer", "Predict masks for a folder of images."),
    "launch": (f"{_HERE}.launch", "Prepare, train or infer on a Ray cluster."),
    "submit": (
        f"{_HERE}.submit",
        "Hand one of these commands to a Ray cluster, through Ray Jobs.",
    ),
    "status": (f"{_HERE}.status", "How the submitted jobs are."),
    "logs": (f"{_HERE}.logs", "What a submitted job has written."),
    "stop": (f"{_HERE}.stop", "Stop a submitted job, which stores a checkpoint first."),
    "doctor": ("job.doctor", "What this machine has and lacks."),
}


@click.group(cls=LazyGroup, members=COMMANDS)
@click.version_option(package_name="flexunet")
def command() -> None:
    """Train image segmentation with TensorFlow, from a laptop to a cluster.

    Each command answers `flexunet COMMAND --help` with all its options.
    """
