"""The `flexunet` command: one group over the commands of the other rooms.

A command's module is imported when the command is named, so that `flexunet --help` answers at once.
"""

import importlib
from collections.abc import Sequence

import click

from data_prep.command import MAX_WIDTH, run_command
from data_prep.settings import suggestion

# name -> (module with `command`, line for the list of commands)
COMMANDS = {
    "prep": ("data_prep.prep", "Images and masks into a dataset of TFRecord shards."),
    "train": ("job.train", "Train on a dataset, then evaluate; the same command resumes."),
    "evaluate": ("job.evaluate", "Evaluate a run on one split of its dataset."),
    "infer": ("job.infer", "Predict masks for a folder of images."),
    "doctor": ("job.doctor", "What this machine has and lacks."),
}


EXIT_CODES = {
    0: "done",
    1: "an error of unknown kind; a retry may help",
    2: "wrong option or config; missing or empty source",
    3: "a file that cannot be read, or contradicts another",
    4: "another process owns the run",
    5: "storage unavailable, unwritable or full; a retry may help",
    6: "stopped; the same command continues",
    7: "training diverged: the loss became NaN or infinite",
}


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(COMMANDS[name][0]).command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in COMMANDS and not name.startswith("-"):
            raise click.UsageError(f"no command {name!r}; {suggestion(name, list(COMMANDS))}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])
        with formatter.section("Exit codes"):
            formatter.write_dl([(str(code), text) for code, text in EXIT_CODES.items()])


@click.group(cls=_LazyGroup, context_settings={"max_content_width": MAX_WIDTH})
@click.version_option(package_name="flexunet")
def command() -> None:
    """Train image segmentation with TensorFlow, from a laptop to a cluster.

    Each command answers `flexunet COMMAND --help` with all its options.
    """


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return run_command(command, argv, "flexunet")


if __name__ == "__main__":
    raise SystemExit(main())
