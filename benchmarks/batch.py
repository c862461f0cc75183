"""Times a training step on a batch of 8 samples against one that accumulates 8 single samples.

    python benchmarks/batch.py [side in pixels, 256]

The model is one block of Qwen-Image's real width (3072) with LoRA rank 32 and AdamW, in fp32 and under bf16 autocast;
both sides take turns. On a CPU the arithmetic is the same, so that a batch saves only the fixed cost of each call.
"""

import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch
from loop_overhead import build

from diffsynth.core.data import collate
from diffsynth.core.process.console import keep_console
from diffsynth.diffusion.loss import FlowMatchSFT

SAMPLES, TURNS = 8, 3


def sample(number: int, side: int) -> dict:
    generator = torch.Generator().manual_seed(number)
    return {
        "input_latents": torch.randn(1, 16, side // 8, side // 8, generator=generator),
        "prompt_emb": torch.randn(1, 20, 3584, generator=generator),
        "prompt_emb_mask": torch.ones(1, 20, dtype=torch.bool),
    }


def build_step() -> Callable[[Sequence[dict], int, bool], float]:
    """Return a function that takes a training step over samples in micro-batches and returns its seconds."""
    pipe, task = build(), FlowMatchSFT()
    trained = [parameter for parameter in pipe.dit.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def step(samples: Sequence[dict], micro_batch_size: int, is_bf16: bool) -> float:
        start = time.perf_counter()
        for first in range(0, len(samples), micro_batch_size):
            batch = collate(samples[first : first + micro_batch_size])
            with torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
                (task(pipe, **batch).sum() / len(samples)).backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - start

    return step


def main() -> None:
    side = int(sys.argv[1]) if len(sys.argv) > 1 else 256
    step, samples = build_step(), [sample(number, side) for number in range(SAMPLES)]
    for is_bf16 in (False, True):
        turns = [(step(samples, 1, is_bf16), step(samples, SAMPLES, is_bf16)) for _ in range(TURNS + 1)]
        turns = turns[1:]  # the first one is a warm-up
        single, batched = (statistics.median(side) for side in zip(*turns, strict=True))
        ratio = statistics.median(one / all_ for one, all_ in turns)
        name = "bf16" if is_bf16 else "fp32"
        print(f"{name}: 8 singles {single:.2f} s, a batch of 8 {batched:.2f} s; the batch is {ratio:.2f} x as fast")


if __name__ == "__main__":
    keep_console()
    main()
