"""Reads untrusted HDF5 files as data: follows no link and opens no other file."""

from typing import Any


def entry_at(group: Any, path: str) -> Any:
    """Returns the group or dataset at `path` below an open h5py group.

    Raises:
        KeyError: there is none.
        TypeError: the path has a link, which could point to any file of this machine.
    """
    import h5py

    entry = group
    for name in path.split("/"):
        if not isinstance(entry, h5py.Group):
            raise TypeError(f"{entry.name} is not a group")
        link = entry.get(name, getlink=True)
        if link is None:
            raise KeyError(f"{path} is missing")
        if not isinstance(link, h5py.HardLink):
            raise TypeError(f"{path} is a link; only plain entries are read")
        entry = entry[name]
    return entry


def check_array(entry: Any, kinds: str = "f") -> None:
    """Checks that an entry is an array stored in the file itself.

    Args:
        kinds: allowed kinds of NumPy types.

    Raises:
        TypeError: it is not.
    """
    import h5py

    if not isinstance(entry, h5py.Dataset) or entry.dtype.kind not in kinds:
        what = "floating-point numbers" if kinds == "f" else "numbers"
        raise TypeError(f"{entry.name} holds no {what}")
    if entry.external or entry.is_virtual:
        raise TypeError(f"{entry.name} keeps its values in other files")
