"""What FLUX.1 and Chroma share: names of layers, noise levels, attention, tokens.

Constants come from the released pipeline (diffusers' FluxPipeline) unless a comment says otherwise.
"""

from collections.abc import Sequence

import torch
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch import Tensor, nn

from ..core.context_parallel import TokenSplit
from ..diffusion.flow_match import exponential_shift, time_shift
from ..diffusion.pipeline.attention import JointAttention
from ..diffusion.pipeline.kv_cache import KVCache
from .flux2_image import rotated, split_heads

TRAINING_SHIFT, TRAINING_SIGMA_MIN = 3.0, 0.003 / 1.002  # DiffSynth-Studio's training grid, at every resolution
DOUBLE, SINGLE = "transformer_blocks.*", "single_transformer_blocks.*"
QKV = tuple(f"{DOUBLE}.attn.to_{part}" for part in "qkv")
TEXT_QKV = tuple(f"{DOUBLE}.attn.add_{part}_proj" for part in "qkv")
QKV_MLP = (*(f"{SINGLE}.attn.to_{part}" for part in "qkv"), f"{SINGLE}.proj_mlp")
# Black Forest Labs' names of the blocks' layers, and DiffSynth-Studio's, which calls the image's a and the text's b.
BLOCK_NAMES = {
    "double_blocks.*.img_attn.qkv": QKV,
    "double_blocks.*.txt_attn.qkv": TEXT_QKV,
    "double_blocks.*.img_attn.proj": f"{DOUBLE}.attn.to_out.0",
    "double_blocks.*.txt_attn.proj": f"{DOUBLE}.attn.to_add_out",
    "double_blocks.*.img_mlp.0": f"{DOUBLE}.ff.net.0.proj",
    "double_blocks.*.img_mlp.2": f"{DOUBLE}.ff.net.2",
    "double_blocks.*.txt_mlp.0": f"{DOUBLE}.ff_context.net.0.proj",
    "double_blocks.*.txt_mlp.2": f"{DOUBLE}.ff_context.net.2",
    "single_blocks.*.linear1": QKV_MLP,
    "single_blocks.*.linear2": f"{SINGLE}.proj_out",
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "final_layer.linear": "proj_out",
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
    linear = torch.linspace(last + (1 - last) * denoising_strength, last, num_inference_steps)
    if is_training:
        return time_shift(linear, TRAINING_SHIFT)
    mu = _shift_of_tokens(dynamic_shift_len) if exponential_shift_mu is None else exponential_shift_mu
    return exponential_shift(linear, mu)


def _shift_of_tokens(tokens: int) -> float:
    """The line through μ = 0.5 at 256 tokens and μ = 1.15 at 4096 tokens."""
    return 0.5 + (tokens - 256) * (1.15 - 0.5) / (4096 - 256)


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
        layers = attn.to_q, attn.to_k, attn.to_v
        heads = split_heads([layer(hidden_states) for layer in layers], attn.norm_q, attn.norm_k)
        if encoder_hidden_states is None:
            return self.attend(rotated(heads, image_rotary_emb), mask, extra, split)
        layers = attn.add_q_proj, attn.add_k_proj, attn.add_v_proj
        text = split_heads([layer(encoder_hidden_states) for layer in layers], attn.norm_added_q, attn.norm_added_k)
        heads = [torch.cat(streams, dim=1) for streams in zip(text, heads, strict=True)]
        tokens = self.attend(rotated(heads, image_rotary_emb), mask, extra, split)
        text, image = tokens.tensor_split([encoder_hidden_states.shape[1]], dim=1)
        return attn.to_out[1](attn.to_out[0](image)), attn.to_add_out(text)


def use_joint_attention(dit: nn.Module, processor: type[JointAttention] = Flux1AttnProcessor) -> None:
    for kind, blocks in (("double", dit.transformer_blocks), ("single", dit.single_transformer_blocks)):
        for number, block in enumerate(blocks):
            block.attn.set_processor(processor(f"{kind}_{number}"))


def image_positions(images: Sequence[Tensor]) -> Tensor:
    """Positions (L, 3) of the tokens of noisy latents and of edit images: 0 or 1, row, column."""
    grids = [[torch.arange(side // 2) for side in image.shape[2:]] for image in images]
    return torch.cat([torch.cartesian_prod(torch.tensor([int(n > 0)]), *grid) for n, grid in enumerate(grids)])
