"""Checks that every node has this package and sees the folders that the command uses."""

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

_PROBE_TIMEOUT_S = 120.0  # a worker process may have to start, and import from a slow disk


def check_nodes(
    per_worker: Resources, *, reads: Sequence[str] = (), writes: Sequence[str] = ()
) -> None:
    """Checks that every node where a worker fits has this flexunet, and sees our local folders.

    Args:
        reads: URLs that hold something already. writes: URLs where workers put something. Those
            that are not local folders are not looked at.

    Raises:
        UsageError: a node is unfit, or there is none; names the node.
    """
    version = importlib.metadata.version("flexunet")
    with _shared_folder_probes(reads, writes) as probes:
        problems = _ask_nodes(list(require_slots(per_worker)), version, probes)
    for node, problem in problems:
        if problem:
            raise UsageError(f"Ray node {node}: {problem}")


@dataclass(frozen=True)
class _SharedFolderProbe:
    """An object by which a node can tell that its folder is ours."""

    url: str
    name: str
    size: int


@contextmanager
def _shared_folder_probes(
    reads: Sequence[str], writes: Sequence[str]
) -> Iterator[list[_SharedFolderProbe]]:
    """Yields one probe for each local folder; where we write, one of a name nobody else has."""
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
    """Returns why this machine does not see the folders of the command's, None when it does."""
    for probe in probes:
        stat = open_source(probe.url).stat(probe.name)
        if stat is None or stat.size != probe.size:
            return (
                f"{probe.url} is not the folder that this machine has there; use gs:// or a "
                "folder that all nodes mount at this path"
            )
    return None


def _probe() -> Callable[[str, bytes], str | None]:
    """Returns what is run on each node; a closure is sent whole, as the package may be missing."""

    def probe(version: str, probes: bytes) -> str | None:
        import importlib.metadata
        import pickle

        try:
            found = importlib.metadata.version("flexunet")
            if found != version:
                return f"flexunet {found} is installed there and {version} here; install the same"
            from launcher.cluster.node_checks import folder_problem
        except ImportError as error:
            return f"flexunet cannot be imported there ({error}); install flexunet {version}"
        return folder_problem(pickle.loads(probes))  # noqa: S301 (of our own driver)

    return probe


def _ask_nodes(
    node_ids: Sequence[str], version: str, probes: Sequence[_SharedFolderProbe]
) -> list[tuple[str, str | None]]:
    """Returns the address of each node and what is wrong with it; all are asked at once."""
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
        return f"no worker process started there within {_PROBE_TIMEOUT_S:g} s; look at its logs"
    except RayTaskError as error:
        return f"it cannot work ({error.cause})"
    except RayError as error:
        return f"it was lost ({error})"
    return problem
