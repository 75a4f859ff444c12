"""The processes that train one run together, and how they agree.

Every process computes the same state; the first alone owns the run and writes. What only one of
them can know (a stop, an error, what was restored) is exchanged through the strategy's collectives,
at points that all of them reach. A process alone is a team of one and exchanges nothing.
"""

import contextlib
import functools
import hashlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import google_crc32c
import numpy as np
from pydantic import Field, ValidationError

from flexunet.errors import FlexUNetError, UsageError, error_of, kind_of
from flexunet.settings import Settings

T = TypeVar("T")

_VARIABLE = "TF_CONFIG"
_ANSWER_S = 5.0  # to connect, and for a greeting
_LOOK_S = 1.0  # between two looks at how far the others are
_WORDS = 64  # messages are padded to so many int64, so that few shapes are compiled


class _Task(Settings, extra="ignore"):
    type: str = "worker"
    index: int = Field(0, ge=0)


class _TFConfig(Settings, extra="ignore"):  # TensorFlow itself reads more than we need
    cluster: dict[str, tuple[str, ...]]
    task: _Task


@dataclass(frozen=True)
class Place:
    """Where this process stands among those that train together."""

    rank: int
    addresses: tuple[str, ...]  # host:port of each process, by rank

    @property
    def size(self) -> int:
        """The number of processes."""
        return len(self.addresses)


def place_from_environment() -> Place | None:
    """Returns the place that `TF_CONFIG` gives this process; None where it is not set.

    Raises:
        UsageError: it is not of TensorFlow's form, or of a cluster of another kind.
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
            f"{_VARIABLE}: task type {config.task.type!r} of a cluster of "
            f"{', '.join(config.cluster) or 'nothing'}; only workers (and a chief) train together"
        )
    first = {kind: sum(len(config.cluster.get(k, ())) for k in kinds[:i])
             for i, kind in enumerate(kinds)}  # fmt: skip
    if config.task.index >= len(config.cluster[config.task.type]):
        raise UsageError(
            f"{_VARIABLE}: task index {config.task.index}, but there are "
            f"{len(config.cluster[config.task.type])} of type {config.task.type}"
        )
    addresses = tuple(address for kind in kinds for address in config.cluster.get(kind, ()))
    return Place(first[config.task.type] + config.task.index, addresses)


def meet(place: Place, timeout_s: float, num_gpus: int = 0) -> None:
    """Returns when every process of the cluster has called it, with as many GPUs.

    TensorFlow's own start waits for a missing process for an hour, and holds the interpreter while
    it does. So all meet here first, at the address where the first will serve in a moment.

    Raises:
        FlexUNetError: some did not come in time; names their ranks and addresses.
        UsageError: one sees another number of GPUs, on all of them; a strategy needs equally many.
    """
    deadline = time.monotonic() + timeout_s
    greeting = hashlib.sha256(json.dumps(place.addresses).encode()).digest()
    if place.rank == 0:
        counts = _await_others(place, greeting, num_gpus, deadline)
    else:
        counts = _join_first(place, greeting, num_gpus, deadline)
    for rank, count in enumerate(counts):
        if count != counts[0]:
            raise UsageError(
                f"rank {rank} ({place.addresses[rank]}) sees {count} GPUs and rank 0 sees "
                f"{counts[0]}; give all processes equally many (CUDA_VISIBLE_DEVICES)"
            )


def _await_others(place: Place, greeting: bytes, num_gpus: int, deadline: float) -> list[int]:
    """Returns the number of GPUs of each process, by rank, when all have come."""
    counts = {0: num_gpus}
    port = int(place.addresses[0].rpartition(":")[2])
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
                f"{place.addresses[0]}: this process cannot listen there ({error.strerror}); is "
                "another one of the same cluster still running?"
            ) from error
        while len(arrived) < place.size - 1:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise _missing(place, set(range(1, place.size)) - set(arrived))
            server.settimeout(min(left_s, 1.0))
            with contextlib.suppress(OSError, ValueError):
                connection = stack.enter_context(server.accept()[0])
                connection.settimeout(_ANSWER_S)
                rank, count = _heard(connection, greeting, 2)
                if 0 < rank < place.size:
                    arrived[rank], counts[rank] = connection, count
        in_order = [counts[rank] for rank in range(place.size)]
        for connection in arrived.values():
            with contextlib.suppress(OSError):
                connection.sendall(_message(greeting, in_order))
    return in_order


def _message(greeting: bytes, numbers: Iterable[int]) -> bytes:
    return greeting + b"".join(number.to_bytes(4, "big") for number in numbers)


def _heard(connection: socket.socket, greeting: bytes, count: int) -> list[int]:
    """Returns the `count` numbers of a message.

    Raises:
        ValueError: it is of another cluster.
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


def _join_first(place: Place, greeting: bytes, num_gpus: int, deadline: float) -> list[int]:
    """Returns the number of GPUs of each process, by rank, when the first has met all."""
    host, _, port = place.addresses[0].rpartition(":")
    while (left_s := deadline - time.monotonic()) > 0:
        with contextlib.suppress(OSError, ValueError):
            address = (host.strip("[]"), int(port))
            with socket.create_connection(address, min(left_s, _ANSWER_S)) as connection:
                connection.sendall(_message(greeting, [place.rank, num_gpus]))
                connection.settimeout(left_s)
                return _heard(connection, greeting, place.size)
        time.sleep(min(left_s, 0.2))
    raise _missing(place, {0})


def _missing(place: Place, ranks: Collection[int]) -> FlexUNetError:
    names = ", ".join(f"rank {rank} ({place.addresses[rank]})" for rank in sorted(ranks))
    return FlexUNetError(
        f"rank {place.rank} of {place.size}: {names} did not come in time (--phase-timeout), or "
        "waits for another; start all processes again with the same TF_CONFIG cluster"
    )


def _in_thread(work: Callable[[], T]) -> "Future[T]":
    """Starts `work` in a thread that does not keep an interrupted process from ending."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="keep-alive", daemon=True).start()
    return future


class Team:
    """The processes of one `tf.distribute` strategy; every method is called by all of them."""

    def __init__(self, strategy: Any, place: Place | None = None) -> None:
        """Makes the team of `strategy`; `place` is None for a process alone."""
        self.rank = place.rank if place else 0
        self.size = place.size if place else 1
        self._strategy = strategy
        self._add: Callable[..., Any] | None = None

    @property
    def first_replica(self) -> int:
        """The global number of this process' first replica; all processes have equally many."""
        return self.rank * len(self._strategy.extended.worker_devices)

    @property
    def is_first(self) -> bool:
        """Whether this process owns the run."""
        return self.rank == 0

    def any(self, wish: bool) -> bool:
        """Returns whether any process wishes it."""
        if self.size == 1:
            return wish
        return bool(self._sum(np.array([wish], np.int64))[0])

    def on_first(self, work: Callable[[], T]) -> T:
        """Returns on every process what `work` returned on the first, through JSON.

        Raises:
            FlexUNetError: the one that `work` raised there.
        """
        return self._shared(work, is_worker=self.is_first)[0]

    def on_each(self, work: Callable[[], T]) -> list[T]:
        """Returns on every process what `work` returned on each, by rank, through JSON.

        Raises:
            FlexUNetError: the one of the lowest rank on which `work` raised one.
        """
        return self._shared(work, is_worker=True)

    def keep_alive(
        self, work: Callable[[Callable[[], None]], T], alive: Callable[[], None]
    ) -> list[T]:
        """Returns on every process what `work` returned on each, by rank, through JSON.

        It may take much longer in one process than in another. So whoever is done, or waits, tells
        that there is life as long as there is progress somewhere.

        Args:
            work: is given a function to call whenever it has moved on.
            alive: called in this thread, and in that of `work`.

        Raises:
            FlexUNetError: the one of the lowest rank on which `work` raised one.
        """
        if self.size == 1:
            return [work(alive)]
        moved = threading.Event()

        def tell() -> None:
            moved.set()
            alive()  # a collective may hang, and the work go on

        future = _in_thread(lambda: work(tell))

        def look() -> list[bool]:
            """Returns whether this process is done, and whether it has moved on."""
            wait([future], _LOOK_S)
            found = [future.done(), moved.is_set()]
            moved.clear()
            return found

        is_over = False
        try:
            while not is_over:
                looks: list[list[bool]] = self.on_each(functools.partial(list, look()))
                is_over = all(is_done for is_done, _ in looks)
                if any(has_moved for _, has_moved in looks):
                    alive()
        except Exception:
            # Another process is gone: what this one is storing must arrive all the same.
            wait([future])
            raise
        return self.on_each(future.result)

    def share(self, variables: Iterable[Any]) -> None:
        """Sets `variables`, in the order in which all have them, to the values of the first."""
        if self.size == 1:
            return
        for variable in variables:
            value = np.asarray(variable.numpy())
            # Sums of integers with zeros keep every bit; those of floats lose the sign of zero.
            bits = np.frombuffer(value.tobytes() + bytes(-value.nbytes % 8), np.int64)
            data = self._sum(bits if self.is_first else np.zeros_like(bits)).tobytes()
            shared = np.frombuffer(data, value.dtype, value.size).reshape(value.shape)
            variable.assign(shared)

    def check_same(self, variables: Iterable[Any]) -> None:
        """Checks that `variables` have the same bits in every process.

        Collectives give all processes the same numbers; where one has others, its memory or its
        arithmetic is at fault, and what the first stores would no longer be what all compute.

        Raises:
            FlexUNetError: on all of them; names the ranks that differ from the first.
        """
        if self.size == 1:
            return

        def digest() -> int:
            value = 0
            for variable in variables:
                value = google_crc32c.extend(value, variable.numpy().tobytes())
            return value

        first, *others = self.on_each(digest)
        different = [str(rank) for rank, other in enumerate(others, start=1) if other != first]
        if different:
            raise FlexUNetError(
                f"the weights of rank {', '.join(different)} are not those of rank 0, which must "
                "not happen; the same command resumes from the last checkpoint: if it comes again, "
                "give --gradient-exchange all_reduce where processors differ, else look at the "
                "machine of that rank"
            )

    def _shared(self, work: Callable[[], T], *, is_worker: bool) -> list[Any]:
        message: dict[str, Any] = {}
        failure: FlexUNetError | None = None
        if is_worker:
            try:
                message["value"] = work()
            except FlexUNetError as error:
                failure = error
                message = {"error": kind_of(error), "text": str(error)}
        messages = [message] if self.size == 1 else self._exchange(message)
        if failure is not None:
            raise failure
        for each in messages:
            if "error" in each:
                raise error_of(each["error"], each["text"])
        return [each.get("value") for each in messages]

    def _exchange(self, message: Any) -> list[Any]:
        data = json.dumps(message).encode()
        lengths = np.zeros(self.size, np.int64)
        lengths[self.rank] = len(data)
        lengths = self._sum(lengths)
        num_words = -(-int(lengths.max()) // (8 * _WORDS)) * _WORDS
        rows = np.zeros((self.size, num_words), np.int64)
        rows[self.rank] = np.frombuffer(data.ljust(8 * num_words), np.int64)
        texts = self._sum(rows.reshape(-1)).reshape(self.size, num_words)
        return [
            json.loads(row.tobytes()[:length]) for row, length in zip(texts, lengths, strict=True)
        ]

    def _sum(self, values: np.ndarray) -> np.ndarray:
        """Returns the sum of `values`, int64 (N,), over all processes; int32 has no GPU kernels."""
        import tensorflow as tf

        strategy = self._strategy
        if self._add is None:

            def add(values: Any) -> Any:
                context = tf.distribute.get_replica_context()
                # An argument is on no device, and a collective needs to know one.
                return context.all_reduce(tf.distribute.ReduceOp.SUM, tf.identity(values))

            self._add = tf.function(lambda values: strategy.run(add, (values,)), autograph=False)
        num_local = len(strategy.extended.worker_devices)
        # Only the first replica of each process speaks for it.
        parts = strategy.experimental_distribute_values_from_function(
            lambda context: tf.constant(
                values if context.replica_id_in_sync_group % num_local == 0 else 0 * values
            )
        )
        total = strategy.experimental_local_results(self._add(parts))[0]
        return np.asarray(total.numpy())


@contextmanager
def told_of_peers(team: Team) -> Iterator[None]:
    """Turns what a collective says of a lost peer into a line.

    Raises:
        FlexUNetError: another process ended or cannot be reached.
    """
    import tensorflow as tf

    try:
        yield
    except (tf.errors.UnavailableError, tf.errors.InternalError, tf.errors.AbortedError,
            tf.errors.CancelledError, tf.errors.DeadlineExceededError) as error:  # fmt: skip
        if team.size == 1:
            raise
        raise FlexUNetError(
            f"rank {team.rank}: another process ended or cannot be reached "
            f"({type(error).__name__}); the same command resumes"
        ) from error
