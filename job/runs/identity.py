"""Compares the settings and dataset of a later attempt with those of the first."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from flexunet.errors import UsageError
from flexunet.json_files import read_json
from flexunet.settings import flag_of
from flexunet.storage import ObjectStore
from job.runs.checkpoints import find_checkpoints
from job.runs.layout import IDENTITY_NAME, RESTORE, through_json


def read_identity(store: ObjectStore) -> dict[str, Any] | None:
    """Returns `config` and `dataset_digest` of the first attempt; None before it."""
    return read_json(store, IDENTITY_NAME, RESTORE)


def settle_identity(
    store: ObjectStore, identity: Mapping[str, Any], dataset_digest: str
) -> tuple[str, str]:
    """Checks that the run in `store` has this identity; the first attempt stores it.

    Args:
        identity: nested JSON values of the config fields that identify a run.
        dataset_digest: sha256 of the dataset's manifest, hex.

    Returns:
        The digests of the dataset and of the identity, for the checkpoints of the run.

    Raises:
        UsageError: values differ; names each with the stored and the new value.
    """
    given = through_json({"config": identity, "dataset_digest": dataset_digest})
    stored = read_identity(store)
    if stored is None:
        store.put(IDENTITY_NAME, (json.dumps(given, indent=1, sort_keys=True) + "\n").encode())
    elif stored != given:
        remedy = "give the old values or another --name"
        if not find_checkpoints(store):
            remedy += ", or delete the folder: it has no checkpoint yet"
        raise UsageError(
            f"run {store.url} was started with other settings: "
            f"{'; '.join(differences(stored, given))}; {remedy}"
        )
    digest = hashlib.sha256(json.dumps(given["config"], sort_keys=True).encode()).hexdigest()
    return dataset_digest, digest


def differences(stored: Any, given: Any) -> list[str]:
    """Returns one phrase for each difference between two nested JSON values.

    Values below `config` are named by the option that sets them.
    """
    before, now = dict(_leaves(stored)), dict(_leaves(given))
    return [
        f"{_as_option(name)} was {_value(before, name)}, now {_value(now, name)}"
        for name in sorted(before.keys() | now.keys())
        if _value(before, name) != _value(now, name)
    ]


def _as_option(name: str) -> str:
    group, *path = name.split(".")
    return flag_of(path) if group == "config" and path else name


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def _value(leaves: dict[str, Any], name: str) -> str:
    return json.dumps(leaves[name]) if name in leaves else "not set"
