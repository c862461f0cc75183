"""The text of `--help`: every option of every group, and every key of the configuration."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from .choices import BASE
from .script import compose, conf, script

SHARED_PREFIX = "_"  # files whose names begin with it are shared by options and are not options themselves


def help_text(overrides: Sequence[str] = ()) -> str:
    """Return the options of each group, with the first comment of their files, and the composed configuration.

    Hydra's own help searches its search path again for each group, which takes longer than everything else.
    """
    config = compose(overrides, return_hydra_config=True)
    groups = "\n".join(_describe_group(group, chosen) for group, chosen in sorted(_choices(config, overrides).items()))
    yaml = OmegaConf.to_yaml(OmegaConf.masked_copy(config, [key for key in config if key != "hydra"]))
    return (
        f"python {script()}.py group=option … key=value …\n\nGroups and their options (* marks the chosen ones)\n\n"
        f"{groups}\nConfiguration\n\n{yaml}"
    )


def _choices(config: DictConfig, overrides: Sequence[str]) -> dict[str, list[str]]:
    """Return the chosen options by group; Hydra does not list groups whose options add up."""
    lists = {o.key_or_group: o.value() for o in OverridesParser.create().parse_overrides(list(overrides))}
    adding_up = [path.parent.name for path in conf().glob(f"*/{BASE}.yaml") if path.parent.name in config]
    chosen = {group: [BASE, *_as_list(lists.get(group))] for group in adding_up}
    for group, choice in config.hydra.runtime.choices.items():
        if "hydra/" not in group:
            chosen[group] = [*chosen.get(group, ()), choice]
    return chosen


def _as_list(value: Any) -> list:
    return value if isinstance(value, list) else []


def _describe_group(group: str, chosen: Sequence[str]) -> str:
    folder = conf() / group
    files = [path for path in folder.rglob("*.yaml") if not path.name.startswith(SHARED_PREFIX)]
    options = {path.relative_to(folder).with_suffix("").as_posix(): _first_comment(path) for path in files}
    width = max(map(len, options), default=0)
    lines = [f"  {'*' if name in chosen else ' '} {name:{width}}  {options[name]}".rstrip() for name in sorted(options)]
    return "\n".join([group, *lines, ""])


def _first_comment(path: Path) -> str:
    """Return the comment at the top of a YAML file, after Hydra's `# @package` line."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("# @package")]
    return lines[0].removeprefix("# ") if lines and lines[0].startswith("# ") else ""
