"""Maps the augmentation keys of reference files to `AugmentationConfig`."""

from typing import NamedTuple

from job.compat.ini_reader import KeyReader, MappedKey, shown
from job.compat.ini_values import boolean, centers, number, numbers, some_numbers


class _Kind(NamedTuple):
    """A kind of augmentation: the key that switches it on, and the keys of its amounts."""

    key: str
    default: bool
    target: str
    probability: float
    amounts: tuple[MappedKey, ...] = ()


def _circle(section: str, name: str, amount: float) -> tuple[MappedKey, ...]:
    return (
        MappedKey(section, ("radius",), number, 0.5, f"augmentation.{name}_radius"),
        MappedKey(section, ("amount",), number, amount, f"augmentation.{name}_amount"),
        MappedKey(section, ("centers",), centers, [(0.5, 0.5)], f"augmentation.{name}_centers"),
    )


# The reference implementation adds a copy of every image for each kind that is on. This package
# changes each sample anew in every epoch, with these probabilities.
_KINDS = (
    _Kind("hflip", True, "hflip", 0.5),
    _Kind("vflip", True, "vflip", 0.5),
    _Kind(
        "rotation",
        True,
        "rotation",
        0.5,
        (
            MappedKey(
                "augmentor",
                ("angles",),
                some_numbers,
                [90, 180, 270],
                "augmentation.rotation_angles",
            ),
        ),
    ),
    _Kind(
        "deformation",
        False,
        "deformation",
        0.25,
        (
            # The code of the reference implementation reads the misspelt key.
            MappedKey(
                "deformation", ("alpah", "alpha"), number, 1300, "augmentation.deformation_alpha"
            ),
            MappedKey(
                "deformation",
                ("sigmoids", "sigmoid"),
                some_numbers,
                [8],
                "augmentation.deformation_sigmas",
            ),
        ),
    ),
    _Kind(
        "distortion",
        False,
        "distortion",
        0.25,
        (
            MappedKey(
                "distortion",
                ("gaussian_filter_rsigma",),
                number,
                40,
                "augmentation.distortion_sigma",
            ),
            MappedKey(
                "distortion",
                ("distortions",),
                some_numbers,
                [0.02],
                "augmentation.distortion_sizes",
            ),
        ),
    ),
    _Kind(
        "sharpening",
        False,
        "sharpening",
        0.25,
        (MappedKey("sharpening", ("k",), number, 1.0, "augmentation.sharpening_k"),),
    ),
    _Kind(
        "brightening",
        False,
        "brightening",
        0.25,
        (
            MappedKey("brightening", ("alpha",), number, 1.2, "augmentation.brightening_alpha"),
            MappedKey("brightening", ("beta",), number, 10, "augmentation.brightening_beta"),
        ),
    ),
    _Kind("barrdistortion", False, "barrel", 0.25, _circle("barrdistortion", "barrel", 0.5)),
    _Kind(
        "pincdistortion", False, "pincushion", 0.25, _circle("pincdistortion", "pincushion", -0.5)
    ),
)
# Kinds that are on if their list is not empty: key, default, setting of the list, kind.
_LISTED_KINDS = (
    ("shrinks", (0.8,), "shrink_ratios", "shrink"),
    ("shears", (), "shear_factors", "shear"),
)


def read_augmentation(reader: KeyReader) -> None:
    """Sets kind, probability and strength of the augmentation."""
    is_on = reader.take("model", "generator", boolean, False)
    with reader.without_effect(not is_on, "model.generator is False"):
        augments = reader.take("generator", "augmentation", boolean, True)
        is_on = is_on and augments
        reader.describe("generator", "augmentation", f"augmentation.enabled = {shown(is_on)}")
        with reader.without_effect(not augments, "generator.augmentation is False"):
            _read_kinds(reader)
    reader.set("augmentation.enabled", is_on)
    reader.describe("model", "generator", f"augmentation.enabled = {shown(is_on)}")


def _read_kinds(reader: KeyReader) -> None:
    for kind in _KINDS:
        is_on = reader.take("augmentor", kind.key, boolean, kind.default)
        _set_probability(reader, kind.key, kind.target, kind.probability if is_on else 0.0)
        with reader.without_effect(not is_on, f"augmentor.{kind.key} is False"):
            for amount in kind.amounts:
                reader.take_mapped(amount)
    for key, default, target, name in _LISTED_KINDS:
        values = reader.take("augmentor", key, numbers, default)
        _set_probability(reader, key, name, 0.25 if values else 0.0, f" of {shown(values)}")
        if values and reader.unused_because is None:
            reader.set(f"augmentation.{target}", values)


def _set_probability(
    reader: KeyReader, key: str, name: str, probability: float, detail: str = ""
) -> None:
    target = f"augmentation.{name}_probability"
    if reader.unused_because is None:
        reader.set(target, probability)
    reader.describe("augmentor", key, f"{target} = {probability:g}{detail if probability else ''}")
