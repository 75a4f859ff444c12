"""Runs the command that writes phantoms: python -m data_prep.phantoms FOLDER.

python -m data_prep.phantoms FOLDER --num-images 100
python -m data_prep.phantoms FOLDER --format inbreast --num-patients 115
"""

from collections.abc import Sequence

import click

from data_prep.phantoms.images import MIN_SIZE, write_phantoms
from data_prep.phantoms.inbreast_release import NUM_PATIENTS, write_release
from flexunet.cli.options import PATH
from flexunet.cli.runner import run_command
from flexunet.errors import UsageError
from flexunet.storage import open_store


@click.command()
@click.argument("folder", type=PATH)
@click.option("--format", "kind", default="pairs", show_default=True,
              type=click.Choice(["pairs", "inbreast"]),
              help="pairs: images/ and masks/; inbreast: DICOM files and annotations as in the "
                   "INbreast release.")  # fmt: skip
@click.option("--num-images", type=click.IntRange(min=1),
              help="Number of images. [default: 100; inbreast: 2 or 4 per patient]")  # fmt: skip
@click.option("--size", default=512, show_default=True, type=click.IntRange(min=MIN_SIZE),
              help="Side of each image, pixels; inbreast: height of the largest.")  # fmt: skip
@click.option("--seed", default=1, show_default=True, type=click.IntRange(min=0),
              help="Random seed; the same seed gives the same images.")  # fmt: skip
@click.option("--num-patients", type=click.IntRange(min=1),
              help="Number of patients. File names contain the patient: phantom-p007-1.png. "
                   "[default: one per image; inbreast: 115]")  # fmt: skip
def command(
    folder: str,
    kind: str,
    num_images: int | None,
    size: int,
    seed: int,
    num_patients: int | None,
) -> None:
    """Write synthetic mammograms to FOLDER/images and their masks to FOLDER/masks.

    With --format inbreast, write them to FOLDER/AllDICOMs and annotations to FOLDER/AllXML.
    """
    if kind == "inbreast":
        if num_images is not None:
            raise UsageError("--num-images: not for --format inbreast; give --num-patients instead")
        count = write_release(folder, num_patients or NUM_PATIENTS, size, seed)
        click.echo(f"{count} phantoms as an INbreast release in {open_store(folder).url}")
        return
    num_images = num_images or 100
    write_phantoms(folder, num_images, size, seed, num_patients=num_patients)
    click.echo(f"{num_images} phantoms of {size}x{size} pixels in {open_store(folder).url}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return run_command(command, argv, "python -m data_prep.phantoms")
