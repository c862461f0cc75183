"""The only package that knows Hydra."""

from . import resolvers as resolvers
from .choices import check_choices
from .command_line import explained, run_main
from .nodes import ConfigError, build, check
from .run_folder import RankZeroFilter, claim, finish
from .signature import signature

__all__ = [
    "ConfigError",
    "RankZeroFilter",
    "build",
    "check",
    "check_choices",
    "claim",
    "explained",
    "finish",
    "run_main",
    "signature",
]
