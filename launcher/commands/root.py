"""The `flexunet` command: one group with the commands of all packages.

This module has only their names; the behaviour and options of a command are in its own module.
"""

import click

from launcher.commands.group import LazyGroup

# name -> (module with `command`, line for the list of commands)
COMMANDS = {
    "inspect": (
        "data_prep.inspection.cli",
        "Examine images and masks, and propose the prep command for them.",
    ),
    "prep": ("data_prep.cli", "Convert images and masks into a dataset of TFRecord shards."),
    "plan": ("job.plan", "Show the options that a new run on a dataset would get, and why."),
    "train": ("job.train", "Train on a dataset, then evaluate; the same command resumes."),
    "evaluate": ("job.evaluate", "Evaluate a run on one split of its dataset."),
    "report": ("job.report", "Write a report on a run: metrics, cases, curves, failures."),
    "compare": ("job.compare", "Compare runs on the same cases: differences, curves, options."),
    "infer": ("job.infer", "Predict masks for a folder of images."),
    "export": ("job.export", "Export a run as SavedModel, .keras or ONNX, with a model card."),
    "launch": ("launcher.commands.launch", "Prepare, train or infer on a Ray cluster."),
    "submit": (
        "launcher.commands.submit",
        "Submit one of these commands to a Ray cluster, with Ray Jobs.",
    ),
    "status": ("launcher.commands.status", "Show submitted jobs."),
    "logs": ("launcher.commands.logs", "Show the output of a submitted job."),
    "stop": ("launcher.commands.stop", "Stop a submitted job; training stores a checkpoint first."),
    "doctor": ("job.doctor", "Check this machine: GPU, precision, disk, bucket access."),
}


@click.group(cls=LazyGroup, members=COMMANDS)
@click.version_option(package_name="flexunet")
def command() -> None:
    """Train image segmentation with TensorFlow, from a laptop to a cluster.

    `flexunet COMMAND --help` shows all options of a command.
    """
