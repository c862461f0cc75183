"""Concept sliders: an adapter whose scale moves what is sampled between two prompts.

Gandikota et al. 2023, "Concept Sliders" (https://arxiv.org/abs/2311.12092).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ...core.host_memory import sent
from ...core.ranges import PositiveFloat, SamplingSteps, check_fields
from ..adapters.lora import Adapter
from ..base_pipeline import BasePipeline
from ..distillation.roles import STUDENT, TEACHER, Roles, check_base_is_kept
from ..flow_match import interpolate, per_sample
from ..pipeline.media import LayersMedia
from ..pipeline.units import PipelineUnit
from ..prompts.several import SeveralPrompts, check_prompt_units, prompt_units
from ..randomness import GlobalRNG, SampleRNG
from ..timesteps import LogitNormalTimesteps, UniformTimesteps
from .base import Objective, sampled_with
from .consistency import grid

POSITIVE, NEGATIVE = "positive_", "negative_"  # prefixes of the inputs of the prompts between which it moves


@dataclass(frozen=True, kw_only=True)
class ConceptSlider(Objective):
    """mean ‖v_θ(x_t, c) - sg(v(x_t, c) + η (v(x_t, c₊) - v(x_t, c₋)))‖²; the paper's Eq. 7 and 8 for velocities.

    v is the frozen base, which is the network without its adapter, and c, c₊ and c₋ are the target, the positive and
    the negative prompt. x_t is what the base samples of c in t's steps from noise, or a noised image of the data set.
    The adapter at scale s adds about s η (v₊ - v₋) to the velocity: below 0 it moves towards the negative prompt.

    Args:
        positive, negative: The prompts c₊ and c₋; the row's prompt replaces `{prompt}` in them.
        target: The prompt c.
        strength: η.
        num_inference_steps: Steps of the base from noise to an image, of which it takes a random number; None noises
            the images of the data set instead.
        timesteps: Distribution of the noise levels to which images are noised.
    """

    positive: str
    negative: str
    target: str = "{prompt}"
    strength: PositiveFloat = 1.0
    num_inference_steps: SamplingSteps | None = 8
    timesteps: UniformTimesteps | LogitNormalTimesteps = field(default_factory=UniformTimesteps)

    def __post_init__(self):
        check_fields(self, "task.")
        if self.positive == self.negative:
            raise ValueError(
                f"task.positive and task.negative are both {self.positive!r}; expected two prompts, between which the "
                "slider moves."
            )

    @property
    def reads_images(self) -> bool:
        return self.num_inference_steps is None

    def rehearsed(self) -> "ConceptSlider":
        """One step of the base, after which the loss is computed: memory does not depend on their number."""
        return self if self.reads_images else replace(self, num_inference_steps=2)

    def wanted_inputs(self, pipe: BasePipeline) -> set[str]:
        further = {prefix + name for prefix in (POSITIVE, NEGATIVE) for name in _embeddings(pipe)}
        images = {"input_latents"} if self.reads_images else set()
        return super().wanted_inputs(pipe) | further | images | {*pipe.latents.size_names}

    def all_units(self, pipe: BasePipeline) -> list[PipelineUnit]:
        """The pipeline's units; those that embed the row's prompt embed all three prompts."""
        prompts = {"": self.target, POSITIVE: self.positive, NEGATIVE: self.negative}
        embedders = prompt_units(pipe.units)
        return [SeveralPrompts(unit, prompts) if unit in embedders else unit for unit in pipe.units]

    def sampling_inputs(self, pipe: BasePipeline) -> dict[str, Any]:
        return sampled_with(pipe)

    def check(self, pipe: BasePipeline, lora: Adapter | None, cached: bool) -> None:
        check_prompt_units(pipe, "task=slider")
        check_base_is_kept("task=slider", pipe, lora, self.trainable_models, "or choose another task")
        if isinstance(pipe.media, LayersMedia) and not self.reads_images:
            raise ValueError(
                f"task=slider with num_inference_steps={self.num_inference_steps} samples one image, but "
                f"{type(pipe).__name__} samples layers; "
                "set task.num_inference_steps=null, which learns on those of the data set."
            )

    def build_roles(self, pipe: BasePipeline, lora: Adapter | None, seed: int) -> Roles:
        return Roles(pipe, lora, seed=seed)

    def __call__(self, pipe: BasePipeline, rng: SampleRNG | GlobalRNG | None = None, **inputs) -> Tensor:
        """Loss per sample (B,).

        Args:
            inputs: Among them `roles`, `height` and `width` in pixels (of videos `num_frames`, too), clean
                `input_latents` (B, …) if it learns from images, and the network's inputs for each prompt:
                `prompt_emb`, `positive_prompt_emb`, ….
        """
        return self.loss(pipe, rng=rng or GlobalRNG(_batch_size(inputs)), **inputs)

    def loss(self, pipe: BasePipeline, rng: SampleRNG | GlobalRNG, roles: Roles | None = None, **inputs) -> Tensor:
        with torch.no_grad():
            latents, sigma = (self._noised if self.reads_images else self._sampled)(pipe, rng, roles, inputs)
            sides = (inputs, of_prompt(POSITIVE, inputs), of_prompt(NEGATIVE, inputs))
            base, positive, negative = (roles.velocity(TEACHER, latents, sigma, side) for side in sides)
            target = base + self.strength * (positive - negative)
        velocity = roles.velocity(STUDENT, latents, sigma, inputs, trained=True)
        return (velocity - target).pow(2).flatten(1).mean(1)

    def _noised(
        self, pipe: BasePipeline, rng: SampleRNG | GlobalRNG, roles: Roles, inputs: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """The images' latents (B, …), noised, and their noise levels (B,)."""
        clean = inputs["input_latents"].float()
        sigma = sent(self.timesteps(pipe.scheduler, rng.uniform("timestep")), clean.device)
        return interpolate(clean, rng.normal("noise", clean), sigma), sigma

    def _sampled(
        self, pipe: BasePipeline, rng: SampleRNG | GlobalRNG, roles: Roles, inputs: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Latents (B, …) after a random number of the base's steps, and their noise levels (B,)."""
        size = pipe.latents.size_of(inputs)
        levels = torch.tensor([*grid(pipe, size, self.num_inference_steps), 0.0])
        taken = rng.integers("timestep", self.num_inference_steps)
        shape = (len(taken), *pipe.latents.shape(**size)[1:])
        latents = rng.normal("noise", torch.empty(shape, device=pipe.device))
        sigmas, counts = (sent(each, pipe.device) for each in (levels, torch.tensor(taken)))
        for step in range(max(taken)):
            velocity = roles.velocity(TEACHER, latents, sigmas[step].expand(len(latents)), inputs)
            moved = latents + (sigmas[step + 1] - sigmas[step]) * velocity
            latents = torch.where(per_sample(step < counts, latents), moved, latents)
        return latents, sigmas[counts]


def of_prompt(prefix: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs of a prediction for the prompt whose inputs have this prefix."""
    own = {name.removeprefix(prefix): value for name, value in inputs.items() if name.startswith(prefix)}
    return {**inputs, **own}


def _embeddings(pipe: BasePipeline) -> set[str]:
    """Names of the inputs that a prompt is embedded to."""
    return {name for unit in prompt_units(pipe.units) for name in unit.output_params}


def _batch_size(inputs: Mapping[str, Any]) -> int:
    return next(len(value) for name, value in inputs.items() if name.startswith(POSITIVE))
