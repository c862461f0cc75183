"""Z-Image (base, Turbo, Omni): text-to-image and image-to-image; Omni also makes an image from several others.

Tongyi-MAI 2025, "Z-Image" (https://arxiv.org/abs/2511.22699). Networks: diffusers, transformers.
Latents are (B, 16, H/8, W/8); the transformer reads 2 × 2 latent pixels as a token. It takes a list of samples, each
with tokens of its own, reads 1 - σ instead of σ, and predicts -v. Constants come from the released pipelines
(diffusers' ZImagePipeline, ZImageOmniPipeline) unless a comment says otherwise.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import ZImageTransformer2DModel
from diffusers.models.transformers.transformer_z_image import SEQ_MULTI_OF
from torch import Tensor

from ..core.gradient import checkpoint_blocks
from ..core.loader import ModelConfig
from ..core.ranges import NonNegativeFloat, SamplingSteps, Tokens
from ..diffusion.adapters.names import LayerNames
from ..diffusion.base_pipeline import BasePipeline
from ..diffusion.flow_match import linear_levels, time_shift
from ..diffusion.pipeline.components import Folder, Network
from ..diffusion.pipeline.image_units import IMAGE_UNITS, edit_images
from ..diffusion.pipeline.request import EDIT_IMAGE_PIXELS, EditRequest
from ..diffusion.pipeline.vae import Latents
from ..diffusion.prompts.embedder import PromptEmbedder
from ..diffusion.prompts.hidden_states import penultimate_state
from .autoencoders.kl import FLUX1_STATISTICS, NormalisedAutoencoderKL
from .controlnets.z_image import (
    CONTROL_FAMILY,
    ZImageControlNet,
    ZImageControlRequest,
    ZImageUnit_ControlEmbedder,
    block_samples,
)
from .edit_images.z_image import ZImageUnit_EditImageEmbedder, ZImageUnit_EditImageFeatures

__all__ = ["ModelConfig", "ZImagePipeline"]

SHIFT = 3.0
MAX_PROMPT_TOKENS = 512
NOISY, CLEAN = 1, 0  # how the network of Omni marks images
BLOCKS = ("layers", "noise_refiner", "context_refiner", "siglip_refiner")
# ComfyUI, diffusers and DiffSynth-Studio read the names here; the original fuses query, key and value.
LORA_NAMES = LayerNames(
    prefix="transformer",
    comfyui="diffusion_model.",
    common="comfyui",
    original={
        f"{blocks}.*.attention.{name}": layers
        for blocks in BLOCKS
        for name, layers in {
            "qkv": tuple(f"{blocks}.*.attention.to_{part}" for part in "qkv"),
            "out": (f"{blocks}.*.attention.to_out.0",),
        }.items()
    },
)


def z_image_sigmas(num_inference_steps: int, denoising_strength: float = 1.0) -> Tensor:
    """Noise levels (N,) of Z-Image: linear, then shifted by a constant factor of 3 at every resolution."""
    return time_shift(linear_levels(num_inference_steps, denoising_strength), SHIFT)


def model_fn_z_image(
    dit: ZImageTransformer2DModel,
    latents: Tensor,
    timestep: Tensor,
    prompt_emb: Tensor,
    prompt_emb_lengths: Sequence[Sequence[int]],
    edit_latents: Sequence[Tensor] = (),
    edit_features: Sequence[Tensor] = (),
    controlnets: Sequence[ZImageControlNet] = (),
    control_latents: Sequence[Tensor] = (),
    controlnet_scale: float | Sequence[float] = 1.0,
    use_gradient_checkpointing: bool = False,
    use_gradient_checkpointing_offload: bool = False,
) -> Tensor:
    """Velocity (B, 16, h, w) of noisy latents (B, 16, h, w) at timesteps (B,) in [0, 1000].

    Args:
        prompt_emb: Text embeddings (B, L, D), right-padded.
        prompt_emb_lengths: For each sample the numbers of tokens of the pieces of its prompt.
        edit_latents: Clean latents (B, 16, h', w') of each image to edit, of their own sizes; Omni only.
        edit_features: Features (B, h'', w'', D') of the same images; Omni only.
        control_latents: Latents (B, 16 or 33, h, w) of each image that a ControlNet reads.
    """
    for network in (dit, *controlnets):
        checkpoint_blocks(network, use_gradient_checkpointing, use_gradient_checkpointing_offload)
    clean_time = 1 - timestep / 1000
    images = by_sample([image.to(dit.dtype).unsqueeze(2) for image in (*edit_latents, latents)])
    texts = text_pieces(prompt_emb.to(dit.dtype), prompt_emb_lengths)
    if dit.config.siglip_feat_dim is None:
        inputs = {"x": [image for (image,) in images], "cap_feats": [text for (text,) in texts], "t": clean_time}
    else:
        features = by_sample([feature.to(dit.dtype) for feature in edit_features])
        inputs = {"x": images, "cap_feats": texts, "t": clean_time, **omni_inputs(images, features)}
    if control_latents:
        samples = block_samples(controlnets, dit, inputs, control_latents, controlnet_scale)
        inputs["controlnet_block_samples"] = samples
    velocities = dit(**inputs, return_dict=False)[0]
    return -torch.stack(velocities).squeeze(2)


def text_pieces(embeddings: Tensor, lengths: Sequence[Sequence[int]]) -> list[list[Tensor]]:
    """Text embeddings (B, L, D) of each sample without padding, cut into pieces of so many tokens."""
    cuts = [np.cumsum(own).tolist() for own in lengths]
    return [list(text.tensor_split(places)[:-1]) for text, places in zip(embeddings, cuts, strict=True)]


def omni_inputs(images: Sequence[Sequence[Tensor]], features: Sequence[Sequence[Tensor]]) -> dict[str, list]:
    """Arguments of Omni's call: which image of each sample is noisy, its last one, and features of the others.

    Args:
        images: Each sample's latents (16, 1, h, w).
        features: Each sample's features (h', w', D') of its images to edit; none if it has no such images.
    """
    marks = [CLEAN] * (len(images[0]) - 1) + [NOISY]
    features = [[*own, None] for own in features]
    return {"image_noise_mask": [marks] * len(images), "siglip_feats": features or [None] * len(images)}


def by_sample(batches: Sequence[Tensor]) -> list[list[Tensor]]:
    """The tensors of each sample, from tensors (B, …) of a batch."""
    return [list(own) for own in zip(*batches, strict=True)]


# Units ----------------------------------------------------------------------------------------------------------------


class ZImageUnit_PromptEmbedder(PromptEmbedder):
    """Computes text embeddings (1, L, D) of a prompt in its chat template, and the lengths of its pieces."""

    def __init__(self):
        super().__init__(counted=True)

    def tokenize(self, pipe, prompt, max_sequence_length, edit_image=None):
        images = edit_images(edit_image, True, EDIT_IMAGE_PIXELS)
        options = {"max_length": max_sequence_length, "truncation": True, "return_tensors": "pt"}
        return [{"input_ids": pipe.tokenizer([text], **options).input_ids} for text in pieces(prompt, len(images))]

    def embed(self, pipe: "ZImagePipeline", tokens: Mapping[str, Tensor]) -> Tensor:
        return penultimate_state(pipe.text_encoder.get_decoder(), **tokens)


def pieces(prompt: str, images: int = 0) -> list[str]:
    """The prompt in Qwen3's chat template, cut where the network inserts each of some images and the result."""
    if not images:
        return [f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"]
    return [
        "<|im_start|>user\n<|vision_start|>",
        *["<|vision_end|><|vision_start|>"] * (images - 1),
        f"<|vision_end|>{prompt}<|im_end|>\n<|im_start|>assistant\n<|vision_start|>",
        "<|vision_end|><|im_end|>",
    ]


# Pipeline -------------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class ZImageRequest(EditRequest, ZImageControlRequest):
    """Sample one image with Z-Image; only Omni reads `edit_image`.

    Args:
        max_sequence_length: Tokens that a prompt is truncated to, including the chat template's.
    """

    num_inference_steps: SamplingSteps = 50
    cfg_scale: NonNegativeFloat = 6.0  # diffusers' guidance_scale + 1: released with 5
    max_sequence_length: Tokens = MAX_PROMPT_TOKENS


class ZImagePipeline(BasePipeline):
    """Z-Image on diffusers' transformer and VAE, transformers' Qwen3, and for Omni its SigLIP 2."""

    request = ZImageRequest
    components = {
        "dit": Network("ZImageTransformer2DModel", lora=LORA_NAMES),
        "text_encoder": Network("Qwen3Model", "Qwen3ForCausalLM", lora="text_encoder"),
        "vae": Network(NormalisedAutoencoderKL),
        "siglip": Network("Siglip2VisionModel", optional=True),
        "tokenizer": Folder("AutoTokenizer", needed_by="text_encoder"),
        "siglip_processor": Folder("Siglip2ImageProcessorPil"),
    }
    latents = Latents(channels=16, factor=8, patch=2, statistics=FLUX1_STATISTICS)
    control_family = CONTROL_FAMILY
    model_fn = staticmethod(model_fn_z_image)
    sigma_grid = staticmethod(z_image_sigmas)
    model_settings = ("max_sequence_length", "edit_image_pixels")
    text_widths = {"text_encoder": lambda dit, own: (dit.config.cap_feat_dim, own.config.hidden_size)}
    unit_classes = (
        *IMAGE_UNITS,
        ZImageUnit_EditImageEmbedder,
        ZImageUnit_EditImageFeatures,
        ZImageUnit_ControlEmbedder,
        ZImageUnit_PromptEmbedder,
    )

    def check_networks(self) -> None:
        super().check_networks()
        if self.dit is None:
            return
        width, made = self.dit.config.siglip_feat_dim, self.siglip and self.siglip.config.hidden_size
        if width is not None and made is None:
            raise ValueError("dit is Omni's transformer, which reads features of siglip; take model=z_image_omni.")
        if width != made:
            reads = "reads no features of images" if width is None else f"reads features of width {width}"
            raise ValueError(
                f"dit {reads}, but siglip makes those of width {made}: they are of different models; take the "
                "transformer of model=z_image_omni, or set model.siglip=null and model.siglip_processor=null."
            )

    def complete(self, request: Mapping) -> dict:
        whole = super().complete(request)
        if self.dit is not None:
            self._check_positions(whole)
        return whole

    def _check_positions(self, request: Mapping) -> None:
        """Refuse a request that is beyond the network's tables of positions: of text, of rows, of columns."""
        text, *sides = self.dit.config.axes_lens
        ends = [length * self.latents.multiple for length in sides]
        if request["height"] > ends[0] or request["width"] > ends[1]:
            raise ValueError(
                f"height x width is {request['height']} x {request['width']}, but the positions of dit end at "
                f"{ends[0]} x {ends[1]} pixels; set smaller ones."
            )
        most = (text - 2) // SEQ_MULTI_OF * SEQ_MULTI_OF  # the first position is free, and the image has the last
        for prompt in (request.get("prompt"), request["negative_prompt"]) if self.tokenizer is not None else ():
            count = min(len(self.prompt_tokens("tokenizer", prompt or "")), request["max_sequence_length"])
            if count > most:
                raise ValueError(
                    f"The prompt has {count} tokens, but the positions of dit end at {most}; shorten it, or set "
                    f"model.max_sequence_length={most} or less."
                )

    def prompt_text(self, prompt: str) -> str:
        (text,) = pieces(prompt)
        return text
