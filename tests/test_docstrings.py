"""Docstrings describe arguments and attributes that are there, under their names."""

import ast
import re
from collections.abc import Iterator

import pytest

from tests.source_tree import PACKAGES, ROOT, python_files

_ENTRY = re.compile(r"^    (\w+(?:, \w+)*):", re.MULTILINE)


def described(text: str, section: str) -> set[str]:
    """Returns the names that a section of a docstring describes."""
    match = re.search(rf"^{section}:\n((?: {{4}}.*\n?|\n)*)", text, re.MULTILINE)
    entries = _ENTRY.findall(match[1]) if match else []
    return {name for entry in entries for name in entry.split(", ")}


def parameters_of(node: ast.FunctionDef | ast.AsyncFunctionDef) -> set[str]:
    return {child.arg for child in ast.walk(node.args) if isinstance(child, ast.arg)}


def attributes_of(node: ast.ClassDef) -> set[str]:
    """Returns the fields, the methods and what methods set or read of `self`."""
    names = {child.name for child in node.body if isinstance(child, ast.FunctionDef)}
    for child in ast.walk(node):
        if isinstance(child, ast.AnnAssign) and isinstance(child.target, ast.Name):
            names.add(child.target.id)
        elif isinstance(child, ast.Attribute):
            names.add(child.attr)
    return names


def unknown_names(source: str) -> Iterator[str]:
    """Yields "line: name" of what a docstring describes and what is not there."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            unknown = described(ast.get_docstring(node) or "", "Args") - parameters_of(node)
        elif isinstance(node, ast.ClassDef):
            text = ast.get_docstring(node) or ""
            unknown = described(text, "Attributes") - attributes_of(node)
        else:
            continue
        yield from (f"{node.lineno}: {name}" for name in sorted(unknown))


@pytest.mark.parametrize("package", PACKAGES)
def test_docstrings_describe_what_is_there(package: str) -> None:
    assert not [
        f"{path}:{problem}"
        for path in python_files()
        if path.startswith(f"{package}/")
        for problem in unknown_names((ROOT / path).read_text())
    ]


FUNCTION = """
def f(a, *, b):
    '''Does.

    Args:
        a, c: one.
        b: two:
            x: y.
    '''
"""
CLASS = """
class A:
    '''Is.

    Attributes:
        x: one.
        y: two.
    '''

    x: int
"""


@pytest.mark.parametrize(("source", "problem"), [(FUNCTION, "2: c"), (CLASS, "2: y")])
def test_a_name_that_is_not_there_is_found(source: str, problem: str) -> None:
    assert list(unknown_names(source)) == [problem]
