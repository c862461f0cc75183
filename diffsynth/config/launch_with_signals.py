"""`accelerate launch` for jobs that may be stopped; `python -m diffsynth.config.launch_with_signals` takes its flags.

Accelerate's own launcher is killed by SIGUSR1, gives its processes 30 seconds after SIGTERM, and exits with status 1
whatever their status is. This launcher passes the signals on to the training processes. These save their state and exit
with status 75, and the launcher exits with the same status. If the launcher itself is killed, they get SIGTERM. In a
Slurm job, the machine's rank is the node's.
"""

import os
import signal
import sys
from collections.abc import Sequence
from subprocess import CalledProcessError
from types import FrameType

import psutil

from ..core.process.console import keep_console
from ..core.process.signals import REQUEUE_STATUS, STOP_SIGNALS, child_environment, on_stop_signals

IS_SWEEP_JOB = "DIFFSYNTH_IS_SWEEP_JOB"  # variable of a Slurm script's runs, whose overrides have Hydra's backslashes
PASSED_ON = [name for name in STOP_SIGNALS if name != "SIGINT"]  # a terminal sends Ctrl-C to all processes itself


def launch(arguments: Sequence[str]) -> int:
    """Run `accelerate launch` with these arguments, and return the exit status of the process that failed first."""
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    keep_console()
    parser = launch_command_parser()
    if node := os.environ.get("SLURM_NODEID"):
        parser.set_defaults(machine_rank=int(node))
        os.environ[IS_SWEEP_JOB] = "1"
    os.environ.setdefault("TORCHELASTIC_SIGNALS_TO_HANDLE", "SIGINT")
    os.environ.update(child_environment())
    on_stop_signals(pass_on, PASSED_ON)
    try:
        launch_command(parser.parse_args(arguments))
    except CalledProcessError as error:
        return exit_status(error.returncode)
    except ChildFailedError as error:
        return exit_status(error.get_first_failure()[1].exitcode)
    return 0


def pass_on(number: int, frame: FrameType | None) -> None:
    """Send a signal to the launched processes."""
    for child in psutil.Process().children():
        child.send_signal(number)


def exit_status(status: int) -> int:
    """Return the launcher's exit status for that of a process, which is negative if a signal killed it."""
    if status in [-getattr(signal, name) for name in PASSED_ON]:  # killed before it handled signals: nothing to save
        return REQUEUE_STATUS
    return 128 - status if status < 0 else status


if __name__ == "__main__":
    sys.exit(launch(sys.argv[1:]))
