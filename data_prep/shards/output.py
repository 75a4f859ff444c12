"""Manages the output folder of a preparation: claim, write once, commit, clean up.

Keeps two preparations apart, and lets an interrupted one continue. The module does not depend on
the content of the plan, the shards and the table.
"""

import json
import logging
from collections.abc import Mapping
from typing import Any

from data_prep.shards.manifest import MANIFEST_NAME, SHARD_PATTERN, Manifest
from data_prep.shards.sample_table import SAMPLES_NAME
from flexunet.errors import ContentError, UsageError
from flexunet.process_pool import MAX_REQUESTS, in_order, num_requests, request_threads
from flexunet.storage import (
    Forbidden,
    NotFound,
    ObjectStore,
    PreconditionFailed,
    content_matches,
    join_url,
)

logger = logging.getLogger(__name__)

_MEGABYTE = 10**6
_MAX_BLIND_BYTES = 1 << 20
STATE_PREFIX = "prep-state"
PLAN_NAME = f"{STATE_PREFIX}/plan.json"


def staging_url(output_url: str) -> str:
    """Returns the URL of staged records."""
    return join_url(output_url, STATE_PREFIX)


def claim_output(store: ObjectStore, plan: Mapping[str, Any]) -> None:
    """Claims the output for `plan`, so that no other preparation can use it.

    Args:
        plan: options and source of the preparation, JSON values.

    Raises:
        UsageError: another preparation began there, or the output contains other shards.
    """
    data = _plan_bytes(plan)
    try:
        found = store.get(PLAN_NAME)
    except NotFound:
        _refuse_strangers(store)
        try:
            store.put(PLAN_NAME, data, if_generation=0)
            return
        except PreconditionFailed:
            found = store.get(PLAN_NAME)
    if found != data:
        differs = describe_difference(_parse_plan(found), plan)
        raise UsageError(
            f"{store.url}: another preparation was interrupted here ({differs}); run its command "
            "again, delete the folder, or choose another"
        )


def read_plan(store: ObjectStore) -> dict[str, Any] | None:
    """Returns the plan of the preparation that was interrupted in `store`, None if there is none.

    The plan is empty if it is damaged.
    """
    try:
        return _parse_plan(store.get(PLAN_NAME))
    except NotFound:
        return None


def describe_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Returns the first options that differ, or a difference of the source, in words."""
    before, after = old.get("options", {}), new.get("options", {})
    changes = [
        f"--{name.replace('_', '-')} was {before.get(name)}, now {after.get(name)}"
        for name in sorted({*before, *after})
        if before.get(name) != after.get(name)
    ]
    if not changes and old.get("source_sha256") != new.get("source_sha256"):
        changes = ["the files of the source changed"]
    return "; ".join(changes[:3]) or "made by another version"


def commit(store: ObjectStore, manifest: Manifest, samples: bytes) -> None:
    """Publishes the dataset: the sample table, then the manifest, which commits it."""
    put_once(store, SAMPLES_NAME, samples)
    put_once(store, MANIFEST_NAME, manifest.to_json())


def remove_state(store: ObjectStore) -> None:
    """Deletes the staged records and the plan, which the dataset does not need.

    The plan is deleted last, because it identifies the rest. Credentials without permission to
    delete leave the objects there, with a warning.
    """
    store.remove_unfinished()
    stats = store.list(f"{STATE_PREFIX}/")
    names = [stat.name for stat in stats if stat.name != PLAN_NAME]
    try:
        with request_threads(num_requests(store)) as threads:
            for _ in in_order(threads, store.delete, names, num_waiting=2 * MAX_REQUESTS):
                pass
        if len(names) < len(stats):
            store.delete(PLAN_NAME)
    except Forbidden:
        logger.warning(
            "%s: %d temporary objects remain (%.1f MB), because these credentials have no "
            "permission to delete; the dataset is complete without them",
            staging_url(store.url),
            len(stats),
            sum(stat.size for stat in stats) / _MEGABYTE,
        )


def put_once(store: ObjectStore, name: str, data: bytes) -> None:
    """Stores `data` as a new object; keeps an existing object with the same bytes."""
    # A large object is not sent just to learn that it exists.
    if len(data) > _MAX_BLIND_BYTES and _kept(store, name, data):
        return
    try:
        store.put(name, data, if_generation=0)
    except (PreconditionFailed, Forbidden):
        # It exists already, or another process of the same preparation was faster. With some
        # credentials, the server then answers that it may not be replaced.
        if not _kept(store, name, data):
            raise


def _kept(store: ObjectStore, name: str, data: bytes) -> bool:
    stat = store.stat(name)
    if stat is None:
        return False
    if not content_matches(store, stat, data):
        raise ContentError(
            f"{store.url}/{name}: is damaged or from another preparation; delete it and run the "
            "same command, or choose another folder"
        )
    return True


def _refuse_strangers(store: ObjectStore) -> None:
    for stat in store.list():
        if SHARD_PATTERN.fullmatch(stat.name) or stat.name == SAMPLES_NAME:
            raise UsageError(
                f"{store.url}: contains {stat.name}, which belongs to no interrupted preparation; "
                "delete it or choose another folder"
            )


def _plan_bytes(plan: Mapping[str, Any]) -> bytes:
    return json.dumps(plan, indent=1, sort_keys=True).encode()


def _parse_plan(data: bytes) -> dict[str, Any]:
    try:
        values = json.loads(data)
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}
