"""Defines the options of `flexunet export`."""

from typing import Literal

from flexunet.settings import Settings, option

Format = Literal["savedmodel", "keras", "onnx"]


class ExportConfig(Settings):
    """Options of `flexunet export`."""

    format: tuple[Format, ...] = option(
        ("savedmodel",),
        "Formats, separated by commas: savedmodel, for TensorFlow; keras, one .keras file; onnx, "
        "which needs the extra flexunet[onnx].",
        min_length=1,
    )
    checkpoint: Literal["best", "last"] = option(
        "best", "Checkpoint to export. best: lowest validation loss; last: newest."
    )
    ensemble: tuple[str, ...] = option(
        (), "More runs, separated by commas: the export computes the mean of all.", path=True
    )
    data: str | None = option(
        None,
        "Folder or URL of the dataset with the images of the check, if it was moved after "
        "training; none: not moved. If it is gone, generated images are used.",
        path=True,
    )
    licence: str | None = option(
        None, "Licence of the weights, for the model card; none: the card says that it is open."
    )
    intended_use: str | None = option(
        None, "Sentence on the intended use, for the model card; none: research on such images."
    )
    overwrite: bool = option(False, "Replace an export that OUTPUT already has.")
    progress: bool = option(True, "Show on a terminal what is being written.")
