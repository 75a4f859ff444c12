"""Runs the `prep` command: reads its options, prepares the dataset and prints a summary.

flexunet prep SOURCE OUTPUT        the same as        python -m data_prep SOURCE OUTPUT
"""

import csv
import io
import textwrap
from collections.abc import Sequence
from typing import Any

import click

from data_prep import report_figures
from data_prep.config import PrepConfig
from data_prep.pipeline import prepare_source
from data_prep.shards.manifest import Manifest
from data_prep.sources import inbreast
from flexunet.cli.interrupts import quiet_interrupts
from flexunet.cli.options import PATH, SettingsCommand, explicit_options, settings_options
from flexunet.cli.runner import run_command
from flexunet.process_pool import OpenWorkers
from flexunet.settings import deep_merge, parse_settings, read_text, read_yaml
from flexunet.storage import ObjectStore, open_store

_MIN_WIDTH = 80  # columns of tables, also without a terminal


@click.command("prep", cls=SettingsCommand)
@click.argument("source", type=PATH)
@click.argument("output", type=PATH)
@click.option("--config", "config_file", type=PATH, metavar="FILE", help="YAML file of options.")
@settings_options(PrepConfig)
def command(source: str, output: str, config_file: str | None, **options: Any) -> None:
    """Convert the images and masks of SOURCE into a dataset at OUTPUT.

    SOURCE contains images/ and masks/, or train/, valid/ and test/ with both in each, or folders of
    similar names; with --format inbreast AllDICOMs/ and AllXML/. SOURCE and OUTPUT are folders or
    gs:// URLs. After an interruption, run the same command again to continue.
    """
    config = read_config(config_file, options)
    with quiet_interrupts():
        run(source, output, config)


def read_config(config_file: str | None, options: dict[str, Any]) -> PrepConfig:
    """Returns the options of the YAML file, overridden by those of the command line.

    Args:
        options: the values of the options made by `settings_options`, as click passes them.

    Raises:
        UsageError: the file cannot be read, or an option is wrong.
    """
    values: dict[str, Any] = {}
    if config_file:
        values = read_yaml(read_text(config_file, "--config"), config_file)
    where = f"prep options and {config_file}" if config_file else "prep options"
    typed = explicit_options(options)
    return parse_settings(PrepConfig, deep_merge(values, typed), where, typed=typed)


def run(
    source: str, output: str, config: PrepConfig, open_workers: OpenWorkers | None = None
) -> None:
    """Prepares the dataset and prints a summary; see `prepare_source`."""
    manifest = prepare_source(source, output, config, open_workers=open_workers)
    store = open_store(output)
    _print_summary(manifest, store.url)
    if config.format == "inbreast":
        _print_counts(store)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return run_command(command, argv, "flexunet prep")


def _print_summary(manifest: Manifest, url: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("split", "samples", "groups", "shards", "MB", title=f"dataset written to {url}")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, info in manifest.splits.items():
        files = [shard for shard in manifest.shards if shard.split == name]
        size = sum(shard.num_bytes for shard in files) / 1e6
        numbers = (info.num_samples, info.num_groups, len(files))
        table.add_row(name, *(str(number) for number in numbers), f"{size:.1f}")
    console = Console(soft_wrap=True)
    console.print(table)
    sheet = report_figures.contact_sheet_name(next(iter(manifest.splits)))
    console.print(f"check the masks: {url}/{sheet}", markup=False, highlight=False)


def _print_counts(store: ObjectStore) -> None:
    """Prints the findings of the release beside the published numbers."""
    from rich.console import Console
    from rich.table import Table

    rows = list(csv.reader(io.StringIO(store.get(inbreast.COUNTS_NAME).decode())))
    title = "found in the release, and published"
    note = textwrap.fill(inbreast.PUBLISHED_NOTE, _MIN_WIDTH)
    table = Table(*rows[0], title=title, caption=note, caption_justify="left", pad_edge=False)
    for column in table.columns[1:-1]:
        column.justify = "right"
    for row in rows[1:]:
        # The last column may have other words from an earlier version.
        table.add_row(*row[:-1], inbreast.PUBLISHED.get(row[0], ""))
    # A narrow log would wrap the last column.
    Console(soft_wrap=True, width=max(Console().width, _MIN_WIDTH)).print(table)
