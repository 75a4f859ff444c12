"""The `flexunet` command: one group over the commands of the other rooms.

A command's module is imported when the command is named, so that `flexunet --help` answers at once.
"""

import importlib
from collections.abc import Sequence

import click

from data_prep.command import run_command

# name -> (module with `command`, line for the list of commands)
COMMANDS = {
    "prep": ("data_prep.prep", "Images and masks into a dataset of TFRecord shards."),
    "train": ("job.train", "Train on a dataset, then evaluate; the same command resumes."),
    "evaluate": ("job.evaluate", "Evaluate a run on one split of its dataset."),
    "infer": ("job.infer", "Predict masks for a folder of images."),
    "doctor": ("job.doctor", "What this machine has and lacks."),
}


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(COMMANDS[name][0]).command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=_LazyGroup)
@click.version_option(package_name="flexunet")
def command() -> None:
    """Train image segmentation with TensorFlow, from a laptop to a cluster.

    Exit codes: 0 done; 1 unknown error; 2 wrong option, config or source; 3 unreadable or
    inconsistent content; 4 run owned by another process; 5 storage unavailable, unwritable or
    full; 6 stopped, the same command resumes; 7 training diverged.
    """


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return run_command(command, argv, "flexunet")


if __name__ == "__main__":
    raise SystemExit(main())
