"""Every method of distillation on Qwen-Image and FLUX.2: the teacher's samples, gradients of each trained part."""

import pytest
import tiny
import tiny_flux2
import torch
from hydra.utils import instantiate
from PIL import Image

from diffsynth.core.data import Row, Sample
from diffsynth.core.loader import ModelConfig
from diffsynth.diffusion.adapters.lora import LoRA
from diffsynth.diffusion.loss import DirectDistill, TrainProgress
from diffsynth.diffusion.pipeline.units import run_units
from diffsynth.diffusion.training_defaults import TrainingDefaults
from diffsynth.diffusion.training_module import PipelineTrainingModule
from diffsynth.pipelines.flux2_image import Flux2ImagePipeline
from diffsynth.pipelines.qwen_image import QwenImagePipeline

CONF = tiny.ROOT / "conf" / "task"
METHODS = ["distill", *(f"distill/{path.stem}" for path in sorted((CONF / "distill").glob("*.yaml")))]
SHORT = [
    "task.teacher.num_inference_steps=4",
    "task.teacher.cfg_scale=2.0",
    "task.student.num_inference_steps=2",
]
FURTHER = {"distill/hyper_sd": ["task.segments=[4,2]", "task.grid_steps=8"]}
FAMILIES = {
    "qwen": (QwenImagePipeline, tiny.model, {}),
    "klein": (Flux2ImagePipeline, tiny_flux2.klein, {"max_sequence_length": tiny_flux2.MAX_TOKENS}),
    "dev": (Flux2ImagePipeline, tiny_flux2.dev, {"max_sequence_length": tiny_flux2.DEV_TOKENS}),
}
ADAPTED = LoRA(rank=2, target_modules=["to_q"])
KINDS = {"qwen-lora": ADAPTED, "klein-lora": ADAPTED, "klein-full": None, "dev-lora": ADAPTED}
DEFAULTS = TrainingDefaults(lora_target_modules={"dit": ["to_q"]})
ROW = {"prompt": "a red apple", "image": Image.new("RGB", (32, 32)), "seed": 5}


def trained(family: str, method: str, lora: LoRA | None) -> tuple[PipelineTrainingModule, list[Sample]]:
    """A module ready to train, and two samples that its teacher sampled."""
    kind, folder, options = FAMILIES[family]
    parts = {name: ModelConfig(path=str(folder() / part)) for name, part in tiny.COMPONENTS.items()}
    pipe = kind.from_components(**parts, torch_dtype="float32", training=DEFAULTS, **options)
    task = instantiate(tiny.compose("train", f"task={method}", *SHORT, *FURTHER.get(method, [])).task, _convert_="all")
    module, samples = PipelineTrainingModule(pipe, task, lora), []
    with torch.no_grad(), pipe.loaded(pipe.built_models):
        for number in range(2):
            row = {**ROW, "seed": number}
            sides = run_units(module.frozen_units, pipe, *module.get_pipeline_inputs(row))
            made = [{name: value for name, value in side.items() if name in module.kept_inputs} for side in sides]
            cached = Row(row, dict(zip(("shared", "posi", "nega"), made, strict=True)))
            samples.append(Sample(cached, epoch=0, index=number))
    return module.load(cached=True), samples


def test_a_network_that_is_told_the_guidance_is_told_the_same_in_training_as_in_sampling():
    kind, folder, options = FAMILIES["dev"]
    parts = {name: ModelConfig(path=str(folder() / part)) for name, part in tiny.COMPONENTS.items()}
    module = PipelineTrainingModule(kind.from_components(**parts, torch_dtype="float32", **options), DirectDistill())
    shared, _, _ = module.get_pipeline_inputs({**ROW, "seed": 1})
    assert shared["embedded_guidance"] == module.pipe.complete({})["embedded_guidance"] == 4
    assert "embedded_guidance" in module.kept_inputs


@pytest.mark.parametrize("kind", tiny.mostly_slow(KINDS, "klein-lora"))
@pytest.mark.parametrize("method", METHODS)
def test_a_step_of_each_part_reaches_that_part(method, kind):
    module, samples = trained(kind.split("-")[0], method, KINDS[kind])
    parts = module.trained_parts()
    seen = set()
    for step in range(6):
        if (names := tuple(module.trained_at(step))) in seen:
            continue
        seen.add(names)
        module.zero_grad()
        losses = module(samples, TrainProgress(step, 6))
        assert losses.shape == (2,) and losses.isfinite().all()
        losses.mean().backward()
        reached = {
            part for part, own in parts.items() if any(p.grad is not None and p.grad.any() for p in own.values())
        }
        assert reached == set(names)
    assert {name for names in seen for name in names} == set(parts)
