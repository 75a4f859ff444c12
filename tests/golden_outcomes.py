"""Runs the commands of golden.py with the code of one side; reads and compares their outcomes."""

import base64
import difflib
import fnmatch
import hashlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Outcome = dict[str, str]  # exit code, streams, and files by name: the text, or a digest

# Files that are not compared, and why.
LEFT_OUT = {
    "*.lock": "host and process of the run's owner",
    "*lease.json": "host, process and random id of the run's owner",
    "*throughput.csv": "images per second",
    "*inference-images-*.json": "modification times of the images",
    "*prep-state/scan-*.bin": "named after the path and the time of the source",
}
# Tags next to which a browser shows no blanks; next to `<b>` or `<a>`, and in `<pre>`, it does.
_BLOCKS = (
    "html|head|meta|title|style|body|section|div|p|h[1-6]|ul|ol|li|table|thead|tbody|tr|th|td"
    "|figure|figcaption"
)
# Of the text of these files (or streams): what is replaced, by what, and why.
VARYING = (
    ("*.html", "(<td>commit</td><td>)[^<]*", r"\1?", "the commit is what is compared"),
    (
        *("*.html", rf"\s*(</?(?:{_BLOCKS})\b[^>]*>|<pre\b[\s\S]*?</pre>)\s*", r"\1"),
        "a template breaks lines where a browser shows none",
    ),
    ("*.html", "&#x27;|&#39;", "'", "quotes are escaped by name or by number"),
    ("*.html", "&quot;|&#34;", '"', "likewise"),
    ("*environment.json", r'"commit": [^,]*', '"commit": ?', "the commit is what is compared"),
    ("*state.json", r'(images_per_s": )[\d.e+-]+', r"\1?", "speed"),
    (
        *("*COMMIT.json", r'("state.json", "size": )\d+(, "crc32c": )\d+(, "sha256": )"\w+"'),
        *(r"\1?\2?\3?", "state.json holds the speed"),
    ),
    ("*.json", r'("commit_sha256": )"\w+"', r"\1?", "of COMMIT.json, likewise"),
    ("std*", r"(?m)^[IWEF]\d{4} .*\n", "", "TensorFlow's lines: time and process"),
    ("stderr", r"(?m)^[\w ]+: \d+/\d+ \w+.*\n", "", "progress: more lines where it is slower"),
)
SECONDS = "seconds"  # of an outcome, not compared
_TIMEOUT_S = 900
_END_S = 30  # limit for a command to end after a stop signal
_MAX_TEXT = 200_000  # characters of a file that are kept for a diff
_SHOWN_FILES, _SHOWN_LINES, SHOWN_WIDTH = 4, 6, 200
_OTHERS = ("FLEXUNET_", "RAY_", "TF_", "PYTHON", "CUDA_", "GOOGLE_", "STORAGE_", "GIT_")

# A module that Python imports at the start of every process that has its folder on the path.
WITNESS = """
import os, sys
class Witness:
    seen = set()
    def find_spec(name, path=None, target=None):
        package = name.partition(".")[0]
        key = os.getpid(), package
        if package in ("flexunet", "data_prep", "job", "launcher") and package != name:
            if key not in Witness.seen:
                Witness.seen.add(key)
                with open(os.environ["GOLDEN_WITNESS"], "a") as file:
                    file.write(f"{os.getpid()} {sys.modules[package].__file__}\\n")
sys.meta_path.insert(0, Witness)
"""


@dataclass(frozen=True)
class Item:
    """One command, and which of its outcomes are compared.

    Attributes:
        made: the file or folder that it makes; empty: none.
        after: names of the items that must run before.
        processes: minimum number of processes that import the project.
        code: the expected exit code; for a mistake not 0.
    """

    name: str
    command: str
    made: str = ""
    after: tuple[str, ...] = ()
    processes: int = 1
    code: int = 0


@dataclass(frozen=True)
class Side:
    """A tree of code and the folder in which its commands run."""

    tree: Path
    work: Path  # of the same name on both sides: datasets and runs are named after it

    @property
    def notes(self) -> Path:
        """Returns the folder in which processes record their imports."""
        return self.work.with_name("notes")


class Runner:
    """Runs commands, and ends them if the comparison is aborted."""

    def __init__(self, witness: Path) -> None:
        self._witness = witness  # folder of the module that notes imports
        self._running = set[subprocess.Popen[str]]()
        self._lock = threading.Lock()
        self._is_over = False

    def outcome(self, item: Item, side: Side, earlier: Sequence[Future[Any]]) -> Outcome:
        """Runs a command after its predecessors have ended, and returns its outcome."""
        for each in earlier:
            each.result()
        began = time.monotonic()
        notes = side.notes / re.sub(r"\W+", "-", item.name)
        found = self._run(item, side, notes) | dict(files_of(side.work / item.made, item.made))
        texts = {name: normalised(name, text, side) for name, text in found.items()}
        if item.processes > 1:  # which of them speaks first is chance
            texts["stderr"] = "\n".join(sorted(texts["stderr"].splitlines()))
        texts["imports"] = import_problem(item, side, notes)
        return texts | {SECONDS: f"{time.monotonic() - began:.1f}"}

    def _run(self, item: Item, side: Side, notes: Path) -> Outcome:
        environment = {k: v for k, v in os.environ.items() if not k.startswith(_OTHERS)}
        environment |= {"PYTHONPATH": f"{self._witness}{os.pathsep}{side.tree}"}
        environment |= {"GOLDEN_WITNESS": str(notes), "COLUMNS": "100", "CUDA_VISIBLE_DEVICES": ""}
        with self._lock:
            if self._is_over:
                raise RuntimeError("given up")
            process = subprocess.Popen(
                [sys.executable, "-P", *python_words(item.command, side.tree)],
                cwd=side.work,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            self._running.add(process)
        try:
            out, errors = process.communicate(timeout=_TIMEOUT_S)
        except subprocess.TimeoutExpired:  # as its exit code will say
            end(process)
            out, errors = process.communicate()
        finally:
            end(process)
            self._running.discard(process)
        return {"exit code": str(process.returncode), "stdout": out, "stderr": errors}

    def give_up(self) -> None:
        """Ends all commands and starts no more."""
        with self._lock:
            self._is_over = True
        for process in list(self._running):
            end(process)


def end(process: subprocess.Popen[str]) -> None:
    """Ends a process, if it still runs, and a Ray that it started."""
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(_END_S)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def python_words(command: str, tree: Path) -> list[str]:
    """Returns the Python arguments that run a command with the entry point of its tree."""
    first, *words = command.split()
    if first == "phantoms":
        return ["-m", "data_prep.phantoms", *words]
    if first == "python":
        return words
    project = tomllib.loads((tree / "pyproject.toml").read_text())["project"]
    module, _, function = project["scripts"][first].partition(":")
    return ["-c", f"import sys; from {module} import {function}; sys.exit({function}())", *words]


def import_problem(item: Item, side: Side, notes: Path) -> str:
    """Returns which processes of a command used code of another side; empty: none."""
    text = notes.read_text() if notes.exists() else ""
    lines = [line.split(" ", 1) for line in text.splitlines()]
    for _, file in lines:
        if not Path(file).is_relative_to(side.tree):
            return f"{file} was imported"
    count = len({process for process, _ in lines})
    return "" if count >= item.processes else f"{count} of {item.processes} processes import it"


def files_of(path: Path, made: str) -> Iterator[tuple[str, str]]:
    """Yields the name and content of a file, or of each file in a folder."""
    if not made:
        return
    for each in [path] if path.is_file() else sorted(path.rglob("*")):
        name = made if each == path else str(each.relative_to(path))
        if each.is_file() and not any(fnmatch.fnmatch(name, pattern) for pattern in LEFT_OUT):
            yield name, text_of(each.read_bytes())


def text_of(data: bytes) -> str:
    """Returns text as it is, its embedded pictures and all that is no text as digests."""
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return digest(data)
    text = re.sub(r"(base64,)([\w+/=]+)", lambda m: m[1] + digest(base64.b64decode(m[2])), text)
    return text if len(text) <= _MAX_TEXT and "\0" not in text else digest(data)


def digest(data: bytes) -> str:
    """Returns a digest and the size of bytes, as text."""
    return f"sha256 {hashlib.sha256(data).hexdigest()[:16]} of {len(data)} bytes"


def normalised(name: str, text: str, side: Side) -> str:
    """Returns text without paths and without parts that change from run to run."""
    text = text.replace(str(side.work), "<work>").replace(str(side.tree), "<tree>")
    for pattern, found, replacement, _ in VARYING:
        if fnmatch.fnmatch(name, pattern):
            text = re.sub(found, replacement, text)
    return text


def invalid(item: Item, base: Outcome) -> list[str]:
    """Returns the reasons why an outcome of BASE cannot be compared; none: it can."""
    lines = [f"of BASE: {base['imports']}"] if base["imports"] else []
    if base["exit code"] != str(item.code):
        shown = f"exit code {base['exit code']}, not {item.code}: {base['stderr'][-SHOWN_WIDTH:]}"
        lines.append(f"of BASE: {shown}")
    if "Traceback" in base["stderr"]:  # equal ones are no answer to a mistake
        lines.append("of BASE: a traceback in stderr")
    return lines


def strays(folder: Path, made: Iterable[str]) -> set[str]:
    """Returns the files in a side's folder that are not in `made`."""
    known = {folder / name for name in made}
    files = (each for each in folder.rglob("*") if each.is_file())
    found = (each for each in files if not known & {each, *each.parents})
    return {str(each.relative_to(folder)) for each in found}


def lines_of(text: str) -> list[str]:
    """Returns lines, with long lines of HTML and JSON split into pieces."""
    lines = text.splitlines()
    pieces = (re.sub("(</|, )", r"\n\1", x) if len(x) > SHOWN_WIDTH else x for x in lines)
    return "\n".join(pieces).splitlines()


def differences(base: Mapping[str, str], head: Mapping[str, str]) -> list[str]:
    """Returns the first differences of two outcomes as lines; none: they are equal."""
    names = [name for name in {**base, **head} if base.get(name) != head.get(name)]
    names = [name for name in names if name != SECONDS]
    lines = []
    for name in names[:_SHOWN_FILES]:
        if name not in base or name not in head:
            lines.append(f"{name}: only {'before' if name in base else 'now'}")
            continue
        texts = lines_of(base[name]), lines_of(head[name])
        diff = list(difflib.unified_diff(*texts, lineterm="", n=0))[2:]
        changed = [line for line in diff if not line.startswith("@@")] or ["other line ends"]
        lines.append(f"{name}:")
        lines += [f"  {line[:SHOWN_WIDTH]}" for line in changed[:_SHOWN_LINES]]
    more = len(names) - _SHOWN_FILES
    return [*lines, f"and {more} more"] if more > 0 else lines
