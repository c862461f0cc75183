"""Qwen-Image: text-to-image and image-to-image, editing one or several images.

Wu et al. 2025, "Qwen-Image Technical Report" (https://arxiv.org/abs/2508.02324). Networks: diffusers, transformers.
Latents are (B, 16, H/8, W/8); the transformer reads 2 × 2 latent pixels as a token, (B, H/16 · W/16, 64). Edit images
are further image tokens, and the text encoder reads them, too. Constants without a source are diffusers' (as released).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from diffusers import QwenImageTransformer2DModel
from PIL import Image
from torch import Tensor

from ..core.gradient import checkpoint_blocks
from ..core.loader import ModelConfig
from ..core.ranges import NonNegativeFloat, Pixels, Side
from ..diffusion.base_pipeline import BasePipeline
from ..diffusion.controlnet.inputs import InpaintControlEmbedder, InpaintControlRequest
from ..diffusion.pipeline import image_units
from ..diffusion.pipeline.components import Folder, Network
from ..diffusion.pipeline.kv_cache import KVCache
from ..diffusion.pipeline.request import EditRequest, TemplateRequest
from ..diffusion.pipeline.vae import Latents
from ..diffusion.template import residuals
from ..diffusion.template.cache import append_text
from ..diffusion.template.lora import InputLoRA, added
from ..diffusion.template.residuals import BlockResiduals
from .autoencoders.qwen_image import QwenImageVAE
from .controlnets.qwen_image import (
    CONTROL_FAMILY,
    QwenImageControlNet,
    block_samples,
    check_alone,
)
from .networks.qwen_image import (
    LORA_NAMES,
    call_inputs,
    regional_inputs,
    use_joint_attention,
)
from .prompts.qwen_image import (
    EDIT_VISION_PIXELS,
    MAX_PROMPT_TOKENS,
    PROMPT_TEMPLATE,
    PROMPT_TEMPLATE_TOKENS,
    QwenImageUnit_EntityEmbedder,
    QwenImageUnit_PromptEmbedder,
    check_templates,
)
from .shared.entities import EntityRequest
from .shared.qwen import TEXT_LORA_NAMES, qwen_image_sigmas
from .shared.tokens import pack_latents, unpack_latents

__all__ = ["ModelConfig", "QwenImagePipeline"]


def model_fn_qwen_image(
    dit: QwenImageTransformer2DModel,
    latents: Tensor,
    timestep: Tensor,
    prompt_emb: Tensor,
    prompt_emb_mask: Tensor | None,
    edit_latents: Sequence[Tensor] = (),
    context_latents: Sequence[Tensor] = (),
    controlnets: Sequence[QwenImageControlNet] = (),
    control_latents: Sequence[Tensor] = (),
    controlnet_scale: float | Sequence[float] = 1.0,
    control_prompt: tuple[Tensor, Tensor | None] | None = None,
    kv_cache: KVCache | None = None,
    lora: InputLoRA | None = None,
    extra_text_embedding: Tensor | None = None,
    block_residuals: Sequence[Sequence[BlockResiduals]] | None = None,
    entity_emb: Sequence[Tensor] = (),
    entity_emb_mask: Sequence[Tensor | None] = (),
    entity_tokens: Tensor | None = None,
    use_gradient_checkpointing: bool = False,
    use_gradient_checkpointing_offload: bool = False,
) -> Tensor:
    """Velocity (B, 16, h, w) of noisy latents (B, 16, h, w) at timesteps (B,) in [0, 1000].

    Args:
        prompt_emb: Text embeddings (B, L, D), right-padded.
        prompt_emb_mask: False where `prompt_emb` is padding (B, L); None if nothing is.
        edit_latents: Clean latents (B, 16, h', w') of each edit image, of their own sizes.
        context_latents: Clean latents (B, 16, h, w) of each image that an adapter for In-Context control reads.
        control_latents: Latents (B, 16 or 17, h, w) of each image that a ControlNet reads.
        control_prompt: `prompt_emb` and `prompt_emb_mask` of the ControlNets, if they read another prompt.
        kv_cache: Extra keys and values by block, `block_0` and so on.
        lora: Updates of the transformer's layers.
        extra_text_embedding: Text embeddings (B, L', D) appended to the prompt's.
        block_residuals: What templates add to the image's tokens after blocks, for each sample.
        entity_emb, entity_emb_mask: `prompt_emb` and `prompt_emb_mask` of each entity's prompt.
        entity_tokens: Tokens of the image (B, E, h · w / 4) that see each entity's prompt, and that it sees.
    """
    for network in (dit, *controlnets):
        checkpoint_blocks(network, use_gradient_checkpointing, use_gradient_checkpointing_offload)
    text = append_text(prompt_emb, prompt_emb_mask, extra_text_embedding)
    inputs = call_inputs(dit, [latents, *context_latents, *edit_latents], timestep, *text)
    samples, attention = None, {"kv_cache": kv_cache} if kv_cache else {}
    if control_latents:
        check_alone(edit_image=edit_latents, context_image=context_latents)
        samples = block_samples(controlnets, dit, inputs, control_latents, control_prompt, controlnet_scale)
    if entity_emb:
        inputs, regions = regional_inputs(inputs, entity_emb, entity_emb_mask, entity_tokens)
        attention |= regions
    own, tokens = latents.shape[2:].numel() // 4, inputs["hidden_states"].shape[1]
    inputs |= {"controlnet_block_samples": samples, "attention_kwargs": attention or None}
    with added(dit, lora), residuals.added(dit, block_residuals, own, tokens):
        velocity = dit(**inputs, return_dict=False)[0]
    return unpack_latents(velocity, *latents.shape[2:])


# Units ----------------------------------------------------------------------------------------------------------------

# Units that other families share, by the names that DiffSynth-Studio's guides print.
QwenImageUnit_ShapeChecker = image_units.ShapeChecker
QwenImageUnit_NoiseInitializer = image_units.NoiseInitializer
QwenImageUnit_InputImageEmbedder = image_units.InputImageEmbedder
QwenImageUnit_Inpaint = image_units.Inpaint
QwenImageUnit_LossMask = image_units.LossMask


class QwenImageUnit_EditImageEmbedder(image_units.EditImageEmbedder):
    resize = staticmethod(image_units.stretch_to_area)
    needs = "processor"
    model_with_it = "a model for editing, such as model=qwen_image_edit"


class QwenImageUnit_ContextImageEmbedder(image_units.PipelineUnit):
    """Encodes the images of In-Context control, in the sample's size, to `context_latents` (1, 16, h, w)."""

    column = "context_image"

    def __init__(self):
        super().__init__(output_params=("context_latents",), onload_model_names=("vae",))

    def process(self, pipe, context_image, height, width, tiled, tile_size, tile_stride):
        images = image_units.image_list(context_image, "context_image")
        sized = [image.resize((width, height), Image.Resampling.LANCZOS) for image in images]
        latents = image_units.encode_images(pipe, sized, tiled, tile_size, tile_stride) if sized else []
        return {"context_latents": list(latents)} if sized else {}


# Pipeline -------------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class QwenImageRequest(EditRequest, TemplateRequest, InpaintControlRequest, EntityRequest):
    """Sample one image with Qwen-Image.

    Args:
        context_image: Image that an adapter for In-Context control follows, or several; resized to the sample's size.
        cfg_rescale: Keep the norm of the conditional velocity under guidance, as the released model samples.
        edit_image_numbered: Number a single edit image, too, as Qwen-Image-Edit-2509 and later were trained; several
            are always numbered, so that the prompt can name Picture 1, Picture 2.
        edit_vision_pixels: Area of numbered images for the text encoder, which reads others in the autoencoder's size.
        exponential_shift_mu: Shift of the noise levels; None computes it from the number of tokens.
        block_residuals, negative_block_residuals: Layers of templates by block, whose outputs are added to the image's
            tokens.
    """

    cfg_scale: NonNegativeFloat = 4.0
    cfg_rescale: bool = True
    height: Side = 1328
    width: Side = 1328
    context_image: Image.Image | Sequence[Image.Image] | None = None
    edit_image_numbered: bool = False
    edit_vision_pixels: Pixels = EDIT_VISION_PIXELS
    exponential_shift_mu: float | None = None
    block_residuals: Mapping | Sequence[Mapping] | None = None
    negative_block_residuals: Mapping | Sequence[Mapping] | None = None


class QwenImagePipeline(BasePipeline):
    """Qwen-Image on diffusers' transformer and VAE and transformers' Qwen2.5-VL."""

    request = QwenImageRequest
    components = {
        "dit": Network("QwenImageTransformer2DModel", after=use_joint_attention, lora=LORA_NAMES),
        "text_encoder": Network("Qwen2_5_VLForConditionalGeneration", lora=TEXT_LORA_NAMES),
        "vae": Network(QwenImageVAE, after=QwenImageVAE.use_single_frame_convolutions),
        "tokenizer": Folder("Qwen2Tokenizer", check=check_templates, needed_by="text_encoder"),
        "processor": Folder("Qwen2VLImageProcessorPil", check=check_templates),  # torchvision's differs a little
    }
    latents = Latents(channels=16, factor=8, patch=2)
    control_family = CONTROL_FAMILY
    model_fn = staticmethod(model_fn_qwen_image)
    sigma_grid = staticmethod(qwen_image_sigmas)
    model_settings = ("edit_image_pixels", "edit_image_numbered", "edit_vision_pixels")
    unit_classes = (
        *image_units.IMAGE_UNITS,
        InpaintControlEmbedder,
        QwenImageUnit_ContextImageEmbedder,
        QwenImageUnit_PromptEmbedder,
        QwenImageUnit_EntityEmbedder,
        QwenImageUnit_EditImageEmbedder,
    )

    @property
    def one_sided_arguments(self) -> tuple[str, ...]:
        return (*super().one_sided_arguments, "eligen_entity_prompts")

    def complete(self, request: Mapping) -> dict:
        whole = super().complete(request)
        if whole.get("controlnet_image") is not None:
            check_alone(**{name: whole[name] for name in ("edit_image", "context_image")})
        return whole

    def tokenize(self, prompt: str) -> Mapping[str, Tensor]:
        """Token ids and mask (1, L) of a prompt in its template."""
        length = MAX_PROMPT_TOKENS + PROMPT_TEMPLATE_TOKENS
        return self.tokenizer([PROMPT_TEMPLATE.format(prompt)], max_length=length, truncation=True, return_tensors="pt")

    most_tokens = MAX_PROMPT_TOKENS + PROMPT_TEMPLATE_TOKENS

    def prompt_text(self, prompt: str) -> str:
        return PROMPT_TEMPLATE.format(prompt)

    def cuts_off(self, prompt: str) -> bool:
        return len(prompt.encode()) > MAX_PROMPT_TOKENS and super().cuts_off(prompt)  # a token is at least one byte

    def combined(self, positive: Tensor, negative: Tensor, cfg_scale: float, shared: Mapping) -> Tensor:
        """Guided velocity (B, 16, h, w); each token keeps the norm of the conditional velocity."""
        guided = super().combined(positive, negative, cfg_scale, shared)
        if not shared.get("cfg_rescale", True):
            return guided
        tokens, wanted = pack_latents(guided), pack_latents(positive).norm(dim=-1, keepdim=True)
        norm = tokens.norm(dim=-1, keepdim=True).clamp_min(1e-12)  # an untrained network may predict 0
        return unpack_latents(tokens * (wanted / norm), *guided.shape[-2:])
