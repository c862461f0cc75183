"""Who owns a folder: one living process at a time, and nobody for longer than it lives."""

import json
import os
import socket
import threading
import time
from pathlib import Path

import kills
import pytest

from diffsynth.config.command_line import check_rank
from diffsynth.config.run_folder import RankZeroFilter
from diffsynth.core.process import locks
from diffsynth.core.process.locks import FolderInUse


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Let what takes seconds take hundredths, and unlock all at the end."""
    for name, seconds in {"BEAT": 0.02, "LEASE": 0.3, "POLL": 0.02, "SETTLE": 0.1}.items():
        monkeypatch.setattr(locks, name, seconds)
    yield
    locks.release_all()


def write_lock(folder: Path, age: float = 0, **owner) -> Path:
    """Leave a lock as a process does that can unlock it no more; by default one of another machine, with our pid."""
    away = {"host": "elsewhere", "machine": "0" * 8, "pid": os.getpid(), "started": time.time(), "job": None}
    folder.mkdir(exist_ok=True)
    path = folder / locks.LOCK
    path.write_text(json.dumps(away | owner).ljust(locks.RECORD_BYTES))
    os.utime(path, (time.time() - age,) * 2)
    return path


def owner_of(folder: Path) -> int:
    return json.loads((folder / locks.LOCK).read_text())["pid"]


def test_a_folder_of_a_living_process_is_refused_by_its_host_and_pid(tmp_path):
    with kills.owner(tmp_path / "a") as process, pytest.raises(FolderInUse) as refused:
        locks.hold(tmp_path / "a")
    said = str(refused.value)
    owner = f"process {process.pid} on {socket.gethostname()}, running since "
    assert said.startswith(f"{tmp_path / 'a'} is in use by {owner}")
    assert said.endswith("; wait until it ends, stop it there, or choose another folder.") and "\n" not in said


FORK = "import os, time\nif hasattr(os, 'fork') and os.fork() == 0: time.sleep(3), os._exit(0)"


@pytest.mark.parametrize("then", ["", FORK], ids=["alone", "with a forked worker that outlives it"])
def test_a_killed_owner_has_nothing(then, tmp_path):
    with kills.owner(tmp_path, then) as process:
        process.kill()
        process.wait()
        began = time.monotonic()
        locks.hold(tmp_path)
        assert owner_of(tmp_path) == os.getpid() and time.monotonic() - began < locks.SETTLE


def test_an_unlocked_folder_keeps_no_trace_of_the_lock(tmp_path):
    with locks.locked(tmp_path / "empty"), locks.locked(tmp_path / "used"):
        (tmp_path / "used" / "file").touch()
        with locks.locked(tmp_path / "used"):  # again in the same process
            pass
        assert locks.is_held(tmp_path / "used" / "below") and not locks.is_held(tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["used", "used/file"]


def test_only_the_first_process_of_a_launch_locks(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with kills.owner(tmp_path):
        locks.hold(tmp_path)
    assert not locks.is_held(tmp_path)


def test_a_rank_that_is_set_to_nothing_is_the_first(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "")
    check_rank()
    locks.hold(tmp_path)
    assert locks.is_held(tmp_path) and RankZeroFilter().filter(None)


# Where the operating system's lock says nothing -----------------------------------------------------------------------


@pytest.mark.parametrize("lock", [True, None], ids=["locks of one machine", "no locks"])
def test_a_lock_of_another_machine_holds_while_it_is_renewed(lock, tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "_lock", lambda descriptor: lock)
    path, ended = write_lock(tmp_path), threading.Event()

    def renew():
        while not ended.wait(0.02):
            os.utime(path)

    thread = threading.Thread(target=renew)
    thread.start()
    with pytest.raises(FolderInUse, match=f"in use by process {os.getpid()} on elsewhere"):
        locks.hold(tmp_path)
    ended.set()
    thread.join()
    locks.hold(tmp_path)  # it is renewed no more
    assert json.loads(path.read_text())["host"] == socket.gethostname()


@pytest.mark.parametrize("lock", [True, None], ids=["locks of one machine", "no locks"])
def test_a_lock_of_another_machine_that_is_old_is_taken_without_waiting(lock, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(locks, "_lock", lambda descriptor: lock)
    write_lock(tmp_path, age=3600)
    locks.hold(tmp_path)
    assert owner_of(tmp_path) == os.getpid() and not caplog.records


def test_a_slurm_job_that_is_queued_again_goes_on_at_once_on_another_machine(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(locks, "LEASE", 60)
    write_lock(tmp_path, job=["7", "0"])
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    locks.hold(tmp_path)
    assert locks.is_held(tmp_path) and not caplog.records


def test_without_locks_a_process_of_this_machine_is_looked_up(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "_lock", lambda descriptor: None)
    parent = os.getppid()
    here = {"machine": locks.machine(), "host": socket.gethostname(), "pid": parent}
    write_lock(tmp_path, age=3600, **here, started=locks.started(parent))
    with pytest.raises(FolderInUse, match=f"in use by process {parent} on"):
        locks.hold(tmp_path)
    write_lock(tmp_path, **here, started=locks.started(parent) - 3600)  # the pid is another process's now
    locks.hold(tmp_path)
    assert owner_of(tmp_path) == os.getpid()


def test_of_two_processes_that_take_over_one_lock_the_last_has_it(tmp_path, monkeypatch):
    write_lock(tmp_path, age=3600)
    monkeypatch.setattr(locks.time, "sleep", lambda seconds: write_lock(tmp_path))
    with pytest.raises(FolderInUse, match="on elsewhere"):
        locks.hold(tmp_path)


def test_a_lock_whose_owner_wrote_nothing_is_taken_over(tmp_path):
    (tmp_path / locks.LOCK).touch()
    locks.hold(tmp_path)
    assert owner_of(tmp_path) == os.getpid()


@pytest.mark.parametrize("text", ["5", '{"machine": "zzzz"}', "[" * 512, "\x00"])
def test_a_file_that_is_no_lock_of_ours_is_taken_over(text, tmp_path):
    (tmp_path / locks.LOCK).write_text(text)
    locks.hold(tmp_path)
    assert owner_of(tmp_path) == os.getpid()


@pytest.mark.parametrize("kind", ["symlink", "hard link", "dangling", "loop", "device", "fifo", "folder"])
def test_a_lock_through_which_something_else_would_be_written_is_refused(kind, tmp_path):
    (notes := tmp_path / "notes.txt").write_text("mine")
    (folder := tmp_path / "a").mkdir()
    path = folder / locks.LOCK
    if not hasattr(os, "mkfifo") and kind != "folder":
        pytest.skip("links need rights on Windows")
    make = {"hard link": lambda: path.hardlink_to(notes), "fifo": lambda: os.mkfifo(path), "folder": path.mkdir}
    targets = {"symlink": notes, "dangling": tmp_path / "absent", "loop": path, "device": os.devnull}
    make.get(kind, lambda: path.symlink_to(targets[kind]))()
    with pytest.raises(ValueError, match=r"in-use is a link, a folder or a device; .*: delete it\.$"):
        locks.hold(folder)
    assert notes.read_text() == "mine" and not (tmp_path / "absent").exists()


def test_a_folder_that_its_last_owner_is_just_deleting_is_made_again(tmp_path, monkeypatch):
    folder, system_open = tmp_path / "a", os.open

    def open_after_its_deletion(path, *arguments):
        monkeypatch.setattr(locks.os, "open", system_open)
        folder.rmdir()
        return system_open(path, *arguments)

    monkeypatch.setattr(locks.os, "open", open_after_its_deletion)
    locks.hold(folder)
    assert owner_of(folder) == os.getpid()


def test_a_lock_that_is_deleted_while_it_is_looked_at_is_gone(tmp_path, monkeypatch):
    locks.hold(tmp_path)
    monkeypatch.setattr(Path, "exists", lambda path: True)  # it was there a moment ago
    (tmp_path / locks.LOCK).unlink()
    locks.release(tmp_path)


def test_a_process_that_may_not_be_asked_counts_as_alive(tmp_path, monkeypatch):
    def refuse(pid):
        raise locks.psutil.AccessDenied(pid)

    monkeypatch.setattr(locks, "_lock", lambda descriptor: None)
    write_lock(tmp_path, machine=locks.machine())
    monkeypatch.setattr(locks.psutil, "Process", refuse)
    with pytest.raises(FolderInUse):
        locks.hold(tmp_path)


def test_machines_of_one_name_differ_also_where_there_is_no_linux(monkeypatch):
    monkeypatch.setattr(locks, "Path", lambda path: Path("/no/such/file"))
    monkeypatch.setattr(locks.uuid, "getnode", iter([1, 2]).__next__)
    assert locks.machine.__wrapped__() != locks.machine.__wrapped__()


def test_a_lock_is_renewed(tmp_path):
    locks.hold(tmp_path)
    path = tmp_path / locks.LOCK
    os.utime(path, (0, 0))
    until = time.monotonic() + 10
    while path.stat().st_mtime == 0 and time.monotonic() < until:
        time.sleep(0.01)
    assert time.time() - path.stat().st_mtime < 20


def test_a_lock_that_cannot_be_read_for_a_moment_is_renewed_all_the_same(tmp_path, monkeypatch):
    locks.hold(tmp_path)
    seen, read = [], locks._read

    def unreadable_once(descriptor):
        seen.append(descriptor)
        return None if len(seen) == 1 else read(descriptor)

    monkeypatch.setattr(locks, "_read", unreadable_once)
    until = time.monotonic() + 10
    while len(seen) < 3 and time.monotonic() < until:
        time.sleep(0.01)
    assert len(seen) >= 3 and locks.is_held(tmp_path)


def test_an_owner_that_stood_still_for_too_long_says_so_and_leaves_the_lock_to_the_next(tmp_path, caplog):
    locks.hold(tmp_path)
    path = write_lock(tmp_path)
    until = time.monotonic() + 10
    while not caplog.records and time.monotonic() < until:
        time.sleep(0.01)
    said = f"{tmp_path} is in use by process {os.getpid()} on elsewhere"
    assert said in caplog.text and not locks.is_held(tmp_path)
    with pytest.raises(FolderInUse, match=said):
        locks.require_held()
    locks.release(tmp_path)
    assert path.exists()
