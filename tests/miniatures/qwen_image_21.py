"""Qwen-Image-2.1 in miniature with random weights, and what diffusers samples with it."""

import json
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from unittest import mock

import diffusers
import torch
from diffusers import AutoencoderKLQwenImage21, QwenImage21Transformer2DModel
from diffusers.pipelines.qwenimage21 import pipeline_qwenimage21 as theirs
from tiny import COMPONENTS, kept_folder
from tiny_flux2 import randomise
from torch import Tensor
from transformers import (
    Qwen2Tokenizer,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
)

from models.emoji import build

PARTS = {**COMPONENTS, "processor": "processor"}
WORDS = ["system\nComprehend and analyze the provided prompt.", "user\n", "assistant\n", "<image1>", "<image2>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% for part in message.content %}{{ part.text }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
)


@cache
def folder() -> Path:
    """The folder of a model repository like Qwen-Image-2.1's; written once per session."""
    torch.manual_seed(0)
    root = kept_folder() / "qwen_image_21"
    tokenizer = build.train_tokenizer(WORDS, build.SPECIAL_TOKENS)
    tokenizer.save_pretrained(root / "tokenizer")
    smallest = {"shortest_edge": 32 * 32, "longest_edge": 1024 * 1024}
    Qwen2VLImageProcessorPil(patch_size=16, size=smallest).save_pretrained(root / "processor")
    text_encoder(tokenizer).save_pretrained(root / "text_encoder")
    randomise(transformer(), root / "transformer")
    generator = torch.Generator().manual_seed(0)
    mean, std = torch.randn(64, generator=generator), 0.5 + torch.rand(64, generator=generator)
    vae(latents_mean=mean.tolist(), latents_std=std.tolist()).save_pretrained(root / "vae")
    build.scheduler().save_pretrained(root / "scheduler")
    (root / "model_index.json").write_text(json.dumps({"_class_name": "QwenImage21Pipeline"}))
    return root


def transformer(**config) -> QwenImage21Transformer2DModel:
    sizes = {"num_layers": 2, "attention_head_dim": 32, "num_attention_heads": 4, "context_in_dim": build.WIDTH}
    return QwenImage21Transformer2DModel(**{**sizes, "axes_dims_rope": (8, 12, 12), **config})


def vae(**config) -> AutoencoderKLQwenImage21:
    sizes = {"base_dim": 8, "decoder_base_dim": 8, "dim_mult": [1, 2, 2, 2, 2], "num_res_blocks": 1}
    return AutoencoderKLQwenImage21(**sizes, **config)


def text_encoder(tokenizer: Qwen2Tokenizer) -> Qwen3VLForConditionalGeneration:
    names = {"vision_start": "vision_start", "vision_end": "vision_end", "image": "image_pad", "video": "video_pad"}
    ids = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>") for name, token in names.items()}
    text = {
        "vocab_size": build.VOCABULARY,
        "hidden_size": build.WIDTH,
        "intermediate_size": 2 * build.WIDTH,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "rope_parameters": {"rope_type": "default", "mrope_section": [6, 5, 5], "rope_theta": 5e6},
    }
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": build.WIDTH}
    vision |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    config = Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **ids)
    model = Qwen3VLForConditionalGeneration(config)
    torch.nn.init.normal_(model.model.language_model.embed_tokens.weight)
    return model


class Processor(Qwen3VLProcessor):
    def check_argument_for_proper_class(self, *_):
        """The one for videos needs torchvision."""


def in_diffusers() -> diffusers.QwenImage21Pipeline:
    """diffusers' pipeline with the same weights."""
    root = folder()
    pipe = diffusers.QwenImage21Pipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(root / "scheduler"),
        vae=AutoencoderKLQwenImage21.from_pretrained(root / "vae"),
        text_encoder=Qwen3VLForConditionalGeneration.from_pretrained(root / "text_encoder"),
        processor=Processor(
            Qwen2VLImageProcessorPil.from_pretrained(root / "processor"),
            Qwen2Tokenizer.from_pretrained(root / "tokenizer"),
            chat_template=CHAT_TEMPLATE,
        ),
        transformer=QwenImage21Transformer2DModel.from_pretrained(root / "transformer"),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sampled_by_diffusers(requests: list[dict], noise: Tensor, lora: Path | None = None) -> Tensor:
    """The latents (B, 64, h, w) that QwenImage21Pipeline samples for each of some requests alone.

    In a batch, it would move the images of short prompts behind the longest prompt.

    Args:
        lora: An adapter file.
    """
    pipe = in_diffusers()
    if lora:
        pipe.load_lora_weights(str(lora))
    return torch.cat([_sampled(pipe, *each) for each in zip(requests, noise.split(1), strict=True)])


def _sampled(pipe: diffusers.QwenImage21Pipeline, request: dict, noise: Tensor) -> Tensor:
    images = request.get("edit_image")
    given = {name: request[name] for name in ("prompt", "negative_prompt", "num_inference_steps")}
    given |= {"height": 16 * noise.shape[2], "width": 16 * noise.shape[3]}  # which it would round down
    given |= {"true_cfg_scale": request["cfg_scale"], "latents": noise.flatten(2).transpose(1, 2), "image": images}
    sizes = [(*image.size, None) for image in images or ()]
    resize = request.get("edit_image_auto_resize", True)
    kept = (
        nullcontext() if resize else mock.patch.object(theirs, "calculate_dimensions", side_effect=sizes[-1:] + sizes)
    )
    with kept:
        latents = pipe(**given, output_resolution=64, output_type="latent", return_dict=False)[0]
    return latents.transpose(1, 2).unflatten(2, noise.shape[2:])
