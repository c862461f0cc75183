"""Stopping a run by a signal: it finishes its step, saves a checkpoint and exits with a status that requeues it.

A run whose data cannot be loaded any more, because a worker was killed, stops in the same way, but with an error.
"""

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import TYPE_CHECKING

from accelerate.utils import gather_object

from ..core.data.loading import WorkerKilled
from ..core.process import rank
from ..core.process.signals import REQUEUE_STATUS, on_stop_signals

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

ACKNOWLEDGED = b"Stopping after this step, and saving; a second Ctrl-C stops at once.\n"


class Stopped(SystemExit):
    """Ends the process of a stopped run: with status `REQUEUE_STATUS` if its state is saved, else with 1."""

    def __init__(self, step: int, saved: bool):
        super().__init__(REQUEUE_STATUS if saved else 1)
        logger.warning("Stopped after step %d%s", step, "; run the same command to resume." if saved else ".")


@dataclass
class StopRequest:
    """Remembers what asked this process to stop.

    Attributes:
        received: Name of the signal; None while there was none.
        killed_worker: Message about a worker that was killed; None while there was none.
    """

    received: str | None = field(default=None, init=False)
    killed_worker: str | None = field(default=None, init=False)

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal: remember it, so that the run stops after its step; a second Ctrl-C stops at once."""
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.received and rank() == "0":
            with suppress(OSError):  # the console may be gone; the log says at the end that the run has stopped
                os.write(2, ACKNOWLEDGED)  # unlike a stream, it can be written to while another write is interrupted
        self.received = signal.Signals(number).name

    def note_killed_worker(self, error: WorkerKilled) -> None:
        """Remember that a worker was killed, so that the run stops after its step."""
        self.killed_worker = str(error)

    def agreed(self, accelerator: "Accelerator") -> bool:
        """Whether any process is to stop; all processes call this and get the same answer."""
        asked = self.received is not None or self.killed_worker is not None
        if accelerator.num_processes == 1:
            return asked
        if asked:
            accelerator.set_trigger()
        return accelerator.check_trigger()

    def end(self, step: int, saved: bool) -> "Stopped | WorkerKilled":
        """Return what ends the run after `step`; all processes call this once they agree to stop, and end alike.

        A signal comes first: it may have killed the worker, too.
        """
        requests = gather_object([(self.received, self.killed_worker)])
        lost = [message for _, message in requests if message]
        if any(name for name, _ in requests) or not lost:
            return Stopped(step, saved)
        kept = f"The state of step {step} is saved, and the same command resumes." if saved else "No state is saved."
        return WorkerKilled(f"{lost[0]} {kept}")


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Inside, SIGTERM, SIGHUP, SIGINT (Ctrl-C) and SIGUSR1 (Slurm's warning) set the returned request."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():  # Python allows signal handlers in the main one only
        yield request
        return
    before = on_stop_signals(request.receive)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
