"""The configuration: from YAML files and a command line to checked objects and a run's folder.

This is the only package that knows Hydra. An entry script calls `run_main`. Its main function calls, in this order,
`check_choices`, `check`, `claim`, `build` and `finish`. Read `command_line.py`, `nodes.py` and `run_folder.py` first.
"""

from ..core.process.locks import locked
from . import resolvers as resolvers
from .choices import check_choices
from .command_line import explained, run_main
from .nodes import ConfigError, build, check
from .run_folder import LogFile, MaskedFormatter, RankZeroFilter, claim, finish
from .signature import signature

__all__ = [
    "ConfigError",
    "LogFile",
    "MaskedFormatter",
    "RankZeroFilter",
    "build",
    "check",
    "check_choices",
    "claim",
    "explained",
    "finish",
    "locked",
    "run_main",
    "signature",
]
