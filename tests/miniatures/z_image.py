"""Z-Image in miniature with random weights: base, and Omni with its SigLIP 2; what diffusers samples with them."""

import json
from functools import cache
from pathlib import Path
from unittest import mock

import diffusers
import torch
from diffusers import ZImageTransformer2DModel
from tiny import kept_folder
from tiny_flux2 import _randomise as randomise
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
    first = requests[0]
    own = {"prompt": [r["prompt"] for r in requests], "negative_prompt": [r["negative_prompt"] for r in requests]}
    own |= {name: first[name] for name in ("height", "width", "num_inference_steps")}
    own |= {"guidance_scale": first["cfg_scale"] - 1, "latents": noise, "output_type": "latent", "return_dict": False}
    if "edit_image" not in first:
        return loaded(diffusers.ZImagePipeline, base())(**own)[0]
    siglip = Siglip2VisionModel.from_pretrained(omni() / "siglip")
    parts = {
        "siglip": siglip,
        "siglip_processor": Siglip2ImageProcessorPil.from_pretrained(omni() / "siglip_processor"),
    }
    with mock.patch.object(Tensor, "bfloat16", lambda tensor: tensor):  # it encodes images in bf16 only
        return loaded(diffusers.ZImageOmniPipeline, omni(), **parts)(first["edit_image"], **own)[0]


def loaded(kind: type[diffusers.DiffusionPipeline], folder: Path, **parts) -> diffusers.DiffusionPipeline:
    pipe = kind.from_pretrained(folder, dtype=torch.float32, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe
