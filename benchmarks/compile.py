"""Compares training steps of compiled and uncompiled blocks: their time, and the error of their gradients.

    python benchmarks/compile.py [--blocks 1] [--side 512] [--steps 6]

The model is blocks of Qwen-Image's real width (3072) in bf16 with a LoRA of rank 32; an image has SIDE pixels a side,
a prompt 64 tokens. A step is forward and backward without optimizer, with and without gradient checkpointing. Both
sides take turns in one process, so that a machine that slows down slows both; the ratio is the median over neighbouring
steps. The gradients of both are compared with uncompiled ones in fp32.
"""

import argparse
import statistics
import time

import torch
from diffusers import QwenImageTransformer2DModel

from diffsynth.core.memory.compile import compile_blocks
from diffsynth.core.process.console import keep_console
from diffsynth.diffusion.adapters.lora import LoRA
from diffsynth.diffusion.training_module import prepare_training
from diffsynth.pipelines.networks.qwen_image import use_joint_attention
from diffsynth.pipelines.qwen_image import QwenImagePipeline

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def build(blocks: int, dtype: torch.dtype) -> QwenImagePipeline:
    """Return a pipeline whose transformer has `blocks` blocks of the real width and a LoRA to train."""
    torch.manual_seed(0)
    pipe = QwenImagePipeline(torch_dtype=dtype)
    pipe.dit = QwenImageTransformer2DModel(num_layers=blocks).to(DEVICE, dtype)
    use_joint_attention(pipe.dit)
    prepare_training(pipe, [], LoRA(target_modules=["to_q", "to_k", "to_v", "to_out.0"]), seed=0)
    torch.manual_seed(1)
    for parameter in pipe.dit.parameters():
        if parameter.requires_grad:  # lora_B starts at zero, which makes the gradient of lora_A zero
            torch.nn.init.normal_(parameter, std=0.02)
    return pipe


def step(pipe: QwenImagePipeline, side: int, checkpointing: bool) -> tuple[float, torch.Tensor]:
    """Return the seconds of a forward and a backward pass, and the gradient (N,)."""
    generator, dtype = torch.Generator().manual_seed(2), pipe.torch_dtype
    latents = torch.randn(1, 16, side // 8, side // 8, generator=generator).to(DEVICE, dtype)
    text = torch.randn(1, 64, 3584, generator=generator).to(DEVICE, dtype)
    inputs = {"latents": latents, "prompt_emb": text, "prompt_emb_mask": torch.ones(1, 64, dtype=torch.bool)}
    trained = [parameter for parameter in pipe.dit.parameters() if parameter.requires_grad]
    pipe.dit.zero_grad()
    began = time.perf_counter()
    with torch.autocast(DEVICE, torch.bfloat16, enabled=dtype == torch.bfloat16):
        velocity = pipe.predict(
            torch.tensor([500.0], device=DEVICE), use_gradient_checkpointing=checkpointing, **inputs
        )
        velocity.float().pow(2).mean().backward()
    gradient = torch.cat([p.grad.flatten().float().cpu() for p in trained if p.grad is not None])  # waits for the GPU
    return time.perf_counter() - began, gradient


def compare(blocks: int, side: int, steps: int, checkpointing: bool) -> str:
    """Return a row of the table."""
    exact = step(build(blocks, torch.float32), side, checkpointing)[1]
    plain, compiled = build(blocks, torch.bfloat16), build(blocks, torch.bfloat16)
    backend = compile_blocks(compiled.dit)
    first = step(compiled, side, checkpointing)[0]
    pairs, gradients = [], ()
    for _ in range(steps):
        seconds, gradients = zip(*(step(pipe, side, checkpointing) for pipe in (plain, compiled)), strict=True)
        pairs.append(seconds)
    seconds = [statistics.median(taken) for taken in zip(*pairs[1:], strict=True)]
    ratio = statistics.median(ours / theirs for theirs, ours in pairs[1:])
    errors = [float((gradient - exact).norm() / exact.norm()) for gradient in gradients]
    cells = [*(f"{s:.2f}" for s in seconds), f"{ratio:.2f}", *(f"{error:.2e}" for error in errors), f"{first:.0f}"]
    return f"| {'blocks' if checkpointing else 'none'} | {' | '.join(cells)} | {backend.count} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=1)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--steps", type=int, default=6)
    given = parser.parse_args()
    print("| checkpointing | plain, s | compiled, s | ratio | plain's error | compiled's | first step, s | graphs |")
    print("|---|---|---|---|---|---|---|---|")
    for checkpointing in (False, True):
        print(compare(given.blocks, given.side, given.steps, checkpointing), flush=True)


if __name__ == "__main__":
    keep_console()
    main()
