"""Reads how a run and its attempts ended, without owning the run."""

from typing import Any, Literal

from flexunet.json_files import read_json
from flexunet.storage import ObjectStore
from job.runs.layout import ENDS_FOLDER, OUTCOME_NAME, RESTORE
from job.runs.lease import read_lease

End = Literal["stopped", "looked"]  # stopped and saved; only looked at the run, as a launcher does
RunStatus = Literal["finished", "diverged", "stopped", "open"]


def read_outcome(store: ObjectStore) -> dict[str, Any] | None:
    """Returns the outcome of the run (`status`, `exit_code` and more); None before its end."""
    return read_json(store, OUTCOME_NAME, RESTORE)


def read_ends(store: ObjectStore) -> dict[int, dict[str, Any]]:
    """Returns the records of `Run.note_end` by attempt."""
    ends = {}
    for stat in store.list(f"{ENDS_FOLDER}/"):
        stem = stat.name.removeprefix(f"{ENDS_FOLDER}/").removesuffix(".json")
        if stem.isdecimal():
            ends[int(stem)] = read_json(store, stat.name, RESTORE) or {}
    return ends


def run_status(store: ObjectStore) -> RunStatus:
    """Returns the status of the run in `store`, without owning it.

    "open": the run is in training, or its process was killed. From outside both look the same.
    """
    outcome = read_outcome(store)
    if outcome is not None:
        status: RunStatus = outcome["status"]
        return status
    found = read_lease(store)
    attempt = found[0].attempt if found else 0
    ends = {n: each.get("end") for n, each in read_ends(store).items()}
    while ends.get(attempt) == "looked":
        attempt -= 1
    return "stopped" if ends.get(attempt) == "stopped" else "open"
