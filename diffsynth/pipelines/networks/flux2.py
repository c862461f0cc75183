"""FLUX.2's transformer: the names of its layers, and its attention with further keys."""

import torch
from diffusers import Flux2Transformer2DModel
from diffusers.models.transformers.transformer_flux2 import Flux2AttnProcessor, Flux2ParallelSelfAttnProcessor
from torch import Tensor, nn

from ...core.context_parallel import TokenSplit
from ...diffusion.adapters.names import LayerNames
from ...diffusion.pipeline.attention import JointAttention, split_heads
from ...diffusion.pipeline.kv_cache import KVCache
from ..shared.flux import COMMON_NAMES, DOUBLE, SINGLE, rotation

# Black Forest Labs' names of the layers; in the last one they have the shift before the scale.
LORA_NAMES = LayerNames(
    prefix="transformer",
    original=COMMON_NAMES
    | {
        "double_blocks.*.img_mlp.0": f"{DOUBLE}.ff.linear_in",
        "double_blocks.*.img_mlp.2": f"{DOUBLE}.ff.linear_out",
        "double_blocks.*.txt_mlp.0": f"{DOUBLE}.ff_context.linear_in",
        "double_blocks.*.txt_mlp.2": f"{DOUBLE}.ff_context.linear_out",
        "single_blocks.*.linear1": f"{SINGLE}.attn.to_qkv_mlp_proj",
        "single_blocks.*.linear2": f"{SINGLE}.attn.to_out",
        "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
        "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
        "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
        "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
        "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
        "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
        "single_stream_modulation.lin": "single_stream_modulation.linear",
        "final_layer.adaLN_modulation.1": "norm_out.linear",
    },
    swapped=("final_layer.adaLN_modulation.1",),
)


class Flux2DoubleAttnProcessor(JointAttention, Flux2AttnProcessor):
    """diffusers' processor, and `JointAttention` if the block has a `kv_cache` or its tokens are split."""

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        kv_cache: KVCache | None = None,
        split: TokenSplit | None = None,
    ) -> tuple[Tensor, Tensor]:
        extra = self.extra(kv_cache)
        if extra is None and split is None:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        rotate = rotation(image_rotary_emb)
        return self.attend_both(attn, hidden_states, encoder_hidden_states, rotate, attention_mask, extra, split)


class Flux2SingleAttnProcessor(JointAttention, Flux2ParallelSelfAttnProcessor):
    """diffusers' processor, and `JointAttention` if the block has a `kv_cache` or its tokens are split."""

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        kv_cache: KVCache | None = None,
        split: TokenSplit | None = None,
    ) -> Tensor:
        extra = self.extra(kv_cache)
        if extra is None and split is None:
            return super().__call__(attn, hidden_states, attention_mask, image_rotary_emb)
        projected, mlp = attn.to_qkv_mlp_proj(hidden_states).tensor_split([3 * attn.inner_dim], dim=-1)
        query, key, value = split_heads(projected.chunk(3, dim=-1), attn.heads, attn.norm_q, attn.norm_k)
        rotate = rotation(image_rotary_emb)
        tokens = self.attend((rotate(query), rotate(key), value), attention_mask, extra, split)
        return attn.to_out(torch.cat([tokens, attn.mlp_act_fn(mlp)], dim=-1))


def use_joint_attention(dit: Flux2Transformer2DModel) -> None:
    for number, block in enumerate(dit.transformer_blocks):
        block.attn.set_processor(Flux2DoubleAttnProcessor(f"double_{number}"))
    for number, block in enumerate(dit.single_transformer_blocks):
        block.attn.set_processor(Flux2SingleAttnProcessor(f"single_{number}"))
