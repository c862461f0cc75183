"""Rebuild the embedded Z-Image: its classes in miniature, trained by this project on the emoji in colour.

    python -m models.emoji_z_image.build init outputs/emoji_z_image_init
    python train.py experiment=emoji_z_image/autoencoder
    python -m models.emoji_z_image.build autoencoder outputs/emoji_z_image_init outputs/emoji_z_image_autoencoder-*/weights/step-2600.*
    python train.py experiment=emoji_z_image/pretrain
    python -m models.emoji_z_image.build release outputs/emoji_z_image_init models/emoji_z_image outputs/emoji_z_image_pretrain-*/weights/step-1400.*

The folders have the layout of Z-Image's repository, so that every program that reads that reads this, too.
"""  # noqa: E501

import json
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel
from safetensors.torch import load_file, save_file
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model

from diffsynth.core.process.console import keep_console
from diffsynth.pipelines.autoencoders.kl import NormalisedAutoencoderKL
from models.emoji.build import VOCABULARY, pixels, psnr, release, train_tokenizer
from models.emoji_flux2.build import CHAT_TEMPLATE, SPECIAL_TOKENS, WIDTH


def init(folder: str) -> None:
    """Write the tokenizer and all networks with random weights."""
    torch.manual_seed(0)
    root = Path(folder)
    special_tokens = [*SPECIAL_TOKENS, "<|vision_start|>", "<|vision_end|>"]
    tokenizer = train_tokenizer(["user\n", "assistant\n", "\n\n"], special_tokens)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(root / "tokenizer")
    text_encoder(tokenizer).save_pretrained(root / "text_encoder")
    transformer().save_pretrained(root / "transformer")
    vae().save_pretrained(root / "vae")
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(root / "scheduler")
    (root / "model_index.json").write_text(json.dumps(model_index(), indent=2) + "\n")


def text_encoder(tokenizer: Qwen2Tokenizer) -> Qwen3Model:
    """A text encoder of three layers; the pipeline reads the output of the second."""
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen3Model(config)
    # Embeddings of words start far apart; with the default standard deviation of 0.02 prompts are learnt much slower.
    torch.nn.init.normal_(model.embed_tokens.weight)
    return model


def transformer() -> ZImageTransformer2DModel:
    return ZImageTransformer2DModel(
        dim=144,
        n_layers=6,
        n_refiner_layers=1,
        n_heads=6,
        n_kv_heads=6,
        cap_feat_dim=WIDTH,
        axes_dims=[8, 8, 8],
        axes_lens=[256, 64, 64],
    )


def vae() -> AutoencoderKL:
    """The released autoencoder with fewer channels; `autoencoder` sets the shift and the scale of its latents."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        sample_size=64,
        scaling_factor=1.0,
        shift_factor=0.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def model_index() -> dict:
    return {
        "_class_name": "ZImagePipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen3Model"],
        "tokenizer": ["transformers", "Qwen2Tokenizer"],
        "transformer": ["diffusers", "ZImageTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


@torch.no_grad()
def autoencoder(folder: str, weights: str) -> None:
    """Copy trained autoencoder weights into `folder`, and set the latents' shift and scale by the colour emoji."""
    path = Path(folder) / "vae"
    model = NormalisedAutoencoderKL.from_pretrained(path)
    model.load_state_dict(load_file(weights))
    for metadata in ("all_train.csv", "all_held_out.csv"):
        images = pixels(metadata)
        print(f"{metadata}: {psnr(images, model.reconstruct(model.distribution(images).mean)):.2f} dB")
    latents = model.distribution(pixels("color.csv")).mean
    statistics = {"shift_factor": latents.mean().item(), "scaling_factor": 1 / latents.std().item()}
    config = json.loads((path / "config.json").read_text()) | statistics
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(model.state_dict(), path / "diffusion_pytorch_model.safetensors", {"format": "pt"})


def controlnet(source: str, target: str, weights: str) -> None:
    """Write a trained ControlNet in bf16 to `target`, with the configuration of the one that it began as."""
    Path(target).mkdir(parents=True, exist_ok=True)
    (Path(target) / "config.json").write_text((Path(source) / "config.json").read_text())
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(weights).items()}
    save_file(tensors, Path(target) / "diffusion_pytorch_model.safetensors", {"format": "pt"})


if __name__ == "__main__":
    keep_console()
    {"init": init, "autoencoder": autoencoder, "release": release, "controlnet": controlnet}[sys.argv[1]](*sys.argv[2:])
