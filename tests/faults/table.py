"""Runs the fault tests and prints a table of their counts.

    python -m tests.faults.table [--output FILE [--update]] [PYTEST OPTIONS]

ROWS explains the rows. The table is printed and stored even if tests failed. With --update, only
the results of the tests that ran now are replaced in FILE, so that a fixed test can be run alone.
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
    "R6": "the owner of a run killed at each of its changes",
    "R8": "storage: errors, outages, stalls",
    "R9": "storage: done, but the answer is lost",
    "R11": "a stop request: a signal, a preempted node",
    "R13": "two owners of one run",
    "R14": "data that does not divide by the processes",
    "R15": "a stalled process",
    "R16": "a process that never starts, or dies before the first step",
    "R22": "tables after restarts",
    "R24": "errors that are retried, and errors that are not",
    "R25": "a connection to storage that is slower than the timeouts require",
}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Returns the lines that tests added to a file; none if it does not exist."""
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
    """Returns the result `before`, with the rows of `tests` replaced by those of `now`."""
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
    """Runs the command and returns the exit code of pytest."""
    parser = argparse.ArgumentParser(description="Run the fault tests and print what was lost.")
    parser.add_argument("--output", type=Path, help="file for the result, JSON")
    parser.add_argument("--update", action="store_true", help="keep the results of the other tests")
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
