"""`SeveralPrompts`: the unit that embeds several prompts of one row, for objectives that compare predictions."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from ..pipeline.units import PipelineUnit, WrappedEmbedder

if TYPE_CHECKING:
    from ..base_pipeline import BasePipeline

PROMPT = "prompt"  # of the conditional prediction


def prompt_units(units: Iterable[PipelineUnit]) -> list[PipelineUnit]:
    """The units that read the prompt of the conditional prediction, whatever their class."""
    return [unit for unit in units if PROMPT in unit.input_params_posi.values()]


def check_prompt_units(pipe: "BasePipeline", task: str) -> None:
    """Refuse a pipeline whose prompts an objective cannot exchange.

    Args:
        task: The objective as it is typed, for errors.

    Raises:
        ValueError: No unit declares that it reads the prompt, or another unit reads what such a unit returns.
    """
    found = prompt_units(pipe.units)
    if not found:
        raise ValueError(
            f"{task} compares predictions for several prompts, but no unit of {type(pipe).__name__} names {PROMPT!r} "
            "in input_params_posi; add it to the unit that embeds prompts (docs/pipelines.md), or choose another task."
        )
    embeddings = {name for unit in found for name in unit.output_params}
    others = [unit for unit in pipe.units if unit not in found and unit.column is None]
    for unit in others:
        if read := sorted(embeddings.intersection(unit.fetch_input_params())):
            raise ValueError(
                f"{task} embeds several prompts, but {type(unit).__name__} reads {read[0]}, which would be that of one "
                "of them; choose another task."
            )


class SeveralPrompts(WrappedEmbedder):
    """Computes what a unit that embeds a prompt computes, for several prompts that are made of a row's prompt.

    Args:
        embedder: The family's unit, one of `prompt_units`.
        prompts: The prompts by the prefix of their outputs' names, such as `positive_` for `positive_prompt_emb`. In
            each, the row's prompt replaces `{prompt}`.
    """

    def __init__(self, embedder: PipelineUnit, prompts: Mapping[str, str]):
        self.prompts = dict(prompts)
        super().__init__(
            embedder,
            input_params_posi=embedder.input_params_posi,
            output_params=[prefix + name for prefix in prompts for name in embedder.output_params],
        )

    def process_batch(self, pipe, batch: Sequence[Mapping]) -> list[dict]:
        outputs: list[dict] = [{} for _ in batch]
        (name,) = (name for name, key in self.input_params_posi.items() if key == PROMPT)
        for prefix, text in self.prompts.items():
            asked = [{**inputs, name: text.replace("{prompt}", inputs[name])} for inputs in batch]
            for own, made in zip(outputs, self.embedder.process_batch(pipe, asked), strict=True):
                own |= {prefix + output: value for output, value in made.items()}
        return outputs
