"""Stable Diffusion 3.5's ControlNet: blocks like the transformer's; each output is added to several of its blocks.

It reads the 16 channels of an image's latents, or 17 with an image to inpaint, in the order of diffusers'
StableDiffusion3ControlNetInpaintingPipeline.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import SD3ControlNetModel, SD3Transformer2DModel
from torch import Tensor

from ...diffusion.controlnet.family import ControlFamily
from ...diffusion.controlnet.inputs import ControlInputs, check_sizes
from ...diffusion.controlnet.several import outputs_of, sum_block_outputs

COPIED_BLOCKS = 12  # the number that diffusers' class takes, half of medium's
SIZES = (
    "sample_size", "patch_size", "in_channels", "out_channels", "attention_head_dim", "num_attention_heads",
    "joint_attention_dim", "caption_projection_dim", "pooled_projection_dim", "pos_embed_max_size", "qk_norm",
    "dual_attention_layers",
)  # fmt: skip


class SD3ControlNet(SD3ControlNetModel):
    """diffusers' ControlNet, which does not name its blocks."""

    _repeated_blocks = ["JointTransformerBlock", "SD3SingleTransformerBlock"]
    _no_split_modules = _repeated_blocks

    @property
    def reads_pooled_prompts(self) -> bool:
        """Whether it reads pooled text embeddings, not zeros; diffusers gives zeros to those that inpaint."""
        return not (self.config.force_zeros_for_pooled_projection or self.config.extra_conditioning_channels)

    def borrow(self, dit: SD3Transformer2DModel) -> None:
        """Use the transformer's patches and positions if it has none, as those of 3.5 large; they are no part of it."""
        if not self.config.use_pos_embed:
            object.__setattr__(self, "pos_embed", dit.pos_embed)


def block_samples(
    controlnets: Sequence[SD3ControlNet],
    dit: SD3Transformer2DModel,
    inputs: Mapping[str, Any],
    control_latents: Sequence[Tensor],
    scale: float | Sequence[float],
) -> Sequence[Tensor] | None:
    """What ControlNets add to the transformer's image tokens (B, L, D), one tensor for several blocks each.

    Args:
        inputs: Arguments of the transformer's call.
        control_latents: Latents (B, 16 or 17, h, w) of each image.
    """
    for controlnet in controlnets:
        controlnet.borrow(dit)

    def outputs(controlnet: SD3ControlNet, latents: Tensor, own_scale: float) -> list[Tensor]:
        own = {"controlnet_cond": latents.to(controlnet.dtype), "conditioning_scale": own_scale}
        if controlnet.context_embedder is None:
            own["encoder_hidden_states"] = None
        if not controlnet.reads_pooled_prompts:
            own["pooled_projections"] = torch.zeros_like(inputs["pooled_projections"])
        return controlnet(**{**inputs, **own}, return_dict=False)[0]

    found = outputs_of(outputs, controlnets, control_latents, scale)
    return sum_block_outputs(found, len(dit.transformer_blocks), rounds_up=False)


def control_inputs(controlnet: SD3ControlNet) -> ControlInputs:
    """What a ControlNet reads; diffusers subtracts no shift where pooled embeddings are zeros."""
    config = controlnet.config
    channels = config.in_channels + config.extra_conditioning_channels
    return ControlInputs(channels, is_shifted=not config.force_zeros_for_pooled_projection)


def check_controlnet(name: str, controlnet: SD3ControlNet, dit: SD3Transformer2DModel) -> None:
    """Refuse a ControlNet of another base."""
    text = [] if controlnet.config.joint_attention_dim is None else ["joint_attention_dim"]
    sizes = "num_attention_heads", "attention_head_dim", "pooled_projection_dim", *text
    check_sizes(name, controlnet, dit, sizes)


def config_beside(transformer: Mapping[str, Any], blocks: int, inpaint: bool) -> dict[str, Any]:
    """The configuration of a ControlNet with copies of the transformer's first blocks."""
    sizes = {name: transformer[name] for name in SIZES}
    return sizes | {"num_layers": blocks, "extra_conditioning_channels": int(inpaint)}


CONTROL_FAMILY = ControlFamily(
    kind=SD3ControlNet,
    inputs=control_inputs,
    check=check_controlnet,
    blocks=COPIED_BLOCKS,
    config=config_beside,
)
