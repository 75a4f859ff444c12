"""Names and texts keep to docs/glossary.md, which lists the words that the project does not use."""

import ast
import functools
import io
import re
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.source_tree import PACKAGES, ROOT

GLOSSARY = ROOT / "docs" / "glossary.md"
# Where texts are checked: areas of AREAS. An area is added when its texts keep to the glossary.
CHECKED = ["flexunet", "data_prep", "job", "launcher", "pages", "k8s"]
AREAS = {
    **{name: [f"{name}/**/*.py", f"{name}/**/*.j2"] for name in PACKAGES},
    "pages": ["*.md", "docs/**/*.md", "benchmarks/*.md"],
    "k8s": ["k8s/**/*.md", "k8s/**/*.yaml"],
}
# Texts in which these words are no prose, beside the glossary's names on disk.
EXCEPTIONS = {
    "--tiles-as-pictures": "an option",
    "--off-map-limit": "an option",
}
_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")
_QUOTE = r"[`'\"]"


class Rule(NamedTuple):
    """A word that is not used, what to say for it, and where the rule holds."""

    banned: str
    say: str
    where: str


def table(text: str, *columns: str) -> list[list[str]]:
    """Returns the cells of the table of a page that has `columns`, without code quotes."""
    _, found, rest = text.partition(f"| {' | '.join(columns)} |\n")
    assert found, f"{GLOSSARY.name} has no table {columns}"
    rows = rest.split("\n\n", 1)[0].splitlines()[1:]
    return [[cell.strip().strip("`") for cell in row.strip("|").split("|")] for row in rows]


RULES = [Rule(*row) for row in table(GLOSSARY.read_text(), "do not say", "say", "where")]
ON_DISK = {name for name, _ in table(GLOSSARY.read_text(), "name", "where it is")}


def pattern_of(words: str) -> str:
    """Returns the pattern of words with any white space between them."""
    return rf"\b{re.escape(words)}\b".replace("\\ ", r"\s+")


TEXT_RULES = [
    (rule, re.compile(pattern_of(rule.banned), re.IGNORECASE))
    for rule in RULES
    if rule.where == "text"
]
# Tells at once that a text has no word of any rule; most have none.
_ANY_BANNED = re.compile("|".join(each.pattern for _, each in TEXT_RULES), re.IGNORECASE)
_NAMES_ON_DISK = "|".join(map(re.escape, sorted(ON_DISK, key=len, reverse=True)))
_QUOTED_NAME = re.compile(rf"({_QUOTE})(?:{_NAMES_ON_DISK})\1")
_EXCEPTION = re.compile(rf"(?<![\w-])(?:{'|'.join(map(re.escape, EXCEPTIONS))})(?![\w-])")


def words_of(name: str) -> list[str]:
    """Returns the words of a name in lower case: `num_ImageIds` has num, image and ids."""
    return [word.lower() for word in _WORDS.findall(name)]


def names_in(tree: ast.AST) -> Iterator[tuple[int, str, bool]]:
    """Yields (line, name, whether it is of a function or class here) of all names of a module."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                yield node.lineno, node.name, True
            case ast.Name():
                yield node.lineno, node.id, False
            case ast.Attribute():
                yield node.lineno, node.attr, False
            case ast.arg() | ast.keyword() if node.arg:
                yield node.lineno, node.arg, False
            case ast.alias():
                yield node.lineno, (node.asname or node.name).rpartition(".")[2], False
            case ast.ExceptHandler() | ast.MatchAs() if node.name:
                yield node.lineno, node.name, False


@functools.cache
def problem_of_name(name: str, is_definition: bool) -> str | None:
    """Returns what is wrong with `name`; None where it keeps to the glossary."""
    if name in ON_DISK:
        return None
    words = "_".join(words_of(name))
    for rule in RULES:
        is_banned = {
            "part": f"_{rule.banned}_" in f"_{words}_",
            "name": name.lstrip("_") == rule.banned,
            "definition": is_definition and name.lstrip("_") == rule.banned,
        }.get(rule.where, False)
        if is_banned:
            return f"{name}: not {rule.banned} but {rule.say}"
    return None


def problems_of_names(source: str) -> list[str]:
    """Returns "line: problem" of each name of a module that breaks a rule."""
    found = ((line, problem_of_name(name, new)) for line, name, new in names_in(ast.parse(source)))
    return sorted({f"{line}: {problem}" for line, problem in found if problem})


def texts_of_python(source: str) -> Iterator[tuple[int, int, str]]:
    """Yields (first line, last line, text) of the strings and comments of a module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.end_lineno or node.lineno, node.value
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.start[0], token.string


def texts_of(path: Path) -> Iterator[tuple[int, int, str]]:
    """Yields (first line, last line, text) of what `path` has for people to read."""
    source = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        yield from texts_of_python(source)
    else:
        yield from ((number, number, line) for number, line in enumerate(source.splitlines(), 1))


def prose(text: str) -> str:
    """Returns `text` without names on disk, which stand there in quotes or alone."""
    if text in ON_DISK:
        return ""
    return _EXCEPTION.sub(" ", _QUOTED_NAME.sub(" ", text))


def problems_of_texts(texts: Iterable[tuple[int, int, str]], source: str) -> list[str]:
    """Returns "line: problem" of each text that has a word of the glossary's rules."""
    lines, found = source.splitlines(), set()
    for first, last, text in texts:
        text = prose(text)
        if not _ANY_BANNED.search(text):
            continue
        for rule, word in TEXT_RULES:
            if word.search(text):
                at = next((n for n in range(first, last + 1) if word.search(lines[n - 1])), first)
                found.add((at, f"not {rule.banned!r} but {rule.say}"))
    return [f"{line}: {problem}" for line, problem in sorted(found)]


def files_of(patterns: Iterable[str]) -> list[Path]:
    paths = {path for pattern in patterns for path in ROOT.glob(pattern)}
    return sorted(paths - {GLOSSARY})


@pytest.mark.parametrize("folder", [*PACKAGES, "tests", "benchmarks", "docs"])
def test_names_keep_to_the_glossary(folder: str) -> None:
    problems = [
        f"{path.relative_to(ROOT)}:{problem}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for problem in problems_of_names(path.read_text())
    ]
    assert not problems, "\n".join(["see docs/glossary.md", *problems])


@pytest.mark.parametrize("area", CHECKED)
def test_texts_keep_to_the_glossary(area: str) -> None:
    problems = [
        f"{path.relative_to(ROOT)}:{problem}"
        for path in files_of(AREAS[area])
        for problem in problems_of_texts(texts_of(path), path.read_text(encoding="utf-8"))
    ]
    assert not problems, "\n".join(["see docs/glossary.md", *problems])


def test_every_area_has_files() -> None:
    assert set(CHECKED) <= set(AREAS)
    assert all(files_of(patterns) for patterns in AREAS.values())


def test_the_glossary_is_in_order_and_says_each_word_once() -> None:
    words = [word.strip("*") for word, _ in table(GLOSSARY.read_text(), "word", "meaning")]
    assert words == sorted(set(words), key=str.lower)
    assert {rule.where for rule in RULES} == {"part", "name", "definition", "text"}
    keys = [(rule.banned, rule.where) for rule in RULES]
    assert len(keys) == len(set(keys))
    assert not [rule for rule in RULES if problem_of_name(rule.say.split(",")[0], True)]


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("num_pictures = 1", None),  # a name on disk
        ("max_pictures = 1", "1: max_pictures: not pictures but images, cases"),
        ("\nclass PictureReader: ...", "2: PictureReader: not picture but image, case"),
        ("f(is_told=1)", "1: is_told: not told but reported, logged"),
        ("def f(off_map): ...", "1: off_map: not off_map but unmapped"),
        ("from a import Store as S", None),
        ("from a import Store", "1: Store: not Store but ObjectStore"),
        ("DataStore()", None),
        ("def merged(): ...", "1: merged: not merged but deep_merge"),
        ("merged = 1", None),
    ],
)
def test_a_name_that_breaks_a_rule_is_found(source: str, problem: str | None) -> None:
    assert problems_of_names(source) == ([] if problem is None else [problem])


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ('"a picture"', "1: not 'picture' but image"),
        ('f"{n} pictures"', "1: not 'pictures' but images"),
        ('"""One.\n\nIt shall be.\n"""', "3: not 'shall' but must, is to"),
        ('x = ("it lies "\n     "in a folder")', "1: not 'lies in' but is in"),
        ("x = 1  # Room for one", "1: not 'room' but space, memory, slots"),
        ('row["picture"]', None),
        ("\"the column `picture`, or 'picture'\"", None),
        ('"give --tiles-as-pictures"', None),
        ('"pictured mushroom retold"', None),
    ],
)
def test_a_text_that_breaks_a_rule_is_found(source: str, problem: str | None) -> None:
    assert problems_of_texts(texts_of_python(source), source) == (
        [] if problem is None else [problem]
    )
