"""Compares storages of frozen weights (fp8, int8, nf4): memory, time and error, on a block of the real width.

    python benchmarks/storage.py [--pixels 512] [--turns 3] [--storages none fp8 …]

One of Qwen-Image's 60 blocks (width 3072, random normal weights, bf16) with a LoRA of rank 32 on all its linear layers
runs forward and backward on one image with checkpointed blocks. All storages take turns in one process. Loading is that
of the block from files, in one process per storage, as in load_memory.py: anonymous memory above what imports take.
"""

import argparse
import copy
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from load_memory import peak_of, write_checkpoint

from diffsynth.core.live_bytes import LiveBytes
from diffsynth.core.process.console import keep_console

STORAGES = ("none", "fp8", "fp8_cast", "int8", "nf4")


class Side:
    """A pipeline whose transformer has one storage; its adapter equals that of the others."""

    def __init__(self, dit: torch.nn.Module, storage: str):
        from diffsynth.core.memory.storage import store
        from diffsynth.diffusion.adapters.lora import LoRA
        from diffsynth.diffusion.training_module import prepare_training
        from diffsynth.pipelines.qwen_image import QwenImagePipeline

        self.pipe = QwenImagePipeline(torch_dtype=torch.bfloat16)
        self.pipe.dit = copy.deepcopy(dit) if storage == "none" else store(copy.deepcopy(dit), storage)
        self.bytes = sum(parameter.nbytes for parameter in self.pipe.dit.parameters())
        prepare_training(self.pipe, [], LoRA(rank=32, target_modules=r".*transformer_blocks.*"), seed=0)
        self.trained = [parameter for parameter in self.pipe.dit.parameters() if parameter.requires_grad]
        generator = torch.Generator().manual_seed(1)
        for parameter in self.trained:
            parameter.data += 0.01 * torch.randn(parameter.shape, generator=generator)
        self.seconds = []

    def step(self, inputs: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the prediction (B, C, h, w) and the adapter's gradient (N,)."""
        for parameter in self.trained:
            parameter.grad = None
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            predicted = self.pipe.predict(torch.tensor([500.0]), use_gradient_checkpointing=True, **inputs)
            loss = predicted.float().square().mean()
        loss.backward()
        self.seconds.append(time.perf_counter() - start)
        gradients = [parameter.grad.flatten() for parameter in self.trained if parameter.grad is not None]
        return predicted.detach().float(), torch.cat(gradients)


def build_block() -> torch.nn.Module:
    from accelerate import init_empty_weights
    from diffusers import QwenImageTransformer2DModel

    with init_empty_weights():
        dit = QwenImageTransformer2DModel(num_layers=1).to(torch.bfloat16)
    dit.to_empty(device="cpu")
    torch.manual_seed(0)
    for parameter in dit.parameters():
        torch.nn.init.normal_(parameter.data, std=0.02)
    return dit


def measure(storages: list[str], pixels: int, turns: int) -> dict[str, dict[str, float]]:
    dit, generator = build_block(), torch.Generator().manual_seed(2)
    inputs = {
        "latents": torch.randn(1, 16, pixels // 8, pixels // 8, generator=generator).bfloat16(),
        "prompt_emb": torch.randn(1, 60, 3584, generator=generator).bfloat16(),
        "prompt_emb_mask": torch.ones(1, 60, dtype=torch.bool),
    }
    sides = {storage: Side(dit, storage) for storage in storages}
    del dit
    answers = {storage: side.step(inputs) for storage, side in sides.items()}
    for _ in range(turns):
        for side in sides.values():
            side.step(inputs)
    plain, expected = sides["none"], answers["none"]
    return {storage: figures(side, answers[storage], plain, expected, inputs) for storage, side in sides.items()}


def figures(side: Side, answer, plain: Side, expected, inputs: dict) -> dict[str, float]:
    with LiveBytes() as live:
        live.watch([*side.pipe.dit.parameters(), *side.pipe.dit.buffers(), *inputs.values()])
        before = live.device.now
        side.step(inputs)
    times = zip(side.seconds[1:-1], plain.seconds[1:], strict=False)  # without the warm-up and the step just counted
    return {
        "bytes": side.bytes,
        "live": live.device.peak - before,
        "time": statistics.median(mine / theirs for mine, theirs in times),
        "error": ((answer[0] - expected[0]).norm() / expected[0].norm()).item(),
        "cosine": torch.cosine_similarity(answer[1].double(), expected[1].double(), dim=0).item(),
    }


def load(folder: Path, storage: str) -> None:
    """Load the block as training does, and print the peak memory as JSON."""
    import accelerate  # noqa: F401 - imports are not what is measured
    import diffusers
    import transformers  # noqa: F401

    from diffsynth.core.loader import ModelConfig, build_module, load_weights

    diffusers.QwenImageTransformer2DModel  # noqa: B018 - imported lazily
    if storage == "nf4":
        import bitsandbytes  # noqa: F401
    loaded = {}

    def work():
        files = ModelConfig(str(folder)).resolve()
        loaded["model"] = load_weights(build_module(files), files, torch.bfloat16, "cpu", storage)
        for parameter in loaded["model"].parameters():
            parameter.view(torch.uint8).max()  # reads mapped pages

    print(json.dumps(peak_of(work)["RssAnon"]))


def loading(storages: list[str]) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), layers=1)
        commands = {storage: [sys.executable, __file__, "--load", folder, storage] for storage in storages}
        return {
            storage: json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
            for storage, command in commands.items()
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pixels", type=int, default=512)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--storages", nargs="+", default=list(STORAGES), choices=STORAGES)
    parser.add_argument("--load", nargs=2, metavar=("FOLDER", "STORAGE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.load:
        return load(Path(arguments.load[0]), arguments.load[1])
    storages = ["none", *(storage for storage in arguments.storages if storage != "none")]
    loads = loading(storages)
    print(
        "| storage | weights | live in a step | step time | error of output | cosine of gradients | peak of loading |"
    )
    print("|---|---|---|---|---|---|---|")
    for storage, found in measure(storages, arguments.pixels, arguments.turns).items():
        print(
            f"| {storage} | {found['bytes'] / 1e6:.0f} MB | {found['live'] / 1e6:.0f} MB | {found['time']:.2f} × | "
            f"{found['error']:.4f} | {found['cosine']:.5f} | {loads[storage] / 1e6:.0f} MB |"
        )


if __name__ == "__main__":
    keep_console()
    main()
