"""The only module that knows Hydra: what a configuration may say, and which folder a run owns."""

import difflib
import hashlib
import inspect
import json
import logging
import os
import subprocess
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from hydra.errors import ConfigCompositionException, InstantiationException, OverrideParseException
from omegaconf import DictConfig, ListConfig, OmegaConf

from .core.files import write_text

RANK = int(os.environ.get("RANK", 0))
# Keys that change where, how fast or how loudly a run goes, but not what comes out of it.
NOT_SEMANTIC = ("hydra", "name", "output_root", "run_dir", "device", "logger", "export", "micro_batch_size")
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "safetensors", "hydra-core", "omegaconf")


class ConfigError(ValueError):
    """A configuration that cannot run; the message is meant for the person who wrote it."""


class RankZeroFilter(logging.Filter):
    """Lets only the first process speak."""

    def filter(self, record: logging.LogRecord) -> bool:
        return RANK == 0


# Checking -------------------------------------------------------------------------------------------------------------


def check(cfg: DictConfig, entry: Callable) -> None:
    """Bind every node of a configuration to the signature of its `_target_`, the top level to `entry`'s.

    Raises:
        ConfigError: An unknown key, a missing one, a value of the wrong type, a target that does not exist.
    """
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise ConfigError(f"{missing[0]} has no value: set {missing[0]}=… on the command line.")
    _check_node(cfg, entry, "")


def _check_node(node: DictConfig, target: Callable, path: str) -> None:
    parameters = inspect.signature(target).parameters
    hints = _type_hints(target)
    for key in node:
        where = f"{path}.{key}".lstrip(".")
        if key.startswith("_") or (not path and key == "hydra"):
            continue
        if key not in parameters:
            raise ConfigError(_unknown(where, key, parameters, target))
        _check_value(node[key], hints.get(key, Any), where)
    required = [
        n for n, p in parameters.items() if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    absent = [name for name in required if name not in node]
    if absent and not node.get("_partial_"):
        raise ConfigError(f"{path or 'configuration'}: {_name(target)} needs {absent[0]!r}, which nothing sets.")


def _check_value(value: Any, hint: Any, where: str) -> None:
    if isinstance(value, DictConfig) and "_target_" in value:
        _check_node(value, _locate(value["_target_"], where), where)
    elif isinstance(value, DictConfig):
        for key in value:
            _check_value(value[key], Any, f"{where}.{key}")
    elif isinstance(value, ListConfig):
        for index, item in enumerate(value):
            _check_value(item, Any, f"{where}[{index}]")
    if not _fits(value, hint):
        raise ConfigError(f"{where} is {value!r} ({type(value).__name__}); expected {_hint_name(hint)}.")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a scalar or list may stand where a parameter is annotated with `hint`; unknown annotations allow all."""
    origin = typing.get_origin(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in typing.get_args(hint))
    if origin is typing.Literal:
        return value in typing.get_args(hint)
    if hint in (int, float, bool, str, type(None)):
        accepted = {float: (int, float)}.get(hint, (hint,))
        return isinstance(value, accepted) and (hint is bool or not isinstance(value, bool))
    if origin in (list, Sequence, tuple):
        return isinstance(value, ListConfig)
    if origin in (dict, Mapping):
        return isinstance(value, DictConfig)
    # A class or protocol: a node with a target may build it, a bare word or number may not.
    return not (inspect.isclass(hint) and isinstance(value, (bool, int, float, str))) or hint is object


def _unknown(where: str, key: str, known: Mapping, target: Callable) -> str:
    nearest = difflib.get_close_matches(key, known, 1)
    parent = where.removesuffix(key)
    hint = f"did you mean {parent}{nearest[0]}?" if nearest else f"it takes {sorted(known)}."
    return f"{where}: {_name(target)} has no option {key!r}; {hint}"


def _locate(target: str, where: str) -> Callable:
    from hydra.utils import get_object

    try:
        found = get_object(target)
    except ImportError as error:
        reason = f"{error.__cause__ or error}.{_extra(target)}"
        raise ConfigError(f"{where}._target_ is {target!r}, which cannot be imported: {reason}") from error
    if not callable(found):
        raise ConfigError(f"{where}._target_ is {target!r}, a {type(found).__name__}; expected a class or function.")
    return found


def _extra(target: str) -> str:
    extras = {"bitsandbytes": "optimizers", "prodigyopt": "optimizers", "schedulefree": "optimizers"}
    extra = extras.get(target.split(".")[0])
    return f' Install it with: pip install "diffsynth-hydra[{extra}]"' if extra else ""


def _type_hints(target: Callable) -> dict[str, Any]:
    try:
        return typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except (NameError, TypeError, AttributeError):  # annotations that only a type checker can resolve
        return {}


def _name(target: Callable) -> str:
    return getattr(target, "__qualname__", str(target))


def _hint_name(hint: Any) -> str:
    return getattr(hint, "__name__", str(hint)) if typing.get_origin(hint) is None else str(hint).replace("typing.", "")


# Run folders ----------------------------------------------------------------------------------------------------------


def signature(_root_: DictConfig) -> str:
    """Eight hex digits that change with whatever changes a run's results, and with nothing else."""
    config = OmegaConf.to_container(_root_, resolve=False)
    semantic = {key: value for key, value in config.items() if key not in NOT_SEMANTIC}
    if isinstance(semantic.get("dataset"), dict):
        semantic["dataset"].pop("num_workers", None)
    return hashlib.sha1(json.dumps(semantic, sort_keys=True).encode()).hexdigest()[:8]


OmegaConf.register_new_resolver("signature", signature, replace=True)


def claim(cfg: DictConfig) -> Path | None:
    """Make the run's folder this run's own and write down what runs in it; None if the run is already finished.

    Raises:
        ConfigError: The folder holds another experiment.
    """
    run_dir = Path(cfg.run_dir)
    finished = run_dir / "finished.json"
    if finished.exists():
        artefacts = "\n  ".join(json.loads(finished.read_text())["artefacts"])
        logging.info("%s is finished:\n  %s\nDelete the folder, or change name=…, to run it again.", run_dir, artefacts)
        return None
    if RANK == 0:
        _write_run_files(run_dir, cfg)
    return run_dir


def finish(run_dir: Path, artefacts: Sequence[Path]) -> None:
    """Mark the run as finished and name what it left."""
    if RANK == 0:
        write_text(run_dir / "finished.json", json.dumps({"artefacts": [str(path) for path in artefacts]}, indent=1))
        logging.info("Finished. %s holds:\n  %s", run_dir, "\n  ".join(str(path) for path in artefacts))


def build(cfg: DictConfig) -> dict[str, Any]:
    """The top level of a checked configuration with its nodes built; empty groups (`lora=none`) are left out.

    Raises:
        ConfigError: A constructor refuses its values.
    """
    nodes = {key: value for key, value in cfg.items() if value != {}}
    return {key: _build_node(node) if _is_node(node) else node for key, node in nodes.items()}


def _build_node(node: DictConfig | ListConfig) -> Any:
    from hydra.utils import instantiate

    try:
        return instantiate(node, _convert_="all")
    except InstantiationException as error:
        if not isinstance(error.__cause__, (ValueError, OSError)):
            raise
        where = str(error).rpartition("full_key: ")[2]
        raise ConfigError(f"{where}: {error.__cause__}") from error


def _is_node(value: Any) -> bool:
    return isinstance(value, (DictConfig, ListConfig))


def _write_run_files(run_dir: Path, cfg: DictConfig) -> None:
    saved = run_dir / "config.yaml"
    if saved.exists() and OmegaConf.load(saved)["signature"] != signature(cfg):
        raise ConfigError(f"{run_dir} holds a different experiment; set name=… or delete it.")
    resolved = OmegaConf.to_container(cfg, resolve=True)
    write_text(saved, OmegaConf.to_yaml(OmegaConf.create({"signature": signature(cfg), **resolved})))
    write_text(run_dir / "command.json", json.dumps(sys.argv))
    write_text(run_dir / "environment.json", json.dumps(environment(), indent=1))


def environment() -> dict[str, Any]:
    """The commit, uncommitted changes and package versions that a run was made with."""
    versions = {name: metadata.version(name) for name in PACKAGES}
    return {"commit": _git("rev-parse", "HEAD"), "diff": _git("diff", "HEAD"), "python": sys.version, **versions}


def _git(*arguments: str) -> str | None:
    try:
        here = Path(__file__).parent
        return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True, cwd=here).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or installed from a package
        return None


# Command line ---------------------------------------------------------------------------------------------------------


def run(main: Callable[[], None]) -> None:
    """Call a Hydra main; a configuration that cannot be composed ends in one clear line."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra then raises what it would otherwise print and swallow
    try:
        main()
    except (ConfigCompositionException, OverrideParseException) as error:
        sys.exit(f"error: {_explain(error)}")


@contextmanager
def explained() -> Iterator[None]:
    """Mistakes in a run's configuration or input end it in one clear line instead of a traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        if os.environ.get("DIFFSYNTH_TRACEBACK"):
            raise
        sys.exit(f"error: {error}\n(DIFFSYNTH_TRACEBACK=1 shows where this was raised)")


def _explain(error: ConfigCompositionException | OverrideParseException) -> str:
    """Hydra's message, and for an unknown key the nearest valid one."""
    message = str(error)
    if isinstance(error, OverrideParseException):
        return f"{error.override}: {message}"
    if not message.startswith("Could not override '"):
        return f"{message}\n{error.__cause__ or ''}".strip()
    path = message.split("'")[1]
    parent, _, key = path.rpartition(".")
    config = _chosen_groups()
    siblings = (OmegaConf.select(config, parent) if parent else config) or ()
    nearest = difflib.get_close_matches(key, siblings, 1)
    prefix = f"{parent}." if parent else ""
    hint = f"did you mean {prefix}{nearest[0]}?" if nearest else f"there are {sorted(siblings)}."
    return f"{path}: no such key {key!r}; {hint}"


def _chosen_groups() -> DictConfig:
    """The configuration with only the groups that the command line chooses, else the script's own."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    script = Path(sys.argv[0]).resolve()
    chosen = [word for word in sys.argv[1:] if "=" in word and (script.parent / "conf" / word.split("=")[0]).is_dir()]
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(script.parent / "conf"), version_base="1.3"):
        try:
            return compose(script.stem, overrides=chosen)
        except ConfigCompositionException:  # a sweep over groups, or one found through --config-dir
            return compose(script.stem)
