"""Qwen-Image-Layered: decomposes an image into layers with alpha, which put over one another give the image again.

Yin et al. 2025, "Qwen-Image-Layered" (https://arxiv.org/abs/2512.15603). Networks: diffusers, transformers. A sample
has N = n + 1 images in RGBA: the composite of all n layers, then the layers from the back to the front. Its latents are
(B, N, 16, H/8, W/8). The transformer reads their tokens, image after image, then those of the image to decompose.
Constants without a source come from diffusers' QwenImageLayeredPipeline.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from diffusers import QwenImageTransformer2DModel
from PIL import Image
from torch import Tensor

from ..core.gradient import checkpoint_blocks
from ..core.loader import ModelConfig
from ..core.ranges import NonNegativeFloat, PositiveInt, SamplingSteps, Side
from ..diffusion.base_pipeline import BasePipeline
from ..diffusion.flow_match import linear_levels, shift_by_tokens, stretch_to_terminal
from ..diffusion.pipeline import image_units
from ..diffusion.pipeline.components import Folder, Network
from ..diffusion.pipeline.kv_cache import KVCache
from ..diffusion.pipeline.media import LayersMedia
from ..diffusion.pipeline.request import TemplateRequest
from ..diffusion.pipeline.units import PipelineUnit
from ..diffusion.pipeline.vae import Latents
from ..diffusion.template.cache import append_text
from ..diffusion.template.lora import InputLoRA, added
from .autoencoders.qwen_image import QwenImageVAE
from .networks.qwen_image import LORA_NAMES, call_inputs, use_joint_attention
from .prompts.qwen_image import QwenImageUnit_PromptEmbedder, check_templates
from .qwen_image import QwenImagePipeline
from .shared.qwen import TERMINAL_SIGMA, TEXT_LORA_NAMES
from .shared.tokens import unpack_latents

__all__ = ["ModelConfig", "QwenImageLayeredPipeline"]

SHIFT_TOKENS = 256  # tokens of an image at which μ = 1


def qwen_image_layered_sigmas(
    num_inference_steps: int,
    denoising_strength: float = 1.0,
    dynamic_shift_len: int | None = None,
    exponential_shift_mu: float | None = None,
) -> Tensor:
    """Noise levels (N,): Qwen-Image's with μ = √(tokens / 256).

    Args:
        dynamic_shift_len: Number of tokens of one image, H/16 · W/16; None takes the training grid's μ = 0.8.
        exponential_shift_mu: μ itself, which overrides the other two.
    """
    linear = linear_levels(num_inference_steps, denoising_strength)
    shifted = shift_by_tokens(
        linear, dynamic_shift_len, exponential_shift_mu, lambda tokens: (tokens / SHIFT_TOKENS) ** 0.5
    )
    return stretch_to_terminal(shifted, TERMINAL_SIGMA)


def model_fn_qwen_image_layered(
    dit: QwenImageTransformer2DModel,
    latents: Tensor,
    timestep: Tensor,
    prompt_emb: Tensor,
    prompt_emb_mask: Tensor | None,
    condition_latents: Tensor,
    kv_cache: KVCache | None = None,
    lora: InputLoRA | None = None,
    extra_text_embedding: Tensor | None = None,
    use_gradient_checkpointing: bool = False,
    use_gradient_checkpointing_offload: bool = False,
) -> Tensor:
    """Velocity (B, N, 16, h, w) of noisy latents (B, N, 16, h, w) at timesteps (B,) in [0, 1000].

    Args:
        prompt_emb: Text embeddings (B, L, D), right-padded.
        prompt_emb_mask: False where `prompt_emb` is padding (B, L); None if nothing is.
        condition_latents: Clean latents (B, 16, h, w) of the image to decompose.
        kv_cache: Extra keys and values by block, `block_0` and so on.
        lora: Updates of the transformer's layers.
        extra_text_embedding: Text embeddings (B, L', D) appended to the prompt's.
    """
    checkpoint_blocks(dit, use_gradient_checkpointing, use_gradient_checkpointing_offload)
    batch, count, _, height, width = latents.shape
    text = append_text(prompt_emb, prompt_emb_mask, extra_text_embedding)
    with added(dit, lora):
        velocity = dit(
            **call_inputs(dit, [*latents.unbind(1), condition_latents], timestep, *text),
            additional_t_cond=torch.zeros(batch, dtype=torch.long, device=latents.device),  # 0: images have alpha
            attention_kwargs={"kv_cache": kv_cache} if kv_cache else None,
            return_dict=False,
        )[0]
    of_images = velocity.unflatten(1, (count + 1, -1))[:, :count].flatten(0, 1)
    return unpack_latents(of_images, height, width).unflatten(0, (batch, count))


# Units ----------------------------------------------------------------------------------------------------------------


class QwenImageLayeredUnit_NoiseInitializer(PipelineUnit):
    """Makes the initial noise (1, N, 16, h, w) from the seed, N as in `input_image`, or `layer_num` + 1."""

    def __init__(self):
        super().__init__(output_params=("noise",))

    def process(self, pipe, input_image, inpaint_mask, layer_num, height, width, seed, rand_device):
        if inpaint_mask is not None:
            raise ValueError("inpaint_mask is given, but Qwen-Image-Layered samples whole layers; leave it out.")
        count = layer_num + 1 if input_image is None else len(input_image)
        _, *shape = pipe.latents.shape(height, width)
        return {"noise": pipe.generate_noise((1, count, *shape), seed, rand_device, pipe.torch_dtype)}


class QwenImageLayeredUnit_InputImageEmbedder(PipelineUnit):
    """Encodes the composite and its layers to `input_latents` (1, N, 16, h, w); `latents` is where sampling starts."""

    def __init__(self):
        super().__init__(output_params=("latents", "input_latents"), onload_model_names=("vae",))

    def process(self, pipe, input_image, noise, tiled, tile_size, tile_stride):
        if input_image is None:
            return image_units.starting_from(pipe, noise, None)
        encoded = image_units.encode_images(pipe, input_image, tiled, tile_size, tile_stride)
        return image_units.starting_from(pipe, noise, torch.cat(list(encoded)).unsqueeze(0))

    def process_batch(self, pipe, batch):
        """Encode the images of all rows of training data together."""
        images = [image for inputs in batch for image in inputs["input_image"]]
        encoded = iter(image_units.encode_images(pipe, images, *image_units.tiling(batch[0])))
        stacks = [torch.cat([next(encoded) for _ in inputs["input_image"]]).unsqueeze(0) for inputs in batch]
        return [{"latents": inputs["noise"], "input_latents": own} for inputs, own in zip(batch, stacks, strict=True)]


class QwenImageLayeredUnit_ConditionEmbedder(PipelineUnit):
    """Encodes the image to decompose, in the sample's size, to `condition_latents` (1, 16, h, w)."""

    def __init__(self):
        super().__init__(output_params=("condition_latents",), onload_model_names=("vae",))

    def process(self, pipe, layer_input_image, height, width, tiled, tile_size, tile_stride):
        image = _to_decompose(pipe, layer_input_image, width, height)
        (latents,) = image_units.encode_images(pipe, [image], tiled, tile_size, tile_stride)
        return {"condition_latents": latents}

    def process_batch(self, pipe, batch):
        """Encode the images of all rows; those of equal size go through the autoencoder together."""
        images = [_to_decompose(pipe, *(row[n] for n in ("layer_input_image", "width", "height"))) for row in batch]
        encoded = image_units.encode_images(pipe, images, *image_units.tiling(batch[0]))
        return [{"condition_latents": latents} for latents in encoded]


def _to_decompose(pipe: BasePipeline, value: Image.Image | None, width: int, height: int) -> Image.Image:
    """The image to decompose in the sample's size."""
    images = image_units.image_list(value, "layer_input_image", pipe.media.mode)
    if len(images) != 1:
        raise ValueError(
            f"layer_input_image has {len(images)} images, expected the one to decompose; give it, or in a training "
            "list the column in task.extra_inputs and dataset.data_file_keys."
        )
    return images[0].resize((width, height), Image.Resampling.LANCZOS)


# Pipeline -------------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class QwenImageLayeredRequest(TemplateRequest):
    """Decompose one image with Qwen-Image-Layered; `prompt` describes the whole image, also what is hidden in it.

    Args:
        layer_input_image: The image to decompose; resized to `height` and `width`, which should keep its proportions.
        layer_num: Number n of layers, where `input_image` does not decide it.
        input_image: Composite and layers to start from instead of pure noise, or to train on, in a list of n + 1.
        exponential_shift_mu: Shift of the noise levels; None computes it from the number of tokens.
    """

    layer_input_image: Image.Image | None = None
    layer_num: PositiveInt = 4
    input_image: Sequence[Image.Image] | None = None
    cfg_scale: NonNegativeFloat = 4.0
    height: Side = 640
    width: Side = 640
    num_inference_steps: SamplingSteps = 50
    exponential_shift_mu: float | None = None


class QwenImageLayeredPipeline(QwenImagePipeline):
    """Qwen-Image-Layered on diffusers' transformer and VAE of four channels and transformers' Qwen2.5-VL."""

    request = QwenImageLayeredRequest
    components = {
        "dit": Network("QwenImageTransformer2DModel", after=use_joint_attention, lora=LORA_NAMES),
        "text_encoder": Network("Qwen2_5_VLForConditionalGeneration", lora=TEXT_LORA_NAMES),
        "vae": Network(QwenImageVAE, after=QwenImageVAE.use_single_frame_convolutions),
        "tokenizer": Folder("Qwen2Tokenizer", check=check_templates, needed_by="text_encoder"),
    }
    latents = Latents(channels=16, factor=8, patch=2)
    media = LayersMedia()
    control_family, in_iteration_models = None, ("dit",)
    model_fn = staticmethod(model_fn_qwen_image_layered)
    sigma_grid = staticmethod(qwen_image_layered_sigmas)
    model_settings = ("layer_num",)
    combined = BasePipeline.combined
    one_sided_arguments = BasePipeline.one_sided_arguments
    processor = None
    unit_classes = (
        image_units.ShapeChecker,
        QwenImageLayeredUnit_NoiseInitializer,
        QwenImageLayeredUnit_InputImageEmbedder,
        QwenImageUnit_PromptEmbedder,
        QwenImageLayeredUnit_ConditionEmbedder,
    )

    def check_networks(self) -> None:
        super().check_networks()
        config = self.dit and self.dit.config
        if config and not (config.use_layer3d_rope and config.use_additional_t_cond):
            raise ValueError(
                "dit has use_layer3d_rope or use_additional_t_cond false, so that it is not Qwen-Image-Layered's "
                "transformer; take model=qwen_image for Qwen-Image's."
            )
        channels = self.vae and self.vae.config.input_channels
        if channels and channels != len(self.media.mode):
            raise ValueError(
                f"vae has {channels} channels, but Qwen-Image-Layered's has {len(self.media.mode)}, alpha among them; "
                "take the one released with the transformer."
            )

    def pixels_of(self, latents: Tensor, request: Mapping) -> Tensor:
        """Pixels (n, 4, H, W) in [-1, 1] of latents (1, n + 1, 16, h, w), of which the composite is left out."""
        return super().pixels_of(latents[0, 1:], request)
