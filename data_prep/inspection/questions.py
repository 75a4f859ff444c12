"""Writes the `prep` commands that an inspection proposes, and what only the user can decide.

Pure functions on options. A command has only options that differ from the defaults of `prep`.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data_prep.choices.command_line import prep_command
from data_prep.inspection.findings import Answer, Question
from data_prep.inspection.layout import Reading as LayoutReading
from data_prep.masks.class_names import color_map_text, id_color, id_names
from data_prep.masks.color_map import (
    MAX_CLASSES,
    ClassColor,
    Color,
    color_text,
    grey_level,
    parse_color_map,
)
from data_prep.masks.decision.decide import MaskDecision
from data_prep.masks.decision.findings import BLACK_AND_WHITE, Reading
from data_prep.splits.group_candidates import GroupCandidate
from flexunet.text import join_truncated, pluralize

_MAX_NAMED, _MAX_VALUES = 6, 32  # values in a question, and in an option
_MOST = 0.5  # share of white pixels from which black may be the object


@dataclass(frozen=True)
class Choice:
    """A question with the options of `prep` that each answer adds.

    Attributes:
        about: see `Question`.
        answers: (words, options), the likeliest first; an option of None is left out.
    """

    about: str
    text: str
    answers: tuple[tuple[str, Mapping[str, Any]], ...]


def proposals(
    source: str, output: str, options: Mapping[str, Any], choices: Sequence[Choice]
) -> tuple[str, tuple[Question, ...]]:
    """Returns the command with the first answer to each question, and all questions.

    The command of an answer has the first answers to the other questions.
    """
    first = dict(options)
    for choice in choices:
        first |= choice.answers[0][1]
    questions = []
    for choice in choices:
        every = {name: options.get(name) for _, more in choice.answers for name in more}
        answers = [
            Answer(text, prep_command(source, output, {**first, **every, **more}))
            for text, more in choice.answers
        ]
        questions.append(Question(choice.about, choice.text, tuple(answers)))
    return prep_command(source, output, first), tuple(questions)


def layout_choice(readings: Sequence[LayoutReading]) -> Choice | None:
    """Returns the question about folders or names with several readings."""
    answers = tuple((each.text, each.options) for each in readings)
    text = "Which folders or names are the images and masks?"
    return Choice("layout", text, answers) if answers else None


def meaning_choice(decision: MaskDecision) -> Choice | None:
    """Returns the question about the values of masks with several meanings."""
    answers = tuple((each.meaning, each.options) for each in decision.candidates)
    text = "What do the values of the masks mean?"
    return Choice("masks", text, answers) if answers else None


def black_choice(reading: Reading, white: float) -> Choice | None:
    """Returns the question whether black is the object.

    Args:
        white: share of white pixels in black and white masks; up to half there is no question.
    """
    colors = [entry.color for entry in parse_color_map(reading.classes)]
    if white <= _MOST or reading.encoding != "colour" or colors != list(BLACK_AND_WHITE):
        return None
    text = f"White covers {white:.0%} of the pixels of the masks. Are the objects white or black?"
    swapped = color_map_text(id_names(2), BLACK_AND_WHITE[::-1])
    return Choice("masks", text, (("white", {}), ("black", {"classes": swapped})))


def group_choice(groups: Sequence[GroupCandidate]) -> Choice | None:
    """Returns the question about groups; that of augmented copies is answered with yes first."""
    if not groups:
        return None
    rules: list[tuple[str, Mapping[str, Any]]] = [
        (
            f"yes: {each.num_groups} groups such as {each.examples[0][0]}{_shared(each)}",
            {each.option: each.value},
        )
        for each in groups
    ]
    no: tuple[str, Mapping[str, Any]] = ("no: each image is on its own", {})
    if groups[0].option == "group_preset":
        text = "The names look like augmented copies. Are equal last numbers copies of one image?"
        return Choice("groups", text, (*rules, no))
    text = (
        "Do several images belong together, such as those of a patient? The names only hint at it."
    )
    return Choice("groups", text, (no, *rules))


def _shared(group: GroupCandidate) -> str:
    """Returns what happens to groups in several ready-made splits."""
    if not group.num_shared:
        return ""
    number = pluralize(group.num_shared, "group")
    return f"; prep will stop, because {number} of them would be in several splits"


def valid_choice(splits: Collection[str | None]) -> Choice | None:
    """Returns the question whether to draw a validation split, if there is only train."""
    if "train" not in splits or "valid" in splits:
        return None
    text = "There is no validation split, which training needs. Draw one from train?"
    answers: tuple[tuple[str, Mapping[str, Any]], ...] = (
        ("yes: 15 %", {"draw_valid": 0.15}),
        ("no: train with --folds", {}),
    )
    return Choice("validation", text, answers)


def area_choice(
    reading: Reading, colors: Sequence[Color], num_masks: int, is_all: bool
) -> Choice | None:
    """Returns the question about values of no class that cover areas, None if they are too many.

    Args:
        reading: how the masks are read.
        colors: these values; see `NoClassError`.
        num_masks: masks with them.
        is_all: these are all masks, so that they cannot be left out.
    """
    if not 0 < len(colors) <= _MAX_VALUES:
        return None
    values = [_value_text(color) for color in sorted(colors)]
    named = join_truncated(values, _MAX_NAMED)
    text = (
        f"{pluralize(num_masks, 'mask')} cannot be read, because areas of them are of no class: "
        f"{named}. What are these?"
    )
    ignored = [*([reading.ignore] if reading.ignore else []), *values]
    classes = parse_color_map(reading.classes)
    answers: list[tuple[str, Mapping[str, Any]]] = [
        ("to be ignored", {**reading.options, "ignore": ";".join(ignored)})
    ]
    added = _with_classes(classes, reading, colors)
    if added is not None:
        answers.append(("classes of their own", {**reading.options, "classes": added}))
    if not is_all:
        answers.append(("mistakes: leave these masks out", {"skip_bad": True}))
    return Choice("masks", text, tuple(answers))


def _value_text(color: Color) -> str:
    level = grey_level(color)
    return color_text(color) if level is None else str(level)


def _with_classes(
    classes: Sequence[ClassColor], reading: Reading, colors: Sequence[Color]
) -> str | None:
    """Returns the classes with one more for each of `colors`; None if they cannot be classes."""
    own = {entry.color for entry in classes}
    names = [entry.name for entry in classes]
    if reading.encoding == "index":
        last = max(max(color) for color in colors)
        added: list[Color] = [id_color(i) for i in range(len(classes), last + 1)]
    else:
        added = sorted(colors)
    if any(max(color) >= MAX_CLASSES for color in colors) or not own.isdisjoint(added):
        return None
    new = [f"class{len(classes) + i}" for i in range(len(added))]
    if not set(new).isdisjoint(names) or len(classes) + len(added) > MAX_CLASSES:
        return None
    return color_map_text([*names, *new], [*(entry.color for entry in classes), *added])


def bad_choice(number: int, num_without_mask: int) -> Choice | None:
    """Returns the question about files that cannot be used.

    Args:
        number: all of them.
        num_without_mask: images without a mask among them.
    """
    if not number:
        return None
    text = f"{pluralize(number, 'file')} cannot be used (see above). Leave them out?"
    answers: list[tuple[str, Mapping[str, Any]]] = [
        ("yes", {"skip_bad": True}),
        ("no: prep stops until they are corrected", {}),
    ]
    if num_without_mask:
        rest = {"skip_bad": True} if number > num_without_mask else {}
        words = (
            f"{pluralize(num_without_mask, 'image')} without a mask: there is no finding in them"
        )
        answers.append((words, {"missing_mask": "empty", **rest}))
    return Choice("bad files", text, tuple(answers))


def leak_choice(number: int) -> Choice | None:
    """Returns the question about `number` sets of equal images in several splits."""
    text = "Equal images are in several splits, so measures would be too good. Accept it?"
    no: tuple[str, Mapping[str, Any]] = ("no: prep stops until they are removed", {})
    return Choice("leaks", text, (no, ("yes", {"allow_leaks": True}))) if number else None
