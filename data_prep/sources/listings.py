"""Lists the folders of a source once per command, with few requests.

The one place that decides which listed files belong to the source.
"""

import dataclasses
import os
from collections.abc import Collection

from flexunet.errors import UsageError
from flexunet.progress import waiting
from flexunet.storage import ObjectMeta, ObjectStore, join_url, open_source

_DROPPINGS = ("desktop.ini", "thumbs.db")  # also every name that starts with a dot


class Listings:
    """The files of folders as listed at their first use; a later change is not seen.

    All steps of a command use one object, so that they see the same files and a bucket is not
    listed for each step. Not shared with worker processes.
    """

    def __init__(self) -> None:
        self._found: dict[str, list[ObjectMeta]] = {}

    def files(self, url: str) -> list[ObjectMeta]:
        """Returns the metadata of all objects at `url`, except files of file managers."""
        if url not in self._found:
            store = open_source(url)
            known = None if store.local_root is not None else self._folder_above(url)
            listed = store.list() if known is None else self._part_of(known, url)
            self._found[url] = [stat for stat in listed if not _is_dropping(stat)]
        return self._found[url]

    def check_number(self, url: str, most: int) -> None:
        """Lists `url` as `files` does; shows the time that it takes.

        Raises:
            UsageError: more than `most` objects; the rest is not listed.
        """
        if url in self._found:
            return
        with waiting(f"listing {url}"):
            listed = open_source(url).list(most=most + 1)
        if len(listed) > most:
            raise UsageError(
                f"{url}: contains more than {most} files, and folders of images and masks are "
                "looked for in all of them; give a folder inside of it that contains both"
            )
        self._found[url] = [stat for stat in listed if not _is_dropping(stat)]

    def names(self, url: str) -> list[str]:
        """Returns the names of `files`."""
        return [stat.name for stat in self.files(url)]

    def look_for(self, url: str, folders: Collection[str]) -> tuple[str, ...]:
        """Lists the `folders` that exist in a bucket's folder `url`, in one or two requests.

        Returns the names of all folders directly in `url`.

        A folder with others beside them is not listed as a whole, because these may be large.
        """
        store = open_source(url)
        existing = store.folders()
        if store.local_root is not None:
            return existing
        self._found |= {join_url(url, name): [] for name in folders if name not in existing}
        if existing and set(existing) <= set(folders):
            self._found.setdefault(url, _below_folders(store))
        return existing

    def _folder_above(self, url: str) -> str | None:
        """Returns a listed folder that contains `url`, None if there is none."""
        return next((each for each in self._found if url.startswith(f"{each}/")), None)

    def _part_of(self, folder: str, url: str) -> list[ObjectMeta]:
        prefix = url[len(folder) + 1 :] + "/"
        return [
            dataclasses.replace(stat, name=stat.name.removeprefix(prefix))
            for stat in self._found[folder]
            if stat.name.startswith(prefix)
        ]


def _below_folders(store: ObjectStore) -> list[ObjectMeta]:
    return [stat for stat in store.list() if "/" in stat.name]


def _is_dropping(stat: ObjectMeta) -> bool:
    name = os.path.basename(stat.name)
    return name.startswith(".") or name.lower() in _DROPPINGS
