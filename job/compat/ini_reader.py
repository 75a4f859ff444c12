"""Reads the keys of an INI file one by one, and notes how each is used."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from flexunet.errors import UsageError
from flexunet.settings import suggestion
from job.compat.ini_file import Entry, IniFile, clipped
from job.compat.ini_values import Convert

if TYPE_CHECKING:
    from rich.table import Table

Status = Literal["unknown", "not used", "mapped", "default"]


@dataclass(frozen=True)
class KeyNote:
    """Records how one key was used, present in the file or missing from it.

    Attributes:
        key: "section.key".
        value: the text in the file, or the default of the reference implementation.
        status: "mapped", "not used", "unknown" (misspelt), or "default" (missing from the file).
        detail: the setting, the reason, or a suggestion.
        line: line in the file, from 1; 0 if the key is missing.
        problem: what is wrong with a value that is not read; empty if nothing is.
    """

    key: str
    value: str
    status: Status
    detail: str
    line: int
    problem: str = ""


class MappedKey(NamedTuple):
    """Maps a key to one setting of this package.

    Attributes:
        keys: spellings; the first one in the file counts.
        default: as for `KeyReader.take`.
        target: dotted path of the setting.
    """

    section: str
    keys: tuple[str, ...]
    convert: Convert
    default: Any
    target: str


@dataclass
class KeyReader:
    """Reads the entries of a file one by one and notes how each is used."""

    file: IniFile
    unused: Mapping[tuple[str, str], str]  # why keys that are never taken have no effect
    unused_sections: Mapping[str, str] = field(default_factory=dict)  # the same for sections
    settings: dict[str, Any] = field(default_factory=lambda: {"prep": {}})
    # The reason, while reading keys that have no effect because of another key.
    unused_because: str | None = None
    _notes: dict[tuple[str, str], KeyNote] = field(default_factory=dict)
    _known: set[tuple[str, str]] = field(default_factory=set)

    def has(self, section: str, key: str) -> bool:
        """Returns whether the file has this key."""
        return (section, key) in self.file.entries

    def first_of(self, section: str, keys: Sequence[str]) -> str:
        """Returns the first of `keys` in the file; `keys[0]` if none is."""
        return next((key for key in keys if self.has(section, key)), keys[0])

    @contextmanager
    def without_effect(self, applies: bool, reason: str) -> Iterator[None]:
        """Notes the keys taken inside as not used for `reason`, if `applies`."""
        outer = self.unused_because
        if applies and outer is None:
            self.unused_because = reason
        yield
        self.unused_because = outer

    def take(
        self,
        section: str,
        key: str,
        convert: Convert,
        default: Any,
        target: str | None = None,
    ) -> Any:
        """Returns the converted value of a key and sets the setting `target` to it.

        Args:
            default: literal that the reference implementation uses for a missing key; `...`:
                required.
            target: dotted path of the setting; None: the caller uses the value.
        """
        self._known.add((section, key))
        entry = self.file.entries.get((section, key))
        if entry is None and default is ...:
            raise UsageError(f"{self.file.path}: {section}.{key} is required and missing; add it")
        problem = ""
        try:
            value = self._converted(entry, convert, default)
        except UsageError as error:
            if self.unused_because is None:
                raise
            value, problem = convert(default), str(error)
        if target is not None and self.unused_because is None:
            self.set(target, value)
        detail = f"{target} = {shown(value)}" if target else ""
        self._note((section, key), entry, default, detail, problem)
        return value

    def _converted(self, entry: Entry | None, convert: Convert, default: Any) -> Any:
        literal = default if entry is None else self.file.literal(entry)
        try:
            return convert(literal)
        except ValueError as error:
            raise self.file.error(entry, str(error)) from error

    def take_mapped(self, mapped: MappedKey) -> None:
        """Takes a key and sets the setting that it maps to."""
        key = self.first_of(mapped.section, mapped.keys)
        self.take(mapped.section, key, mapped.convert, mapped.default, mapped.target)

    def set(self, target: str, value: Any) -> None:
        """Sets the setting at the dotted path `target`."""
        *groups, leaf = target.split(".")
        place = self.settings
        for group in groups:
            place = place.setdefault(group, {})
        place[leaf] = value

    def describe(self, section: str, key: str, detail: str, status: Status = "mapped") -> None:
        """Notes how a key is used that was taken without a target."""
        note = self._notes.get((section, key))
        if note is not None and self.unused_because is None:
            kept = note.status if note.status == "default" else status
            self._notes[section, key] = replace(note, status=kept, detail=detail)

    def all_notes(self) -> tuple[KeyNote, ...]:
        """Returns a note per key in the order of the file, then one per filled-in default."""
        for place, entry in self.file.entries.items():
            if place not in self._notes:
                self._notes[place] = self._leftover(entry)
        notes = self._notes.values()
        return tuple(sorted(notes, key=lambda note: (note.line == 0, note.line)))

    def _note(
        self,
        place: tuple[str, str],
        entry: Entry | None,
        default: Any,
        detail: str,
        problem: str,
    ) -> None:
        name = ".".join(place)
        if entry is None:
            if self.unused_because is None and default is not None:
                self._notes[place] = KeyNote(name, repr(default), "default", detail, 0)
            return
        text = entry.text.strip()
        if self.unused_because is not None:
            detail = self.unused_because
        status: Status = "mapped" if self.unused_because is None else "not used"
        self._notes[place] = KeyNote(name, text, status, detail, entry.line, problem)

    def _leftover(self, entry: Entry) -> KeyNote:
        """Returns the note of a key that nothing reads, so its value need not be a literal."""
        name, text = f"{entry.section}.{entry.key}", entry.text.strip()
        try:
            self.file.literal(entry)
            problem = ""
        except UsageError as error:
            problem = str(error)
        reason = self.unused.get(
            (entry.section, entry.key), self.unused_sections.get(entry.section)
        )
        if reason is not None:
            return KeyNote(name, text, "not used", reason, entry.line, problem)
        return KeyNote(name, text, "unknown", self._hint(entry), entry.line, problem)

    def _hint(self, entry: Entry) -> str:
        known = set(self.unused) | self._known
        sections = sorted({section for section, _ in known} | set(self.unused_sections))
        if entry.section not in sections:
            return f"no such section; {suggestion(entry.section, sections)}"
        elsewhere = sorted(section for section, key in known if key == entry.key)
        if elsewhere:
            return f"belongs in [{'] or ['.join(elsewhere)}]"
        return suggestion(entry.key, [key for section, key in known if section == entry.section])


def format_notes(notes: Sequence[KeyNote]) -> "Table":
    """Returns a table of `notes`, those that need attention first; at most 100 columns wide.

    Keys of one section that are not used for one reason share a row.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        title="Reference configuration",
        title_justify="left",
    )
    table.add_column("key", overflow="fold", min_width=24, max_width=28)
    table.add_column("value", overflow="ellipsis", no_wrap=True, max_width=14)
    table.add_column("", width=8)
    table.add_column("here", overflow="fold", max_width=40)
    styles = {"unknown": "red", "not used": "yellow", "mapped": "green", "default": "dim"}
    for note in sorted(_joined(notes), key=lambda each: list(styles).index(each.status)):
        cells = (note.key, clipped(note.value), note.status, note.detail)
        # Text, not str: a value such as [0.8] would be read as markup.
        table.add_row(*(Text(cell) for cell in cells), style=styles[note.status])
    return table


def _joined(notes: Sequence[KeyNote]) -> list[KeyNote]:
    """Returns `notes` with one note for all keys of a section that are not used for one reason."""
    groups: dict[tuple[str, ...], list[KeyNote]] = {}
    for note in notes:
        section, _, key = note.key.partition(".")
        alone = note.status != "not used" or note.problem
        place = (section, note.detail, note.status, *([key] if alone else []))
        groups.setdefault(place, []).append(note)
    return [_one_note(group) for group in groups.values()]


def _one_note(group: Sequence[KeyNote]) -> KeyNote:
    if len(group) == 1:
        return group[0]
    keys = ", ".join(note.key.partition(".")[2] for note in group)
    section = group[0].key.partition(".")[0]
    return replace(group[0], key=f"{section}: {keys}", value=f"{len(group)} keys")


def shown(value: Any) -> str:
    """Returns a value in the form of an option."""
    if isinstance(value, list | tuple):
        return ",".join(shown(part) for part in value)
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)
