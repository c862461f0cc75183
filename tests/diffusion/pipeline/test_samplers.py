"""Samplers on a mixture of two Gaussians, whose velocity is known, and beside diffusers' own schedulers."""

import pytest
import torch
import toy
from diffusers import FlowMatchHeunDiscreteScheduler
from torch.testing import assert_close

from diffsynth.diffusion.flow_match import FlowMatchScheduler
from diffsynth.diffusion.pipeline.samplers import SAMPLERS

NOISE = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))


def velocity(latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    return toy.mixture_velocity(latents, (timestep / 1000).expand(len(latents)))


def sampled(name: str, scheduler: FlowMatchScheduler) -> torch.Tensor:
    *_, latents = SAMPLERS[name](
        lambda latents, step: velocity(latents, scheduler.timesteps[step]),
        NOISE,
        scheduler,
        lambda index, like: torch.randn_like(like),
    )
    return latents


def end(name: str, steps: int, first: float = 0.99) -> torch.Tensor:
    """Where points (64, 2) end."""
    scheduler = FlowMatchScheduler(
        lambda num_inference_steps, **_: torch.linspace(first, 0, num_inference_steps + 1)[:-1]
    )
    scheduler.set_timesteps(steps)
    return sampled(name, scheduler)


def errors(name: str, exact: torch.Tensor) -> list[float]:
    """Of 16, 32 and 64 steps."""
    return [(end(name, steps) - exact).pow(2).mean().sqrt().item() for steps in (16, 32, 64)]


@pytest.mark.parametrize("name, order", [("euler", 1), ("heun", 2)])
def test_the_error_falls_with_the_order_of_the_sampler(name, order):
    found = errors(name, end("heun", 2048))
    assert all(before > 0.8 * 2**order * after for before, after in zip(found, found[1:], strict=False)), found


@pytest.mark.parametrize("name", ["heun", "dpmpp_2m"])
def test_samplers_of_second_order_err_less_than_half_as_much(name):
    exact = end("heun", 2048)
    assert all(own < euler / 2 for own, euler in zip(errors(name, exact), errors("euler", exact), strict=True))


def test_a_grid_from_pure_noise_is_taken_by_all():
    for name in SAMPLERS:
        for first in (1.0, 1.0 + 1e-7):
            assert end(name, 4, first).isfinite().all(), name


def test_heun_is_that_of_diffusers():
    theirs = FlowMatchHeunDiscreteScheduler()
    theirs.set_timesteps(4)
    latents = NOISE
    for timestep in theirs.timesteps:
        latents = theirs.step(velocity(latents, timestep), timestep, latents).prev_sample
    scheduler = FlowMatchScheduler(None)
    scheduler.set_timesteps(sigmas=theirs.sigmas[:-1].unique().flip(0).tolist())
    assert_close(sampled("heun", scheduler), latents, atol=1e-5, rtol=1e-5)
