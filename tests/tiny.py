"""Run the entry scripts in miniature: a model with random weights, eight images of 32 × 32 pixels, a few steps."""

import csv
import json
import logging
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import cache
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import hydra
import numpy as np
import pytest
import torch
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig
from PIL import Image

from diffsynth.config import build, check, claim, finish
from diffsynth.core.process.locks import release_all
from diffsynth.core.process.signals import STOP_SIGNALS

ROOT = Path(__file__).parents[1]
COMPONENTS = {"dit": "transformer", "text_encoder": "text_encoder", "vae": "vae", "tokenizer": "tokenizer"}


# A model and a data set -----------------------------------------------------------------------------------------------


@cache
def model() -> Path:
    """The folder of a model repository like Qwen-Image's, with random weights; written once per session."""
    return _write_model(kept_folder() / "model")


@cache
def dataset() -> Path:
    """A folder of eight 32 × 32 images and metadata.csv; written once per session."""
    return write_dataset(kept_folder() / "dataset")


def write_dataset(folder: Path, count: int = 8, size: int = 32) -> Path:
    folder.mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    for number, pixels in enumerate(noise):
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return write_rows(folder, [{"image": f"{n}.png", "prompt": "a color emoji of " + "red " * n} for n in range(count)])


def write_rows(folder: Path, rows: list[dict]) -> Path:
    with (folder / "metadata.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return folder


def _write_model(folder: Path) -> Path:
    build_script = runpy.run_path(str(ROOT / "models" / "emoji" / "build.py"))
    build_script["init"](folder)
    transformer = build_script["transformer"]()
    for parameter in transformer.parameters():  # with its initial weights, its output is zero
        torch.nn.init.normal_(parameter, std=0.05)
    transformer.save_pretrained(folder / "transformer")
    return folder


def kept_folder() -> Path:
    _folders.append(TemporaryDirectory(prefix="diffsynth-test-"))
    return Path(_folders[-1].name)


_folders: list[TemporaryDirectory] = []  # each is removed at exit


def mostly_slow(values: Iterable, *default) -> list:
    """Mark all parameters of a test except `default` as slow; those run with `-m ""`."""
    return [value if value in default else pytest.param(value, marks=pytest.mark.slow) for value in values]


# Configurations -------------------------------------------------------------------------------------------------------


def model_overrides(folder: Path | None = None) -> list[str]:
    """Overrides that replace the configured model by the tiny one."""
    folder = folder or model()
    return [f"model.{name}.path={folder / part}" for name, part in COMPONENTS.items()]


def train_overrides(output_root: Path) -> list[str]:
    """Overrides of a run of two steps with four samples each, without validation and data report."""
    return [
        *model_overrides(),
        f"dataset.path={dataset()}",
        "dataset.metadata=metadata.csv",
        "dataset.height=32",
        "dataset.width=32",
        f"output_root={output_root}",
        "name=tiny",
        "device=cpu",
        "max_steps=2",
        "batch_size=4",
        "lora.rank=4",
        "logger.every=1",
        "optimizer.eps=1e-3",  # Adam magnifies rounding where gradients are near its eps
        "validation=none",
        "lr_scheduler=constant",
        "export.save_steps=null",
        "data_report.rows=0",
        "data_report.pictures=0",
    ]


def compose(entry: str, *overrides: str) -> DictConfig:
    """The configuration of `python <entry>.py <overrides>`; each choice of groups is composed once per session."""
    parsed = OverridesParser.create().parse_overrides([*overrides])
    choices = [override for override in parsed if _is_choice(override)]
    cfg = deepcopy(_composed(entry, *(override.input_line for override in choices)))
    ConfigLoaderImpl._apply_overrides_to_config([override for override in parsed if override not in choices], cfg)
    return cfg


def _is_choice(override: Override) -> bool:
    """Whether an override chooses an option of a group, or sets a key of Hydra such as its search path."""
    key = override.key_or_group
    return key.startswith("hydra.") or (ROOT / "conf" / key).is_dir()


@cache
def _composed(entry: str, *choices: str) -> DictConfig:
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return hydra.compose(entry, overrides=[*choices])


def schema(entry: str) -> Callable:
    """The class or function whose signature the configuration of an entry script is checked against."""
    from diffsynth.cache.run import CacheRun
    from diffsynth.plan.run import PlanRun
    from diffsynth.training.run import DistillRun, RewardRun, Run

    runs = {"train": Run, "distill": DistillRun, "reward": RewardRun, "plan": PlanRun, "make_cache": CacheRun}
    return runs.get(entry) or getattr(import_module(entry), entry)


def call(entry: str, cfg):
    """Check a configuration, build it, and call the entry script's function."""
    target, function = schema(entry), getattr(import_module(entry), entry)
    check(cfg, target)
    built = build(cfg)
    return function(**built) if target is function else function(target(**built))


# Runs -----------------------------------------------------------------------------------------------------------------


def train(output_root: Path, *overrides: str) -> Path:
    """Train in this process, as `python train.py` does, and return the run's folder."""
    return run(merged(train_overrides(output_root), overrides))


def run(overrides: list[str], entry: str = "train") -> Path:
    """Run `python train.py <overrides>`, or another entry script, in this process, and return the run's folder."""
    cfg = compose(entry, *overrides)
    try:
        run_dir = claim(cfg)
        if run_dir is not None:  # it is finished, if it was killed as late as that
            finish(cfg, call(entry, cfg))
    finally:
        release_all()
    return run_dir


def cache_overrides(folder: Path) -> list[str]:
    """Overrides of make_cache.py for the training of `train_overrides`."""
    kept = ("model.", "dataset.", "device=", "lora.")
    return [f"path={folder}", *(override for override in train_overrides(folder) if override.startswith(kept))]


def make_cache(folder: Path, *overrides: str):
    """Run `python make_cache.py` in this process."""
    return call("make_cache", compose("make_cache", *merged(cache_overrides(folder), overrides)))


def merged(overrides: list[str], others) -> list[str]:
    """Both lists of overrides, without those of the first whose key or group the second sets again."""
    keys = [override.split("=")[0] for override in others]
    kept = [o for o in overrides if not any(o.startswith((f"{key}=", f"{key}.")) for key in keys)]
    return [*kept, *others]


def command_line(monkeypatch, script: str, *arguments: str) -> None:
    """Run `python <script> <arguments>` in this process."""
    handlers, level = logging.root.handlers[:], logging.root.level
    listening = {number: signal.getsignal(number) for number in (getattr(signal, name) for name in STOP_SIGNALS)}
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # `run_main` replaces both streams
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    monkeypatch.setattr(sys, "argv", [str(ROOT / script), *arguments])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # otherwise `run_main` sets it for all later tests
    GlobalHydra.instance().clear()
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    finally:
        logging.root.handlers[:] = handlers
        logging.root.setLevel(level)
        for number, handler in listening.items():
            signal.signal(number, handler)


def complaint(monkeypatch, *arguments: str, script: str = "train.py") -> str:
    """What the command line says when it gives up."""
    with pytest.raises(SystemExit) as left:
        command_line(monkeypatch, script, *arguments)
    return str(left.value)


@contextmanager
def in_step(number: int, act: Callable[[], None]) -> Iterator[None]:
    """Call `act` in the middle of optimizer step `number`, counted from 1, of runs in this block."""
    from diffsynth.training.state import TrainingState

    backward = TrainingState.backward

    def act_and_go_on(state, losses):
        if state.step == number - 1 and not state.meter.losses:  # its first micro-batch
            act()
        backward(state, losses)

    with mock.patch.object(TrainingState, "backward", act_and_go_on):
        yield


class PowerCut(BaseException):
    """No code catches it, so no code cleans up."""


def cut_off(after: int, output_root: Path, *overrides: str) -> None:
    """Train in this process until a power cut, which comes when `after` steps have been taken and evaluated."""

    def cut():
        raise PowerCut

    try:
        with in_step(after + 1, cut):
            train(output_root, *overrides)
    except PowerCut:
        return
    raise AssertionError(f"There are no {after + 1} steps.")


def process(*command: str, status: int = 0, **environment: str) -> str:
    """Run a command in the repository and return what it wrote."""
    quiet = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [str(Path(sys.executable).parent / command[0]), *command[1:]],
        cwd=ROOT,
        env=os.environ | quiet | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        start_new_session=True,  # a group of its own
    )
    assert done.returncode == status, done.stdout
    return done.stdout


def metrics(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def weights(run_dir: Path) -> list[str]:
    """Names of the weight files that a run left."""
    return sorted(path.name for path in (run_dir / "weights").iterdir())
