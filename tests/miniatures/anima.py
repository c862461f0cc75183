"""Anima in miniature with random weights, and what diffusers' modular blocks sample with it."""

from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from diffusers import (
    AnimaTextConditioner,
    ClassifierFreeGuidance,
    CosmosTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.models.transformers import transformer_cosmos
from diffusers.modular_pipelines import SequentialPipelineBlocks
from diffusers.modular_pipelines.anima.encoders import AnimaTextEncoderStep
from diffusers.modular_pipelines.anima.modular_blocks_anima import AnimaCoreDenoiseStep
from miniatures.autoencoders import give_latent_statistics
from tiny import kept_folder
from tiny_flux2 import randomise
from torch import Tensor, nn
from transformers import AutoTokenizer, Qwen3Config, Qwen3Model
from transformers import T5TokenizerFast as T5Tokenizer

from models.emoji.build import SPECIAL_TOKENS, VOCABULARY, train_tokenizer, vae

PARTS = {name: name for name in ("text_encoder", "text_conditioner", "vae", "tokenizer", "t5_tokenizer")}
PARTS = {"dit": "transformer"} | PARTS
WIDTH, TEXT_WIDTH = 32, 48  # of the text encoder's states, and of what the transformer reads
LETTERS = [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz,"]
PIECES = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), ("▁red", -1.0), *LETTERS]  # of T5


@cache
def folder() -> Path:
    """The folder of a model repository like Anima's; written once per session."""
    root = kept_folder() / "anima"
    torch.manual_seed(0)
    train_tokenizer([], SPECIAL_TOKENS).save_pretrained(root / "tokenizer")
    T5Tokenizer(vocab=PIECES, extra_ids=0).save_pretrained(root / "t5_tokenizer")
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    sizes |= {"hidden_size": WIDTH, "intermediate_size": WIDTH, "vocab_size": VOCABULARY, "pad_token_id": 0}
    randomise(Qwen3Model(Qwen3Config(**sizes)), root / "text_encoder")
    randomise(conditioner(), root / "text_conditioner")
    randomise(transformer(), root / "transformer")
    vae().save_pretrained(root / "vae")
    give_latent_statistics(root / "vae" / "config.json")
    return root


def conditioner() -> AnimaTextConditioner:
    widths = {"source_dim": WIDTH, "target_dim": TEXT_WIDTH, "model_dim": 64}
    return AnimaTextConditioner(**widths, num_layers=2, num_attention_heads=4, target_vocab_size=len(PIECES))


def transformer(**changes) -> CosmosTransformer3DModel:
    sizes = {"num_attention_heads": 4, "attention_head_dim": 24, "num_layers": 2, "text_embed_dim": TEXT_WIDTH}
    kinds = {"adaln_lora_dim": 16, "max_size": (4, 32, 32), "rope_scale": (1.0, 4.0, 4.0), "extra_pos_embed_type": None}
    return CosmosTransformer3DModel(**sizes | kinds | changes)


class TextToLatents(SequentialPipelineBlocks):
    """The blocks of Anima from the prompt to the latents."""

    model_name = "anima"
    block_classes = [AnimaTextEncoderStep, AnimaCoreDenoiseStep]
    block_names = ["text_encoder", "denoise"]


def sampled_by_diffusers(requests: list[dict], noise: Tensor, lora: Path | None = None) -> Tensor:
    """The latents (B, 16, h, w) that the modular blocks of Anima sample for some requests, with a LoRA file."""
    pipe, first = TextToLatents().init_pipeline(), requests[0]
    networks = {"text_encoder": Qwen3Model, "text_conditioner": AnimaTextConditioner}
    networks |= {"transformer": CosmosTransformer3DModel}
    pipe.update_components(
        **{name: kind.from_pretrained(folder() / name) for name, kind in networks.items()},
        tokenizer=AutoTokenizer.from_pretrained(folder() / "tokenizer"),
        t5_tokenizer=T5Tokenizer.from_pretrained(folder() / "t5_tokenizer"),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        guider=ClassifierFreeGuidance(guidance_scale=first["cfg_scale"]),
    )
    pipe.set_progress_bar_config(disable=True)
    if lora is not None:
        pipe.load_lora_weights(lora)
    inputs = {name: first[name] for name in ("height", "width", "num_inference_steps")}
    inputs |= {name: [request[name] for request in requests] for name in ("prompt", "negative_prompt")}
    with torch.no_grad(), without_torchvision():
        return pipe(**inputs, latents=noise.unsqueeze(2), output="latents").squeeze(2)


def without_torchvision() -> AbstractContextManager:
    """Inside, diffusers resizes a mask of padding, whose values are all alike, without torchvision."""

    def resize(mask: Tensor, size: list[int], interpolation: str) -> Tensor:
        return nn.functional.interpolate(mask, size, mode=interpolation)

    modes = SimpleNamespace(NEAREST="nearest")
    stand_in = SimpleNamespace(functional=SimpleNamespace(resize=resize), InterpolationMode=modes)
    return mock.patch.object(transformer_cosmos, "transforms", stand_in, create=True)
