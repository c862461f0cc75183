"""The signals that ask a run to stop, and the status it then ends with."""

import signal

STOP_SIGNALS = [name for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]
REQUEUE_STATUS = 75  # EX_TEMPFAIL of sysexits.h: run the same command again


def leave_to_parent(worker: int = 0) -> None:
    """In a process that loads data: ignore what the process that trains is asked, as that needs data to finish."""
    for name in STOP_SIGNALS:
        signal.signal(getattr(signal, name), signal.SIG_IGN)
