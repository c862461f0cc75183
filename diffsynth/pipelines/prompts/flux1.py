"""FLUX.1's prompts: T5 embeds each token, CLIP the prompt as a whole."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from ...diffusion.prompts.embedder import PromptEmbedder, padded_ids

if TYPE_CHECKING:
    from ..flux1_image import Flux1ImagePipeline


class Flux1Unit_PromptEmbedder(PromptEmbedder):
    """Computes T5's embeddings (1, L, D) of prompts, padded to one length."""

    encoder = "text_encoder_2"

    def tokenize(self, pipe, prompt, max_sequence_length) -> Mapping[str, Tensor]:
        return {"input_ids": padded_ids(pipe.tokenizer_2, [prompt], max_sequence_length)}

    def embed(self, pipe: "Flux1ImagePipeline", tokens: Mapping[str, Tensor]) -> Tensor:
        return pipe.text_encoder_2(**tokens).last_hidden_state


class Flux1Unit_PooledPromptEmbedder(PromptEmbedder):
    """Computes CLIP's embeddings (1, D') of whole prompts, of which it reads the first 77 tokens."""

    output = "pooled_prompt_emb"

    def tokenize(self, pipe, prompt) -> Mapping[str, Tensor]:
        length = pipe.text_encoder.config.max_position_embeddings
        return {"input_ids": padded_ids(pipe.tokenizer, [prompt], length)}

    def embed(self, pipe: "Flux1ImagePipeline", tokens: Mapping[str, Tensor]) -> Tensor:
        return pipe.text_encoder(**tokens).pooler_output
