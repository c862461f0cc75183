"""Stable Diffusion 3.5's prompts, which two CLIPs and a T5 read; one that is absent gives zeros, as in the training.

Shapes: B prompts, L tokens of T5, D width, P width of the pooled embeddings.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ...diffusion.pipeline.units import PipelineUnit
from ...diffusion.prompts.embedder import padded_ids

if TYPE_CHECKING:
    from ..sd3 import SD3Pipeline

CLIP_TOKENS = 77  # positions that both CLIPs have; prompts are padded to it
ENCODERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2", "text_encoder_3": "tokenizer_3"}


class SD3Unit_PromptEmbedder(PipelineUnit):
    """Computes text embeddings (1, 77 + L, D) of a prompt by two CLIPs and a T5, and CLIP's pooled ones (1, P)."""

    def __init__(self):
        super().__init__(
            separate_cfg=True,
            input_params_posi={"prompt": "prompt"},
            input_params_nega={"prompt": "negative_prompt"},
            output_params=("prompt_emb", "pooled_prompt_emb"),
            onload_model_names=ENCODERS,
        )

    def process(self, pipe, prompt, max_sequence_length):
        return self.process_batch(pipe, [{"prompt": prompt, "max_sequence_length": max_sequence_length}])[0]

    def process_batch(self, pipe: "SD3Pipeline", batch: Sequence[Mapping]) -> list[dict]:
        """Embed all prompts together: they are padded to one length, with or without others."""
        pipe.load_models_to_device(ENCODERS)
        prompts = [inputs["prompt"] for inputs in batch]
        clip, pooled = clip_embeddings(pipe, prompts)
        embeddings = torch.cat([clip, t5_embeddings(pipe, prompts, batch[0]["max_sequence_length"])], dim=1)
        pairs = zip(embeddings.split(1), pooled.split(1), strict=True)
        return [{"prompt_emb": own, "pooled_prompt_emb": whole} for own, whole in pairs]


def clip_embeddings(pipe: "SD3Pipeline", prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """CLIP's states (B, 77, D) before the last layer, and pooled embeddings (B, P), of B prompts.

    CLIP-L's are the first channels and bigG's the next; those of an absent one, and the rest, are 0.
    """
    options = {"dtype": pipe.torch_dtype, "device": pipe.device}
    states = torch.zeros(len(prompts), CLIP_TOKENS, pipe.text_width, **options)
    pooled = torch.zeros(len(prompts), pipe.pooled_width, **options)
    for name in ("text_encoder", "text_encoder_2"):
        if (encoder := getattr(pipe, name)) is None:
            continue
        found = encoder(input_ids=token_ids(pipe, name, prompts, CLIP_TOKENS), output_hidden_states=True)
        width = found.text_embeds.shape[-1]
        before = 0 if name == "text_encoder" else pipe.pooled_width - width
        states = states + F.pad(found.hidden_states[-2], (before, pipe.text_width - before - width))
        pooled = pooled + F.pad(found.text_embeds, (before, pipe.pooled_width - before - width))
    return states, pooled


def t5_embeddings(pipe: "SD3Pipeline", prompts: Sequence[str], length: int) -> Tensor:
    """T5's last states (B, length, D) of B prompts; padding is attended to, and without T5 they are 0."""
    if pipe.text_encoder_3 is None:
        return torch.zeros(len(prompts), length, pipe.text_width, dtype=pipe.torch_dtype, device=pipe.device)
    return pipe.text_encoder_3(token_ids(pipe, "text_encoder_3", prompts, length)).last_hidden_state


def token_ids(pipe: "SD3Pipeline", encoder: str, prompts: Sequence[str], length: int) -> Tensor:
    """Token ids (B, length) of B prompts, truncated or padded, for a text encoder."""
    return padded_ids(getattr(pipe, ENCODERS[encoder]), prompts, length).to(pipe.device)
