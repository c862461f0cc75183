"""Locks on folders: one process at a time writes a run, a cache or generated files.

A locked folder has a file `.in-use`. Its owner holds the operating system's lock on that file, which ends with the
process, and has written into it who it is. Some file systems have no such locks, or have them only among the processes
of one machine. The owner therefore also renews the file's time every `BEAT` seconds, and a lock that another machine
wrote holds until it has not been renewed for `LEASE` seconds.

This is not `filelock.FileLock`, because its releases differ in what they do on a file system without locks: the older
ones wait for ever, the newer ones keep the lock of a dead process of another machine for ever.
"""

import atexit
import json
import logging
import math
import os
import socket
import stat
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import cache
from hashlib import blake2b
from pathlib import Path

import psutil

from . import rank

logger = logging.getLogger(__name__)

ON_WINDOWS = os.name == "nt"
if ON_WINDOWS:
    import msvcrt
else:
    import fcntl

IN_USE_STATUS = 73  # EX_CANTCREAT of sysexits.h: exit status of a script whose folder another process writes
LOCK = ".in-use"
BEAT = 10  # seconds between two renewals of a lock; a guess
LEASE = 120  # seconds without a renewal after which a lock of another machine is taken over; a guess
POLL = 1  # seconds between two looks at a lock of another machine; a guess
SETTLE = 2  # seconds in which two processes that take over one lock see each other; a guess
TRIES = 10  # within SETTLE; a guess
RECORD = {"host": str, "machine": str, "pid": int, "started": int | float, "job": list | None}  # see `_write`
RECORD_BYTES = 512  # size of the record, padded, so that one write replaces the whole of it
FAR = 2**30  # the byte that is locked on Windows, where nobody could read the record if it were among the locked bytes
SAME_START = 10  # seconds by which two readings of one process's start differ at most, as clocks are set; a guess


class FolderInUse(ValueError):
    """Another process writes the folder; the message names the process, its host, and what to do."""


class _Lock:
    """The lock of a folder, as long as this process holds it."""

    def __init__(self, folder: Path):
        self.folder, self.is_new = folder, not folder.exists()
        self.path = folder / LOCK
        self.descriptor = _take(self.path)
        self.lost: str | None = None  # who has taken it over, once that is known
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._renew, daemon=True)
        self.thread.start()

    def _renew(self) -> None:
        while not self.ended.wait(BEAT):
            with suppress(OSError):  # the file system may be away for a moment
                owner = _read(self.descriptor)
                if owner is not None and not _is_own(owner):
                    self.lost = f"This process stood still for too long: {_in_use(self.folder, owner)}"
                    logger.error(self.lost)
                    return
                os.utime(self.path)

    def release(self) -> None:
        """Delete the lock file, and the folder if the lock made it and nothing was written to it."""
        self.ended.set()
        self.thread.join()
        is_own = _is_own(_read(self.descriptor)) and _is_at(self.descriptor, self.path)
        if ON_WINDOWS:  # which does not delete a file that is open
            os.close(self.descriptor)
        if is_own:
            with suppress(OSError):  # on Windows, another process may have opened it
                self.path.unlink()
        if not ON_WINDOWS:
            os.close(self.descriptor)
        if self.is_new:
            with suppress(OSError):  # it has files
                self.folder.rmdir()


_held: dict[Path, _Lock] = {}  # locks of this process by folder


def hold(folder: str | Path) -> None:
    """Lock a folder, which is made if it is absent, until `release` or the end of this process.

    It does nothing if this process holds the lock already, and in all processes of a launch but the first.

    Raises:
        FolderInUse: Another process holds it.
        ValueError: Its `.in-use` is a link, also a hard one, a folder or a device.
        OSError: The folder cannot be written.
    """
    folder = Path(folder).resolve()
    if folder not in _held and rank() == "0":
        _held[folder] = _Lock(folder)


def release(folder: str | Path) -> None:
    """Unlock a folder if this process holds its lock."""
    lock = _held.pop(Path(folder).resolve(), None)
    if lock is not None:
        lock.release()


@atexit.register
def release_all() -> None:
    """Unlock every folder that this process has locked."""
    for folder in list(_held):
        release(folder)


@contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Inside the block, this process holds the lock of a folder; see `hold`."""
    if Path(folder).resolve() in _held:
        yield
        return
    hold(folder)
    try:
        yield
    finally:
        release(folder)


def is_held(folder: str | Path) -> bool:
    """Whether this process holds the lock of a folder, or of one that it is in, and no other has taken it over."""
    folder = Path(folder).resolve()
    return any(path in _held and not _held[path].lost for path in (folder, *folder.parents))


def require_held() -> None:
    """Check that no other process has taken over a lock of this one. It costs nothing: no file is read.

    Raises:
        FolderInUse: One has.
    """
    for lock in _held.values():
        if lock.lost:
            raise FolderInUse(lock.lost)


@cache
def machine() -> str:
    """8 hex digits that differ between machines, even if they have one host name.

    On Linux they also differ between starts and containers.
    """
    digest = blake2b(socket.gethostname().encode(), digest_size=4)
    try:  # only Linux has these files
        digest.update(Path("/proc/sys/kernel/random/boot_id").read_bytes())
        digest.update(os.readlink("/proc/self/ns/pid").encode())
    except OSError:
        digest.update(str(uuid.getnode()).encode())
    return digest.hexdigest()


def started(pid: int) -> float | None:
    """Return when a process of this machine started, in seconds since 1970; None if there is no such process.

    `-math.inf` stands for a process that another user's rights hide.
    """
    try:
        return psutil.Process(pid).create_time()
    except psutil.NoSuchProcess:
        return None
    except psutil.AccessDenied:
        return -math.inf


def _forget() -> None:
    """In a forked process: close its copies of the locks, which would otherwise live on after their owner."""
    for lock in _held.values():
        os.close(lock.descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def _take(path: Path) -> int:
    """Take a lock, and return the descriptor of its file."""
    while True:
        descriptor, is_new = _open(path)
        try:
            is_alone = _lock(descriptor)
            previous = None if is_new else _read(descriptor)
            if is_alone is False and previous and not _is_alive(previous, path, is_alone):
                is_alone = _lock_soon(descriptor)
            if is_alone is False or (previous and _is_alive(previous, path, is_alone)):
                raise FolderInUse(_in_use(path.parent, previous))
            if _is_at(descriptor, path):
                _write(descriptor)
                is_sure = is_new or (is_alone and (previous or {}).get("machine") == machine())
                if not is_sure:
                    _settle(descriptor, path)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # the previous owner deleted it meanwhile


def _open(path: Path) -> tuple[int, bool]:
    """Return the descriptor of a lock file, whose folder is made, and whether the file was made by this call."""
    for _ in range(TRIES - 1):
        with suppress(FileNotFoundError, *([PermissionError] if ON_WINDOWS else [])):
            return _open_once(path)
        time.sleep(SETTLE / TRIES)  # its last owner is deleting the folder, or on Windows the file
    return _open_once(path)


def _open_once(path: Path) -> tuple[int, bool]:
    path.parent.mkdir(parents=True, exist_ok=True)
    flags = os.O_RDWR | os.O_CREAT
    for name in ("O_BINARY", "O_NOFOLLOW", "O_NONBLOCK"):
        flags |= getattr(os, name, 0)
    try:
        return os.open(path, flags | os.O_EXCL, 0o666), True
    except FileExistsError:
        _check_is_a_file_of_one_name(path)
        return os.open(path, flags, 0o666), False


def _check_is_a_file_of_one_name(path: Path) -> None:
    """Refuse a lock file through which another file would be overwritten, or that no lock can be written to."""
    about = path.lstat()
    if not stat.S_ISREG(about.st_mode) or about.st_nlink > 1:
        raise ValueError(f"{path} is a link, a folder or a device; expected the file of a lock, or none: delete it.")


def _lock(descriptor: int) -> bool | None:
    """Return whether this process now has the operating system's lock of a file; None if there are no such locks."""
    try:
        if ON_WINDOWS:
            os.lseek(descriptor, FAR, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return None
    return True


def _lock_soon(descriptor: int) -> bool | None:
    """Try for a moment: a child that a killed owner had just forked has not closed its copy of the lock yet."""
    until = time.monotonic() + SETTLE
    while (is_alone := _lock(descriptor)) is False and time.monotonic() < until:
        time.sleep(0.01)
    return is_alone


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is still the one of this path."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _write(descriptor: int) -> None:
    """Write who this process is; in place, because the lock is on this very file."""
    record = {
        "host": socket.gethostname(),
        "machine": machine(),
        "pid": os.getpid(),
        "started": started(os.getpid()),
        "job": _slurm_job(),
    }
    os.lseek(descriptor, 0, os.SEEK_SET)
    os.write(descriptor, json.dumps(record).ljust(RECORD_BYTES).encode())
    os.fsync(descriptor)


def _read(descriptor: int) -> dict | None:
    """Return who owns a lock; None if nobody has written that within two seconds, or the file is none of ours."""
    for _ in range(TRIES):
        os.lseek(descriptor, 0, os.SEEK_SET)
        with suppress(ValueError):
            owner = json.loads(os.read(descriptor, RECORD_BYTES))
            if isinstance(owner, dict) and all(isinstance(owner.get(name, ...), RECORD[name]) for name in RECORD):
                return owner
        time.sleep(SETTLE / TRIES)  # its owner may be about to write
    return None


def _is_own(owner: Mapping | None) -> bool:
    return owner is not None and (owner["machine"], owner["pid"]) == (machine(), os.getpid())


def _slurm_job() -> list[str] | None:
    """Return the id of the Slurm job that this process belongs to, and how often it was queued again."""
    job = os.environ.get("SLURM_JOB_ID")
    return [job, os.environ.get("SLURM_RESTART_COUNT", "0")] if job else None


def _is_alive(owner: Mapping, path: Path, is_alone: bool | None) -> bool:
    """Whether the process that wrote a lock lives, given that the operating system does not say so."""
    if owner["machine"] == machine():
        now = started(owner["pid"])
        is_the_same = now == -math.inf or (now is not None and abs(now - owner["started"]) < SAME_START)
        return not is_alone and is_the_same
    job, here = owner["job"], _slurm_job()
    if job and here and job[:1] == here[:1] and job != here:  # Slurm has ended this job there, and queued it again
        return False
    return _is_renewed(owner, path)


def _is_renewed(owner: Mapping, path: Path) -> bool:
    """Wait until a lock is renewed, deleted, or older than `LEASE`; return whether it was renewed."""
    renewed, age = _time_and_age(path)
    if renewed is None:
        return False
    if age < LEASE:
        logger.warning(
            "%s was locked by process %d on %s; waiting up to %.0f seconds to see whether it still runs.",
            *(path.parent, owner["pid"], owner["host"], LEASE - age),
        )
    while age < LEASE:
        time.sleep(POLL)
        now, age = _time_and_age(path)
        if now != renewed:
            return now is not None
    return False


def _time_and_age(path: Path) -> tuple[float | None, float]:
    """Return when a file was last renewed and its age in seconds, by the clock of its file system; None if it is gone.

    The file is opened, as NFS otherwise shows a time from its cache.
    """
    with tempfile.TemporaryFile(dir=path.parent) as file:
        now = os.fstat(file.fileno()).st_mtime
    try:
        with path.open("rb") as lock:
            renewed = os.fstat(lock.fileno()).st_mtime
    except FileNotFoundError:
        return None, 0
    return renewed, now - renewed


def _settle(descriptor: int, path: Path) -> None:
    """Wait for another process that takes over the same lock at the same moment; the one that wrote last has it."""
    time.sleep(SETTLE)
    if not _is_own(owner := _read(descriptor)):
        raise FolderInUse(_in_use(path.parent, owner))


def _in_use(folder: Path, owner: Mapping | None) -> str:
    who = "another process"
    if owner is not None:
        since = datetime.fromtimestamp(owner["started"]).isoformat(" ", "seconds")
        who = f"process {owner['pid']} on {owner['host']}, running since {since}"
    return f"{folder} is in use by {who}; wait until it ends, stop it there, or choose another folder."
