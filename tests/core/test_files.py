"""Files are written whole, also where folders cannot be opened or synced; leftovers are those of ended processes."""

import errno
import json
import os
import stat

import pytest

from diffsynth.config import run_folder
from diffsynth.core import files
from diffsynth.core.data.cache.mapped import MappedTensors
from diffsynth.core.json_lines import JsonLines
from diffsynth.core.json_text import read_json, read_lines, to_json
from diffsynth.core.loader import load_state_dict, read_shapes
from diffsynth.core.loader.foreign import read_object
from diffsynth.core.process import locks
from diffsynth.report import read_config, read_log
from diffsynth.training import checkpoint

READERS = {
    "a.json": [read_json, read_lines, files.digest_of, read_object, checkpoint._read_index],
    "a.jsonl": [lambda path: files.append_text(path, "line")],
    "a.safetensors": [read_shapes, load_state_dict, MappedTensors],
    "resolved.yaml": [lambda path: read_config(path.parent)],
    "train.log": [lambda path: read_log(path.parent)],
    "config.yaml": [lambda path: run_folder._saved_config(path.parent)],
}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no pipes in folders")
@pytest.mark.parametrize("name, use", [(name, use) for name, uses in READERS.items() for use in uses])
def test_a_pipe_is_not_waited_for(name, use, tmp_path, monkeypatch):
    os.mkfifo(path := tmp_path / name)
    for opened in ("builtins.open", "io.open", "diffsynth.core.data.cache.mapped.safe_open"):
        monkeypatch.setattr(opened, lambda *_, **__: pytest.fail("waits for someone who writes to the pipe"))
    with pytest.raises(ValueError, match=f"{name}.* is a pipe or a device; expected a file"):
        use(path)


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


def test_a_folder_that_is_replaced_is_synced_with_all_that_is_below(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(files, "_sync", lambda path: synced.append(path.name))
    with files.replacing_folder(tmp_path / "a") as partial:
        (partial / "b" / "c").mkdir(parents=True)
        (partial / "b" / "c" / "d.txt").touch()
    assert {"b", "c", "d.txt"} <= set(synced)


def test_a_folder_that_cannot_be_replaced_stays_as_it_was(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "old.txt").touch()
    replace = os.replace

    def refuse(path, target):
        if (path / "new.txt").exists():
            raise PermissionError(errno.EACCES, "in use", str(target))
        replace(path, target)

    monkeypatch.setattr(files.Path, "replace", refuse)
    with pytest.raises(PermissionError), files.replacing_folder(tmp_path / "a") as partial:
        (partial / "new.txt").touch()
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["a", "a/old.txt"]


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
        (".partial-notes.txt", 10**9, True),
    ],
    ids=["living", "later", "ended", "own", "older", "of another machine", "in a locked folder", "named by another"],
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


@pytest.mark.skipif(files.ON_WINDOWS, reason="links need rights on Windows")
@pytest.mark.parametrize("pid, stays", [(2**22 + 1, False), (PARENT, True)], ids=["ended", "living"])
@pytest.mark.parametrize("target", ["kept", "absent"])
def test_a_leftover_link_is_deleted_and_what_it_leads_to_stays(target, pid, stays, tmp_path):
    (tmp_path / "kept").mkdir()
    (link := tmp_path / f".partial-{HERE}-{pid}-vae").symlink_to(target)
    files.remove_leftovers(tmp_path)
    assert link.is_symlink() == stays and (tmp_path / "kept").is_dir()


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


@pytest.fixture
def folders_fail(monkeypatch):
    """A function that lets fsync of folders fail with an error of this number."""
    fsync = os.fsync

    def fail(number: int) -> None:
        def failing(descriptor):
            if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                raise OSError(number, os.strerror(number))
            fsync(descriptor)

        monkeypatch.setattr(files.os, "fsync", failing)

    return fail


@pytest.mark.skipif(files.ON_WINDOWS, reason="folders are not synced on Windows")
@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EBADF])
def test_where_folders_cannot_be_synced_files_are_written(number, folders_fail, tmp_path):
    folders_fail(number)
    files.write_text(tmp_path / "a.txt", "whole")
    with files.replacing_folder(tmp_path / "folder") as partial:
        (partial / "b.txt").write_text("whole")
    assert (tmp_path / "a.txt").read_text() == (tmp_path / "folder" / "b.txt").read_text() == "whole"


@pytest.mark.skipif(files.ON_WINDOWS, reason="folders are not synced on Windows")
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_a_disk_that_fails_is_an_error_that_names_the_file(number, folders_fail, tmp_path):
    folders_fail(number)
    with pytest.raises(OSError, match=r"a\.txt") as error:
        files.write_text(tmp_path / "a.txt", "whole")
    assert error.value.errno == number


def test_an_error_that_is_not_the_disks_stays_what_it_is(tmp_path):
    with pytest.raises(ConnectionResetError) as error, files.replacing(tmp_path / "a.txt"):
        raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")
    assert error.value.filename is None


def test_a_drive_that_does_not_exist_cannot_be_written_to(monkeypatch):
    monkeypatch.setattr(files.Path, "exists", lambda path: False)
    monkeypatch.setattr(files.Path, "is_dir", lambda path: False)
    with pytest.raises(ValueError, match="output_root is a/b, but .* is no folder that can be written to"):
        files.check_writable("a/b", "output_root")


def test_bytes_of_names_that_are_no_utf_8_are_written_as_escapes(tmp_path):
    name = b"caf\xe9.png".decode("utf-8", "surrogateescape")
    files.write_text(tmp_path / "names.json", to_json([name], ensure_ascii=False))
    assert json.loads((tmp_path / "names.json").read_text(encoding="utf-8")) == [name]


# JSON lines -----------------------------------------------------------------------------------------------------------

TORN = ['{"step": 5, "lo{"step": 5, "loss": 1}', "\0\0\0", "[1]", '{"loss": 1}', "[" * 100_000, '{"step": 2, "lo']


def test_lines_that_cannot_be_read_are_left_out_and_the_file_is_named(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(['{"step": 1, "loss": NaN}', *TORN, '{"step": 2, "loss": 1e400}', '{"step": 9}', "{"]))
    files.forget_after(path, 8)
    assert f"{path}: 6 of its lines cannot be read" in caplog.text
    assert path.read_text() == '{"step": 1, "loss": null}\n{"step": 2, "loss": null}\n'
    assert read_lines(path) == [{"step": 1, "loss": None}, {"step": 2, "loss": None}]


def test_lines_wait_for_room_and_a_line_that_is_cut_off_is_taken_back(tmp_path, no_room, caplog):
    lines = JsonLines(tmp_path / "metrics.jsonl")
    lines.append(1, {"loss": 0.5})
    no_room(but=len('{"step": 1, "loss": 0.5}\n') + 5)
    lines.append(2, {"loss": float("nan")})
    no_room(but=None)
    assert "metrics.jsonl is not written" in caplog.text and [line["step"] for line in read_lines(lines.path)] == [1]
    lines.append(3, {"loss": 0.3})
    assert [json.loads(line) for line in lines.path.read_text().splitlines()] == [
        {"step": 1, "loss": 0.5},
        {"step": 2, "loss": None},
        {"step": 3, "loss": 0.3},
    ]


@pytest.mark.parametrize("text", ["", "\0", "[1]", "5", "{", "9" * 5000, "[" * 100_000], ids=lambda text: text[:3])
def test_a_damaged_file_counts_as_an_empty_one(text, tmp_path, caplog):
    (tmp_path / "best.json").write_text(text)
    assert read_json(tmp_path / "best.json") == {} and "best.json is damaged" in caplog.text
    assert read_json(tmp_path / "none.json") == {}
