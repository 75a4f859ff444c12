"""Proposed commands: the shell reads the options that were meant, and no others."""

import shlex
from typing import Any

import click
from hypothesis import given
from hypothesis import strategies as st

from data_prep import cli
from data_prep.choices.command_line import prep_command
from data_prep.config import PrepConfig
from data_prep.inspection.questions import Choice, proposals
from data_prep.inspection.tables import shown_command

NAMES = st.text(st.characters(blacklist_categories=["Cs", "Cc"]), min_size=1, max_size=9)


def parsed(command: str) -> tuple[str, str, PrepConfig]:
    """Returns source, output and options of a command, as a shell and click read it."""
    program, name, *words = shlex.split(command)
    assert (program, name) == ("flexunet", "prep")
    values = dict(click.Context(cli.command).command.make_context("prep", words).params)
    source, output = values.pop("source"), values.pop("output")
    return source, output, cli.read_config(values.pop("config_file"), values)


@given(
    source=NAMES.filter(lambda text: text[0] != "~"),
    mask=NAMES.filter(lambda text: "/" not in text and "{" not in text and "[" not in text),
    name=NAMES.filter(lambda text: not set(text) & set(";=\n") and text.strip() == text),
    size=st.sampled_from([256, 512, 768]),
)
def test_a_shell_reads_the_options_of_a_command(
    source: str, mask: str, name: str, size: int
) -> None:
    options: dict[str, Any] = {
        "masks": "x" if mask == "none" else mask.replace("..", "") or "x",  # none unsets it
        "mask_name": "{stem}_m",
        "classes": f"background=0,0,0;{name}1=0,0,255",
        "image_size": size,
        "skip_bad": True,
        "draw_valid": 0.15,
        "ignore": None,
    }
    command = prep_command(source, "OUT", options)
    # A shell removes a backslash with a line break; shlex does not.
    for text in (command, shown_command(command).replace("\\\n", "")):
        found_source, output, config = parsed(text)
        assert (found_source, output) == (f"{'./' * (source[0] == '-')}{source}", "OUT")
        given_options = {k: v for k, v in options.items() if v is not None}
        assert config == PrepConfig(**given_options)


def test_defaults_are_left_out() -> None:
    defaults = {name: field.default for name, field in PrepConfig.model_fields.items()}
    assert prep_command("a b", "out", defaults) == "flexunet prep 'a b' out"


def test_each_answer_has_a_command_with_the_first_answers_to_the_other_questions() -> None:
    choices = [
        Choice(
            "layout", "Which?", (("x", {"masks": "x", "field_of_view": "v"}), ("y", {"masks": "y"}))
        ),
        Choice("bad files", "Bad?", (("yes", {"skip_bad": True}), ("no", {}))),
    ]
    command, questions = proposals("s", "o", {"image_size": 256}, choices)
    start = "flexunet prep s o --masks x --field-of-view v --image-size 256"
    assert command == f"{start} --skip-bad"
    assert [[each.command for each in question.answers] for question in questions] == [
        [command, "flexunet prep s o --masks y --image-size 256 --skip-bad"],
        [command, start],
    ]
