"""Collects the facts that a plan rests on: a dataset and a machine."""

import functools
import logging
import math
import os
import resource
import socket
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

from pydantic import Field

from data_prep.shards.manifest import Manifest
from data_prep.shards.sample_table import read_samples
from flexunet.process_pool import cgroup_memory_bytes, usable_cores
from flexunet.python_path import safe_environment
from flexunet.settings import Settings
from flexunet.storage import open_store
from job.config import TrainConfig
from job.data.dataset import Dataset
from job.distributed.precision import cpu_flags, native_precision
from job.distributed.rendezvous import ProcessSpec

logger = logging.getLogger(__name__)

_BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16"}
_QUERY_S = 10.0
_TENSORFLOW_S = 120.0  # its import from a cold disk


class DatasetFacts(Settings):
    """The facts of a dataset that rules of a plan use.

    Attributes:
        num_train, num_valid: samples; of a cross-validation, those of each of its runs.
        class_shares: share of the pixels by class id, over train and valid.
        foreground_share: share of the samples with foreground.
        is_oriented: the images were mirrored or cropped so that all show the same orientation.
        region_side: pixels, square root of the mean area of a region; None if unknown.
        source_side: pixels, median of the longer sides of the source images.
        num_regions, num_lost: regions of the source masks, and those without a stored pixel.
        prep_options: the options of `prep` that wrote the dataset.
    """

    num_train: int = Field(ge=0)
    num_valid: int = Field(ge=0)
    height: int = Field(gt=0)
    width: int = Field(gt=0)
    channels: int = Field(gt=0)
    classes: tuple[str, ...]
    class_shares: tuple[float, ...]
    foreground_share: float
    geometry: str
    is_oriented: bool
    region_side: float | None
    source_side: int
    num_regions: int = 0
    num_lost: int = 0
    num_emptied: int = 0
    prep_options: dict[str, Any] = Field(default_factory=dict)

    @property
    def is_scene(self) -> bool:
        """Whether the images look like photos of scenes: colour, and many classes."""
        return self.channels == 3 and len(self.classes) >= 5


class MachineFacts(Settings):
    """The facts of the machine of the first worker.

    Attributes:
        memory_bytes: memory for training: of the GPU, or this process's share of the RAM.
        cores: CPU cores of this process.
        precision: what the option `auto` becomes on this machine.
        num_replicas: replicas of all processes together.
        local_replicas: replicas of this process, which share its memory on a CPU.
    """

    host: str
    device: Literal["cpu", "gpu"]
    memory_bytes: int = Field(gt=0)
    cores: float = Field(gt=0)
    precision: str
    num_replicas: int = Field(1, ge=1)
    local_replicas: int = Field(1, ge=1)


def dataset_facts(dataset: Dataset, num_folds: int | None = None) -> DatasetFacts:
    """Returns the facts of `dataset`, from its manifest and sample table.

    Args:
        dataset: not divided into the splits of a fold.
        num_folds: of a cross-validation, whose runs share one plan.
    """
    manifest = dataset.manifest
    table = read_samples(open_store(dataset.url), manifest)
    columns = ("split", "pixels_per_class", "source_height", "source_width")
    rows = [row for row in table.select(columns).to_pylist() if row["split"] != "test"]
    sizes = Counter(row["split"] for row in rows)
    num_train, num_valid = sizes["train"], sizes["valid"]
    if num_folds is not None:
        num_valid = len(rows) // num_folds
        num_train = len(rows) - 2 * num_valid
    pixels = [
        sum(counts) for counts in zip(*(row["pixels_per_class"] for row in rows), strict=True)
    ]
    lost = [info for name, info in manifest.reduced.items() if name != "test"]
    num_regions = sum(sum(info.num_regions) for info in lost)
    total = sum(pixels) or 1
    return DatasetFacts(
        num_train=num_train,
        num_valid=num_valid,
        height=manifest.image_height,
        width=manifest.image_width,
        channels=manifest.channels,
        classes=tuple(each.name for each in manifest.classes),
        class_shares=tuple(count / total for count in pixels),
        foreground_share=_share_with_foreground(rows),
        geometry=manifest.geometry,
        is_oriented=manifest.flip != "none" or manifest.crop != "none",
        region_side=math.sqrt(sum(pixels[1:]) / num_regions) if num_regions else None,
        source_side=_median_side(rows),
        num_regions=num_regions,
        num_lost=sum(sum(info.num_vanished) for info in lost),
        num_emptied=sum(info.num_emptied for info in lost),
        prep_options=_options_of(manifest),
    )


def _share_with_foreground(rows: Sequence[Mapping[str, Any]]) -> float:
    return sum(any(row["pixels_per_class"][1:]) for row in rows) / max(1, len(rows))


def _median_side(rows: Sequence[Mapping[str, Any]]) -> int:
    sides = [max(row["source_height"], row["source_width"]) for row in rows]
    return int(statistics.median(sides)) if sides else 1


def _options_of(manifest: Manifest) -> dict[str, Any]:
    """Returns the options of `prep` that differ from its defaults."""
    from data_prep.config import PrepConfig

    defaults = PrepConfig().model_dump(mode="json")
    return {
        name: value
        for name, value in manifest.options.items()
        if name in defaults and value != defaults[name]
    }


def machine_facts(
    config: TrainConfig,
    spec: ProcessSpec | None = None,
    *,
    num_gpus: int | None = None,
    node_share: float = 1.0,
) -> MachineFacts:
    """Returns the facts of this machine, without TensorFlow.

    Args:
        spec: the processes that train together; None: this one alone.
        num_gpus: GPUs that TensorFlow sees; None: a process of its own asks it.
        node_share: largest share of the machine's RAM for this process.
    """
    gpus = [] if num_gpus == 0 else visible_gpus()
    if gpus:
        # The driver also lists those for which TensorFlow has no libraries.
        gpus = gpus[: num_tensorflow_gpus() if num_gpus is None else num_gpus]
    num_processes = spec.size if spec else 1
    local = len(gpus) if gpus else config.cpu_replicas
    capabilities = [each.capability for each in gpus]
    precision = native_precision(capabilities, cpu_has_bfloat16=bool(_BFLOAT16_FLAGS & cpu_flags()))
    memory = min((each.memory_bytes for each in gpus), default=own_memory_bytes(spec, node_share))
    return MachineFacts(
        host=socket.gethostname(),
        device="gpu" if gpus else "cpu",
        memory_bytes=memory,
        cores=min(usable_cores(), config.threads or math.inf),
        precision=precision if config.precision == "auto" else config.precision,
        num_replicas=num_processes * local,
        local_replicas=local,
    )


class Gpu(Settings):
    """A GPU as its driver lists it."""

    memory_bytes: int
    capability: tuple[int, int]


def visible_gpus() -> list[Gpu]:
    """Returns the GPUs that this process may use, from `nvidia-smi`; none without a driver."""
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    query = ["nvidia-smi", "--query-gpu=index,uuid,memory.total,compute_cap"]
    try:
        done = subprocess.run(  # noqa: S603 - a fixed command
            [*query, "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=_QUERY_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return parse_gpus(done.stdout, shown)


@functools.cache
def num_tensorflow_gpus() -> int:
    """Returns the number of GPUs that TensorFlow sees, in a process of its own."""
    code = "import tensorflow as tf; print(len(tf.config.list_physical_devices('GPU')))"
    try:
        done = subprocess.run(  # noqa: S603 - a fixed command
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=_TENSORFLOW_S,
            check=True,
            env=safe_environment() | {"TF_CONFIG": ""},
        )
        return int(done.stdout.split()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        logger.warning(
            "TensorFlow did not say how many GPUs it sees (%s); planning for the CPU. If it has "
            "some, stop, and try again",
            error,
        )
        return 0


def parse_gpus(text: str, shown: str | None) -> list[Gpu]:
    """Returns the GPUs in the output `text` of nvidia-smi.

    Args:
        text: lines `index, uuid, memory in MiB, compute capability`.
        shown: value of CUDA_VISIBLE_DEVICES; None: all are visible.
    """
    gpus: dict[str, Gpu] = {}
    for line in text.splitlines():
        parts = [part.strip() for part in line.split(",")]
        if len(parts) != 4 or not parts[2].isdecimal():
            continue
        major, _, minor = parts[3].partition(".")
        is_known = major.isdecimal() and minor.isdecimal()
        capability = (int(major), int(minor)) if is_known else (0, 0)
        gpu = Gpu(memory_bytes=int(parts[2]) * 2**20, capability=capability)
        gpus[parts[0]] = gpus[parts[1]] = gpu
    if shown is None:
        return list(gpus.values())[::2]
    # As CUDA does: the list ends at the first name that is not valid.
    found = []
    for name in shown.split(","):
        key = _full_name(name.strip(), gpus)
        if key is None:
            break
        found.append(gpus[key])
    return found


def _full_name(name: str, known: Collection[str]) -> str | None:
    """Returns the index or UUID that `name` means; a UUID may be cut short if it is unique."""
    if name in known:
        return name
    longer = [each for each in known if name.startswith("GPU-") and each.startswith(name)]
    return longer[0] if len(longer) == 1 else None


def own_memory_bytes(spec: ProcessSpec | None = None, most: float = 1.0) -> int:
    """Returns this process's share of the RAM, within all limits, in bytes.

    Args:
        spec: the processes that train together; None: this one alone.
        most: the largest share of the machine.
    """
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [resource.getrlimit(each)[0] for each in (resource.RLIMIT_AS, resource.RLIMIT_DATA)]
    own = [limit for limit in limits if limit != resource.RLIM_INFINITY]
    num_here = 1
    if spec is not None:
        hosts = [address.rpartition(":")[0] for address in spec.addresses]
        num_here = hosts.count(hosts[spec.rank])
    share = min(most, 1 / num_here)
    return int(min(min(machine, cgroup_memory_bytes()) * share, *own, math.inf))
