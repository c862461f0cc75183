"""Runs a script's main function, and turns mistakes on its command line into errors of one line."""

import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException, OverrideParseException
from omegaconf import OmegaConf

from ..core.masking import masked
from ..core.process import rank
from ..core.process.console import keep_console
from ..core.process.library_warnings import drop_needless_warnings
from ..core.process.locks import IN_USE_STATUS, FolderInUse, release_all
from ..core.process.signals import LeftBySignal, end_with_parent, leave_on_signals, on_stop_signals
from . import slurm
from .choices import check_arguments
from .explain import explain
from .help import help_text
from .mistyped import check_words
from .nodes import ConfigError
from .run_folder import discard_refused
from .script import compose, conf
from .texts import as_typed

HELP = ({"-h"}, {"--help"})


def run_main(main: Callable[[], None], entry: Callable, resumes: bool = False) -> None:
    """Call a function that `hydra.main` decorates; a mistake in the configuration exits with an error of one line.

    Args:
        main: The function.
        entry: The function or dataclass that `main` compares the configuration with; it says which keys are text.
        resumes: Whether the same command goes on with what a stopped one has done. Then the signals that stop a run
            end the process with status `REQUEUE_STATUS` at any time; the training loop handles them otherwise.
    """
    keep_console()
    drop_needless_warnings()
    end_with_parent()
    if resumes:
        leave_on_signals()
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # otherwise Hydra prints its errors and exits
    let_segments_grow()
    try:
        flags = {argument for argument in sys.argv[1:] if argument.startswith("-")}
        if flags in HELP:  # with other flags, Hydra shows its own help
            overrides = [argument for argument in sys.argv[1:] if argument not in flags]
            return print(help_text(as_typed(overrides, entry)))
        check_words(sys.argv[1:])
        check_arguments(sys.argv[1:])
        check_rank()
        slurm.register()
        sys.argv[1:] = as_typed(sys.argv[1:], entry)
        main()
    except LeftBySignal as left:
        on_stop_signals(signal.SIG_IGN)  # a terminal or scheduler may send several; the process is ending
        logging.warning("Stopped by %s; run the same command to go on.", left.name)
        raise
    except (ConfigCompositionException, OverrideParseException) as error:
        sys.exit(masked(f"error: {explain(error)}"))
    except (JobFailed, ConfigError) as error:
        sys.exit(masked(f"error: {error}"))
    except OSError as error:  # Hydra makes the run's folder before it calls `main`
        sys.exit(masked(f"error: {error}; set {_folder_key()}=… to a folder that can be written to."))


def check_rank() -> None:
    """Check that a process that is not the first of several was started by a launcher.

    Raises:
        ConfigError: It was not: only RANK is set, so that this process would log nothing and wait for others for ever.
    """
    missing = sorted({"MASTER_ADDR", "WORLD_SIZE"} - os.environ.keys())
    if rank() != "0" and missing:
        raise ConfigError(
            f"The environment has RANK={rank()}, but not {' and '.join(missing)}: start several processes by "
            "`accelerate launch` or `torchrun`, or type `unset RANK`."
        )


def let_segments_grow() -> None:
    """Let CUDA's allocator extend its segments, so that batches of many sizes leave few holes; before torch starts."""
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # the second is the name before torch 2.9
    if sys.platform == "linux" and not os.environ.keys() & set(names):
        os.environ.update(dict.fromkeys(names, "expandable_segments:True"))


def _folder_key() -> str:
    """Return the key of the folder that the running script writes to; plan.py also has that of the runs it plans."""
    return next(key for key in ("path", "output", "output_root") if key in compose([]))


class JobFailed(Exception):
    """A job of a sweep ended with an error, which is in its log; the other jobs go on."""


@contextmanager
def explained() -> Iterator[None]:
    """Inside, errors of a run's configuration and input exit with their message instead of a traceback.

    With DIFFSYNTH_TRACEBACK=1 in the environment, they are raised with it.
    At its end, the folders that the run has locked are unlocked.
    """
    keep_console()  # again, because a job of a sweep may run in a process of its own
    drop_needless_warnings()
    try:
        yield
    except (ValueError, OSError, FloatingPointError) as error:
        if os.environ.get("DIFFSYNTH_TRACEBACK"):
            raise
        if _is_in_sweep():
            logging.error(error)
            raise JobFailed(error) from None
        if HydraConfig.initialized():
            hydra = HydraConfig.get()
            discard_refused(Path(hydra.runtime.output_dir), log=f"{hydra.job.name}.log")
        if isinstance(error, FolderInUse):
            print(f"error: {masked(str(error))}", file=sys.stderr)
            sys.exit(IN_USE_STATUS)
        sys.exit(f"error: {masked(str(error))}{_where_it_is(str(error))}")
    finally:
        release_all()


def _where_it_is(message: str) -> str:
    """Say so if a relative path that a message names is there for a script started in its own folder, and not here."""
    here, project = Path.cwd(), conf().parent
    for word in re.findall(r"[^\s,;'\"]+/[^\s,;'\"]+", message):
        path = here / word.rstrip(".:")
        # Unlike Path.exists, os.path.exists raises nothing for a name that is too long.
        if not path.is_relative_to(here) or os.path.exists(path):
            continue
        if os.path.exists(project / path.relative_to(here)):
            return (
                f" (relative paths belong to the folder that you are in; this one is in {project}: type cd {project})"
            )
    return ""


def _is_in_sweep() -> bool:
    return HydraConfig.initialized() and not OmegaConf.is_missing(HydraConfig.get().job, "num")
