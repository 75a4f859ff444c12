"""Imports run one way only, also inside functions: between packages and within each of them."""

import ast
import subprocess
import sys
from collections.abc import Iterable, Mapping, Set

import pytest

from tests.source_tree import (
    API,
    ROOT,
    import_graph,
    imported_names,
    module_name,
    outside_api,
    python_files,
)

FRAMEWORKS = {"tensorflow", "tensorflow_io", "keras"}
IMAGES = {"cv2", "PIL", "pydicom", "tifffile", "scipy", "matplotlib", "h5py"}
BANNED = {
    "flexunet": {"data_prep", "job", "launcher", "ray", *FRAMEWORKS, *IMAGES},
    "data_prep": {"job", "launcher", "ray", *FRAMEWORKS},
    "job": {"launcher", "ray"},
    "launcher": set[str](),
}
RUN_PROTOCOL = ("layout", "lease", "ownership", "checkpoints", "identity", "status", "run")
FRAMEWORK_FREE = {f"job/runs/{name}.py": {"tensorflow", "keras"} for name in RUN_PROTOCOL}
# What the module of the Python API may name in its table.
ABOVE_API = {"data_prep", "job"}
# May import these, but only inside its functions: a reader that is chosen by an option.
LAZY = {"data_prep/imaging/dicom/tfio.py": {"tensorflow", "tensorflow_io"}}

# Each package's own order, lowest first: a module imports from its own entry and from earlier ones.
COMMANDS = [
    *("job.evaluate", "job.export", "job.infer", "job.plan", "job.report", "job.train"),
    *("job.doctor", "job.compare"),
]
ORDERS = {
    "flexunet": [
        "flexunet.errors",
        "flexunet.text",
        "flexunet.paths",
        "flexunet.synonyms",
        "flexunet.tables",
        "flexunet.python_path",
        "flexunet.native_stderr",
        "flexunet.progress",
        "flexunet.settings",
        "flexunet.storage",
        "flexunet.json_files",
        "flexunet.process_pool",
        "flexunet.cli",
    ],
    "data_prep": [
        "data_prep.imaging",
        "data_prep.masks",
        "data_prep.sources",
        "data_prep.splits",
        "data_prep.shards",
        "data_prep.phantoms",
        "data_prep.report_figures",
        "data_prep.config",
        "data_prep.hidden_names",
        "data_prep.prep_input",
        "data_prep.choices",
        "data_prep.assignment",
        "data_prep.format_choice",
        "data_prep.manifest_builder",
        "data_prep.report_files",
        "data_prep.pipeline",
        "data_prep.inspection",
        "data_prep.cli",
        "data_prep.__main__",
    ],
    "job": [
        "job.config",
        "job.data",
        "job.compat",
        "job.ssim",
        "job.deep_supervision",
        "job.losses",
        "job.metrics",
        "job.models",
        "job.optimization",
        "job.distributed",
        "job.runs",
        "job.postprocessing",
        "job.planning",
        "job.reporting",
        "job.inference",
        "job.evaluation",
        "job.comparison",
        "job.exporting",
        "job.trackers",
        "job.training",
        "job.api",
        *COMMANDS,
    ],
    "launcher": [
        "launcher.cluster",
        "launcher.config",
        "launcher.channel",
        "launcher.jobs",
        "launcher.executors",
        "launcher.worker",
        "launcher.worker_group",
        "launcher.supervisor",
        "launcher.commands",
        "launcher.cli",
        "launcher.__main__",
    ],
}


def problems(text: str, banned: Set[str]) -> list[str]:
    """Returns a line for each import that `banned` or the project's rules do not allow."""
    tree = ast.parse(text)
    names = list(imported_names(tree))
    found = [name for name in names if name.split(".")[0] in banned]
    found += [name for name in names if name.startswith((".", "tensorflow.keras"))]
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


def outside_functions(text: str) -> str:
    """Returns the module without its functions: the code that runs on import."""
    tree = ast.parse(text)
    tree.body = [each for each in tree.body if not isinstance(each, ast.FunctionDef)]
    return ast.unparse(tree)


def entry_of(module: str, order: Iterable[str]) -> str | None:
    """Returns the entry of `order` that is the module or one of its parent packages."""
    return next((each for each in order if f"{module}.".startswith(f"{each}.")), None)


def upward(graph: Mapping[str, Set[str]], order: list[str]) -> dict[tuple[str, str], list[str]]:
    """Returns the imports against `order`, and those between commands, by their two entries."""
    found: dict[tuple[str, str], list[str]] = {}
    for module, imports in graph.items():
        for other in imports:
            ours, theirs = entry_of(module, order), entry_of(other, order)
            if ours is None or theirs is None or ours == theirs:
                continue
            if order.index(theirs) > order.index(ours) or {ours, theirs} <= set(COMMANDS):
                found.setdefault((ours, theirs), []).append(f"{module} -> {other}")
    return found


def circles(graph: Mapping[str, Set[str]]) -> set[frozenset[str]]:
    """Returns the groups of modules that import each other, directly or indirectly."""
    reached = {module: set(imports) for module, imports in graph.items()}
    for between in graph:
        for imports in reached.values():
            if between in imports:
                imports |= reached[between]
    return {
        frozenset(other for other in reached[module] if module in reached[other])
        for module in graph
        if module in reached[module]
    }


def test_every_package_has_modules() -> None:
    assert {path.split("/")[0] for path in python_files()} == set(BANNED)


@pytest.mark.parametrize("name", python_files())
def test_module_imports_leftwards_only(name: str) -> None:
    banned = BANNED[name.split("/")[0]] | FRAMEWORK_FREE.get(name, set())
    text = (ROOT / name).read_text()
    if name == API:
        assert problems(text, banned - ABOVE_API) == []
        text = outside_api(text)
    assert problems(text, banned - LAZY.get(name, set())) == []
    assert problems(outside_functions(text), banned) == []


def test_exceptions_are_of_modules_that_exist() -> None:
    assert {*FRAMEWORK_FREE, *LAZY, API} <= set(python_files())


@pytest.mark.parametrize("package", sorted(ORDERS))
def test_every_module_has_its_place_in_the_order(package: str) -> None:
    inside = [module for module in map(module_name, python_files()) if module.startswith(package)]
    assert [each for each in inside if not entry_of(each, ORDERS[package])] == [package]


@pytest.mark.parametrize("package", sorted(ORDERS))
def test_imports_inside_a_package_run_downwards(package: str) -> None:
    found = upward(import_graph(), ORDERS[package])
    assert [line for lines in found.values() for line in lines] == []


def test_no_modules_import_each_other() -> None:
    assert circles(import_graph()) == set()


def test_upward_imports_and_circles_are_found() -> None:
    graph = {
        "job.train": {"job.runs.run", "job.evaluate"},
        "job.runs.run": {"job.training.step", "job.runs.lease"},
        "job.runs.lease": {"job.runs.layout"},
        "job.runs.layout": {"job.runs.run"},
        "job.training.step": set(),
        "job.evaluate": set(),
    }  # fmt: skip
    assert upward(graph, ORDERS["job"]) == {
        ("job.train", "job.evaluate"): ["job.train -> job.evaluate"],
        ("job.runs", "job.training"): ["job.runs.run -> job.training.step"],
    }
    assert circles(graph) == {frozenset({"job.runs.run", "job.runs.lease", "job.runs.layout"})}


def test_preparation_does_not_load_tensorflow() -> None:
    """Not even by way of another package; in a process of its own, as others have loaded it."""
    code = "import sys, data_prep.cli; print('tensorflow' in sys.modules)"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert found.stdout == "False\n"


@pytest.mark.parametrize(
    ("text", "is_found"),
    [
        ("_MODULES = {'train': 'job.train'}", False),
        ("if TYPE_CHECKING:\n    from job.train import main", False),
        ("OTHERS = {'train': 'job.train'}", True),
        ("if not TYPE_CHECKING:\n    from job.train import main", True),
        ("if TYPE_CHECKING:\n    import click\nelse:\n    import job.train", True),
        ("def f():\n    if TYPE_CHECKING:\n        import job.train", True),
        ("def f():\n    _MODULES = {'train': 'job.train'}", True),
    ],
)
def test_only_the_table_of_the_api_names_packages_above_it(text: str, is_found: bool) -> None:
    assert (problems(outside_api(text), {"job"}) != []) is is_found


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
        "__import__('ray')",
        "TABLE = {'train': 'job.train'}",
        "from . import run",
        "from tensorflow import keras",
        "from tensorflow.keras import layers",
        "import tensorflow.keras",
        "import tensorflow as tf\ntf.keras.layers.Dense(1)",
    ],
)
def test_forbidden_import_is_found(text: str) -> None:
    assert problems(text, {"ray", "job"})


def test_allowed_imports_pass() -> None:
    assert problems("import keras, arrays\nfrom flexunet.storage import ObjectStore", {"ray"}) == []
