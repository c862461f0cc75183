"""Qwen-Image-Layered in miniature with random weights, and what diffusers samples with it."""

import shutil
from functools import cache
from pathlib import Path
from unittest import mock

import diffusers
import tiny
import torch
from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from diffusers.pipelines.qwenimage import pipeline_qwenimage_layered as theirs
from tiny_flux2 import randomise
from torch import Tensor


@cache
def folder() -> Path:
    """The folder of a model repository like Qwen-Image-Layered's; written once per session."""
    root = tiny.kept_folder() / "qwen_image_layered"
    shutil.copytree(tiny.model(), root, ignore=shutil.ignore_patterns("transformer", "vae"))
    config = QwenImageTransformer2DModel.load_config(tiny.model() / "transformer")
    torch.manual_seed(0)
    options = {"use_layer3d_rope": True, "use_additional_t_cond": True, "num_layers": 2}
    randomise(QwenImageTransformer2DModel.from_config({**config, **options}), root / "transformer")
    vae = AutoencoderKLQwenImage.load_config(tiny.model() / "vae")
    generator = torch.Generator().manual_seed(0)
    vae |= {"latents_mean": torch.randn(16, generator=generator).tolist(), "input_channels": 4}
    AutoencoderKLQwenImage.from_config(vae).save_pretrained(root / "vae")
    return root


def sampled_by_diffusers(request: dict, noise: Tensor) -> Tensor:
    """The latents (1, N, 16, h, w) that QwenImageLayeredPipeline samples for one request."""
    parts = {
        "transformer": QwenImageTransformer2DModel.from_pretrained(folder() / "transformer"),
        "vae": AutoencoderKLQwenImage.from_pretrained(folder() / "vae"),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(folder() / "scheduler"),
        **{n: getattr(tiny_pipeline(), n) for n in ("text_encoder", "tokenizer")},
    }
    pipe = diffusers.QwenImageLayeredPipeline(**parts, processor=None)
    pipe.set_progress_bar_config(disable=True)
    options = {name: request[name] for name in ("prompt", "negative_prompt", "num_inference_steps")}
    packed = pipe._pack_latents(noise, *noise.shape[:1], *noise.shape[2:], noise.shape[1])
    steps = []  # with output_type="latent" it returns nothing
    options["callback_on_step_end"] = lambda _, __, ___, tensors: steps.append(tensors["latents"]) or {}
    size = mock.patch.object(theirs, "calculate_dimensions", lambda *_: (request["width"], request["height"]))
    with size:  # it would choose an area of 640²
        pipe(
            image=request["layer_input_image"],
            layers=request["layer_num"],
            true_cfg_scale=request["cfg_scale"],
            latents=packed,
            output_type="pt",
            **options,
        )
    count = request["layer_num"]
    return pipe._unpack_latents(steps[-1], request["height"], request["width"], count, 8).transpose(1, 2)


@cache
def tiny_pipeline() -> diffusers.QwenImagePipeline:
    return diffusers.QwenImagePipeline.from_pretrained(tiny.model(), dtype=torch.float32)
