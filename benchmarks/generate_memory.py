"""Predicts the memory that generate.py takes for a released model: its own code runs on tensors without values.

    python benchmarks/generate_memory.py [--model qwen_image] [--size 1328] [--stream 40]

It needs neither weights nor a GPU. The figures are live tensors; a GPU takes more (docs/memory.md).
"""

import argparse
from pathlib import Path
from unittest import mock

import hydra
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from diffsynth.config import build
from diffsynth.core.live_bytes import LiveBytes
from diffsynth.core.memory import FrozenMemory
from diffsynth.core.process.console import keep_console
from diffsynth.diffusion.pipeline.generation import encode
from diffsynth.diffusion.pipeline.loaded_models import LoadedModels
from diffsynth.plan.meta_pipeline import meta_pipeline
from diffsynth.plan.rehearsal import with_values

GIB = 2**30
TOKENS = 256  # of a prompt


def model_of(name: str):
    """The partial that builds the pipeline of a model of conf/model."""
    with hydra.initialize_config_dir(str(Path(__file__).parents[1] / "conf"), version_base="1.3"):
        return build(hydra.compose("generate", overrides=[f"model={name}"]))["model"]


def measure(model, memory: FrozenMemory, size: int) -> list[float]:
    """GiB of the encoders with what they compute with, of the loaded network, of sampling, and in host memory."""
    pipe = meta_pipeline(model, TOKENS)
    request = {"prompt": "", "seed": 0, "height": size, "width": size, "num_inference_steps": 1}
    pipe.device, pipe.progress_bar = torch.device("cpu"), iter
    pipe.scheduler.sigma_grid = with_values(pipe.scheduler.sigma_grid)
    live = LiveBytes()
    with FakeTensorMode(allow_non_fake_inputs=True), live:
        models = LoadedModels(pipe, memory)
        models.load_encoders()
        inputs = encode(pipe, [request])
        encoding = live.device.peak
        models.load_network()
        loaded = live.device.now
        live.restart()  # streamed weights were counted as the device's while they were read
        with mock.patch.object(type(pipe.media), "postprocess"):  # it reads values
            pipe.sample([request], inputs)
    return [size / GIB for size in (encoding, loaded, live.device.peak, live.host.peak)]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="qwen_image")
    parser.add_argument("--size", type=int, default=1328)
    parser.add_argument("--stream", type=int, default=40)
    arguments = parser.parse_args()
    model = model_of(arguments.model)
    print("| `memory.storage` | `stream_blocks` | encoders | network and autoencoder | peak of sampling | host |")
    print("|---|---|---|---|---|---|")
    for blocks in (0, arguments.stream):
        for storage in ("none", "int8", "nf4"):
            found = measure(model, FrozenMemory(storage=storage, stream_blocks=blocks), arguments.size)
            print(f"| `{storage}` | {blocks} | " + " | ".join(f"{size:.1f}" for size in found) + " |", flush=True)


if __name__ == "__main__":
    keep_console()
    main()
