"""The `flexunet` command: one group over the commands of all packages.

Knows their names alone; what a command does and takes is in its module.
"""

import click

from launcher.commands.group import LazyGroup

# name -> (module with `command`, line for the list of commands)
COMMANDS = {
    "prep": ("data_prep.cli", "Images and masks into a dataset of TFRecord shards."),
    "train": ("job.train", "Train on a dataset, then evaluate; the same command resumes."),
    "evaluate": ("job.evaluate", "Evaluate a run on one split of its dataset."),
    "report": ("job.report", "One page about a run: metrics, cases, curves, what failed."),
    "infer": ("job.infer", "Predict masks for a folder of images."),
    "launch": ("launcher.commands.launch", "Prepare, train or infer on a Ray cluster."),
    "submit": (
        "launcher.commands.submit",
        "Hand one of these commands to a Ray cluster, through Ray Jobs.",
    ),
    "status": ("launcher.commands.status", "How the submitted jobs are."),
    "logs": ("launcher.commands.logs", "What a submitted job has written."),
    "stop": ("launcher.commands.stop", "Stop a submitted job, which stores a checkpoint first."),
    "doctor": ("job.doctor", "What this machine has and lacks."),
}


@click.group(cls=LazyGroup, members=COMMANDS)
@click.version_option(package_name="flexunet")
def command() -> None:
    """Train image segmentation with TensorFlow, from a laptop to a cluster.

    Each command answers `flexunet COMMAND --help` with all its options.
    """
