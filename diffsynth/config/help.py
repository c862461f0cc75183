"""The text of `--help`: every option of every group, and every key of the configuration with its comment."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from .choices import BASE
from .script import compose, conf, script

SHARED_PREFIX = "_"  # files whose names begin with it are shared by options and are not options themselves


def help_text(overrides: Sequence[str] = ()) -> str:
    """Return the options of each group, with the first comment of their files, and each key with its value and comment.

    Hydra's own help searches its search path again for each group, which takes longer than everything else.
    """
    config = compose(overrides, return_hydra_config=True)
    choices = _choices(config, overrides)
    groups = "\n".join(_describe_group(group, chosen) for group, chosen in sorted(choices.items()))
    yaml = OmegaConf.to_yaml(OmegaConf.masked_copy(config, [key for key in config if key != "hydra"]))
    empty = {
        group: f"this option has no keys; those of another: {_how_to_list(group, choices[group])}"
        for group in choices
        if config.get(group) == {}
    }
    example = next(group for group in ("ema", "model") if group in choices)
    return (
        f"python {script()}.py group=option … key=value …\n\nGroups and their options (* marks the chosen ones)\n\n"
        f"{groups}\nAn option's keys are below if it is chosen. To list those of another, choose it: "
        f"{_how_to_list(example, choices[example])}.\nThe option is the file conf/<group>/<option>.yaml.\n\n"
        f"Configuration\n\n{_commented(yaml, _comments(overrides) | empty)}"
    )


def _how_to_list(group: str, chosen: Sequence[str]) -> str:
    """Return the command that lists the keys of an option that is not chosen."""
    other = next(name for name in reversed(option_names(group)) if name not in chosen)
    return f"python {script()}.py {group}={other} --help"


def _commented(yaml: str, comments: dict[str, str]) -> str:
    """Return a configuration whose lines end with the comments of their keys."""
    lines = ((line, comments.get(key)) for line, key in _keyed_lines(yaml))
    return "".join(f"{line}  # {comment}\n" if comment else f"{line}\n" for line, comment in lines)


def _comments(overrides: Sequence[str]) -> dict[str, str]:
    """Return the comments of the chosen YAML files by dotted key; of several, the one that Hydra merges last."""
    with hydra.initialize_config_dir(str(conf()), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        files = loader.compute_defaults_list(script(), list(overrides), RunMode.RUN).defaults
    comments = {}
    for file in files:
        if (path := conf() / f"{file.config_path}.yaml").is_file():
            for line, key in _keyed_lines(path.read_text(encoding="utf-8")):
                if comment := line.partition("  # ")[2]:
                    comments[".".join(filter(None, (file.package, key)))] = comment
    return comments


def _keyed_lines(yaml: str) -> Iterator[tuple[str, str | None]]:
    """Yield the lines of a YAML text, each with the dotted key that it sets; None for a line that sets none."""
    parents: list[tuple[int, str]] = []  # indentation and key
    for line in yaml.splitlines():
        match = re.match(r"( *)([\w.]+):(?: |$)", line)
        if match is None:
            yield line, None
            continue
        parents = [(indent, key) for indent, key in parents if indent < len(match[1])] + [(len(match[1]), match[2])]
        yield line, ".".join(key for _, key in parents)


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
    options = {name: _first_comment(_folder(group) / f"{name}.yaml") for name in option_names(group)}
    width = max(map(len, options), default=0)
    lines = [f"  {'*' if name in chosen else ' '} {name:{width}}  {options[name]}".rstrip() for name in options]
    return "\n".join([group, *lines, ""])


def option_names(group: str) -> list[str]:
    """Return the names of a group's options, those in its folders too."""
    folder = _folder(group)
    files = [path for path in folder.rglob("*.yaml") if not path.name.startswith(SHARED_PREFIX)]
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in files)


def _folder(group: str) -> Path:
    """Folder of a group's options; reward@evaluation_reward has those of reward."""
    return conf() / group.partition("@")[0]


def _first_comment(path: Path) -> str:
    """Return the comment at the top of a YAML file, after Hydra's `# @package` line."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("# @package")]
    return lines[0].removeprefix("# ") if lines and lines[0].startswith("# ") else ""
