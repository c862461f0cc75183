"""The signals that ask a run to stop, and the exit status with which it then ends."""

import signal

STOP_SIGNALS = [name for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]
REQUEUE_STATUS = 75  # EX_TEMPFAIL of sysexits.h: run the same command again


def leave_to_parent(worker: int = 0) -> None:
    """Ignore stop signals in a DataLoader worker, as its `worker_init_fn`: the training process stops by itself.

    A terminal and a scheduler send the signal to all processes, and the training process still needs data to finish
    its step.
    """
    for name in STOP_SIGNALS:
        signal.signal(getattr(signal, name), signal.SIG_IGN)
