"""Counts how many small faults in the code the tests detect, in one tree or in two.

Draws faults with a seed from the functions that decide what is stored and measured. Puts each into
a copy of the tree, one at a time; the tests of that part must fail. With two trees, it changes only
functions whose code is the same in both, so that the counts can be compared: after a
reorganization, a test suite must detect no fewer.

python -m tests.mutants TREE [OTHER] --seed 1 --count 40
"""

import argparse
import ast
import copy
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

_TIMEOUT_S = 900
# part -> (files of its code, files of its tests); those that a tree does not have are left out
PARTS = {
    "run": (["job/run.py", "job/runs/*.py"], ["tests/job/test_run*.py", "tests/job/test_fence.py"]),
    "sampling": (
        ["job/data.py", "job/data/sampling.py", "job/data/dataset.py", "job/data/pipeline.py"],
        ["tests/job/test_data*.py", "tests/job/test_sampl*.py", "tests/job/test_pipeline*.py"],
    ),
    "losses": (["job/losses.py"], ["tests/job/test_losses.py"]),
    "metrics": (
        ["job/metrics.py", "job/measures.py", "job/metrics/*.py"],
        [
            "tests/job/test_metrics.py",
            "tests/job/test_measures.py",
            "tests/job/test_batch*.py",
            "tests/job/test_per_case*.py",
            "tests/job/test_threshold*.py",
            "tests/job/test_confusion.py",
            "tests/job/test_lesions.py",
            "tests/job/test_surface*.py",
            "tests/job/test_bootstrap.py",
        ],
    ),
    "masks": (
        ["data_prep/colormap.py", "data_prep/masks/reading.py", "data_prep/masks/color_map.py"],
        [
            "tests/data_prep/test_colormap.py",
            "tests/data_prep/imaging/test_masks.py",
            "tests/data_prep/imaging/test_color_map.py",
        ],
    ),
    "split": (
        ["data_prep/split.py", "data_prep/splits/*.py"],
        ["tests/data_prep/test_split.py", "tests/data_prep/splits/*.py"],
    ),
    "storage": (
        ["data_prep/storage.py", "flexunet/storage/*.py"],
        ["tests/data_prep/test_storage.py", "tests/flexunet/test_storage*.py"],
    ),
}
_SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
}


@dataclass(frozen=True)
class Mutant:
    """One fault: the node of a function that changes."""

    part: str
    function: str  # with its class
    index: int  # among the nodes of the function that can be changed

    def __str__(self) -> str:
        return f"{self.part}: {self.function} #{self.index}"


def functions_of(tree: Path, part: str) -> dict[str, tuple[Path, ast.FunctionDef]]:
    """Returns the functions of a part by qualified name, without names that occur twice."""
    found: dict[str, tuple[Path, ast.FunctionDef]] = {}
    twice = set()
    for pattern in PARTS[part][0]:
        for path in sorted(tree.glob(pattern)):
            for title, node in _functions(ast.parse(path.read_text())):
                twice |= {title} & found.keys()
                found[title] = (path, node)
    return {title: each for title, each in found.items() if title not in twice}


def _functions(module: ast.Module) -> Iterator[tuple[str, ast.FunctionDef]]:
    for node in module.body:
        if isinstance(node, ast.FunctionDef):
            yield node.name, node
        elif isinstance(node, ast.ClassDef):
            for member in node.body:
                if isinstance(member, ast.FunctionDef):
                    yield f"{node.name}.{member.name}", member


def changes_of(function: ast.FunctionDef) -> list[ast.AST]:
    """Returns the nodes of a function that can change: operators, numbers and `not`."""
    nodes = []
    for node in ast.walk(function):
        if isinstance(node, ast.Compare):
            is_changed = type(node.ops[0]) in _SWAPS
        elif isinstance(node, ast.BoolOp | ast.BinOp):
            is_changed = type(node.op) in _SWAPS
        elif isinstance(node, ast.Constant):
            is_changed = type(node.value) in (int, float, bool)
        else:
            is_changed = isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)
        if is_changed:
            nodes.append(node)
    return nodes


def changed(function: ast.FunctionDef, index: int) -> ast.FunctionDef:
    """Returns a copy of the function with the fault number `index`."""
    function = copy.deepcopy(function)
    node = changes_of(function)[index]
    if isinstance(node, ast.Compare):
        node.ops[0] = _SWAPS[type(node.ops[0])]()  # type: ignore[call-overload]
    elif isinstance(node, ast.BoolOp | ast.BinOp):
        node.op = _SWAPS[type(node.op)]()  # type: ignore[assignment]
    elif isinstance(node, ast.Constant):
        is_flag = isinstance(node.value, bool)
        node.value = not node.value if is_flag else node.value + 1  # type: ignore[operator]
    elif isinstance(node, ast.UnaryOp):
        node.op = ast.UAdd()
        node.operand = ast.Call(ast.Name("bool", ast.Load()), [node.operand], [])
    return ast.fix_missing_locations(function)


def draw(trees: list[Path], seed: int, count: int) -> list[Mutant]:
    """Returns `count` faults, spread over the parts, that exist in all trees."""
    generator = random.Random(seed)
    mutants: list[Mutant] = []
    by_part = {}
    for part in PARTS:
        found = [functions_of(tree, part) for tree in trees]
        bodies = [{name: ast.dump(node) for name, (_, node) in each.items()} for each in found]
        same = [
            Mutant(part, name, index)
            for name, body in sorted(bodies[0].items())
            if all(each.get(name) == body for each in bodies)
            for index in range(len(changes_of(found[0][name][1])))
        ]
        by_part[part] = generator.sample(same, len(same))
    while len(mutants) < count and any(by_part.values()):
        mutants += [each.pop() for each in by_part.values() if each][: count - len(mutants)]
    return mutants


def is_killed(tree: Path, mutant: Mutant) -> bool:
    """Returns whether a test of the part fails in a copy of `tree` with the fault."""
    with tempfile.TemporaryDirectory(prefix="flexunet-mutant-") as folder:
        place = Path(folder) / "tree"
        shutil.copytree(tree, place, ignore=shutil.ignore_patterns(".*", "__pycache__"))
        if (tree.parent / "shared").exists():
            os.symlink((tree.parent / "shared").resolve(), Path(folder) / "shared")
        path, function = functions_of(place, mutant.part)[mutant.function]
        _replace(path, function, changed(function, mutant.index))
        patterns = PARTS[mutant.part][1]
        tests = sorted({str(path) for each in patterns for path in place.glob(each)})
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not faults", *tests]
        try:
            done = subprocess.run(
                command,
                cwd=place,
                env=os.environ | {"PYTHONPATH": str(place)},
                capture_output=True,
                timeout=_TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return True
        assert done.returncode in (0, 1, 2), done.stdout.decode()
        return done.returncode != 0


def _replace(path: Path, old: ast.FunctionDef, new: ast.FunctionDef) -> None:
    lines = path.read_text().splitlines()
    first = min([old.lineno, *(each.lineno for each in old.decorator_list)])
    text = ast.unparse(new).splitlines()
    lines[first - 1 : old.end_lineno] = [" " * old.col_offset + line for line in text]
    path.write_text("\n".join(lines) + "\n")


def main() -> None:
    """Prints a line for each fault, and how many were detected."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trees", nargs="+", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    trees = [tree.resolve() for tree in arguments.trees]
    mutants = draw(trees, arguments.seed, arguments.count)
    for tree in trees:
        with ThreadPoolExecutor(arguments.jobs) as pool:
            found = list(pool.map(lambda mutant, tree=tree: is_killed(tree, mutant), mutants))
        for mutant, killed in zip(mutants, found, strict=True):
            sys.stdout.write(f"{tree}  {mutant}  {'killed' if killed else 'SURVIVED'}\n")
        total = json.dumps({"tree": str(tree), "killed": sum(found), "of": len(found)})
        sys.stdout.write(f"{total}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
