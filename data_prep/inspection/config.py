"""Defines the options of `inspect`: those of `prep` that select files and say what masks mean."""

from typing import Any, Literal

from data_prep.config import PrepConfig
from data_prep.masks.decision.findings import MaskEncoding
from flexunet.settings import Settings, option

_PREP = PrepConfig.model_fields


def _of_prep(name: str) -> Any:
    return _PREP[name]


_OWN = ("sample", "num_processes")


class InspectConfig(Settings):
    """The options of `inspect`."""

    sample: int = option(
        500,
        "Most images whose regions are measured, evenly spaced by name. All files are read for "
        "everything else.",
        ge=1,
    )
    format: Literal["pairs", "inbreast"] | None = option(
        None,
        "pairs: images and masks; inbreast: the original INbreast release. none: found from the "
        "folders.",
    )
    images: str | None = _of_prep("images")
    masks: str | None = _of_prep("masks")
    field_of_view: str | None = _of_prep("field_of_view")
    image_name: str | None = _of_prep("image_name")
    mask_name: str | None = _of_prep("mask_name")
    missing_mask: Literal["error", "empty"] = _of_prep("missing_mask")
    classes: str | None = _of_prep("classes")
    background: str = _of_prep("background")
    mask_encoding: MaskEncoding = _of_prep("mask_encoding")
    ignore: str | None = _of_prep("ignore")
    group_preset: Literal["augmented"] | None = _of_prep("group_preset")
    group_regex: str | None = _of_prep("group_regex")
    group_csv: str | None = _of_prep("group_csv")
    full_scale: int | None = _of_prep("full_scale")
    max_pixels: int = _of_prep("max_pixels")
    num_processes: int | None = option(
        None,
        "Processes that read files; 1: only this one; none: one per CPU, or one if there are few "
        "files.",
        ge=1,
    )

    @property
    def prep_options(self) -> dict[str, Any]:
        """The given options of `prep`."""
        values = self.model_dump(exclude_unset=True)
        return {
            name: value
            for name, value in values.items()
            if name not in _OWN and value != _default(name)
        }


def _default(name: str) -> Any:
    return None if name == "format" else _PREP[name].default
