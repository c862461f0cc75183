"""Rebuild the embedded FLUX.2: its classes in miniature, trained by this project on the emoji in colour.

    python -m models.emoji_flux2.build init outputs/emoji_flux2_init
    python train.py experiment=emoji_flux2/autoencoder
    python -m models.emoji_flux2.build autoencoder outputs/emoji_flux2_init outputs/emoji_flux2_autoencoder-*/weights/step-2600.*
    python train.py experiment=emoji_flux2/pretrain
    python -m models.emoji_flux2.build release outputs/emoji_flux2_init models/emoji_flux2 outputs/emoji_flux2_pretrain-*/weights/step-1400.*

The folders have the layout of FLUX.2-klein's repository, so that every program that reads that reads this, too.
"""  # noqa: E501

import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel
from safetensors.torch import load_file, save_file
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM

from diffsynth.core.process.console import keep_console
from diffsynth.pipelines.flux2_image import Flux2VAE
from models.emoji.build import VOCABULARY, pixels, psnr, release, train_tokenizer

WIDTH = 128  # of the text encoder; a guess
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
# It formats conversations of plain messages as the released template does.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{% endif %}"
)


def init(folder: str) -> None:
    """Write the tokenizer and all networks with random weights."""
    torch.manual_seed(0)
    root = Path(folder)
    tokenizer = train_tokenizer(["user\n", "assistant\n", "\n\n"], SPECIAL_TOKENS)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(root / "tokenizer")
    text_encoder(tokenizer).save_pretrained(root / "text_encoder")
    transformer().save_pretrained(root / "transformer")
    vae().save_pretrained(root / "vae")
    scheduler().save_pretrained(root / "scheduler")
    (root / "model_index.json").write_text(json.dumps(model_index(), indent=2) + "\n")


def text_encoder(tokenizer: Qwen2Tokenizer) -> Qwen3ForCausalLM:
    """A text encoder of four layers; the pipeline reads the outputs of the first three."""
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    model = Qwen3ForCausalLM(config)
    # Embeddings of words start far apart; with the default standard deviation of 0.02 prompts are learnt much slower.
    torch.nn.init.normal_(model.model.embed_tokens.weight)
    return model


def transformer() -> Flux2Transformer2DModel:
    """A transformer whose width exceeds the channels of its tokens; a narrower one cannot predict their noise."""
    return Flux2Transformer2DModel(
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=6,
        joint_attention_dim=3 * WIDTH,
        mlp_ratio=1.5,
        axes_dims_rope=(8, 8, 8, 8),
        guidance_embeds=False,
    )


def vae() -> AutoencoderKLFlux2:
    return AutoencoderKLFlux2(
        block_out_channels=(16, 32, 64, 64), layers_per_block=1, norm_num_groups=8, sample_size=64
    )


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    """The released scheduler configuration."""
    return FlowMatchEulerDiscreteScheduler(
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
        time_shift_type="exponential",
    )


def model_index() -> dict:
    return {
        "_class_name": "Flux2KleinPipeline",
        "is_distilled": False,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen3ForCausalLM"],
        "tokenizer": ["transformers", "Qwen2Tokenizer"],
        "transformer": ["diffusers", "Flux2Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKLFlux2"],
    }


@torch.no_grad()
def autoencoder(folder: str, weights: str) -> None:
    """Copy trained autoencoder weights into `folder`, and set the latents' statistics to those of the colour emoji."""
    path = Path(folder) / "vae"
    model = Flux2VAE.from_pretrained(path)
    model.load_state_dict(load_file(weights), strict=False)  # the statistics are not trained
    for metadata in ("all_train.csv", "all_held_out.csv"):
        images = pixels(metadata)
        print(f"{metadata}: {psnr(images, model.reconstruct(model.distribution(images).mean)):.2f} dB")
    latents = F.pixel_unshuffle(model.distribution(pixels("color.csv")).mean, 2)
    model.bn.running_mean.copy_(latents.mean((0, 2, 3)))
    model.bn.running_var.copy_(latents.var((0, 2, 3)))
    save_file(model.state_dict(), path / "diffusion_pytorch_model.safetensors", {"format": "pt"})


if __name__ == "__main__":
    keep_console()
    {"init": init, "autoencoder": autoencoder, "release": release}[sys.argv[1]](*sys.argv[2:])
