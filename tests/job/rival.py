"""Another process that takes a run over while its owner lives."""

import json
import time

from flexunet.storage import PreconditionFailed
from job.runs.layout import LEASE_NAME
from job.runs.run import Run


def take_over(run: Run) -> None:
    """Stores another owner's lease, and waits until `run`, which renews its own, is lost."""
    while True:
        stat = run.store.stat(LEASE_NAME)
        assert stat is not None
        lease = json.loads(run.store.get(LEASE_NAME)) | {"owner": "other", "attempt": 2}
        try:
            run.store.put(LEASE_NAME, json.dumps(lease).encode(), if_generation=stat.generation)
            break
        except PreconditionFailed:  # the owner has just renewed it
            continue
    deadline = time.monotonic() + 60
    while not run.lost:
        assert time.monotonic() < deadline
        time.sleep(0.01)
