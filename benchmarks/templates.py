"""Measures the shipped templates on images of the embedded model, and saves pictures of them.

    python benchmarks/templates.py [brightness structure soft_rgb edit]

A template is measured on concepts that it was trained on, `train`, and on others, `held_out`; the base knows all of
them by name. Each takes a minute on one core.
"""

import csv
import json
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from diffsynth.core.loader import ModelConfig
from diffsynth.core.pictures import row, save_png, stack
from diffsynth.core.process.console import keep_console
from diffsynth.diffusion.template import TemplatePipeline
from diffsynth.pipelines.qwen_image import QwenImagePipeline

ROOT = Path(__file__).resolve().parents[1]
DATA, MODEL, TEMPLATES = ROOT / "data/emoji", ROOT / "models/emoji", ROOT / "models/templates"
PICTURES = ROOT / "outputs/templates"
SPLITS = ("train", "held_out")
OPTIONS = {"cfg_scale": 2.0, "num_inference_steps": 20, "height": 64, "width": 64}
SCALES = (0.5, 0.6, 0.7, 0.8, 0.9)
CHANNEL = (0.6, 0.95)  # values of each channel of soft_rgb; all eight combinations are sampled
SHOWN = 6  # concepts in a picture

Images = Sequence[Image.Image]


# Sampling -------------------------------------------------------------------------------------------------------------


@cache
def base() -> QwenImagePipeline:
    folders = {"dit": "transformer", "text_encoder": "text_encoder", "vae": "vae", "tokenizer": "tokenizer"}
    parts = {name: ModelConfig(path=str(MODEL / folder)) for name, folder in folders.items()}
    pipe = QwenImagePipeline.from_components(**parts, torch_dtype="float32", height=64, width=64)
    pipe.load_models()
    pipe.progress_bar = iter
    return pipe


@cache
def load(template: str) -> TemplatePipeline:
    return TemplatePipeline(torch.float32, model_configs=[ModelConfig(path=str(TEMPLATES / template))])


def sample(prompts: Sequence[str], template: str | None = None, inputs: Sequence[Mapping] = ()) -> list[Image.Image]:
    """Sample an image for each prompt, all from one seed; a template's inputs go to both sides of guidance."""
    made = [load(template).arguments(base(), [own], [own]) if template else {} for own in inputs or prompts]
    requests = [{**OPTIONS, "seed": 0, "prompt": p, **more} for p, more in zip(prompts, made, strict=True)]
    return base().generate(requests)


def concepts(split: str, count: int) -> list[tuple[str, str]]:
    """Return (file name, prompt) of `count` concepts, evenly spread over a split."""
    with open(DATA / f"color_{split}.csv", encoding="utf-8", newline="") as file:
        rows = [(Path(each["image"]).name, each["prompt"]) for each in csv.DictReader(file)]
    return rows[:: max(1, len(rows) // count)][:count]


def pictures(style: str, names: Sequence[str]) -> list[Image.Image]:
    return [Image.open(DATA / style / name).convert("RGB") for name in names]


# Measuring ------------------------------------------------------------------------------------------------------------


def pixels(images: Images) -> np.ndarray:
    """Return images as an array (N, H, W, 3) in [0, 1]."""
    return np.stack([np.asarray(image, dtype=np.float64) / 255 for image in images])


def correlation(a, b) -> float:
    return float(np.corrcoef(a, b)[0, 1])


def rank_correlation(a, b) -> float:
    """Return Spearman's rank correlation, for values that are all equally frequent."""
    return correlation(*(np.unique(values, return_inverse=True)[1].ravel() for values in (a, b)))


def overlap(a: Images, b: Images) -> float:
    """Return the mean intersection over union of silhouettes, the pixels that are not white."""
    first, second = (pixels(images).min(-1) < 0.9 for images in (a, b))
    return float(((first & second).sum((1, 2)) / (first | second).sum((1, 2))).mean())


def distance(a: Images, b: Images) -> float:
    """Return the root mean squared difference of pixels in [0, 1], averaged over images."""
    return float(np.sqrt(((pixels(a) - pixels(b)) ** 2).mean((1, 2, 3))).mean())


def retrieval(images: Images, targets: Images) -> float:
    """Return the share of images that are nearer to their own target than to any other."""
    difference = pixels(images)[:, None] - pixels(targets)[None]
    return float(((difference**2).mean((2, 3, 4)).argmin(1) == np.arange(len(images))).mean())


def grid(rows: Mapping[str, Images]) -> Image.Image:
    """Return a grid of the first images of each row, above its name."""
    return stack([row(images[:SHOWN], [name] * SHOWN) for name, images in rows.items()])


# Templates ------------------------------------------------------------------------------------------------------------


def brightness(split: str, count: int = 8) -> tuple[dict, Image.Image]:
    """Measure the rank correlation of the given scale with the mean pixel of the sampled image."""
    prompts = [prompt for _, prompt in concepts(split, count)]
    sampled = [sample(prompts, "brightness", [{"scale": scale}] * count) for scale in SCALES]
    means = np.array([pixels(images).mean((1, 2, 3)) for images in sampled])  # (scales, prompts)
    figures = {
        "rank_correlation": np.mean([rank_correlation(SCALES, own) for own in means.T]),
        "rank_correlation_lowest": min(rank_correlation(SCALES, own) for own in means.T),
        "rank_correlation_pooled": rank_correlation(np.repeat(SCALES, count), means.ravel()),
        **{f"mean_at_{scale}": own.mean() for scale, own in zip(SCALES, means, strict=True)},
    }
    rows = {f"scale {scale}": images for scale, images in zip(SCALES, sampled, strict=True)}
    return figures, grid({"no template": sample(prompts), **rows})


def soft_rgb(split: str, count: int = 8) -> tuple[dict, Image.Image]:
    """Measure the correlation, for every channel and within a prompt, of the given colour with the sampled mean."""
    prompts, colours = [prompt for _, prompt in concepts(split, count)], np.array(list(product(CHANNEL, repeat=3)))
    inputs = [dict(zip("rgb", colour, strict=True)) for colour in colours.tolist()]
    sampled = [sample(prompts, "soft_rgb", [own] * count) for own in inputs]
    means = np.stack([pixels(images).mean((1, 2)) for images in sampled])  # (colours, prompts, 3)
    moves = means - means.mean(0)
    figures = {
        f"correlation_{name}": correlation(np.repeat(colours[:, i], count), moves[:, :, i].ravel())
        for i, name in enumerate("rgb")
    }
    captions = ["r {} g {} b {}".format(*own) for own in colours]
    return figures, grid({"no template": sample(prompts), **dict(zip(captions, sampled, strict=True))})


def structure(split: str, count: int = 30) -> tuple[dict, Image.Image]:
    """Measure the template on mirrored line art.

    The base knows each concept's own image, but not mirrored, so that only the template can put it right.
    """
    names, prompts = zip(*concepts(split, count), strict=True)
    given, targets = ([ImageOps.mirror(image) for image in pictures(style, names)] for style in ("line", "color"))
    figures, sampled = by_image("structure", prompts, given, targets)
    more, unnamed = by_image("structure", ["a color emoji"] * count, given, targets)
    figures |= {f"unnamed_{name}": value for name, value in more.items()}
    rows = {
        "given": given,
        "by name": sampled["right"],
        "without a name": unnamed["right"],
        "by name, none given": sampled["none"],
    }
    return figures, grid({**rows, "target": targets})


def edit(split: str, count: int = 30) -> tuple[dict, Image.Image]:
    """Measure the template on flat images that are to become coloured ones; the prompt does not name the concept."""
    names = [name for name, _ in concepts(split, count)]
    given, targets = pictures("flat", names), pictures("color", names)
    figures, sampled = by_image("edit", ["a color emoji of this"] * count, given, targets)
    rows = {"given": given, "sampled": sampled["right"], "none given": sampled["none"]}
    return figures, grid({**rows, "target": targets})


def by_image(template: str, prompts: Sequence[str], given: Images, targets: Images) -> tuple[dict, dict[str, Images]]:
    """Compare sampled images with their targets: given the right image, that of another concept, or none."""
    sampled = {
        "right": sample(prompts, template, [{"image": image} for image in given]),
        "wrong": sample(prompts, template, [{"image": image} for image in [*given[1:], given[0]]]),
        "none": sample(prompts),
    }
    measures = {"overlap": overlap, "distance": distance, "retrieval": retrieval}
    return {f"{m}_{n}": of(images, targets) for m, of in measures.items() for n, images in sampled.items()}, sampled


def main() -> None:
    for name in sys.argv[1:] or ("brightness", "structure", "soft_rgb", "edit"):
        for split in SPLITS:
            figures, picture = globals()[name](split)
            PICTURES.mkdir(parents=True, exist_ok=True)
            save_png(picture.quantize(128), PICTURES / f"{name}_{split}.png")
            print(
                json.dumps({"template": name, "concepts": split, **{n: round(float(v), 3) for n, v in figures.items()}})
            )


if __name__ == "__main__":
    keep_console()
    main()
