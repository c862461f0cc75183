"""Runs a script's main function, and turns mistakes on its command line into errors of one line."""

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException, OverrideParseException
from omegaconf import OmegaConf

from ..core.masking import masked
from . import slurm
from .choices import check_arguments
from .explain import explain
from .help import help_text
from .nodes import ConfigError
from .run_folder import discard_refused
from .script import compose

HELP = ({"-h"}, {"--help"})


def run_main(main: Callable[[], None]) -> None:
    """Call a function that `hydra.main` decorates; a mistake in the configuration exits with an error of one line."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # otherwise Hydra prints its errors and exits
    let_segments_grow()
    try:
        flags = {argument for argument in sys.argv[1:] if argument.startswith("-")}
        if flags in HELP:  # with other flags, Hydra shows its own help
            return print(help_text([argument for argument in sys.argv[1:] if argument not in flags]))
        check_arguments(sys.argv[1:])
        slurm.register()
        main()
    except (ConfigCompositionException, OverrideParseException) as error:
        sys.exit(masked(f"error: {explain(error)}"))
    except (JobFailed, ConfigError) as error:
        sys.exit(masked(f"error: {error}"))
    except OSError as error:  # Hydra makes the run's folder before it calls `main`
        sys.exit(masked(f"error: {error}; set {_folder_key()}=… to a folder that can be written to."))


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
    """Inside, errors of a run's configuration and input exit with their message instead of a traceback."""
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
        sys.exit(f"error: {masked(str(error))}\n(DIFFSYNTH_TRACEBACK=1 shows where this was raised)")


def _is_in_sweep() -> bool:
    return HydraConfig.initialized() and not OmegaConf.is_missing(HydraConfig.get().job, "num")
