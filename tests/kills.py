"""Kill a process in the middle of its work, inside a save or between two. FAULTS=200 kills 200 times.

After each kill, no process that it started may live on. `owner` is a process that has locked a folder.
"""

import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
import warm

KILLS = int(os.environ.get("FAULTS", 2))
WORKERS = 2 if "FAULTS" in os.environ else 0  # processes that load data; each takes two seconds to start
GRACE = 60  # seconds; a process that is starting ends only after its first imports, which take long on a busy machine


def moments() -> Iterator[tuple[bool, float]]:
    """For each kill, whether it comes inside a save, and when, as a fraction of the work; the first two are fixed."""
    yield from ((True, 0.5), (False, 0.25))
    rng = random.Random(0)
    while True:
        yield rng.random() < 0.5, rng.random()


def killed_in_fsync(number: int | None, act: Callable, *given) -> None:
    """Call `act(*given)` in a session of its own, and kill the process inside its fsync of this number."""
    os.setsid()
    count, fsync = itertools.count(1), os.fsync

    def fatal(descriptor: int) -> None:
        if next(count) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(descriptor)

    os.fsync = fatal
    act(*given)


def duration(act: Callable, *given) -> float:
    """Seconds that `act(*given)` takes without a kill."""
    warm.start(os.getpid).join()  # starts the server
    began = time.monotonic()
    assert _ended(warm.start(act, *given))
    return time.monotonic() - began


def survived(work: Callable[[int], tuple], seconds: float, syncs: int) -> Iterator[int]:
    """Start works one after another, each again after every kill until it is done; yield the numbers of done works.

    Args:
        work: Returns the function and arguments of the work of a number.
        seconds, syncs: Duration of a work and number of its fsyncs without a kill.
    """
    chosen, killed, number = moments(), 0, 0
    while killed < KILLS:
        act, *given = work(number)
        while not _survives(next(chosen) if killed < KILLS else None, seconds, syncs, act, *given):
            killed += 1
        yield number
        number += 1
    print(f"killed {killed} times, no process left behind, {number} works, each as the unbroken one")


def _survives(moment: tuple[bool, float] | None, seconds: float, syncs: int, act: Callable, *given) -> bool:
    """Start the work, kill it at a moment (None does not), and return whether it was done before the kill."""
    in_save, share = moment or (False, None)
    process = warm.start(killed_in_fsync, 1 + int(share * syncs) if in_save else None, act, *given)
    if moment and not in_save:
        process.join(share * seconds)
        process.kill()
    return _ended(process)


def _ended(process: BaseProcess) -> bool:
    """Wait for a process, and return whether it ended by itself; False if it was killed."""
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    left = left_by(process.pid)
    assert not left, left
    return process.exitcode == 0


@contextmanager
def owner(folder: Path, then: str = "") -> Iterator[subprocess.Popen]:
    """Inside, a process has locked the folder, run the Python code `then`, and waits; it is killed at the end."""
    lock = f"from diffsynth.core.process import locks; locks.hold({str(folder)!r})"
    code = f"{lock}; {then}\nprint('locked', flush=True); input()"
    root = Path(__file__).parents[1]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], cwd=root, **pipes) as process:
        try:
            assert process.stdout.readline() == "locked\n"
            yield process
        finally:
            process.kill()


def left_by(ended: int) -> list[psutil.Process]:
    """The processes of the session that a process began that live on after it and a grace time."""
    until = time.monotonic() + GRACE
    while (alive := _session(ended)) and time.monotonic() < until:
        time.sleep(0.05)
    return alive


def _session(leader: int) -> list[psutil.Process]:
    return [process for process in psutil.process_iter(["status"]) if _is_in(process, leader)]


def _is_in(process: psutil.Process, session: int) -> bool:
    try:
        return process.info["status"] != psutil.STATUS_ZOMBIE and os.getsid(process.pid) == session
    except ProcessLookupError:  # it has just ended
        return False
