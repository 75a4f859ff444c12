"""Options of prediction: those of every command that predicts, and of `flexunet infer`."""

from typing import Literal

from flexunet.settings import Settings, option
from job.models.flips import Flips


class PredictConfig(Settings):
    """How pictures are predicted; what `evaluate` and `infer` have in common."""

    checkpoint: Literal["best", "last"] = option("best", "Weights.")
    ensemble: tuple[str, ...] = option(
        (), "More runs, separated by commas: the mean of all their probabilities counts.", path=True
    )
    flips: Flips = option(
        "none", "Mirrored pictures that are predicted too; the mean of the probabilities counts."
    )
    overlap: int | None = option(
        None,
        "Pixels by which windows overlap at least, where pictures are predicted in windows; unset: "
        "the run's window_overlap, or half a window.",
        ge=0,
    )
    needs_gpu: bool = option(False, "Refuse a machine without a GPU instead of using its CPUs.")


class ImageConfig(PredictConfig):
    """How images of any size are predicted; what `infer` and `Run.predict` have in common."""

    batch_size: int = option(8, "Images, or windows, predicted at once.", ge=1)
    window: Literal["auto", "sliding"] = option(
        "auto",
        "sliding: predict pictures at their own size, in overlapping windows of the network's; "
        "auto: do so where the run was trained on tiles, else resize them as for training.",
    )
    small_regions: str | None = option(
        None,
        "Evaluation (folder or gs:// URL) made with --remove-small-regions: predict no regions "
        "below its sizes.",
        path=True,
    )
    full_scale: int | None = option(
        None,
        "Raw value of full intensity of 16-bit images whose files do not say it, as DICOM files "
        "do; unset: the dataset's of the run.",
        ge=255,
        le=65535,
    )
    max_pixels: int = option(100_000_000, "Larger images are refused, pixels.", ge=1)


class InferConfig(ImageConfig):
    """Options of `flexunet infer`."""

    overlays: bool = option(True, "Write contours over the images to OUTPUT/overlays.")
    overwrite: bool = option(False, "Predict again what OUTPUT already has.")
    progress: bool = option(True, "Show a progress bar on a terminal.")
