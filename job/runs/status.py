"""Reads how a run, its attempts and the folds of a cross-validation ended, without owning them."""

import contextlib
from typing import Any, Literal

from flexunet.errors import UsageError
from flexunet.json_files import read_json
from flexunet.settings import read_yaml
from flexunet.storage import NotFound, ObjectStore, open_store
from flexunet.text import join_truncated
from job.config import stored_config
from job.data.folds import fold_words
from job.runs.layout import ENDS_FOLDER, OUTCOME_NAME, RESTORE
from job.runs.lease import read_lease

End = Literal["stopped", "looked"]  # stopped and saved; only looked at the run, as a launcher does
_MIN_FOLDS = 3  # of a cross-validation
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


def member_urls(url: str) -> tuple[str, ...]:
    """Returns the runs that `url` names: itself, or the runs of all folds of a cross-validation.

    Raises:
        UsageError: a fold of the cross-validation has not been trained to its end.
    """
    store = open_store(url)
    if store.stat("config.yaml") is not None:
        return (url,)
    folds = _fold_count(store)
    if folds is None:
        return (url,)
    runs = [open_store(f"{store.url}-fold-{fold}") for fold in range(folds)]
    statuses = [_fold_status(run) for run in runs]
    missing = [
        f"{fold_words((fold, folds))} {words}"
        for fold, words in enumerate(statuses)
        if words is not None
    ]
    if missing:
        raise UsageError(
            f"{store.url}: a cross-validation of {folds} folds, of which "
            f"{join_truncated(missing, 5)}; the same train command with --folds trains the rest"
        )
    return tuple(run.url for run in runs)


def _fold_count(store: ObjectStore) -> int | None:
    """Returns the number of folds of the cross-validation in `store`, None if there is none."""
    # Folds may be trained side by side, so the first one may have no config yet.
    for fold in range(_MIN_FOLDS):
        run = open_store(f"{store.url}-fold-{fold}")
        with contextlib.suppress(NotFound):
            where = f"{run.url}/config.yaml"
            return stored_config(read_yaml(run.get("config.yaml").decode(), where), where).folds
    return None


def _fold_status(run: ObjectStore) -> str | None:
    """Returns why the run of a fold cannot predict, None if it can."""
    if run.stat("config.yaml") is None:
        return "has not started"
    status = run_status(run)
    return None if status == "finished" else {"open": "is not finished"}.get(status, status)
