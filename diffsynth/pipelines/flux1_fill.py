"""FLUX.1 Fill: generates the white area of a mask from a prompt and from the rest of the image.

Black Forest Labs 2024, "FLUX.1 Tools" (https://bfl.ai/flux-1-tools). A token has 384 channels: 64 of noisy latents, 64
of the kept area's latents, and 256 of the mask, one of each pixel. Constants come from diffusers' FluxFillPipeline.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..core.data.operators.masks import white_area
from ..core.data.operators.picture_files import in_mode
from ..core.loader import ModelConfig
from ..core.ranges import NonNegativeFloat, SamplingSteps
from ..diffusion.pipeline.image_units import Inpaint
from ..diffusion.pipeline.units import PipelineUnit
from .flux1_image import Flux1ImagePipeline, Flux1Request

__all__ = ["Flux1FillPipeline", "ModelConfig"]


class Flux1Unit_FillEmbedder(PipelineUnit):
    """Computes `fill_latents` (1, 80, h, w): latents of `input_image` without the mask's white area, and the mask.

    Without a mask all of the image is generated. The black area is close to `input_image`, but not equal: Fill was
    trained to generate it, too.
    """

    def __init__(self):
        super().__init__(output_params=("fill_latents", "inpaint_mask"), onload_model_names=("vae",))

    def process(self, pipe, input_image, inpaint_mask, height, width, tiled, tile_size, tile_stride):
        pipe.load_models_to_device(["vae"])
        mask = white_pixels(inpaint_mask, height, width).to(pipe.device, pipe.torch_dtype)
        kept = torch.zeros_like(mask).expand(-1, 3, -1, -1)
        if inpaint_mask is not None:
            kept = pipe.preprocess_image(input_image) * (1 - mask)
        latents = pipe.vae.encode(kept, tiled, tile_size, tile_stride)
        fill_latents = torch.cat([latents, F.pixel_unshuffle(mask, pipe.latents.factor)], dim=1)
        # inpaint_mask is None, so that sampling does not paste the black area back
        return {"fill_latents": fill_latents, "inpaint_mask": None}


def white_pixels(mask: Image.Image | None, height: int, width: int) -> Tensor:
    """A mask image as a tensor (1, 1, H, W), 1 where it is white and else 0; without a mask 1 everywhere."""
    if mask is None:
        return torch.ones(1, 1, height, width)
    sized = in_mode(mask, "L").resize((width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(white_area(sized))[None, None]


@dataclass(kw_only=True)
class Flux1FillRequest(Flux1Request):
    """Fill the white area of `inpaint_mask` in `input_image` with FLUX.1 Fill."""

    num_inference_steps: SamplingSteps = 50
    embedded_guidance: NonNegativeFloat = 30.0


class Flux1FillPipeline(Flux1ImagePipeline):
    """FLUX.1 Fill on diffusers' transformer and VAE and transformers' CLIP and T5."""

    request = Flux1FillRequest
    token_channels = 384
    unit_classes = tuple(
        Flux1Unit_FillEmbedder if unit is Inpaint else unit for unit in Flux1ImagePipeline.unit_classes
    )
