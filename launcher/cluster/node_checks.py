"""Checks that every node has this package and the folders that the command uses."""

import importlib.metadata
import pickle
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from flexunet.errors import UsageError
from flexunet.storage import ObjectStore, open_source, open_store
from launcher.cluster.resources import Resources, require_slots

_PROBE_TIMEOUT_S = 120.0  # includes a process start, and imports from a slow disk


def check_nodes(
    per_worker: Resources, *, reads: Sequence[str] = (), writes: Sequence[str] = ()
) -> None:
    """Checks that every node where a worker fits has this flexunet and the same local folders.

    Args:
        per_worker: the resources of one worker.
        reads: URLs that workers read from; only local folders are checked.
        writes: URLs that workers write to; only local folders are checked.

    Raises:
        UsageError: a node fails a check (the error names it), or a worker fits on no node.
    """
    version = importlib.metadata.version("flexunet")
    with _shared_folder_probes(reads, writes) as probes:
        problems = _ask_nodes(list(require_slots(per_worker)), version, probes)
    for node, problem in problems:
        if problem:
            raise UsageError(f"Ray node {node}: {problem}")


@dataclass(frozen=True)
class _SharedFolderProbe:
    """An object in a folder; a node that finds it has the same folder."""

    url: str
    name: str
    size: int


@contextmanager
def _shared_folder_probes(
    reads: Sequence[str], writes: Sequence[str]
) -> Iterator[list[_SharedFolderProbe]]:
    """Yields a probe for each local folder; in folders to write to, a new unique object."""
    found = [probe for url in reads if (probe := _first_object(open_source(url)))]
    put: list[tuple[ObjectStore, str]] = []
    try:
        for store in (open_store(url) for url in writes):
            if store.local_root is not None:
                name = f"flexunet-probe-{uuid.uuid4().hex}"
                put.append((store, name))
                found.append(
                    _SharedFolderProbe(store.url, name, store.put(name, name.encode()).size)
                )
        yield found
    finally:
        for store, name in put:
            store.delete(name)


def _first_object(store: ObjectStore) -> _SharedFolderProbe | None:
    if store.local_root is None:
        return None
    stats = store.list()
    return _SharedFolderProbe(store.url, stats[0].name, stats[0].size) if stats else None


def folder_problem(probes: Sequence[_SharedFolderProbe]) -> str | None:
    """Returns which folder of the command this machine does not have, None if it has all."""
    for probe in probes:
        stat = open_source(probe.url).stat(probe.name)
        if stat is None or stat.size != probe.size:
            return (
                f"{probe.url} is not the same folder there as on this machine; use gs:// or a "
                "folder that all nodes mount at this path"
            )
    return None


def _probe() -> Callable[[str, bytes], str | None]:
    """Returns the function to run on each node; Ray sends a closure with its code.

    So it also runs where the package is missing.
    """

    def probe(version: str, probes: bytes) -> str | None:
        import importlib.metadata
        import pickle

        try:
            found = importlib.metadata.version("flexunet")
            if found != version:
                return (
                    f"flexunet {found} is installed there and {version} here; install the same "
                    "version on both"
                )
            from launcher.cluster.node_checks import folder_problem
        except ImportError as error:
            return f"flexunet cannot be imported there ({error}); install flexunet {version}"
        return folder_problem(pickle.loads(probes))  # noqa: S301 (of our own driver)

    return probe


def _ask_nodes(
    node_ids: Sequence[str], version: str, probes: Sequence[_SharedFolderProbe]
) -> list[tuple[str, str | None]]:
    """Returns the address of each node and its problem; checks all nodes at once."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    remote = ray.remote(num_cpus=0, max_retries=1)(_probe())
    refs = {
        node_id: remote.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)
        ).remote(version, pickle.dumps(probes))
        for node_id in node_ids
    }
    addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    return [(addresses[node_id], _answer(ref)) for node_id, ref in refs.items()]


def _answer(ref: Any) -> str | None:
    import ray
    from ray.exceptions import GetTimeoutError, RayError, RayTaskError

    try:
        problem: str | None = ray.get(ref, timeout=_PROBE_TIMEOUT_S)
    except GetTimeoutError:
        return (
            f"no worker process started there within {_PROBE_TIMEOUT_S:g} s; see the Ray logs of "
            "the node"
        )
    except RayTaskError as error:
        return f"the check of the node failed ({error.cause})"
    except RayError as error:
        return f"the node was lost ({error})"
    return problem
