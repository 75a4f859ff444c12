"""Formats the words of messages: numbers with nouns, lists, and names from outside."""

import unicodedata
from collections.abc import Sequence


def counted(number: float, noun: str) -> str:
    """Returns `1 group`, `2 groups`, `0.5 CPUs`."""
    return f"{number:g} {noun}" if number == 1 else f"{number:g} {noun}s"


def listed(texts: Sequence[str], most: int, *, separator: str = "; ") -> str:
    """Returns the first `most` of `texts`, and how many more there are."""
    more = len(texts) - most
    shown = [*texts[:most], *([f"and {more} more"] if more > 0 else [])]
    return separator.join(shown)


def as_utf8(text: str) -> str:
    """Returns `text`, a file name, with a backslash and hex digits for bytes that are not UTF-8."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def legible(text: str) -> str:
    """Returns `text` as `as_utf8` does, with the code points of invisible characters."""
    return "".join(
        character.encode("ascii", "backslashreplace").decode() if is_invisible(character)
        else character
        for character in as_utf8(text)
    )  # fmt: skip


def is_invisible(character: str) -> bool:
    """Returns whether it is of no width or turns the text around it, as a name could hide in."""
    return unicodedata.category(character) == "Cf"
