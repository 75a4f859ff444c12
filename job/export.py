"""Provides the command that exports a run for programs that do not have this package.

python -m job.export RUN OUTPUT --format savedmodel,onnx
"""

from collections.abc import Sequence
from typing import Any

import click

from flexunet.cli.interrupts import quiet_interrupts
from flexunet.cli.options import PATH, SettingsCommand, from_options, settings_options
from flexunet.cli.runner import run_command
from flexunet.storage import join_url
from job.exporting.options import ExportConfig
from job.exporting.output import CARD_NAME, METADATA_NAME
from job.exporting.pipeline import export


@click.command(cls=SettingsCommand)
@click.argument("run", type=PATH)
@click.argument("output", type=PATH)
@settings_options(ExportConfig)
def command(run: str, output: str, **options: Any) -> int:
    """Export a run as SavedModel, .keras or ONNX, for programs without FlexUNet.

    RUN is the folder or gs:// URL of a run (RUNS/NAME), or of a cross-validation, whose folds
    become one model. OUTPUT is a new folder or gs:// URL. The model takes pixels as an image file
    has them, in batches of any size, and returns probabilities and class ids. Writes metadata.json
    (what callers must do: resize, windows, small regions) and MODEL_CARD.md, too.

    Every file is checked: it must compute what infer computes on samples of the dataset. If a check
    fails, nothing is written, and the exit code is 3.
    """
    config = from_options(ExportConfig, options)
    with quiet_interrupts():
        result = export(run, output, config)
    for name, path in result.files.items():
        click.echo(f"{name}: {join_url(result.url, path)}")
    for name in (METADATA_NAME, CARD_NAME):
        click.echo(f"also: {join_url(result.url, name)}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return run_command(command, argv, "flexunet export")


if __name__ == "__main__":
    raise SystemExit(main())
