"""`PromptEmbedder`: the base class of the units that compute text embeddings.

Shapes: B prompts, L tokens, L' tokens after the family has cut its template off, D width.
"""

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
    """Computes text embeddings (1, L', D) of the prompt and, under guidance, of the negative prompt.

    A subclass writes `tokenize`, whose parameters are the inputs that the unit reads, and `embed`. Prompts of equal
    length go through the text encoder together.

    Args:
        masked: Also return `prompt_emb_mask` (1, L'), which is True everywhere, because padding comes only with
            batches. A family whose prompts all have one length needs none.
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
        """The text encoder's inputs for one prompt: `input_ids` (1, L), and perhaps a mask and image patches."""
        raise NotImplementedError(f"{type(self).__name__} does not say how prompts are tokenized.")

    def embed(self, pipe: "BasePipeline", tokens: Tokens) -> Tensor:
        """Text embeddings (B, L', D) of the tokens (B, L) of B prompts, on the pipeline's device."""
        raise NotImplementedError(f"{type(self).__name__} does not say how tokens are embedded.")

    def process(self, pipe, **inputs):
        return self.process_batch(pipe, [inputs])[0]

    def process_batch(self, pipe, batch: Sequence[Mapping]) -> list[dict]:
        """Embed prompts of equal length together; padding would change their embeddings."""
        pipe.load_models_to_device(["text_encoder"])

        def embed(group: Sequence[Tokens]) -> Sequence[Tensor]:
            stacked = {name: torch.cat([tokens[name] for tokens in group]).to(pipe.device) for name in group[0]}
            return self.embed(pipe, stacked).split(1)

        tokenized = [self.tokenize(pipe, **inputs) for inputs in batch]
        kinds = [(tokens["input_ids"].shape[1], *sorted(tokens)) for tokens in tokenized]
        return [self._outputs(embeddings) for embeddings in in_groups(tokenized, kinds, embed)]

    def _outputs(self, embeddings: Tensor) -> dict[str, Tensor]:
        mask = torch.ones(embeddings.shape[:2], dtype=torch.bool, device=embeddings.device)
        outputs = {"prompt_emb": embeddings, "prompt_emb_mask": mask}
        return {name: outputs[name] for name in self.output_params}

    def _parameters(self) -> dict[str, inspect.Parameter]:
        return dict(inspect.signature(self.tokenize).parameters)
