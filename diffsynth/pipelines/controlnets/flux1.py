"""FLUX.1's ControlNet: a few blocks like the transformer's; each output is added to several of its blocks.

It reads the latents of an image, 16 channels. One for several kinds of images (a union) also reads the kind's number,
its mode. diffusers has none that reads a mask: there an image is inpainted as without a ControlNet.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import FluxControlNetModel, FluxTransformer2DModel
from torch import Tensor

from ...core.ranges import NonNegativeInt
from ...diffusion.base_pipeline import BasePipeline
from ...diffusion.controlnet.family import ControlFamily
from ...diffusion.controlnet.inputs import ControlInputs, ControlRequest, check_sizes, inputs_of_images
from ...diffusion.controlnet.several import outputs_of, sum_block_outputs
from ...diffusion.pipeline.image_units import image_list
from ...diffusion.pipeline.units import PipelineUnit
from ..networks.flux1 import prompt_inputs
from ..shared.tokens import pack_latents

COPIED_BLOCKS = 5  # with two streams, as in the released InstantX/FLUX.1-dev-Controlnet-Union
BASE_SIZES = "attention_head_dim", "num_attention_heads", "joint_attention_dim", "pooled_projection_dim"


class Flux1ControlNet(FluxControlNetModel):
    """diffusers' ControlNet, which does not name its blocks."""

    _repeated_blocks = ["FluxTransformerBlock", "FluxSingleTransformerBlock"]
    _no_split_modules = _repeated_blocks


@dataclass(kw_only=True)
class Flux1ControlRequest(ControlRequest):
    """Sample one image with a ControlNet of FLUX.1.

    Args:
        controlnet_mode: What kind of image a ControlNet for several kinds reads, by its number, one for all images or
            one for each; a ControlNet for one kind reads none.
    """

    controlnet_mode: NonNegativeInt | Sequence[NonNegativeInt] | None = None


def block_samples(
    controlnets: Sequence[Flux1ControlNet],
    dit: FluxTransformer2DModel,
    inputs: Mapping[str, Any],
    control_latents: Sequence[Tensor],
    control_modes: Sequence[Tensor],
    prompt: tuple[Tensor, Tensor] | None,
    scale: float | Sequence[float],
    edit_tokens: int,
) -> dict[str, Sequence[Tensor] | None]:
    """What ControlNets add to the transformer's image tokens (B, L, D), as arguments of the transformer's call.

    Args:
        inputs: Arguments of the transformer's call, without images to edit.
        control_latents: Latents (B, 16, h, w) of each image.
        control_modes: Modes (B,) of each image, which a ControlNet for one kind of images does not read.
        prompt: Text embeddings (B, L, D) and pooled ones (B, D') instead of those of the transformer's call.
        edit_tokens: Number of tokens of edit images, to which nothing is added.
    """
    if prompt is not None:
        inputs = {**inputs, **prompt_inputs(dit, *prompt)}

    def outputs(controlnet: Flux1ControlNet, image: tuple[Tensor, Tensor], own_scale: float) -> list[list[Tensor]]:
        tokens, mode = image
        own = {
            "controlnet_cond": tokens.to(controlnet.dtype),
            "controlnet_mode": mode[:, None] if controlnet.union else None,
            "guidance": inputs["guidance"] if controlnet.config.guidance_embeds else None,
        }
        streams = controlnet(**{**inputs, **own}, conditioning_scale=own_scale, return_dict=False)
        return [[F.pad(sample, (0, 0, 0, edit_tokens)) for sample in samples or ()] for samples in streams]

    tokens = map(pack_latents, control_latents)
    found = outputs_of(outputs, controlnets, list(zip(tokens, control_modes, strict=True)), scale)
    doubles, singles = ([own[place] for own in found] for place in (0, 1))
    return {
        "controlnet_block_samples": sum_block_outputs(doubles, len(dit.transformer_blocks)),
        "controlnet_single_block_samples": sum_block_outputs(singles, len(dit.single_transformer_blocks)),
    }


class Flux1Unit_ControlMode(PipelineUnit):
    """Makes `control_modes`, a list of modes (1,), one for each image; 0 for a ControlNet for one kind of images."""

    needs = "controlnet"

    def __init__(self):
        super().__init__(output_params=("control_modes",))

    def depends_on(self, pipe: BasePipeline) -> dict[str, str]:
        return {"control_inputs": str(pipe.control_inputs)}

    def process(self, pipe, controlnet_image, controlnet_mode):
        images = len(image_list(controlnet_image, "controlnet_image"))
        kinds = [inputs.num_modes for inputs in inputs_of_images(pipe, images)]
        modes = list(controlnet_mode) if isinstance(controlnet_mode, Sequence) else [controlnet_mode] * images
        _check_modes(modes, kinds)
        return {"control_modes": [torch.tensor([mode or 0], device=pipe.device) for mode in modes]} if images else {}


def _check_modes(modes: Sequence[int | None], kinds: Sequence[int | None]) -> None:
    """Refuse modes of images that their ControlNets, for so many kinds of images, do not have; None is one kind."""
    if len(modes) != len(kinds):
        raise ValueError(
            f"controlnet_mode has {len(modes)} numbers for {len(kinds)} controlnet_image; give one for each."
        )
    if modes != [None] * len(modes) and not any(kinds):
        raise ValueError(
            f"controlnet_mode is {modes[0]}, but this ControlNet reads one kind of images; leave controlnet_mode out."
        )
    for mode, count in zip(modes, kinds, strict=True):
        if count is not None and (mode is None or mode >= count):
            raise ValueError(
                f"controlnet_mode is {mode}, but this ControlNet reads {count} kinds of images; set it to the number "
                f"of the image's kind, 0 to {count - 1}, which the model's page lists."
            )


def control_inputs(controlnet: Flux1ControlNet) -> ControlInputs:
    """What a ControlNet reads; 2 × 2 latent pixels make a token."""
    return ControlInputs(controlnet.config.in_channels // 4, num_modes=controlnet.config.num_mode)


def check_controlnet(name: str, controlnet: Flux1ControlNet, dit: FluxTransformer2DModel) -> None:
    """Refuse a ControlNet of another base, and XLabs', which reads pixels."""
    if controlnet.config.conditioning_embedding_channels is not None:
        raise ValueError(
            f"{name} reads the pixels of images, as those of XLabs do, but here ControlNets read latents; take "
            "another one, such as InstantX/FLUX.1-dev-Controlnet-Canny."
        )
    check_sizes(name, controlnet, dit, BASE_SIZES)


def config_beside(transformer: Mapping[str, Any], blocks: int, inpaint: bool) -> dict[str, Any]:
    """The configuration of a ControlNet with copies of the transformer's first blocks, in its proportion of streams."""
    if inpaint:
        raise ValueError("inpaint=true, but ControlNets of FLUX.1 read no mask; set inpaint=false.")
    sizes = {name: transformer[name] for name in (*BASE_SIZES, "guidance_embeds", "axes_dims_rope")}
    singles = blocks * transformer["num_single_layers"] // transformer["num_layers"]
    channels = transformer["out_channels"] or transformer["in_channels"]  # those of noise alone, in Fill, too
    return sizes | {"in_channels": channels, "num_layers": blocks, "num_single_layers": singles}


CONTROL_FAMILY = ControlFamily(
    kind=Flux1ControlNet,
    inputs=control_inputs,
    check=check_controlnet,
    prompt=("prompt_emb", "pooled_prompt_emb"),
    blocks=COPIED_BLOCKS,
    config=config_beside,
)
