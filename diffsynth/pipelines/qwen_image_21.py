"""Qwen-Image-2.1: text-to-image and image-to-image with alpha, editing one or several images.

Qwen team 2026, "Qwen-Image-2.1" (https://huggingface.co/Qwen/Qwen-Image-2.1). Networks: diffusers, transformers.
Images are RGBA. Latents are (B, 64, H/16, W/16), and the transformer reads each latent pixel as a token; those of 2 × 2
come together. Text, images to edit and the image are one sequence: a token attends to earlier tokens, and the tokens of
an image attend to each other. Constants come from the released pipeline (diffusers' QwenImage21Pipeline).

Shapes: B batch, L text tokens, S tokens of text and images, D width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from diffusers import AutoencoderKLQwenImage21, QwenImage21Transformer2DModel
from diffusers.models.attention_dispatch import dispatch_attention_fn
from PIL import Image
from torch import Tensor, nn

from ..core.gradient import checkpoint_blocks
from ..core.host_memory import sent
from ..core.loader import ModelConfig
from ..core.ranges import NonNegativeFloat, SamplingSteps
from ..diffusion.adapters.names import LayerNames
from ..diffusion.base_pipeline import BasePipeline
from ..diffusion.pipeline import image_units
from ..diffusion.pipeline.attention import rotated, rotation_table
from ..diffusion.pipeline.components import Folder, Network
from ..diffusion.pipeline.media import ImageMedia
from ..diffusion.pipeline.request import EDIT_IMAGE_PIXELS, EditRequest
from ..diffusion.pipeline.vae import Latents, SingleFrameVAE
from ..diffusion.prompts.embedder import PromptEmbedder
from ..diffusion.prompts.hidden_states import hidden_states
from .shared.qwen import (
    IMAGE_TOKEN,
    TEXT_LORA_NAMES,
    image_inputs,
    image_lengths,
    image_patches,
    qwen_image_sigmas,
)

__all__ = ["ModelConfig", "QwenImage21Pipeline"]

SYSTEM_MESSAGE = "<|im_start|>system\nComprehend and analyze the provided prompt.<|im_end|>\n"  # its states are dropped
PROMPT_START, PROMPT_END = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
MAX_POSITIONS = 8191  # of text before the image; the table of rotations has 8192
# ComfyUI fuses the two layers of a feed-forward network that read its input.
LORA_NAMES = LayerNames(
    prefix="transformer",
    comfyui="diffusion_model.",
    common="comfyui",
    original={
        "transformer_blocks.*.img_mlp.gate_up": (
            "transformer_blocks.*.img_mlp.gate_layer",
            "transformer_blocks.*.img_mlp.proj",
        )
    },
)
Segment = tuple[int, int, Tensor | None]  # first token, token after the last, and which tokens until there they see


# Networks -------------------------------------------------------------------------------------------------------------


class QwenImage21VAE(SingleFrameVAE, AutoencoderKLQwenImage21):
    """The released autoencoder of RGBA images (B, 4, H, W)."""


class QwenImage21AttnProcessor:
    """Attention of each segment to the tokens until its end, as diffusers' processor computes it except `rotated`."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self, attn: nn.Module, hidden_states: Tensor, rotary_emb: Tensor, segments: Sequence[Segment], **_
    ) -> Tensor:
        query, key, value = (
            layer(hidden_states).unflatten(-1, (attn.heads, -1)) for layer in (attn.to_q, attn.to_k, attn.to_v)
        )
        query = rotated(attn.norm_q(query).to(value.dtype), rotary_emb)
        key = rotated(attn.norm_k(key).to(value.dtype), rotary_emb)
        attend = partial(dispatch_attention_fn, backend=self._attention_backend)
        seen = [
            attend(query[:, start:end], key[:, :end], value[:, :end], attn_mask=mask) for start, end, mask in segments
        ]
        tokens = torch.cat(seen, dim=1).flatten(2).to(query.dtype)
        return attn.to_out[1](attn.to_out[0](tokens))


class QwenImage21Transformer(QwenImage21Transformer2DModel):
    """The released transformer, called with the numbers of tokens as ints.

    diffusers' `forward` reads them back from the device, and gives the image of a short prompt the position that it has
    after the longest prompt of its batch.
    """

    def use_segments(self) -> None:
        if not self.config.causal_condition:
            raise ValueError(
                "dit has causal_condition=false in its config.json, expected true; take the config.json that was "
                "released with Qwen-Image-2.1."
            )
        for block in self.transformer_blocks:
            block.attn.set_processor(QwenImage21AttnProcessor())

    def forward(
        self, images: Sequence[Tensor], text: Tensor, lengths: Sequence[Sequence[int]], timestep: Tensor
    ) -> Tensor:
        """Velocity (B, C, h, w) of the last image at timesteps (B,) in [0, 1].

        Args:
            images: Latents (B, C, h, w) of each image, the clean ones first and the noisy one last.
            text: Text embeddings (B, L, D), right-padded.
            lengths: For each sample the numbers of tokens of its text before each image.
        """
        *heads, _ = lengths[0]
        runs = [*heads, text.shape[1] - sum(heads)]
        lasts = [own[-1] for own in lengths]
        ends = sent(torch.tensor(lasts), text.device) if min(lasts) < max(lasts) else None
        parts = zip(self.txt_in(text).split(runs, dim=1), map(self._tokens, images), strict=True)
        tokens = torch.cat([tensor for pair in parts for tensor in pair], dim=1)
        count = images[-1].shape[2:].numel()
        temb, modulation, is_target = self._modulation(timestep, tokens, count)
        table = rotation_table(self._rotation(runs, ends, images))
        layout = (table, None, is_target, None, None, None, segments(runs, ends, images))  # without a cache of keys
        checkpoints = torch.is_grad_enabled() and self.gradient_checkpointing
        for block in self.transformer_blocks:
            run = partial(self._gradient_checkpointing_func, block) if checkpoints else block
            tokens = run(tokens, modulation, *layout)
        velocity = self.proj_out(self.norm_out(tokens[:, -count:], temb[: len(text)]))
        return velocity.transpose(1, 2).unflatten(2, images[-1].shape[2:])

    def _tokens(self, image: Tensor) -> Tensor:
        return self.img_in(image.flatten(2).transpose(1, 2))

    def _modulation(self, timestep: Tensor, tokens: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings (B + 1, D) of the timesteps and of 0, their modulation, and the tokens (S,) at the timesteps."""
        temb = self.time_text_embed(torch.cat([timestep, timestep.new_zeros(1)]), tokens)
        places = torch.arange(tokens.shape[1], device=tokens.device)
        return temb, self.modulation(temb), places >= tokens.shape[1] - count

    def _rotation(self, runs: Sequence[int], ends: Tensor | None, images: Sequence[Tensor]) -> Tensor:
        """Complex rotations (S, head_dim / 2), or (B, S, head_dim / 2) where the positions of the samples differ.

        Text positions grow by 1 on all three axes. An image has one position on the first axis; rows and columns are
        centred on 0. The next text token comes max(h, w) later.
        """
        rope = self.pos_embed
        rope.freqs = [table.to(images[-1].device) for table in rope.freqs]
        place, parts = 0, []
        for run, image in zip(runs, images, strict=True):
            parts.append(torch.cat([table[place : place + run] for table in rope.freqs], dim=-1))
            place += run
            after = place if ends is None or image is not images[-1] else place - run + ends
            parts.append(_grid(rope.freqs, after, *image.shape[2:]))
            place += max(image.shape[2:])
        size = torch.broadcast_shapes(*(part.shape[:-2] for part in parts))
        return torch.cat([part.expand(*size, *part.shape[-2:]) for part in parts], dim=-2)


def _grid(tables: Sequence[Tensor], place: int | Tensor, height: int, width: int) -> Tensor:
    """Rotations (height · width, head_dim / 2) of an image at a place, or (B, …) at places (B,)."""
    frame = tables[0][place].unsqueeze(-2).unsqueeze(-2)
    rows, columns = (
        table[torch.arange(-(side - side // 2), side // 2, device=table.device)]
        for table, side in zip(tables[1:], (height, width), strict=True)
    )
    size = (*frame.shape[:-3], height, width)
    axes = (frame, rows.unsqueeze(1), columns)
    return torch.cat([axis.expand(*size, axis.shape[-1]) for axis in axes], dim=-1).flatten(-3, -2)


def segments(runs: Sequence[int], ends: Tensor | None, images: Sequence[Tensor]) -> list[Segment]:
    """The runs of text, whose tokens see those before them, and the images; only the last one could see padding.

    Args:
        ends: Numbers of tokens (B,) of the last run without padding; None if none is padded.
    """
    device, found, place = images[-1].device, [], 0
    for run, image in zip(runs, images, strict=True):
        causal = torch.ones(run, place + run, dtype=torch.bool, device=device).tril(place)
        found.append((place, place + run, causal))
        place += run
        found.append((place, place + image.shape[2:].numel(), None))
        place += image.shape[2:].numel()
    start, end, _ = found[-1]
    if ends is not None:
        places = torch.arange(end, device=device)
        is_seen = (places < start - runs[-1] + ends.unsqueeze(1)) | (places >= start)
        found[-1] = (start, end, is_seen[:, None, None])
    return [segment for segment in found if segment[0] < segment[1]]


def model_fn_qwen_image_21(
    dit: QwenImage21Transformer,
    latents: Tensor,
    timestep: Tensor,
    prompt_emb: Tensor,
    prompt_emb_lengths: Sequence[Sequence[int]],
    edit_latents: Sequence[Tensor] = (),
    use_gradient_checkpointing: bool = False,
    use_gradient_checkpointing_offload: bool = False,
) -> Tensor:
    """Velocity (B, 64, h, w) of noisy latents (B, 64, h, w) at timesteps (B,) in [0, 1000].

    Args:
        prompt_emb: Text embeddings (B, L, D), right-padded.
        prompt_emb_lengths: For each sample the numbers of tokens before each image to edit, and after them.
        edit_latents: Clean latents (B, 64, h', w') of each image to edit, of their own sizes.
    """
    checkpoint_blocks(dit, use_gradient_checkpointing, use_gradient_checkpointing_offload)
    images = [image.to(dit.dtype) for image in (*edit_latents, latents)]
    return dit(images, prompt_emb.to(dit.dtype), prompt_emb_lengths, timestep / 1000)


# Units ----------------------------------------------------------------------------------------------------------------


class QwenImage21Unit_EditImageEmbedder(image_units.EditImageEmbedder):
    resize = staticmethod(image_units.stretch_to_area)
    needs = "processor"
    model_with_it = "the processor of model=qwen_image_21"


class QwenImage21Unit_PromptEmbedder(PromptEmbedder):
    """Computes text embeddings (1, L, D) of a prompt, which has seen the edit images, and the lengths of its pieces."""

    def __init__(self):
        super().__init__(counted=True)

    def tokenize(
        self, pipe, prompt, edit_image=None, edit_image_auto_resize=True, edit_image_pixels=EDIT_IMAGE_PIXELS
    ) -> dict[str, Tensor]:
        options = (edit_image_auto_resize, edit_image_pixels, image_units.stretch_to_area)
        images = image_units.edit_images(edit_image, *options, pipe.media.mode, pipe.latents.multiple)
        return pipe.tokenize(prompt, images)

    def embed(self, pipe: "QwenImage21Pipeline", tokens: Mapping[str, Tensor]) -> Tensor:
        model = pipe.text_encoder.model  # without the language head, which would cost time and memory
        decoder = model.get_decoder()
        (states,) = hidden_states(decoder, [decoder.config.num_hidden_layers], around=model, **tokens)
        return states


# Pipeline -------------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class QwenImage21Request(EditRequest):
    """Sample one image with Qwen-Image-2.1, which is distilled: it needs no guidance."""

    num_inference_steps: SamplingSteps = 40
    cfg_scale: NonNegativeFloat = 1.0


class QwenImage21Pipeline(BasePipeline):
    """Qwen-Image-2.1 on diffusers' transformer and VAE and transformers' Qwen3-VL."""

    request = QwenImage21Request
    components = {
        "dit": Network(QwenImage21Transformer, after=QwenImage21Transformer.use_segments, lora=LORA_NAMES),
        "text_encoder": Network("Qwen3VLForConditionalGeneration", lora=TEXT_LORA_NAMES),
        "vae": Network(QwenImage21VAE),
        "tokenizer": Folder("Qwen2Tokenizer", needed_by="text_encoder"),
        "processor": Folder("Qwen2VLImageProcessorPil"),  # torchvision's differs a little
    }
    latents = Latents(channels=64, factor=16, group=2)
    media = ImageMedia("RGBA")
    model_fn = staticmethod(model_fn_qwen_image_21)
    sigma_grid = staticmethod(qwen_image_sigmas)
    model_settings = ("edit_image_pixels",)
    most_tokens = MAX_POSITIONS
    text_widths = {"text_encoder": lambda dit, own: (dit.config.context_in_dim, own.config.text_config.hidden_size)}
    unit_classes = (
        *image_units.IMAGE_UNITS,
        QwenImage21Unit_PromptEmbedder,
        QwenImage21Unit_EditImageEmbedder,
    )

    def tokenize(self, prompt: str, images: Sequence[Image.Image]) -> dict[str, Tensor | list[slice]]:
        """The text encoder's inputs for a prompt with images, and which of its states are those of text.

        The end of a prompt that is too long is cut off. States of images are dropped, because the transformer has their
        latents instead.
        """
        patches = image_patches(self.processor, images, "take that of model=qwen_image_21") if images else {}
        counts = image_lengths(self.processor, patches) if images else []
        text, place, kept, run = SYSTEM_MESSAGE, self._count(SYSTEM_MESSAGE), [], PROMPT_START
        for number, count in enumerate(counts, start=1):
            run += f"{' ' if kept else ''}<image{number}><|vision_start|>"
            kept.append(slice(place, place + self._count(run)))
            place, text, run = kept[-1].stop + count, text + run + IMAGE_TOKEN * count, "<|vision_end|>"
        ids = self.tokenizer([text + run + (prompt or " ") + PROMPT_END], return_tensors="pt").input_ids
        taken = sum(max(image.size) // self.latents.factor for image in images)
        ids = self._shortened(ids, self._count(SYSTEM_MESSAGE) + sum(counts) + MAX_POSITIONS - taken)
        if not images:
            return {"input_ids": ids, "kept": [slice(place, None)]}
        others = image_inputs(self.tokenizer, ids, patches)
        return {"input_ids": ids, "kept": [*kept, slice(place, None)], **others}

    def _count(self, text: str) -> int:
        """Number of tokens of a text before a special token."""
        whole, end = (len(self.tokenizer([own]).input_ids[0]) for own in (text + PROMPT_END, PROMPT_END))
        return whole - end

    def _shortened(self, ids: Tensor, most: int) -> Tensor:
        """Token ids (1, L) without the last ones of the prompt, if there are more than `most`."""
        end = len(self.tokenizer([PROMPT_END]).input_ids[0])
        return ids if ids.shape[1] <= most else torch.cat([ids[:, : most - end], ids[:, -end:]], dim=1)

    def prompt_text(self, prompt: str) -> str:
        return PROMPT_START + prompt + PROMPT_END
