"""Qwen-Image's transformer: the names of its layers, its attention, and the arguments of its call.

Shapes: B batch, E entities, L text tokens, T image tokens, D width, h w latent size.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from diffusers import QwenImageTransformer2DModel
from diffusers.models.transformers.transformer_qwenimage import QwenDoubleStreamAttnProcessor2_0
from torch import Tensor, nn

from ...core.context_parallel import TokenSplit
from ...diffusion.adapters.names import LayerNames
from ...diffusion.pipeline.attention import JointAttention, rotated, rotation_table
from ...diffusion.pipeline.kv_cache import KVCache
from ..shared.entities import regional_mask, with_entities
from ..shared.tokens import pack_latents

# diffusers (0.39 to 0.42 at least) and DiffSynth-Studio read ComfyUI's names, too.
LORA_NAMES = LayerNames(prefix="transformer", comfyui="diffusion_model.", common="comfyui")


class QwenImageAttnProcessor(JointAttention, QwenDoubleStreamAttnProcessor2_0):
    """`JointAttention` of the text's tokens and the image's, as diffusers' processor computes it except `rotated`."""

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        kv_cache: KVCache | None = None,
        split: TokenSplit | None = None,
        text_positions: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        of_image, of_text = image_rotary_emb
        if text_positions is not None:
            of_text = of_text[:, text_positions]
        table = torch.cat([of_text, of_image], dim=1)
        mask = encoder_hidden_states_mask if attention_mask is None else attention_mask
        rotate, extra = partial(rotated, table=table), self.extra(kv_cache)
        return self.attend_both(attn, hidden_states, encoder_hidden_states, rotate, mask, extra, split)


def use_joint_attention(dit: QwenImageTransformer2DModel) -> None:
    for number, block in enumerate(dit.transformer_blocks):
        block.attn.set_processor(QwenImageAttnProcessor(f"block_{number}"))
    dit.pos_embed.register_forward_hook(rotation_tables)


def rotation_tables(_: nn.Module, __: tuple, frequencies: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """A forward hook that turns complex frequencies, of image and text, into tables of `rotated`, once for all blocks.

    Inductor does not compile complex numbers: each block would fall back to eager code for them.
    """
    return tuple(map(rotation_table, frequencies))


def call_inputs(
    dit: QwenImageTransformer2DModel, images: Sequence[Tensor], timestep: Tensor, text: Tensor, mask: Tensor | None
) -> dict[str, Any]:
    """Arguments of the transformer's call at timesteps (B,) in [0, 1000].

    Args:
        images: Latents (B, 16, h, w) of each image, whose tokens follow one another.
        text: Text embeddings (B, L, D), right-padded.
        mask: False where `text` is padding (B, L); None if nothing is.
    """
    return {
        "hidden_states": torch.cat([pack_latents(image) for image in images], dim=1).to(dit.dtype),
        "timestep": timestep / 1000,
        "encoder_hidden_states": text.to(dit.dtype),
        "encoder_hidden_states_mask": mask,
        "img_shapes": [[(1, image.shape[2] // 2, image.shape[3] // 2) for image in images]] * len(images[0]),
    }


def regional_inputs(
    inputs: Mapping[str, Any], texts: Sequence[Tensor], masks: Sequence[Tensor | None], tokens: Tensor
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Arguments of the transformer's call, and of its attention: texts (B, L, D) of entities before the prompt's.

    Args:
        inputs: Arguments of the transformer's call without entities.
        tokens: Tokens of the image (B, E, T) that see each entity's text.

    Raises:
        ValueError: There are images besides the sampled one.
    """
    if inputs["hidden_states"].shape[1] != tokens.shape[2]:
        raise ValueError(
            "eligen_entity_prompts are for the sampled image alone; leave edit_image and context_image out, and give "
            "all samples of a batch one size."
        )
    text = inputs["encoder_hidden_states"], inputs["encoder_hidden_states_mask"]
    lengths = [own.shape[1] for own in (*texts, text[0])]
    text, kept, positions = with_entities(*text, [own.to(text[0]) for own in texts], masks)
    changed = {"encoder_hidden_states": text, "encoder_hidden_states_mask": None}
    return {**inputs, **changed}, {"attention_mask": regional_mask(kept, lengths, tokens), "text_positions": positions}
