"""Finds the modules of the four packages and what each imports, for the tests of the source."""

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("flexunet", "data_prep", "job", "launcher")  # imports run leftwards only
# The Python API: its table, and what it imports for type checkers, name packages above it. Nothing
# of that is imported with it.
API = "flexunet/__init__.py"
API_TABLE = "_MODULES"
_MODULE = re.compile(rf"({'|'.join(PACKAGES)})(\.[a-z_0-9]+)+")


def python_files() -> list[str]:
    """Returns the path of every module, relative to the project's folder."""
    return sorted(
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
    )


def module_name(path: str) -> str:
    """Returns the dotted name of the module at `path`; for an `__init__`, of the package."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imported_names(tree: ast.AST) -> Iterator[str]:
    """Yields the full dotted name of every import, also inside functions.

    A string with the name of a module counts too: tables name modules to import later.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            yield from (f"{'.' * node.level}{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name in ("import_module", "__import__"):
                yield str(node.args[0].value)
        elif isinstance(node, ast.Constant) and _MODULE.fullmatch(str(node.value)):
            yield str(node.value)


def outside_api(text: str) -> str:
    """Returns the module of the API without its table and what is for type checkers alone."""
    tree = ast.parse(text)

    def is_of_api(node: ast.stmt) -> bool:
        if isinstance(node, ast.If):
            return ast.unparse(node.test) == "TYPE_CHECKING" and not node.orelse
        return isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == API_TABLE

    tree.body = [each for each in tree.body if not is_of_api(each)]
    return ast.unparse(tree)


@functools.cache
def import_graph() -> dict[str, set[str]]:
    """Returns, for each module of the four packages, the modules of these that it imports."""
    paths = {module_name(path): path for path in python_files()}
    graph = {}
    for module, path in paths.items():
        text = (ROOT / path).read_text()
        names = imported_names(ast.parse(outside_api(text) if path == API else text))
        # `from a.b import c` imports the module a.b.c, or a name of the module a.b.
        found = {name if name in paths else name.rpartition(".")[0] for name in names}
        graph[module] = found & set(paths) - {module}
    return graph
