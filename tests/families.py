"""A table of the model families in miniature, for statements that hold for all of them."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import tiny
import tiny_auraflow
import tiny_flux2
import tiny_qwen_edit
from auraflow import AuraFlowPipeline
from miniatures import (
    anima,
    ernie_image,
    flux1,
    flux3,
    krea2,
    qwen_image,
    qwen_image_21,
    sd3,
    wan,
    wan_image,
    wan_vace,
    z_image,
)
from PIL import Image
from torch import Tensor

from diffsynth.core.data import TrainingData, UnifiedDataset, VideoDataset
from diffsynth.core.loader import ModelConfig
from diffsynth.core.memory import MemoryRecipe
from diffsynth.diffusion.adapters.lora import LoRA
from diffsynth.diffusion.base_pipeline import BasePipeline
from diffsynth.diffusion.loss import FlowMatchSFT
from diffsynth.diffusion.training_defaults import TrainingDefaults
from diffsynth.diffusion.training_module import PipelineTrainingModule
from diffsynth.pipelines.anima import AnimaPipeline
from diffsynth.pipelines.chroma import ChromaPipeline
from diffsynth.pipelines.ernie_image import ErnieImagePipeline
from diffsynth.pipelines.flux1_image import Flux1ImagePipeline
from diffsynth.pipelines.flux2_image import Flux2ImagePipeline
from diffsynth.pipelines.flux3_image import Flux3ImagePipeline
from diffsynth.pipelines.krea2 import Krea2Pipeline
from diffsynth.pipelines.qwen_image import QwenImagePipeline
from diffsynth.pipelines.qwen_image_21 import QwenImage21Pipeline
from diffsynth.pipelines.sd3 import SD3Pipeline
from diffsynth.pipelines.wan import Wan22TI2VPipeline, WanPipeline
from diffsynth.pipelines.wan22 import Wan22ImageToVideoPipeline, Wan22Pipeline
from diffsynth.pipelines.wan_vace import WanVACEPipeline
from diffsynth.pipelines.z_image import ZImagePipeline


@dataclass(frozen=True, eq=False)
class Family:
    """A family in miniature.

    Args:
        name: Name of its file in conf/model or tests/conf/model.
        folder: Function that writes a model repository with random weights and returns its folder.
        layers: Ends of the names of the layers that a LoRA adapts.
        settings: Arguments of `from_components` beside the components.
        edits: Whether the rows of its trainings have an `edit_image`.
        controls: Whether they have a `controlnet_image`.
        videos: Further columns of videos.
        references: Column of a further image.
        parts: Folder in the repository of each component.
        reference: The latents (B, C, h, w) that diffusers' pipeline samples for some requests from noise (B, C, h, w);
            None where tests/pipelines has a file of the family.
    """

    name: str
    pipeline: type[BasePipeline]
    folder: Callable[[], Path]
    layers: tuple[str, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    edits: bool = False
    controls: bool = False
    videos: tuple[str, ...] = ()
    references: str | None = None
    parts: dict[str, str] = field(default_factory=lambda: tiny.COMPONENTS)
    reference: Callable[[list[dict], Tensor], Tensor] | None = None

    @property
    def num_frames(self) -> int:
        """Frames of its videos; 0 for a family of images."""
        return self.settings.get("num_frames", 0)

    @property
    def extra_inputs(self) -> list[str]:
        """Columns of the rows besides image and prompt that the pipeline reads."""
        images = ["edit_image"] * self.edits + ["controlnet_image"] * self.controls
        return [*images, *self.videos, *([self.references] if self.references else [])]

    def build(self, torch_dtype: str = "float32") -> BasePipeline:
        """The pipeline without its weights."""
        parts = {name: ModelConfig(path=str(self.folder() / part)) for name, part in self.parts.items()}
        training = TrainingDefaults(lora_target_modules={"dit": list(self.layers)})
        pipe = self.pipeline.from_components(**parts, torch_dtype=torch_dtype, training=training, **self.settings)
        pipe.progress_bar = iter
        if self.references == "input_image":  # a request without it is refused
            pipe.call_defaults["input_image"] = Image.new("RGB", (32, 48), "red")
        return pipe

    def load(self) -> BasePipeline:
        """The pipeline with its weights."""
        pipe = self.build()
        pipe.load_models()
        return pipe

    def module(self, task=None, lora: LoRA | None = None, torch_dtype: str = "float32", **memory):
        """A training module of the pipeline without its weights."""
        return PipelineTrainingModule(
            self.build(torch_dtype), task or self.task(), lora, seed=0, memory=MemoryRecipe(**memory)
        )

    def task(self, *trained: str) -> FlowMatchSFT:
        """The flow-matching objective on this family's rows; `trained` names the networks that are trained in full."""
        return FlowMatchSFT(trainable_models=list(trained) or None, extra_inputs=self.extra_inputs)

    @property
    def columns(self) -> list[str]:
        """Columns of its rows that name files."""
        return [self.pipeline.media.column, *self.extra_inputs]

    def data(self) -> TrainingData:
        """Rows of pictures or videos of 32 × 32 pixels."""
        if self.num_frames:
            frames = {"num_frames": self.num_frames, "data_file_keys": self.columns}
            return VideoDataset.from_folder(str(clips()), height=32, width=32, **frames)
        return UnifiedDataset.from_folder(
            str(pairs()), "metadata.jsonl", height=32, width=32, data_file_keys=self.columns
        )

    @property
    def data_overrides(self) -> list[str]:
        """Overrides that choose the same rows."""
        chosen = [f"dataset.path={pairs()}", "dataset.metadata=metadata.jsonl"]
        if self.num_frames:
            own = [
                f"dataset.path={clips()}",
                f"dataset.num_frames={self.num_frames}",
                "dataset.height=32",
                "dataset.width=32",
            ]
            chosen = ["dataset=video_folder", *own]
        return [*chosen, f"dataset.data_file_keys=[{','.join(self.columns)}]"]

    @property
    def overrides(self) -> list[str]:
        """Overrides that replace the configured model by the miniature, at 32 × 32 pixels."""
        parts = [f"model.{name}.path={self.folder() / part}" for name, part in self.parts.items()]
        settings = [f"model.{n}={'null' if value is None else value}" for n, value in self.settings.items()]
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


SIZES = {"height": 32, "width": 32}
QWEN_LAYERS = "to_q", "add_k_proj", "img_mod.1", "to_out.0"
Z_IMAGE_LAYERS = "to_q", "to_out.0", "w1", "w2"
SD3_LAYERS = "to_q", "to_out.0", "add_k_proj", "ff.net.2"
FLUX1_LAYERS = "to_q", "add_k_proj", "ff.net.2", "proj_mlp", "norm.linear"
SD3_SETTINGS = SIZES | {"max_sequence_length": sd3.T5_TOKENS}
FLUX1_SETTINGS = SIZES | {"max_sequence_length": flux1.MAX_TOKENS}
FAMILIES = [
    Family("emoji", QwenImagePipeline, tiny.model, ("to_q", "add_k_proj", "img_mlp.net.2", "txt_mod.1"), SIZES),
    Family(
        "emoji_flux2",
        Flux2ImagePipeline,
        tiny_flux2.klein,
        ("to_q", "add_k_proj", "to_qkv_mlp_proj", "to_out"),
        SIZES | {"max_sequence_length": tiny_flux2.MAX_TOKENS, "edit_image_pixels": 64 * 64},
        edits=True,
    ),
    Family(
        "auraflow",
        AuraFlowPipeline,
        tiny_auraflow.folder,
        ("to_q", "to_k"),
        SIZES | {"max_sequence_length": 16},
    ),
    Family(
        "qwen_image_edit",
        QwenImagePipeline,
        tiny_qwen_edit.folder,
        QWEN_LAYERS,
        SIZES | {"edit_image_pixels": 64 * 64, "edit_vision_pixels": 96 * 96},
        edits=True,
        parts=tiny_qwen_edit.PARTS,
    ),
    Family(
        "qwen_image_controlnet",
        QwenImagePipeline,
        qwen_image.controlled,
        QWEN_LAYERS,
        SIZES,
        controls=True,
        parts=qwen_image.PARTS,
        reference=qwen_image.sampled_by_diffusers,
    ),
    Family(
        "z_image",
        ZImagePipeline,
        z_image.base,
        Z_IMAGE_LAYERS,
        SIZES,
        reference=z_image.sampled_by_diffusers,
    ),
    Family(
        "z_image_controlnet",
        ZImagePipeline,
        z_image.controlled,
        Z_IMAGE_LAYERS,
        SIZES,
        controls=True,
        parts=z_image.PARTS | {"controlnet": "controlnet"},
        reference=z_image.sampled_by_diffusers,
    ),
    Family(
        "z_image_omni",
        ZImagePipeline,
        z_image.omni,
        Z_IMAGE_LAYERS,
        SIZES | {"edit_image_pixels": 64 * 64},
        edits=True,
        parts=z_image.OMNI_PARTS,
        reference=z_image.sampled_by_diffusers,
    ),
    Family(
        "krea2",
        Krea2Pipeline,
        krea2.folder,
        ("to_q", "to_gate", "ff.down", "projector"),
        SIZES,
        reference=krea2.sampled_by_diffusers,
    ),
    Family(
        "ernie_image",
        ErnieImagePipeline,
        ernie_image.folder,
        ("to_q", "to_out.0", "up_proj"),
        SIZES,
        reference=ernie_image.sampled_by_diffusers,
    ),
    Family(
        "sd3_5_medium",
        SD3Pipeline,
        sd3.medium,
        SD3_LAYERS,
        SD3_SETTINGS,
        parts=sd3.PARTS,
        reference=sd3.sampled_by_diffusers,
    ),
    Family(
        "sd3_5_controlnet",
        SD3Pipeline,
        sd3.controlled,
        SD3_LAYERS,
        SD3_SETTINGS,
        controls=True,
        parts=sd3.PARTS | {"controlnet": "controlnet"},
        reference=sd3.sampled_by_diffusers,
    ),
    Family(
        "flux3_klein_base",
        Flux3ImagePipeline,
        flux3.base,
        ("to_q", "to_out.0", "linear_in"),
        SIZES,
        edits=True,
        reference=flux3.sampled_by_diffusers,
    ),
    *(
        Family(
            name,
            QwenImage21Pipeline,
            qwen_image_21.folder,
            ("to_q", "to_out.0", "img_mlp.gate_layer", "img_mlp.out"),
            SIZES | {"edit_image_pixels": 64 * 64},
            edits=edits,
            parts=qwen_image_21.PARTS,
            reference=qwen_image_21.sampled_by_diffusers,
        )
        for name, edits in (("qwen_image_21", False), ("qwen_image_21_edit", True))
    ),
    Family(
        "flux1_dev",
        Flux1ImagePipeline,
        flux1.dev,
        FLUX1_LAYERS,
        FLUX1_SETTINGS,
        parts=flux1.PARTS,
        reference=flux1.sampled_by_diffusers,
    ),
    Family(
        "flux1_kontext",
        Flux1ImagePipeline,
        flux1.dev,
        FLUX1_LAYERS,
        FLUX1_SETTINGS | {"edit_image_pixels": 64 * 64},
        edits=True,
        parts=flux1.PARTS,
        reference=flux1.sampled_by_diffusers,
    ),
    Family(
        "flux1_controlnet",
        Flux1ImagePipeline,
        flux1.controlled,
        FLUX1_LAYERS,
        FLUX1_SETTINGS,
        controls=True,
        parts=flux1.PARTS | {"controlnet": "controlnet"},
        reference=flux1.sampled_by_diffusers,
    ),
    Family(
        "chroma",
        ChromaPipeline,
        flux1.chroma,
        ("to_q", "add_k_proj", "ff.net.2", "proj_mlp"),
        FLUX1_SETTINGS,
        parts=flux1.CHROMA_PARTS,
        reference=flux1.sampled_by_chroma,
    ),
    Family(
        "wan21_t2v_1_3b",
        WanPipeline,
        wan.text_to_video,
        ("to_q", "to_k", "to_out.0", "ffn.net.2"),
        SIZES | {"num_frames": 5, "max_sequence_length": wan.MAX_TOKENS},
        reference=wan.sampled_by_diffusers,
    ),
    Family(
        "wan22_t2v_a14b",
        Wan22Pipeline,
        wan.experts,
        ("to_q", "to_k", "to_out.0", "ffn.net.2"),
        SIZES | {"num_frames": 5, "max_sequence_length": wan.MAX_TOKENS, "cfg_scale_2": None},
        parts=tiny.COMPONENTS | {"dit2": "transformer_2"},
        reference=wan.sampled_by_experts,
    ),
    Family(
        "wan22_i2v_a14b",
        Wan22ImageToVideoPipeline,
        wan_image.two_experts,
        ("to_q", "to_k", "to_out.0", "ffn.net.2"),
        SIZES | {"num_frames": 5, "max_sequence_length": wan.MAX_TOKENS, "takes_input_image": True},
        parts=tiny.COMPONENTS | {"dit2": "transformer_2"},
        references="input_image",
        reference=wan_image.sampled_by_two_experts,
    ),
    Family(
        "wan22_ti2v_5b",
        Wan22TI2VPipeline,
        wan_image.text_and_image_to_video,
        ("to_q", "to_k", "to_out.0", "ffn.net.2"),
        SIZES | {"num_frames": 5, "max_sequence_length": wan.MAX_TOKENS, "takes_input_image": True},
        references="input_image",
        reference=wan_image.sampled_by_ti2v,
    ),
    Family(
        "wan21_vace_1_3b",
        WanVACEPipeline,
        wan_vace.folder,
        ("to_q", "to_k", "to_out.0", "ffn.net.2"),
        SIZES | {"num_frames": 5, "max_sequence_length": wan.MAX_TOKENS},
        videos=("vace_video", "vace_video_mask"),
        references="vace_reference_image",
        reference=wan_vace.sampled_by_diffusers,
    ),
    Family(
        "anima",
        AnimaPipeline,
        anima.folder,
        ("to_q", "to_out.0", "ff.net.2"),
        SIZES,
        parts=anima.PARTS,
        reference=anima.sampled_by_diffusers,
    ),
]


@cache
def pairs() -> Path:
    """The folder of a data set of images, each with two to edit and one that controls; written once per session."""
    folder = tiny.write_dataset(tiny.kept_folder() / "pairs")
    rows = [
        {
            "image": f"{n}.png",
            "prompt": "red" + " red" * n,
            "edit_image": [f"{7 - n}.png", "0.png"],
            "controlnet_image": f"{7 - n}.png",
        }
        for n in range(8)
    ]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@cache
def clips() -> Path:
    """The folder of a data set of animations of five frames, 32 × 32 pixels; written once per session."""
    pictures, folder = tiny.dataset(), tiny.kept_folder() / "clips"
    folder.mkdir()
    for number in range(8):
        first, *others = (Image.open(pictures / f"{(number + frame) % 8}.png") for frame in range(5))
        first.save(folder / f"{number}.png")
        first.save(folder / f"{number}.webp", save_all=True, append_images=others, duration=100, lossless=True)
    rows = [
        {
            "video": f"{n}.webp",
            "prompt": "red" + " red" * n,
            **dict.fromkeys(("vace_video", "vace_video_mask"), f"{7 - n}.webp"),
            **dict.fromkeys(("vace_reference_image", "input_image"), f"{n}.png"),
        }
        for n in range(8)
    ]
    return tiny.write_rows(folder, rows)


def of_families(statement: Callable) -> Callable:
    """Parametrize a test over all families.

    The default suite tests the first family and one other, that whose name's hash with the test's is the least; the
    other families are slow tests. So neither a new test nor a new family changes much else.
    """
    others = FAMILIES[1:]
    chosen = [FAMILIES[0], min(others, key=lambda family: crc32(f"{statement.__name__} {family}".encode()))]
    params = [pytest.param(f, id=str(f), marks=[] if f in chosen else pytest.mark.slow) for f in FAMILIES]
    return pytest.mark.parametrize("family", params)(statement)
