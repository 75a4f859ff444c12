"""Exchanges values between the processes that train one run together.

Every process computes the same state; only the first owns the run and writes. Facts that one
process knows (a stop, an error, the restored state) are exchanged through the collectives of the
strategy, at points that all processes reach. A single process exchanges nothing.
"""

import functools
import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from typing import Any, TypeVar

import google_crc32c
import numpy as np

from flexunet.errors import FlexUNetError, error_of, kind_of
from job.distributed.rendezvous import ProcessSpec

T = TypeVar("T")

_LOOK_S = 1.0  # between two checks of the progress of the other processes
_ASK_S = 1.0  # between two questions for a stop request, if batches are shorter
_PIECE_BYTES = 2**22  # of each process, in one exchange
_WORDS = 64  # messages are padded to a multiple of this many int64, so that few shapes are compiled


def _in_thread(work: Callable[[], T]) -> "Future[T]":
    """Starts `work` in a thread that does not keep an interrupted process running."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="keep-alive", daemon=True).start()
    return future


class ProcessGroup:
    """Represents the processes of one strategy; all of them must call every method."""

    def __init__(self, strategy: Any, spec: ProcessSpec | None = None) -> None:
        """Makes the group of `strategy`; `spec` is None for a single process."""
        self.rank = spec.rank if spec else 0
        self.size = spec.size if spec else 1
        self._strategy = strategy
        self._add: Callable[..., Any] | None = None

    @property
    def num_local_replicas(self) -> int:
        """Number of replicas in each process."""
        return len(self._strategy.extended.worker_devices)

    @property
    def first_replica(self) -> int:
        """The global index of the first replica of this process; all have equally many."""
        return self.rank * len(self._strategy.extended.worker_devices)

    @property
    def is_primary(self) -> bool:
        """Whether this process owns the run."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Returns whether `flag` is true in any process."""
        if self.size == 1:
            return flag
        return bool(self._sum(np.array([flag], np.int64))[0])

    def add(self, values: Sequence[int]) -> list[int]:
        """Returns the sums of `values` over all processes."""
        if self.size == 1:
            return [int(each) for each in values]
        return [int(each) for each in self._sum(np.array(values, np.int64))]

    def run_on_primary(self, work: Callable[[], T]) -> T:
        """Returns the result of `work` on the first process to every process, through JSON.

        Raises:
            FlexUNetError: the error that `work` raised there.
        """
        return self._shared(work, is_worker=self.is_primary)[0]

    def all_gather_object(self, work: Callable[[], T]) -> list[T]:
        """Returns the results of `work` on all processes, by rank, through JSON.

        Raises:
            FlexUNetError: the error of the lowest rank on which `work` failed.
        """
        return self._shared(work, is_worker=True)

    def all_gather_with_heartbeat(
        self, work: Callable[[Callable[[], None]], T], heartbeat: Callable[[], None]
    ) -> list[T]:
        """Returns the results of `work` on all processes, by rank, through JSON.

        `work` may take much longer in one process than in another. While any process makes
        progress, `heartbeat` is called in all of them.

        Args:
            work: gets a function to call after each bit of progress.
            heartbeat: called in this thread and in that of `work`.

        Raises:
            FlexUNetError: the error of the lowest rank on which `work` failed.
        """
        if self.size == 1:
            return [work(heartbeat)]
        return self._watched(lambda notify, _: work(notify), heartbeat, lambda: False)

    def run_stoppable(
        self,
        work: Callable[[Callable[[], None], Callable[[], bool]], None],
        heartbeat: Callable[[], None],
        should_stop: Callable[[], bool],
    ) -> None:
        """Runs `work` in every process; a stop request of one process reaches all within seconds.

        `work` may take much longer in one process than in another, and must not use collectives.

        Args:
            work: gets a function to call after each bit of progress, and a function that returns
                whether to stop. It must raise `StoppedError` soon after a stop request.
            heartbeat: as in `all_gather_with_heartbeat`.
            should_stop: whether this process requests a stop. Called only after progress of any
                process, in this thread.

        Raises:
            FlexUNetError: the error of the lowest rank on which `work` failed.
        """
        if self.size == 1:
            work(heartbeat, should_stop)
        else:
            self._watched(work, heartbeat, should_stop)

    def all_gather_bytes(self, data: bytes) -> list[bytes]:
        """Returns `data` of all processes, by rank; the messages have bounded size."""
        if self.size == 1:
            return [data]
        lengths = np.zeros(self.size, np.int64)
        lengths[self.rank] = len(data)
        lengths = self._sum(lengths)
        found = [bytearray() for _ in lengths]
        for start in range(0, int(lengths.max()), _PIECE_BYTES):
            size = min(_PIECE_BYTES, -(-(int(lengths.max()) - start) // (8 * _WORDS)) * 8 * _WORDS)
            rows = np.zeros((self.size, size), np.uint8)
            piece = np.frombuffer(data[start : start + size], np.uint8)
            rows[self.rank, : len(piece)] = piece
            pieces = self._sum(rows.reshape(-1).view(np.int64)).view(np.uint8)
            for whole, row in zip(found, pieces.reshape(self.size, size), strict=True):
                whole += row.tobytes()
        return [bytes(whole[:length]) for whole, length in zip(found, lengths, strict=True)]

    def _watched(
        self,
        work: Callable[[Callable[[], None], Callable[[], bool]], T],
        heartbeat: Callable[[], None],
        should_stop: Callable[[], bool],
    ) -> list[T]:
        """Runs `work` in a thread; this thread exchanges progress and stop requests."""
        moved, stop = threading.Event(), threading.Event()

        def notify() -> None:
            moved.set()
            heartbeat()  # a collective may block while the work continues

        future = _in_thread(lambda: work(notify, stop.is_set))
        asks_to_stop = False

        def look() -> list[bool]:
            """Returns whether this process is done, has made progress and requests a stop."""
            wait([future], _LOOK_S)
            found = [future.done(), moved.is_set(), asks_to_stop]
            moved.clear()
            return found

        is_over = False
        try:
            while not is_over:
                looks: list[list[bool]] = self.all_gather_object(functools.partial(list, look()))
                is_over = all(is_done for is_done, _, _ in looks)
                if any(asks for _, _, asks in looks):
                    stop.set()
                if any(has_moved for _, has_moved, _ in looks):
                    heartbeat()
                    asks_to_stop = asks_to_stop or should_stop()
        except Exception:
            # Another process is gone, but this one must finish its uploads.
            stop.set()
            wait([future])
            raise
        return self.all_gather_object(future.result)

    def broadcast(self, variables: Iterable[Any]) -> None:
        """Sets `variables` to their values in the first process; same order in all processes."""
        if self.size == 1:
            return
        for variable in variables:
            value = np.asarray(variable.numpy())
            # Integer sums with zeros keep every bit; float sums lose the sign of zero.
            bits = np.frombuffer(value.tobytes() + bytes(-value.nbytes % 8), np.int64)
            data = self._sum(bits if self.is_primary else np.zeros_like(bits)).tobytes()
            shared = np.frombuffer(data, value.dtype, value.size).reshape(value.shape)
            variable.assign(shared)

    def check_same(self, variables: Iterable[Any]) -> None:
        """Checks that `variables` have the same bits in every process.

        Collectives give all processes the same numbers. If a process has other bits, its memory or
        arithmetic is faulty, and the stored state would not be the state of all processes.

        Raises:
            FlexUNetError: in all processes; names the ranks that differ from the first.
        """
        if self.size == 1:
            return

        def digest() -> int:
            value = 0
            for variable in variables:
                value = google_crc32c.extend(value, variable.numpy().tobytes())
            return value

        first, *others = self.all_gather_object(digest)
        different = [str(rank) for rank, other in enumerate(others, start=1) if other != first]
        if different:
            raise FlexUNetError(
                f"the weights of rank {', '.join(different)} differ from those of rank 0: run "
                "the same command again, which resumes from the last checkpoint. If it recurs on "
                "machines with different processors, give --gradient-exchange all_reduce; "
                "otherwise check the hardware of that rank"
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
        """Returns the sum of int64 `values` (N,) over all processes; int32 has no GPU kernels."""
        import tensorflow as tf

        strategy = self._strategy
        if self._add is None:

            def add(values: Any) -> Any:
                context = tf.distribute.get_replica_context()
                # A collective needs a tensor on a device; an argument is on none.
                return context.all_reduce(tf.distribute.ReduceOp.SUM, tf.identity(values))

            self._add = tf.function(lambda values: strategy.run(add, (values,)), autograph=False)
        num_local = len(strategy.extended.worker_devices)
        # Only the first replica of each process adds its values.
        parts = strategy.experimental_distribute_values_from_function(
            lambda context: tf.constant(
                values if context.replica_id_in_sync_group % num_local == 0 else 0 * values
            )
        )
        total = strategy.experimental_local_results(self._add(parts))[0]
        return np.asarray(total.numpy())


class StopPoll:
    """Asks the processes of a group for a stop request: about once a second, and at the end.

    Each process calls it after every batch. All of them agree on the batches after which they
    exchange their requests, from the mean duration of the batches before.
    """

    def __init__(
        self, process_group: ProcessGroup, should_stop: Callable[[], bool], num_batches: int
    ) -> None:
        """Starts before the first of `num_batches`; `should_stop` is of this process."""
        self._process_group = process_group
        self._should_stop = should_stop
        self._num_left = num_batches
        self._interval = self._until_asked = 1  # batches
        self._is_requested = False
        self._last_asked = time.monotonic()

    def __call__(self) -> bool:
        """Returns whether a process has requested a stop, as far as the processes exchanged it."""
        self._is_requested = self._should_stop() or self._is_requested
        if self._process_group.size == 1:
            return self._is_requested
        self._num_left -= 1
        self._until_asked -= 1
        if self._until_asked and self._num_left:
            return False
        now = time.monotonic()
        milliseconds = round(1000 * (now - self._last_asked))
        self._last_asked = now
        found = self._process_group.add([self._is_requested, milliseconds])
        mean_s = found[1] / 1000 / self._process_group.size / self._interval
        # Double it at most: one short batch says little about the next ones.
        wanted = int(_ASK_S / mean_s) if mean_s else 2 * self._interval
        self._interval = self._until_asked = max(1, min(2 * self._interval, wanted))
        return found[0] > 0


@contextmanager
def peer_errors(process_group: ProcessGroup) -> Iterator[None]:
    """Converts the errors of collectives after the loss of a peer into one line.

    Raises:
        FlexUNetError: another process ended or cannot be reached.
    """
    import tensorflow as tf

    try:
        yield
    except (tf.errors.UnavailableError, tf.errors.InternalError, tf.errors.AbortedError,
            tf.errors.CancelledError, tf.errors.DeadlineExceededError) as error:  # fmt: skip
        if process_group.size == 1:
            raise
        raise FlexUNetError(
            f"rank {process_group.rank}: another process ended or cannot be reached "
            f"({type(error).__name__}); the same command resumes"
        ) from error
