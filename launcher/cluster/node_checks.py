"""Checks that every node has this package and sees the folders that the command uses."""

import importlib.metadata
import pickle
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from flexunet.errors import UsageError
from flexunet.storage import Store, open_source, open_store
from launcher.cluster.resources import Demand, require_places

_PROBE_TIMEOUT_S = 120.0  # a worker process may have to start, and import from a slow disk


def check_nodes(demand: Demand, *, reads: Sequence[str] = (), writes: Sequence[str] = ()) -> None:
    """Checks that every node where a worker fits has this flexunet, and sees our local folders.

    Args:
        reads: URLs that hold something already. writes: URLs where workers put something. Those
            that are not local folders are not looked at.

    Raises:
        UsageError: a node is unfit, or there is none; names the node.
    """
    version = importlib.metadata.version("flexunet")
    with _witnesses(reads, writes) as witnesses:
        problems = _ask_nodes(list(require_places(demand)), version, witnesses)
    for node, problem in problems:
        if problem:
            raise UsageError(f"Ray node {node}: {problem}")


@dataclass(frozen=True)
class _Witness:
    """An object by which a node can tell that its folder is ours."""

    url: str
    name: str
    size: int


@contextmanager
def _witnesses(reads: Sequence[str], writes: Sequence[str]) -> Iterator[list[_Witness]]:
    """Yields one witness for each local folder; where we write, one of a name nobody else has."""
    found = [witness for url in reads if (witness := _first_object(open_source(url)))]
    put: list[tuple[Store, str]] = []
    try:
        for store in (open_store(url) for url in writes):
            if store.local_root is not None:
                name = f"flexunet-probe-{uuid.uuid4().hex}"
                put.append((store, name))
                found.append(_Witness(store.url, name, store.put(name, name.encode()).size))
        yield found
    finally:
        for store, name in put:
            store.delete(name)


def _first_object(store: Store) -> _Witness | None:
    if store.local_root is None:
        return None
    stats = store.list()
    return _Witness(store.url, stats[0].name, stats[0].size) if stats else None


def folder_problem(witnesses: Sequence[_Witness]) -> str | None:
    """Returns why this machine does not see the folders of the command's, None when it does."""
    for witness in witnesses:
        stat = open_source(witness.url).stat(witness.name)
        if stat is None or stat.size != witness.size:
            return (
                f"{witness.url} is not the folder that this machine has there; use gs:// or a "
                "folder that all nodes mount at this path"
            )
    return None


def _probe() -> Callable[[str, bytes], str | None]:
    """Returns what is run on each node; a closure is sent whole, as the package may be missing."""

    def probe(version: str, witnesses: bytes) -> str | None:
        import importlib.metadata
        import pickle

        try:
            found = importlib.metadata.version("flexunet")
            if found != version:
                return f"flexunet {found} is installed there and {version} here; install the same"
            from launcher.cluster.node_checks import folder_problem
        except ImportError as error:
            return f"flexunet cannot be imported there ({error}); install flexunet {version}"
        return folder_problem(pickle.loads(witnesses))  # noqa: S301 (of our own driver)

    return probe


def _ask_nodes(
    node_ids: Sequence[str], version: str, witnesses: Sequence[_Witness]
) -> list[tuple[str, str | None]]:
    """Returns the address of each node and what is wrong with it; all are asked at once."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    remote = ray.remote(num_cpus=0, max_retries=1)(_probe())
    refs = {
        node_id: remote.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)
        ).remote(version, pickle.dumps(witnesses))
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
