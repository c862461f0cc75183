"""AuraFlow in miniature with random weights, in a folder laid out like the released one."""

from functools import cache
from pathlib import Path

import torch
from diffusers import AuraFlowTransformer2DModel, AutoencoderKL
from tiny import kept_folder
from transformers import UMT5Config, UMT5EncoderModel

from models.emoji.build import VOCABULARY, train_tokenizer


@cache
def folder() -> Path:
    """The folder of a model repository with random weights; written once per session."""
    path = kept_folder() / "auraflow"
    train_tokenizer([], ["<|endoftext|>"]).save_pretrained(path / "tokenizer")
    torch.manual_seed(0)
    transformer = AuraFlowTransformer2DModel(
        sample_size=8,
        num_mmdit_layers=1,
        num_single_dit_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=64,
        pos_embed_max_size=64,
    )
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    encoder = UMT5EncoderModel(UMT5Config(vocab_size=VOCABULARY, dropout_rate=0.0, **sizes))
    channels, blocks = (16, 16, 16, 16), 4
    down, up = (["DownEncoderBlock2D"] * blocks, ["UpDecoderBlock2D"] * blocks)
    vae = AutoencoderKL(
        block_out_channels=channels,
        down_block_types=down,
        up_block_types=up,
        norm_num_groups=8,
        scaling_factor=0.13025,
    )
    for name, network in {"transformer": transformer, "text_encoder": encoder, "vae": vae}.items():
        for parameter in network.parameters():  # so that every parameter counts
            parameter.data += 0.05 * torch.randn(parameter.shape)
        network.save_pretrained(path / name)
    return path
