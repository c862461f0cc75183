"""`SeveralPrompts`: the unit that embeds several prompts of one row, for objectives that compare predictions."""

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ...core.code_version import code_version
from ..pipeline.units import PipelineUnit
from .embedder import PromptEmbedder

if TYPE_CHECKING:
    from ..base_pipeline import BasePipeline


class SeveralPrompts(PipelineUnit):
    """Computes what a `PromptEmbedder` computes, for several prompts that are made of a row's prompt.

    Args:
        embedder: The family's unit.
        prompts: The prompts by the prefix of their outputs' names, such as `positive_` for `positive_prompt_emb`. In
            each, the row's prompt replaces `{prompt}`.
    """

    def __init__(self, embedder: PromptEmbedder, prompts: Mapping[str, str]):
        self.embedder, self.prompts = embedder, dict(prompts)
        super().__init__(
            input_params_posi={"prompt": "prompt"},
            output_params=[prefix + name for prefix in prompts for name in embedder.output_params],
            onload_model_names=embedder.onload_model_names,
        )

    def depends_on(self, pipe: "BasePipeline") -> dict[str, str]:
        kind = type(self.embedder)
        code, attributes = code_version([kind.process_batch], [kind, type(pipe)])
        folders = {name: str(pipe.fingerprint(name)) for name in sorted(attributes & pipe.folders.keys())}
        return {"embedder": code, **folders}

    def process(self, pipe, **inputs):
        return self.process_batch(pipe, [inputs])[0]

    def process_batch(self, pipe, batch: Sequence[Mapping]) -> list[dict]:
        outputs: list[dict] = [{} for _ in batch]
        for prefix, text in self.prompts.items():
            asked = [{**inputs, "prompt": text.replace("{prompt}", inputs["prompt"])} for inputs in batch]
            for own, made in zip(outputs, self.embedder.process_batch(pipe, asked), strict=True):
                own |= {prefix + name: value for name, value in made.items()}
        return outputs

    def _parameters(self) -> dict[str, inspect.Parameter]:
        return self.embedder.parameters
