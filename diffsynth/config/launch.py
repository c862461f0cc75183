"""`accelerate launch` for jobs that are asked to stop: `python -m diffsynth.config.launch <its flags> train.py …`.

Accelerate's own launcher dies of SIGUSR1, gives its processes 30 seconds after SIGTERM, and ends with status 1 whatever
they end with. Here signals are handed on to the processes that train, which save and end with status 75, as then does
the launcher. In a Slurm job the rank of the machine is that of the node.
"""

import os
import signal
import sys
from collections.abc import Sequence
from subprocess import CalledProcessError
from types import FrameType

import psutil

from ..core.signals import REQUEUE_STATUS

PASSED_ON = ("SIGTERM", "SIGUSR1")


def launch(arguments: Sequence[str]) -> int:
    """Run `accelerate launch` with these arguments, and return the status of the process that ended first."""
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    parser = launch_command_parser()
    if node := os.environ.get("SLURM_NODEID"):
        parser.set_defaults(machine_rank=int(node))
    os.environ.setdefault("TORCHELASTIC_SIGNALS_TO_HANDLE", "SIGINT")
    for name in PASSED_ON:
        signal.signal(getattr(signal, name), pass_on)
    try:
        launch_command(parser.parse_args(arguments))
    except CalledProcessError as error:
        return meaning(error.returncode)
    except ChildFailedError as error:
        return meaning(error.get_first_failure()[1].exitcode)
    return 0


def pass_on(number: int, frame: FrameType | None) -> None:
    """Send a signal to the processes that were launched."""
    for child in psutil.Process().children():
        child.send_signal(number)


def meaning(status: int) -> int:
    """A process that was asked to stop before it listened had nothing to save: it goes on by running again."""
    if status in [-getattr(signal, name) for name in PASSED_ON]:
        return REQUEUE_STATUS
    return 128 - status if status < 0 else status


if __name__ == "__main__":
    sys.exit(launch(sys.argv[1:]))
