"""What `--help` shows."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from .choices import START
from .script import compose, conf, script

PART = "_"  # the names of files that options are made of, and that are no options, begin with it


def help_text(overrides: Sequence[str] = ()) -> str:
    """Every option of every group with the phrase its file starts with, and the configuration as it is composed.

    Hydra's own help reads the search path anew for every group it lists, which takes longer than everything else.
    """
    config = compose(overrides, return_hydra_config=True)
    groups = "\n".join(_describe_group(group, chosen) for group, chosen in sorted(_choices(config, overrides).items()))
    yaml = OmegaConf.to_yaml(OmegaConf.masked_copy(config, [key for key in config if key != "hydra"]))
    return (
        f"python {script()}.py group=option … key=value …\n\nGroups (* is chosen)\n\n{groups}\nConfiguration\n\n{yaml}"
    )


def _choices(config: DictConfig, overrides: Sequence[str]) -> dict[str, list[str]]:
    """The options that are chosen, by group; Hydra does not count groups whose options add up."""
    lists = {o.key_or_group: o.value() for o in OverridesParser.create().parse_overrides(list(overrides))}
    adding_up = [path.parent.name for path in conf().glob(f"*/{START}.yaml") if path.parent.name in config]
    chosen = {group: [START, *_as_list(lists.get(group))] for group in adding_up}
    for group, choice in config.hydra.runtime.choices.items():
        if "hydra/" not in group:
            chosen[group] = [*chosen.get(group, ()), choice]
    return chosen


def _as_list(value: Any) -> list:
    return value if isinstance(value, list) else []


def _describe_group(group: str, chosen: Sequence[str]) -> str:
    folder = conf() / group
    files = [path for path in folder.rglob("*.yaml") if not path.name.startswith(PART)]
    options = {path.relative_to(folder).with_suffix("").as_posix(): _phrase(path) for path in files}
    width = max(map(len, options), default=0)
    lines = [f"  {'*' if name in chosen else ' '} {name:{width}}  {options[name]}".rstrip() for name in sorted(options)]
    return "\n".join([group, *lines, ""])


def _phrase(path: Path) -> str:
    """The comment a YAML file starts with, Hydra's package header aside."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("# @package")]
    return lines[0].removeprefix("# ") if lines and lines[0].startswith("# ") else ""
