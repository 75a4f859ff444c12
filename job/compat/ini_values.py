"""Converts literals of reference files; the ValueError of a wrong one says what is expected."""

import os
from collections.abc import Callable, Mapping
from math import isfinite
from typing import Any

from data_prep.imaging.pixels import MAX_CHANNELS
from flexunet.paths import expand_home
from flexunet.settings import suggestion

Convert = Callable[[Any], Any]


def same(value: Any) -> Any:
    """Returns `value` unchanged."""
    return value


def number(value: Any) -> float:
    """Returns a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
        raise ValueError("expected a number")
    return float(value)


def whole(minimum: int) -> Convert:
    """Returns a converter of whole numbers of at least `minimum`."""

    def convert(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise ValueError(f"expected a whole number of at least {minimum}")
        return value

    return convert


def patience(value: Any) -> int:
    """Returns a number of epochs, 0 for never."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError("expected a whole number")
    # At 0 and below, the reference implementation never stops early.
    return max(value, 0)


def channels(value: Any) -> int:
    """Returns the number of channels of an image: 1 (grey), 3 (RGB), or up to 64."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_CHANNELS:
        raise ValueError(f"expected 1 (grey), 3 (RGB), or another number up to {MAX_CHANNELS}")
    return value


def boolean(value: Any) -> bool:
    """Returns True or False."""
    if not isinstance(value, bool):
        raise ValueError("expected True or False")
    return value


def flag(meaning: Mapping[bool, str]) -> Convert:
    """Returns a converter of True and False to their values in `meaning`."""

    def convert(value: Any) -> str:
        return meaning[boolean(value)]

    return convert


def pair(value: Any) -> list[int]:
    """Returns two whole numbers."""
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise ValueError("expected a pair of whole numbers such as (3,3)")
    return [whole(1)(part) for part in value]


def numbers(value: Any) -> list[float]:
    """Returns a list of numbers, which may be empty."""
    if not isinstance(value, tuple | list):
        raise ValueError("expected a list of numbers")
    return [number(part) for part in value]


def optional(convert: Convert) -> Convert:
    """Returns a converter that also accepts None."""
    return lambda value: None if value is None else convert(value)


def one_of(names: Mapping[str, str]) -> Convert:
    """Returns a converter of the keys of `names` to their values."""

    def convert(value: Any) -> str:
        if not isinstance(value, str) or value not in names:
            raise ValueError(f"unknown; {suggestion(str(value), list(names))}")
        return names[value]

    return convert


def folder_from(config_path: str) -> Convert:
    """Returns a converter of a folder, relative to the file's folder, to a full path."""

    def convert(value: Any) -> str:
        if not isinstance(value, str) or not value.strip():
            raise ValueError("expected a folder in quotes")
        if "\\" in value or not value.isprintable():
            raise ValueError("write folders with /, not with \\")
        if "://" in value:
            return value
        beside = os.path.dirname(os.path.abspath(config_path))
        return os.path.normpath(os.path.join(beside, expand_home(value)))

    return convert


def some_numbers(value: Any) -> list[float]:
    """Returns one or more numbers from a list or a single number."""
    found = numbers([value] if isinstance(value, int | float) else value)
    if not found:
        raise ValueError(
            "expected one or more numbers; to switch this augmentation off, set it to False"
        )
    return found


def centers(value: Any) -> list[float]:
    """Returns x,y,x,y... of a list of points."""
    if not isinstance(value, tuple | list) or not value:
        raise ValueError("expected a list of (x,y)")
    points = [numbers(point) for point in value]
    if any(len(point) != 2 for point in points):
        raise ValueError("expected a list of (x,y)")
    return [each for point in points for each in point]
