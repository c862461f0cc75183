"""Trains a template for FLUX.2-klein-4B at its real size in two stages on a CPU.

All weights are random: a repository of the released architecture is written first (17 GB of disk), then `make_cache.py`
and `train.py` run as a user would run them, and an image is sampled. It prints time and peak memory of each command.

    python benchmarks/template_klein_4b.py --steps 1 --pixels 256
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from diffsynth.core.process.console import keep_console

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

TRANSFORMER = {
    "num_layers": 5,
    "num_single_layers": 20,
    "num_attention_heads": 24,
    "joint_attention_dim": 7680,
    "guidance_embeds": False,
}
TEXT_ENCODER = {
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
}
PARTS = {"dit": "transformer", "text_encoder": "text_encoder", "vae": "vae", "tokenizer": "tokenizer"}


def write_model(folder: Path, text_layers: int) -> None:
    """Write models of the released classes and sizes, with random weights in bf16."""
    import tiny_flux2
    from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    AutoTokenizer.from_pretrained(tiny_flux2.klein() / "tokenizer").save_pretrained(folder / "tokenizer")
    AutoencoderKLFlux2().save_pretrained(folder / "vae")
    Qwen3ForCausalLM(Qwen3Config(num_hidden_layers=text_layers, **TEXT_ENCODER)).save_pretrained(
        folder / "text_encoder"
    )
    Flux2Transformer2DModel(**TRANSFORMER).save_pretrained(folder / "transformer", max_shard_size="5GB")


def write_data(folder: Path, pixels: int) -> None:
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (2, pixels, pixels, 3), dtype=np.uint8)
    rows = []
    for number, picture in enumerate(noise):
        Image.fromarray(picture // (1 + number)).save(folder / f"{number}.png")
        image = f"{number}.png"
        rows.append({"image": image, "prompt": "a red apple", "template_inputs": {"image": image}})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))


def run(title: str, *command: str) -> None:
    """Run a command, and print its time and peak memory: all of it, and without pages of mapped files."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    peak = {"VmRSS": 0, "RssAnon": 0}
    watcher = threading.Thread(target=watch, args=(process, peak))
    watcher.start()
    output = process.communicate()[0].decode()
    watcher.join()
    if process.returncode:
        sys.exit(output)
    figures = f"peak RSS {peak['VmRSS'] / 1e9:.1f} GB, anonymous {peak['RssAnon'] / 1e9:.1f} GB"
    print(f"{title}: {time.perf_counter() - start:.0f} s, {figures}", flush=True)


def watch(process: subprocess.Popen, peak: dict[str, int]) -> None:
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        for name in peak:
            peak[name] = max(peak[name], int(fields.get(name, "0").split()[0]) * 1024)
        time.sleep(0.2)


def main() -> None:
    import templates

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--pixels", type=int, default=256)
    parser.add_argument("--text-layers", type=int, default=36)
    parser.add_argument("--trained-dtype", default="bfloat16", help="float32 takes 5 GB more")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "model", arguments.text_layers)
        write_data(folder / "data", arguments.pixels)
        template = templates.write(folder / "template", templates.KLEIN)
        size = [f"dataset.height={arguments.pixels}", f"dataset.width={arguments.pixels}"]
        model = [
            "model=flux2_klein_base_4b",
            *(f"model.{key}.path={folder / 'model' / part}" for key, part in PARTS.items()),
        ]
        task = ["task=template", f"template.path={template}", "device=cpu"]
        rows = ["dataset=image_folder", f"dataset.path={folder / 'data'}", "dataset.metadata=metadata.jsonl", *size]
        run("stage one, 2 pictures", "make_cache.py", *model, *task, *rows, f"path={folder / 'cache'}")
        training = [
            *("dataset=cache", f"dataset.path={folder / 'cache'}", "validation=none"),
            *("model.text_encoder=null", "model.vae=null", "model.tokenizer=null"),
            *(f"max_steps={arguments.steps}", "batch_size=1", "logger.every=1", f"output_root={folder / 'runs'}"),
            *("lr_scheduler=constant", f"memory.trained_dtype={arguments.trained_dtype}", "export.save_steps=null"),
        ]
        run(f"stage two, {arguments.steps} steps", "train.py", *model, *task, *training)
        (run_dir,) = (folder / "runs").iterdir()
        print((run_dir / "metrics.jsonl").read_text().strip())
        (weights,) = (run_dir / "weights").glob("*.safetensors")
        tensors = load_file(weights)
        os.replace(weights, template / "model.safetensors")
        templates.write(template, templates.KLEIN, ("_PATH = None", "_PATH = 'model.safetensors'"))
        numel = sum(tensor.numel() for tensor in tensors.values())
        print(f"{len(tensors)} tensors, {numel / 1e6:.0f} million parameters")
        inputs = ["template_inputs=[{scale: 0.8}]", "prompt=a red apple"]
        sampling = [f"output={folder / 'sampled'}", "device=cpu", *inputs]
        sizes = [f"options.height={arguments.pixels}", f"options.width={arguments.pixels}"]
        few = ["options.num_inference_steps=1", "options.cfg_scale=1"]
        run("sampling, 1 step", "generate.py", *model, f"template.path={template}", *sampling, *sizes, *few)


if __name__ == "__main__":
    keep_console()
    main()
