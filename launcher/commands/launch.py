"""The commands that work on many machines: `flexunet launch prep`, `train` and `infer`.

flexunet launch COMMAND        the same as        python -m launcher COMMAND
"""

from collections.abc import Sequence

import click

from flexunet.cli.runner import run_command
from launcher.commands.group import LazyGroup

COMMANDS = {
    "prep": (
        "launcher.commands.prep",
        "Images and masks into a dataset, by tasks on a Ray cluster.",
    ),
    "train": (
        "launcher.commands.train",
        "Train on the GPUs or CPUs of a Ray cluster, then evaluate.",
    ),
    "infer": ("launcher.commands.infer", "Predict masks for a folder of images, on a Ray cluster."),
}


@click.group(cls=LazyGroup, members=COMMANDS)
def command() -> None:
    """Run a command on a Ray cluster, with the results of the same command on one machine.

    The cluster is that of --address, else of RAY_ADDRESS; without both, a Ray of this machine that
    lasts as long as the command.
    """


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return run_command(command, argv, "flexunet launch")
