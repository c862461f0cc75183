"""Gradients of a reward: the model samples, and the reward of the decoded picture is raised by its own gradient.

Xu et al. 2023, "ImageReward", ReFL (https://arxiv.org/abs/2304.05977); Clark et al. 2023, "Directly Fine-Tuning
Diffusion Models on Differentiable Rewards", DRaFT-K (https://arxiv.org/abs/2309.17400).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ....core.gradient import gradient_checkpoint_forward
from ....core.host_memory import sent
from ....core.ranges import PositiveInt, SamplingSteps, check_fields
from ...adapters.lora import Adapter
from ...base_pipeline import BasePipeline
from ...flow_match import TRAINING_STEPS, per_sample
from ...noted import note
from ...pipeline.media import ImageMedia
from ...randomness import GlobalRNG, SampleRNG
from ...rewards import Brightness, Reward
from ..base import Objective, sampled_with
from ..consistency import grid
from .base import check_network_alone


@dataclass(frozen=True, kw_only=True)
class ReFL(Objective):
    """-Σ w R(decode(x̂₀)) over rewards R: x̂₀ is sampled from noise without guidance, its last steps with gradients.

    DRaFT-K has gradients in the last K steps of all; ReFL stops at a random step, and its only gradient is that of
    the estimate x̂₀ = x_σ - σ v from there. The data set gives the prompts; its images are not read.

    Args:
        reward: The rewards by name, each with its weight w.
        num_inference_steps: Number N of Euler steps.
        last_steps: K, the steps with gradients. Memory grows with each.
        random_ends: The sample jumps to σ = 0 at a random one of this many last steps; 1 takes all N steps. ReFL has
            N = 40, K = 1 and 10 of these.

    Raises:
        ValueError: There is no reward, one is not differentiable, or there are fewer steps than these.
    """

    reward: Mapping[str, Reward] = field(default_factory=dict)
    num_inference_steps: SamplingSteps = 10
    last_steps: PositiveInt = 1
    random_ends: PositiveInt = 1

    def __post_init__(self):
        check_fields(self, "task.")
        if not self.reward:
            raise ValueError('There is no reward: choose one or several, such as "reward@task.reward=clip_score".')
        for name, reward in self.reward.items():
            check_differentiable(name, reward)
        if self.last_steps + self.random_ends - 1 > self.num_inference_steps:
            raise ValueError(
                f"task.last_steps={self.last_steps} and task.random_ends={self.random_ends} reach beyond "
                f"task.num_inference_steps={self.num_inference_steps}; set it to at least "
                f"{self.last_steps + self.random_ends - 1}, or lower them."
            )

    @property
    def reads_images(self) -> bool:
        return False

    @property
    def sampling_settings(self) -> Mapping[str, Any]:
        """The guidance that the weights were rewarded with, which sampling should use as well."""
        return {"cfg_scale": 1}

    def rehearsed(self) -> "ReFL":
        """One step without gradients, which take no memory each, and a reward without a network."""
        return replace(self, num_inference_steps=self.last_steps + 1, random_ends=1, reward={"stand_in": Brightness()})

    def sampling_inputs(self, pipe: BasePipeline) -> dict[str, Any]:
        return sampled_with(pipe)

    def called_models(self, pipe: BasePipeline) -> set[str]:
        return set(pipe.decoding_models)

    def check(self, pipe: BasePipeline, lora: Adapter | None, cached: bool) -> None:
        check_network_alone(pipe, lora, self.trainable_models)
        if type(pipe.media) is not ImageMedia:
            raise ValueError(
                f"task=reward/refl scores images, but {type(pipe).__name__} samples {type(pipe.media).__name__}; "
                "choose another model."
            )
        for reward in self.reward.values():
            reward.find()

    def __call__(self, pipe: BasePipeline, rng: SampleRNG | GlobalRNG | None = None, **inputs) -> Tensor:
        """Loss per sample (B,).

        Args:
            inputs: Among them the prompts `prompt` (B), one if all are equal, and `height` and `width` in pixels.
        """
        count = 1 if isinstance(inputs["prompt"], str) else len(inputs["prompt"])
        return self.loss(pipe, rng=rng or GlobalRNG(count), **inputs)

    def loss(
        self,
        pipe: BasePipeline,
        prompt: str | Sequence[str],
        height: int,
        width: int,
        rng: SampleRNG | GlobalRNG,
        **inputs,
    ) -> Tensor:
        latents = self.sample(pipe, height, width, rng, inputs)
        pixels = decoded(pipe, latents, inputs)
        prompts = [prompt] * len(pixels) if isinstance(prompt, str) else prompt
        losses = torch.zeros(len(pixels), device=pixels.device)
        for name, reward in self.reward.items():
            scores = reward.score_pixels(pixels, prompts, [{}] * len(pixels))
            note(f"reward_{name}", scores)
            losses = losses - reward.weight * scores
        return losses

    def sample(
        self, pipe: BasePipeline, height: int, width: int, rng: SampleRNG | GlobalRNG, inputs: Mapping[str, Any]
    ) -> Tensor:
        """Clean latents (B, …), whose last steps have gradients."""
        size = pipe.latents.size_of({"height": height, "width": width})
        levels = torch.tensor([*grid(pipe, size, self.num_inference_steps), 0.0])
        ends = [self.num_inference_steps - skipped for skipped in rng.integers("end", self.random_ends)]
        shape = (len(ends), *pipe.latents.shape(**size)[1:])
        noise = rng.normal("noise", torch.empty(shape, device=pipe.device))

        def velocity(latents: Tensor, sigma: Tensor) -> Tensor:
            return pipe.predict(sigma * TRAINING_STEPS, latents=latents, **inputs).float()

        return sample_last_steps(velocity, noise, sent(levels, pipe.device), ends, self.last_steps)


def sample_last_steps(
    velocity: Callable[[Tensor, Tensor], Tensor], noise: Tensor, levels: Tensor, ends: Sequence[int], last_steps: int
) -> Tensor:
    """Euler's clean latents (B, …) from noise (B, …), with gradients through the last steps only.

    Args:
        velocity: `velocity(latents, sigma)` (B, …) at noise levels (B,).
        levels: Noise levels (N + 1,), the last one 0.
        ends: Number of steps (B) of each sample, of which the last one jumps to 0; at least `last_steps`.
        last_steps: Number of the last steps, which have gradients.
    """

    def step(latents: Tensor, sigma: Tensor, following: Tensor) -> Tensor:
        return latents + per_sample(following - sigma, latents) * velocity(latents, sigma)

    first = sent(torch.tensor(ends) - last_steps, noise.device)
    latents = noise
    with torch.no_grad():
        for index in range(max(ends) - last_steps):
            moved = step(latents, levels[index].expand(len(ends)), levels[index + 1].expand(len(ends)))
            latents = torch.where(per_sample(index < first, latents), moved, latents)
    for index in range(last_steps):
        following = levels[first + index + 1] if index + 1 < last_steps else torch.zeros_like(levels[first])
        latents = step(latents, levels[first + index], following)
    return latents


def decoded(pipe: BasePipeline, latents: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    """Pictures (B, 3, H, W) in [0, 1] of latents (B, C, h, w), decoded one by one; alpha is on white.

    Under gradient checkpointing the backward pass decodes each picture again, so that the activations of one exist at
    a time. Values beyond [0, 1] are clamped as in a file, but keep their gradients.

    Args:
        inputs: Among them `use_gradient_checkpointing` and `use_gradient_checkpointing_offload`, if they are set.
    """
    kinds = [bool(inputs.get(name)) for name in ("use_gradient_checkpointing", "use_gradient_checkpointing_offload")]
    decode = [pipe.pixels_of, *kinds]
    pictures = [gradient_checkpoint_forward(*decode, each, pipe.call_defaults) for each in latents.split(1)]
    pixels = (torch.cat(pictures).float() + 1) / 2
    pixels = pixels + (pixels.clamp(0, 1) - pixels).detach()
    alpha = pixels[:, 3:]
    return pixels[:, :3] * alpha + 1 - alpha if alpha.shape[1] else pixels


def check_differentiable(name: str, reward: Reward) -> None:
    """Refuse a reward without gradients.

    Raises:
        ValueError: It has none; names it, and the training that needs none.
    """
    if not isinstance(reward, Reward):
        raise ValueError(f"task.reward.{name} is {reward!r}; expected an option of the group reward.")
    if not reward.differentiable:
        raise ValueError(
            f"task.reward.{name} ({type(reward).__name__}) has no gradients, which task=reward/refl needs; choose "
            "another reward, such as clip_score, or train for it by reward.py task=reward/nft."
        )
