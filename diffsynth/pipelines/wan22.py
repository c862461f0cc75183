"""Wan 2.2 A14B: text-to-video and image-to-video by two experts, `dit` for high noise levels and `dit2` for low ones.

Wan Team 2025, "Wan2.2" (https://github.com/Wan-Video/Wan2.2). All else is Wan 2.1's; image-to-video reads no CLIP.
"""

from dataclasses import dataclass
from functools import partial

from ..core.loader import ModelConfig
from ..core.ranges import NonNegativeFloat, PositiveFraction, SamplingSteps
from ..diffusion.experts import ExpertsRequest, TwoExperts
from ..diffusion.pipeline.components import Network
from .layouts.wan import LORA_NAMES, LOW_NOISE_LORA_NAMES, TRANSFORMER_LAYOUT
from .networks.wan import use_splittable_attention
from .wan import WanPipeline, WanRequest
from .wan_image_to_video import WanImageToVideoPipeline, WanImageToVideoRequest, WanUnit_ImageFeatures

__all__ = ["ModelConfig", "Wan22ImageToVideoPipeline", "Wan22Pipeline"]

expert = partial(
    Network, "WanTransformer3DModel", after=use_splittable_attention, optional=True, layouts=[TRANSFORMER_LAYOUT]
)


@dataclass(kw_only=True)
class Wan22Request(ExpertsRequest, WanRequest):
    """Sample one video with Wan 2.2 A14B."""

    num_inference_steps: SamplingSteps = 40
    cfg_scale: NonNegativeFloat = 4.0
    cfg_scale_2: NonNegativeFloat | None = 3.0


class Wan22Pipeline(TwoExperts, WanPipeline):
    """Wan 2.2's text-to-video by two transformers of diffusers."""

    request = Wan22Request
    components = {
        "dit": expert(lora=LORA_NAMES),
        "dit2": expert(lora=LOW_NOISE_LORA_NAMES),
        **{name: part for name, part in WanPipeline.components.items() if name != "dit"},
    }
    model_settings = (*WanPipeline.model_settings, "boundary", "cfg_scale_2")


@dataclass(kw_only=True)
class Wan22ImageToVideoRequest(ExpertsRequest, WanImageToVideoRequest):
    """Sample one video from its first frame with Wan 2.2 A14B."""

    num_inference_steps: SamplingSteps = 40
    cfg_scale: NonNegativeFloat = 3.5
    boundary: PositiveFraction = 0.9


class Wan22ImageToVideoPipeline(TwoExperts, WanImageToVideoPipeline):
    """Wan 2.2's image-to-video by two transformers of diffusers."""

    request = Wan22ImageToVideoRequest
    components = Wan22Pipeline.components
    unit_classes = tuple(unit for unit in WanImageToVideoPipeline.unit_classes if unit is not WanUnit_ImageFeatures)
    model_settings = Wan22Pipeline.model_settings
    image_encoder = None  # these models read no features of images
