"""Measures the time of validation, logging and saving in a run at defaults, over the time of its training steps.

    python benchmarks/run_overhead.py            # one block of Qwen-Image's real width, 250 steps
    python benchmarks/run_overhead.py embedded   # the run of `python train.py`, with its pictures

Both times are of the same run: everything between two steps (validation, `metrics.jsonl`, checkpoints, exports), and
the steps. The block (width 3072, 256², LoRA rank 32, fp32) does not flatter the result: saving takes as long per
parameter as with the full model, while a step is 27 times shorter than at 1328².
"""

import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import hydra
from loop_overhead import Prepared, build

from diffsynth.config import build as build_nodes
from diffsynth.core.process.console import keep_console
from diffsynth.diffusion.loss import FlowMatchSFT
from diffsynth.diffusion.training_module import DiffusionTrainingModule
from diffsynth.training.accelerator import make_accelerator
from diffsynth.training.loop import launch_training_task
from diffsynth.training.meter import Meter

ROOT = Path(__file__).parents[1]
PARTS = ("checkpoint", "logger", "export", "validation")


class Block(DiffusionTrainingModule):
    """A training module with the pipeline and the objective of `loop_overhead`."""

    def __init__(self):
        super().__init__()
        self.pipe, self.task = build(), FlowMatchSFT()

    def forward(self, data):
        return self.task(self.pipe, **data)


@contextmanager
def measured():
    """Yield two lists of one number: the seconds between steps inside the block, and all seconds of the block."""
    between, seconds, paused = [0.0], [0.0], Meter.paused
    began = time.perf_counter()

    @contextmanager
    def timed(meter):
        start = time.perf_counter()
        with paused(meter):
            yield
        between[0] += time.perf_counter() - start

    with mock.patch.object(Meter, "paused", timed):
        yield between, seconds
    seconds[0] = time.perf_counter() - began


def compose(*overrides: str):
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return hydra.compose("train", overrides=list(overrides))


def train_block(folder: str) -> None:
    cfg = compose("model=qwen_image", "dataset=image_folder", "dataset.path=none", f"output_root={folder}")
    parts = build_nodes({name: cfg[name] for name in PARTS})
    launch_training_task(
        make_accelerator("cpu", "float32"),
        Prepared(),
        Block(),
        parts["export"],
        max_steps=parts["checkpoint"].every,
        max_grad_norm=cfg.max_grad_norm,
        checkpoint=parts["checkpoint"],
        logger=parts["logger"],
        validation=parts["validation"],
    )


def train_embedded(folder: str) -> None:
    sys.path.insert(0, str(ROOT))
    from diffsynth.training.run import Run
    from train import train

    train(Run(**build_nodes(compose(f"output_root={folder}"))))


def main() -> None:
    run = {"block": train_block, "embedded": train_embedded}[sys.argv[1] if len(sys.argv) > 1 else "block"]
    with tempfile.TemporaryDirectory() as folder, measured() as (between, seconds):
        run(folder)
    steps = seconds[0] - between[0]
    print(f"between steps {between[0]:.1f} s, steps and start {steps:.1f} s; ratio {between[0] / steps:.3f}")


if __name__ == "__main__":
    keep_console()
    main()
