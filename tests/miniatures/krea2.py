"""Krea 2 in miniature with random weights, and what diffusers samples with them."""

import json
from functools import cache
from pathlib import Path

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Krea2Transformer2DModel
from miniatures.autoencoders import give_latent_statistics
from miniatures.z_image import loaded
from tiny import kept_folder
from tiny_flux2 import randomise
from torch import Tensor
from transformers import Qwen3VLConfig, Qwen3VLModel

from models.emoji import build

WIDTH, TEXT_LAYERS = 64, (2, 5)


@cache
def folder() -> Path:
    """The folder of a model repository like Krea 2's; written once per session."""
    root = kept_folder() / "krea2"
    build.init(str(root))
    torch.manual_seed(0)
    randomise(transformer(), root / "transformer")
    for file in (root / "text_encoder").iterdir():
        file.unlink()
    text_encoder().save_pretrained(root / "text_encoder")
    give_latent_statistics(root / "vae" / "config.json")
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_image_seq_len=6400)
    scheduler.save_pretrained(root / "scheduler")
    index = json.loads((root / "model_index.json").read_text()) | {
        "_class_name": "Krea2Pipeline",
        "text_encoder": ["transformers", "Qwen3VLModel"],
        "transformer": ["diffusers", "Krea2Transformer2DModel"],
        "text_encoder_select_layers": TEXT_LAYERS,
    }
    (root / "model_index.json").write_text(json.dumps(index))
    return root


def transformer() -> Krea2Transformer2DModel:
    return Krea2Transformer2DModel(
        num_layers=2,
        attention_head_dim=24,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=128,
        timestep_embed_dim=32,
        text_hidden_dim=WIDTH,
        num_text_layers=len(TEXT_LAYERS),
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=96,
        axes_dims_rope=(8, 8, 8),
    )


def text_encoder() -> Qwen3VLModel:
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": build.VOCABULARY,
            "hidden_size": WIDTH,
            "intermediate_size": 2 * WIDTH,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "rope_parameters": {"rope_type": "default", "mrope_section": [4, 2, 2], "rope_theta": 5e6},
        },
        vision_config={
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": WIDTH,
            "deepstack_visual_indexes": [0],
        },
    )
    model = Qwen3VLModel(config)
    torch.nn.init.normal_(model.get_input_embeddings().weight)
    return model


def sampled_by_diffusers(requests: list[dict], noise: Tensor, lora: Path | None = None) -> Tensor:
    """The latents (B, 16, h, w) that Krea2Pipeline samples for some requests, with a LoRA file."""
    first, (height, width) = requests[0], noise.shape[2:]
    pipe = loaded(diffusers.Krea2Pipeline, folder())
    if lora is not None:
        pipe.load_lora_weights(lora)
    tokens = pipe(
        prompt=[request["prompt"] for request in requests],
        negative_prompt=[request["negative_prompt"] for request in requests],
        **{name: first[name] for name in ("height", "width", "num_inference_steps")},
        guidance_scale=first["cfg_scale"] - 1,
        latents=pipe._pack_latents(noise, len(noise), 16, height, width),
        output_type="latent",
        return_dict=False,
    )[0]
    return pipe._unpack_latents(tokens, first["height"], first["width"])[:, :, 0]
