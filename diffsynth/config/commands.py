"""The configuration of a command that is not running, composed and checked as its script would do it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException, OverrideParseException
from omegaconf import DictConfig, OmegaConf

from .explain import explain
from .nodes import ConfigError, check
from .script import acting_as, compose, compose_choices, conf
from .texts import as_typed


def configuration(script: Path, overrides: Sequence[str], entry: Callable, checked: bool = False) -> dict[str, Any]:
    """Return the configuration of `python <script> <overrides>` as plain values; a missing value is `???`.

    Args:
        script: The script, beside its folder `conf`.
        overrides: The words after it, as they are typed: options of groups, and keys that the configuration has.
        entry: The function or dataclass whose parameters are the top level of the configuration.
        checked: Whether to check it as the script does before it starts.

    Raises:
        ConfigError: An option does not exist, a value cannot be read, or the check finds a mistake.
    """
    with acting_as(script, overrides), _one_kind_of_error():
        words = as_typed(overrides, entry)
        choices = [word for word in words if (conf() / word.partition("=")[0]).is_dir()]
        cfg = _composed(choices)
        for override in OverridesParser.create().parse_overrides([word for word in words if word not in choices]):
            OmegaConf.update(cfg, override.key_or_group, override.value(), merge=False, force_add=override.is_add())
        if checked:
            check(cfg, entry)
        return OmegaConf.to_container(cfg, resolve=True)


def _composed(choices: Sequence[str]) -> DictConfig:
    """A copy of the configuration with these options."""
    whole = compose_choices(choices)
    chosen = whole.hydra.runtime.choices
    single = [word.partition("=") for word in choices if "[" not in word]
    if any(chosen.get(group) != option for group, _, option in single):
        compose(choices)  # it raises what `compose_choices` passes over
    return deepcopy(OmegaConf.masked_copy(whole, [key for key in whole if key != "hydra"]))


@contextmanager
def _one_kind_of_error() -> Iterator[None]:
    try:
        yield
    except (ConfigCompositionException, OverrideParseException) as error:
        raise ConfigError(explain(error)) from error
