"""Keeps the tallies and masks of cases in a temporary file, so that memory stays bounded."""

import pickle
import tempfile
from collections.abc import Iterable
from typing import Any

from flexunet.errors import StorageError
from job.evaluation.case_measures import PackedMask

_MAX_BYTES = 2**26  # in memory; a file in the temporary folder holds more


class CaseFile:
    """Keeps the tallies and the mask of cases of this process; a context manager.

    Tallies are any object that can be pickled.
    """

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(_MAX_BYTES)  # noqa: SIM115 - `__exit__` closes
        self._parts: dict[int, tuple[int, int, int]] = {}  # start, length of tallies and of mask

    def __enter__(self) -> "CaseFile":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def add(self, index: int, tallies: Any, mask: PackedMask) -> None:
        """Adds case `index`.

        Raises:
            StorageError: the temporary folder is full.
        """
        tallies_data, mask_data = pickle.dumps(tallies), pickle.dumps(mask)
        try:
            start = self._file.seek(0, 2)
            self._file.write(tallies_data + mask_data)
            self._file.flush()
        except OSError as error:
            raise StorageError(
                f"{tempfile.gettempdir()}: cannot store the results of a case ({error.strerror}); "
                "free space there, or set TMPDIR to another folder"
            ) from error
        self._parts[index] = start, len(tallies_data), len(mask_data)

    def tallies(self, indices: Iterable[int]) -> dict[int, Any]:
        """Returns the tallies of those of `indices` that this file has."""
        found = {}
        for index in indices:
            if index in self._parts:
                start, length, _ = self._parts[index]
                found[index] = pickle.loads(self._read(start, length))  # noqa: S301 - own data
        return found

    def masks(self, indices: Iterable[int]) -> dict[int, PackedMask]:
        """Returns the masks of those of `indices` that this file has."""
        found = {}
        for index in indices:
            if index in self._parts:
                start, skipped, length = self._parts[index]
                data = self._read(start + skipped, length)
                found[index] = pickle.loads(data)  # noqa: S301 - own data
        return found

    def _read(self, start: int, length: int) -> bytes:
        self._file.seek(start)
        return self._file.read(length)
