"""`PromptEmbedder`: the base class of the units that compute text embeddings.

Shapes: B prompts, L tokens, L' tokens after the family has cut its template off, … further dimensions, such as D width.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..pipeline.units import PipelineUnit, in_groups

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..base_pipeline import BasePipeline

Tokens = Mapping[str, Tensor | list[slice]]
ALL = [slice(None)]


def check_text_widths(pipe: "BasePipeline") -> None:
    """Refuse a text encoder whose embeddings have another width than the network takes; see `pipe.text_widths`.

    Raises:
        ValueError: The widths differ.
    """
    for name, widths in pipe.text_widths.items():
        encoder = getattr(pipe, name)
        if pipe.network is None or encoder is None:
            continue
        wanted, made = widths(pipe.network, encoder)
        if wanted != made:
            raise ValueError(
                f"dit takes text embeddings of width {wanted}, but {name} makes {made}: they are of different models; "
                "take the text encoder that was released with the transformer."
            )


class PromptEmbedder(PipelineUnit):
    """Computes text embeddings (1, L', …) of the prompt and, under guidance, of the negative prompt.

    A subclass writes `tokenize`, whose parameters are the inputs that the unit reads, and `embed`. Prompts of equal
    length go through the text encoder together. A family with several text encoders has a subclass for each, with
    `encoder` and `output` of its own.

    Args:
        masked: Also return `prompt_emb_mask` (1, L'), which is True everywhere, because padding comes only with
            batches. A family whose prompts all have one length needs none.
        counted: Also return `prompt_emb_lengths`, the number of tokens of each piece of the prompt as a list of ints:
            a network that takes lists gets them without reading a mask back from the device.
    """

    encoder = "text_encoder"  # the component that `embed` calls
    output = "prompt_emb"  # name of the embeddings

    def __init__(self, masked: bool = False, counted: bool = False):
        outputs = {self.output: True, f"{self.output}_mask": masked, f"{self.output}_lengths": counted}
        super().__init__(
            separate_cfg=True,
            input_params_posi={"prompt": "prompt"},
            input_params_nega={"prompt": "negative_prompt"},
            output_params=[name for name, is_made in outputs.items() if is_made],
            onload_model_names=(self.encoder,),
        )

    def tokenize(self, pipe: "BasePipeline", prompt: str) -> Tokens | list[Tokens]:
        """The text encoder's inputs for one prompt: `input_ids` (1, L), and perhaps a mask and image patches.

        A list has the pieces of a prompt, which are embedded each for itself and then put one after another. `kept`, if
        it is there, is a list of slices of the embeddings: those outside are dropped, and lengths count each slice.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say how prompts are tokenized.")

    def embed(self, pipe: "BasePipeline", tokens: Tokens) -> Tensor:
        """Text embeddings (B, L', …) of the tokens (B, L) of B prompts, on the pipeline's device."""
        raise NotImplementedError(f"{type(self).__name__} does not say how tokens are embedded.")

    def process(self, pipe, **inputs):
        return self.process_batch(pipe, [inputs])[0]

    def process_batch(self, pipe, batch: Sequence[Mapping]) -> list[dict]:
        """Embed prompts of equal length together; padding would change their embeddings."""
        pipe.load_models_to_device(self.onload_model_names)

        def embed(group: Sequence[Tokens]) -> Sequence[Tensor]:
            names = [name for name in group[0] if name != "kept"]
            stacked = {name: torch.cat([tokens[name] for tokens in group]).to(pipe.device) for name in names}
            return self.embed(pipe, stacked).split(1)

        tokenized = [self.tokenize(pipe, **inputs) for inputs in batch]
        prompts = [own if isinstance(own, list) else [own] for own in tokenized]
        pieces = [piece for prompt in prompts for piece in prompt]
        kinds = [(tokens["input_ids"].shape[1], *sorted(tokens)) for tokens in pieces]
        embedded = zip(pieces, in_groups(pieces, kinds, embed), strict=True)
        kept = iter([[states[:, part] for part in tokens.get("kept", ALL)] for tokens, states in embedded])
        return [self._outputs([part for _ in prompt for part in next(kept)]) for prompt in prompts]

    def _outputs(self, pieces: Sequence[Tensor]) -> dict[str, Any]:
        embeddings = torch.cat(pieces, dim=1)
        mask = torch.ones(embeddings.shape[:2], dtype=torch.bool, device=embeddings.device)
        lengths = [piece.shape[1] for piece in pieces]
        outputs = {self.output: embeddings, f"{self.output}_mask": mask, f"{self.output}_lengths": lengths}
        return {name: outputs[name] for name in self.output_params}

    def _parameters(self) -> dict[str, inspect.Parameter]:
        return dict(inspect.signature(self.tokenize).parameters)


def padded_ids(tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[str], length: int) -> Tensor:
    """Token ids (B, length) of prompts, each truncated or padded."""
    options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    return tokenizer(prompts, max_length=length, **options).input_ids
