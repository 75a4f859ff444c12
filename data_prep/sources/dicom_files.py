"""Which files of a folder are DICOM files, by their endings or by how they begin.

Owns what is looked into, and what the rest of a name is called. It must not know what else is in
the files.

An export of a PACS or a CD names them IM000001, or by numbers with dots. Files whose ending tells
that they are something else are not looked into: each look into a bucket is a request.
"""

import itertools
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

from data_prep.imaging.dicom.preamble import PREAMBLE_BYTES, SIGNATURE_BYTES, is_dicom
from data_prep.imaging.dicom.reader import DICOM_ENDINGS
from data_prep.sources.pairs import IMAGE_ENDINGS
from flexunet.errors import ContentError, StorageError
from flexunet.process_pool import in_order
from flexunet.storage import NotFound, ObjectMeta, ObjectStore

_OTHER_ENDINGS = (
    *(".txt", ".md", ".rst", ".log", ".csv", ".tsv", ".xml", ".json", ".jsonl", ".yaml", ".yml"),
    *(".toml", ".ini", ".inf", ".cfg", ".html", ".htm", ".css", ".js", ".py", ".ipynb", ".sh"),
    *(".pdf", ".doc", ".docx", ".xls", ".xlsx", ".ppt", ".pptx", ".rtf"),
    *(".zip", ".gz", ".bz2", ".xz", ".zst", ".7z", ".rar", ".tar", ".tgz", ".iso"),
    *(".npy", ".npz", ".h5", ".hdf5", ".parquet", ".tfrecord", ".pkl", ".mat", ".db", ".sqlite"),
    *(".exe", ".dll", ".jar", ".app", ".bat", ".gif", ".webp", ".svg", ".ico"),
)
# The list of contents of a DICOM CD, itself a DICOM file without a picture.
_CONTENTS = ("dicomdir",)
_NUM_THREADS = 16
_KNOWN_ENDINGS = (*IMAGE_ENDINGS, *DICOM_ENDINGS)


def stem_of(name: str) -> str:
    """Returns `name` without its ending where that is the ending of a picture.

    1.2.840.1 and 1.2.840.2 are two names, not one with two endings.
    """
    stem, ending = os.path.splitext(name)
    return stem if ending.lower() in _KNOWN_ENDINGS else name


def why_no_image(name: str) -> str:
    """Returns why a file is passed over that is neither an image nor DICOM."""
    if _may_be(name):
        return f"no ending of an image, and no DICM at byte {PREAMBLE_BYTES}"
    return "a file name of another kind of file"


def dicom_without_ending(
    store: ObjectStore, stats: Iterable[ObjectMeta], count: int | None = None
) -> set[str]:
    """Returns the names of the objects that begin as DICOM and have no ending that says so.

    Each that may be one is read as far as its signature; a broken link is none.

    Args:
        count: only the first so many of them, and few more are looked into than that takes.
    """
    names = [each.name for each in stats if each.size >= SIGNATURE_BYTES and _may_be(each.name)]
    return set(itertools.islice(_found(store, names), count))


def _may_be(name: str) -> bool:
    base = os.path.basename(name).lower()
    is_other = base.startswith(".") or base in _CONTENTS or base.endswith(_OTHER_ENDINGS)
    return not is_other and not base.endswith(_KNOWN_ENDINGS)


def _found(store: ObjectStore, names: list[str]) -> Iterator[str]:
    def look(name: str) -> bool:
        try:
            return is_dicom(store.get(name, 0, SIGNATURE_BYTES))
        except (NotFound, ContentError):  # gone, or of a name that storage refuses
            return False
        except StorageError:
            if store.local_root is None:
                raise
            return False  # a file that this user may not read

    if not names:
        return
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        found = in_order(pool, look, names, num_waiting=2 * _NUM_THREADS)
        yield from (name for name, is_one in zip(names, found, strict=True) if is_one)
