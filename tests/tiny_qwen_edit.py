"""Qwen-Image-Edit in miniature with random weights, in a folder laid out like the released one."""

import json
from functools import cache
from pathlib import Path

import torch
from diffusers import QwenImageTransformer2DModel
from miniatures.autoencoders import give_latent_statistics
from tiny import COMPONENTS, kept_folder
from tiny_flux2 import randomise
from transformers import Qwen2VLImageProcessorPil

from diffsynth.pipelines.prompts.qwen_image import EDIT_PROMPT_TEMPLATE, PROMPT_TEMPLATE
from diffsynth.pipelines.qwen_image import ModelConfig, QwenImagePipeline
from models.emoji import build

PARTS = {**COMPONENTS, "processor": "processor"}
SIZES = {"height": 64, "width": 64, "edit_image_pixels": 64 * 64, "edit_vision_pixels": 96 * 96}


@cache
def folder(zero_cond_t: bool = False) -> Path:
    """The folder of a model repository like Qwen-Image-Edit's, or -2511's with `zero_cond_t`; written once each."""
    root = kept_folder() / "qwen_image_edit"
    build.init(str(root))
    templates = [PROMPT_TEMPLATE, EDIT_PROMPT_TEMPLATE]
    for token in build.SPECIAL_TOKENS:
        templates = [template.replace(token, "") for template in templates]
    tokenizer = build.train_tokenizer(templates, build.SPECIAL_TOKENS)
    tokenizer.save_pretrained(root / "tokenizer")
    Qwen2VLImageProcessorPil().save_pretrained(root / "processor")
    config = json.loads((root / "transformer" / "config.json").read_text()) | {"zero_cond_t": zero_cond_t}
    torch.manual_seed(0)
    randomise(QwenImageTransformer2DModel.from_config(config), root / "transformer")
    randomise(build.text_encoder(tokenizer), root / "text_encoder")
    give_latent_statistics(root / "vae" / "config.json")
    return root


def image_processor() -> Qwen2VLImageProcessorPil:
    return Qwen2VLImageProcessorPil.from_pretrained(folder() / "processor")


def pipeline(root: Path | None = None, **options) -> QwenImagePipeline:
    """Our pipeline with the weights of a folder in fp32, for images of 64 × 64 pixels."""
    configs = {name: ModelConfig(path=str((root or folder()) / part)) for name, part in PARTS.items()}
    pipe = QwenImagePipeline.from_components(**{**configs, "torch_dtype": "float32", **SIZES, **options})
    pipe.progress_bar = iter
    return pipe


def overrides(root: Path | None = None) -> list[str]:
    """Overrides that replace the configured model by the miniature."""
    parts = [f"model.{name}.path={(root or folder()) / part}" for name, part in PARTS.items()]
    sizes = [f"model.{name}={size}" for name, size in SIZES.items()]
    return ["model=qwen_image_edit", "model.torch_dtype=float32", *sizes, *parts]
