"""Load batches in processes of their own, which end with the run, and whose end the run survives."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from typing import Any

from torch.utils.data import DataLoader, Dataset

from ..process.signals import WorkerContext, leave_to_parent

END = object()


class WorkerKilled(ChildProcessError):
    """A process that loads data was killed; the message says by which signal, and what to do."""


@contextmanager
def loading(dataset: Dataset, workers: int, **options: Any) -> Iterator[Iterator]:
    """Inside the block, an iterator over the batches of a `DataLoader`; its processes are ended with the block.

    Args:
        dataset: The data set.
        workers: Number of processes that load; 0 loads in this one.
        options: Other arguments of `DataLoader`.

    Raises:
        WorkerKilled: While a batch is waited for: a worker has been killed; none is left then.
    """
    batches = iter(
        DataLoader(
            dataset,
            num_workers=workers,
            multiprocessing_context=WorkerContext() if workers else None,
            worker_init_fn=leave_to_parent,
            **options,
        )
    )
    if not workers:
        yield batches
        return
    try:
        # Torch's handler raises an error wherever the main thread is, say in the middle of an optimizer's step.
        with _on_child_end(signal.SIG_DFL) as raise_if_killed:
            yield _watched(batches, raise_if_killed)
    finally:
        _end(batches)


def _watched(batches: Iterator, raise_if_killed: Any) -> Iterator:
    """Yield the batches of a DataLoader's iterator; `raise_if_killed` handles SIGCHLD while a batch is waited for."""
    workers: list[BaseProcess] = batches._workers  # a private name, as _shutdown_workers; checked with torch 2.13.0
    while True:
        try:
            with _on_child_end(raise_if_killed):
                killed = _killed(workers)
                if not killed:
                    batch = next(batches, END)
        except RuntimeError:
            killed = _killed(workers)
            if not killed:  # an error of the data set's
                raise
        if killed:
            _end(batches)
            raise WorkerKilled(_message(killed[0], len(workers)))
        if batch is END:
            return
        yield batch


def _killed(workers: list[BaseProcess]) -> list[BaseProcess]:
    return [worker for worker in workers if not worker.is_alive()]


def _message(killed: BaseProcess, workers: int) -> str:
    code = killed.exitcode
    names = {each.value: each.name for each in signal.Signals}  # without the real-time signals
    how = f"was killed by {names.get(-code, f'signal {-code}')}" if code < 0 else f"ended with exit code {code}"
    fewer = f"a dataset.num_workers of less than {workers}" if workers > 1 else "dataset.num_workers=0"
    return (
        f"a process that loads data (process id {killed.pid}) {how}, most often because memory ran out; set {fewer}, "
        "or give the job more memory."
    )


def _end(batches: Iterator) -> None:
    """End the workers; those that are busy or wait for one that was killed are killed."""
    batches._shutdown_workers()
    for worker in batches._workers:
        worker.kill()
        worker.join()


@contextmanager
def _on_child_end(handler: Any) -> Iterator[Any]:
    """Inside, SIGCHLD is handled by `handler`; yield what handled it before. Does nothing where that can't be set."""
    if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
        yield None
        return
    before = signal.signal(signal.SIGCHLD, handler)
    try:
        yield before
    finally:
        signal.signal(signal.SIGCHLD, before)
