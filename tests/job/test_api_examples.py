"""The examples in the docstrings of the Python API work, one after the other."""

import doctest
import shutil
from pathlib import Path
from typing import Any

import pytest

import flexunet
from tests.job.discs import write_discs

# In the order in which one needs what the other makes.
DOCUMENTED: dict[str, Any] = {
    "inspect": flexunet.inspect,
    "prepare": flexunet.prepare,
    "open_dataset": flexunet.open_dataset,
    "Dataset.read": flexunet.Dataset.read,
    "Dataset.as_tf_dataset": flexunet.Dataset.as_tf_dataset,
    "plan": flexunet.plan,
    "train": flexunet.train,
    "open_run": flexunet.open_run,
    "Run.load_model": flexunet.Run.load_model,
    "Run.predict": flexunet.Run.predict,
    "evaluate": flexunet.evaluate,
    "infer": flexunet.infer,
    "export": flexunet.export,
    "write_report": flexunet.write_report,
    "compare": flexunet.compare,
}


def test_every_function_of_the_api_has_an_example() -> None:
    functions = [name for name in flexunet.__all__ if name.islower() and name[0] != "_"]
    # `open_store` is not for data: it is what the others are made of.
    assert set(functions) - {"open_store"} <= set(DOCUMENTED)
    assert [name for name, each in DOCUMENTED.items() if ">>>" not in (each.__doc__ or "")] == []


def test_examples_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trains a small network: 20 s of CPU time."""
    write_discs(tmp_path / "source", num_images=20)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"flexunet": flexunet}
    finder = doctest.DocTestFinder(recurse=False)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    texts: list[str] = []
    for name, each in DOCUMENTED.items():
        (found,) = finder.find(each, name, module=False, globs=names)
        found.globs = names  # else each has a copy
        if name == "compare":  # another run; to train one takes long
            shutil.copytree("runs/first", "runs/second")
        runner.run(found, out=texts.append, clear_globs=False)
        assert texts == [], "".join(texts)
