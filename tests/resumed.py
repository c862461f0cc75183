"""Compare resumed runs with uninterrupted runs."""

import json
from functools import cache
from pathlib import Path

import tiny
from safetensors.torch import load_file
from torch.testing import assert_close

from diffsynth.training.checkpoint import Checkpoints, read_checkpoint

STEPS = ["max_steps=5", "checkpoint.every=2"]
EXACT = {"rtol": 0, "atol": 0}


@cache
def uninterrupted(*overrides: str) -> Path:
    """The folder of an uninterrupted run; trained once per session."""
    return tiny.train(tiny.kept_folder(), *STEPS, *overrides)


def metrics(run_dir: Path) -> list[dict]:
    """The logged lines without the metrics that depend on the machine."""
    machine = ("samples_per_second", "memory_gb")
    return [{name: n for name, n in line.items() if name not in machine} for line in tiny.metrics(run_dir)]


def losses(run_dir: Path) -> list[float]:
    return [line["loss"] for line in tiny.metrics(run_dir)]


def final_weights(run_dir: Path) -> dict:
    return load_file(run_dir / "weights" / tiny.weights(run_dir)[-1])


def kept(run_dir: Path) -> list[int]:
    return sorted(Checkpoints(run_dir / "checkpoints").steps())


def final_state(run_dir: Path) -> dict:
    """The content of the last checkpoint; tensors, such as the optimizer's and the average, as checksums."""
    return read_checkpoint(run_dir / "checkpoints" / "step-000005")


def pictures(run_dir: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run_dir / "samples").iterdir()}


def artefacts(run_dir: Path) -> list[str]:
    return [Path(path).name for path in json.loads((run_dir / "finished.json").read_text())["artefacts"]]


def assert_same_run(found: Path, expected: Path) -> None:
    assert found.name == expected.name
    assert metrics(found) == metrics(expected)
    assert tiny.weights(found) == tiny.weights(expected)
    assert_close(final_weights(found), final_weights(expected), **EXACT)
    assert final_state(found) == final_state(expected)
    assert artefacts(found) == artefacts(expected)
