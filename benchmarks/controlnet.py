"""Measures how the embedded ControlNet follows line art of concepts that it was not trained on, and saves pictures.

    python benchmarks/controlnet.py [ControlNet's folder or file]

The line art is mirrored, which the base has never seen. The prompt names no concept, or (`named`) the right one. A
minute on one core.
"""

import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter, ImageOps

sys.path.insert(0, str(Path(__file__).parent))
from templates import DATA, Images, concepts, grid, overlap, pictures, retrieval

from diffsynth.core.data.conditions import Canny
from diffsynth.core.loader import ModelConfig
from diffsynth.core.pictures import save_png
from diffsynth.core.process.console import keep_console
from diffsynth.pipelines.z_image import ZImagePipeline

ROOT = DATA.parents[1]
MODEL, CONTROLNET = ROOT / "models/emoji_z_image", ROOT / "models/emoji_z_image_controlnet"
PARTS = {"dit": "transformer", "text_encoder": "text_encoder", "vae": "vae", "tokenizer": "tokenizer"}
OPTIONS = {"cfg_scale": 2.0, "num_inference_steps": 20, "height": 64, "width": 64, "seed": 0}
PICTURE = ROOT / "outputs/controlnet.png"
COUNT = 30


def pipeline(controlnet: Path) -> ZImagePipeline:
    parts = {name: ModelConfig(path=str(MODEL / folder)) for name, folder in PARTS.items()}
    own = ModelConfig(path=str(controlnet), config=str(CONTROLNET))
    pipe = ZImagePipeline.from_components(**parts, controlnet=own, torch_dtype="float32")
    pipe.load_models()
    pipe.progress_bar = iter
    return pipe


def sample(pipe: ZImagePipeline, prompts: Sequence[str], given: Images | None = None) -> list[Image.Image]:
    """Sample an image for each prompt, all from one seed, controlled by the given images."""
    control = [{"controlnet_image": image} for image in given] if given else [{}] * len(prompts)
    return pipe.generate([OPTIONS | {"prompt": prompt} | own for prompt, own in zip(prompts, control, strict=True)])


def edge_f1(a: Images, b: Images) -> float:
    """Return the mean F1 of edges: those within one pixel of an edge of the other image count as found."""
    return float(np.mean([_edge_f1(*pair) for pair in zip(a, b, strict=True)]))


def _edge_f1(a: Image.Image, b: Image.Image) -> float:
    edges = [Canny()(image, rng=random.Random(0)).convert("L") for image in (a, b)]
    near = [np.asarray(image.filter(ImageFilter.MaxFilter(3))) > 0 for image in edges]
    first, second = (np.asarray(image) > 0 for image in edges)
    precision, recall = (first & near[1]).sum() / max(1, first.sum()), (second & near[0]).sum() / max(1, second.sum())
    return 2 * precision * recall / max(1e-9, precision + recall)


def measure(pipe: ZImagePipeline, split: str) -> tuple[dict[str, float], Image.Image]:
    names, named = zip(*concepts(split, COUNT), strict=True)
    given, targets = ([ImageOps.mirror(image) for image in pictures(style, names)] for style in ("line", "color"))
    prompts = ["a color emoji"] * len(names)
    sampled = {"right": sample(pipe, prompts, given), "wrong": sample(pipe, prompts, [*given[1:], given[0]])}
    sampled |= {"none": sample(pipe, prompts), "named": sample(pipe, named, given)}
    figures = {f"overlap_{name}": overlap(images, targets) for name, images in sampled.items()}
    figures |= {f"edge_f1_{name}": edge_f1(images, given) for name, images in sampled.items()}
    figures |= {f"retrieval_{name}": retrieval(images, targets) for name, images in sampled.items()}
    rows = {"given": given, "without a name": sampled["right"], "by name": sampled["named"]}
    return figures, grid({**rows, "by name, none given": sample(pipe, named), "target": targets})


def main() -> None:
    pipe = pipeline(Path(sys.argv[1]) if len(sys.argv) > 1 else CONTROLNET)
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    for split in ("train", "held_out"):
        figures, picture = measure(pipe, split)
        print(json.dumps({"concepts": split, **{name: round(value, 3) for name, value in figures.items()}}))
        save_png(picture.quantize(128), PICTURE.with_stem(f"controlnet_{split}"))


if __name__ == "__main__":
    keep_console()
    main()
