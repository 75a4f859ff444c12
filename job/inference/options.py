"""Defines the options of all commands that predict, and those of `flexunet infer`."""

from typing import Literal

from pydantic import field_validator

from flexunet.settings import Settings, option
from job.models.flips import Flips


class PredictConfig(Settings):
    """The prediction options that `evaluate` and `infer` share."""

    checkpoint: Literal["best", "last"] = option(
        "best", "Checkpoint to use. best: lowest validation loss; last: newest."
    )
    ensemble: tuple[str, ...] = option(
        (), "More runs, separated by commas: the mean of all probabilities is used.", path=True
    )
    flips: Flips = option(
        "none", "Also predict mirrored images and use the mean of the probabilities."
    )
    overlap: int | None = option(
        None,
        "Minimum overlap of prediction windows, pixels; none: window_overlap of the run, or half a "
        "window.",
        ge=0,
    )
    threshold: tuple[float, ...] | None = option(
        None,
        "Probability from which a class is predicted: one number, or one for each class but the "
        "background. none: as fitted after training, else 0.5.",
    )
    min_region: tuple[int, ...] | None = option(
        None,
        "Smallest predicted region, pixels at network size: one number, or one for each class but "
        "the background; smaller ones are removed. none: as fitted after training, else 0.",
    )
    temperature: float | None = option(
        None,
        "Divide logits by this number before probabilities are written or their calibration is "
        "measured; masks stay the same. none: as fitted after training, else 1.",
        gt=0,
        le=100,
    )
    needs_gpu: bool = option(False, "End with an error if no GPU is found. Off: use the CPUs then.")

    @field_validator("threshold")
    @classmethod
    def _is_probability(cls, values: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if values is not None and not (values and min(values) > 0 and max(values) < 1):
            raise ValueError(f"{values}: give one or more numbers above 0 and below 1")
        return values

    @field_validator("min_region")
    @classmethod
    def _is_size(cls, values: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if values is not None and not (values and min(values) >= 0):
            raise ValueError(f"{values}: give one or more numbers of pixels, each 0 or more")
        return values


class ImageConfig(PredictConfig):
    """The options that `infer` and `Run.predict` share for images of any size."""

    batch_size: int = option(8, "Images or windows per batch.", ge=1)
    window: Literal["auto", "sliding"] = option(
        "auto",
        "sliding: predict images at original size, in overlapping windows of network size; auto: "
        "sliding if the run was trained on tiles, else resize images as in training.",
    )
    small_regions: str | None = option(
        None,
        "Evaluation (folder or gs:// URL) made with --remove-small-regions: remove predicted "
        "regions below its sizes.",
        path=True,
    )
    full_scale: int | None = option(
        None,
        "Raw value of full intensity of 16-bit images; files that record it, such as DICOM, use "
        "their own. none: that of the run's dataset.",
        ge=255,
        le=65535,
    )
    max_pixels: int = option(
        100_000_000, "Largest allowed image, pixels; larger ones are refused.", ge=1
    )


ProbabilityFormat = Literal["none", "tiff", "float16", "float32"]


class InferConfig(ImageConfig):
    """Options of `flexunet infer`."""

    probabilities: ProbabilityFormat = option(
        "none",
        "Also write the probabilities of each image to OUTPUT/probabilities, at its own size. "
        "tiff: 16 bits, a page for each class, 65535 is probability 1; float16, float32: .npy "
        "(h, w, classes). Needs memory for all classes of an image.",
    )
    overlays: bool = option(True, "Write the images with contours of the masks to OUTPUT/overlays.")
    overwrite: bool = option(False, "Predict again the masks that OUTPUT already has.")
    progress: bool = option(True, "Show a progress bar on a terminal.")
