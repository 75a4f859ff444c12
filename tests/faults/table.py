"""Runs the tests of failures and shows what they counted.

    python -m tests.faults.table [--output FILE [--update]] [PYTEST OPTIONS]

What a row means stands in ROWS. The table is shown, and stored, when tests have failed too. With
--update only the tests that ran now are new in FILE, so that one that was mended can be run alone.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from rich.console import Console
from rich.table import Table

PROJECT = Path(__file__).resolve().parents[2]
ROWS = {
    "R1": "workers killed at random and at chosen moments",
    "R2": "every step counts once",
    "R3": "every sample counts once per epoch",
    "R4": "the driver killed, the same command again",
    "R5": "the whole cluster killed, a new one",
    "R6": "a run's owner killed at every change that it makes",
    "R8": "storage: errors, outages, stalls",
    "R9": "storage: done, but the answer is lost",
    "R11": "told to stop: a signal, a preempted node",
    "R13": "two owners of one run",
    "R14": "data that does not divide by the processes",
    "R15": "a process that stands still",
    "R16": "a process that never comes, or dies before the first step",
    "R22": "tables after restarts",
    "R24": "errors that are tried again, and those that are not",
    "R25": "a line to storage that is slower than the timeouts ask for",
}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of a file that tests have added to; none where there is no file."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def read_report(path: Path) -> dict[str, bool]:
    """Returns whether each test passed, from a report of pytest in JUnit's form."""
    if not path.exists():
        return {}
    passed = {}
    for case in ElementTree.parse(path).iter("testcase"):  # noqa: S314 - pytest's own
        name = f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}"
        passed[name] = case.find("failure") is None and case.find("error") is None
    return passed


def updated(before: dict[str, Any], now: dict[str, Any], tests: Collection[str]) -> dict[str, Any]:
    """Returns the result `before` with what `tests`, which ran now, have replaced."""
    rows = [row for row in before["rows"] if row["test"] not in tests]
    failed = [name for name in before["failed"] if name not in tests]
    return before | {"rows": rows + now["rows"], "failed": failed + now["failed"]}


def show(result: dict[str, Any]) -> None:
    """Prints the table, and below it the tests that failed."""
    table = Table("row", "what", "tried", "lost", "note", show_lines=True)
    for line in result["rows"]:
        row = line["row"]
        table.add_row(row, ROWS[row], str(line["tried"]), str(line["lost"]), line["note"])
    width = None if sys.stdout.isatty() else 160
    console = Console(width=width, highlight=False)
    console.print(table)
    for name in result["failed"]:
        console.print(f"FAILED: {name}", markup=False)


def main() -> int:
    """Returns the exit code of pytest."""
    parser = argparse.ArgumentParser(description="Run the tests of failures, show what was lost.")
    parser.add_argument("--output", type=Path, help="file for the result, JSON")
    parser.add_argument("--update", action="store_true", help="keep there what did not run now")
    arguments, options = parser.parse_known_args()
    if arguments.update and not (arguments.output and arguments.output.is_file()):
        parser.error(f"--update needs an --output that exists, not {arguments.output}")
    with tempfile.TemporaryDirectory() as folder:
        path, report = Path(folder) / "faults.jsonl", Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-m", "faults", f"--junitxml={report}", *options]
        environment = os.environ | {"FLEXUNET_FAULTS_FILE": str(path)}
        begin = time.monotonic()
        code = subprocess.run(command, cwd=PROJECT, env=environment).returncode
        minutes = round((time.monotonic() - begin) / 60, 1)
        lines, passed = read_lines(path), read_report(report)
    result = {
        "minutes": minutes,
        "cores": os.cpu_count(),
        "failed": [name for name, is_good in passed.items() if not is_good],
        "rows": lines,
    }
    if arguments.update:
        result = updated(json.loads(arguments.output.read_text()), result, passed)
    result["rows"].sort(key=lambda line: (int(line["row"][1:]), line["test"]))
    show(result)
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    return code


if __name__ == "__main__":
    raise SystemExit(main())
