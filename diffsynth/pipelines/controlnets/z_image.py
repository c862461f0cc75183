"""Z-Image's ControlNet: layers beside some of the transformer's; it reads 16 channels, or 33 with an image to inpaint.

The order of channels is that of diffusers' ZImageControlNetPipeline and ZImageControlNetInpaintPipeline.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import ZImageControlNetModel, ZImageTransformer2DModel
from PIL import Image
from torch import Tensor

from ...diffusion.base_pipeline import BasePipeline
from ...diffusion.controlnet.family import ControlFamily
from ...diffusion.controlnet.inputs import (
    ControlEmbedder,
    ControlImages,
    ControlInputs,
    Encode,
    InpaintControlRequest,
    check_mask,
    kept_area,
    one_image,
)
from ...diffusion.controlnet.several import outputs_of, sum_outputs_by_block

COPIED_LAYERS = 15  # every other layer, as in the released ControlNets
SIZES = "dim", "n_refiner_layers", "n_heads", "n_kv_heads", "norm_eps", "qk_norm", "all_patch_size", "all_f_patch_size"
BORROWED = (
    "t_scale", "t_embedder", "all_x_embedder", "cap_embedder", "rope_embedder", "noise_refiner", "context_refiner",
    "x_pad_token", "cap_pad_token",
)  # fmt: skip


class ZImageControlNet(ZImageControlNetModel):
    """diffusers' ControlNet, which names padding by numbers: a mask would be read back from the device."""

    # The library does not set these three.
    gradient_checkpointing = False
    _repeated_blocks = ["ZImageControlTransformerBlock"]
    _no_split_modules = _repeated_blocks

    def patchify_and_embed(self, images: list[Tensor], texts: list[Tensor], *sizes: int) -> tuple:
        *parts, _, _ = super().patchify_and_embed(images, texts, *sizes)
        patches, captions = parts[:2]
        tokens = [image[0].numel() // sizes[0] ** 2 for image in images]
        return *parts, padding(tokens, patches), padding(list(map(len, texts)), captions)

    def borrow(self, dit: ZImageTransformer2DModel) -> None:
        """Use the transformer's embedders and refiners, which stay the transformer's: they are no parts of this."""
        for name in BORROWED:
            object.__setattr__(self, name, getattr(dit, name))


def padding(lengths: Sequence[int], padded: Sequence[Tensor]) -> list[Tensor]:
    """Numbers of the tokens that are padding, for sequences (L, D) that follow one another; one tensor a sequence.

    Args:
        lengths: Numbers of tokens of the sequences before they were padded.
    """
    ends = np.cumsum(list(map(len, padded))).tolist()
    starts = [end - len(own) + length for end, own, length in zip(ends, padded, lengths, strict=True)]
    return [torch.arange(start, end, device=padded[0].device) for start, end in zip(starts, ends, strict=True)]


def block_samples(
    controlnets: Sequence[ZImageControlNet],
    dit: ZImageTransformer2DModel,
    inputs: Mapping[str, Any],
    control_latents: Sequence[Tensor],
    scale: float | Sequence[float],
) -> dict[int, Tensor] | None:
    """What ControlNets add to the transformer's tokens (B, L, D), by the number of the layer.

    Args:
        inputs: `x`, `t` and `cap_feats` of the transformer's call.
        control_latents: Latents (B, 16 or 33, h, w) of each image.
    """
    for controlnet in controlnets:
        controlnet.borrow(dit)

    def outputs(controlnet: ZImageControlNet, latents: Tensor, own_scale: float) -> dict[int, Tensor]:
        context = list(latents.to(dit.dtype).unsqueeze(2))
        return controlnet(**inputs, control_context=context, conditioning_scale=own_scale)

    return sum_outputs_by_block(outputs_of(outputs, controlnets, control_latents, scale))


@dataclass(kw_only=True)
class ZImageControlRequest(InpaintControlRequest):
    """Sample one image with a ControlNet of Z-Image.

    Args:
        controlnet_inpaint_image: Image that is kept where `controlnet_inpaint_mask` is black.
    """

    controlnet_inpaint_image: Image.Image | None = None


class ZImageUnit_ControlEmbedder(ControlEmbedder):
    def process(
        self,
        pipe,
        controlnet_image,
        controlnet_inpaint_image,
        controlnet_inpaint_mask,
        height,
        width,
        tiled,
        tile_size,
        tile_stride,
    ):
        kept = one_image(controlnet_inpaint_image, "controlnet_inpaint_image", "RGB")
        mask = one_image(controlnet_inpaint_mask, "controlnet_inpaint_mask", "L")
        if kept is not None and mask is None:
            raise ValueError("controlnet_inpaint_image is given without controlnet_inpaint_mask; give both.")
        check_mask(pipe, mask, controlnet_image=controlnet_image, controlnet_inpaint_image=kept)
        tiling = tiled, tile_size, tile_stride
        return self.encoded(pipe, controlnet_image, (width, height), tiling, mask=mask, kept=kept)

    def control(self, pipe: BasePipeline, encode: Encode, images: ControlImages) -> Tensor:
        latents = encode(images.image)
        unread = images.reads.channels - latents.shape[1]
        if images.mask is None or not unread:  # zeros, as in diffusers; DiffSynth-Studio encodes a black image
            return F.pad(latents, (0, 0, 0, 0, 0, unread))
        return torch.cat([latents, kept_area(images.mask, latents), encode(images.kept * (1 - images.mask))], dim=1)


def control_inputs(controlnet: ZImageControlNet) -> ControlInputs:
    return ControlInputs(controlnet.config.control_in_dim)


def check_controlnet(name: str, controlnet: ZImageControlNet, dit: ZImageTransformer2DModel) -> None:
    """Refuse a ControlNet of another base, or of Omni, whose tokens have another order."""
    if dit.config.siglip_feat_dim is not None:
        raise ValueError("Z-Image-Omni takes no ControlNet; set model.controlnet=null, or take model=z_image.")
    widths = controlnet.config.dim, dit.config.dim
    layers = max(controlnet.config.control_layers_places) + 1, dit.config.n_layers
    if widths[0] != widths[1] or layers[0] > layers[1]:
        raise ValueError(
            f"{name} has the width {widths[0]} and is for {layers[0]} layers or more, but dit has the width "
            f"{widths[1]} and {layers[1]} layers; take a ControlNet that was trained for this transformer."
        )


def config_beside(transformer: Mapping[str, Any], blocks: int, inpaint: bool) -> dict[str, Any]:
    """The configuration of a ControlNet with copies of so many of the transformer's layers, evenly spread."""
    places = [number * transformer["n_layers"] // blocks for number in range(blocks)]
    channels = 2 * transformer["in_channels"] + 1 if inpaint else transformer["in_channels"]
    sizes = {name: transformer[name] for name in SIZES}
    return sizes | {"control_layers_places": places, "control_in_dim": channels}


def copied_from(name: str, controlnet: Mapping[str, Any]) -> str:
    """The transformer's parameter that one of the ControlNet's begins as."""
    kind, *rest = name.removeprefix("control_").split(".")
    if kind == "layers":
        rest[0] = str(controlnet["control_layers_places"][int(rest[0])])
    return ".".join([kind, *rest])


CONTROL_FAMILY = ControlFamily(
    kind=ZImageControlNet,
    inputs=control_inputs,
    check=check_controlnet,
    blocks=COPIED_LAYERS,
    layers="n_layers",
    config=config_beside,
    source=copied_from,
)
