"""FLUX.1's transformer and its CLIP: the names of their layers, and the arguments of the transformer's call.

Shapes: B batch, L text tokens, D width, h w latent size.
"""

from collections.abc import Sequence

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from ...diffusion.adapters.names import LayerNames
from ..shared.flux import DOUBLE, SINGLE
from ..shared.flux1 import BLOCK_NAMES, image_positions
from ..shared.tokens import pack_latents

LORA_NAMES = LayerNames(
    prefix="transformer",
    original=BLOCK_NAMES
    | {
        "double_blocks.*.img_mod.lin": f"{DOUBLE}.norm1.linear",
        "double_blocks.*.txt_mod.lin": f"{DOUBLE}.norm1_context.linear",
        "single_blocks.*.modulation.lin": f"{SINGLE}.norm.linear",
        "final_layer.adaLN_modulation.1": "norm_out.linear",
        "blocks.*.norm1_a.linear": f"{DOUBLE}.norm1.linear",
        "blocks.*.norm1_b.linear": f"{DOUBLE}.norm1_context.linear",
        "single_blocks.*.norm.linear": f"{SINGLE}.norm.linear",
    }
    | {
        f"{name}_in.{layer}_layer": f"time_text_embed.{ours}_embedder.linear_{number}"
        for name, ours in {"time": "timestep", "guidance": "guidance", "vector": "text"}.items()
        for number, layer in enumerate(("in", "out"), 1)
    },
    swapped=("final_layer.adaLN_modulation.1",),  # it has the shift before the scale
)
CLIP_LAYERS = (*(f"self_attn.{part}_proj" for part in ("q", "k", "v", "out")), "mlp.fc1", "mlp.fc2")
CLIP_LORA_NAMES = LayerNames(
    prefix="text_encoder",
    original={f"text_model.encoder.layers.*.{layer}": f"encoder.layers.*.{layer}" for layer in CLIP_LAYERS},
)


def image_inputs(dit: FluxTransformer2DModel, images: Sequence[Tensor]) -> dict[str, Tensor]:
    """Tokens and positions of noisy latents (B, C, h, w) and of images to edit, as arguments of a network's call."""
    tokens = torch.cat([pack_latents(image) for image in images], dim=1)
    return {"hidden_states": tokens.to(dit.dtype), "img_ids": image_positions(images)}


def prompt_inputs(dit: FluxTransformer2DModel, text: Tensor, pooled: Tensor) -> dict[str, Tensor]:
    """Text embeddings (B, L, D) and pooled ones (B, D') as arguments of a network's call."""
    return {
        "encoder_hidden_states": text.to(dit.dtype),
        "txt_ids": torch.zeros(text.shape[1], 3, device=text.device),
        "pooled_projections": pooled.to(dit.dtype),
    }
