"""The folder of a run: which run it belongs to, and the files that record how the run was started and finished."""

import logging
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from importlib import metadata
from itertools import takewhile
from pathlib import Path
from threading import Timer
from typing import Any

import yaml
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf._utils import get_omega_conf_dumper
from omegaconf.resolvers import oc

from ..core.advice import how_to_start_from
from ..core.files import going_on_without, remove_leftovers, write_text
from ..core.input_files import changed, read_records
from ..core.json_text import read_json, to_json
from ..core.masking import in_strings, masked, masked_values
from ..core.process import locks, rank
from ..core.regular import require_regular
from .nodes import ConfigError
from .signature import bound_to_length, but_for_length, signature

# Appended to a saved configuration, so that it runs again: train.py --config-path <run> --config-name config
REPLAY = {"hydra": {"run": {"dir": "${run_dir}"}, "output_subdir": None}}
RUN_FILES = ("config.yaml", "resolved.yaml", "command.json", "environment.json")
# Folders that this process made, with those above them, or that had no record of a run before it wrote one.
_begun_here: set[Path] = set()
_names_before: dict[Path, set[str]] = {}  # what the folder of this process's run held before
_run_files: dict[Path, dict[str, str]] = {}  # text of each of RUN_FILES, for the folders that this process has claimed
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "safetensors", "hydra-core", "omegaconf")
# Guesses: git waits for a file system that may not answer, and a tracked file may be of any size.
GIT_SECONDS = 30
DIFF_BYTES = 4 * 2**20


class RankZeroFilter(logging.Filter):
    """Drops the log records of all processes but the first."""

    def filter(self, record: logging.LogRecord) -> bool:
        return rank() == "0"


class MaskedFormatter(logging.Formatter):
    """Formats log records, tracebacks included, with credentials in URLs masked."""

    def format(self, record: logging.LogRecord) -> str:
        return masked(super().format(record))


class LogFile(logging.FileHandler):
    """A log file that may be on a full disk: a line on stderr says so once, and the next line tries again.

    Args:
        filename: Path of the file, which the first line makes; lines are appended to it.
    """

    def __init__(self, filename: str):
        super().__init__(filename, encoding="utf-8", errors="backslashreplace", delay=True)
        self.has_failed = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - the name in logging
        """Say on stderr that the disk takes no lines; other errors are those of the call that logs."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self.has_failed:
            self.has_failed = True
            print(f"{self.baseFilename} is not written, and the run goes on without it: {error}", file=sys.stderr)


class NewFolder(Callback):
    """Hydra callback that notes what the run's folder holds; if the run is refused, it holds no more afterwards."""

    def on_run_start(self, config: DictConfig, **_: object) -> None:
        folder = Path(config.hydra.run.dir).resolve()
        if rank() == "0":
            _begun_here.update(path for path in (folder, *folder.parents) if not path.exists())
            if folder.is_dir():
                _names_before[folder] = set(os.listdir(folder))


def claim(cfg: DictConfig) -> Path | None:
    """Lock the run's folder, write the run's configuration into it, and return it; return None if the run is finished.

    `cfg.run_dir`, whose signature is a hash of the whole configuration, becomes a plain path, so that it stays the same
    whatever becomes of the configuration later.

    Raises:
        ConfigError: The folder holds another experiment, or this one at a length from which it cannot go on, or the
            run is finished and a file that it read has changed since.
        FolderInUse: Another process runs this run.
    """
    run_dir = Path(cfg.run_dir)
    if rank() == "0" and not _is_finished_at(cfg):
        locks.hold(run_dir)
    if _is_finished_at(cfg):  # perhaps by the process that has just unlocked it
        locks.release(run_dir)
        if change := _changed_input(run_dir):
            raise ConfigError(
                f"{run_dir} is finished, but {change}. Restore that file, or set name=… to train on what it is now."
            )
        artefacts = "\n  ".join(_finished(run_dir)["artefacts"])
        logging.info("%s is finished:\n  %s\nTo run it again, delete the folder or set name=….", run_dir, artefacts)
        if cfg.get("lora") and not cfg.get("template"):
            logging.info("To sample with an adapter: python generate.py lora_path=<file> prompt=<text>")
        return None
    if rank() == "0":
        _check_folder(run_dir, cfg)
        remove_leftovers(run_dir)
        if not (run_dir / "config.yaml").exists():
            _begun_here.add(run_dir.resolve())
        _run_files[run_dir] = _texts_of(cfg)
        if _finished(run_dir) is None:  # otherwise `finish` writes them: the training may refuse to be extended
            _write_run_files(run_dir)
    cfg.run_dir = str(run_dir)
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
    groups = read_records(path)
    return next((change for record in groups.values() if (change := changed(record))), None)


def _is_finished_at(cfg: DictConfig) -> bool:
    """Whether the run has finished at the length that `cfg` sets."""
    finished = _finished(Path(cfg.run_dir)) or {}
    return all(finished.get(name) == value for name, value in _identity(cfg).items())


def finish(cfg: DictConfig, artefacts: Sequence[Path]) -> None:
    """Write the report of a claimed run, mark the run as finished, unlock it, and log the files that it made."""
    from ..report import write_report

    run_dir = Path(cfg.run_dir)
    if rank() == "0":
        if _finished(run_dir) is not None:  # it was shorter; see `claim`
            _write_run_files(run_dir)
        paths = [str(path) for path in [*artefacts, run_dir / "report.html"]]
        finished = {"artefacts": paths, **_identity(cfg)}
        with going_on_without(run_dir / "report.html"):
            write_report(run_dir, finished)
        _write_finished(run_dir, finished)  # last: a run that is marked as finished is never looked at again
        locks.release(run_dir)
        logging.info("Finished. %s holds:\n  %s", run_dir, "\n  ".join(paths))


def _finished(run_dir: Path) -> dict | None:
    """Return what `finish` recorded about a run; None if the run is not finished."""
    record = read_json(run_dir / "finished.json")
    if record and "length" not in record:  # until 2026-11-30 the rest was in the configuration only
        record |= _identity(_saved_config(run_dir))
    return record if _is_record(record) else None  # a damaged one: the run finishes again


def _is_record(record: dict) -> bool:
    """Whether a dict is what `finish` writes."""
    length = record.get("length")
    numbers = length.values() if isinstance(length, dict) else [None]
    paths = record.get("artefacts")
    are_paths = isinstance(paths, list) and all(isinstance(path, str) for path in paths)
    return are_paths and all(isinstance(number, int | float) for number in numbers) and "but_for_length" in record


def _saved_config(run_dir: Path) -> DictConfig:
    """Return the configuration that a run was started with.

    Raises:
        ConfigError: The file is damaged.
    """
    path = run_dir / "config.yaml"
    try:
        require_regular(path)
        saved = OmegaConf.load(path)
        _ = saved["run_dir"], signature(saved)
    except Exception as error:  # of the YAML library, of OmegaConf, of Python: whatever the file's content leads to
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(
            f"{path} is no configuration of a run: {reason}; delete that file to go on with the run, or set name=…."
        ) from error
    return saved


def _write_finished(run_dir: Path, record: dict) -> None:
    write_text(run_dir / "finished.json", to_json(record, indent=1))


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
        saved = _saved_config(run_dir)
        if signature(saved) != signature(cfg):
            differs_in_length_only = but_for_length(saved) == but_for_length(cfg)
            other = f"{run_dir} holds a different experiment; set name=… or delete the folder."
            raise ConfigError(_not_extended(run_dir, cfg) if differs_in_length_only else other)
        return
    for path in sorted(run_dir.parent.glob(f"{cfg.name}-*/finished.json")):
        finished = _finished(path.parent)
        if finished is None or finished["but_for_length"] != but_for_length(cfg):
            continue
        if finished["length"] != _length(cfg) and bound_to_length(cfg) is not None:
            logging.warning("This run starts from step 0: %s", _not_extended(path.parent, cfg))


def _not_extended(run_dir: Path, cfg: DictConfig) -> str:
    return (
        f"{run_dir} holds the same run with another length and cannot be extended, because every step of "
        f"{bound_to_length(cfg)} depends on the length. {how_to_start_from(run_dir)}"
    )


def discard_refused(run_dir: Path, log: str) -> None:
    """Delete what a refused run left: the folder that this process began, or the log that it began in another's folder.

    It stays if it has more than the files of `claim` and the log.

    The folders above it that this process made are deleted too if they are empty.

    Args:
        log: Name of Hydra's log file in the folder.
    """
    began, before = run_dir.resolve() in _begun_here, _names_before.get(run_dir.resolve())
    if not began and before is None:
        return
    locks.release(run_dir)
    new = set(os.listdir(run_dir)) - (set() if began else before)
    if new <= ({*RUN_FILES, log} if began else {log}):
        for handler in logging.root.handlers:
            handler.close()  # Windows cannot delete a log that is open
        for name in new:
            (run_dir / name).unlink()
        if not began:
            return
        run_dir.rmdir()
        with suppress(OSError):  # another run has begun below it
            for parent in takewhile(_begun_here.__contains__, run_dir.resolve().parents):
                parent.rmdir()


def _write_run_files(run_dir: Path) -> None:
    for name, text in _run_files[run_dir].items():
        write_text(run_dir / name, text)


def _texts_of(cfg: DictConfig) -> dict[str, str]:
    """Return the text of each of `RUN_FILES`."""
    replay = OmegaConf.to_yaml(OmegaConf.create(REPLAY))
    with _environment_unresolved():
        resolved = masked_yaml(cfg, resolve=True)
    texts = (
        masked_yaml(cfg) + replay,
        resolved,
        to_json(masked_values(sys.argv)),
        to_json(in_strings(masked, environment()), indent=1),
    )
    return dict(zip(RUN_FILES, texts, strict=True))


def masked_yaml(cfg: DictConfig, resolve: bool = False) -> str:
    """Return a configuration as `OmegaConf.to_yaml` does, with the credentials in its values masked.

    The masked values are no `DictConfig` in between, which would refuse defaults of `${oc.env:…}` that it cannot parse.
    """
    values = masked_values(OmegaConf.to_container(cfg, resolve=resolve, enum_to_str=True))
    return yaml.dump(values, allow_unicode=True, sort_keys=False, Dumper=get_omega_conf_dumper())


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
    return {
        "commit": _git("rev-parse", "HEAD"),
        "diff": _git("diff", "--no-ext-diff", "--no-textconv", "HEAD"),
        "python": sys.version,
        **versions,
    }


def _git(*arguments: str) -> str | None:
    """Return what git says of this program's repository; None if there is no git, no repository, or no answer in time.

    Bytes that are no UTF-8 are replaced, and text beyond `DIFF_BYTES` is cut off.
    """
    command = ["git", "--no-pager", *arguments]
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    try:
        with subprocess.Popen(command, cwd=Path(__file__).parent, **quiet) as process:
            timer = Timer(GIT_SECONDS, process.kill)
            timer.start()
            text = process.stdout.read(DIFF_BYTES + 1)
            is_cut_off = len(text) > DIFF_BYTES
            if is_cut_off:
                process.kill()
            failed = process.wait() and not is_cut_off
            timer.cancel()
    except OSError:
        return None
    text = text[:DIFF_BYTES].decode("utf-8", errors="replace").strip()
    return None if failed else f"{text}\n… cut off after {DIFF_BYTES} bytes" if is_cut_off else text
