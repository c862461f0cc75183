"""Stopping a run by a signal: it finishes its step, saves a checkpoint and exits with a status that requeues it."""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import TYPE_CHECKING

from ..core.signals import REQUEUE_STATUS, STOP_SIGNALS

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)


class Stopped(SystemExit):
    """Ends the process of a stopped run: with status `REQUEUE_STATUS` if its state is saved, else with 1."""

    def __init__(self, step: int, saved: bool):
        super().__init__(REQUEUE_STATUS if saved else 1)
        logger.warning("Stopped after step %d%s", step, "; run the same command to resume." if saved else ".")


@dataclass
class StopRequest:
    """Remembers the name of the signal that asked this process to stop; None while there was none."""

    received: str | None = field(default=None, init=False)

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal: remember it, so that the run stops after its step; a second Ctrl-C stops at once."""
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name

    def agreed(self, accelerator: "Accelerator") -> bool:
        """Whether any process got a signal; all processes call this and get the same answer."""
        if accelerator.num_processes == 1:
            return self.received is not None
        if self.received:
            accelerator.set_trigger()
        return accelerator.check_trigger()


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Inside the block, SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 (Slurm's warning) set the returned request."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():  # Python allows signal handlers in the main one only
        yield request
        return
    before = {name: signal.signal(getattr(signal, name), request.receive) for name in STOP_SIGNALS}
    try:
        yield request
    finally:
        for name, handler in before.items():
            signal.signal(getattr(signal, name), handler)
