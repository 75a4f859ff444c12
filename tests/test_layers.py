"""Imports run leftwards only, those inside functions too: data_prep <- job <- launcher."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = {
    "data_prep": {"job", "launcher", "tensorflow", "tensorflow_io", "keras", "ray"},
    "job": {"launcher", "ray"},
    "launcher": set[str](),
}
FRAMEWORK_FREE = {"job/runs/run.py": {"tensorflow", "keras"}}
# May import these, but only inside its functions: a reader that is chosen by an option.
LAZY = {"data_prep/imaging/dicom_tfio.py": {"tensorflow", "tensorflow_io"}}


def imported_modules(tree: ast.AST) -> Iterator[str]:
    """Yields the full dotted name of everything that is imported."""
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


def problems(text: str, banned: set[str]) -> list[str]:
    """Returns a line for each import that `banned` or the project's rules forbid."""
    tree = ast.parse(text)
    found = [name for name in imported_modules(tree) if name.split(".")[0] in banned]
    found += [name for name in imported_modules(tree) if name.startswith(".")]
    found += [name for name in imported_modules(tree) if name.startswith("tensorflow.keras")]
    # Ray sets TF_USE_LEGACY_KERAS=1 in its workers: `tf.keras` is another library there.
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Attribute)
            and node.attr == "keras"
            and isinstance(node.value, ast.Name)
            and node.value.id in ("tf", "tensorflow")
        ):
            found.append(f"tf.keras in line {node.lineno}")
    return found


def modules() -> list[str]:
    return sorted(
        str(path.relative_to(ROOT)) for room in ROOMS for path in (ROOT / room).rglob("*.py")
    )


def test_every_room_has_modules() -> None:
    assert {name.split("/")[0] for name in modules()} == set(ROOMS)


@pytest.mark.parametrize("name", modules())
def test_module_imports_leftwards_only(name: str) -> None:
    banned = ROOMS[name.split("/")[0]] | FRAMEWORK_FREE.get(name, set())
    text = (ROOT / name).read_text()
    assert problems(text, banned - LAZY.get(name, set())) == []
    assert problems(outside_functions(text), banned) == []


def outside_functions(text: str) -> str:
    """Returns the module without its functions: what runs when it is imported."""
    tree = ast.parse(text)
    tree.body = [each for each in tree.body if not isinstance(each, ast.FunctionDef)]
    return ast.unparse(tree)


def test_preparation_does_not_load_tensorflow() -> None:
    """Not even by way of another package; in a process of its own, as others have loaded it."""
    code = "import sys, data_prep.pipeline; print('tensorflow' in sys.modules)"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert found.stdout == "False\n"


def test_import_outside_of_a_function_is_found() -> None:
    lazy = "def f():\n    import tensorflow_io"
    assert problems(lazy, {"tensorflow_io"})
    assert not problems(outside_functions(lazy), {"tensorflow_io"})
    assert problems(
        outside_functions(f"{lazy}\nif x:\n    import tensorflow_io"), {"tensorflow_io"}
    )


@pytest.mark.parametrize(
    "text",
    [
        "import ray",
        "import ray.train as train",
        "def f():\n    from ray import train",
        "if x:\n    import importlib\n    importlib.import_module('ray.data')",
        "from . import run",
        "from tensorflow import keras",
        "from tensorflow.keras import layers",
        "import tensorflow.keras",
        "import tensorflow as tf\ntf.keras.layers.Dense(1)",
    ],
)
def test_forbidden_import_is_found(text: str) -> None:
    assert problems(text, {"ray"})


def test_allowed_imports_pass() -> None:
    assert problems("import keras, arrays\nfrom flexunet.storage import Store", {"ray"}) == []
