"""Formats text for messages: numbers with nouns, lists, and untrusted names."""

import unicodedata
from collections.abc import Sequence


def pluralize(number: float, noun: str) -> str:
    """Returns a number with its noun: `1 group`, `2 groups`, `0.5 CPUs`."""
    return f"{number:g} {noun}" if number == 1 else f"{number:g} {noun}s"


def join_truncated(texts: Sequence[str], most: int, *, separator: str = "; ") -> str:
    """Joins the first `most` of `texts` and adds the number of the rest."""
    more = len(texts) - most
    shown = [*texts[:most], *([f"and {more} more"] if more > 0 else [])]
    return separator.join(shown)


def as_utf8(text: str) -> str:
    """Returns the file name `text` with bytes that are not UTF-8 as a backslash and hex digits."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def legible(text: str) -> str:
    """Returns `as_utf8(text)` with invisible characters as code points."""
    return "".join(
        character.encode("ascii", "backslashreplace").decode() if is_invisible(character)
        else character
        for character in as_utf8(text)
    )  # fmt: skip


def is_invisible(character: str) -> bool:
    """Returns whether `character` has no width or reverses text, so that it can disguise a name."""
    return unicodedata.category(character) == "Cf"
