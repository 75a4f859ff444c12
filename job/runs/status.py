"""Says how a run and its attempts ended, without owning the run."""

from typing import Any, Literal

from flexunet.json_files import read_json
from flexunet.storage import ObjectStore
from job.runs.layout import ENDS_FOLDER, OUTCOME_NAME, RESTORE
from job.runs.lease import read_lease

End = Literal["stopped", "looked"]  # a stop that saved; a launcher that saw what there is to do
RunStatus = Literal["finished", "diverged", "stopped", "open"]


def read_outcome(store: ObjectStore) -> dict[str, Any] | None:
    """Returns how the run ended (`status`, `exit_code` and more), None while it has not."""
    return read_json(store, OUTCOME_NAME, RESTORE)


def read_ends(store: ObjectStore) -> dict[int, dict[str, Any]]:
    """Returns what `Run.note_end` wrote, by attempt."""
    ends = {}
    for stat in store.list(f"{ENDS_FOLDER}/"):
        stem = stat.name.removeprefix(f"{ENDS_FOLDER}/").removesuffix(".json")
        if stem.isdecimal():
            ends[int(stem)] = read_json(store, stat.name, RESTORE) or {}
    return ends


def run_status(store: ObjectStore) -> RunStatus:
    """Returns where the run in `store` stands, without owning it.

    "open" is one that is being trained, or whose process was killed: from outside they look alike.
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
