"""The only package that knows Hydra."""

from .command_line import explained, run
from .nodes import ConfigError, build, check, with_arguments_of
from .run_folder import RankZeroFilter, claim, finish, signature

__all__ = [
    "ConfigError",
    "RankZeroFilter",
    "build",
    "check",
    "claim",
    "explained",
    "finish",
    "run",
    "signature",
    "with_arguments_of",
]
