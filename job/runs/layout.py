"""Names the objects in the folder of a run, and reads its small records."""

import json
import re
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import ValidationError

from flexunet.errors import ContentError, UsageError
from flexunet.settings import Settings
from flexunet.storage import NotFound, ObjectMeta, ObjectStore, join_url
from job.config import TrainConfig

LEASE_NAME = "lease.json"
LOCK_NAME = ".lock"
IDENTITY_NAME = "identity.json"
OUTCOME_NAME = "outcome.json"
COMMIT_NAME = "COMMIT.json"
ORIGIN_NAME = "origin.json"
CROSS_VALIDATION_NAME = (
    "cross_validation.json"  # results of all folds, in the folder of their common name
)
ENDS_FOLDER = "attempts"  # how attempts ended that did not end the run
RESTORE = "restore the file, or train a run of another name"  # remedy if one of these is damaged
MAX_RECORD_BYTES = 1 << 20
_FOLDER = re.compile(r"(checkpoints/step-(\d{8,18})/a(\d{1,9}))/([^/]+)")

R = TypeVar("R", bound=Settings)


@dataclass(frozen=True, order=True)
class CheckpointRef:
    """Locates a checkpoint; ordered by attempt, then step."""

    attempt: int
    step: int
    prefix: str = field(compare=False)


def run_url(config: TrainConfig) -> str:
    """Returns the URL of the run or cross-validation of `config`."""
    return join_url(config.output, str(config.name))


def evaluate_again(run: ObjectStore) -> str:
    """Returns the remedy for an unreadable evaluation of `run`."""
    return f"evaluate the run again: flexunet evaluate {run.url}"


def no_run(url: str) -> UsageError:
    """Returns the error for a folder that should be that of a run."""
    return UsageError(f"{url}: no run here: config.yaml is missing; give the folder RUNS/NAME")


def checkpoint_prefix(step: int, attempt: int) -> str:
    """Returns the folder of a checkpoint."""
    return f"checkpoints/step-{step:08d}/a{attempt}"


def parse_checkpoint_ref(prefix: str | None) -> CheckpointRef | None:
    """Parses a checkpoint folder name; returns None if `prefix` is not one."""
    match = _FOLDER.fullmatch(f"{prefix}/{COMMIT_NAME}")
    return match and CheckpointRef(int(match[3]), int(match[2]), match[1])


def list_folders(store: ObjectStore) -> dict[CheckpointRef, list[ObjectMeta]]:
    """Returns the objects of every checkpoint folder, complete or not."""
    folders: dict[CheckpointRef, list[ObjectMeta]] = {}
    for stat in store.list("checkpoints/"):
        match = _FOLDER.fullmatch(stat.name)
        if match:
            ref = CheckpointRef(int(match[3]), int(match[2]), match[1])
            folders.setdefault(ref, []).append(stat)
    return folders


def is_complete(stats: list[ObjectMeta]) -> bool:
    """Returns whether the objects of a folder are a complete checkpoint."""
    return any(stat.name.endswith(f"/{COMMIT_NAME}") for stat in stats)


def read_small(store: ObjectStore, name: str, max_bytes: int = MAX_RECORD_BYTES) -> bytes:
    """Returns the bytes of a small record.

    Raises:
        ContentError: the object has more than `max_bytes`.
    """
    stat = store.stat(name)
    if stat is None:
        raise NotFound(f"{store.url}/{name} does not exist")
    if stat.size > max_bytes:
        raise ContentError(f"{store.url}/{name} has {stat.size} bytes, over {max_bytes}; {RESTORE}")
    return store.get(name)


def parse_record(data: bytes, kind: type[R], where: str) -> R:
    """Parses the JSON `data` as a record of `kind`.

    Raises:
        ContentError: it is not valid; names the problem and `where`.
    """
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        detail = error.errors()[0]
        field_name = ".".join(str(part) for part in detail["loc"]) or "content"
        raise ContentError(f"{where}: {field_name}: {detail['msg']}; {RESTORE}") from error


def through_json(value: Any) -> Any:
    """Returns `value` after a round trip through JSON (tuples become lists)."""
    return json.loads(json.dumps(value))
