"""Provides the command that predicts masks for one image or a folder of images.

python -m job.infer RUN IMAGES [OUTPUT]
"""

from collections.abc import Sequence
from typing import Any

import click

from flexunet.cli.interrupts import quiet_interrupts
from flexunet.cli.options import PATH, SettingsCommand, from_options, settings_options
from flexunet.cli.runner import run_command
from flexunet.errors import ContentError
from flexunet.storage import join_url, open_store
from flexunet.text import legible
from job.inference.inputs import OVERLAYS_FOLDER
from job.inference.options import InferConfig
from job.inference.outputs import PASSED_OVER_NAME, UNREADABLE_NAME
from job.inference.pipeline import InferResult, infer
from job.inference.probability_files import PROBABILITIES_FOLDER


@click.command(cls=SettingsCommand)
@click.argument("run", type=PATH)
@click.argument("images", type=PATH)
@click.argument("output", type=PATH, required=False)
@settings_options(InferConfig)
def command(run: str, images: str, output: str | None, **options: Any) -> int:
    """Predict masks for one image, or for all images in a folder or bucket prefix.

    RUN is the folder or gs:// URL of a run (RUNS/NAME). IMAGES is an image of any size or a folder
    of images. OUTPUT is a new or existing folder or gs:// URL for the masks, outside of IMAGES;
    default: RUN/inference. Writes a mask with the name of each image, overlays/, inference.json,
    inference-images-*.json and, if needed, unreadable.csv and passed_over.csv (files that are not
    images). The same command continues after a stop: it keeps a mask if its image has not changed.
    An OUTPUT with masks of another run, checkpoint or folder of images is refused; --overwrite
    predicts all again. Other files stay.
    """
    config = from_options(InferConfig, options)
    with quiet_interrupts():
        result = infer(run, images, output, config)
    show_result(result, config)
    return 0


def show_result(result: InferResult, config: InferConfig) -> None:
    """Prints where the masks are.

    Raises:
        ContentError: some images could not be read.
    """
    if result.is_file:
        _show_file(result, config)
        return
    kept = f", {result.num_kept} kept (--overwrite predicts them again)" if result.num_kept else ""
    click.echo(f"masks: {result.output_url} ({result.num_written} written{kept})")
    if config.overlays:
        click.echo(f"overlays: {join_url(result.output_url, OVERLAYS_FOLDER)}")
    if config.probabilities != "none":
        click.echo(f"probabilities: {join_url(result.output_url, PROBABILITIES_FOLDER)}")
    if result.passed_over:
        count, first = len(result.passed_over), legible(result.passed_over[0])
        kind = "file that is not an image" if count == 1 else "files that are not images"
        click.echo(f"skipped {count} {kind}, first {first}")
        click.echo(f"  listed in {join_url(result.output_url, PASSED_OVER_NAME)}")
    if result.gone:
        count, first = len(result.gone), legible(result.gone[0])
        masks = "1 mask has" if count == 1 else f"{count} masks have"
        click.echo(f"{masks} no image in IMAGES any more, first {first}; delete if not needed")
    if result.unreadable:
        raise ContentError(
            f"{len(result.unreadable)} of the images could not be read, first "
            f"{result.unreadable[0][1]}; all are in {join_url(result.output_url, UNREADABLE_NAME)}"
        )


def _show_file(result: InferResult, config: InferConfig) -> None:
    if result.unreadable:
        raise ContentError(result.unreadable[0][1])
    (mask,) = result.masks
    kept = " (kept; --overwrite predicts it again)" if result.num_kept else ""
    click.echo(f"mask: {mask}{kept}")
    if config.overlays:
        overlay = f"{OVERLAYS_FOLDER}/{mask.rpartition('/')[2]}"
        # A mask that was kept may be of a call with --no-overlays.
        if not result.num_kept or open_store(result.output_url).stat(overlay) is not None:
            click.echo(f"overlay: {join_url(result.output_url, overlay)}")
    if config.probabilities != "none":
        click.echo(f"probabilities: {join_url(result.output_url, PROBABILITIES_FOLDER)}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return run_command(command, argv, "flexunet infer")


if __name__ == "__main__":
    raise SystemExit(main())
