"""ERNIE-Image in miniature with random weights, and what diffusers samples with them."""

import json
from functools import cache
from pathlib import Path

import diffusers
import torch
from diffusers import ErnieImageTransformer2DModel, FlowMatchEulerDiscreteScheduler
from miniatures.autoencoders import give_batch_norm_statistics
from miniatures.z_image import loaded
from tiny import kept_folder
from tiny_flux2 import randomise
from torch import Tensor
from transformers import Mistral3Config, Mistral3Model

from models.emoji.build import VOCABULARY, train_tokenizer
from models.emoji_flux2 import build

WIDTH = 64


@cache
def folder() -> Path:
    """The folder of a model repository like ERNIE-Image's; written once per session."""
    root = kept_folder() / "ernie_image"
    build.init(str(root))
    torch.manual_seed(0)
    randomise(transformer(), root / "transformer")
    for part in ("text_encoder", "tokenizer"):
        for file in (root / part).iterdir():
            file.unlink()
    train_tokenizer([], ["<|endoftext|>", "[IMG]"]).save_pretrained(root / "tokenizer")
    text_encoder().save_pretrained(root / "text_encoder")
    give_batch_norm_statistics(root / "vae")
    FlowMatchEulerDiscreteScheduler(shift=4.0).save_pretrained(root / "scheduler")
    index = {
        "_class_name": "ErnieImagePipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Mistral3Model"],
        "tokenizer": ["transformers", "Qwen2Tokenizer"],
        "transformer": ["diffusers", "ErnieImageTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKLFlux2"],
        "pe": [None, None],
        "pe_tokenizer": [None, None],
    }
    (root / "model_index.json").write_text(json.dumps(index))
    return root


def transformer() -> ErnieImageTransformer2DModel:
    return ErnieImageTransformer2DModel(
        hidden_size=96,
        num_attention_heads=4,
        num_layers=3,
        ffn_hidden_size=128,
        text_in_dim=WIDTH,
        rope_axes_dim=(8, 8, 8),
    )


def text_encoder() -> Mistral3Model:
    sizes = {"hidden_size": WIDTH, "intermediate_size": 128, "head_dim": 16, "num_attention_heads": 4}
    config = Mistral3Config(
        text_config={"model_type": "mistral", "vocab_size": VOCABULARY, "num_hidden_layers": 3, **sizes}
        | {"num_key_value_heads": 2, "sliding_window": None},
        vision_config={"model_type": "pixtral", "num_hidden_layers": 1, "image_size": 32, "patch_size": 16, **sizes},
        image_token_index=1,
    )
    model = Mistral3Model(config)
    torch.nn.init.normal_(model.get_input_embeddings().weight)
    return model


def sampled_by_diffusers(requests: list[dict], noise: Tensor, lora: Path | None = None) -> Tensor:
    """The latents (B, 128, h, w) that ErnieImagePipeline samples for some requests, with a LoRA file."""
    first = requests[0]
    pipe = loaded(diffusers.ErnieImagePipeline, folder())
    if lora is not None:
        pipe.load_lora_weights(lora)
    return pipe(
        prompt=[request["prompt"] for request in requests],
        negative_prompt=[request["negative_prompt"] for request in requests],
        **{name: first[name] for name in ("height", "width", "num_inference_steps")},
        guidance_scale=first["cfg_scale"],
        latents=noise,
        output_type="latent",
        return_dict=False,
    )[0]
