"""Requests, rows and gradients in miniature, for statements about any family of families.py."""

import numpy as np
import torch
from families import Family
from PIL import Image

from diffsynth.core.data import Row, Sample
from diffsynth.diffusion.adapters.lora import LoRA
from diffsynth.diffusion.base_pipeline import BasePipeline

REQUEST = {"prompt": "a red apple", "seed": 1, "height": 48, "width": 32, "num_inference_steps": 3, "cfg_scale": 1.0}
GUIDED = REQUEST | {"negative_prompt": "a line emoji", "cfg_scale": 3.0}
LORA = LoRA(rank=2)


def image(number: int, size: tuple[int, int] = (32, 48), mode: str = "RGB") -> Image.Image:
    """A picture, taller than wide."""
    pixels = np.random.default_rng(number).integers(0, 256, (4, 3, len(mode)), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def made(family: Family, number: int = 0) -> Image.Image | list[Image.Image]:
    """A picture, or a video, in the size and the mode that a family makes for `REQUEST`."""
    size, mode = family.pipeline.latents.fitted(48, 32)[::-1], family.pipeline.media.mode
    if not family.num_frames:
        return image(number, size, mode)
    return [image(100 * number + frame, size, mode) for frame in range(family.num_frames)]


def encoded(pipe: BasePipeline, value: Image.Image | list[Image.Image]) -> torch.Tensor:
    """The latents of a picture or a video."""
    return pipe.vae.encode(pipe.media.preprocess(value, pipe.device, pipe.torch_dtype))


def edited_from(number: int) -> list[Image.Image]:
    """Two pictures of other shapes."""
    return [image(9 + number, (64, 64)), image(19 + number, (96, 64))]


def samples(family: Family) -> list[Sample]:
    """Three pictures or videos with prompts of different lengths, and the images that they are made from."""
    prompts = ["", "a red apple", "a line emoji of a tiger face, looking at an umbrella"]
    column = family.pipeline.media.column
    rows = [Row({column: made(family, number), "prompt": prompt}) for number, prompt in enumerate(prompts)]
    for number, row in enumerate(rows if family.edits else []):
        row["edit_image"] = edited_from(number)
    for number, row in enumerate(rows if family.controls else []):
        row["controlnet_image"] = image(29 + number)
    for number, row in enumerate(rows):
        row.update(further(family, number))
    return [Sample(row, epoch=number, index=10 + number) for number, row in enumerate(rows)]


def further(family: Family, number: int) -> dict:
    """The further videos and the further image of a row or a request; masks are black and white."""
    videos = {name: made(family, 39 + 10 * number + place) for place, name in enumerate(family.videos)}
    for name in [name for name in videos if name.endswith("mask")]:
        videos[name] = [
            frame.convert("L").point(lambda grey: 255 * (grey > 127)).convert("RGB") for frame in videos[name]
        ]
    size = family.pipeline.latents.fitted(48, 32)[::-1]
    return {**videos, **({family.references: image(59 + number, size)} if family.references else {})}


def sampled(pipe: BasePipeline, *requests: dict) -> torch.Tensor:
    """The latents (B, C, h, w) that requests end with."""
    with torch.no_grad():
        return pipe.denoise(*pipe.prepare(requests))


def shaken(module, strength: float = 0.05):
    """With weights that the training would have moved."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.trainable_parameters():
            parameter += strength * torch.randn(parameter.shape, generator=generator).to(parameter)
    return module


def gradients(module, batches) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Losses of some batches, and the gradient of their mean."""
    module.zero_grad()
    losses = torch.cat([module(batch) for batch in batches])
    losses.mean().backward()
    return losses.detach(), {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
