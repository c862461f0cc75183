"""The folder of a run: which run it belongs to, and the files that record how the run was started and finished."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.resolvers import oc

from ..core.advice import how_to_start_from
from ..core.files import remove_leftovers, write_text
from ..core.input_files import changed
from ..core.masking import masked
from .nodes import ConfigError
from .signature import bound_to_length, but_for_length, signature

RANK = int(os.environ.get("RANK", 0))
# Appended to a saved configuration, so that it runs again: train.py --config-path <run> --config-name config
REPLAY = {"hydra": {"run": {"dir": "${run_dir}"}, "output_subdir": None}}
RUN_FILES = ("config.yaml", "resolved.yaml", "command.json", "environment.json")
_begun_here: set[Path] = set()  # folders of runs that had no record before this process wrote it
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "safetensors", "hydra-core", "omegaconf")


class RankZeroFilter(logging.Filter):
    """Drops the log records of all processes but the first."""

    def filter(self, record: logging.LogRecord) -> bool:
        return RANK == 0


class MaskedFormatter(logging.Formatter):
    """Formats log records, tracebacks included, with credentials in URLs masked."""

    def format(self, record: logging.LogRecord) -> str:
        return masked(super().format(record))


def claim(cfg: DictConfig) -> Path | None:
    """Return the run's folder and write the run's configuration into it; return None if the run is already finished.

    Raises:
        ConfigError: The folder holds another experiment, or this one at a length from which it cannot go on, or the
            run is finished and a file that it read has changed since.
    """
    run_dir = Path(cfg.run_dir)
    if _is_finished_at(cfg):
        if change := _changed_input(run_dir):
            raise ConfigError(
                f"{run_dir} is finished, but {change}. Restore that file, or set name=… to train on what it is now."
            )
        artefacts = "\n  ".join(_finished(run_dir)["artefacts"])
        logging.info("%s is finished:\n  %s\nTo run it again, delete the folder or set name=….", run_dir, artefacts)
        if cfg.get("lora") and not cfg.get("template"):
            logging.info("To sample with an adapter: python generate.py lora_path=<file> prompt=<text>")
        return None
    if RANK == 0:
        _check_folder(run_dir, cfg)
        remove_leftovers(run_dir)
        if not (run_dir / "config.yaml").exists():
            _begun_here.add(run_dir.resolve())
        if _finished(run_dir) is None:  # otherwise `finish` writes them: the training may refuse to be extended
            _write_run_files(run_dir, cfg)
    return run_dir


def is_finished(cfg: DictConfig) -> bool:
    """Whether the run has finished at the length that `cfg` sets, and the files that it read are still the same."""
    return _is_finished_at(cfg) and _changed_input(Path(cfg.run_dir)) is None


def _changed_input(run_dir: Path) -> str | None:
    """Return which file that a finished run read has changed since; None if none has, or the run recorded none."""
    path = run_dir / "inputs.json"
    if not path.exists():
        logging.warning("%s has no inputs.json: whether its data and weights have changed is not known.", run_dir)
        return None
    groups = json.loads(path.read_text(encoding="utf-8"))
    return next((change for record in groups.values() if (change := changed(record))), None)


def _is_finished_at(cfg: DictConfig) -> bool:
    """Whether the run has finished at the length that `cfg` sets."""
    finished = _finished(Path(cfg.run_dir)) or {}
    return all(finished.get(name) == value for name, value in _identity(cfg).items())


def finish(cfg: DictConfig, artefacts: Sequence[Path]) -> None:
    """Mark the run as finished, write its report, and log the files that it made."""
    from ..report import write_report

    run_dir = Path(cfg.run_dir)
    if RANK == 0:
        if _finished(run_dir) is not None:  # it was shorter; see `claim`
            _write_run_files(run_dir, cfg)
        paths = [str(path) for path in [*artefacts, run_dir / "report.html"]]
        _write_finished(run_dir, {"artefacts": paths, **_identity(cfg)})
        write_report(run_dir)
        logging.info("Finished. %s holds:\n  %s", run_dir, "\n  ".join(paths))


def _finished(run_dir: Path) -> dict | None:
    """Return what `finish` recorded about a run; None if the run is not finished."""
    path = run_dir / "finished.json"
    if not path.exists():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    if "length" not in record:  # until 2026-11-30 only the artefacts were recorded; the rest is in the configuration
        record |= _identity(OmegaConf.load(run_dir / "config.yaml"))
    return record


def _write_finished(run_dir: Path, record: dict) -> None:
    write_text(run_dir / "finished.json", json.dumps(record, indent=1))


def _identity(cfg: DictConfig) -> dict[str, Any]:
    return {"length": _length(cfg), "but_for_length": but_for_length(cfg)}


def _length(cfg: DictConfig) -> dict[str, float]:
    """Return the length that `cfg` sets: `max_steps`, or `num_epochs` if that is None."""
    return {"num_epochs": cfg.num_epochs} if cfg.max_steps is None else {"max_steps": cfg.max_steps}


def _check_folder(run_dir: Path, cfg: DictConfig) -> None:
    """Check that the folder does not hold another experiment; log why a run does not extend a shorter one."""
    finished = _finished(run_dir)
    if finished and cfg.max_steps is not None and cfg.max_steps < finished["length"].get("max_steps", 0):
        steps = finished["length"]["max_steps"]
        raise ConfigError(f"{run_dir} is finished at step {steps}; set name=… for a run of max_steps={cfg.max_steps}.")
    if (run_dir / "config.yaml").exists():
        saved = OmegaConf.load(run_dir / "config.yaml")
        if signature(saved) != signature(cfg):
            differs_in_length_only = but_for_length(saved) == but_for_length(cfg)
            other = f"{run_dir} holds a different experiment; set name=… or delete the folder."
            raise ConfigError(_not_extended(run_dir, cfg) if differs_in_length_only else other)
        return
    for path in sorted(run_dir.parent.glob(f"{cfg.name}-*/finished.json")):
        finished = _finished(path.parent)
        other_length = finished["but_for_length"] == but_for_length(cfg) and finished["length"] != _length(cfg)
        if other_length and bound_to_length(cfg) is not None:
            logging.info("This run starts from step 0: %s", _not_extended(path.parent, cfg))


def _not_extended(run_dir: Path, cfg: DictConfig) -> str:
    return (
        f"{run_dir} holds the same run with another length and cannot be extended, because every step of "
        f"{bound_to_length(cfg)} depends on the length. {how_to_start_from(run_dir)}"
    )


def discard_refused(run_dir: Path, log: str) -> None:
    """Delete the folder of a refused run if this process began it, and it has only the files of `claim` and the log.

    Args:
        log: Name of Hydra's log file in the folder.
    """
    if run_dir.resolve() not in _begun_here:
        return
    files = {path.name: path for path in run_dir.iterdir()}
    if files.keys() <= {*RUN_FILES, log}:
        for handler in logging.root.handlers:
            handler.close()  # Windows cannot delete a log that is open
        for path in files.values():
            path.unlink()
        run_dir.rmdir()


def _write_run_files(run_dir: Path, cfg: DictConfig) -> None:
    replay = OmegaConf.to_yaml(OmegaConf.create(REPLAY))
    with _environment_unresolved():
        resolved = OmegaConf.to_yaml(cfg, resolve=True)
    texts = (
        OmegaConf.to_yaml(cfg) + replay,
        resolved,
        json.dumps(sys.argv),
        json.dumps(environment(), indent=1),
    )
    for name, text in zip(RUN_FILES, texts, strict=True):
        write_text(run_dir / name, masked(text))


@contextmanager
def _environment_unresolved() -> Iterator[None]:
    """Inside, `${oc.env:NAME}` resolves to itself: a variable may be a secret, and a replay reads it again."""
    OmegaConf.register_new_resolver("oc.env", _as_written, replace=True)
    try:
        yield
    finally:
        OmegaConf.register_new_resolver("oc.env", oc.env, replace=True)


def _as_written(name: str, *default: Any) -> str:
    return f"${{oc.env:{','.join([name, *('null' if value is None else str(value) for value in default)])}}}"


@cache  # later edits of the repository do not change the code that this process has loaded
def environment() -> dict[str, Any]:
    """Return the commit, the uncommitted changes, and the versions of Python and packages that this process uses."""
    versions = {name: metadata.version(name) for name in PACKAGES}
    return {"commit": _git("rev-parse", "HEAD"), "diff": _git("diff", "HEAD"), "python": sys.version, **versions}


def _git(*arguments: str) -> str | None:
    try:
        here = Path(__file__).parent
        return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True, cwd=here).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # there is no git, or no repository
        return None
