"""EliGen: prompts of entities, each of which only a part of the image attends to.

Zhang et al. 2025, "EliGen: Entity-Level Controlled Image Generation with Regional Attention"
(https://arxiv.org/abs/2501.01097), as DiffSynth-Studio has it for Qwen-Image.
Shapes: B batch, E entities, L text tokens, T image tokens, S all tokens, D width, h w latent size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ...diffusion.pipeline.image_units import image_list
from ...diffusion.pipeline.request import ImageRequest
from ...diffusion.pipeline.units import PipelineUnit
from ...diffusion.prompts.embedder import PromptEmbedder

if TYPE_CHECKING:
    from ...diffusion.base_pipeline import BasePipeline


@dataclass(kw_only=True)
class EntityRequest(ImageRequest):
    """Sample one image with prompts of entities.

    Args:
        eligen_entity_prompts: A prompt for each entity, for a LoRA that was trained with them (EliGen).
        negative_eligen_entity_prompts: The same for the unconditional prediction, at the same places.
        eligen_entity_masks: An image for each entity, white where it is; resized to `height` and `width`.
    """

    eligen_entity_prompts: Sequence[str] | None = None
    negative_eligen_entity_prompts: Sequence[str] | None = None
    eligen_entity_masks: Sequence[Image.Image] | None = None


class EntityEmbedder(PipelineUnit):
    """Computes text embeddings (1, L, D) of each entity's prompt, and its part of the image, `entity_tokens` (1, E, T).

    Class attributes:
        texts: The family's unit that embeds prompts.
    """

    texts: PromptEmbedder
    column = "eligen_entity_prompts"

    def __init__(self):
        sides = {"eligen_entity_prompts": "eligen_entity_prompts"}
        super().__init__(
            separate_cfg=True,
            input_params_posi=sides,
            input_params_nega=sides,
            output_params=("entity_emb", "entity_emb_mask", "entity_tokens"),
            onload_model_names=("text_encoder",),
        )

    def process(self, pipe, eligen_entity_prompts, eligen_entity_masks, height, width):
        if not eligen_entity_prompts:
            return {}
        masks = image_list(eligen_entity_masks, "eligen_entity_masks")
        _check(eligen_entity_prompts, masks)
        embedded = self.texts.process_batch(pipe, [{"prompt": prompt} for prompt in eligen_entity_prompts])
        return {
            "entity_emb": [one["prompt_emb"] for one in embedded],
            "entity_emb_mask": [one["prompt_emb_mask"] for one in embedded],
            "entity_tokens": torch.stack([_tokens(pipe, mask, height, width) for mask in masks], dim=1),
        }


def _check(prompts: Any, masks: Sequence[Image.Image]) -> None:
    if not isinstance(prompts, list | tuple) or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(
            f"eligen_entity_prompts is {prompts!r:.99}; expected a list of prompts, such as [a cat, a hat]."
        )
    if len(prompts) != len(masks):
        raise ValueError(
            f"eligen_entity_prompts has {len(prompts)} prompts, but eligen_entity_masks has {len(masks)} images; give "
            "each entity one of both."
        )


def _tokens(pipe: "BasePipeline", mask: Image.Image, height: int, width: int) -> Tensor:
    """Which tokens (1, T) of the image a mask covers: a token counts if any of its latent pixels is nearer to white."""
    size = width // pipe.latents.factor, height // pipe.latents.factor
    pixels = np.asarray(mask.resize(size, Image.Resampling.NEAREST), dtype=np.float32).mean(axis=-1)
    covered = torch.from_numpy((pixels > 255 / 2).astype(np.float32))[None]
    return (F.max_pool2d(covered, pipe.latents.patch) > 0).flatten(1).to(pipe.device)


def with_entities(
    text: Tensor, mask: Tensor | None, entities: Sequence[Tensor], masks: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor, Tensor]:
    """The entities' text embeddings before the prompt's (B, L, D); which are no padding (B, L), and positions (L,).

    Args:
        text: The prompt's embeddings (B, L', D), right-padded.
        mask: False where `text` is padding (B, L'); None if nothing is.
        entities: Embeddings (B, L'', D) of each entity, right-padded; they are at the same positions as the prompt's.
        masks: The same of each entity.
    """
    texts, masks = [*entities, text], [*masks, mask]
    kept = [_all_of(own) if own_mask is None else own_mask for own, own_mask in zip(texts, masks, strict=True)]
    positions = [torch.arange(own.shape[1], device=text.device) for own in texts]
    return torch.cat(texts, dim=1), torch.cat(kept, dim=1).bool(), torch.cat(positions)


def _all_of(text: Tensor) -> Tensor:
    return torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)


def regional_mask(kept: Tensor, lengths: Sequence[int], entity_tokens: Tensor) -> Tensor:
    """Which tokens (B, S, S), text before image, a token sees: True at [b, i, j] if i sees j.

    An entity's text attends to itself and to its image tokens. Image tokens attend to all image tokens and to the texts
    of entities that cover them.

    Args:
        kept: Text tokens that are no padding (B, L).
        lengths: Their numbers: each entity's, then the prompt's, whose part is the whole image.
        entity_tokens: The entities' parts of the image (B, E, T).
    """
    whole = torch.ones_like(entity_tokens[:, :1])
    parts = torch.cat([entity_tokens, whole], dim=1)  # (B, E + 1, T)
    numbers = [torch.full((length,), number, device=kept.device) for number, length in enumerate(lengths)]
    of_text = torch.cat(numbers)
    text_text = (of_text[:, None] == of_text[None])[None] & kept[:, None, :]
    text_image = parts[:, of_text]  # (B, L, T)
    image_text = text_image.mT & kept[:, None, :]
    image_image = whole.expand(-1, parts.shape[2], -1)
    text_rows, image_rows = torch.cat([text_text, text_image], dim=2), torch.cat([image_text, image_image], dim=2)
    return torch.cat([text_rows, image_rows], dim=1)
