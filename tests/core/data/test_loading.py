"""Processes that load data: they end with the process that started them, and their own end is an error of one line."""

import os
import signal
import time
from types import SimpleNamespace

import pytest
import warm
from kills import left_by
from torch.utils.data import Dataset

from diffsynth.core.data.loading import WorkerKilled, _message, loading

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")


class Heavy(Dataset):
    """Items so large that a worker waits until somebody reads them, for ever if nobody does."""

    def __getitem__(self, number: int) -> bytes:
        return bytes(1 << 20)


def load_and_be_killed() -> None:
    os.setsid()
    with loading(Heavy(), 2, sampler=range(100), batch_size=None) as batches:
        next(batches)
        os.kill(os.getpid(), signal.SIGKILL)


def test_workers_end_with_a_process_that_is_killed():
    process = warm.start(load_and_be_killed)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert left_by(process.pid) == []


class Killed(Dataset):
    """Its third item kills the worker that loads it."""

    def __getitem__(self, number: int) -> int:
        if number == 2:
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGKILL)
        return number


def test_a_worker_that_is_killed_is_an_error_of_one_line_where_its_batch_is_waited_for():
    seen, said = [], r"was killed by SIGKILL, most often because memory ran out; set dataset.num_workers=0, or give"
    loaded = loading(Killed(), 1, sampler=range(100), batch_size=None)
    with loaded as batches, pytest.raises(WorkerKilled, match=said) as error:
        for item in batches:
            seen.append(item)
            time.sleep(item)  # the worker is killed meanwhile; the loop, in the middle of something else, goes on
    assert seen == [0, 1] and "\n" not in str(error.value)


@pytest.mark.parametrize("code, how", [(-9, "was killed by SIGKILL"), (-40, "was killed by signal 40"), (3, "code 3")])
def test_how_a_worker_ended_is_said_whatever_the_signal(code, how):
    assert how in _message(SimpleNamespace(pid=1, exitcode=code), workers=2)
