"""Reads the processes of a cluster from `TF_CONFIG`, and connects them before TensorFlow starts."""

import contextlib
import hashlib
import json
import os
import socket
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from pydantic import Field, ValidationError

from flexunet.errors import FlexUNetError, UsageError
from flexunet.settings import Settings
from flexunet.text import pluralize

_VARIABLE = "TF_CONFIG"
_ANSWER_S = 5.0  # to connect, and to receive a message


class _Task(Settings, extra="ignore"):
    type: str = "worker"
    index: int = Field(0, ge=0)


class _TFConfig(Settings, extra="ignore"):  # TensorFlow has more keys than are used here
    cluster: dict[str, tuple[str, ...]]
    task: _Task


@dataclass(frozen=True)
class ProcessSpec:
    """Holds the rank of this process and the addresses of all processes."""

    rank: int
    addresses: tuple[str, ...]  # host:port of each process, by rank

    @property
    def size(self) -> int:
        """The number of processes."""
        return len(self.addresses)


def process_spec_from_environment() -> ProcessSpec | None:
    """Returns the `ProcessSpec` in `TF_CONFIG`; None if the variable is not set.

    Raises:
        UsageError: it does not have the form of TensorFlow, or has other task types.
    """
    text = os.environ.get(_VARIABLE)
    if not text:
        return None
    try:
        config = _TFConfig.model_validate_json(text)
    except ValidationError as error:
        detail = error.errors()[0]
        where = ".".join(str(part) for part in detail["loc"])
        raise UsageError(
            f'{_VARIABLE}: {where} {detail["msg"]}; expected {{"cluster": {{"worker": '
            '["host:port", ...]}, "task": {"type": "worker", "index": 0}}}'
        ) from error
    kinds = ("chief", "worker")
    other = sorted(set(config.cluster) - set(kinds))
    if other or config.task.type not in config.cluster:
        raise UsageError(
            f"{_VARIABLE}: task type {config.task.type!r} in a cluster with "
            f"{', '.join(config.cluster) or 'no tasks'}; only workers and a chief can train"
        )
    first = {kind: sum(len(config.cluster.get(k, ())) for k in kinds[:i])
             for i, kind in enumerate(kinds)}  # fmt: skip
    if config.task.index >= len(config.cluster[config.task.type]):
        raise UsageError(
            f"{_VARIABLE}: task index {config.task.index}, but the cluster has "
            f"{len(config.cluster[config.task.type])} of type {config.task.type}"
        )
    addresses = tuple(address for kind in kinds for address in config.cluster.get(kind, ()))
    return ProcessSpec(first[config.task.type] + config.task.index, addresses)


def rendezvous(spec: ProcessSpec, timeout_s: float, num_gpus: int = 0) -> None:
    """Waits until every process of the cluster has called it with the same number of GPUs.

    TensorFlow waits up to an hour for a missing process and holds the interpreter meanwhile. So all
    processes connect here first, at the address of rank 0, where TensorFlow will serve later.

    Raises:
        FlexUNetError: some did not connect in time; names their ranks and addresses.
        UsageError: in all processes, if one has another number of GPUs.
    """
    deadline = time.monotonic() + timeout_s
    greeting = hashlib.sha256(json.dumps(spec.addresses).encode()).digest()
    if spec.rank == 0:
        counts = _await_others(spec, greeting, num_gpus, deadline)
    else:
        counts = _join_first(spec, greeting, num_gpus, deadline)
    for rank, count in enumerate(counts):
        if count != counts[0]:
            raise UsageError(
                f"rank {rank} ({spec.addresses[rank]}) sees {pluralize(count, 'GPU')} and "
                f"rank 0 sees {counts[0]}; give all processes equally many (CUDA_VISIBLE_DEVICES)"
            )


def _await_others(spec: ProcessSpec, greeting: bytes, num_gpus: int, deadline: float) -> list[int]:
    """Returns the number of GPUs of each process, by rank, once all have connected."""
    counts = {0: num_gpus}
    port = int(spec.addresses[0].rpartition(":")[2])
    arrived: dict[int, socket.socket] = {}
    with contextlib.ExitStack() as stack:
        try:
            is_dual = socket.has_dualstack_ipv6()
            kind = socket.AF_INET6 if is_dual else socket.AF_INET
            server = stack.enter_context(
                socket.create_server(("", port), family=kind, dualstack_ipv6=is_dual)
            )
        except OSError as error:
            raise FlexUNetError(
                f"{spec.addresses[0]}: rank 0 cannot listen there ({error.strerror}); check "
                "whether another process of this cluster is still running"
            ) from error
        while len(arrived) < spec.size - 1:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise _missing(spec, set(range(1, spec.size)) - set(arrived))
            server.settimeout(min(left_s, 1.0))
            with contextlib.suppress(OSError, ValueError):
                connection = stack.enter_context(server.accept()[0])
                connection.settimeout(_ANSWER_S)
                rank, count = _heard(connection, greeting, 2)
                if 0 < rank < spec.size:
                    arrived[rank], counts[rank] = connection, count
        in_order = [counts[rank] for rank in range(spec.size)]
        for connection in arrived.values():
            with contextlib.suppress(OSError):
                connection.sendall(_message(greeting, in_order))
    return in_order


def _message(greeting: bytes, numbers: Iterable[int]) -> bytes:
    return greeting + b"".join(number.to_bytes(4, "big") for number in numbers)


def _heard(connection: socket.socket, greeting: bytes, count: int) -> list[int]:
    """Returns the `count` numbers of a message.

    Raises:
        ValueError: the message is from another cluster.
    """
    message = _received(connection, len(greeting) + 4 * count)
    if not message.startswith(greeting):
        raise ValueError("not of this cluster")
    numbers = message[len(greeting) :]
    return [int.from_bytes(numbers[i : i + 4], "big") for i in range(0, 4 * count, 4)]


def _received(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = connection.recv(size - len(data))
        if not part:
            raise ConnectionResetError("closed before the end")
        data += part
    return data


def _join_first(spec: ProcessSpec, greeting: bytes, num_gpus: int, deadline: float) -> list[int]:
    """Returns the number of GPUs of each process, by rank, once rank 0 sends them."""
    host, _, port = spec.addresses[0].rpartition(":")
    while (left_s := deadline - time.monotonic()) > 0:
        with contextlib.suppress(OSError, ValueError):
            address = (host.strip("[]"), int(port))
            with socket.create_connection(address, min(left_s, _ANSWER_S)) as connection:
                connection.sendall(_message(greeting, [spec.rank, num_gpus]))
                connection.settimeout(left_s)
                return _heard(connection, greeting, spec.size)
        time.sleep(min(left_s, 0.2))
    raise _missing(spec, {0})


def _missing(spec: ProcessSpec, ranks: Collection[int]) -> FlexUNetError:
    names = ", ".join(f"rank {rank} ({spec.addresses[rank]})" for rank in sorted(ranks))
    return FlexUNetError(
        f"rank {spec.rank} of {spec.size}: {names} did not connect in time (--phase-timeout), or "
        "waits for another process; start all again with the same TF_CONFIG cluster"
    )
