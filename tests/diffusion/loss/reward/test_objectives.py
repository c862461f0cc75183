"""Objectives of reward training on a Gaussian on the line, whose best policies are known, and their identities.

The policy is v = a x + b at one noise level, so that every objective is quadratic in (a, b), and one Newton step finds
its minimum. Samples and noise are all pairs of quantiles, so that nothing here is random.
"""

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from diffsynth.diffusion.distillation.roles import OLD, STUDENT, TEACHER
from diffsynth.diffusion.flow_match import interpolate
from diffsynth.diffusion.loss.reward import AWM, NFT, RWR
from diffsynth.diffusion.loss.reward.nft import SCHEDULES

QUANTILES = torch.special.ndtri((torch.arange(200, dtype=torch.float64) + 0.5) / 200)
QUANTILES = QUANTILES / QUANTILES.std(correction=0)  # exactly of variance 1
SIGMA = 0.6


def gaussian_velocity(mean: float, x: Tensor, sigma: float = SIGMA) -> Tensor:
    """E[ε - x₀ | x_σ = x] (B, 1) of N(mean, 1)."""
    variance = (1 - sigma) ** 2 + sigma**2
    apart = x - (1 - sigma) * mean
    return (sigma * apart - (1 - sigma) * apart) / variance - mean


def line_of(mean: float) -> Tensor:
    """(a, b) with a x + b = `gaussian_velocity(mean, x)`."""
    offset, end = (gaussian_velocity(mean, torch.tensor([[x]], dtype=torch.float64)) for x in (0.0, 1.0))
    return torch.cat([end - offset, offset]).flatten()


@dataclass
class Level:
    """Trains one noise level."""

    sigma: float = SIGMA

    def __call__(self, scheduler, u: Tensor) -> Tensor:
        return torch.full_like(u, self.sigma)


@dataclass
class Context:
    """All pairs of a sample of N(mean, 1) and a noise, and roles whose velocities are lines in x."""

    lines: dict[str, Tensor]
    mean: float = 0.0
    pipe: object = field(default_factory=lambda: SimpleNamespace(scheduler=None))

    def __post_init__(self):
        self.clean = (QUANTILES + self.mean).repeat_interleave(len(QUANTILES))[:, None]
        noise = QUANTILES.repeat(len(QUANTILES))[:, None]
        uniform = torch.zeros(len(noise), dtype=torch.float64)
        self.rng = SimpleNamespace(normal=lambda purpose, like: noise, uniform=lambda purpose: uniform)

    def velocity(self, role: str, x: Tensor, sigma: Tensor, trained: bool = False) -> Tensor:
        slope, offset = self.lines[role]
        return slope * x + offset


class OnTheLine:
    """Predicts as the context's student."""

    def policy_velocity(self, context, x, sigma):
        return context.velocity(STUDENT, x, sigma)


class LineRWR(OnTheLine, RWR):
    pass


def loss_of(task, line: Tensor, advantage: Tensor, old: float = 0.0, base: float = 0.0, mean: float = 0.0) -> Tensor:
    """Mean loss () of a student with this line on samples of N(mean, 1)."""
    context = Context({STUDENT: line, OLD: line_of(old), TEACHER: line_of(base)}, mean)
    return task.loss(context, advantage).mean()


def minimum(task, advantage: Tensor, **policies) -> Tensor:
    """(a, b) with the least loss, which is quadratic in them."""
    start = torch.zeros(2, dtype=torch.float64)
    gradient = torch.func.grad(lambda line: loss_of(task, line, advantage, **policies))(start)
    hessian = torch.func.hessian(lambda line: loss_of(task, line, advantage, **policies))(start)
    return start - torch.linalg.solve(hessian, gradient)


def gradient_at(task, policy: float, advantage: Tensor, **policies) -> Tensor:
    return torch.func.grad(lambda line: loss_of(task, line, advantage, **policies))(line_of(policy))


def reward(mean: float = 0.0) -> Tensor:
    """R = x of the samples of N(mean, 1)."""
    return (QUANTILES + mean).repeat_interleave(len(QUANTILES))


def nft(**settings) -> NFT:
    return NFT(**{"kl": 0.0, "adaptive_weight": False, "timesteps": Level(), **settings})


@pytest.mark.parametrize(("beta", "mean"), [(1.0, 0.2), (0.5, 0.4)])
def test_one_refresh_of_nft_tilts_a_gaussian_by_the_temperature_beta_times_a_max(beta, mean):
    advantage = reward().clamp(-5, 5)
    assert_close(minimum(nft(beta=beta), advantage), line_of(1 / (5 * beta)), atol=1e-6, rtol=0)
    assert mean == pytest.approx(1 / (5 * beta))


def test_five_refreshes_of_nft_reach_five_times_as_far():
    policy = 0.0
    for _ in range(5):
        line = minimum(nft(), reward(policy) - policy, old=policy, mean=policy)
        policy += 0.2
        assert_close(line, line_of(policy), atol=1e-6, rtol=0)


@pytest.mark.parametrize("beta", [0.1, 1.0, 2.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_at_the_old_policy_the_gradient_of_nft_is_the_advantage_times_that_of_its_distance(beta, weighted):
    task, advantage = nft(beta=beta, adaptive_weight=weighted), reward()
    found = gradient_at(task, 0.0, advantage)

    def distances(line: Tensor) -> Tensor:
        context = Context({STUDENT: line})
        noisy, _, sigma = task.noised(context)
        own = context.velocity(STUDENT, noisy, sigma)
        return (advantage * task._distance(noisy, own, sigma, context.clean)).mean()

    assert_close(found, torch.func.grad(distances)(line_of(0.0)), atol=1e-10, rtol=0)
    values = [loss_of(task, line_of(0.0), advantage * factor) for factor in (1, 3)]
    assert_close(values[0], values[1], atol=1e-12, rtol=0)  # the value does not tell


def test_the_gradient_of_nft_at_the_old_policy_is_that_of_awm_in_the_space_of_clean_samples():
    advantage = reward()
    plain = AWM(kl=0.0, kl_old=0.0, timesteps=Level())
    assert_close(gradient_at(nft(), 0.0, advantage), SIGMA**2 * gradient_at(plain, 0.0, advantage), atol=1e-10, rtol=0)


@pytest.mark.parametrize("strength", [0.4, 1.0, 2.0])
def test_on_policy_awm_rests_at_the_temperature_of_its_pull_to_the_base(strength):
    task, rest = AWM(kl=strength, kl_old=0.0, timesteps=Level()), 1 / strength
    at_rest = gradient_at(task, rest, reward(rest) - rest, mean=rest)
    assert_close(at_rest, torch.zeros_like(at_rest), atol=1e-8, rtol=0)
    before = gradient_at(task, rest / 2, reward(rest / 2) - rest / 2, mean=rest / 2)
    assert before.abs().max() > 1e-2


def test_the_kl_of_nft_is_a_temperature_too():
    at_rest = gradient_at(nft(kl=0.5), 2.0, reward(2.0) - 2.0, old=2.0, mean=2.0)
    assert_close(at_rest, torch.zeros_like(at_rest), atol=1e-8, rtol=0)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_regression_on_tilted_weights_reaches_the_tilted_gaussian(temperature):
    task = LineRWR(temperature=temperature, timesteps=Level())
    weights = task.advantages(QUANTILES[None])[0].repeat_interleave(len(QUANTILES))
    assert_close(weights.mean().item(), 1.0, atol=1e-9, rtol=0)
    tilted = torch.exp(QUANTILES / temperature)
    mean = (tilted * QUANTILES).sum() / tilted.sum()  # 1 / τ but for the quantiles' ends
    least = loss_of(task, minimum(task, weights), weights)
    above, untilted = (loss_of(task, line_of(at), weights) - least for at in (mean.item(), 0.0))
    assert 0 <= above < untilted / 50  # not 0: of 200 quantiles, the tilted ones lack the end
    assert mean.item() == pytest.approx(1 / temperature, abs=0.03)


def test_a_constant_reward_moves_nothing():
    nothing = torch.zeros(len(QUANTILES) ** 2, dtype=torch.float64)
    for task in (nft(), nft(adaptive_weight=True), nft(kl=0.3), AWM(kl=0.3, kl_old=0.3, timesteps=Level())):
        found = gradient_at(task, 0.0, nothing)
        assert_close(found, torch.zeros_like(found), atol=1e-12, rtol=0)


DECAYS = {  # of the published code, by optimizer step
    "copy": {0: 0.0, 1000: 0.0},
    "linear": {0: 0.0, 100: 0.1, 500: 0.5, 5000: 0.5},
    "delayed": {74: 0.0, 75: 0.0, 100: 0.1875, 200: 0.9375, 209: 0.999, 5000: 0.999},
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_old_policy_keeps_this_share_of_itself(schedule):
    task = NFT(schedule=schedule)
    assert {step: task.decay(step) for step in DECAYS[schedule]} == pytest.approx(DECAYS[schedule])


def test_the_weights_of_a_prompt_leave_out_samples_without_a_score():
    weights = RWR().advantages(torch.tensor([[1.0, torch.nan, 0.0], [torch.nan] * 3]))
    assert weights[0, 1] == 0 and weights[0].sum() == pytest.approx(2)
    assert weights[1].tolist() == [0, 0, 0]
    assert interpolate(weights, weights, torch.tensor(0.5)).isfinite().all()
