"""The options of augmentation, and its presets."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import model_validator

from flexunet.settings import Settings, option

# Defaults of the other options of augmentation. The amounts of "strong" are about those with which
# nnU-Net trains 2D networks (Isensee et al. 2021, doi:10.1038/s41592-020-01008-z).
AUGMENTATION_PRESETS: dict[str, dict[str, Any]] = {
    "light": {
        "enabled": True,
        "border": "mirror",
        "shrink_probability": 0.0,
        "scale_probability": 0.2,
        "scale_range": (0.85, 1.2),
        "contrast_probability": 0.15,
        "gamma_probability": 0.15,
        "gamma_range": (0.8, 1.25),
    },
    "strong": {
        "enabled": True,
        "border": "mirror",
        "shrink_probability": 0.0,
        "rotation_angles": tuple(float(angle) for angle in range(15, 360, 15)),
        "deformation_probability": 0.2,
        "scale_probability": 0.3,
        "crop_probability": 0.2,
        "contrast_probability": 0.3,
        "gamma_probability": 0.3,
        "blur_probability": 0.15,
        "noise_probability": 0.15,
    },
}


def _probability(default: float, what: str) -> float:
    text = f"Probability that a sample is {what}."
    return option(default, text, ge=0, le=1)


class AugmentationConfig(Settings):
    """Random changes of training samples, drawn anew in every epoch; lengths in pixels."""

    preset: Literal["light", "strong"] | None = option(
        None,
        "Switch augmentation on with a set of defaults for its other options. light: flips, "
        "quarter turns, small changes of size and light. strong: also turns by any multiple of 15 "
        "degrees, elastic deformation, crops, blur and noise; for few images. none: the defaults "
        "of the single options.",
    )
    enabled: bool = option(False, "Augment training samples.")
    border: Literal["black", "mirror"] = option(
        "black",
        "Pixels from outside of the image after a rotation, shear or shrink. black: 0, of class 0. "
        "mirror: image and mask continue as in a mirror.",
    )
    hflip_probability: float = _probability(0.5, "mirrored left to right")
    vflip_probability: float = _probability(0.5, "mirrored top to bottom")
    rotation_probability: float = _probability(0.5, "rotated about its centre")
    rotation_angles: tuple[float, ...] = option(
        (90.0, 180.0, 270.0), "Angles to choose from, in degrees anticlockwise."
    )
    shrink_probability: float = _probability(0.25, "shrunk towards its centre")
    shrink_ratios: tuple[float, ...] = option((0.8,), "Ratios to choose from: new side / old side.")
    shear_probability: float = _probability(0.0, "sheared sideways")
    shear_factors: tuple[float, ...] = option(
        (-0.1, 0.1), "Ratios to choose from: sideways shift / distance from the middle row."
    )
    deformation_probability: float = _probability(0.0, "deformed elastically")
    deformation_alpha: float = option(
        1300.0,
        "Strength (alpha) of the elastic deformation; 1300 with sigma 8 gives shifts of 2.3 pixels "
        "rms.",
        ge=0,
    )
    deformation_sigmas: tuple[float, ...] = option(
        (8.0,),
        "Standard deviations (sigma), pixels, of the Gaussian that smooths the deformation; one is "
        "drawn.",
    )
    distortion_probability: float = _probability(0.0, "distorted by a smooth random field")
    distortion_sigma: float = option(
        40.0, "Standard deviation (sigma), pixels, of the Gaussian that smooths the field.", ge=1
    )
    distortion_sizes: tuple[float, ...] = option(
        (0.02,), "Ratios to choose from: largest shift / longer side of the image."
    )
    barrel_probability: float = _probability(0.0, "given a barrel distortion")
    barrel_radius: float = option(0.5, "Radius of the circle / image width.", gt=0)
    barrel_amount: float = option(0.5, "Strength, above 0.", gt=0, le=4)
    barrel_centers: tuple[float, ...] = option(
        (0.5, 0.5), "Centres x,y,x,y,... to choose from; x / image width, y / image height."
    )
    pincushion_probability: float = _probability(0.0, "given a pincushion distortion")
    pincushion_radius: float = option(0.5, "Radius of the circle / image width.", gt=0)
    pincushion_amount: float = option(-0.5, "Strength, between -1 and 0.", gt=-1, lt=0)
    pincushion_centers: tuple[float, ...] = option(
        (0.5, 0.5), "Centres x,y,x,y,... to choose from; x / image width, y / image height."
    )
    sharpening_probability: float = _probability(0.0, "sharpened")
    sharpening_k: float = option(
        1.0, "Strength k: the 3x3 kernel has 1 + 8k in its middle and -k around it.", ge=0
    )
    brightening_probability: float = _probability(0.0, "brightened")
    brightening_alpha: float = option(1.2, "Factor of the pixel values.", gt=0)
    brightening_beta: float = option(10.0, "Added to the pixel values; 255 is full scale.")

    scale_probability: float = _probability(0.0, "made larger or smaller about a random point")
    scale_range: tuple[float, float] = option(
        (0.7, 1.4),
        "Smallest and largest ratio: new side / old side. Beyond its border the image continues as "
        "in a mirror.",
    )
    crop_probability: float = _probability(0.0, "cropped, and the crop resized to the whole")
    crop_range: tuple[float, float] = option(
        (0.5, 1.0), "Smallest and largest area of a crop / area of the image."
    )
    crop_aspects: tuple[float, float] = option(
        (0.75, 1.333), "Smallest and largest ratio of width to height; 1: that of the image."
    )
    contrast_probability: float = _probability(0.0, "changed in contrast")
    contrast_range: tuple[float, float] = option(
        (0.75, 1.25), "Smallest and largest factor of the distances from a channel's mean."
    )
    gamma_probability: float = _probability(0.0, "changed in gamma")
    gamma_range: tuple[float, float] = option(
        (0.7, 1.5), "Smallest and largest exponent of pixel value / full scale; above 1: darker."
    )
    blur_probability: float = _probability(0.0, "blurred")
    blur_range: tuple[float, float] = option(
        (0.5, 1.0), "Smallest and largest standard deviation of the Gaussian, pixels."
    )
    noise_probability: float = _probability(0.0, "given noise, independent for each pixel")
    noise_range: tuple[float, float] = option(
        (0.0, 0.05), "Smallest and largest standard deviation of the noise / full scale."
    )

    @model_validator(mode="before")
    @classmethod
    def _over_preset(cls, values: Any) -> Any:
        """Merges the explicit options over those of the preset."""
        if not isinstance(values, Mapping):
            return values
        return {**AUGMENTATION_PRESETS.get(str(values.get("preset")), {}), **values}

    @model_validator(mode="after")
    def _choices_are_possible(self) -> "AugmentationConfig":
        for name in ("rotation_angles", "shear_factors", "shrink_ratios"):
            if not getattr(self, name):
                raise ValueError(
                    f"{name} is empty; to switch this augmentation off, set its probability to 0"
                )
        for name in ("shrink_ratios", "deformation_sigmas", "distortion_sizes"):
            values = getattr(self, name)
            if not values or min(values) <= 0:
                raise ValueError(f"{name}={values}: give one or more numbers above 0")
        for name in ("barrel_centers", "pincushion_centers"):
            values = getattr(self, name)
            if not values or len(values) % 2:
                raise ValueError(f"{name}={values}: give pairs x,y")
        self._check_ranges()
        return self

    def _check_ranges(self) -> None:
        for name in ("scale", "crop", "contrast", "gamma", "blur", "noise"):
            low, high = getattr(self, f"{name}_range")
            may_be_zero = name in ("contrast", "blur", "noise")
            if low > high or low < 0 or not (low or may_be_zero):
                least = "0 or more" if may_be_zero else "above 0"
                raise ValueError(
                    f"{name}_range={(low, high)}: give two numbers, {least}, the smaller one first"
                )
        low, high = self.crop_aspects
        if not 0 < low <= high:
            raise ValueError(
                f"crop_aspects={(low, high)}: give two numbers above 0, the smaller one first"
            )
        if self.crop_range[1] > 1:
            raise ValueError(f"crop_range={self.crop_range}: a crop has at most the whole area, 1")
