"""The signals that ask a run to stop, the exit status with which it then ends, and what ends its child processes."""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.context import SpawnContext, SpawnProcess
from types import FrameType

STOP_SIGNALS = [name for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP") if hasattr(signal, name)]
REQUEUE_STATUS = 75  # EX_TEMPFAIL of sysexits.h: run the same command again
PARENT = "DIFFSYNTH_PARENT"  # environment variable with the id of the process that a process has to end with
PR_SET_PDEATHSIG = 1  # of Linux's <sys/prctl.h>
WATCH_SECONDS = 1  # between two looks at the parent; a guess


class LeftBySignal(SystemExit):
    """Ends a process that a signal stopped before there was anything to save, with status `REQUEUE_STATUS`."""

    def __init__(self, name: str):
        super().__init__(REQUEUE_STATUS)
        self.name = name


def on_stop_signals(
    handler: Callable[[int, FrameType | None], None] | signal.Handlers, names: Sequence[str] = STOP_SIGNALS
) -> dict[int, object]:
    """Handle these stop signals by `handler`, and return the handlers until now by the signals' numbers.

    SIGHUP stays ignored where `nohup` has it ignored: such a run outlives its terminal.
    """
    handled = [getattr(signal, name) for name in names if not _is_ignored_hang_up(name)]
    return {number: signal.signal(number, handler) for number in handled}


def _is_ignored_hang_up(name: str) -> bool:
    return name == "SIGHUP" and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def leave_on_signals() -> None:
    """From now on, a stop signal raises `LeftBySignal`."""
    on_stop_signals(_leave)


def _leave(number: int, frame: FrameType | None) -> None:
    raise LeftBySignal(signal.Signals(number).name)


def leave_to_parent(worker: int = 0) -> None:
    """Ignore stop signals in a DataLoader worker; pass this function as the loader's `worker_init_fn`.

    A terminal or scheduler sends the signal to all processes. The main process decides when to stop, and still needs
    data until then.
    """
    on_stop_signals(signal.SIG_IGN)


class WorkerProcess(SpawnProcess):
    """A process that leaves stop signals to its parent, and that is killed when its parent ends."""

    def __reduce__(self) -> tuple:
        # The new process calls `_begin` before it reads the rest, for which it imports torch.
        return _begin, (os.getpid(),), self.__dict__


def _begin(parent: int) -> WorkerProcess:
    leave_to_parent()
    _end_with(parent, getattr(signal, "SIGKILL", signal.SIGTERM))
    return WorkerProcess.__new__(WorkerProcess)


class WorkerContext(SpawnContext):
    """Starts every process as a `WorkerProcess`; a DataLoader's `multiprocessing_context`."""

    Process = WorkerProcess


def child_environment() -> dict[str, str]:
    """Return environment variables for a child process that calls `end_with_parent`."""
    return {PARENT: str(os.getpid())}


def end_with_parent() -> None:
    """Send this process SIGTERM when its parent ends, if the parent started it with `child_environment`."""
    if os.environ.get(PARENT) == str(os.getppid()):
        _end_with(os.getppid(), signal.SIGTERM)


def _end_with(parent: int, number: int) -> None:
    """Send this process a signal when its parent ends, even by SIGKILL."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)  # at once, even while C code keeps Python's threads waiting
    threading.Thread(target=_watch, args=(parent, number), daemon=True).start()


def _watch(parent: int, number: int) -> None:
    import psutil

    while os.getppid() == parent and psutil.pid_exists(parent):  # Windows keeps the number of a parent that has ended
        time.sleep(WATCH_SECONDS)
    os.kill(os.getpid(), number)
