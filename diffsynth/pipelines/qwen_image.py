"""Qwen-Image: text-to-image and image-to-image, editing one or several images.

Wu et al. 2025, "Qwen-Image Technical Report" (https://arxiv.org/abs/2508.02324). Networks: diffusers, transformers.
Latents are (B, 16, H/8, W/8); the transformer reads 2 × 2 latent pixels as a token, (B, H/16 · W/16, 64). Edit images
are further image tokens, and the text encoder reads them, too. Constants without a source are diffusers' (as released).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import QwenImageTransformer2DModel
from diffusers.models.transformers.transformer_qwenimage import QwenDoubleStreamAttnProcessor2_0
from PIL import Image
from torch import Tensor, nn

from ..core.context_parallel import TokenSplit
from ..core.gradient import checkpoint_blocks
from ..core.loader import ModelConfig
from ..core.ranges import NonNegativeFloat, Pixels, Side
from ..diffusion.adapters.names import LayerNames
from ..diffusion.base_pipeline import BasePipeline
from ..diffusion.controlnet.inputs import InpaintControlEmbedder, InpaintControlRequest
from ..diffusion.pipeline import image_units
from ..diffusion.pipeline.attention import JointAttention, rotated, rotation_table
from ..diffusion.pipeline.components import Folder, Network
from ..diffusion.pipeline.kv_cache import KVCache
from ..diffusion.pipeline.request import EDIT_IMAGE_PIXELS, EditRequest, TemplateRequest
from ..diffusion.pipeline.vae import Latents
from ..diffusion.prompts.embedder import PromptEmbedder
from ..diffusion.template import residuals
from ..diffusion.template.cache import append_text
from ..diffusion.template.lora import InputLoRA, added
from ..diffusion.template.residuals import BlockResiduals
from .autoencoders.qwen_image import QwenImageVAE
from .controlnets.qwen_image import (
    CONTROL_FAMILY,
    QwenImageControlNet,
    block_samples,
)
from .shared.entities import EntityEmbedder, EntityRequest, regional_mask, with_entities
from .shared.qwen import (
    IMAGE_TOKEN,
    START_TOKENS,
    TEMPLATE_END,
    TEMPLATE_START,
    TEXT_LORA_NAMES,
    image_inputs,
    image_lengths,
    image_patches,
    qwen_image_sigmas,
)
from .shared.tokens import pack_latents, unpack_latents

__all__ = ["ModelConfig", "QwenImagePipeline"]

PROMPT_TEMPLATE = TEMPLATE_START + "{}" + TEMPLATE_END
PROMPT_TEMPLATE_TOKENS = START_TOKENS
MAX_PROMPT_TOKENS = 1024
EDIT_PROMPT_TEMPLATE = (
    "<|im_start|>system\nDescribe the key features of the input image (color, shape, size, texture, objects, "
    "background), then explain how the user's text instruction should alter or modify the image. Generate a new image "
    "that meets the user's requirements while maintaining consistency with the original input where appropriate."
    "<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
EDIT_PROMPT_TEMPLATE_TOKENS = 64
EDIT_VISION_PIXELS = 384 * 384
# diffusers (0.39 to 0.42 at least) and DiffSynth-Studio read ComfyUI's names, too.
LORA_NAMES = LayerNames(prefix="transformer", comfyui="diffusion_model.", common="comfyui")


# Networks -------------------------------------------------------------------------------------------------------------


class QwenImageAttnProcessor(JointAttention, QwenDoubleStreamAttnProcessor2_0):
    """`JointAttention` of the text's tokens and the image's, as diffusers' processor computes it except `rotated`."""

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        kv_cache: KVCache | None = None,
        split: TokenSplit | None = None,
        text_positions: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        of_image, of_text = image_rotary_emb
        if text_positions is not None:
            of_text = of_text[:, text_positions]
        table = torch.cat([of_text, of_image], dim=1)
        mask = encoder_hidden_states_mask if attention_mask is None else attention_mask
        rotate, extra = partial(rotated, table=table), self.extra(kv_cache)
        return self.attend_both(attn, hidden_states, encoder_hidden_states, rotate, mask, extra, split)


def use_joint_attention(dit: QwenImageTransformer2DModel) -> None:
    for number, block in enumerate(dit.transformer_blocks):
        block.attn.set_processor(QwenImageAttnProcessor(f"block_{number}"))
    dit.pos_embed.register_forward_hook(rotation_tables)


def rotation_tables(_: nn.Module, __: tuple, frequencies: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """A forward hook that turns complex frequencies, of image and text, into tables of `rotated`, once for all blocks.

    Inductor does not compile complex numbers: each block would fall back to eager code for them.
    """
    return tuple(map(rotation_table, frequencies))


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
    batch, images = len(latents), [latents, *context_latents, *edit_latents]
    prompt_emb, prompt_emb_mask = append_text(prompt_emb, prompt_emb_mask, extra_text_embedding)
    inputs = {
        "hidden_states": torch.cat([pack_latents(image) for image in images], dim=1).to(dit.dtype),
        "timestep": timestep / 1000,
        "encoder_hidden_states": prompt_emb.to(dit.dtype),
        "encoder_hidden_states_mask": prompt_emb_mask,
        "img_shapes": [[(1, image.shape[2] // 2, image.shape[3] // 2) for image in images]] * batch,
    }
    samples = None
    if control_latents:
        check_alone(edit_image=edit_latents, context_image=context_latents)
        images = list(map(pack_latents, control_latents))
        samples = block_samples(controlnets, dit, inputs, images, control_prompt, controlnet_scale)
    attention = {"kv_cache": kv_cache} if kv_cache else {}
    if entity_emb:
        regions = regional_inputs(inputs, entity_emb, entity_emb_mask, entity_tokens)
        inputs, attention = inputs | regions[0], attention | regions[1]
    height, width = latents.shape[2:]
    tokens = height // 2 * (width // 2)
    adding = residuals.added(dit, block_residuals, tokens, inputs["hidden_states"].shape[1])
    with added(dit, lora), adding:
        velocity = dit(
            **inputs,
            controlnet_block_samples=samples,
            attention_kwargs=attention or None,
            return_dict=False,
        )[0]
    return unpack_latents(velocity[:, :tokens], height, width)


def check_alone(**images: Any) -> None:
    """Refuse further images beside that of a ControlNet, which reads tokens of the sampled image alone."""
    if others := [name for name, value in images.items() if value]:
        raise ValueError(
            f"{others[0]} is given beside controlnet_image, but a ControlNet of Qwen-Image reads the sampled image "
            "alone; leave one of the two out."
        )


def regional_inputs(
    inputs: Mapping[str, Any], texts: Sequence[Tensor], masks: Sequence[Tensor | None], tokens: Tensor
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Arguments of the transformer's call, and of its attention: texts (B, L, D) of entities before the prompt's.

    Args:
        inputs: Arguments of the transformer's call without entities.
        tokens: Tokens of the image (B, E, T) that see each entity's text.

    Raises:
        ValueError: There are images besides the sampled one.
    """
    if inputs["hidden_states"].shape[1] != tokens.shape[2]:
        raise ValueError(
            "eligen_entity_prompts are for the sampled image alone; leave edit_image and context_image out, and give "
            "all samples of a batch one size."
        )
    text = inputs["encoder_hidden_states"], inputs["encoder_hidden_states_mask"]
    lengths = [own.shape[1] for own in (*texts, text[0])]
    text, kept, positions = with_entities(*text, [own.to(text[0]) for own in texts], masks)
    changed = {"encoder_hidden_states": text, "encoder_hidden_states_mask": None}
    return changed, {"attention_mask": regional_mask(kept, lengths, tokens), "text_positions": positions}


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


class QwenImageUnit_PromptEmbedder(PromptEmbedder):
    """Computes text embeddings (1, L, D) of a prompt and its edit images, and their mask (1, L)."""

    def __init__(self):
        super().__init__(masked=True)

    def tokenize(
        self,
        pipe,
        prompt,
        edit_image=None,
        edit_image_auto_resize=True,
        edit_image_pixels=EDIT_IMAGE_PIXELS,
        edit_image_numbered=False,
        edit_vision_pixels=EDIT_VISION_PIXELS,
    ) -> dict[str, Tensor]:
        """Tokens of a prompt and its images: numbered images have a size of their own, others the autoencoder's."""
        numbered = edit_image_numbered or (isinstance(edit_image, list | tuple) and len(edit_image) > 1)
        size = (True, edit_vision_pixels) if numbered else (edit_image_auto_resize, edit_image_pixels)
        images = image_units.edit_images(edit_image, *size, image_units.stretch_to_area)
        tokens = pipe.tokenize_with_images(prompt, images, numbered) if images else pipe.tokenize(prompt)
        return {**tokens, "attention_mask": torch.ones_like(tokens["input_ids"])}

    def embed(self, pipe: "QwenImagePipeline", tokens: Mapping[str, Tensor]) -> Tensor:
        template = EDIT_PROMPT_TEMPLATE_TOKENS if "pixel_values" in tokens else PROMPT_TEMPLATE_TOKENS
        # Without the language head, which would cost time and memory.
        return pipe.text_encoder.model(**tokens).last_hidden_state[:, template:]


class QwenImageUnit_EntityEmbedder(EntityEmbedder):
    texts = QwenImageUnit_PromptEmbedder()


# Pipeline -------------------------------------------------------------------------------------------------------------


def check_templates(pipe: "QwenImagePipeline") -> None:
    """Refuse a tokenizer that makes another number of tokens from the prompt templates than the released one."""
    if pipe.tokenizer is None:
        return
    templates = {"prompt template": (PROMPT_TEMPLATE, PROMPT_TEMPLATE_TOKENS)}
    if pipe.processor is not None:
        templates["template of edit prompts"] = (EDIT_PROMPT_TEMPLATE, EDIT_PROMPT_TEMPLATE_TOKENS)
    for name, (template, tokens) in templates.items():
        found = len(pipe.tokenizer(template.split("{}")[0]).input_ids)
        if found != tokens:
            raise ValueError(
                f"The tokenizer in {pipe.folders['tokenizer']} makes {found} tokens of the {name}, expected {tokens}: "
                "it is not Qwen-Image's; take the tokenizer released with the model."
            )


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

    def tokenize_with_images(self, prompt: str, images: Sequence[Image.Image], numbered: bool) -> dict[str, Tensor]:
        """The text encoder's inputs for a prompt with images: token ids (1, L), their types (1, L), image patches.

        If `numbered`, the first image is introduced by "Picture 1: " and so on, so that the prompt can name it.
        """
        patches = image_patches(self.processor, images, "take a model for editing, such as model=qwen_image_edit")
        counts = image_lengths(self.processor, patches)
        texts = [f"<|vision_start|>{IMAGE_TOKEN * count}<|vision_end|>" for count in counts]
        if numbered:
            texts = [f"Picture {number}: {text}" for number, text in enumerate(texts, start=1)]
        ids = self.tokenizer([EDIT_PROMPT_TEMPLATE.format("".join(texts) + prompt)], return_tensors="pt").input_ids
        return {"input_ids": ids, **image_inputs(self.tokenizer, ids, patches)}

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
