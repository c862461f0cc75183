"""Kills of a process in the middle of its work, in a save or between two. FAULTS=200 makes 200 of them."""

import itertools
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess

import warm

KILLS = int(os.environ.get("FAULTS", 2))


def moments() -> Iterator[tuple[bool, float]]:
    """Whether each kill comes in a save, and when, as a share of the work; the first two are no matter of chance."""
    yield from ((True, 0.5), (False, 0.25))
    chance = random.Random(0)
    while True:
        yield chance.random() < 0.5, chance.random()


def killed_in_fsync(number: int | None, act: Callable, *given) -> None:
    """Do some work and die in the middle of its fsync of this number."""
    count, fsync = itertools.count(1), os.fsync

    def fatal(descriptor: int) -> None:
        if next(count) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(descriptor)

    os.fsync = fatal
    act(*given)


def duration(act: Callable, *given) -> float:
    """Seconds that the work takes undisturbed."""
    warm.start(os.getpid).join()  # the server is there
    began = time.monotonic()
    assert _ended(warm.start(act, *given))
    return time.monotonic() - began


def survived(work: Callable[[int], tuple], seconds: float, syncs: int) -> Iterator[int]:
    """Do works one after another, each begun again until it is done, though kills end it; yield the number of each.

    Args:
        work: The function and arguments of the work of a number.
        seconds, syncs: What a work takes undisturbed.
    """
    chosen, killed, number = moments(), 0, 0
    while killed < KILLS:
        act, *given = work(number)
        while not _survives(next(chosen) if killed < KILLS else None, seconds, syncs, act, *given):
            killed += 1
        yield number
        number += 1
    print(f"killed {killed} times, {number} works, each as the unbroken one")


def _survives(moment: tuple[bool, float] | None, seconds: float, syncs: int, act: Callable, *given) -> bool:
    """Whether the work is done when a kill at that moment comes, if one does."""
    in_save, share = moment or (False, None)
    process = warm.start(killed_in_fsync, 1 + int(share * syncs) if in_save else None, act, *given)
    if moment and not in_save:
        process.join(share * seconds)
        process.kill()
    return _ended(process)


def _ended(process: BaseProcess) -> bool:
    """Whether the process came to its end rather than was killed."""
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode == 0
