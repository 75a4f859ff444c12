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
_CLOSING = {"(": ")", "[": "]", "{": "}"}
_NO_LITERAL = "not a literal (number, 'text', True, False, None, tuple, list, dict)"


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
            raise self.error(entry, _why_no_literal(entry.text.strip(), error)) from error
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

    A value continues on the next lines while it has an open bracket, up to the next key or section,
    and on lines that are indented deeper than its key. `literal` refuses a bracket that stays open.
    """
    entries: dict[tuple[str, str], Entry] = {}
    first_lines: dict[str, int] = {}
    section, place, depth, indent = "", ("", ""), 0, 0
    for number, raw in enumerate(io.StringIO(text, newline=None), start=1):
        line, change = _without_comment(raw)
        if not line.strip():
            continue
        if header := _HEADER.fullmatch(line):
            section, place, depth = header[1], ("", ""), 0
            _refuse_second(first_lines, f"[{section}]", number, path)
        elif section and (match := _KEY.fullmatch(line)):
            place, depth, indent = (section, match[1].lower()), change, _indent(line)
            _refuse_second(first_lines, ".".join(place), number, path)
            entries[place] = Entry(*place, match[2].strip(), number)
        elif place in entries and (depth > 0 or _indent(line) > indent):
            # Python ignores a backslash at the end of a line.
            before = entries[place].text.removesuffix("\\").rstrip()
            entries[place] = entries[place]._replace(text=f"{before} {line.strip()}".strip())
            depth += change
        else:
            raise UsageError(
                f"{path}: line {number}: {clipped(line.strip())}: expected [section], "
                "or key = value inside a section"
            )
    return entries


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


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


def _why_no_literal(text: str, error: Exception) -> str:
    """Returns what is wrong with the value `text`, with the place of a bracket, quote or comma."""
    problem = _bracket_problem(text)
    if problem:
        return problem
    start = error.offset or 0 if isinstance(error, SyntaxError) else 0
    if isinstance(error, SyntaxError) and start and "comma" in error.msg:
        near = text[start - 1 : error.end_offset]
        return f"not a literal: a comma is missing in {_quoted(near.rstrip(',').strip())}"
    if 1 < start <= len(text):
        return f"{_NO_LITERAL}; the first error is at {_quoted(text[start - 1 : start + 11])}"
    return _NO_LITERAL


def _bracket_problem(text: str) -> str | None:
    """Returns what is wrong with the brackets and quotes of `text`; None if they match."""
    quote, is_open = "", []
    for index, character in enumerate(text):
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in _CLOSING:
            is_open.append((index, character))
        elif character in _CLOSING.values():
            if not is_open:
                return f"the bracket {character} after {_before(text, index)} closes nothing"
            start, opening = is_open.pop()
            if character != _CLOSING[opening]:
                return (
                    f"the bracket {opening} of {_quoted(text[start : start + 12])} is closed by "
                    f"{character} after {_before(text, index)}; write {_CLOSING[opening]} there"
                )
    if quote:
        return f"the quote {quote} is not closed"
    if is_open:
        start, opening = is_open[-1]
        return (
            f"the bracket {opening} of {_quoted(text[start : start + 12])} is not closed; "
            f"write {_CLOSING[opening]} at its end"
        )
    return None


def _before(text: str, index: int) -> str:
    return _quoted(text[max(0, index - 12) : index]) if index else "the start"


def _quoted(text: str) -> str:
    return f"`{clipped(text)}`"


def clipped(text: str) -> str:
    """Returns `text` as one short line without control characters."""
    safe = "".join(each if each.isprintable() else f"\\x{ord(each):02x}" for each in text)
    return safe if len(safe) <= _SHOWN_CHARS else f"{safe[: _SHOWN_CHARS - 1]}…"
