"""Folders, modules, functions and calls stay small, except for the exceptions listed here.

Ruff counts statements, arguments and branches; its limits are in pyproject.toml. A function with
one of these rules disabled (`noqa`) is an exception in this table too.
"""

import ast
import functools
import re
from collections import Counter
from collections.abc import Iterator

import pytest

from tests.source_tree import ROOT, python_files

AIMS = {
    "modules": 12,  # of a folder, with its __init__
    "lines": 400,  # of a module
    "body": 40,  # lines of a function, without its docstring
    "parameters": 6,  # of a function, without self and cls
    "starred": 0,  # arguments `*(a, b)` of a call, which hide what they are
}
# (aim, path or path:function): the most that it may be, and why.
EXCEPTIONS: dict[tuple[str, str], tuple[int, str]] = {}

Function = ast.FunctionDef | ast.AsyncFunctionDef
_RULES_OF_RUFF = re.compile(r"#\s*noqa:.*\b(C901|PLR09\d\d)\b")


def functions(tree: ast.AST, inside: str = "") -> Iterator[tuple[str, Function]]:
    """Yields (dotted name, node) of every function and method, also of nested ones."""
    for node in ast.iter_child_nodes(tree):
        name = inside
        if isinstance(node, Function | ast.ClassDef):
            name = f"{inside}.{node.name}".lstrip(".")
        if isinstance(node, Function):
            yield name, node
        yield from functions(node, name)


def body_lines(function: Function) -> int:
    body = function.body
    if ast.get_docstring(function, clean=False) is not None:
        body = body[1:]
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def num_parameters(function: Function) -> int:
    of = function.args
    named = [each.arg for each in (*of.posonlyargs, *of.args, *of.kwonlyargs)]
    rest = [each for each in (of.vararg, of.kwarg) if each is not None]
    return len([name for name in named if name not in ("self", "cls")]) + len(rest)


def measured(path: str, text: str) -> Iterator[tuple[tuple[str, str], int]]:
    """Yields ((aim, place), value) of the module `text` at `path`."""
    tree = ast.parse(text)
    yield ("lines", path), len(text.splitlines())
    num_starred = sum(
        isinstance(argument, ast.Starred) and isinstance(argument.value, ast.Tuple | ast.List)
        for call in ast.walk(tree)
        if isinstance(call, ast.Call)
        for argument in call.args
    )
    yield ("starred", path), num_starred
    for name, function in functions(tree):
        yield ("body", f"{path}:{name}"), body_lines(function)
        yield ("parameters", f"{path}:{name}"), num_parameters(function)


@functools.cache
def sizes() -> dict[tuple[str, str], int]:
    """Returns the measured sizes of the four packages by (aim, place)."""
    paths = python_files()
    found: dict[tuple[str, str], int] = {}
    for path in paths:
        found.update(measured(path, (ROOT / path).read_text()))
    folders = Counter(path.rpartition("/")[0] for path in paths)
    return found | {("modules", folder): number for folder, number in folders.items()}


def too_large(
    found: dict[tuple[str, str], int], exceptions: dict[tuple[str, str], tuple[int, str]]
) -> dict[tuple[str, str], int]:
    """Returns the sizes that exceed their aim or their exception."""
    return {
        key: value
        for key, value in found.items()
        if value > exceptions.get(key, (AIMS[key[0]], ""))[0]
    }


def unneeded(
    found: dict[tuple[str, str], int], exceptions: dict[tuple[str, str], tuple[int, str]]
) -> set[tuple[str, str]]:
    """Returns the exceptions that are no longer needed."""
    return {key for key in exceptions if found.get(key, 0) <= AIMS[key[0]]}


def test_everything_is_small_but_for_named_exceptions() -> None:
    assert too_large(sizes(), EXCEPTIONS) == {}


def test_every_exception_is_needed() -> None:
    assert unneeded(sizes(), EXCEPTIONS) == set()


def test_every_exception_has_a_reason() -> None:
    assert [key for key, (_, reason) in EXCEPTIONS.items() if len(reason.split()) < 3] == []


@pytest.mark.parametrize("path", python_files())
def test_ruff_is_silenced_for_named_exceptions_only(path: str) -> None:
    lines = (ROOT / path).read_text().splitlines()
    silenced = {number for number, line in enumerate(lines, 1) if _RULES_OF_RUFF.search(line)}
    excepted = {place for _, place in EXCEPTIONS}
    tree = ast.parse("\n".join(lines))
    named = {node.lineno for name, node in functions(tree) if f"{path}:{name}" in excepted}
    assert silenced - named == set()


def test_what_is_too_large_is_found() -> None:
    text = (
        "class A:\n"
        "    def f(self, a, b, *, c, d, e, f, **g):\n"
        '        """First."""\n' + 41 * "        pass\n" + "        f(*(a, b), *c)\n"
    )
    found = dict(measured("job/a.py", text))
    assert found == {
        ("lines", "job/a.py"): 45,
        ("starred", "job/a.py"): 1,
        ("body", "job/a.py:A.f"): 42,
        ("parameters", "job/a.py:A.f"): 7,
    }
    too_much = {key for key in found if key[0] != "lines"}
    assert set(too_large(found, {})) == too_much
    assert too_large(found, {key: (found[key], "") for key in too_much}) == {}
    assert unneeded(
        found, {("lines", "job/a.py"): (500, ""), ("body", "job/b.py:f"): (50, "")}
    ) == {
        ("lines", "job/a.py"),
        ("body", "job/b.py:f"),
    }
