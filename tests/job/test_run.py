"""The run protocol on a folder, by lock and by lease; kills are real exits of real processes."""

import hashlib
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from flexunet.errors import ContentError, LockedError, StorageError, UsageError
from flexunet.storage import LocalStore, ObjectStore, open_store
from job.config import checked_run_name
from job.runs.checkpoints import Checkpoint, download_checkpoint, find_checkpoints
from job.runs.layout import CheckpointRef, checkpoint_prefix
from job.runs.lease import Lease, LeaseTiming, _bases_of, is_on_chain
from job.runs.run import Run
from job.runs.status import read_ends, run_status
from tests.job.processes import wait_until
from tests.job.rival import take_over

PROJECT = Path(__file__).resolve().parents[2]
QUICK = LeaseTiming(renew_s=0.05, expire_s=0.4)
PATIENT = LeaseTiming(renew_s=0.05, expire_s=30)  # where the owner lives, and may be starved
DIGEST = "d" * 64
IDENTITY = {"seed": 1, "model": {"num_layers": 8}}


@pytest.fixture(params=[False, True], ids=["lock", "lease"])
def by_lease(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def own_run(folder: Path, by_lease: bool = False, timing: LeaseTiming = QUICK) -> Run:
    run = Run.acquire(LocalStore(str(folder / "run")), timing=timing, by_lease=by_lease)
    run.check_identity(IDENTITY, DIGEST)
    return run


def members(folder: Path, text: str) -> dict[str, str]:
    """Returns two member files that hold `text`."""
    paths = {name: str(folder / name) for name in ("model.h5", "optimizer.h5")}
    for name, path in paths.items():
        Path(path).write_text(f"{name} {text}")
    return paths


def commit(run: Run, folder: Path, step: int) -> Checkpoint:
    return run.commit(step, step // 10, members(folder, str(step)), {"step": step})


def restored_step(run: Run, folder: Path) -> int | None:
    """Returns the step of what is restored, after a check that every file is of that step."""
    restored = run.restore(str(folder / "staging"))
    if restored is None:
        return None
    found, paths = restored
    for name, path in paths.items():
        assert Path(path).read_text() == f"{name} {found.step}"
    assert found.state == {"step": found.step}
    return found.step


def test_new_run_restores_nothing(tmp_path: Path, by_lease: bool) -> None:
    with own_run(tmp_path, by_lease) as run:
        assert run.attempt == 1
        assert run.restore(str(tmp_path / "staging")) is None


def test_commit_is_restored_by_the_next_attempt(tmp_path: Path, by_lease: bool) -> None:
    with own_run(tmp_path, by_lease) as run:
        commit(run, tmp_path, 10)
        made = commit(run, tmp_path, 20)
    assert made.prefix == "checkpoints/step-00000020/a1"
    with own_run(tmp_path, by_lease) as run:
        assert run.attempt == 2
        restored = run.restore(str(tmp_path / "staging"))
        assert restored is not None
        digest = hashlib.sha256(run.store.get(f"{made.prefix}/COMMIT.json")).hexdigest()
        assert restored[0] == made == Checkpoint(20, 1, 2, made.prefix, {"step": 20}, digest, ())
        assert commit(run, tmp_path, 30).prefix == "checkpoints/step-00000030/a2"
        assert restored_step(run, tmp_path) == 30


def test_a_run_stands_where_its_newest_attempt_left_it(tmp_path: Path, by_lease: bool) -> None:
    store = open_store(str(tmp_path / "run"))
    assert run_status(store) == "open"
    with Run.acquire(store, by_lease=by_lease) as run:
        run.note_end("looked")
    assert run_status(store) == "open"
    with Run.acquire(store, by_lease=by_lease) as run:
        run.note_end("stopped", epoch=1, step=3)
    with Run.acquire(store, by_lease=by_lease) as run:
        run.note_end("looked")
    assert run_status(store) == "stopped"
    assert read_ends(store)[2] == {"end": "stopped", "epoch": 1, "step": 3}
    with Run.acquire(store, by_lease=by_lease) as run:
        assert run_status(store) == "open"
        run.write_outcome("finished", 0)
    assert run_status(store) == "finished"


def test_state_keeps_every_float(tmp_path: Path) -> None:
    values = [0.1, 1e-300, float("inf"), -0.0, 2**60, 1 / 3]
    with own_run(tmp_path) as run:
        run.commit(1, 0, members(tmp_path, "1"), {"best": values, "nan": float("nan")})
    with own_run(tmp_path) as run:
        restored = run.restore(str(tmp_path / "staging"))
    assert restored is not None
    assert restored[0].state["best"] == values
    assert restored[0].state["nan"] != restored[0].state["nan"]


def test_same_step_is_committed_once(tmp_path: Path) -> None:
    with own_run(tmp_path) as run:
        first = commit(run, tmp_path, 10)
        assert commit(run, tmp_path, 10) is first


def test_commit_that_storage_refused_is_made_again(tmp_path: Path) -> None:
    with own_run(tmp_path) as run:
        paths = members(tmp_path, "10")
        with pytest.raises((StorageError, OSError), match="missing"):
            run.commit(10, 1, {**paths, "z": str(tmp_path / "missing")}, {"step": 10})
        blocker = tmp_path / "run" / checkpoint_prefix(10, 1) / "optimizer.h5"
        blocker.mkdir(parents=True)
        with pytest.raises(StorageError, match=r"optimizer\.h5"):
            run.commit(10, 1, paths, {"step": 10})
        blocker.rmdir()
        commit(run, tmp_path, 10)
    with own_run(tmp_path) as run:
        assert restored_step(run, tmp_path) == 10


def damage(path: Path, kind: str) -> None:
    data = path.read_bytes()
    if kind == "flip":
        path.write_bytes(data[:-2] + bytes([data[-2] ^ 1]) + data[-1:])
    elif kind == "truncate":
        path.write_bytes(data[:-1])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "huge":
        path.write_bytes(data + b" " * (1 << 20))
    else:
        path.unlink()


@pytest.mark.parametrize("kind", ["flip", "truncate", "empty", "huge", "delete"])
@pytest.mark.parametrize("name", ["model.h5", "optimizer.h5", "COMMIT.json"])
def test_damaged_commit_is_passed_over_with_one_warning(
    tmp_path: Path, name: str, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    with own_run(tmp_path) as run:
        commit(run, tmp_path, 10)
        commit(run, tmp_path, 20)
    damage(tmp_path / "run" / checkpoint_prefix(20, 1) / name, kind)
    with own_run(tmp_path) as run, caplog.at_level(logging.WARNING):
        assert restored_step(run, tmp_path) == 10
    if (name, kind) == ("COMMIT.json", "delete"):  # then it is no commit
        assert not caplog.messages
    else:
        assert len(caplog.messages) == 1
        assert f"{checkpoint_prefix(20, 1)}/{name}" in caplog.messages[0]
        assert f"resuming from {checkpoint_prefix(10, 1)} instead" in caplog.messages[0]


@pytest.mark.parametrize("checksum", ["crc32c", "sha256"])
def test_each_checksum_is_compared(tmp_path: Path, checksum: str) -> None:
    with own_run(tmp_path) as run:
        commit(run, tmp_path, 10)
    path = tmp_path / "run" / checkpoint_prefix(10, 1) / "COMMIT.json"
    record = json.loads(path.read_text())
    record["members"][1][checksum] = {"crc32c": 7, "sha256": "0" * 64}[checksum]
    path.write_text(json.dumps(record))
    expected = rf"optimizer\.h5 is damaged: its {checksum} differs from COMMIT\.json"
    with own_run(tmp_path) as run, pytest.raises(ContentError, match=expected):
        run.restore(str(tmp_path / "staging"))


def test_every_commit_damaged_is_an_error(tmp_path: Path) -> None:
    with own_run(tmp_path) as run:
        commit(run, tmp_path, 10)
    damage(tmp_path / "run" / checkpoint_prefix(10, 1) / "model.h5", "flip")
    with (
        own_run(tmp_path) as run,
        pytest.raises(ContentError, match=r"no undamaged checkpoint.*model\.h5"),
    ):
        run.restore(str(tmp_path / "staging"))


def test_member_name_that_leaves_the_folder_is_refused(tmp_path: Path) -> None:
    with own_run(tmp_path) as run:
        commit(run, tmp_path, 10)
    record = tmp_path / "run" / checkpoint_prefix(10, 1) / "COMMIT.json"
    record.write_text(record.read_text().replace('"model.h5"', '"m/../../x"'))
    with own_run(tmp_path) as run, pytest.raises(ContentError, match="file name"):
        run.restore(str(tmp_path / "staging"))


def test_fallback_becomes_the_base_of_the_attempt(tmp_path: Path) -> None:
    with own_run(tmp_path) as run:
        commit(run, tmp_path, 10)
        commit(run, tmp_path, 20)
    damaged = tmp_path / "run" / checkpoint_prefix(20, 1) / "model.h5"
    shutil.copy(damaged, tmp_path / "good")
    damage(damaged, "flip")
    with own_run(tmp_path) as run:
        assert restored_step(run, tmp_path) == 10
        commit(run, tmp_path, 15)
    shutil.copy(tmp_path / "good", damaged)
    # Step 20 of attempt 1 is whole again, but attempt 2 does not descend from it.
    places = [(p.attempt, p.step) for p in find_checkpoints(LocalStore(str(tmp_path / "run")))]
    assert places == [(1, 10), (2, 15)]


# Forks once per case `(folder, kill_at, after)`. The fork owns the run, commits step 20 and exits
# without cleaning up at operation `kill_at`, before (0) or after (1) it took place.
KILLED_COMMITS = """
import json, os, sys
from flexunet.storage import LocalStore
from job.runs.run import Run
class Killing(LocalStore):
    def _act(self, action, *args, **options):
        global count
        count += 1
        if count == kill_at and not after: os._exit(100)
        result = action(*args, **options)
        if count == kill_at: os._exit(100)
        return result
    def put(self, *args, **options): return self._act(super().put, *args, **options)
    def put_file(self, *args, **options): return self._act(super().put_file, *args, **options)
    def delete(self, *args, **options): return self._act(super().delete, *args, **options)
def commit(folder):
    run = Run.acquire(Killing(folder + "/run"))
    run.check_identity({"seed": 1, "model": {"num_layers": 8}}, "d" * 64)
    run.restore(folder + "/staging")
    paths = {name: folder + "/" + name for name in ("model.h5", "optimizer.h5")}
    for name, path in paths.items():
        with open(path, "w") as file: file.write(name + " 20")
    run.commit(20, 2, paths, {"step": 20})
    run.collect_garbage(1)
codes = []
for folder, kill_at, after in json.loads(sys.argv[1]):
    count = 0
    child = os.fork()
    if child == 0:
        commit(folder)
        os._exit(count)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(codes))
"""


def kill_commits(cases: list[tuple[str, int, int]]) -> list[int]:
    """Returns the exit code of each case: 100 when it was killed, else its operations."""
    command = [sys.executable, "-c", KILLED_COMMITS, json.dumps(cases)]
    codes: list[int] = json.loads(subprocess.check_output(command, cwd=PROJECT))
    return codes


def test_kill_at_every_operation_leaves_the_old_or_the_new_commit(tmp_path: Path) -> None:
    with own_run(tmp_path) as run:
        commit(run, tmp_path, 10)
    untouched = tmp_path / "untouched"
    shutil.copytree(tmp_path / "run", untouched / "run")
    # The lease, two members, COMMIT.json, then the three deletions of the old commit.
    assert kill_commits([(str(tmp_path), 0, 0)]) == [7]
    places = [(kill_at, after) for kill_at in range(1, 8) for after in (0, 1)]
    folders = [tmp_path / f"case-{kill_at}-{after}" for kill_at, after in places]
    for folder in folders:
        shutil.copytree(untouched, folder)
    cases = [(str(folder), *ref) for folder, ref in zip(folders, places, strict=True)]
    assert kill_commits(cases) == [100] * 14
    found = []
    for folder in folders:
        store = LocalStore(str(folder / "run"))
        for ref in find_checkpoints(store):  # one that is half deleted is no commit any more
            download_checkpoint(store, ref, str(folder / "staging"))
        with own_run(folder) as run:
            found.append(restored_step(run, folder))
            commit(run, folder, 30)
            run.collect_garbage(1)
        assert os.listdir(folder / "run" / "checkpoints") == ["step-00000030"]
    # The commit comes into being with the fourth operation.
    assert found == [10] * 7 + [20] * 7


RACER = """
import sys
import threading
from flexunet.errors import LockedError
from flexunet.storage import LocalStore
from job.runs.lease import LeaseTiming
from job.runs.run import Run
for line in sys.stdin:
    try:
        store = LocalStore(sys.argv[1] + "/" + line.strip())
        run = Run.acquire(store, by_lease=sys.argv[2] == "lease",
                          timing=LeaseTiming(renew_s=0.05, expire_s=30))
        print("won", run.attempt, flush=True)
        sys.stdin.readline()
        run.close()
    except LockedError as error:
        print("locked", flush=True)
        sys.stdin.readline()
"""


def start_racer(folder: Path, by_lease: bool) -> "subprocess.Popen[str]":
    kind = "lease" if by_lease else "lock"
    command = [sys.executable, "-c", RACER, str(folder), kind]
    return subprocess.Popen(
        command, cwd=PROJECT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def send(child: "subprocess.Popen[str]", line: str) -> None:
    assert child.stdin is not None
    child.stdin.write(f"{line}\n")
    child.stdin.flush()


def hear(child: "subprocess.Popen[str]") -> str:
    assert child.stdout is not None
    return child.stdout.readline().strip()


def end(*children: "subprocess.Popen[str]") -> None:
    for child in children:
        child.kill()
        child.communicate()


def test_one_of_two_racing_processes_wins(tmp_path: Path, by_lease: bool) -> None:
    racers = [start_racer(tmp_path, by_lease) for _ in range(2)]
    try:
        for i in range(20):
            for racer in racers:
                send(racer, f"run-{i // 2}")  # every run twice: a new one, and one given back
            answers = sorted(hear(racer) for racer in racers)
            assert answers == ["locked", f"won {i % 2 + 1}"]
            for racer in racers:
                send(racer, "release")
    finally:
        end(*racers)


def test_killed_owner_gives_the_run_up(tmp_path: Path, by_lease: bool) -> None:
    owner = start_racer(tmp_path, by_lease)
    try:
        send(owner, "run")
        assert hear(owner) == "won 1"
        start = time.monotonic()
        with pytest.raises(LockedError, match=f":{owner.pid}"):
            own_run(tmp_path, by_lease, PATIENT)
        assert time.monotonic() - start < PATIENT.expire_s / 2
        owner.send_signal(signal.SIGKILL)
        owner.wait()
        with own_run(tmp_path, by_lease) as run:
            assert run.attempt == 2
    finally:
        end(owner)


def snapshot(store: ObjectStore) -> dict[str, bytes]:
    """Returns every object but the lease, which its owner renews."""
    names = (stat.name for stat in store.list())
    return {name: store.get(name) for name in names if name != "lease.json"}


def test_newcomer_that_is_refused_writes_nothing(tmp_path: Path, by_lease: bool) -> None:
    with own_run(tmp_path, by_lease, PATIENT) as run:
        commit(run, tmp_path, 10)
        before = snapshot(run.store)
        with pytest.raises(LockedError, match="is owned by"):
            own_run(tmp_path, by_lease, PATIENT)
        assert snapshot(run.store) == before
        assert not run.lost
    assert not list(tmp_path.rglob(".flexunet-tmp-*"))


def test_forked_child_does_not_keep_the_lock(tmp_path: Path) -> None:
    code = """
import os, sys, time
from flexunet.storage import LocalStore
from job.runs.run import Run
run = Run.acquire(LocalStore(sys.argv[1] + "/run"))
child = os.fork()
if child == 0:
    os.write(1, b"forked\\n")  # what runs at a fork has run
    time.sleep(30)
    os._exit(0)
os.write(1, b"%d\\n" % child)  # in one piece, whatever the buffering
os._exit(9)
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, text=True) as process:
        child = int(next(line for line in (hear(process), hear(process)) if line != "forked"))
        try:
            process.wait()
            with own_run(tmp_path) as run:
                assert run.attempt == 2
        finally:
            os.kill(child, signal.SIGKILL)


def test_lost_lease_is_noticed_and_late_commit_never_picked(tmp_path: Path) -> None:
    late = Run.acquire(
        LocalStore(str(tmp_path / "run")), by_lease=True, timing=LeaseTiming(1e6, 1e6)
    )
    late.check_identity(IDENTITY, DIGEST)
    commit(late, tmp_path, 10)
    with own_run(tmp_path, by_lease=True) as run:  # it sees no renewal and takes over
        assert run.attempt == 2
        # The commit that was under way when the lease was lost still arrives.
        store = late.store
        for name in ("model.h5", "optimizer.h5", "COMMIT.json"):
            record = store.get(f"{checkpoint_prefix(10, 1)}/{name}")
            store.put(f"{checkpoint_prefix(20, 1)}/{name}", record.replace(b"10", b"20"))
        with pytest.raises(LockedError, match="has taken the run over"):
            commit(late, tmp_path, 30)
        assert late.lost
        with pytest.raises(LockedError, match="has taken the run over"):
            late.put_text("table.csv", "")
        with pytest.raises(LockedError, match="has taken the run over"):
            late.collect_garbage(1)
        assert restored_step(run, tmp_path) == 10
    late.close()
    with own_run(tmp_path, by_lease=True) as run:
        assert restored_step(run, tmp_path) == 10
        commit(run, tmp_path, 11)
        run.collect_garbage(5)
    # Late folders are gone, those on the chain are kept.
    assert sorted(os.listdir(tmp_path / "run" / "checkpoints")) == [
        "step-00000010", "step-00000011"
    ]  # fmt: skip


def test_a_commit_whose_answer_was_lost_is_left_to_the_next_owner(tmp_path: Path) -> None:
    late = Run.acquire(
        LocalStore(str(tmp_path / "run")), by_lease=True, timing=LeaseTiming(1e6, 1e6)
    )
    late.check_identity(IDENTITY, DIGEST)
    commit(late, tmp_path, 10)
    late._newest = None  # as where `check` failed after the commit was stored
    before = {stat.name: stat.generation for stat in late.store.list("checkpoints/")}
    assert commit(late, tmp_path, 10).step == 10  # the outbox repeats the call
    assert {stat.name: stat.generation for stat in late.store.list("checkpoints/")} == before
    late._newest = None
    with own_run(tmp_path, by_lease=True) as run:
        assert restored_step(run, tmp_path) == 10
        with pytest.raises(LockedError, match="has taken the run over"):
            commit(late, tmp_path, 10)
    late.close()
    with own_run(tmp_path, by_lease=True) as run:
        assert restored_step(run, tmp_path) == 10


def test_renewal_thread_notices_the_loss(tmp_path: Path) -> None:
    with own_run(tmp_path, by_lease=True) as run:
        take_over(run)


def test_own_renewal_whose_answer_was_lost_is_not_a_loss(tmp_path: Path) -> None:
    with own_run(tmp_path, by_lease=True) as run:
        store = LocalStore(str(tmp_path / "run"))
        store.put("lease.json", store.get("lease.json"))  # same owner, another generation
        time.sleep(0.2)
        commit(run, tmp_path, 10)
        assert not run.lost


def test_lock_removed_by_hand_is_noticed(tmp_path: Path) -> None:
    with own_run(tmp_path) as run:
        shutil.rmtree(tmp_path / "run")
        with pytest.raises(LockedError, match="was deleted"):
            commit(run, tmp_path, 10)


def test_server_without_preconditions_cannot_hold_runs(lax_bucket_url: str) -> None:
    with pytest.raises(StorageError, match="does not enforce preconditions"):
        Run.open(lax_bucket_url, "run")
    assert open_store(lax_bucket_url).list() == []


def test_garbage_collection_keeps_the_last_and_the_best(tmp_path: Path) -> None:
    with own_run(tmp_path) as run:
        best, *_ = [commit(run, tmp_path, step) for step in (10, 20, 30, 40)]
        (tmp_path / "run" / checkpoint_prefix(35, 1)).mkdir(parents=True)
        (tmp_path / "run" / checkpoint_prefix(35, 1) / "model.h5").write_text("unfinished")
        (tmp_path / "run" / "checkpoints" / "note.txt").write_text("not ours")
        run.collect_garbage(2, keep={best.prefix})
    assert sorted(os.listdir(tmp_path / "run" / "checkpoints")) == [
        "note.txt", "step-00000010", "step-00000030", "step-00000040",
    ]  # fmt: skip
    with own_run(tmp_path) as run:
        run.collect_garbage(0)  # nothing is restored yet, so nothing is known to be good
        assert restored_step(run, tmp_path) == 40
        run.collect_garbage(0)
    assert sorted(os.listdir(tmp_path / "run" / "checkpoints")) == ["note.txt", "step-00000040"]


def test_garbage_collection_keeps_the_best_of_every_kept_commit(tmp_path: Path) -> None:
    """After a damaged commit, the one before it is restored, with the best that it names."""

    def committed(run: Run, step: int, best: int) -> None:
        run.commit(step, 0, members(tmp_path, str(step)), {}, keep=[checkpoint_prefix(best, 1)])

    with own_run(tmp_path) as run:
        for step, best in ((10, 10), (20, 10), (30, 10), (40, 40)):
            committed(run, step, best)
            run.collect_garbage(2)
        assert [ref.step for ref in find_checkpoints(run.store)] == [10, 30, 40]
    (tmp_path / "run" / checkpoint_prefix(40, 1) / "model.h5").write_text("damaged")
    with own_run(tmp_path) as run:
        restored = run.restore(str(tmp_path / "staging"))
        assert restored is not None
        assert restored[0].keep == (checkpoint_prefix(10, 1),)
        # What a commit needs is read from storage by a process that has not written it.
        for step in (50, 60):
            run.commit(step, 0, members(tmp_path, str(step)), {}, keep=[])
            run.collect_garbage(2)
            kept = [ref.step for ref in find_checkpoints(run.store)]
            assert kept == {50: [10, 30, 50], 60: [50, 60]}[step]


def test_garbage_collection_spares_what_a_commit_of_version_0_1_0_may_need(tmp_path: Path) -> None:
    with own_run(tmp_path) as run:
        for step in (10, 20, 30):
            commit(run, tmp_path, step)
    for step in (10, 20, 30):
        path = tmp_path / "run" / checkpoint_prefix(step, 1) / "COMMIT.json"
        record = json.loads(path.read_text())
        del record["state"]["keep"]
        path.write_text(json.dumps(record))
    with own_run(tmp_path) as run:
        assert restored_step(run, tmp_path) == 30
        expected = {40: [10, 20, 30, 40], 50: [40, 50]}
        for step, kept in expected.items():
            commit(run, tmp_path, step)
            run.collect_garbage(2)
            assert [ref.step for ref in find_checkpoints(run.store)] == kept


def test_other_identity_is_named(tmp_path: Path) -> None:
    with own_run(tmp_path) as run:
        run.check_identity({"seed": 1, "model": {"num_layers": 8}}, DIGEST)
        expected = "--model.num-layers was 8, now 6; --seed was 1, now not set; give the old values"
        with pytest.raises(UsageError, match=expected):
            run.check_identity({"model": {"num_layers": 6}}, DIGEST)
        with pytest.raises(UsageError, match="delete the folder: it has no checkpoint yet"):
            run.check_identity({"model": {"num_layers": 6}}, DIGEST)
        with pytest.raises(UsageError, match=r'dataset_digest was "d+", now "e"'):
            run.check_identity(IDENTITY, "e")


def test_a_run_below_a_file_is_a_mistake(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    with (
        pytest.raises(UsageError, match="runs is a file, not a folder; give a folder"),
        Run.acquire(LocalStore(str(tmp_path / "runs" / "first"))),
    ):
        pass


def test_tuples_of_the_identity_are_lists_in_storage(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path / "run"))
    for _ in range(2):
        with Run.acquire(store) as run:
            run.check_identity({"sizes": (1, 2)}, DIGEST)


def test_outcome_is_read_by_the_next_attempt(tmp_path: Path) -> None:
    with own_run(tmp_path) as run:
        assert run.read_outcome() is None
        run.write_outcome("diverged", 7, epoch=3)
    with own_run(tmp_path) as run:
        expected = {"status": "diverged", "exit_code": 7, "attempt": 1, "epoch": 3}
        assert run.read_outcome() == expected
        run.clear_outcome()
        assert run.read_outcome() is None


@pytest.mark.parametrize("name", ["", "A", "1a", "a-", "-a", "a_b", "a/b", "..", "a" * 48, "a\n"])
def test_run_name_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not allowed; use 1 to 47"):
        Run.open(str(tmp_path), name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a", "a1", "a-b", "a" * 47])
def test_run_name_is_kept(name: str) -> None:
    assert checked_run_name(name) == name


def test_next_process_of_a_launch_does_not_wait(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path / "run"))
    never = LeaseTiming(renew_s=1e3, expire_s=1e3)
    dead = Run.acquire(store, by_lease=True, timing=never, launch="one")
    with Run.acquire(store, by_lease=True, timing=never, launch="one") as run:
        assert run.attempt == 2
        with pytest.raises(LockedError, match="has taken the run over"):
            dead.write_outcome("finished", 0)
    assert run.read_outcome() is None


@pytest.mark.parametrize(("before", "now"), [(None, None), ("one", None), (None, "one")])
def test_another_launch_waits(before: str | None, now: str | None, tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path / "run"))
    Run.acquire(store, by_lease=True, timing=LeaseTiming(1e3, 1e3), launch=before)
    start = time.monotonic()
    with Run.acquire(store, by_lease=True, timing=QUICK, launch=now) as run:
        assert (run.attempt, time.monotonic() - start >= QUICK.expire_s) == (2, True)


def test_lease_from_before_launches_had_names_is_read(tmp_path: Path) -> None:
    with own_run(tmp_path, by_lease=True):
        pass
    path = tmp_path / "run" / "lease.json"
    lease = json.loads(path.read_text())
    del lease["launch"]
    path.write_text(json.dumps(lease))
    with own_run(tmp_path, by_lease=True) as run:
        assert run.attempt == 2


def test_table_of_an_owner_that_was_paused_is_refused(tmp_path: Path) -> None:
    """It asks for its lease itself where the renewing thread has not come to it yet."""
    timing = LeaseTiming(renew_s=1e3, expire_s=0.2)
    late = Run.acquire(LocalStore(str(tmp_path / "run")), by_lease=True, timing=timing)
    late.put_text("table.csv", "old")
    with own_run(tmp_path, by_lease=True) as run:
        run.put_text("table.csv", "new")
        assert not late.lost  # nobody has told it
        with pytest.raises(LockedError, match="has taken the run over"):
            late.put_text("table.csv", "old")
        assert run.store.get("table.csv") == b"new"


def test_damaged_lease_is_named(tmp_path: Path) -> None:
    with own_run(tmp_path):
        pass
    (tmp_path / "run" / "lease.json").write_text('{"attempt": 0}')
    with pytest.raises(ContentError, match=r"lease\.json: attempt"):
        own_run(tmp_path)


@pytest.mark.parametrize("damage", [b'{"attempt":', b"", b"\xff\xfe", b"[]"])
def test_owner_writes_a_lease_that_others_damaged_again(
    damage: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = LocalStore(str(tmp_path / "run"))
    with own_run(tmp_path, by_lease=True, timing=PATIENT) as run:
        store.put("lease.json", damage)
        wait_until(lambda: b'"beat"' in store.get("lease.json"), [])
        assert "this process owns the run and writes the lease again" in caplog.text
        assert commit(run, tmp_path, 10).step == 10
    with own_run(tmp_path, by_lease=True) as run:
        assert restored_step(run, tmp_path) == 10


def test_owner_of_a_damaged_lease_that_may_have_expired_has_lost_the_run(tmp_path: Path) -> None:
    """Another process may have taken the run over before its lease was damaged."""
    timing = LeaseTiming(renew_s=1e3, expire_s=0.1)
    run = Run.acquire(LocalStore(str(tmp_path / "run")), by_lease=True, timing=timing)
    LocalStore(str(tmp_path / "run")).put("lease.json", b"{")
    time.sleep(0.2)
    with pytest.raises(LockedError, match=r"the lease is damaged and may have expired"):
        run.put_text("table.csv", "")
    assert run.lost


def test_owner_whose_lease_was_deleted_has_lost_the_run(tmp_path: Path) -> None:
    with own_run(tmp_path, by_lease=True) as run:
        (tmp_path / "run" / "lease.json").unlink()
        wait_until(lambda: run.lost, [])
        with pytest.raises(LockedError, match=r"lease\.json was deleted"):
            run.put_text("table.csv", "")


def test_owner_whose_renewals_end_by_a_bug_has_lost_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[threading.ExceptHookArgs] = []
    monkeypatch.setattr(threading, "excepthook", seen.append)
    with own_run(tmp_path, by_lease=True) as run, monkeypatch.context() as broken:
        broken.setattr("job.runs.ownership.put_lease", lambda *_: 1 // 0)
        wait_until(lambda: run.lost, [])
    assert [each.exc_type for each in seen] == [ZeroDivisionError]


@pytest.mark.parametrize("commits_every", [1, 3, 1000])
def test_lease_of_many_attempts_stays_small(
    commits_every: int, tmp_path: Path, by_lease: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Old attempts whose commits are gone leave nothing in it, and all that count are found."""
    monkeypatch.setattr("job.runs.lease._NUM_SHOWN", 4)
    sizes = []
    for attempt in range(1, 16):
        with own_run(tmp_path, by_lease) as run:
            newest = restored_step(run, tmp_path)
            assert newest == (attempt - 1) // commits_every * commits_every or newest is None
            if attempt % commits_every == 0:
                run.commit(
                    attempt, 0, members(tmp_path, str(attempt)), {"step": attempt},
                    keep=[checkpoint_prefix(commits_every, commits_every)],
                )  # fmt: skip
                run.collect_garbage(2)
        sizes.append((tmp_path / "run" / "lease.json").stat().st_size)
    assert max(sizes) < 600
    assert len(json.loads((tmp_path / "run" / "lease.json").read_text())["bases"]) <= 4 + 2
    steps = [ref.step for ref in find_checkpoints(LocalStore(str(tmp_path / "run")))]
    assert steps == sorted({commits_every, 15 - commits_every, 15} & set(range(commits_every, 16)))


@pytest.mark.parametrize("seed", range(60))
def test_a_bounded_lease_counts_the_commits_that_a_whole_one_does(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Histories of commits, falls back to older ones, late commits, and garbage collected."""
    monkeypatch.setattr("job.runs.lease._NUM_SHOWN", 3)
    draw = random.Random(seed)
    lease = whole = Lease(attempt=1, owner="x", bases={1: None})
    places: list[CheckpointRef] = []
    step = 0
    for attempt in range(2, 40):
        for _ in range(draw.randrange(3)):
            step += draw.randrange(1, 4)
            places.append(CheckpointRef(attempt - 1, step, checkpoint_prefix(step, attempt - 1)))
        if attempt > 3 and draw.random() < 0.3:  # of one that had lost the run long ago
            late = draw.randrange(1, attempt - 1)
            places.append(CheckpointRef(late, step + 50, checkpoint_prefix(step + 50, late)))
        candidates = sorted(p for p in places if is_on_chain(whole, p))
        assert candidates == sorted(p for p in places if is_on_chain(lease, p))
        base = candidates[-1].prefix if candidates else None
        whole = Lease(attempt=attempt, owner="x", bases={**whole.bases, attempt: base})
        bases = _bases_of(attempt, lease, candidates)
        if len(candidates) > 1 and draw.random() < 0.3:  # the newest one is damaged
            older = candidates[draw.randrange(len(candidates) - 1)].prefix
            bases[attempt] = older
            whole = Lease(attempt=attempt, owner="x", bases={**whole.bases, attempt: older})
            step = int(older[17:25])
        lease = Lease(attempt=attempt, owner="x", bases=bases)
        assert len(bases) <= 3 + len({ref.attempt for ref in candidates})
        kept = sorted(p for p in places if is_on_chain(whole, p))
        spared = {*kept[-2:], *draw.sample(kept, min(1, len(kept)))}
        places = [p for p in places if p in spared or draw.random() < 0.2]


def test_overgrown_lease_of_version_0_1_0_is_opened(tmp_path: Path) -> None:
    num_attempts = 30_000
    bases = {n: f"checkpoints/step-{n:08d}/a{n - 1}" for n in range(2, num_attempts + 1)}
    lease = Lease(attempt=num_attempts, owner="gone", released=True, bases={1: None, **bases})
    store = LocalStore(str(tmp_path / "run"))
    store.put("lease.json", lease.model_dump_json().encode())
    with own_run(tmp_path, by_lease=True) as run:
        assert run.attempt == num_attempts + 1
        commit(run, tmp_path, 10)
    assert len(store.get("lease.json")) < 10_000


def test_lease_says_what_the_newest_attempts_rested_on(tmp_path: Path) -> None:
    """The report shows it, also of attempts whose commits are gone."""
    expected: dict[int, str | None] = {}
    newest = None
    for attempt in range(1, 8):
        with own_run(tmp_path) as run:
            assert restored_step(run, tmp_path) == (attempt - 1 or None)
            expected[attempt] = newest
            newest = commit(run, tmp_path, attempt).prefix
            run.collect_garbage(1)
    bases = json.loads((tmp_path / "run" / "lease.json").read_text())["bases"]
    assert {int(n): base for n, base in bases.items()} == expected


def test_run_knows_no_tensorflow() -> None:
    code = "import sys, job.runs.run; print('tensorflow' in sys.modules)"
    command: list[Any] = [sys.executable, "-c", code]
    assert subprocess.check_output(command, cwd=PROJECT, text=True) == "False\n"
