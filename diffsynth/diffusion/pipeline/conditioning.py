"""Text embeddings: what families' prompt embedders have in common."""

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .units import PipelineUnit, in_groups

if TYPE_CHECKING:
    from ..base_pipeline import BasePipeline

Tokens = Mapping[str, Tensor]


class PromptEmbedder(PipelineUnit):
    """Text embeddings (1, L, D) of a prompt, on each side of guidance.

    A subclass writes `tokenize`, whose parameters are the inputs that the unit reads, and `embed`. Prompts whose tokens
    have equal shapes go through the text encoder together.

    Args:
        masked: Also put out `prompt_emb_mask` (1, L), True for real tokens: all of them, as nothing is padded here.
            Without it a family's prompts all have one length.
    """

    def __init__(self, masked: bool = False):
        super().__init__(
            separate_cfg=True,
            input_params_posi={"prompt": "prompt"},
            input_params_nega={"prompt": "negative_prompt"},
            output_params=("prompt_emb", "prompt_emb_mask") if masked else ("prompt_emb",),
            onload_model_names=("text_encoder",),
        )

    def tokenize(self, pipe: "BasePipeline", prompt: str) -> Tokens:
        """What the text encoder reads of a prompt: `input_ids` (1, L), and tensors of the same length or none."""
        raise NotImplementedError(f"{type(self).__name__} does not say how prompts are tokenized.")

    def embed(self, pipe: "BasePipeline", tokens: Tokens) -> Tensor:
        """Text embeddings (B, L', D) of the tokens of B prompts, on the pipeline's device."""
        raise NotImplementedError(f"{type(self).__name__} does not say how tokens are embedded.")

    def process(self, pipe, **inputs):
        return self.process_batch(pipe, [inputs])[0]

    def process_batch(self, pipe, batch: Sequence[Mapping]) -> list[dict]:
        """Prompts of one length go through the text encoder together; padding would change what comes out."""
        pipe.load_models_to_device(["text_encoder"])

        def embed(alike: Sequence[Tokens]) -> Sequence[Tensor]:
            together = {name: torch.cat([tokens[name] for tokens in alike]).to(pipe.device) for name in alike[0]}
            return self.embed(pipe, together).split(1)

        read = [self.tokenize(pipe, **inputs) for inputs in batch]
        kinds = [(tokens["input_ids"].shape[1], *sorted(tokens)) for tokens in read]
        return [self._outputs(embeddings) for embeddings in in_groups(read, kinds, embed)]

    def _outputs(self, embeddings: Tensor) -> dict[str, Tensor]:
        mask = torch.ones(embeddings.shape[:2], dtype=torch.bool, device=embeddings.device)
        return {name: {"prompt_emb": embeddings, "prompt_emb_mask": mask}[name] for name in self.output_params}

    def _parameters(self) -> dict[str, inspect.Parameter]:
        return dict(inspect.signature(self.tokenize).parameters)
