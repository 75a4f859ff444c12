"""Words of messages: numbers with their nouns, and names in a row."""

from collections.abc import Sequence


def counted(number: float, noun: str) -> str:
    """Returns `1 group`, `2 groups`, `0.5 CPUs`."""
    return f"{number:g} {noun}" if number == 1 else f"{number:g} {noun}s"


def listed(texts: Sequence[str], most: int, *, separator: str = "; ") -> str:
    """Returns the first `most` of `texts`, and how many more there are."""
    more = len(texts) - most
    shown = [*texts[:most], *([f"and {more} more"] if more > 0 else [])]
    return separator.join(shown)
