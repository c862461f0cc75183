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

from ...core.gradient import checkpoint_blocks
from ...core.host_memory import sent
from ...core.ranges import NonNegativeInt
from ...diffusion.base_pipeline import BasePipeline
from ...diffusion.controlnet.inputs import ControlRequest, summed
from ...diffusion.controlnet.start import ControlStart
from ...diffusion.pipeline.image_units import image_list
from ...diffusion.pipeline.units import PipelineUnit
from ..flux1_network import image_positions, pack_latents

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
            one for each; None for a ControlNet for one kind.
    """

    controlnet_mode: NonNegativeInt | Sequence[NonNegativeInt] | None = None


def block_samples(
    controlnet: Flux1ControlNet,
    latents: Tensor,
    inputs: Mapping[str, Any],
    control_latents: Sequence[Tensor],
    control_modes: Sequence[Tensor],
    scale: float | Sequence[float],
    edit_tokens: int,
    checkpointing: tuple[bool, bool],
) -> dict[str, list[Tensor]]:
    """What the ControlNet adds to the transformer's image tokens (B, L, D), as arguments of the transformer's call.

    Args:
        latents: Noisy latents (B, 16, h, w).
        inputs: `timestep`, `guidance`, `pooled_projections` and `encoder_hidden_states` of the transformer's call.
        control_latents: Latents (B, 16, h, w) of each image.
        control_modes: Modes (B,) of each image; none for a ControlNet for one kind of images.
        edit_tokens: Number of tokens of edit images, to which nothing is added.
        checkpointing: Whether blocks are computed again in the backward pass, and whether their inputs are offloaded.
    """
    checkpoint_blocks(controlnet, *checkpointing)
    own = {
        "hidden_states": pack_latents(latents).to(controlnet.dtype),
        "guidance": inputs["guidance"] if controlnet.config.guidance_embeds else None,
        "img_ids": sent(image_positions([latents]), latents.device),
        "txt_ids": torch.zeros(inputs["encoder_hidden_states"].shape[1], 3, device=latents.device),
    }

    def outputs(image: tuple[Tensor, Tensor | None], own_scale: float) -> list[Tensor]:
        tokens, mode = pack_latents(image[0]).to(controlnet.dtype), None if image[1] is None else image[1][:, None]
        control = {"controlnet_cond": tokens, "controlnet_mode": mode, "conditioning_scale": own_scale}
        by_stream = controlnet(**{**inputs, **own}, **control, return_dict=False)
        return [F.pad(sample, (0, 0, 0, edit_tokens)) for samples in by_stream for sample in samples or ()]

    images = list(zip(control_latents, control_modes or [None] * len(control_latents), strict=True))
    samples, doubles = summed(outputs, images, scale) or [], len(controlnet.transformer_blocks)
    by_stream = {"controlnet_block_samples": samples[:doubles], "controlnet_single_block_samples": samples[doubles:]}
    return {name: own for name, own in by_stream.items() if own}


class Flux1Unit_ControlMode(PipelineUnit):
    """Makes `control_modes`, a list of modes (1,), one for each image, for a ControlNet for several kinds of images."""

    needs = "controlnet"

    def __init__(self):
        super().__init__(output_params=("control_modes",))

    def depends_on(self, pipe: BasePipeline) -> dict[str, str]:
        return {"control_kinds": str(pipe.control_kinds)}

    def process(self, pipe, controlnet_image, controlnet_mode):
        images = image_list(controlnet_image, "controlnet_image")
        modes = list(controlnet_mode) if isinstance(controlnet_mode, Sequence) else [controlnet_mode] * len(images)
        _check_modes(modes, len(images), pipe.control_kinds)
        if not images or pipe.control_kinds is None:
            return {}
        return {"control_modes": [torch.tensor([mode], device=pipe.device) for mode in modes]}


def _check_modes(modes: Sequence[int | None], images: int, kinds: int | None) -> None:
    """Refuse modes that are not those of a ControlNet for `kinds` kinds of images; None is one for one kind."""
    if len(modes) != images:
        raise ValueError(f"controlnet_mode has {len(modes)} numbers for {images} controlnet_image; give one for each.")
    given = [mode for mode in modes if mode is not None]
    if kinds is None and given:
        raise ValueError(
            f"controlnet_mode is {given[0]}, but this ControlNet reads one kind of images; leave controlnet_mode out."
        )
    wrong = [mode for mode in modes if kinds is not None and (mode is None or mode >= kinds)]
    if wrong:
        raise ValueError(
            f"controlnet_mode is {wrong[0]}, but this ControlNet reads {kinds} kinds of images; set it to the "
            f"number of the image's kind, 0 to {kinds - 1}, which the model's page lists."
        )


def check_controlnet(controlnet: Flux1ControlNet, dit: FluxTransformer2DModel) -> None:
    """Refuse a ControlNet of another base, and XLabs', which reads pixels."""
    if controlnet.config.conditioning_embedding_channels is not None:
        raise ValueError(
            "controlnet reads the pixels of images, as those of XLabs do, but here ControlNets read latents; take "
            "another one, such as InstantX/FLUX.1-dev-Controlnet-Canny."
        )
    for size in BASE_SIZES:
        found, wanted = controlnet.config[size], dit.config[size]
        if found != wanted:
            raise ValueError(
                f"controlnet has {size} {found}, but dit has {wanted}; take a ControlNet that was trained for this "
                "transformer."
            )


def config_beside(transformer: Mapping[str, Any], blocks: int, inpaint: bool) -> dict[str, Any]:
    """The configuration of a ControlNet with copies of the transformer's first blocks, in its proportion of streams."""
    if inpaint:
        raise ValueError("inpaint=true, but ControlNets of FLUX.1 read no mask; set inpaint=false.")
    sizes = {name: transformer[name] for name in (*BASE_SIZES, "guidance_embeds", "axes_dims_rope")}
    singles = blocks * transformer["num_single_layers"] // transformer["num_layers"]
    channels = transformer["out_channels"] or transformer["in_channels"]  # those of noise alone, in Fill, too
    return sizes | {"in_channels": channels, "num_layers": blocks, "num_single_layers": singles}


CONTROL_START = ControlStart(blocks=COPIED_BLOCKS, config=config_beside, source=lambda name, _: name)
