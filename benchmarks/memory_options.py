"""Measures the memory and the time of a training step by memory option, on blocks of the real width.

    python benchmarks/memory_options.py [--blocks 4] [--pixels 512] [--rank 32] [--rounds 2]

Some of Qwen-Image's 60 blocks (width 3072, random weights, bf16, adapters in fp32) run forward and backward on one
sample, with all options in turn. Time is the process's CPU time. Bytes are those of live tensors, counted as they are
made and freed: tensors that wait in host memory apart from the rest, which would be on the device.
"""

import argparse
import time

import torch
from accelerate import init_empty_weights
from diffusers import QwenImageTransformer2DModel

from diffsynth.core.gradient import checkpoint_blocks, follow
from diffsynth.core.live_bytes import LiveBytes
from diffsynth.core.memory import MemoryRecipe
from diffsynth.core.memory.streaming import stream_blocks
from diffsynth.core.process.console import keep_console
from diffsynth.diffusion.adapters.lora import LoRA

TARGETS = [
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "add_q_proj",
    "add_k_proj",
    "add_v_proj",
    "img_mlp.net.2",
    "txt_mlp.net.2",
]
OPTIONS = {
    "none": {},
    "none, offloaded": {"offload_activations": True},
    "feed_forward": {"checkpointing": "feed_forward"},
    "attention": {"checkpointing": "attention"},
    "blocks, every other": {"checkpointing": "blocks", "checkpoint_every": 2},
    "blocks": {"checkpointing": "blocks"},
    "blocks, offloaded": {"checkpointing": "blocks", "offload_activations": True},
    "blocks, all streamed": {"checkpointing": "blocks", "stream_blocks": 1},
}


class Trained:
    """The blocks with adapters under one option; options share the base weights, except those that are streamed."""

    def __init__(self, options: dict, base: dict, blocks: int, rank: int):
        with init_empty_weights():
            self.network = QwenImageTransformer2DModel(num_layers=blocks)
        self.network.load_state_dict(base, assign=True)
        self.network.requires_grad_(False)
        layers = [name for name, _ in self.network.named_modules() if name.endswith(tuple(f".{t}" for t in TARGETS))]
        LoRA(rank=rank).add(self.network, layers, seed=0)
        for name, parameter in self.network.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter.data, std=0.01, generator=torch.Generator().manual_seed(0))
        if options.get("stream_blocks"):
            options = options | {"stream_blocks": blocks, "stream_buffers": min(2, blocks - 1)}
        self.recipe = recipe = MemoryRecipe(**options)
        follow(self.network, recipe.checkpointing, recipe.checkpoint_every, recipe.offload_activations)
        checkpoint_blocks(self.network, *recipe.inputs.values())
        self.stream = None
        if recipe.stream_blocks:
            self.stream = stream_blocks(self.network, blocks, recipe.stream_buffers, torch.device("cpu"))

    @property
    def buffers(self) -> list[torch.Tensor]:
        """The device's buffers for streamed weights."""
        return self.stream.buffers if self.stream else []

    def weights(self) -> int:
        """Return the bytes of frozen weights on the device."""
        streamed = {id(tensor) for tensor in self.stream.tensors} if self.stream else set()
        resident = sum(p.nbytes for p in self.network.parameters() if not p.requires_grad and id(p) not in streamed)
        return resident + sum(buffer.nbytes for buffer in self.buffers)

    def step(self, inputs: dict) -> torch.Tensor:
        """Return all gradients as one tensor (N,)."""
        trained = [p for p in self.network.parameters() if p.requires_grad]
        with torch.autocast("cpu", torch.bfloat16):
            loss = self.network(**inputs, return_dict=False)[0].float().pow(2).mean()
        found = torch.autograd.grad(loss, trained, allow_unused=True)  # nothing reads the last block's text
        return torch.cat([gradient.flatten() for gradient in found if gradient is not None])


def sample(pixels: int) -> dict:
    side, rng = pixels // 16, torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(1, side * side, 64, generator=rng).bfloat16(),
        "encoder_hidden_states": torch.randn(1, 60, 3584, generator=rng).bfloat16(),
        "timestep": torch.tensor([0.5]).bfloat16(),
        "img_shapes": [[(1, side, side)]],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"blocks": 4, "pixels": 512, "rank": 32, "rounds": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    arguments = parser.parse_args()
    with init_empty_weights():
        shapes = QwenImageTransformer2DModel(num_layers=arguments.blocks).state_dict()
    base = {name: torch.randn(t.shape, dtype=torch.bfloat16) * 0.02 for name, t in shapes.items()}
    trained = {name: Trained(options, base, arguments.blocks, arguments.rank) for name, options in OPTIONS.items()}
    inputs, peaks, gradients, seconds = sample(arguments.pixels), {}, {}, {name: [] for name in OPTIONS}
    for name, option in trained.items():
        with LiveBytes() as live:
            live.watch([*option.network.parameters(), *option.network.buffers(), *option.buffers])
            before = live.device.now
            gradients[name] = option.step(inputs)
        peaks[name] = {"device": live.device.peak - before, "host": live.host.peak}
    for _ in range(arguments.rounds):
        for name, option in trained.items():
            start = time.process_time()
            option.step(inputs)
            seconds[name].append(time.process_time() - start)
    print(f"{arguments.blocks} blocks, {arguments.pixels} pixels, rank {arguments.rank}, best of {arguments.rounds}\n")
    print("| option | frozen weights, MB | made in a step, MB | in host memory, MB | CPU time | gradients differ by |")
    print("|---|---|---|---|---|---|")
    for name, peak in peaks.items():
        ratio = min(seconds[name]) / min(seconds["none"])
        error = (gradients[name] - gradients["none"]).abs().max() / gradients["none"].abs().max()
        sizes = " | ".join(f"{n / 1e6:.0f}" for n in (trained[name].weights(), peak["device"], peak["host"]))
        print(f"| {name} | {sizes} | {ratio:.2f} × | {error:.1e} |")


if __name__ == "__main__":
    keep_console()
    main()
