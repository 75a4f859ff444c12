"""What a killed process leaves on its machine, and who removes it."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from data_prep.errors import StorageError
from job.record import _staging

# Holds a staging folder until it is killed.
_HOLD = """
import sys, time
from job.record import _staging
with _staging(sys.argv[1]) as folder:
    print(folder, flush=True)
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))


def test_the_next_process_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _HOLD, "gs://b/run"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        left = process.stdout.readline().strip()
        with _staging("gs://b/run"):
            assert os.path.exists(left)  # it is alive
        process.kill()
    with _staging("gs://b/other"):
        assert os.path.exists(left)
    with _staging("gs://b/run") as folder:
        assert os.listdir(tmp_path) == [os.path.basename(folder)]
    assert os.listdir(tmp_path) == []


def test_a_checkpoint_that_could_not_be_stored_is_kept(tmp_path: Path) -> None:
    with pytest.raises(StorageError), _staging("gs://b/run") as folder:
        raise StorageError("storage is full")
    with _staging("gs://b/run"):
        assert os.path.exists(folder)
