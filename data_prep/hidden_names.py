"""Replaces names in a dataset by digests if --hash-names is on."""

import hashlib
import hmac
import os
from collections.abc import Sequence

from data_prep.config import HASH_KEY_VARIABLE, PrepConfig
from data_prep.imaging.dicom.reader import DICOM_ENDINGS
from data_prep.sources.pairs import Reject, Source
from flexunet.storage import open_store
from flexunet.text import as_utf8

_HASH_LENGTH = 16  # hex digits, 64 bits: odds of a clash in a million names are 1 to 37 million


def hidden(text: str, config: PrepConfig) -> str:
    """Returns `text`, or its digest with --hash-names."""
    if not config.hash_names:
        return text
    key = os.environ.get(HASH_KEY_VARIABLE, "").encode()
    return hmac.new(key, os.fsencode(text), hashlib.sha256).hexdigest()[:_HASH_LENGTH]


def hidden_name(name: str, config: PrepConfig) -> str:
    """Returns the file name without folders; with --hash-names, the stem is a digest."""
    base = os.path.basename(name)
    stem, ending = os.path.splitext(base)
    # In a DICOM file without an ending, the text after the last dot is part of the name.
    if config.format == "inbreast" and ending.lower() not in (*DICOM_ENDINGS, ".xml"):
        stem, ending = base, ""
    return hidden(stem, config) + ending


def without_name(reject: Reject, config: PrepConfig) -> str:
    """Returns the reason of `reject` with the file's own name hidden."""
    name = os.path.basename(reject.file)
    reason = reject.reason.replace(name, hidden_name(name, config))
    stem = os.path.splitext(name)[0]
    return reason.replace(stem, hidden(stem, config))


def dataset_name(sources: Sequence[Source], config: PrepConfig) -> str:
    """Returns the dataset's name in the manifest: that of the folder of the sources."""
    first = sources[0]
    if first.root is not None:
        parents = open_store(first.root).url.split("/")
    else:
        parents = open_store(first.images).url.split("/")[: -1 if first.split is None else -2]
    return "dataset" if config.hash_names or not parents else as_utf8(parents[-1]) or "dataset"
