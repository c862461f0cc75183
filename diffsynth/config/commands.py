"""The configuration of a command that is not running, composed and checked as its script would do it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.errors import ConfigCompositionException, OverrideParseException
from omegaconf import OmegaConf

from .explain import explain
from .nodes import ConfigError, check
from .script import acting_as, compose
from .texts import as_typed


def configuration(script: Path, overrides: Sequence[str], entry: Callable) -> dict[str, Any]:
    """Return the configuration of `python <script> <overrides>` as plain values; a missing value is `???`.

    Args:
        script: The script, beside its folder `conf`.
        overrides: The words after it, as they are typed.
        entry: The function or dataclass whose parameters are the top level of the configuration.

    Raises:
        ConfigError: A key or an option does not exist, or a value cannot be read.
    """
    with acting_as(script, overrides), _one_kind_of_error():
        return OmegaConf.to_container(compose(as_typed(overrides, entry)), resolve=True)


def check_command(script: Path, overrides: Sequence[str], entry: Callable) -> None:
    """Check `python <script> <overrides>` as the script checks it before it starts; see `configuration`.

    Raises:
        ConfigError: The command has a mistake.
    """
    with acting_as(script, overrides), _one_kind_of_error():
        check(compose(as_typed(overrides, entry)), entry)


@contextmanager
def _one_kind_of_error() -> Iterator[None]:
    try:
        yield
    except (ConfigCompositionException, OverrideParseException) as error:
        raise ConfigError(explain(error)) from error
