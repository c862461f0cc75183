"""Z-Image in miniature with random weights: base, and Omni with its SigLIP 2; what diffusers samples with them."""

import json
import shutil
from functools import cache
from pathlib import Path
from unittest import mock

import diffusers
import torch
from diffusers import ZImageControlNetModel, ZImageTransformer2DModel
from tiny import kept_folder
from tiny_flux2 import randomise
from torch import Tensor
from transformers import Siglip2ImageProcessorPil, Siglip2VisionConfig, Siglip2VisionModel

from models.emoji_z_image import build

PARTS = {"dit": "transformer", "text_encoder": "text_encoder", "vae": "vae", "tokenizer": "tokenizer"}
OMNI_PARTS = PARTS | {"siglip": "siglip", "siglip_processor": "siglip_processor"}
SIGLIP_WIDTH = 24


@cache
def base() -> Path:
    """The folder of a model repository like Z-Image's; written once per session."""
    folder = kept_folder() / "z_image"
    build.init(str(folder))
    randomise(ZImageTransformer2DModel.from_pretrained(folder / "transformer"), folder / "transformer")
    give_statistics(folder / "vae")
    return folder


@cache
def omni() -> Path:
    """The folder of a model repository like Z-Image-Omni-Base's; written once per session."""
    folder = kept_folder() / "z_image_omni"
    build.init(str(folder))
    config = json.loads((folder / "transformer" / "config.json").read_text()) | {"siglip_feat_dim": SIGLIP_WIDTH}
    randomise(ZImageTransformer2DModel.from_config(config), folder / "transformer")
    give_statistics(folder / "vae")
    sizes = {"hidden_size": SIGLIP_WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    Siglip2VisionModel(Siglip2VisionConfig(**sizes, num_patches=16)).save_pretrained(folder / "siglip")
    Siglip2ImageProcessorPil(max_num_patches=16).save_pretrained(folder / "siglip_processor")
    return folder


def give_statistics(folder: Path) -> None:
    """Give an autoencoder a shift and a scale that change something."""
    config = json.loads((folder / "config.json").read_text()) | {"shift_factor": 0.1159, "scaling_factor": 0.3611}
    (folder / "config.json").write_text(json.dumps(config))


def sampled_by_diffusers(requests: list[dict], noise: Tensor) -> Tensor:
    """The latents (B, 16, h, w) that ZImagePipeline, or with images ZImageOmniPipeline, samples for some requests."""
    options = arguments(requests, noise)
    if "controlnet_image" in requests[0]:
        return sampled_with_control(requests, noise)
    if "edit_image" not in requests[0]:
        return loaded(diffusers.ZImagePipeline, base())(**options)[0]
    kinds = {"siglip": Siglip2VisionModel, "siglip_processor": Siglip2ImageProcessorPil}
    parts = {name: kind.from_pretrained(omni() / name) for name, kind in kinds.items()}
    with mock.patch.object(Tensor, "bfloat16", lambda tensor: tensor):  # it encodes images in bf16 only
        return loaded(diffusers.ZImageOmniPipeline, omni(), **parts)(requests[0]["edit_image"], **options)[0]


def arguments(requests: list[dict], noise: Tensor) -> dict:
    """Our requests as arguments of diffusers' pipelines."""
    options = {"prompt": [r["prompt"] for r in requests], "negative_prompt": [r["negative_prompt"] for r in requests]}
    options |= {name: requests[0][name] for name in ("height", "width", "num_inference_steps")}
    options |= {"guidance_scale": requests[0]["cfg_scale"] - 1, "latents": noise}
    return options | {"output_type": "latent", "return_dict": False}


def loaded(kind: type[diffusers.DiffusionPipeline], folder: Path, **parts) -> diffusers.DiffusionPipeline:
    pipe = kind.from_pretrained(folder, dtype=torch.float32, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# ControlNets ----------------------------------------------------------------------------------------------------------


@cache
def controlled() -> Path:
    """The folder of `base()`, with a ControlNet; written once per session."""
    folder = kept_folder() / "z_image_controlled"
    shutil.copytree(base(), folder)
    shutil.copytree(controlnet(), folder / "controlnet")
    return folder


@cache
def controlnet(channels: int = 16) -> Path:
    """The folder of a ControlNet for `base()` with random weights, which reads so many channels; written once each."""
    folder = kept_folder() / f"controlnet_{channels}"
    config = ZImageTransformer2DModel.load_config(base() / "transformer")
    sizes = {name: config[name] for name in ("dim", "n_heads", "n_kv_heads", "n_refiner_layers")}
    refiner = {} if channels == 16 else {"add_control_noise_refiner": "control_noise_refiner"}
    refiner |= {} if channels == 16 else {"control_refiner_layers_places": [0]}
    torch.manual_seed(0)
    network = ZImageControlNetModel(control_layers_places=[0, 2], control_in_dim=channels, **refiner, **sizes)
    randomise(network, folder)
    return folder


def sampled_with_control(requests: list[dict], noise: Tensor, channels: int = 16) -> Tensor:
    """The latents (B, 16, h, w) that ZImageControlNetPipeline, or that for inpainting, samples for some requests."""
    first, network = requests[0], ZImageControlNetModel.from_pretrained(controlnet(channels))
    kind = diffusers.ZImageControlNetPipeline
    options = {"control_image": first["controlnet_image"]}
    if "controlnet_inpaint_mask" in first:
        kind = diffusers.ZImageControlNetInpaintPipeline
        options |= {
            "image": first["controlnet_inpaint_image"],
            "mask_image": [first["controlnet_inpaint_mask"]] * len(requests),
        }
    pipe = loaded(kind, base(), controlnet=network)
    return pipe(**arguments(requests, noise), **options, controlnet_conditioning_scale=first["controlnet_scale"])[0]
