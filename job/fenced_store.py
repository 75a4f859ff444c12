"""A store that changes nothing once its owner has lost the right to write.

Every put and delete first asks the owner's `check`, which raises where another process has taken
over. Two gaps remain for tables and pictures; checkpoints are safe from both, see `job/run.py`. A
process may be paused between the check and the request. And a process of the same launcher takes
over without a wait, which its predecessor, if it should still live, notices at its next renewal.

Commands that never own a run (`evaluate`, `infer`, `report`) and the stacks of a process that hangs
do not pass here.
"""

from collections.abc import Callable

from data_prep.storage import Stat, Store


class FencedStore:
    """The objects of `inner`; readable by all, changed only while `check` raises nothing."""

    def __init__(self, inner: Store, check: Callable[[], None]) -> None:
        self._inner = inner
        self._check = check

    def __repr__(self) -> str:
        return f"FencedStore({self._inner!r})"

    @property
    def url(self) -> str:
        """See `Store.url`."""
        return self._inner.url

    @property
    def local_root(self) -> str | None:
        """See `Store.local_root`."""
        return self._inner.local_root

    @property
    def retry_s(self) -> float:
        """See `Store.retry_s`."""
        return self._inner.retry_s

    def stat(self, name: str) -> Stat | None:
        """See `Store.stat`."""
        return self._inner.stat(name)

    def list(self, prefix: str = "") -> list[Stat]:
        """See `Store.list`."""
        return self._inner.list(prefix)

    def get(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        """See `Store.get`."""
        return self._inner.get(name, start, length)

    def get_file(self, name: str, path: str) -> int:
        """See `Store.get_file`."""
        return self._inner.get_file(name, path)

    def put(self, name: str, data: bytes, *, if_generation: int | None = None) -> Stat:
        """See `Store.put`."""
        self._check()
        return self._inner.put(name, data, if_generation=if_generation)

    def put_file(self, name: str, path: str, *, if_generation: int | None = None) -> Stat:
        """See `Store.put_file`."""
        self._check()
        return self._inner.put_file(name, path, if_generation=if_generation)

    def delete(self, name: str) -> None:
        """See `Store.delete`."""
        self._check()
        self._inner.delete(name)

    def below(self, prefix: str) -> "FencedStore":
        """See `Store.below`."""
        return FencedStore(self._inner.below(prefix), self._check)

    def with_limits(self, *, retry_s: float, timeout_s: float) -> "FencedStore":
        """See `Store.with_limits`."""
        limited = self._inner.with_limits(retry_s=retry_s, timeout_s=timeout_s)
        return FencedStore(limited, self._check)

    def watched(self, moved: Callable[[], None]) -> "FencedStore":
        """See `Store.watched`."""
        return FencedStore(self._inner.watched(moved), self._check)

    def remove_unfinished(self) -> int:
        """See `Store.remove_unfinished`."""
        self._check()
        return self._inner.remove_unfinished()
