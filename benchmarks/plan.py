"""Compares planned with real memory of one training step, LoRA and full, on blocks of the real width on a CPU.

Each case has three peaks: that predicted by `diffsynth.plan`, that of live tensors in a real step, and that of the
process (its resident memory above what it had before the model). `python benchmarks/plan.py` prints a table; one case
runs as `python benchmarks/plan.py qwen_image lora blocks 512`.
"""

import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import nn
from torch.utils._pytree import tree_leaves

from diffsynth.core.data import Row, Sample
from diffsynth.core.live_bytes import LiveBytes
from diffsynth.core.memory import MemoryRecipe
from diffsynth.core.process.console import keep_console
from diffsynth.diffusion.adapters.lora import LoRA
from diffsynth.diffusion.loss import FlowMatchSFT
from diffsynth.diffusion.training_module import PipelineTrainingModule
from diffsynth.pipelines.flux2_image import Flux2ImagePipeline
from diffsynth.pipelines.qwen_image import QwenImagePipeline
from diffsynth.plan.footprint import static_footprint
from diffsynth.plan.meta_module import read
from diffsynth.plan.meta_pipeline import Architecture
from diffsynth.plan.rehearsal import Rehearsal
from diffsynth.training.absent import NoEMA

CONFIGS = {
    "qwen_image": {"_class_name": "QwenImageTransformer2DModel", "num_layers": 2},
    "flux2_klein_4b": {
        "_class_name": "Flux2Transformer2DModel",
        "num_layers": 1,
        "num_single_layers": 3,
        "num_attention_heads": 24,
        "joint_attention_dim": 7680,
        "guidance_embeds": False,
    },
}
# By default glibc keeps freed memory, up to 16 % of what these cases take; with this, large blocks are returned.
RETURNING = {"MALLOC_MMAP_THRESHOLD_": "131072"}
TARGETS = ["to_q", "to_k", "to_v", "to_add_out"]
OPTIMIZER = partial(torch.optim.AdamW, lr=1e-4)


def module_of(family: str, training: str, checkpointing: str) -> PipelineTrainingModule:
    kind = QwenImagePipeline if family == "qwen_image" else Flux2ImagePipeline
    pipe = kind.from_components(dit=Architecture(CONFIGS[family]), text_encoder=None, vae=None, tokenizer=None)
    lora = LoRA(rank=32, target_modules=TARGETS) if training == "lora" else None
    return PipelineTrainingModule(pipe, FlowMatchSFT(), lora, memory=MemoryRecipe(checkpointing=checkpointing))


def row_of(family: str, size: int) -> Row:
    """Return a row as a cache would have it, of an image of `size` pixels a side and a prompt."""
    row = {"image": Image.new("RGB", (size, size)), "prompt": ""}
    if family == "qwen_image":
        posi = {"prompt_emb": torch.zeros(1, 64, 3584).bfloat16(), "prompt_emb_mask": torch.ones(1, 64).bool()}
        latents = torch.zeros(1, 16, size // 8, size // 8)
    else:
        posi = {"prompt_emb": torch.zeros(1, 512, 7680).bfloat16()}
        latents = torch.zeros(1, 128, size // 16, size // 16)
    return Row(row, {"shared": {"input_latents": latents.bfloat16()}, "posi": posi, "nega": {}})


def predicted(family: str, training: str, checkpointing: str, size: int) -> int:
    """Return the planned bytes at the peak of a step."""
    rehearsal = Rehearsal(read(module_of(family, training, checkpointing), cached=True))
    passes = rehearsal.train([row_of(family, size)], accumulates=False)
    footprint = static_footprint(rehearsal.module, rehearsal.at_rest, rehearsal.unreached, OPTIMIZER, NoEMA())
    return replace(footprint, working=passes.peak).peak


def measured(family: str, training: str, checkpointing: str, size: int) -> dict[str, int]:
    """Return the bytes at the peak of the second step: of live tensors, and of this process."""
    warm_up()
    module, row, start = module_of(family, training, checkpointing), row_of(family, size), resident()
    module.pipe.device = torch.device("cpu")
    module.load(cached=True)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.02)
    optimizer = OPTIMIZER(module.trainable_parameters())
    step(module, optimizer, row)
    with LiveBytes() as live:
        live.watch([*module.parameters(), *module.buffers()])
        live.watch(leaf for leaf in tree_leaves(list(optimizer.state.values())) if isinstance(leaf, torch.Tensor))
        step(module, optimizer, row)
    return {"live": live.device.peak, "process": resident("VmHWM") - start}


def step(module: PipelineTrainingModule, optimizer, row: Row) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        losses = module([Sample(row, 0, 0)])
    losses.mean().backward()
    del losses
    optimizer.step()
    optimizer.zero_grad()


def warm_up() -> None:
    """Let libraries allocate memory that they keep, so that it does not count as the model's."""
    weight = torch.ones(512, 512, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        (weight @ weight).sum().backward()
    OPTIMIZER([weight]).step()


def resident(name: str = "VmRSS") -> int:
    """Return the resident bytes of this process; `VmHWM` is their peak, and unlike rusage's excludes the parent's."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024


def figures(case) -> dict[str, int]:
    """Measure one case in a process of its own, and return its three peaks."""
    command = [sys.executable, __file__, *map(str, case)]
    return json.loads(subprocess.check_output(command, env=os.environ | RETURNING))


def table(cases) -> None:
    print("| model | training | checkpointing | pixels | predicted | live tensors | process |")
    print("|---|---|---|---|---|---|---|")
    for case in cases:
        found = figures(case)
        plan, live, process = (found[name] / 1e9 for name in ("predicted", "live", "process"))
        cells = [*map(str, case), f"{plan:.2f} GB", *(f"{it:.2f} GB ({plan / it - 1:+.1%})" for it in (live, process))]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    keep_console()
    if sys.argv[1:]:
        *case, size = sys.argv[1:]
        print(json.dumps({**measured(*case, int(size)), "predicted": predicted(*case, int(size))}))
    else:
        table(itertools.product(CONFIGS, ("lora", "full"), ("none", "blocks"), (256, 512)))
