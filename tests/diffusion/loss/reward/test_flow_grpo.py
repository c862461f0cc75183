"""Flow-GRPO's sampler, and its loss on a network whose velocity is known."""

from types import SimpleNamespace

import pytest
import torch
import toy
from torch.testing import assert_close

from diffsynth.diffusion.distillation.roles import STUDENT, TEACHER
from diffsynth.diffusion.loss.reward import FlowGRPO, PolicySampling
from diffsynth.diffusion.loss.reward.flow_grpo import KEPT
from diffsynth.diffusion.pipeline.samplers import euler
from diffsynth.diffusion.sde import flow_scales, transition

STEPS = 8
COUNT = 6


def rolled_out(task: FlowGRPO) -> dict:
    """What the toy family samples of six seeds."""
    pipe = toy.ToyPipeline()
    noise = torch.randn(COUNT, 2, 1, 1, generator=torch.Generator().manual_seed(0))
    shared = {"latents": noise, "seed": list(range(COUNT)), "cfg_scale": 1}
    with torch.no_grad(), pipe.sampling_steps({"height": 1, "width": 1, **task.sampling.settings}):
        kept = task.roll_out(pipe, shared, {}, {})
        return {**kept, "pipe": pipe, "noise": noise, "levels": torch.tensor(pipe.scheduler.levels)}


def grpo(**settings) -> FlowGRPO:
    return FlowGRPO(sampling=PolicySampling(num_inference_steps=STEPS), **settings)


def test_steps_outside_of_the_window_are_those_of_euler():
    task = grpo(window=2, window_end=0.5)
    found = rolled_out(task)
    pipe, levels = found["pipe"], found["levels"]
    begins = [levels.tolist().index(sigma) for sigma in found["window_sigmas"][:, 0].tolist()]
    assert set(begins) <= {0, 1, 2} and len(set(begins)) > 1
    with torch.no_grad(), pipe.sampling_steps({"height": 1, "width": 1, **task.sampling.settings}):

        def velocity(x, step):
            return pipe.predict(pipe.scheduler.timesteps[step].expand(len(x)), latents=x)

        plain = torch.stack([*euler(velocity, found["noise"], pipe.scheduler, None)], 1)
    for number, begin in enumerate(begins):
        assert_close(found["window_path"][number, 0], plain[number, begin], rtol=0, atol=1e-6)
        assert (found["window_path"][number, 1] - plain[number, begin + 1]).abs().max() > 1e-3


def test_what_is_kept_of_a_window_are_its_transitions():
    found = rolled_out(grpo(window=3, window_end=1.0))
    pipe, scales = found["pipe"], flow_scales(found["levels"][:-1], 0.7)
    for place in range(3):
        before, after = found["window_path"][:, place], found["window_path"][:, place + 1]
        sigma, following = found["window_sigmas"][:, place], found["window_sigmas"][:, place + 1]
        assert_close(found["window_scales"][:, place], scales[torch.searchsorted(-found["levels"], -sigma)])
        with torch.no_grad():
            velocity = pipe.predict(sigma * 1000, latents=before)
        step = transition(before, velocity, sigma, following, found["window_scales"][:, place])
        assert_close(found["window_means"][:, place], step.mean, rtol=1e-5, atol=1e-5)
        assert_close(found["window_log_probs"][:, place], step.log_prob(after), rtol=1e-5, atol=1e-5)


class Moved:
    """A context whose policy's velocity is the toy's plus a number."""

    def __init__(self, found: dict, offset: torch.Tensor):
        self.inputs = {name: found[name] for name in KEPT}
        self.rng = SimpleNamespace(integers=lambda purpose, end: [0] * COUNT)
        self.pipe, self.offset = found["pipe"], offset

    def velocity(self, role, latents, sigma, guidance=1, trained=False):
        velocity = self.pipe.predict(sigma * 1000, latents=latents)
        return velocity + self.offset if role == STUDENT else velocity.detach()


ADVANTAGE = torch.tensor([1.0, -1.0, 2.0, 0.0, 0.5, -2.0])


@pytest.mark.parametrize("unbiased", [False, True])
def test_the_gradient_at_the_policy_that_sampled_is_the_advantage_times_that_of_the_log_probability(unbiased):
    task = grpo(unbiased=unbiased, kl=0.0, clip=1e-4)
    found, offset = rolled_out(task), torch.zeros(COUNT, 2, 1, 1, requires_grad=True)
    losses = task.loss(Moved(found, offset), ADVANTAGE)
    assert_close(losses, -ADVANTAGE, rtol=0, atol=1e-6)  # every ratio is 1
    (gradient,) = torch.autograd.grad(losses.sum(), offset)
    sigma, scale = found["window_sigmas"], found["window_scales"][:, 0]
    moved = torch.zeros(COUNT, 2, 1, 1, requires_grad=True)
    velocity = found["pipe"].predict(sigma[:, 0] * 1000, latents=found["window_path"][:, 0]).detach() + moved
    step = transition(found["window_path"][:, 0], velocity, sigma[:, 0], sigma[:, 1], scale)
    factor = step.std.detach() if unbiased else 1.0
    wanted = -(ADVANTAGE * factor * step.log_prob(found["window_path"][:, 1])).sum()
    assert_close(gradient, torch.autograd.grad(wanted, moved)[0], rtol=1e-4, atol=1e-6)


def test_a_ratio_beyond_the_clip_has_no_gradient_on_the_side_that_it_was_pushed_to():
    task = grpo(kl=0.0, clip=1e-6, unbiased=False)
    found, offset = rolled_out(task), torch.full([COUNT, 2, 1, 1], 0.5, requires_grad=True)
    context = Moved(found, offset)
    losses = task.loss(context, ADVANTAGE)
    (gradient,) = torch.autograd.grad(losses.sum(), offset)
    step_now = -losses / ADVANTAGE  # ρ, or its bound
    outward = ((ADVANTAGE > 0) & (step_now > 1)) | ((ADVANTAGE < 0) & (step_now < 1))
    bounded = (step_now - 1).abs() < 2e-6
    assert (gradient[bounded & outward] == 0).all() and (bounded & outward).any()


def test_the_pull_to_the_base_is_the_divergence_of_its_step():
    task = grpo(kl=0.3, window_end=1.0)
    found, offset = rolled_out(task), torch.full([COUNT, 2, 1, 1], 0.1)
    with_pull = task.loss(Moved(found, offset), torch.zeros(COUNT))
    sigma, scale = found["window_sigmas"], found["window_scales"][:, 0]
    context = Moved(found, offset)
    means = [
        transition(found["window_path"][:, 0], velocity, sigma[:, 0], sigma[:, 1], scale)
        for velocity in (context.velocity(role, found["window_path"][:, 0], sigma[:, 0]) for role in (STUDENT, TEACHER))
    ]
    assert_close(with_pull, 0.3 * means[0].kl(means[1].mean), rtol=1e-5, atol=1e-7)


def test_a_window_longer_than_the_steps_it_lies_in_is_refused():
    with pytest.raises(ValueError, match=r"task.window is 5, but windows lie in 4 steps.*task.window=4 or less"):
        grpo(window=5)
