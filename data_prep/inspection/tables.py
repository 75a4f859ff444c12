"""Prints an inspection as tables for a terminal of 80 to 100 columns."""

import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from data_prep.inspection.findings import FilesFinding, Inspection, MasksFinding
from flexunet.text import join_truncated, pluralize

if TYPE_CHECKING:
    from rich.console import Console

_MIN_WIDTH, MAX_WIDTH = 80, 100  # columns
_MAX_ROWS = 8
_MAX_NAMES = 3
_MAX_VALUES = 32  # classes, ignored and unknown ones
_MAX_CLASSES = 24  # in the table of regions
_RARE = 1e-4  # share of all pixels
_MAX_SIZES = 5  # of stored images in a table


def print_inspection(inspection: Inspection, console: "Console | None" = None) -> None:
    """Prints all findings, the questions and the proposed command."""
    printer = _Printer(console or _console())
    printer.layout(inspection)
    if inspection.images is not None:
        printer.images(inspection)
    if inspection.masks is not None:
        printer.masks(inspection.masks)
    printer.files("bad files", inspection.bad_files)
    printer.duplicates(inspection)
    printer.groups(inspection)
    printer.regions(inspection)
    printer.command(inspection)


def _console() -> "Console":
    from rich.console import Console

    return Console(width=min(MAX_WIDTH, max(_MIN_WIDTH, Console().width)))


class _Printer:
    """Prints the sections of an inspection."""

    def __init__(self, console: "Console") -> None:
        self._console = console

    def layout(self, inspection: Inspection) -> None:
        """Prints folders, the rule of names and files that are left over."""
        layout = inspection.layout
        has_views = any(each.field_of_view for each in layout.folders)
        columns = ["images", "masks", *(["field of view"] if has_views else []), "split", "pairs"]
        rows = [
            [
                *(each.images, each.masks),
                *([each.field_of_view or "-"] if has_views else []),
                *(each.split or "-", str(each.num_pairs)),
            ]
            for each in layout.folders
        ]
        self._line(f"{inspection.source}: {pluralize(layout.num_pairs, 'pair')}")
        self._table("folders", columns, rows)
        if layout.rule:
            self._line(f"names: {layout.rule}")
        if layout.problem:
            self._line(f"prep would stop: {layout.problem}")
        self.files("left over", layout.left_over)
        self.files("other files, which prep does not read", layout.other_files)

    def images(self, inspection: Inspection) -> None:
        """Prints sizes, channels and values of the images."""
        images = inspection.images
        if images is None:
            return
        sizes = [f"{height}x{width}: {number}" for height, width, number in images.sizes]
        scale = f"{images.full_scale}; brightest pixels {images.smallest_max}"
        rows = [
            ("height x width", join_truncated(sizes, _MAX_ROWS, separator=", ")),
            ("channels", _counts(images.channels)),
            ("bits", _counts(images.bit_depths)),
            ("full scale", f"{scale} to {images.largest_max}"),
            ("files", _counts(images.file_kinds)),
        ]
        if images.num_blank:
            rows.append(("of one value", str(images.num_blank)))
        self._table(f"{images.number} images", ("", "found: number of images"), rows)

    def masks(self, masks: MasksFinding) -> None:
        """Prints the values of the masks and what they mean."""
        rows = [
            (each.value, each.looks_like, _percent(each.share), str(each.num_files))
            for each in masks.values[:_MAX_VALUES]
        ]
        if len(masks.values) > _MAX_VALUES:
            rest = masks.values[_MAX_VALUES:]
            share = sum(each.share for each in rest)
            rows.append((f"{len(rest)} more", "see inspect.json", _percent(share), ""))
        rows += [
            (f"{each.num_values} more" if each.num_values else "", each.looks_like,
             _percent(each.share), "")
            for each in masks.others
        ]  # fmt: skip
        title = f"{masks.number} masks, {_counts(masks.file_kinds)}"
        self._table(title, ("value", "looks like", "pixels", "files"), rows)
        for sentence in masks.evidence:
            self._line(f"- {sentence}")
        if masks.encoding is None:
            self._line("what these values mean is not certain: see the questions")

    def files(self, title: str, files: Sequence[FilesFinding]) -> None:
        """Prints files with the same problem, or in the same folder; nothing without files."""
        rows = [
            (str(each.number), each.about, join_truncated(each.examples, _MAX_NAMES, separator=" "))
            for each in files[:_MAX_ROWS]
        ]
        if len(files) > _MAX_ROWS:
            rows.append((str(sum(each.number for each in files[_MAX_ROWS:])), "others", ""))
        self._table(title, ("files", "", "for example"), rows)

    def duplicates(self, inspection: Inspection) -> None:
        """Prints the images with equal pixels."""
        found = inspection.duplicates
        if found is None or not found.num_sets:
            return
        rows = [(str(len(names)), join_truncated(names, _MAX_NAMES)) for names in found.sets]
        across = f", {found.num_across_splits} across splits" if found.num_across_splits else ""
        title = f"equal images: {pluralize(found.num_sets, 'set')}{across}"
        self._table(title, ("images", "names"), rows[:_MAX_ROWS])

    def groups(self, inspection: Inspection) -> None:
        """Prints how names may say which images belong together."""
        rows = [
            (
                ", ".join(group for group, _ in each.examples),
                str(each.num_groups),
                f"{each.smallest} / {each.median} / {each.largest}",
                str(each.num_shared),
            )
            for each in inspection.groups
        ]
        columns = ("such as", "groups", "fewest / median / most images", "in several splits")
        is_guess = any(question.about == "groups" for question in inspection.questions)
        title = "possible groups: a guess from the names, to be confirmed" if is_guess else "groups"
        self._table(title, columns, rows)

    def regions(self, inspection: Inspection) -> None:
        """Prints the sizes of regions, and how many of them stored sizes would lose."""
        size, regions = inspection.size, inspection.regions
        if size is None:
            return
        seen = [each for each in regions if each.number or each.num_tiny]
        stored = list(regions[0].lost)[-_MAX_SIZES:] if regions else []
        rows = [
            (
                each.class_name,
                *map(str, (each.num_images, each.number, each.num_tiny)),
                *map(str, (each.median, each.smallest)),
                *(_part_of(each.lost[name], each.number) for name in stored),
            )
            for each in seen[:_MAX_CLASSES]
        ]
        least = regions[0].min_area if regions else 1
        columns = ("class", "images", "regions", "tiny", "median", "5 %", *stored)
        title = f"regions of {pluralize(size.num_sampled, 'mask')}, and lost at each stored size"
        self._table(title, columns, rows)
        if regions:
            self._line(
                f"tiny: under {least} pixels, not counted in the other columns; median and 5 %: "
                "pixels that half and 5 % of the regions do not exceed"
            )
        if rare := [each for each in seen if each.share < _RARE]:
            named = [f"{each.class_name} in {pluralize(each.num_images, 'image')}" for each in rare]
            self._line(
                f"rare, under {_percent(_RARE)} of the pixels, perhaps a mistake: "
                f"{join_truncated(named, _MAX_ROWS)}"
            )
        if unseen := [each.class_name for each in regions if each not in seen]:
            self._line(f"without a region: {join_truncated(unseen, _MAX_CLASSES, separator=', ')}")
        if len(seen) > _MAX_CLASSES:
            self._line(f"and {len(seen) - _MAX_CLASSES} more classes: see inspect.json")
        self._line(f"size: {size.reason}")

    def command(self, inspection: Inspection) -> None:
        """Prints the questions with a command for each answer, or the command alone."""
        self._console.print()
        for number, question in enumerate(inspection.questions, 1):
            self._line(f"Question {number}: {question.text}")
            for answer in question.answers:
                self._line(f"- {answer.text}")
                self._command(answer.command)
            self._console.print()
        if inspection.command is None:
            self._line("There is no command for this source; see above.")
            return
        about = " with the first answers" if inspection.questions else ""
        self._line(f"Proposed command{about}:")
        self._command(inspection.command)

    def _line(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False)

    def _command(self, command: str) -> None:
        self._console.print(
            shown_command(command), markup=False, highlight=False, soft_wrap=True, style="bold"
        )

    def _table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        rows = list(rows)
        if not rows:
            return
        table = Table(
            title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False,
            show_edge=False, padding=(0, 1, 0, 0),
        )  # fmt: skip
        for number, name in enumerate(columns):
            is_number = all(_is_number(row[number]) for row in rows)
            justify: Any = "right" if is_number else "left"
            table.add_column(Text(name), justify=justify, overflow="fold", no_wrap=is_number)
        for row in rows:
            table.add_row(*map(Text, row))
        self._console.print()
        self._console.print(table)


def shown_command(command: str) -> str:
    """Returns a command line with an option per line if it is long; the shell reads the same."""
    if len(command) <= _MIN_WIDTH:
        return command
    lines: list[list[str]] = [[]]
    for word in shlex.split(command):
        if word.startswith("--"):
            lines.append([])
        lines[-1].append(word)
    return " \\\n  ".join(shlex.join(line) for line in lines)


def _counts(counts: Mapping[Any, int]) -> str:
    return ", ".join(f"{value}: {number}" for value, number in counts.items())


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %" if share >= 1e-5 else "< 0.001 %"


def _part_of(number: int, total: int) -> str:
    return f"{100 * number / total:.1f} %" if total else "-"


def _is_number(text: str) -> bool:
    return bool(text) and (text[0].isdigit() or text[0] in "<-")
