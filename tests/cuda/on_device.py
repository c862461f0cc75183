"""Trainings in miniature on a GPU, for tests/cuda; `CUDA_TESTS_ON=cpu` tries those tests out on the CPU."""

import os
from pathlib import Path

import resumed
import tiny
import torch

DEVICE = os.environ.get("CUDA_TESTS_ON", "cuda")
ON = (f"device={DEVICE}", "deterministic=true")  # only so are a GPU's results equal to the last bit


def is_present() -> bool:
    """Whether tests of the GPU can run."""
    return DEVICE == "cpu" or torch.cuda.is_available()


def train(folder: Path, *overrides: str) -> Path:
    """Train on the GPU, and return the run's folder."""
    return tiny.train(folder, *ON, *overrides)


def adapters(folder: Path, *overrides: str) -> dict[str, torch.Tensor]:
    """The adapters after a training on the GPU."""
    return resumed.final_weights(train(folder, *overrides))


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def assert_near(found: dict[str, torch.Tensor], start: dict[str, torch.Tensor], expected: dict, least: float) -> None:
    """Both moved away from `start`, in directions whose cosine is at least this."""
    ways = [torch.cat([(to[name] - start[name]).flatten() for name in start]) for to in (found, expected)]
    assert torch.nn.functional.cosine_similarity(*ways, dim=0) >= least
