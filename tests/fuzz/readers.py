"""All readers of files that come from elsewhere: how to make a sound file, and how the program reads it."""

import json
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from io import BytesIO
from pathlib import Path
from shutil import copytree
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import tiny
import torch
from miniatures.videos import write_animation, write_rows, write_video
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import save_file

from diffsynth.config.run_folder import is_finished
from diffsynth.core.data import CachedDataset, LoadGIF, UnifiedDataset, VideoDataset, read_shards
from diffsynth.core.data.operators.base import apply_to_each
from diffsynth.core.data.prompt_dataset import read_lines
from diffsynth.core.files import forget_after
from diffsynth.core.loader import ModelConfig, build_module, check_weights, load_weights
from diffsynth.diffusion.adapters import files as adapters
from diffsynth.diffusion.adapters.names import LayerNames
from diffsynth.diffusion.adapters.stated import METADATA_KEY
from diffsynth.diffusion.pipeline import sampling_settings
from diffsynth.diffusion.pipeline.generation import load_images, read_prompts
from diffsynth.diffusion.pipeline.repository import component_folders
from diffsynth.report import write_report
from diffsynth.training.checkpoint import load_part, read_checkpoint

NAMES = LayerNames(prefix="transformer")


@dataclass(frozen=True)
class Reader:
    """A reader.

    Args:
        name: Name of the file that is damaged, in a folder of its own.
        make: Writes sound files into the folder.
        read: Reads the folder, all of it.
        readable: The folders of files that a sound file names, which may be read, too.
    """

    name: str
    make: Callable[[Path], None]
    read: Callable[[Path], object]
    readable: Callable[[], Sequence[Path]] = tuple


def picture(suffix: str, **options) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"a.{suffix}", **options)

    return make


def read_folder(folder: Path) -> None:
    data = UnifiedDataset.from_folder(str(folder), height=16, width=16)
    data.scan()
    for number in range(len(data)):
        data[number]


def read_whole(rows) -> None:
    for number in range(len(rows)):
        rows[number]


def image_beside(metadata: str, content: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        picture("png")(folder)
        (folder / metadata).write_text(content, encoding="utf-8")

    return make


def parquet(folder: Path) -> None:
    picture("png")(folder)
    pa.parquet.write_table(pa.table({"image": ["a.png"], "prompt": ["a"]}), folder / "metadata.parquet")


def tar(folder: Path) -> None:
    picture("png")(folder)
    with tarfile.open(folder / "a.tar", "w") as archive:
        archive.add(folder / "a.png", "1.png")
        entry = tarfile.TarInfo("1.txt")
        entry.size = 1
        archive.addfile(entry, BytesIO(b"a"))


def adapter(folder: Path) -> None:
    layer = "transformer.transformer_blocks.0.attn.to_v"
    shapes = {"A": (2, 128), "B": (128, 2)}
    config = {
        "transformer.r": 2,
        "transformer.lora_alpha": 4,
        "transformer.target_modules": ["transformer_blocks.0.attn.to_v"],
    }
    save_file(
        {f"{layer}.lora_{part}.weight": torch.zeros(shape) for part, shape in shapes.items()},
        folder / "a.safetensors",
        {METADATA_KEY: json.dumps(config)},
    )


@cache
def network() -> torch.nn.Module:
    return build_module(ModelConfig(path=str(tiny.model() / "transformer")).resolve()).to_empty(device="cpu")


def read_adapter(folder: Path) -> None:
    path = folder / "a.safetensors"
    adapters.prefixes(path)
    sampling_settings.of_file(path)
    try:
        adapters.load(network(), path, NAMES)
    finally:
        adapters.remove(network())


def weights(folder: Path) -> None:
    copytree(tiny.model() / "vae", folder, dirs_exist_ok=True)


def read_weights(folder: Path) -> None:
    files = ModelConfig(path=str(folder)).resolve()
    module = build_module(files)
    check_weights(module, files)
    load_weights(module, files, torch.float32, "cpu")


def index(folder: Path) -> None:
    (folder / "model_index.json").write_text('{"_class_name": "Pipeline", "vae": ["diffusers", "AutoencoderKL"]}')


def read_index(folder: Path) -> None:
    nothing = SimpleNamespace(sources=dict, folders={}, lora_prefixes={})
    component_folders(nothing, folder / "model_index.json")


@cache
def run_dir() -> Path:
    return tiny.train(tiny.kept_folder(), "checkpoint.every=1", "max_steps=1")


def run(folder: Path) -> None:
    copytree(run_dir(), folder, dirs_exist_ok=True)
    (folder / "bad_steps.jsonl").write_text('{"step": 1, "rows": [0]}\n')


@cache
def cached() -> Path:
    folder = tiny.kept_folder()
    tiny.make_cache(folder)
    return folder


def cache_folder(folder: Path) -> None:
    copytree(cached(), folder, dirs_exist_ok=True)


def read_record(folder: Path) -> None:
    cfg = OmegaConf.load(folder / "config.yaml")
    cfg.run_dir = str(folder)
    is_finished(cfg)


def read_frames(folder: Path) -> None:
    apply_to_each(LoadGIF(num_frames=1), [str(folder / "a.gif")])


def animation(folder: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(folder / "a.gif", save_all=True, append_images=frames[1:])


def read_cache(folder: Path) -> None:
    data = CachedDataset(str(folder))
    data.rows_in_buckets()
    read_whole(data)


def read_pictures(name: str, folder: Path) -> None:
    load_images(input_image=str(folder / name))


def of_picture(suffix: str) -> Reader:
    return Reader(f"a.{suffix}", picture(suffix), partial(read_pictures, f"a.{suffix}"))


def read_clip(folder: Path) -> None:
    options = {"height": 16, "width": 16, "num_frames": 5, "frame_rate": 10, "start": "middle"}
    data = VideoDataset.from_folder(str(folder), **options)
    data.scan()
    read_whole(data)


def of_video(suffix: str) -> Reader:
    def make(folder: Path) -> None:
        write = write_animation if suffix in ("gif", "webp", "png") else write_video
        write_rows(folder, {"video": write(folder / f"v.{suffix}", 20).name})

    return Reader(f"v.{suffix}", make, read_clip)


def of_table(suffix: str, content: str) -> Reader:
    name = f"metadata.{suffix}"
    return Reader(name, image_beside(name, content), read_folder)


def read_checkpoints(folder: Path) -> None:
    step = folder / "checkpoints" / "step-000001"
    content = read_checkpoint(step)
    for part in content["parts"]:
        load_part(step, content, part)


CSV = "image,prompt\na.png,a cat\n"
JSON = '{"image": "a.png", "prompt": "a cat", "n": 1.5}'
READERS = {
    **{suffix: of_picture(suffix) for suffix in ("png", "jpg", "webp", "gif", "tiff", "bmp")},
    "csv": of_table("csv", CSV),
    "json": of_table("json", f"[{JSON}]"),
    "jsonl": of_table("jsonl", JSON),
    "parquet": Reader("metadata.parquet", parquet, read_folder),
    "caption": Reader("a.txt", image_beside("a.txt", "a cat"), read_folder),
    "picture of a row": Reader("a.png", image_beside("metadata.csv", CSV), read_folder),
    "tar": Reader("a.tar", tar, lambda folder: read_whole(read_shards(str(folder)))),
    "prompts": Reader("p.txt", image_beside("p.txt", "a\nb\n"), lambda folder: read_prompts(str(folder / "p.txt"))),
    "adapter": Reader("a.safetensors", adapter, read_adapter),
    "weights": Reader("diffusion_pytorch_model.safetensors", weights, read_weights),
    "config": Reader("config.json", weights, read_weights),
    "model index": Reader("model_index.json", index, read_index),
    "metrics": Reader("metrics.jsonl", run, write_report),
    "run's configuration": Reader("config.yaml", run, write_report),
    "finished run": Reader("finished.json", run, read_record),
    "inputs of a run": Reader("inputs.json", run, read_record, lambda: (tiny.model(), tiny.dataset())),
    **{f"video.{suffix}": of_video(suffix) for suffix in ("mp4", "mkv", "ts", "gif", "webp", "png")},
    "frames": Reader("a.gif", animation, read_frames),
    "lines": Reader(
        "p.txt", image_beside("p.txt", "a\nb\n"), lambda folder: read_whole(read_lines(str(folder / "p.txt")))
    ),
    "bad steps": Reader("bad_steps.jsonl", run, lambda folder: forget_after(folder / "bad_steps.jsonl", 1)),
    "checkpoint's index": Reader("checkpoints/step-000001/checkpoint.json", run, read_checkpoints),
    "cache's index": Reader("index.sqlite", cache_folder, read_cache),
}
