"""The wheel, the image's files, the type check and the tree have the same packages.

The wheel is built from the files that the Dockerfile copies, and used from another folder.
"""

import ensurepip
import fnmatch
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.source_tree import PACKAGES, ROOT

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def package_files(folder: Path) -> set[str]:
    """Returns every file of the four packages below `folder`, modules and data."""
    return {
        str(path.relative_to(folder))
        for package in PACKAGES
        for path in (folder / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def copied_paths(stages: tuple[str, ...]) -> list[str]:
    """Returns the paths that these stages of the Dockerfile copy from the project, in order."""
    stage, found = "", list[str]()
    for line in (ROOT / "Dockerfile").read_text().splitlines():
        if match := re.match(r"FROM \S+ AS (\S+)", line):
            stage = match[1]
        elif line.startswith("COPY ") and "--from" not in line and stage in stages:
            *sources, target = line.split()[1:]
            kept = target if target.startswith("/") else sources[0]  # elsewhere in the image
            assert target in ("./", kept), line
            found += sources
    return found


def is_ignored(path: str) -> bool:
    """Returns whether `.dockerignore` excludes `path`; the last matching line decides."""
    ignored = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pattern = line.removeprefix("!").removeprefix("**/")
        prefixes = ["/".join(path.split("/")[:end]) for end in range(1, path.count("/") + 2)]
        if "**/" in line:
            prefixes = path.split("/")
        if any(fnmatch.fnmatch(prefix, pattern) for prefix in prefixes):
            ignored = not line.startswith("!")
    return ignored


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Builds the wheel from the files of the image's build, with the build backend, offline."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in copied_paths(("uv", "package")):
        for path in [ROOT / name, *(ROOT / name).rglob("*")]:
            relative = path.relative_to(ROOT)
            if path.is_file() and not is_ignored(str(relative)):
                (source / relative).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, source / relative)
    code = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    command = [sys.executable, "-c", code, str(target)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (found,) = target.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the `bin` of a new environment with the wheel and this environment's dependencies."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    # A path of its own comes later than the wheel, and the .pth files in it (those of an editable
    # install) are not read.
    (packages,) = folder.glob("lib/python*/site-packages")
    paths = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (packages / "dependencies.pth").write_text("\n".join(paths))
    # Out of its wheel, as `ensurepip` runs it: to install it takes longer than to use it.
    pip = [folder / "bin/python", f"{pip_wheel()}/pip", "--disable-pip-version-check", "install"]
    offline = ["--quiet", "--no-deps", "--no-index", "--ignore-installed", "--no-compile"]
    subprocess.run([*pip, *offline, wheel], check=True)
    return folder / "bin"


def pip_wheel() -> Path:
    """Returns the wheel of pip that comes with this Python; distributions may keep it elsewhere."""
    folders = [Path(ensurepip.__file__).parent / "_bundled"]
    folders += [Path(folder) for folder in [sysconfig.get_config_var("WHEEL_PKG_DIR")] if folder]
    return next(path for folder in folders for path in folder.glob("pip-*.whl"))


def run_installed(command: list[str | Path], folder: Path) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_everything_names_the_same_packages() -> None:
    with_init = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}
    assert with_init == set(PACKAGES)
    assert PYPROJECT["tool"]["mypy"]["packages"] == list(PACKAGES)
    patterns = PYPROJECT["tool"]["setuptools"]["packages"]["find"]["include"]
    assert patterns == [each for package in PACKAGES for each in (package, f"{package}.*")]
    copied = copied_paths(("uv", "package"))
    assert copied == ["pyproject.toml", "uv.lock", "README.md", "LICENSE", *PACKAGES]


def test_dockerignore_lets_in_what_the_dockerfile_copies_and_no_more() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    let_in = [line.removeprefix("!") for line in lines if line.startswith("!")]
    assert sorted(let_in) == sorted(copied_paths(("uv", "package", "bucket")))
    assert not any(is_ignored(path) for path in package_files(ROOT))
    assert is_ignored("job/__pycache__/train.pyc")
    assert is_ignored("tests/conftest.py")
    assert is_ignored(".git/config")


def test_every_folder_of_modules_is_a_package() -> None:
    """Every folder has an `__init__.py`; without it, the wheel would not contain the folder."""
    folders = {path.rpartition("/")[0] for path in package_files(ROOT) if path.endswith(".py")}
    assert [each for each in sorted(folders) if not (ROOT / each / "__init__.py").is_file()] == []


def test_wheel_holds_every_module_and_data_file(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = archive.read(f"flexunet-{PYPROJECT['project']['version']}.dist-info/METADATA")
    assert names == package_files(ROOT)
    assert {f"{package}/py.typed" for package in PACKAGES} <= names
    assert b"Typing :: Typed" in metadata


def test_wheel_works_from_another_folder(installed: Path, tmp_path: Path) -> None:
    python = installed / "python"
    file = run_installed([python, "-c", "import flexunet; print(flexunet.__file__)"], tmp_path)
    assert Path(file).is_relative_to(installed.parent)
    version = run_installed([installed / "flexunet", "--version"], tmp_path)
    assert PYPROJECT["project"]["version"] in version
    for module in ("data_prep", "job.train"):
        assert "--config" in run_installed([python, "-m", module, "--help"], tmp_path)


def test_command_of_the_wheel_prepares_a_dataset(installed: Path, tmp_path: Path) -> None:
    assert "prep" in run_installed([installed / "flexunet", "--help"], tmp_path)
    write_source(tmp_path)
    sizes: list[str | Path] = ["--image-size", "16", "--num-processes", "1"]
    run_installed([installed / "flexunet", "prep", "source", "dataset", *sizes], tmp_path)
    assert (tmp_path / "dataset" / "dataset.json").is_file()


# A program of a user, with no `if __name__ == "__main__"` though workers are processes.
PROGRAM = """
import sys

import flexunet

dataset = flexunet.prepare("source", "dataset", image_size=16, num_processes=2, progress=False)
image, mask = dataset.read(dataset.samples.index[0])
print(dataset.splits, image.shape, int(mask.max()))
print([name for name in ("tensorflow", "ray", "keras") if name in sys.modules])
"""

# What a type checker must find in it, and no more.
TYPED_PROGRAM = """
import numpy as np

import flexunet
from flexunet import Run, train


def show(event: flexunet.Event) -> None:
    if isinstance(event, flexunet.EpochEnded):
        print(event.epoch, event.metrics["val_loss"])


run: Run = train(data="dataset", epochs=5, model={"num_layers": 5}, on_event=show)
mask = run.predict(np.zeros((4, 4), np.uint8), flips="both")
print(mask.shape, run.config.model.num_layers, flexunet.infer(run, "images").masks)
with_probabilities = run.predict(np.zeros((4, 4), np.uint8), probabilities=True)
print(with_probabilities.probabilities.shape)
train(epocs=5)
flexunet.no_such_name
run.predict(np.zeros((4, 4), np.uint8), flips="twice")
"""


def write_source(folder: Path) -> None:
    for kind, value in (("images", 100), ("masks", 255)):
        (folder / "source" / kind).mkdir(parents=True)
        for i in range(6):
            pixels = np.zeros((16, 16), np.uint8)
            pixels[4:12, 4:12] = value + i if kind == "images" else value
            Image.fromarray(pixels).save(folder / "source" / kind / f"{i}.png")


def test_a_program_uses_the_api_of_the_wheel(installed: Path, tmp_path: Path) -> None:
    write_source(tmp_path)
    (tmp_path / "program.py").write_text(PROGRAM)
    shown = run_installed([installed / "python", "program.py"], tmp_path).splitlines()
    assert shown[-2:] == ["{'train': 4, 'valid': 1, 'test': 1} (16, 16, 1) 1", "[]"]


def test_a_program_is_type_checked_by_the_wheel(installed: Path, tmp_path: Path) -> None:
    """40 s of CPU time: mypy reads the packages and NumPy's types."""
    (tmp_path / "typed.py").write_text(TYPED_PROGRAM)
    command = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "--cache-dir"]
    options = [str(tmp_path / "cache"), "--python-executable", str(installed / "python")]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [*command, *options, "typed.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    lines = TYPED_PROGRAM.splitlines()
    found = [
        (lines[int(line.split(":")[1]) - 1], line.rpartition("[")[2].rstrip("]"))
        for line in done.stdout.splitlines()
        if ": error:" in line
    ]
    assert found == [
        ("train(epocs=5)", "call-arg"),
        ("flexunet.no_such_name", "attr-defined"),
        (lines[-1], "call-overload"),
    ], done.stdout + done.stderr


def test_the_citation_names_the_version_and_the_licence() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = PYPROJECT["project"]
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])
