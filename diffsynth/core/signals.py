"""The signals that ask a run to stop, and the exit status with which it then ends."""

import signal

STOP_SIGNALS = [name for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]
REQUEUE_STATUS = 75  # EX_TEMPFAIL of sysexits.h: run the same command again


def leave_to_parent(worker: int = 0) -> None:
    """Ignore stop signals in a DataLoader worker; pass this function as the loader's `worker_init_fn`.

    A terminal or scheduler sends the signal to all processes. The main process decides when to stop, and still needs
    data until then.
    """
    for name in STOP_SIGNALS:
        signal.signal(getattr(signal, name), signal.SIG_IGN)
