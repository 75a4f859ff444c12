"""Runs the `inspect` command: reads its options, prints the findings and writes them.

flexunet inspect SOURCE
"""

import json
from collections.abc import Sequence
from typing import Any

import click

from data_prep.inspection.config import InspectConfig
from data_prep.inspection.output import (
    CONTACT_SHEET_NAME,
    JSON_NAME,
    output_store,
    write_findings,
)
from data_prep.inspection.pipeline import inspect_source
from flexunet.cli.interrupts import quiet_interrupts
from flexunet.cli.options import PATH, SettingsCommand, from_options, settings_options
from flexunet.cli.runner import run_command


@click.command("inspect", cls=SettingsCommand)
@click.argument("source", type=PATH)
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON, for programs.")
@click.option(
    "--output",
    type=PATH,
    metavar="PATH",
    help="Folder or gs:// URL for inspect.json and the contact sheet inspect.png, not in SOURCE. "
    "[default: inspect-NAME in the current folder, with the name of SOURCE]",
)
@settings_options(InspectConfig)
def command(source: str, as_json: bool, output: str | None, **options: Any) -> int:
    """Examine the images and masks of SOURCE, and propose the `prep` command for them.

    Shows folders, sizes, values of the masks, possible groups, equal images and region sizes.
    SOURCE is a folder or a gs:// URL; nothing is written into it. Exit code 2: something is not
    found or has several readings; 3: some files are bad.
    """
    config = from_options(InspectConfig, options)
    with quiet_interrupts():
        return run(source, output, config, as_json=as_json)


def run(source: str, output: str | None, config: InspectConfig, *, as_json: bool = False) -> int:
    """Inspects `source`, prints and writes the findings, and returns the exit code.

    Raises:
        UsageError: the source does not exist, an option is wrong, or the output is in the source.
        StorageError: the source cannot be read, or the output cannot be written.
    """
    store = output_store(source, output)
    inspection, sheet = inspect_source(source, config, with_contact_sheet=True)
    # The findings are shown first: writing them may fail.
    if as_json:
        click.echo(json.dumps(inspection.as_json(), indent=2))
    else:
        from data_prep.inspection.tables import print_inspection

        print_inspection(inspection)
    write_findings(store, inspection, sheet)
    if not as_json:
        names = [JSON_NAME, *([CONTACT_SHEET_NAME] if sheet else [])]
        click.echo(f"\nwritten to {store.url}: {', '.join(names)}")
    return inspection.exit_code


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return run_command(command, argv, "flexunet inspect")
