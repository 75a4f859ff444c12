"""What a killed process leaves on its machine, and who removes it."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from flexunet.errors import FlexUNetError, StorageError
from job.training.staging import kept_if_unstored, staging_folder

# Holds a staging folder until it is killed.
_HOLD = """
import sys, time
from job.training.staging import staging_folder
with staging_folder(sys.argv[1]) as folder:
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
        with staging_folder("gs://b/run"):
            assert os.path.exists(left)  # it is alive
        process.kill()
    with staging_folder("gs://b/other"):
        assert os.path.exists(left)
    with staging_folder("gs://b/run") as folder:
        assert os.listdir(tmp_path) == [os.path.basename(folder)]
    assert os.listdir(tmp_path) == []


def test_a_checkpoint_that_could_not_be_stored_is_kept(tmp_path: Path) -> None:
    with pytest.raises(StorageError), staging_folder("gs://b/run") as folder:
        raise StorageError("storage is full")
    with staging_folder("gs://b/run"):
        assert os.path.exists(folder)


@pytest.mark.parametrize("error", [MemoryError("of the device"), FlexUNetError("a peer is gone")])
def test_a_checkpoint_is_kept_when_another_error_comes_beside_an_outage(
    error: Exception, tmp_path: Path
) -> None:
    with (
        pytest.raises(StorageError, match=r"(MemoryError|a peer).*; the checkpoint .* is kept on"),
        staging_folder("gs://b/run") as folder,
        kept_if_unstored([lambda: {"model.weights.h5": f"{folder}/checkpoint-1/model.weights.h5"}]),
    ):
        raise error
    assert os.path.exists(folder)


def test_nothing_is_kept_where_all_is_stored_or_an_interrupt_came(tmp_path: Path) -> None:
    for error, pending in ((MemoryError, []), (KeyboardInterrupt, [lambda: {"a": "b/c"}])):
        with (
            pytest.raises(error),
            staging_folder("gs://b/run") as folder,
            kept_if_unstored(pending),
        ):
            raise error
        assert not os.path.exists(folder)
