"""What FLUX.1 and Chroma share: names of layers, noise levels, attention, tokens.

Constants come from the released pipeline (diffusers' FluxPipeline) unless a comment says otherwise.
"""

from collections.abc import Sequence
from functools import partial

import torch
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch import Tensor, nn

from ...core.context_parallel import TokenSplit
from ...core.host_memory import sent
from ...diffusion.flow_match import linear_levels, shift_by_tokens, shift_of_tokens, time_shift
from ...diffusion.pipeline.attention import JointAttention, split_heads
from ...diffusion.pipeline.kv_cache import KVCache
from .flux import COMMON_NAMES, DOUBLE, QKV, SINGLE, TEXT_QKV, rotation

TRAINING_SHIFT, TRAINING_SIGMA_MIN = 3.0, 0.003 / 1.002  # DiffSynth-Studio's training grid, at every resolution
LOW_SHIFT, HIGH_SHIFT = (256, 0.5), (4096, 1.15)  # image tokens, and μ
QKV_MLP = (*(f"{SINGLE}.attn.to_{part}" for part in "qkv"), f"{SINGLE}.proj_mlp")
# Black Forest Labs' names of the blocks' layers, and DiffSynth-Studio's, which calls the image's a and the text's b.
BLOCK_NAMES = COMMON_NAMES | {
    "double_blocks.*.img_mlp.0": f"{DOUBLE}.ff.net.0.proj",
    "double_blocks.*.img_mlp.2": f"{DOUBLE}.ff.net.2",
    "double_blocks.*.txt_mlp.0": f"{DOUBLE}.ff_context.net.0.proj",
    "double_blocks.*.txt_mlp.2": f"{DOUBLE}.ff_context.net.2",
    "single_blocks.*.linear1": QKV_MLP,
    "single_blocks.*.linear2": f"{SINGLE}.proj_out",
    "blocks.*.attn.a_to_qkv": QKV,
    "blocks.*.attn.b_to_qkv": TEXT_QKV,
    "blocks.*.attn.a_to_out": f"{DOUBLE}.attn.to_out.0",
    "blocks.*.attn.b_to_out": f"{DOUBLE}.attn.to_add_out",
    "blocks.*.ff_a.0": f"{DOUBLE}.ff.net.0.proj",
    "blocks.*.ff_a.2": f"{DOUBLE}.ff.net.2",
    "blocks.*.ff_b.0": f"{DOUBLE}.ff_context.net.0.proj",
    "blocks.*.ff_b.2": f"{DOUBLE}.ff_context.net.2",
    "single_blocks.*.to_qkv_mlp": QKV_MLP,
    "single_blocks.*.proj_out": f"{SINGLE}.proj_out",
}


def flux1_sigmas(
    num_inference_steps: int,
    denoising_strength: float = 1.0,
    dynamic_shift_len: int | None = None,
    exponential_shift_mu: float | None = None,
) -> Tensor:
    """Noise levels (N,) of FLUX.1: linear, then shifted.

    In sampling they are diffusers': they end at 1 / N and are shifted by a μ that is linear in tokens. In training they
    are DiffSynth-Studio's: they end at 0.003 / 1.002 and are shifted by a constant factor of 3.

    Args:
        dynamic_shift_len: Number of image tokens, H/16 · W/16; None takes the training grid.
        exponential_shift_mu: μ itself, which overrides the number of tokens; 0 shifts nothing.
    """
    is_training = dynamic_shift_len is None and exponential_shift_mu is None
    last = TRAINING_SIGMA_MIN if is_training else 1 / num_inference_steps
    linear = linear_levels(num_inference_steps, denoising_strength, last)
    if is_training:
        return time_shift(linear, TRAINING_SHIFT)
    shift = partial(shift_of_tokens, low=LOW_SHIFT, high=HIGH_SHIFT)
    return shift_by_tokens(linear, dynamic_shift_len, exponential_shift_mu, shift)


class Flux1AttnProcessor(JointAttention, FluxAttnProcessor):
    """diffusers' processor, and `JointAttention` if the block has a `kv_cache` or its tokens are split."""

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        kv_cache: KVCache | None = None,
        split: TokenSplit | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        extra = self.extra(kv_cache)
        if extra is None and split is None:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        return self.joint(attn, hidden_states, encoder_hidden_states, image_rotary_emb, extra=extra, split=split)

    def joint(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None,
        image_rotary_emb: tuple[Tensor, Tensor],
        mask: Tensor | None = None,
        extra: tuple[Tensor, Tensor] | None = None,
        split: TokenSplit | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """`JointAttention` of image tokens (B, L, D) and text tokens (B, L', D); single blocks have both in the first.

        Args:
            image_rotary_emb: Factors (S, head_dim) of cosines and of sines, of the text's tokens, then of the image's.
            mask: Tokens that are attended to (B, S); None for all.
            extra, split: See `attend`.
        """
        rotate = rotation(image_rotary_emb)
        if encoder_hidden_states is not None:
            return self.attend_both(attn, hidden_states, encoder_hidden_states, rotate, mask, extra, split)
        projected = [layer(hidden_states) for layer in (attn.to_q, attn.to_k, attn.to_v)]
        query, key, value = split_heads(projected, attn.heads, attn.norm_q, attn.norm_k)
        return self.attend((rotate(query), rotate(key), value), mask, extra, split)


def use_joint_attention(dit: nn.Module, processor: type[JointAttention] = Flux1AttnProcessor) -> None:
    for kind, blocks in (("double", dit.transformer_blocks), ("single", dit.single_transformer_blocks)):
        for number, block in enumerate(blocks):
            block.attn.set_processor(processor(f"{kind}_{number}"))


def image_positions(images: Sequence[Tensor]) -> Tensor:
    """Positions (L, 3) of the tokens of noisy latents (B, C, h, w) and of edit images: 0 or 1, row, column."""
    grids = [[torch.arange(side // 2) for side in image.shape[2:]] for image in images]
    places = torch.cat([torch.cartesian_prod(torch.tensor([int(n > 0)]), *grid) for n, grid in enumerate(grids)])
    return sent(places, images[0].device)
