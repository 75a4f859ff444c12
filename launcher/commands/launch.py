"""The commands that run on a Ray cluster: `flexunet launch prep`, `train` and `infer`.

`flexunet launch COMMAND` is the same as `python -m launcher COMMAND`.
"""

from collections.abc import Sequence

import click

from flexunet.cli.runner import run_command
from launcher.commands.group import LazyGroup

COMMANDS = {
    "prep": (
        "launcher.commands.prep",
        "Convert images and masks into a dataset, on a Ray cluster.",
    ),
    "train": (
        "launcher.commands.train",
        "Train on the GPUs or CPUs of a Ray cluster, then evaluate.",
    ),
    "infer": ("launcher.commands.infer", "Predict masks for a folder of images, on a Ray cluster."),
}


@click.group(cls=LazyGroup, members=COMMANDS)
def command() -> None:
    """Run a command on a Ray cluster; the results are the same as on one machine.

    The cluster is the one of --address, else of RAY_ADDRESS. Without both, a local Ray starts and
    ends with the command.
    """


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return run_command(command, argv, "flexunet launch")
