"""Finds the DICOM files of a folder, by their endings or their first bytes.

Decides which files to open, and which part of a name is its stem. The module reads nothing else of
the files.

An export of a PACS or a CD names files IM000001, or by numbers with dots. Files with the ending of
another format are not opened, because each read from a bucket is a request.
"""

import itertools
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

from data_prep.imaging.arrays import NPY_ENDING
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
    *(".exe", ".dll", ".jar", ".app", ".bat", ".webp", ".svg", ".ico"),
)
# The table of contents of a DICOM CD, itself a DICOM file without an image.
_CONTENTS = ("dicomdir",)
_NUM_THREADS = 16
_KNOWN_ENDINGS = (*IMAGE_ENDINGS, NPY_ENDING, *DICOM_ENDINGS)


def stem_of(name: str) -> str:
    """Returns `name` without its ending if that is an image's ending.

    1.2.840.1 and 1.2.840.2 are two names, not one name with two endings.
    """
    stem, ending = os.path.splitext(name)
    return stem if ending.lower() in _KNOWN_ENDINGS else name


def why_no_image(name: str) -> str:
    """Returns why a file that is neither an image nor DICOM is skipped."""
    if _may_be(name):
        return f"no ending of an image, and no DICM at byte {PREAMBLE_BYTES}"
    return "a file name of another kind of file"


def dicom_without_ending(
    store: ObjectStore, stats: Iterable[ObjectMeta], count: int | None = None
) -> set[str]:
    """Returns the names of objects that start like DICOM files but have no DICOM ending.

    Reads only the signature of each candidate; skips broken links.

    Args:
        count: return at most this number of names, and open only a few more files than needed.
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
        except (NotFound, ContentError):  # deleted, or a name that storage does not allow
            return False
        except StorageError:
            if store.local_root is None:
                raise
            return False  # this user may not read the file

    if not names:
        return
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        found = in_order(pool, look, names, num_waiting=2 * _NUM_THREADS)
        yield from (name for name, is_one in zip(names, found, strict=True) if is_one)
