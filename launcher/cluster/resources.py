"""Reads the resources of a Ray cluster, and counts how many workers fit."""

import contextlib
import logging
import time
from dataclasses import dataclass

from flexunet.errors import FlexUNetError, UsageError
from flexunet.text import pluralize

logger = logging.getLogger(__name__)

_NODES_TICK_S = 0.5


@dataclass(frozen=True)
class Resources:
    """The resources of one worker on one node."""

    num_cpus: float = 1
    num_gpus: float = 0
    memory_bytes: int = 0

    def __str__(self) -> str:
        parts = [pluralize(self.num_cpus, "CPU"), pluralize(self.num_gpus, "GPU")]
        if self.memory_bytes:
            parts.append(f"{self.memory_bytes / 1e9:.1f} GB")
        return ", ".join(parts)


def worker_slots(per_worker: Resources) -> dict[str, int]:
    """Returns how many workers fit on each alive node where at least one fits, by node id."""
    import ray

    counts = {}
    for node in ray.nodes():
        if node["Alive"] and (count := _fitting(node["Resources"], per_worker)):
            counts[node["NodeID"]] = count
    return counts


def require_slots(per_worker: Resources, num_workers: int = 1) -> dict[str, int]:
    """Returns `worker_slots(per_worker)` if at least `num_workers` fit.

    Raises:
        UsageError: fewer fit; without this check, Ray would wait for more nodes forever.
    """
    found = worker_slots(per_worker)
    total = sum(found.values())
    if total < num_workers:
        raise UsageError(
            f"{pluralize(num_workers, 'worker')} with {per_worker} each requested, but the cluster "
            f"fits {total}: {_described_nodes() or 'no node'}; request less, add nodes, or give "
            "--wait-for-nodes"
        )
    return found


def wait_for_slots(per_worker: Resources, num_workers: int, timeout_s: float) -> None:
    """Waits until the cluster fits `num_workers`, and requests them from its autoscaler.

    Raises:
        FlexUNetError: they do not fit within `timeout_s`.
    """
    from ray.autoscaler.sdk import request_resources

    if sum(worker_slots(per_worker).values()) >= num_workers:
        return
    logger.warning(
        "the cluster does not fit %s with %s each yet (%s); waiting up to %g s (--join-timeout)",
        pluralize(num_workers, "worker"),
        per_worker,
        _described_nodes() or "no node",
        timeout_s,
    )
    # Ray's autoscaler counts only the requests of tasks, and no task is submitted yet.
    needs = {
        "CPU": per_worker.num_cpus,
        "GPU": per_worker.num_gpus,
        "memory": per_worker.memory_bytes,
    }
    asked = {name: amount for name, amount in needs.items() if amount}
    with contextlib.suppress(Exception):  # a cluster without an autoscaler
        request_resources(bundles=[asked] * num_workers)
    end = time.monotonic() + timeout_s
    try:
        while sum(worker_slots(per_worker).values()) < num_workers:
            if time.monotonic() > end:
                raise FlexUNetError(
                    f"the cluster did not fit {pluralize(num_workers, 'worker')} with {per_worker} "
                    f"each within {timeout_s:g} s (--join-timeout): "
                    f"{_described_nodes() or 'no node'}; the same command tries again"
                )
            time.sleep(_NODES_TICK_S)
    finally:
        with contextlib.suppress(Exception):
            request_resources(bundles=[])


def described_shortage(per_worker: Resources, num_workers: int) -> str | None:
    """Returns a text on the free resources, None if `num_workers` workers can start at once."""
    import ray

    free = ray.available_resources()
    needs = {
        "CPU": per_worker.num_cpus,
        "GPU": per_worker.num_gpus,
        "memory": per_worker.memory_bytes,
    }
    if all(free.get(name, 0.0) + 1e-6 >= num_workers * amount for name, amount in needs.items()):
        return None
    return ", ".join(
        f"{free.get(name, 0.0):g} of {pluralize(total(name), name)}" for name in ("CPU", "GPU")
    )


def total(resource: str) -> float:
    """Returns the total amount of `resource` (CPU, GPU, ...) of all nodes."""
    import ray

    return float(ray.cluster_resources().get(resource, 0.0))


def node_share(num_cpus: float) -> float:
    """Returns the share of this node that a worker with `num_cpus` cores may use, at most 1.

    Other workers may get the other cores, such as those of folds that train side by side.
    """
    import ray

    here = ray.get_runtime_context().get_node_id()
    of_node = [each["Resources"].get("CPU", 0.0) for each in ray.nodes() if each["NodeID"] == here]
    return min(1.0, num_cpus / max(*of_node, num_cpus))


def widest(num_workers: int, *, num_gpus: float = 0) -> Resources:
    """Returns the resources per worker that give `num_workers` workers the most whole cores.

    At least one core each, even if fewer workers fit.
    """
    num_cpus = 1
    while sum(worker_slots(Resources(num_cpus + 1, num_gpus)).values()) >= num_workers:
        num_cpus += 1
    return Resources(num_cpus, num_gpus)


def described_resources() -> str:
    """Returns a text on the cluster's total resources: `8 CPUs, 1 GPU on 2 nodes`."""
    import ray

    total = ray.cluster_resources()
    num_nodes = sum(node["Alive"] for node in ray.nodes())
    parts = pluralize(total.get("CPU", 0), "CPU"), pluralize(total.get("GPU", 0), "GPU")
    return f"{', '.join(parts)} on {pluralize(num_nodes, 'node')}"


def _fitting(resources: dict[str, float], per_worker: Resources) -> int:
    needs = {
        "CPU": per_worker.num_cpus,
        "GPU": per_worker.num_gpus,
        "memory": per_worker.memory_bytes,
    }
    counts = [resources.get(name, 0.0) / amount for name, amount in needs.items() if amount]
    return int(min(counts, default=1) + 1e-6)  # 1 / 0.1 may be 9.999...


def _described_nodes() -> str:
    import ray

    described = [
        f"{node['NodeManagerAddress']} has {pluralize(node['Resources'].get('CPU', 0), 'CPU')}, "
        f"{pluralize(node['Resources'].get('GPU', 0), 'GPU')}, "
        f"{node['Resources'].get('memory', 0) / 1e9:.1f} GB"
        for node in ray.nodes()
        if node["Alive"]
    ]
    more = f" and {len(described) - 3} more" if len(described) > 3 else ""
    return "; ".join(described[:3]) + more
