"""Checks that a refactoring changes nothing: runs the same commands with old and with new code.

    python tests/golden.py BASE [--only PATTERN] [--cache DIR] [--keep]

Code that only moves must not change any file, table, mask or message. The repository stores no
results, because CPUs round differently. Both sides run now: the commit BASE in its own git
worktree, and the working tree, with uncommitted changes, in a copy that later edits do not affect.
Commands run through the command line only, so modules may move. Every process, including Ray's
workers and others that commands start, records from which tree it imports packages; it must be its
own side's.

The script prints one line per item: whether exit code, output and files are equal. A last line
lists other files that only one side has. The exit code is 1 if something differs, and 2 if nothing
can be compared; an item that BASE does not have yet differs. LEFT_OUT and VARYING in
golden_outcomes.py list what changes from run to run, and why; golden.toml has the commands.

PATTERN is a regular expression: --only '^(?!.*Ray)' skips the items of Ray, --only mistake selects
those of wrong use. Items that these need run too, but are not compared. With --cache, the outcomes
of BASE are stored in DIR: the next run takes half of the time.
"""

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from golden_outcomes import (
    SECONDS,
    WITNESS,
    Item,
    Outcome,
    Runner,
    Side,
    differences,
    invalid,
    strays,
)

ROOT = Path(__file__).resolve().parents[1]
TABLE = Path(__file__).with_suffix(".toml")
MAMMOGRAMS = ROOT.parent / "shared" / "data" / "inbreast-mini"
_HELP = (
    *("", "prep", "train", "evaluate", "report", "infer", "launch", "launch prep", "launch train"),
    *("launch infer", "submit", "status", "logs", "stop", "doctor"),
)


def read_items() -> list[Item]:
    """Returns the items of golden.toml and the help of all commands."""
    table = tomllib.loads(TABLE.read_text())
    words = table["words"] | {"mammograms": MAMMOGRAMS}
    found = [Item(f"help {name}".strip(), f"flexunet {name} --help") for name in _HELP]
    for name, fields in table["items"].items():
        if "{mammograms}" not in fields["command"] or MAMMOGRAMS.exists():
            found.append(Item(name, **fields | {"command": fields["command"].format(**words)}))
    mistakes = (
        (int(code), *each) for code, group in table["mistakes"].items() for each in group.items()
    )
    for number, (code, name, command) in enumerate(mistakes):
        made = f"out-{number}"  # what it leaves behind is compared, too
        command = command.format(**words, out=made)
        found.append(Item(f"mistake: {name}", command, made if made in command else "", code=code))
    makers = {item.made: item.name for item in found if item.made}
    return [with_makers(item, makers) for item in found]


def with_makers(item: Item, makers: Mapping[str, str]) -> Item:
    """Returns the item, with the items that make the files in its command as predecessors."""
    paths = [f"{word}/" for word in item.command.split()]
    named = {name for made, name in makers.items() if any(p.startswith(f"{made}/") for p in paths)}
    return replace(item, after=tuple(sorted({*item.after, *named} - {item.name})))


def chosen(items: Iterable[Item], wanted: Iterable[str]) -> list[Item]:
    """Returns the items with these names and the items that they need, in the order of `items`."""
    by_name = {item.name: item for item in items}
    needed, waiting = set[str](), list(wanted)
    while waiting:
        name = waiting.pop()
        needed.add(name)
        waiting += by_name[name].after
    return [item for item in by_name.values() if item.name in needed]


def git(*words: str) -> str:
    """Returns the output of a git command in the repository."""
    command = ["git", "-C", str(ROOT), *words]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


@contextmanager
def trees(folder: Path, commit: str) -> Iterator[dict[str, Side]]:
    """Yields both sides: a worktree of the commit, and a copy of the working tree."""
    (folder / "witness").mkdir()
    (folder / "witness" / "sitecustomize.py").write_text(WITNESS)
    sides = {k: Side(folder / k / "tree", folder / k / "work") for k in ("base", "head")}
    for side in sides.values():
        write_inputs(side.work)
        side.notes.mkdir()
    for name in git("ls-files", "-z", "-co", "--exclude-standard").split("\0"):
        if name and (ROOT / name).is_file():  # else it is deleted
            target = sides["head"].tree / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target)
    try:
        git("worktree", "add", "--quiet", "--detach", str(sides["base"].tree), commit)
        yield sides
    finally:
        with suppress(subprocess.CalledProcessError):  # it could not be made
            git("worktree", "remove", "--force", str(sides["base"].tree))


def write_inputs(folder: Path) -> None:
    """Writes the input files of golden.toml."""
    for name, text in tomllib.loads(TABLE.read_text())["inputs"].items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def cache_file(folder: Path | None, commit: str) -> Path | None:
    """Returns the cache path for a commit, on this machine and with these packages."""
    if folder is None:
        return None
    installed = sorted(f"{d.name} {d.version}" for d in importlib.metadata.distributions())
    own = [file.read_text() for file in sorted(TABLE.parent.glob("golden*.*"))]
    parts = [*own, platform.platform(), platform.node(), str(MAMMOGRAMS), *installed]
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]
    return folder / f"{commit}-{platform.python_version()}-{key}.json"


def start(
    plan: Mapping[str, Sequence[Item]], sides: Mapping[str, Side], runner: Runner, pool: Executor
) -> dict[tuple[str, str], Future[Any]]:
    """Starts the commands and returns them by side and item; each waits for its predecessors."""
    tasks: dict[tuple[str, str], Future[Any]] = {}
    for item in plan["head"]:  # which has all of the other's
        for key, side in sides.items():
            if item in plan[key]:
                earlier = [tasks[key, name] for name in item.after]
                tasks[key, item.name] = pool.submit(runner.outcome, item, side, earlier)
    return tasks


def finished(tasks: dict[tuple[str, str], Future[Any]], names: Sequence[str]) -> Iterator[str]:
    """Yields the name of each item as soon as both sides have ended."""
    waiting = {name: {tasks[key] for key in tasks if key[1] == name} for name in names}
    while waiting:
        running = [each for both in waiting.values() for each in both if not each.done()]
        wait(running, return_when=FIRST_COMPLETED)
        for name in [name for name, both in waiting.items() if all(each.done() for each in both)]:
            del waiting[name]
            yield name


def compare(items: Sequence[Item], names: Sequence[str], sides: Mapping[str, Side],
            known: dict[str, Outcome], runner: Runner) -> int:  # fmt: skip
    """Runs and compares the items with these names, and adds to the known outcomes of BASE.

    Returns:
        The number of items that differ.
    """
    plan = {"base": chosen(items, set(names) - set(known)), "head": chosen(items, names)}
    num_different, by_name = 0, {item.name: item for item in items}
    with ThreadPoolExecutor((os.cpu_count() or 1) + 1) as pool:
        try:
            tasks = start(plan, sides, runner, pool)
            for name in finished(tasks, names):
                head = tasks["head", name].result()
                is_known = ("base", name) not in tasks
                base = known[name] if is_known else tasks["base", name].result()
                lines = invalid(by_name[name], base)
                known |= {} if lines else {name: base}
                lines += differences(base, head)
                num_different += bool(lines)
                seconds = f"{'known' if is_known else base[SECONDS] + ' s'} + {head[SECONDS]} s"
                say(f"{'DIFFERENT' if lines else 'equal    '}  {name}  ({seconds})")
                say(*(f"    {line}" for line in lines))
            if plan["base"] == plan["head"]:  # else one side has done more
                inputs = tomllib.loads(TABLE.read_text())["inputs"]
                made = [*inputs, *(item.made for item in items if item.made)]
                beside = [strays(side.work, made) for side in sides.values()]
                lines = [f"{name}: on one side only" for name in sorted(beside[0] ^ beside[1])]
                num_different += bool(lines)
                say(*(f"DIFFERENT  {line}" for line in lines))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            runner.give_up()
            raise
    return num_different


def say(*lines: str) -> None:
    """Prints lines and flushes them."""
    for line in lines:
        print(line, flush=True)  # noqa: T201


def stop(*_: object) -> NoReturn:
    """Handles SIGTERM like Ctrl-C, so that everything is removed."""
    raise KeyboardInterrupt


def main() -> int:
    """Runs the comparison and returns the exit code."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("base", metavar="BASE", help="commit to compare with")
    parser.add_argument("--only", metavar="PATTERN", default="", help="items whose name has it")
    parser.add_argument("--cache", metavar="DIR", type=Path, help="keeps the outcomes of BASE")
    parser.add_argument("--keep", action="store_true", help="keep what the commands made")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, stop)
    items = read_items()
    names = [item.name for item in items if re.search(options.only, item.name)]
    try:
        commit = git("rev-parse", "--verify", f"{options.base}^{{commit}}").strip()
    except subprocess.CalledProcessError:
        parser.error(f"{options.base} is no commit of the repository")
    if not names:
        parser.error(f"no item has {options.only!r} in its name")
    began = time.monotonic()
    cache = cache_file(options.cache, commit)
    known = json.loads(cache.read_text()) if cache and cache.exists() else {}
    folder = Path(tempfile.mkdtemp(prefix="flexunet-golden-")).resolve()
    try:
        with trees(folder, commit) as sides:
            count = compare(items, names, sides, known, Runner(folder / "witness"))
    finally:
        if cache:
            cache.parent.mkdir(parents=True, exist_ok=True)
            cache.write_text(json.dumps(known))
        if options.keep:
            say(f"kept: {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    say(f"{count} of {len(names)} differ, {time.monotonic() - began:.0f} s")
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main())
