"""Times making a cache, against DiffSynth-Studio, and reading one.

    python benchmarks/cache.py make PYTHON   # images per second, bytes per sample; PYTHON has DiffSynth-Studio
    python benchmarks/cache.py read          # samples per second of one worker
    python benchmarks/cache.py step          # reading against a step on one of the transformer's 60 blocks

`make` runs the real Qwen-Image autoencoder (random weights, bf16) on 256 x 256 images; both sides take turns, twice,
each in a process of its own, and imports are not timed. DiffSynth-Studio's side has no text encoder; ours runs that of
the embedded model, which costs next to nothing.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from diffsynth.core.process.console import keep_console

IMAGES, SIDE = 16, 256
THREADS = os.cpu_count()
DIFFSYNTH_STUDIO = """
import os, sys, time, json, glob, accelerate, torch
from diffsynth.core import UnifiedDataset
from diffsynth.diffusion import DiffusionTrainingModule, ModelLogger, launch_data_process_task
from diffsynth.models.qwen_image_vae import QwenImageVAE
from diffsynth.pipelines.qwen_image import QwenImagePipeline

folder, out, side = sys.argv[1], sys.argv[2], int(sys.argv[3])
torch.set_num_threads(os.cpu_count())

class Module(DiffusionTrainingModule):
    def __init__(self):
        super().__init__()
        self.pipe = QwenImagePipeline(device="cpu", torch_dtype=torch.bfloat16)
        self.pipe.vae = QwenImageVAE().to(torch.bfloat16)
        self.pipe = self.split_pipeline_units("sft:data_process", self.pipe, None, "dit")
        self.switch_pipe_to_training_mode(self.pipe, task="sft:data_process")

    def forward(self, data):
        shared = {"input_image": data["image"], "height": side, "width": side, "cfg_scale": 1, "rand_device": "cpu",
                  "edit_image_auto_resize": True, "zero_cond_t": False, "use_gradient_checkpointing": False,
                  "use_gradient_checkpointing_offload": False}
        inputs = (shared, {"prompt": data["prompt"]}, {"negative_prompt": ""})
        for unit in self.pipe.units:
            inputs = self.pipe.unit_runner(unit, self.pipe, *inputs)
        return inputs

class Args:
    dataset_num_workers, cpu_offload_split_threshold = 0, None
    enable_model_cpu_offload = enable_optimizer_cpu_offload = False

operator = UnifiedDataset.default_image_operator(base_path=folder, height=side, width=side)
dataset = UnifiedDataset(base_path=folder, metadata_path=folder + "/metadata.csv", main_data_operator=operator,
                         data_file_keys=["image"])
module, accelerator = Module(), accelerate.Accelerator(cpu=True)
start = time.perf_counter()
launch_data_process_task(accelerator, dataset, module, ModelLogger(out), args=Args())
seconds = time.perf_counter() - start
sizes = [os.path.getsize(file) for file in glob.glob(out + "/**/*.pth", recursive=True)]
print(json.dumps({"seconds": seconds, "bytes": sum(sizes) / len(sizes)}))
"""


def write_pictures(folder: Path, count: int) -> None:
    import numpy as np
    from PIL import Image

    rows = ["image,prompt"]
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
        rows.append(f"{number}.png,a color emoji of red apple")
    (folder / "metadata.csv").write_text("\n".join(rows))


def write_autoencoder(folder: Path) -> None:
    import torch
    from diffusers import AutoencoderKLQwenImage

    AutoencoderKLQwenImage().to(torch.bfloat16).save_pretrained(folder)


def make_ours(folder: str, out: str, vae: str) -> dict[str, float]:
    """Return the seconds of making a cache, with reading its networks from disk, and the bytes per sample in it."""
    from diffsynth.cache.make import launch_data_process_task
    from diffsynth.core.data import UnifiedDataset
    from diffsynth.core.loader import ModelConfig
    from diffsynth.diffusion.adapters.lora import LoRA
    from diffsynth.diffusion.loss import FlowMatchSFT
    from diffsynth.diffusion.training_module import PipelineTrainingModule
    from diffsynth.pipelines.qwen_image import QwenImagePipeline
    from diffsynth.training.accelerator import make_accelerator

    accelerator = make_accelerator("cpu", "bfloat16")
    parts = {"dit": "transformer", "text_encoder": "text_encoder", "tokenizer": "tokenizer"}
    configs = {name: ModelConfig(path=f"models/emoji/{part}") for name, part in parts.items()}
    pipe = QwenImagePipeline.from_components(**configs, vae=ModelConfig(path=vae))
    module = PipelineTrainingModule(pipe, FlowMatchSFT(), LoRA(target_modules=["to_q"]))
    dataset = UnifiedDataset.from_folder(folder, height=SIDE, width=SIDE)
    dataset.scan()
    start = time.perf_counter()
    launch_data_process_task(accelerator, dataset, module, out)
    seconds = time.perf_counter() - start
    size = sum(file.stat().st_size for file in Path(out).rglob("*.safetensors"))
    return {"seconds": seconds, "bytes": size / dataset.size}


def compare_making(python: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_pictures(Path(folder), IMAGES)
        write_autoencoder(Path(folder) / "vae")
        (Path(folder) / "studio.py").write_text(DIFFSYNTH_STUDIO)
        sides: dict[str, list[dict]] = {"ours": [], "DiffSynth-Studio": []}
        for turn in range(2):
            ours = [sys.executable, __file__, "make_ours", folder, f"{folder}/ours-{turn}", f"{folder}/vae"]
            studio = [python, f"{folder}/studio.py", folder, f"{folder}/studio-{turn}", str(SIDE)]
            for name, command in (("ours", ours), ("DiffSynth-Studio", studio)):
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                sides[name].append(json.loads(done.stdout.splitlines()[-1]))
    seconds, size = (
        {name: statistics.mean(run[key] for run in runs) for name, runs in sides.items()}
        for key in ("seconds", "bytes")
    )
    for name in sides:
        print(f"{name}: {IMAGES / seconds[name]:.2f} images/s, {size[name] / 1e3:.0f} kB per sample")
    faster, smaller = (found["DiffSynth-Studio"] / found["ours"] for found in (seconds, size))
    print(f"{faster:.2f} x as fast, {smaller:.1f} x as small")


def write_cache(folder: Path, count: int, tokens: int) -> None:
    """Write a cache of samples like Qwen-Image's at 256 x 256, each with its own prompt of `tokens` tokens."""
    import torch

    from diffsynth.core.data.cache import FORMAT, CacheIndex, ShardWriter

    index = CacheIndex(folder, writable=True)
    index.match_shards()
    records = []
    with ShardWriter(index.shard_folder) as writer:
        for n in range(count):
            latents = torch.randn(1, 16, SIDE // 8, SIDE // 8).bfloat16()
            writer.add(f"image{n}", {"input_latents": latents})
            text = {"prompt_emb": torch.randn(1, tokens, 3584).bfloat16()}
            writer.add(f"text{n}", text | {"prompt_emb_mask": torch.ones(1, tokens).bool()})
            row = {"image": {"unread": [SIDE, SIDE, ""]}, "prompt": "a prompt"}
            runs = [(f"image{n}", "shared"), (f"text{n}", "posi")]
            records.append((SIDE, SIDE, {"weights": [1.0], "variants": {"": {"row": row, "runs": runs}}}))
    index.match_shards()
    about = {"captions": [], "variants": [[[1.0], [""]]], "by_size": True, "parts": [[count, "1"]], "left_out": []}
    index.put(records, {"format": FORMAT, "made_of": {}, **about})
    index.close()


def measure_reading(count: int = 4000) -> None:
    """Print samples per second of one process in random order, from the page cache: only mapped, and also copied."""
    import torch

    torch.set_num_threads(1)  # as in a DataLoader's worker
    for tokens in (20, 60):
        with tempfile.TemporaryDirectory() as folder:
            write_cache(Path(folder), count, tokens)
            size = sum(file.stat().st_size for file in Path(folder).rglob("*.safetensors")) / count
            read_all(folder, count, copy=True)  # maps all pages
            rates = [(read_all(folder, count, copy=False), read_all(folder, count, copy=True)) for _ in range(3)]
            mapped, copied = (statistics.median(side) for side in zip(*rates, strict=True))
            rates = f"{mapped:.0f} samples/s mapped, {copied:.0f} copied"
            print(f"{tokens} tokens, {size / 1e3:.0f} kB per sample: {rates}")


def read_all(folder: str, count: int, copy: bool) -> float:
    """Read `count` samples and return samples per second."""
    from diffsynth.core.data import CachedDataset

    dataset = CachedDataset(folder)
    order = dataset.order(8, seed=0)
    addresses = [order.sample(position) for position in range(count)]
    start = time.perf_counter()
    for address in addresses:
        made = dataset.sample(address, seed=0)[0].made
        if copy:
            _ = [tensor.clone() for side in made.values() for tensor in side.values()]
    return count / (time.perf_counter() - start)


def compare_with_step() -> None:
    """Print the time of reading a step's samples over that of the step, on one block of Qwen-Image's real width."""
    from batch import SAMPLES, build_step

    from diffsynth.core.data import CachedDataset

    step, shares = build_step(), []
    with tempfile.TemporaryDirectory() as folder:
        write_cache(Path(folder), 16 * SAMPLES, tokens=60)
        dataset = CachedDataset(folder)
        order = dataset.order(SAMPLES, seed=0)
        for turn in range(4):
            start = time.perf_counter()
            addresses = [order.sample(turn * SAMPLES + slot) for slot in range(SAMPLES)]
            made = [dataset.sample(address, seed=0)[0].made for address in addresses]
            reading = time.perf_counter() - start
            shares.append(reading / step([each["shared"] | each["posi"] for each in made], SAMPLES, True))
    print(f"reading takes {statistics.median(shares[1:]):.3%} of the time of a step")  # the first one is a warm-up


def main() -> None:
    command, *arguments = sys.argv[1:]
    if command == "make_ours":
        return print(json.dumps(make_ours(*arguments)))
    {"make": compare_making, "read": measure_reading, "step": compare_with_step}[command](*arguments)


if __name__ == "__main__":
    keep_console()
    main()
