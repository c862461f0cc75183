"""Files are written whole, also where folders cannot be opened; leftovers are those of processes that have ended."""

import os

import pytest

from diffsynth.core import files, locks


def test_windows_where_no_folder_can_be_opened_gets_its_files_synced(tmp_path, monkeypatch):
    opened, system_open = [], os.open

    def as_windows_does(path, flags):
        if os.path.isdir(path):
            raise PermissionError(path)
        opened.append(flags & os.O_ACCMODE)
        return system_open(path, flags)

    monkeypatch.setattr(files, "ON_WINDOWS", True)
    monkeypatch.setattr(files.os, "open", as_windows_does)
    files.write_text(tmp_path / "a.txt", "whole")
    with files.replacing_folder(tmp_path / "folder") as partial:
        (partial / "b.txt").write_text("whole")
    assert (tmp_path / "a.txt").read_text() == (tmp_path / "folder" / "b.txt").read_text() == "whole"
    assert opened == [os.O_RDWR] * 2  # it does not sync what is open for reading only


HERE, PARENT = locks.machine(), os.getppid()


@pytest.mark.parametrize(
    "name, age, stays",
    [
        (f".partial-{HERE}-{PARENT}-a", 0, True),
        (f".partial-{HERE}-{PARENT}-a", 10**9, False),  # seconds; that process had not begun, so this is another's
        (f".partial-{HERE}-{2**22 + 1}-a", 0, False),  # Linux has no pid as high
        (f".partial-{HERE}-{os.getpid()}-a", 0, False),
        (f".partial-{PARENT}-a", 0, False),  # as an older version named it
        (f".partial-{'0' * 8}-{PARENT}-a", 0, True),
        (f"locked/.partial-{PARENT}-a", 0, True),
    ],
    ids=["living", "later", "ended", "own", "older", "of another machine", "in a locked folder"],
)
@pytest.mark.parametrize("make", ["touch", "mkdir"])
def test_leftovers_are_those_of_processes_that_have_ended(make, name, age, stays, tmp_path):
    partial = tmp_path / name
    partial.parent.mkdir(exist_ok=True)
    (tmp_path / "locked").mkdir(exist_ok=True)
    (tmp_path / "locked" / locks.LOCK).touch()
    getattr(partial, make)()
    os.utime(partial, (partial.stat().st_mtime - age,) * 2)
    files.remove_leftovers(tmp_path)
    assert partial.exists() == stays


def test_in_a_folder_that_this_process_has_locked_leftovers_of_other_machines_are_removed(tmp_path):
    partial = tmp_path / "below" / f".partial-{'0' * 8}-{PARENT}-a"
    partial.mkdir(parents=True)
    with locks.locked(tmp_path):
        files.remove_leftovers(tmp_path)
    assert not partial.exists()


def test_a_temporary_file_is_no_leftover_while_it_is_written(tmp_path, monkeypatch):
    with files.replacing(tmp_path / "a.txt") as partial:
        monkeypatch.setattr(files.os, "getpid", lambda: PARENT)  # another process tidies the folder
        files.remove_leftovers(tmp_path)
        monkeypatch.undo()
        partial.write_text("whole")
    assert (tmp_path / "a.txt").read_text() == "whole"
