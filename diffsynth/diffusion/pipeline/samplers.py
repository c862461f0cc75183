"""Samplers: generators that yield the latents at every noise level of a scheduler, and at 0.

They integrate dx/dσ = v(x, σ), where x_σ = (1 - σ) x₀ + σ ε. Latents and velocities are (B, C, h, w).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from ...core.data import generator
from ..flow_match import TRAINING_STEPS, FlowMatchScheduler

Velocity = Callable[[Tensor, int], Tensor]  # velocity(latents, step) at the noise level of a step of the scheduler
Noise = Callable[[int, Tensor], Tensor]  # noise(step, latents): fresh noise for a step, shaped like the latents
Sampler = Callable[[Velocity, Tensor, FlowMatchScheduler, Noise], Iterator[Tensor]]


def euler(velocity: Velocity, latents: Tensor, scheduler: FlowMatchScheduler, noise: Noise) -> Iterator[Tensor]:
    """Euler's method on latents (B, C, h, w): x ← x + (σ' - σ) v(x, σ)."""
    yield latents
    for index in range(len(scheduler.timesteps)):
        latents = scheduler.step(velocity(latents, index), index, latents)
        yield latents


def renoise(velocity: Velocity, latents: Tensor, scheduler: FlowMatchScheduler, noise: Noise) -> Iterator[Tensor]:
    """Multistep consistency sampling: x ← (1 - σ') x̂₀ + σ' ε with fresh noise ε and x̂₀ = x - σ v(x, σ).

    Some few-step students are trained for it. Latents are (B, C, h, w).
    Song et al. 2023, "Consistency Models", Algorithm 1 (https://arxiv.org/abs/2303.01469).
    """
    yield latents
    for index in range(len(scheduler.timesteps)):
        latents = scheduler.renoise_step(velocity(latents, index), index, latents, noise(index, latents))
        yield latents


def heun(velocity: Velocity, latents: Tensor, scheduler: FlowMatchScheduler, noise: Noise) -> Iterator[Tensor]:
    """Heun's method: x ← x + (σ' - σ) (v(x, σ) + v(x', σ')) / 2, where x' is the result of an Euler step.

    It calls the network twice per step, once in the last step. Latents are (B, C, h, w).
    Karras et al. 2022, Algorithm 1 (https://arxiv.org/abs/2206.00364).
    """
    yield latents
    for index in range(len(scheduler.timesteps)):
        first = velocity(latents, index)
        moved = scheduler.step(first, index, latents)
        if index + 1 < len(scheduler.timesteps):
            second = velocity(moved, index + 1)
            moved = scheduler.step((first + second) / 2, index, latents)
        latents = moved
        yield latents


def dpmpp_2m(velocity: Velocity, latents: Tensor, scheduler: FlowMatchScheduler, noise: Noise) -> Iterator[Tensor]:
    """DPM-Solver++(2M), diffusers' implementation at the family's noise levels; it calls the network once per step.

    Latents are (B, C, h, w). Lu et al. 2022, "DPM-Solver++", Algorithm 2 (https://arxiv.org/abs/2211.01095).
    """
    solver = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, final_sigmas_type="zero", lower_order_final=True
    )
    solver.set_timesteps(len(scheduler.sigmas))
    # A shifted grid may begin a rounding error above 1, and the solver computes log(1 - σ).
    solver.sigmas = torch.tensor(scheduler.levels).clamp(max=1)
    solver.timesteps = scheduler.sigmas * TRAINING_STEPS
    yield latents
    for index, timestep in enumerate(scheduler.timesteps):
        latents = solver.step(velocity(latents, index), timestep, latents, return_dict=False)[0]
        yield latents


SAMPLERS: dict[str, Sampler] = {"euler": euler, "heun": heun, "dpmpp_2m": dpmpp_2m, "renoise": renoise}


def inpaint_velocity(velocity: Tensor, latents: Tensor, sigma: Tensor, shared: Mapping) -> Tensor:
    """The velocity (B, C, h, w), replaced where `inpaint_mask` is 0 by the one that leads to `input_latents`.

    Args:
        latents: Noisy latents (B, C, h, w).
        sigma: Their noise level ().
        shared: Holds `inpaint_mask` (B, 1, h, w) in [0, 1] and the clean `input_latents` (B, C, h, w).
    """
    mask = shared["inpaint_mask"]
    return (latents - shared["input_latents"]) / sigma * (1 - mask) + velocity * mask


def step_noise(seeds: int | None | Sequence[int | None], index: int, like: Tensor) -> Tensor:
    """Fresh noise (B, …) for step `index`, each sample's from its own seed; None takes torch's global generator."""
    seeds = seeds if isinstance(seeds, list | tuple) else [seeds] * len(like)
    generators = [None if seed is None else generator(seed, "renoise", 0, index) for seed in seeds]
    noise = [torch.randn(like.shape[1:], generator=own) for own in generators]  # on CPU, so that all devices agree
    return torch.stack(noise).to(like)
