"""Reads an INI file as data: sections, keys and literals; executes nothing."""

import ast
import io
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from flexunet.errors import UsageError

_MAX_FILE_BYTES = 1_000_000
_MAX_VALUE_CHARS = 4096
_SHOWN_CHARS = 60
_HEADER = re.compile(r"\s*\[\s*([A-Za-z_]\w*)\s*\]\s*")
_KEY = re.compile(r"\s*([A-Za-z_]\w*)\s*[=:](.*)", re.DOTALL)


class Entry(NamedTuple):
    """Holds one key of the file and the text of its value; lines count from 1."""

    section: str
    key: str
    text: str
    line: int


@dataclass(frozen=True)
class IniFile:
    """Holds the entries of a file.

    Attributes:
        entries: by (section, key), in the file's order.
    """

    path: str
    entries: Mapping[tuple[str, str], Entry]

    def literal(self, entry: Entry) -> Any:
        """Returns the value of `entry` as a Python literal; raises UsageError."""
        if len(entry.text) > _MAX_VALUE_CHARS:
            raise self.error(entry, f"longer than {_MAX_VALUE_CHARS} characters; shorten it")
        if "\ufffd" in entry.text:
            raise self.error(entry, "not UTF-8; save the file as UTF-8")
        try:
            with warnings.catch_warnings():
                # The compiler warns of text that literal_eval then rejects.
                warnings.simplefilter("ignore")
                tree = ast.parse(entry.text.strip(), mode="eval")
            value = ast.literal_eval(tree)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
            raise self.error(
                entry, "not a literal (number, 'text', True, False, None, tuple, list, dict)"
            ) from error
        if isinstance(tree.body, ast.Dict) and len(tree.body.keys) != len(value):
            raise self.error(entry, "the dict has a key twice; keep one")
        return value

    def error(self, entry: Entry | None, problem: str) -> UsageError:
        """Returns the error for `entry`: file, line, key, value and `problem`."""
        if entry is None:
            return UsageError(f"{self.path}: {problem}")
        where = f"{self.path}: line {entry.line}: {entry.section}.{entry.key}"
        return UsageError(f"{where} = {clipped(entry.text.strip())}: {problem}")


def read_ini(path: str) -> IniFile:
    """Returns the entries of the file at `path`; values are still text.

    Raises:
        UsageError: the file cannot be read, has a malformed line, or has a key twice.
    """
    return IniFile(path, _parse(_read_text(path), path))


def _read_text(path: str) -> str:
    """Returns the text at `path`, at most 1 MB; bytes that are not UTF-8 become U+FFFD."""
    try:
        with open(path, "rb") as file:
            data = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}; check the path") from error
    if len(data) > _MAX_FILE_BYTES:
        raise UsageError(f"{path}: larger than {_MAX_FILE_BYTES} bytes; give a configuration file")
    # Comments are often in another encoding. `literal` rejects values with U+FFFD.
    return data.decode("utf-8-sig", errors="replace")


def _parse(text: str, path: str) -> dict[tuple[str, str], Entry]:
    """Returns the entries of INI `text` by (section, key), in order; comments are dropped.

    A value continues on the next lines while it has an open bracket.
    """
    entries: dict[tuple[str, str], Entry] = {}
    first_lines: dict[str, int] = {}
    section, place, depth = "", ("", ""), 0
    for number, raw in enumerate(io.StringIO(text, newline=None), start=1):
        line, change = _without_comment(raw)
        if not line.strip():
            continue
        if header := _HEADER.fullmatch(line):
            section, depth = header[1], 0
            _refuse_second(first_lines, f"[{section}]", number, path)
        elif depth > 0:
            entries[place] = entries[place]._replace(text=f"{entries[place].text} {line.strip()}")
            depth += change
        elif section and (match := _KEY.fullmatch(line)):
            place, depth = (section, match[1].lower()), change
            _refuse_second(first_lines, ".".join(place), number, path)
            entries[place] = Entry(*place, match[2].strip(), number)
        else:
            raise UsageError(
                f"{path}: line {number}: {clipped(line.strip())}: expected [section], "
                "or key = value inside a section"
            )
    return entries


def _refuse_second(first_lines: dict[str, int], name: str, line: int, path: str) -> None:
    first = first_lines.setdefault(name, line)
    if first != line:
        raise UsageError(f"{path}: line {line}: {name} is already in line {first}; keep one")


def _without_comment(line: str) -> tuple[str, int]:
    """Returns `line` up to its comment, and how many brackets it opens more than it closes."""
    quote, depth = "", 0
    for index, character in enumerate(line):
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in ";#":
            return line[:index], depth
        elif character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
    return line, depth


def clipped(text: str) -> str:
    """Returns `text` as one short line without control characters."""
    safe = "".join(each if each.isprintable() else f"\\x{ord(each):02x}" for each in text)
    return safe if len(safe) <= _SHOWN_CHARS else f"{safe[: _SHOWN_CHARS - 1]}…"
