"""Masks for a folder of images of any size.

python -m job.infer RUN IMAGES [OUTPUT]
"""

import logging
import posixpath
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import click
import numpy as np

from data_prep.command import SettingsCommand, run_command, settings_options
from data_prep.errors import ContentError, UsageError
from data_prep.image import Geometry, apply_geometry, fit, read_image, undo_geometry
from data_prep.progress import Progress
from data_prep.schema import Manifest
from data_prep.settings import Settings, option, validated
from data_prep.storage import Store, join_url, open_store
from job.history import csv_table

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")


class InferConfig(Settings):
    """Options of `flexunet infer`."""

    batch_size: int = option(8, "Images predicted at once.", ge=1)
    checkpoint: str = option("best", "Weights: best or last.", pattern="^(best|last)$")
    overlays: bool = option(True, "Write contours over the images to OUTPUT/overlays.")
    overwrite: bool = option(False, "Predict again what OUTPUT already has.")
    max_pixels: int = option(100_000_000, "Larger images are refused, pixels.", ge=1)
    progress: bool = option(True, "Show a progress bar on a terminal.")


@dataclass(frozen=True)
class InferResult:
    """What `infer` did."""

    output_url: str
    num_written: int
    num_skipped: int
    unreadable: tuple[tuple[str, str], ...]  # (file, reason)


@dataclass(frozen=True)
class _Picture:
    name: str
    original: np.ndarray  # as read, (H, W, C)
    pixels: np.ndarray  # as the model takes it
    geometry: Geometry


def infer(
    run_url: str, images_url: str, output_url: str | None, config: InferConfig
) -> InferResult:
    """Writes the mask of every image below `images_url`, in the classes' colours, at its own size.

    What `output_url` already has is skipped, so that a stopped call continues. Images that cannot
    be read are listed in `unreadable.csv`.

    Raises:
        UsageError: no run, no images, or two images whose masks would have one name.
    """
    from job.runtime import import_tensorflow
    from job.trained import load_trained

    source = open_store(images_url)
    names = find_images(source)
    output = open_store(output_url or join_url(run_url, "inference"))
    done = set() if config.overwrite else {stat.name for stat in output.list()}
    todo = [name for name in names if mask_name(name) not in done]
    unreadable: list[tuple[str, str]] = []
    if todo:
        import_tensorflow()
        from job.step import make_probability_step

        trained = load_trained(run_url, which=config.checkpoint)
        step = make_probability_step(trained.model)
        with Progress("infer", len(todo), shown=config.progress) as progress:
            pictures = _read_pictures(source, todo, trained.manifest, config, unreadable, progress)
            for batch in _batched(pictures, config.batch_size):
                _write_batch(batch, step, trained.manifest, output, config)
                progress.advance(len(batch))
    text = csv_table(["file", "reason"], unreadable)
    if unreadable or output.stat("unreadable.csv") is not None:
        output.put("unreadable.csv", text.encode())
    return InferResult(
        output.url, len(todo) - len(unreadable), len(names) - len(todo), tuple(unreadable)
    )


def find_images(source: Store) -> list[str]:
    """Returns the names of all images below `source`, sorted.

    Raises:
        UsageError: there are none, or two share all but the suffix.
    """
    names = [each.name for each in source.list() if each.name.lower().endswith(IMAGE_SUFFIXES)]
    if not names:
        raise UsageError(
            f"{source.url}: no images here; expected files ending in {', '.join(IMAGE_SUFFIXES)}"
        )
    by_mask: dict[str, str] = {}
    for name in names:
        other = by_mask.setdefault(mask_name(name), name)
        if other != name:
            raise UsageError(
                f"{source.url}: {other} and {name} would both become {mask_name(name)}; rename one"
            )
    return names


def mask_name(image_name: str) -> str:
    """Returns the object name of the mask of `image_name`."""
    return posixpath.splitext(image_name)[0] + ".png"


def to_model_pixels(image: np.ndarray, manifest: Manifest) -> tuple[np.ndarray, Geometry]:
    """Returns `image` (h, w, 1|3) with the dataset's size, channels and range of values.

    An image of another bit depth is rescaled to the dataset's: 8 bit to `value_max`, 16 bit to 8
    by its upper byte.
    """
    geometry = fit(
        *image.shape[:2],
        target_height=manifest.image_height,
        target_width=manifest.image_width,
        kind=manifest.geometry,
    )
    if manifest.bit_depth == 8 and image.dtype == np.uint16:
        image = (image >> 8).astype(np.uint8)
    elif manifest.bit_depth == 16 and image.dtype == np.uint8:
        image = (image.astype(np.uint32) * manifest.value_max // 255).astype(np.uint16)
    if manifest.channels == 1 and image.shape[2] == 3:
        # ITU-R BT.601 luma; equal channels keep their value.
        luma = image.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
        image = np.rint(luma).astype(image.dtype)[..., np.newaxis]
    elif manifest.channels == 3 and image.shape[2] == 1:
        image = np.repeat(image, 3, axis=2)
    pixels = apply_geometry(
        image, geometry, manifest.image_height, manifest.image_width, nearest=False
    )
    return pixels.reshape(manifest.image_height, manifest.image_width, manifest.channels), geometry


def class_ids_at_source(probabilities: np.ndarray, geometry: Geometry) -> np.ndarray:
    """Returns the mask at the image's own size: (h, w) uint8.

    Probabilities are enlarged before the class is chosen, so that contours stay smooth.

    Args:
        probabilities: (H, W, K) float32 at the model's size; K = 1 is a sigmoid output.
    """
    full = undo_geometry(probabilities, geometry, nearest=False)
    if probabilities.shape[-1] == 1:
        return (full.reshape(full.shape[:2]) > 0.5).astype(np.uint8)
    return np.argmax(full, axis=-1).astype(np.uint8)


def _read_pictures(
    source: Store,
    names: Sequence[str],
    manifest: Manifest,
    config: InferConfig,
    unreadable: list[tuple[str, str]],
    progress: Progress,
) -> Iterator[_Picture]:
    """Yields the pictures in order, decoded two batches ahead of the network."""

    def read(name: str) -> _Picture | ContentError:
        try:
            image = read_image(source.get(name), name=name, max_pixels=config.max_pixels)
        except ContentError as error:
            return error
        return _Picture(name, image, *to_model_pixels(image, manifest))

    with ThreadPoolExecutor(2, "read") as pool:
        ahead = 2 * config.batch_size
        futures = [pool.submit(read, name) for name in names[:ahead]]
        for index, name in enumerate(names):
            picture = futures[index].result()
            futures[index] = None  # type: ignore[call-overload] # frees the picture
            if index + ahead < len(names):
                futures.append(pool.submit(read, names[index + ahead]))
            if isinstance(picture, ContentError):
                unreadable.append((name, str(picture)))
                progress.advance()
            else:
                yield picture


def _batched(pictures: Iterable[_Picture], size: int) -> Iterator[list[_Picture]]:
    batch: list[_Picture] = []
    for picture in pictures:
        batch.append(picture)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _write_batch(
    batch: Sequence[_Picture],
    step: Callable[[np.ndarray], Any],
    manifest: Manifest,
    output: Store,
    config: InferConfig,
) -> None:
    from job import plots

    # The last batch is filled up: one shape, one compilation.
    pixels = np.stack([picture.pixels for picture in batch])
    missing = config.batch_size - len(batch)
    filled = np.concatenate([pixels, np.repeat(pixels[:1], missing, axis=0)])
    probabilities = step(filled).numpy()
    classes = manifest.classes
    for picture, probability in zip(batch, probabilities[: len(batch)], strict=True):
        ids = class_ids_at_source(probability, picture.geometry)
        name = mask_name(picture.name)
        if config.overlays:
            output.put(f"overlays/{name}", plots.overlay_png(picture.original, ids, classes))
        # The mask last: it is what a continued call looks for.
        output.put(name, plots.mask_png(ids, classes))


@click.command(cls=SettingsCommand)
@click.argument("run")
@click.argument("images")
@click.argument("output", required=False)
@settings_options(InferConfig)
def command(run: str, images: str, output: str | None, **options: Any) -> int:
    """Predict masks for the images in a folder or bucket prefix.

    RUN is the folder or gs:// URL of a run (RUNS/NAME), IMAGES a folder of images of any size,
    OUTPUT a folder or gs:// URL (default: RUN/inference).
    """
    from data_prep.command import given

    config = validated(InferConfig, given(options), "options")
    result = infer(run, images, output, config)
    click.echo(
        f"masks: {result.output_url} ({result.num_written} written, {result.num_skipped} kept)"
    )
    if result.unreadable:
        raise ContentError(
            f"{len(result.unreadable)} of the images could not be read, first "
            f"{result.unreadable[0][1]}; see {result.output_url}/unreadable.csv"
        )
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return run_command(command, argv, "flexunet infer")


if __name__ == "__main__":
    raise SystemExit(main())
