"""Asking a run to stop: it finishes its step, saves, and says that it wants to go on."""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from ..core.signals import REQUEUE_STATUS, STOP_SIGNALS

logger = logging.getLogger(__name__)


class Stopped(SystemExit):
    """A run was asked to stop: the process ends with `REQUEUE_STATUS` if its state is saved."""

    def __init__(self, step: int, saved: bool):
        super().__init__(REQUEUE_STATUS if saved else 1)
        logger.warning("Stopped after step %d%s", step, "; the same command goes on from here." if saved else ".")


@dataclass
class StopRequest:
    """Which signal asked this process to stop, if any."""

    received: str | None = field(default=None, init=False)

    def receive(self, number: int, frame) -> None:
        """Note the signal; a second Ctrl-C stops at once."""
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name

    def agreed(self, accelerator) -> bool:
        """Whether any process was asked to stop; all processes call it and get the same answer."""
        if accelerator.num_processes == 1:
            return self.received is not None
        if self.received:
            accelerator.set_trigger()
        return accelerator.check_trigger()


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 (Slurm's warning) into a request while the block runs."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():  # where Python allows no handlers
        yield request
        return
    before = {name: signal.signal(getattr(signal, name), request.receive) for name in STOP_SIGNALS}
    try:
        yield request
    finally:
        for name, handler in before.items():
            signal.signal(getattr(signal, name), handler)
