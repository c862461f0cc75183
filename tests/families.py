"""The model families, as a table: what a statement about all of them needs to know of each."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_auraflow
import tiny_flux2
from auraflow import AuraFlowPipeline

from diffsynth.core.loader import ModelConfig
from diffsynth.core.memory import MemoryRecipe
from diffsynth.diffusion.adapters.lora import LoRA
from diffsynth.diffusion.base_pipeline import BasePipeline
from diffsynth.diffusion.loss import FlowMatchSFT
from diffsynth.diffusion.pipeline.networks import TrainingDefaults
from diffsynth.diffusion.training_module import PipelineTrainingModule
from diffsynth.pipelines.flux2_image import Flux2ImagePipeline
from diffsynth.pipelines.qwen_image import QwenImagePipeline


@dataclass(frozen=True)
class Family:
    """A family in miniature.

    Args:
        name: Of its option in conf/model or tests/conf/model.
        folder: Makes its repository of random weights.
        layers: Ends of the names of layers that a LoRA adapts.
        settings: Arguments of `from_components` beside the components.
    """

    name: str
    pipeline: type[BasePipeline]
    folder: Callable[[], Path]
    layers: tuple[str, ...]
    settings: tuple[tuple[str, Any], ...] = ()

    def build(self, torch_dtype: str = "float32") -> BasePipeline:
        """The pipeline, built and not loaded."""
        parts = {name: ModelConfig(path=str(self.folder() / part)) for name, part in tiny.COMPONENTS.items()}
        training = TrainingDefaults(lora_target_modules={"dit": list(self.layers)})
        pipe = self.pipeline.from_components(**parts, torch_dtype=torch_dtype, training=training, **dict(self.settings))
        pipe.progress_bar = iter
        return pipe

    def load(self) -> BasePipeline:
        """The pipeline with its weights."""
        pipe = self.build()
        pipe.load_models()
        return pipe

    def module(self, task=None, lora: LoRA | None = None, torch_dtype: str = "float32", **memory):
        """A training module around the pipeline, built and not loaded."""
        return PipelineTrainingModule(
            self.build(torch_dtype), task or FlowMatchSFT(), lora, seed=0, memory=MemoryRecipe(**memory)
        )

    @property
    def overrides(self) -> list[str]:
        """What puts the miniature in the place of the configured model, in a run of 32 × 32 pixels."""
        parts = [f"model.{name}.path={self.folder() / part}" for name, part in tiny.COMPONENTS.items()]
        settings = [f"model.{name}={value}" for name, value in self.settings]
        return [f"model={self.name}", *parts, *settings, f"hydra.searchpath=[file://{Path(__file__).parent}/conf]"]

    def __str__(self) -> str:
        return self.name


FAMILIES = [
    Family("emoji", QwenImagePipeline, tiny.model, ("to_q", "to_k", "to_out.0"), (("height", 32), ("width", 32))),
    Family(
        "emoji_flux2",
        Flux2ImagePipeline,
        tiny_flux2.klein,
        ("to_q", "to_qkv_mlp_proj"),
        (("height", 32), ("width", 32), ("max_sequence_length", tiny_flux2.MAX_TOKENS)),
    ),
    Family(
        "auraflow",
        AuraFlowPipeline,
        tiny_auraflow.folder,
        ("to_q", "to_k"),
        (("height", 32), ("width", 32), ("max_sequence_length", 16)),
    ),
]


@cache
def _statements() -> list[str]:
    return []


def of_families(statement: Callable) -> Callable:
    """Make a statement about `family` one about each: by default about the first and one other, in turn; else slow."""
    others = FAMILIES[1:]
    mine = others[len(_statements()) % len(others)]
    _statements().append(statement.__name__)
    chosen = [FAMILIES[0], mine]
    params = [pytest.param(f, id=str(f), marks=[] if f in chosen else pytest.mark.slow) for f in FAMILIES]
    return pytest.mark.parametrize("family", params)(statement)
