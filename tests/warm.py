"""Processes that start warm: children of a server that has imported everything, alone or as the ranks of a group."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["tiny", "bases", "deepspeed", "diffsynth.cache.make", "diffsynth.plan.preflight", "diffsynth.training.loop"]
)
SECONDS = 300  # that ranks may take; a minute would do


def start(act: Callable, *given, output: Path | None = None, **environment: str) -> BaseProcess:
    """Start a process that calls `act(*given)`, a function of a module, and writes its output streams to `output`."""
    process = SERVER.Process(target=_act, args=(act, given, output, environment))
    process.start()
    return process


def ranks(count: int, act: Callable, *given) -> list[int]:
    """Call `act(*given)` in the processes of a group, as torchrun does, and return their exit codes."""
    group = {"WORLD_SIZE": str(count), "MASTER_ADDR": "localhost", "MASTER_PORT": str(_free_port())}
    processes = [start(act, *given, RANK=str(rank), LOCAL_RANK=str(rank), **group) for rank in range(count)]
    for process in processes:
        process.join(SECONDS)
        process.kill()  # it may wait for one that failed
        process.join()
    return [process.exitcode for process in processes]


def _act(act: Callable, given: tuple, output: Path | None, environment: dict[str, str]) -> None:
    import torch

    os.environ.update(environment)
    torch.set_num_threads(1)
    if output:
        for stream in (1, 2):
            os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    act(*given)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]
