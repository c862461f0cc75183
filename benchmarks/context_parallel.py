"""Measures the memory of a training step under context parallelism, where devices share the tokens of a sample.

    python benchmarks/context_parallel.py [--devices 2] [--blocks 2] [--pixels 1024] [--rank 32]

Some of Qwen-Image's 60 blocks (width 3072, random weights, bf16, adapters in fp32) run forward and backward on one
sample in several processes over gloo, and in one process that has all tokens. Bytes are those of live tensors in the
first process, which has the largest share of the tokens; they are counted as tensors are made and freed.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import QwenImageTransformer2DModel
from memory_options import Trained, sample
from torch.multiprocessing import spawn

from diffsynth.core.context_parallel import Devices, split_tokens
from diffsynth.core.live_bytes import LiveBytes
from diffsynth.core.process.console import keep_console
from diffsynth.pipelines.networks.qwen_image import use_joint_attention

OPTIONS = {"none": {}, "blocks": {"checkpointing": "blocks"}}


def measured(trained: Trained, inputs: dict) -> tuple[int, torch.Tensor]:
    """Return the most bytes that a step adds, and its gradients (N,)."""
    with LiveBytes() as live:
        live.watch([*trained.network.parameters(), *trained.network.buffers()])
        before = live.device.now
        gradients = trained.step(inputs)
    return live.device.peak - before, gradients


def work(rank: int, meeting: str, arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=arguments.devices)
    inputs = sample(arguments.pixels)
    for name, options in OPTIONS.items():
        torch.manual_seed(0)
        with init_empty_weights():
            shapes = QwenImageTransformer2DModel(num_layers=arguments.blocks).state_dict()
        base = {key: torch.randn(t.shape, dtype=torch.bfloat16) * 0.02 for key, t in shapes.items()}
        trained = Trained(options, base, arguments.blocks, arguments.rank)
        use_joint_attention(trained.network)
        whole, expected = measured(trained, inputs) if rank == 0 else (0, None)
        split_tokens(trained.network, Devices(torch.distributed.group.WORLD))
        part, gradients = measured(trained, inputs)
        torch.distributed.all_reduce(gradients)
        if rank == 0:
            apart = (gradients / arguments.devices - expected).norm() / expected.norm()
            print(f"| {name} | {whole / 1e6:.0f} | {part / 1e6:.0f} | {part / whole:.2f} | {apart:.1e} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"devices": 2, "blocks": 2, "pixels": 1024, "rank": 32}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    arguments = parser.parse_args()
    side = arguments.pixels // 16
    print(f"{arguments.blocks} blocks, {side * side} tokens of the picture over {arguments.devices} devices\n")
    print("| checkpointing | made in a step, one device, MB | each of several | ratio | gradients differ by |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        spawn(work, (str(Path(folder) / "meeting"), arguments), arguments.devices)


if __name__ == "__main__":
    keep_console()
    main()
