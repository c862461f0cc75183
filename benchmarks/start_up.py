"""Measures how long the commands take to start.

    python benchmarks/start_up.py [python-with-DiffSynth-Studio]

It times `python train.py --help` against an empty Hydra app, in turns; the stages from command to first step on the
embedded model; and, with an interpreter that has DiffSynth-Studio installed, a one-step run against importing that.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from diffsynth.core.process.console import keep_console

ROOT = Path(__file__).parents[1]
EMPTY_APP = """
import hydra

@hydra.main(version_base="1.3", config_path=None)
def main(cfg): pass

main()
"""
TO_FIRST_STEP = [sys.executable, "train.py", "max_steps=1", "validation=none", "export.save_steps=null"]
DIFFSYNTH_STUDIO = "from diffsynth.pipelines.qwen_image import QwenImagePipeline; from diffsynth.diffusion import *"
STAGES = """
import os, sys, time
began = time.perf_counter()
def lap(name):
    global began
    now = time.perf_counter()
    print(f"{now - began:8.2f} s  {name}")
    began = now
import torch
lap("import torch")
import accelerate, peft, diffusers, transformers
lap("import accelerate, peft, diffusers, transformers")
from diffsynth.diffusion import training_module
from diffsynth.pipelines import qwen_image
from diffsynth.training import loop
lap("import the trainer and the networks it uses")
from hydra import compose, initialize_config_dir
from diffsynth.config import build, check
from diffsynth.training.run import Run
with initialize_config_dir(os.path.abspath("conf"), version_base="1.3"):
    cfg = compose("train", overrides=sys.argv[1:])
check(cfg, Run)
lap("compose and check the configuration")
objects = build(cfg)
lap("build data sets and objects")
objects["dataset"].scan()
lap("scan the data set")
pipe = objects["model"](device="cpu")
lap("build the networks on meta, check their files")
module = training_module.PipelineTrainingModule(pipe, objects["task"], objects["lora"]).load()
lap("read the weights, inject the LoRA")
from diffsynth.core.data import Sample
module([Sample(objects["dataset"][i], 0, i) for i in range(16)]).mean().backward()
lap("first forward and backward of 16 samples")
"""


def seconds(command: list[str], cwd: Path | str = ROOT) -> float:
    start = time.perf_counter()
    subprocess.run(command, cwd=cwd, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def compare_with_diffsynth_studio(python: str, pairs: int = 3) -> None:
    """Time our one-step run, from command to end, and the import of DiffSynth-Studio, in turns."""
    ours, theirs, ours_torch, their_torch = [], [], [], []
    for _ in range(pairs + 1):
        with tempfile.TemporaryDirectory() as folder:
            ours.append(seconds([*TO_FIRST_STEP, f"output_root={folder}"]))
        ours_torch.append(seconds([sys.executable, "-c", "import torch"]))
        theirs.append(seconds([python, "-c", DIFFSYNTH_STUDIO], cwd=Path(python).anchor))
        their_torch.append(seconds([python, "-c", "import torch"], cwd=Path(python).anchor))
    figures = [statistics.median(times[1:]) for times in (ours, theirs, ours_torch, their_torch)]
    print("our one-step run {:.1f} s, importing DiffSynth-Studio {:.1f} s".format(*figures[:2]))
    print("importing torch: {:.1f} s in our environment, {:.1f} s in DiffSynth-Studio's".format(*figures[2:]))


def main(pairs: int = 7) -> None:
    with tempfile.TemporaryDirectory() as folder:
        empty = Path(folder) / "empty.py"
        empty.write_text(EMPTY_APP)
        ours_and_empty = [
            (seconds([sys.executable, "train.py", "--help"]), seconds([sys.executable, str(empty), "--help"]))
            for _ in range(pairs + 1)
        ][1:]
    ours, theirs = (statistics.median(side) for side in zip(*ours_and_empty, strict=True))
    ratio = statistics.median(a / b for a, b in ours_and_empty)
    print(f"--help: ours {ours:.2f} s, empty Hydra app {theirs:.2f} s; ratio {ratio:.2f} over {pairs} pairs")
    print("From command to first step:", flush=True)
    subprocess.run([sys.executable, "-c", STAGES], cwd=ROOT, check=True)
    for python in sys.argv[1:]:
        compare_with_diffsynth_studio(python)


if __name__ == "__main__":
    keep_console()
    main()
