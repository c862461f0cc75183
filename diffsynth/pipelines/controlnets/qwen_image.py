"""Qwen-Image's ControlNet: a few blocks like the transformer's; each output is added to several of its blocks.

It reads 16 channels, or 17 with an image to inpaint, in diffusers' QwenImageControlNetInpaintPipeline's order.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from diffusers import QwenImageControlNetModel, QwenImageTransformer2DModel
from torch import Tensor

from ...diffusion.controlnet.family import ControlFamily
from ...diffusion.controlnet.inputs import ControlInputs, check_sizes
from ...diffusion.controlnet.several import outputs_of, sum_block_outputs
from ..shared.tokens import pack_latents

COPIED_BLOCKS = 5  # as in the released InstantX/Qwen-Image-ControlNet-Union
SIZES = "patch_size", "in_channels", "out_channels", "attention_head_dim", "num_attention_heads", "joint_attention_dim"


class QwenImageControlNet(QwenImageControlNetModel):
    """diffusers' ControlNet, which does not name its blocks."""

    _repeated_blocks = ["QwenImageTransformerBlock"]
    _no_split_modules = _repeated_blocks


def block_samples(
    controlnets: Sequence[QwenImageControlNet],
    dit: QwenImageTransformer2DModel,
    inputs: Mapping[str, Any],
    control_latents: Sequence[Tensor],
    prompt: tuple[Tensor, Tensor | None] | None,
    scale: float | Sequence[float],
) -> Sequence[Tensor] | None:
    """What ControlNets add to the transformer's image tokens (B, L, D), one tensor for several blocks each.

    Args:
        inputs: Arguments of the transformer's call, without images to edit.
        control_latents: Latents (B, 16 or 17, h, w) of each image.
        prompt: Text embeddings (B, L, D) and their mask (B, L) instead of those of the transformer's call.
    """
    if prompt is not None:
        text = dict(zip(("encoder_hidden_states", "encoder_hidden_states_mask"), prompt, strict=True))
        inputs = {**inputs, **text}

    def outputs(controlnet: QwenImageControlNet, tokens: Tensor, own_scale: float) -> list[Tensor]:
        image = {"controlnet_cond": tokens.to(controlnet.dtype), "conditioning_scale": own_scale}
        return controlnet(**inputs, **image, return_dict=False)

    tokens = list(map(pack_latents, control_latents))
    return sum_block_outputs(outputs_of(outputs, controlnets, tokens, scale), len(dit.transformer_blocks))


def check_alone(**images: Any) -> None:
    """Refuse further images beside that of a ControlNet, which reads tokens of the sampled image alone."""
    if others := [name for name, value in images.items() if value]:
        raise ValueError(
            f"{others[0]} is given beside controlnet_image, but a ControlNet of Qwen-Image reads the sampled image "
            "alone; leave one of the two out."
        )


def control_inputs(controlnet: QwenImageControlNet) -> ControlInputs:
    """What a ControlNet reads; 2 × 2 latent pixels make a token."""
    return ControlInputs((controlnet.config.in_channels + controlnet.config.extra_condition_channels) // 4)


def check_controlnet(name: str, controlnet: QwenImageControlNet, dit: QwenImageTransformer2DModel) -> None:
    """Refuse a ControlNet of another base."""
    check_sizes(name, controlnet, dit, ("joint_attention_dim", "num_attention_heads", "attention_head_dim"))


def config_beside(transformer: Mapping[str, Any], blocks: int, inpaint: bool) -> dict[str, Any]:
    """The configuration of a ControlNet with copies of the transformer's first blocks."""
    sizes = {name: transformer[name] for name in (*SIZES, "axes_dims_rope")}
    return sizes | {"num_layers": blocks, "extra_condition_channels": 4 if inpaint else 0}


CONTROL_FAMILY = ControlFamily(
    kind=QwenImageControlNet,
    inputs=control_inputs,
    check=check_controlnet,
    prompt=("prompt_emb", "prompt_emb_mask"),
    blocks=COPIED_BLOCKS,
    config=config_beside,
)
