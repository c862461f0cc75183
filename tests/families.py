"""The model families, as a table: what a statement about all of them needs to know of each."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_auraflow
import tiny_flux2
import tiny_qwen_edit
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
        edits: Whether it is trained on pairs of images: rows have an `edit_image`.
        parts: Folders of the components, by their names.
    """

    name: str
    pipeline: type[BasePipeline]
    folder: Callable[[], Path]
    layers: tuple[str, ...]
    settings: tuple[tuple[str, Any], ...] = ()
    edits: bool = False
    parts: tuple[tuple[str, str], ...] = tuple(tiny.COMPONENTS.items())

    @property
    def extra_inputs(self) -> list[str]:
        """Columns of its rows beside image and prompt."""
        return ["edit_image"] if self.edits else []

    def build(self, torch_dtype: str = "float32") -> BasePipeline:
        """The pipeline, built and not loaded."""
        parts = {name: ModelConfig(path=str(self.folder() / part)) for name, part in self.parts}
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
            self.build(torch_dtype), task or self.task(), lora, seed=0, memory=MemoryRecipe(**memory)
        )

    def task(self, *trained: str) -> FlowMatchSFT:
        """The objective on its rows, in which whole networks are trained."""
        return FlowMatchSFT(trainable_models=list(trained) or None, extra_inputs=self.extra_inputs)

    @property
    def overrides(self) -> list[str]:
        """What puts the miniature in the place of the configured model, in a run of 32 × 32 pixels."""
        parts = [f"model.{name}.path={self.folder() / part}" for name, part in self.parts]
        settings = [f"model.{name}={value}" for name, value in self.settings]
        dtype = "model.torch_dtype=float32"
        return [
            f"model={self.name}",
            dtype,
            *parts,
            *settings,
            f"hydra.searchpath=[file://{Path(__file__).parent}/conf]",
        ]

    def __str__(self) -> str:
        return self.name


SIZES = (("height", 32), ("width", 32))
FAMILIES = [
    Family("emoji", QwenImagePipeline, tiny.model, ("to_q", "add_k_proj", "img_mlp.net.2", "txt_mod.1"), SIZES),
    Family(
        "emoji_flux2",
        Flux2ImagePipeline,
        tiny_flux2.klein,
        ("to_q", "add_k_proj", "to_qkv_mlp_proj", "to_out"),
        (*SIZES, ("max_sequence_length", tiny_flux2.MAX_TOKENS), ("edit_image_pixels", 64 * 64)),
        edits=True,
    ),
    Family(
        "auraflow",
        AuraFlowPipeline,
        tiny_auraflow.folder,
        ("to_q", "to_k"),
        (*SIZES, ("max_sequence_length", 16)),
    ),
    Family(
        "qwen_image_edit",
        QwenImagePipeline,
        tiny_qwen_edit.folder,
        ("to_q", "add_k_proj", "img_mod.1", "to_out.0"),
        (*SIZES, ("edit_image_pixels", 64 * 64), ("edit_vision_pixels", 96 * 96)),
        edits=True,
        parts=tuple(tiny_qwen_edit.PARTS.items()),
    ),
]


@cache
def pairs() -> Path:
    """The tiny data set, each of its pictures with two others that it was edited from; made once a session."""
    folder = tiny.write_dataset(tiny.kept_folder() / "pairs")
    rows = [
        {"image": f"{n}.png", "prompt": "red" + " red" * n, "edit_image": [f"{7 - n}.png", "0.png"]} for n in range(8)
    ]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


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
