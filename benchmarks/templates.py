"""What the shipped templates do to drawings of the embedded model, in figures and in pictures.

    python benchmarks/templates.py [brightness structure soft_rgb edit]

A template is measured on concepts that it was trained on, `train`, and on others, `held_out`; the base knows all of
them by name. A minute each on one core.
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
from diffsynth.diffusion.template import TemplatePipeline
from diffsynth.pipelines.qwen_image import QwenImagePipeline

ROOT = Path(__file__).resolve().parents[1]
DATA, MODEL, TEMPLATES = ROOT / "data/emoji", ROOT / "models/emoji", ROOT / "models/templates"
PICTURES = ROOT / "outputs/templates"
SPLITS = ("train", "held_out")
OPTIONS = {"cfg_scale": 2.0, "num_inference_steps": 20, "height": 64, "width": 64}
SCALES = (0.5, 0.6, 0.7, 0.8, 0.9)
CHANNEL = (0.6, 0.95)  # of soft RGB, of which all eight combinations are drawn
SHOWN = 6  # concepts in a picture

Drawn = Sequence[Image.Image]


# Drawing --------------------------------------------------------------------------------------------------------------


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


def rng(prompts: Sequence[str], template: str | None = None, inputs: Sequence[Mapping] = ()) -> list[Image.Image]:
    """A drawing for each prompt, all from one seed; a template's inputs go to both sides of guidance."""
    made = [load(template).arguments(base(), [own], [own]) if template else {} for own in inputs or prompts]
    requests = [{**OPTIONS, "seed": 0, "prompt": p, **more} for p, more in zip(prompts, made, strict=True)]
    return base().generate(requests)


def concepts(split: str, count: int) -> list[tuple[str, str]]:
    """(file name, prompt) of concepts, evenly spread."""
    with open(DATA / f"color_{split}.csv", encoding="utf-8", newline="") as file:
        rows = [(Path(each["image"]).name, each["prompt"]) for each in csv.DictReader(file)]
    return rows[:: max(1, len(rows) // count)][:count]


def pictures(style: str, names: Sequence[str]) -> list[Image.Image]:
    return [Image.open(DATA / style / name).convert("RGB") for name in names]


# Measuring ------------------------------------------------------------------------------------------------------------


def pixels(images: Drawn) -> np.ndarray:
    """(N, H, W, 3) in [0, 1]."""
    return np.stack([np.asarray(image, dtype=np.float64) / 255 for image in images])


def correlation(a, b) -> float:
    return float(np.corrcoef(a, b)[0, 1])


def rank_correlation(a, b) -> float:
    """Spearman's, where each value of `a` is as frequent as any other, and so of `b`."""
    return correlation(*(np.unique(values, return_inverse=True)[1].ravel() for values in (a, b)))


def overlap(a: Drawn, b: Drawn) -> float:
    """Mean intersection over union of the pictures' silhouettes: what is not white."""
    first, second = (pixels(images).min(-1) < 0.9 for images in (a, b))
    return float(((first & second).sum((1, 2)) / (first | second).sum((1, 2))).mean())


def distance(a: Drawn, b: Drawn) -> float:
    """Root mean squared difference of pixels in [0, 1], mean over pictures."""
    return float(np.sqrt(((pixels(a) - pixels(b)) ** 2).mean((1, 2, 3))).mean())


def retrieval(drawn: Drawn, targets: Drawn) -> float:
    """Share of drawings that are nearer to their own target than to any other."""
    difference = pixels(drawn)[:, None] - pixels(targets)[None]
    return float(((difference**2).mean((2, 3, 4)).argmin(1) == np.arange(len(drawn))).mean())


def grid(rows: Mapping[str, Drawn]) -> Image.Image:
    """The first pictures of each row, above its name."""
    return stack([row(images[:SHOWN], [name] * SHOWN) for name, images in rows.items()])


# Templates ------------------------------------------------------------------------------------------------------------


def brightness(split: str, count: int = 8) -> tuple[dict, Image.Image]:
    """Rank correlation of the scale that was asked for with the mean of what was drawn."""
    prompts = [prompt for _, prompt in concepts(split, count)]
    drawn = [rng(prompts, "brightness", [{"scale": scale}] * count) for scale in SCALES]
    means = np.array([pixels(images).mean((1, 2, 3)) for images in drawn])  # (scales, prompts)
    figures = {
        "rank_correlation": np.mean([rank_correlation(SCALES, own) for own in means.T]),
        "rank_correlation_lowest": min(rank_correlation(SCALES, own) for own in means.T),
        "rank_correlation_pooled": rank_correlation(np.repeat(SCALES, count), means.ravel()),
        **{f"mean_at_{scale}": own.mean() for scale, own in zip(SCALES, means, strict=True)},
    }
    rows = {f"scale {scale}": images for scale, images in zip(SCALES, drawn, strict=True)}
    return figures, grid({"no template": rng(prompts), **rows})


def soft_rgb(split: str, count: int = 8) -> tuple[dict, Image.Image]:
    """Correlation, of every channel and within a prompt, of the mean that was asked for with that of what was drawn."""
    prompts, asked = [prompt for _, prompt in concepts(split, count)], np.array(list(product(CHANNEL, repeat=3)))
    drawn = [rng(prompts, "soft_rgb", [dict(zip("rgb", colour, strict=True))] * count) for colour in asked.tolist()]
    means = np.stack([pixels(images).mean((1, 2)) for images in drawn])  # (colours, prompts, 3)
    moves = means - means.mean(0)
    figures = {
        f"correlation_{name}": correlation(np.repeat(asked[:, i], count), moves[:, :, i].ravel())
        for i, name in enumerate("rgb")
    }
    captions = ["r {} g {} b {}".format(*own) for own in asked]
    return figures, grid({"no template": rng(prompts), **dict(zip(captions, drawn, strict=True))})


def structure(split: str, count: int = 30) -> tuple[dict, Image.Image]:
    """Line art mirrored, so that the prompt's own picture, which the base knows, is not where it should be."""
    names, prompts = zip(*concepts(split, count), strict=True)
    given, targets = ([ImageOps.mirror(image) for image in pictures(style, names)] for style in ("line", "color"))
    figures, drawn = by_image("structure", prompts, given, targets)
    more, unnamed = by_image("structure", ["a color emoji"] * count, given, targets)
    figures |= {f"unnamed_{name}": value for name, value in more.items()}
    rows = {
        "given": given,
        "by name": drawn["right"],
        "without a name": unnamed["right"],
        "by name, none given": drawn["none"],
    }
    return figures, grid({**rows, "target": targets})


def edit(split: str, count: int = 30) -> tuple[dict, Image.Image]:
    """Flat pictures to be redrawn in colour; the prompt does not say of what."""
    names = [name for name, _ in concepts(split, count)]
    given, targets = pictures("flat", names), pictures("color", names)
    figures, drawn = by_image("edit", ["a color emoji of this"] * count, given, targets)
    return figures, grid({"given": given, "drawn": drawn["right"], "none given": drawn["none"], "target": targets})


def by_image(template: str, prompts: Sequence[str], given: Drawn, targets: Drawn) -> tuple[dict, dict[str, Drawn]]:
    """How near to their targets come drawings that are given the right picture, that of another concept, or none."""
    drawn = {
        "right": rng(prompts, template, [{"image": image} for image in given]),
        "wrong": rng(prompts, template, [{"image": image} for image in [*given[1:], given[0]]]),
        "none": rng(prompts),
    }
    measures = {"overlap": overlap, "distance": distance, "retrieval": retrieval}
    return {f"{m}_{n}": of(images, targets) for m, of in measures.items() for n, images in drawn.items()}, drawn


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
    main()
