"""Functions of all benchmarks: describe the machine, summarize values, write results."""

import contextlib
import json
import multiprocessing
import os
import platform
import statistics
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

# A run that only tests a script must not overwrite the measured results.
RESULTS = Path(os.environ.get("FLEXUNET_BENCHMARK_RESULTS") or Path(__file__).parent / "results")
# Arguments of Python that run the command `flexunet` of this checkout.
FLEXUNET = ("-c", "from launcher.cli import main; raise SystemExit(main())")


def describe_machine() -> dict[str, Any]:
    """Returns processor, cores, memory, versions and load average."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    packages = ("tensorflow", "keras", "numpy", "opencv-python-headless", "pillow")
    return {
        "cpu": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "memory_gib": round(pages / 2**30, 1),
        "load_at_the_end": [round(load, 1) for load in os.getloadavg()],
        "python": platform.python_version(),
        "packages": {name: version(name) for name in packages},
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Returns median, minimum and maximum of `values`."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def shown(values: Sequence[float], digits: int = 2) -> str:
    """Returns median (minimum-maximum) of `values` as text."""
    median, least, most = (f"{v:.{digits}f}" for v in spread(values).values())
    return f"{median} ({least}-{most})"


def write_result(name: str, result: dict[str, Any]) -> None:
    """Writes `<name>.json` into `benchmarks/results`, or into $FLEXUNET_BENCHMARK_RESULTS."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=2) + "\n"
    (RESULTS / f"{name}.json").write_text(text, encoding="utf-8")


@contextlib.contextmanager
def watched_memory(
    processes: Callable[[], Iterable[psutil.Process]],
) -> Iterator[list[int]]:
    """Yields a list with one number: the peak resident memory of one of `processes`, bytes.

    Args:
        processes: returns the processes to watch; is called every 20 ms.
    """
    peak = [0]
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.02):
            # A process may end between the two calls.
            with contextlib.suppress(psutil.Error):
                for process in processes():
                    peak[0] = max(peak[0], process.memory_info().rss)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()


@contextlib.contextmanager
def connected_process(serve: Callable[..., None], *arguments: Any) -> Iterator[Connection]:
    """Yields the connection to a new process that runs `serve(*arguments, connection)`.

    `serve` must end when the connection is closed.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=serve, args=(*arguments, there))
    process.start()
    there.close()
    try:
        yield here
    finally:
        here.close()
        process.join()
