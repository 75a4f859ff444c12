"""`tests/mutants.py` finds the same faults again, and changes only what it should."""

import ast

from tests.mutants import PARTS, changed, changes_of, functions_of
from tests.test_layers import ROOT


def test_every_change_gives_another_function_that_is_valid() -> None:
    for part in PARTS:
        functions = functions_of(ROOT, part)
        assert functions, part
        for _, function in functions.values():
            before = ast.unparse(function)
            for index in range(len(changes_of(function))):
                after = ast.unparse(changed(function, index))
                assert after != before
                ast.parse(after)
            assert ast.unparse(function) == before
