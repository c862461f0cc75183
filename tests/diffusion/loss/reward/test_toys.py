"""Known answers on a line: tilts, error spaces, laws of samplers, and probabilities of stochastic steps."""

import math

import pytest
import torch
from torch.testing import assert_close
from toys import (
    OLD_POLICY_DECAYS,
    POINTS,
    TWO_MODES,
    Mixture,
    after_refreshes,
    errors_by_space,
    fitted_line,
    grid,
    integrated,
    kl_of,
    law_of_sampler,
    mean_of,
    moments,
    nft_velocity,
    tilted,
)

from diffsynth.diffusion.flow_match import FlowMatchScheduler, interpolate
from diffsynth.diffusion.sde import Transition, flow_scales, kl_weight, transition

DATA = Mixture((1.0,), 0.5)
SHARP = Mixture((1.0,), 0.05)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Identities -----------------------------------------------------------------------------------------------------------


def test_an_error_in_x0_is_the_velocitys_times_sigma_squared_and_in_noise_times_one_minus_sigma_squared():
    clean, noise, velocity = normal(3, 5, 4, 4)
    sigma = torch.tensor([0.1, 0.3, 0.5, 0.8, 1.0], dtype=torch.float64)
    of_v, of_clean, of_noise = errors_by_space(interpolate(clean, noise, sigma), clean, noise, velocity, sigma)
    assert_close(of_clean, sigma**2 * of_v)
    assert_close(of_noise, (1 - sigma) ** 2 * of_v)


def test_the_velocity_is_the_regression_of_its_target():
    """E[ε - x₀ | x_σ] of a Gaussian is the line of least squares through pairs, at every noise level."""
    clean, noise = 1 + 0.5 * normal(100_000), normal(100_000, seed=1)
    for sigma in (0.2, 0.5, 0.9):
        slope, offset = fitted_line((1 - sigma) * clean + sigma * noise, noise - clean)
        probes = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
        low, high = DATA.velocity(probes, torch.full((2,), sigma, dtype=torch.float64))[:, 0].tolist()
        assert (offset, slope) == pytest.approx((low, high - low), abs=0.02)


def test_weights_of_least_squares_count_as_copies():
    x, target = normal(2, 50)
    weights = torch.tensor([1.0, 3.0], dtype=torch.float64).repeat(25)
    copies = torch.repeat_interleave(torch.arange(50), weights.long())
    assert fitted_line(x, target, weights) == pytest.approx(fitted_line(x[copies], target[copies]))


def test_the_velocity_of_a_mixture_leads_from_noise_to_the_mixture():
    ends = integrated(TWO_MODES.velocity, 150, 400)
    assert (ends > 0).double().mean() == 0.5
    assert ends[ends > 0].mean() == pytest.approx(2, abs=0.02) and ends[ends > 0].std() == pytest.approx(0.5, abs=0.03)


# Tilts ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_a_linear_reward_moves_a_gaussian(temperature):
    reference = Mixture().density()
    best = tilted(reference, POINTS, temperature)
    assert moments(best) == pytest.approx((1 / temperature, 1))
    assert kl_of(best, reference) == pytest.approx(1 / (2 * temperature**2))


@pytest.mark.parametrize(
    "k, temperature, mean, variance", [(1, 0.5, 2 / 3, 1 / 3), (1, 1, 1 / 2, 1 / 2), (2, 0.5, 0.8, 0.2)]
)
def test_a_quadratic_reward_also_narrows_it(k, temperature, mean, variance):
    best = tilted(Mixture().density(), -k / 2 * (POINTS - 1) ** 2, temperature)
    assert moments(best) == pytest.approx((mean, variance))


@pytest.mark.parametrize(
    "temperature, mass, kl, value",
    [
        (2.0, 0.6225, 0.0303, 0.5619),
        (1.0, 0.7311, 0.1109, 0.6201),
        (0.5, 0.8808, 0.3278, 0.7169),
        (0.25, 0.9820, 0.6031, 0.8313),
    ],
)
def test_a_reward_of_one_mode_moves_mass_to_it(temperature, mass, kl, value):
    reference, right = TWO_MODES.density(), (POINTS > 0).double()
    best = tilted(reference, right, temperature)
    assert mean_of(best, right) == pytest.approx(mass, abs=5e-5)
    assert kl_of(best, reference) == pytest.approx(kl, abs=5e-5)
    assert mean_of(best, right) - temperature * kl_of(best, reference) == pytest.approx(value, abs=5e-5)
    partition = mean_of(reference, torch.exp(right / temperature))
    assert temperature * math.log(partition) == pytest.approx(value, abs=5e-5)


ADVANTAGES = [(5.0, 0.5987, 0.600), (2.5, 0.6900, 0.690), (0.5, 0.9820, 0.9825)]


@pytest.mark.parametrize("temperature, mass, sampled", ADVANTAGES)
def test_an_advantage_of_plus_and_minus_one_tilts_twice_as_far_and_its_velocity_samples_that(
    temperature, mass, sampled
):
    best = tilted(TWO_MODES.density(), POINTS.sign(), temperature)
    assert mean_of(best, (POINTS > 0).double()) == pytest.approx(mass, abs=5e-5)
    ends = integrated(Mixture(TWO_MODES.means, TWO_MODES.std, (1 - mass, mass)).velocity, 150, 400)
    assert (ends > 0).double().mean().item() == pytest.approx(sampled, abs=0.0026)  # one start of 400


@pytest.mark.parametrize("beta, mass, mean", [(1.0, 0.5975, 2.005), (0.5, 0.6875, 2.03), (0.1, 0.970, 2.44)])
def test_one_refresh_of_nft_follows_the_tilt_but_leaves_the_data_where_beta_is_small(beta, mass, mean):
    ends = integrated(lambda x, sigma: nft_velocity(TWO_MODES, 0.6, beta, x, sigma), 150, 400)
    assert (ends > 0).double().mean().item() == pytest.approx(mass, abs=0.0026)
    assert ends[ends > 0].mean().item() == pytest.approx(mean, abs=0.01)


@pytest.mark.parametrize("decay, expected", [(0.0, 1.0), (0.5, 0.5)])
def test_decay_is_the_weight_of_the_old_policy(decay, expected):
    assert after_refreshes(5, 0.2, decay) == pytest.approx(expected)


def test_the_table_of_decays_is_the_formulas():
    formulas = {
        "copy": lambda n: 0.0,
        "linear": lambda n: min(0.001 * n, 0.5),
        "delayed": lambda n: 0.0 if n < 75 else min(0.0075 * (n - 75), 0.999),
    }
    for kind, table in OLD_POLICY_DECAYS.items():
        assert [formulas[kind](n) for n, _ in table] == pytest.approx([weight for _, weight in table])


# Samplers -------------------------------------------------------------------------------------------------------------


def scales(kind: str, levels: torch.Tensor, strength: float) -> torch.Tensor:
    return flow_scales(levels[:-1], strength) if kind == "flow" else torch.full_like(levels[:-1], strength)


TABLE = [
    ("ode", 0.0, 10, 0.137),
    ("flow", 0.7, 10, 0.180),
    ("dance", 0.3, 10, 0.148),
    ("ode", 0.0, 40, 0.216),
    ("flow", 0.7, 40, 0.230),
    ("dance", 0.3, 40, 0.220),
    ("flow", 0.7, 1000, 0.250),
]


@pytest.mark.parametrize("kind, strength, steps, expected", TABLE)
def test_the_variance_that_a_sampler_leaves_of_a_quarter(kind, strength, steps, expected):
    levels = grid(steps)
    mean, variance = law_of_sampler(DATA.velocity, levels, scales(kind, levels, strength))
    assert mean == pytest.approx(1, abs=1e-9)
    assert variance == pytest.approx(expected, abs=6e-4)


GRAIN = [
    ("flow", 0.7, 10, 0.223),
    ("flow", 1.0, 10, 0.375),
    ("dance", 1.0, 10, 0.96),
    ("dance", 1.0, 40, 1.65),
    ("flow", 0.7, 40, 0.054),
]


@pytest.mark.parametrize("kind, strength, steps, expected", GRAIN)
def test_few_stochastic_steps_leave_grain_on_sharp_data(kind, strength, steps, expected):
    levels = grid(steps)
    _, variance = law_of_sampler(SHARP.velocity, levels, scales(kind, levels, strength))
    assert math.sqrt(variance) == pytest.approx(expected, abs=6e-3)


def test_the_scales_of_ten_steps():
    levels = grid(10)
    found, steps = flow_scales(levels[:-1], 0.7), levels[:-1] - levels[1:]
    expected = [3.70, 3.64, 2.43, 1.85, 1.49, 1.21, 0.99, 0.79, 0.61, 0.40]
    assert found.tolist() == pytest.approx(expected, abs=6e-3)
    of_noise = [0.70, 0.74, 0.53, 0.44, 0.39, 0.35, 0.32, 0.29, 0.26, 0.20]
    assert (found * steps.sqrt()).tolist() == pytest.approx(of_noise, abs=6e-3)


def test_the_first_scale_reads_the_second_level_only_at_pure_noise():
    assert_close(flow_scales(torch.tensor([1.0, 0.6]), 0.5)[0], torch.tensor(0.5 * (1 / 0.4) ** 0.5))
    assert_close(flow_scales(torch.tensor([0.9, 0.6]), 0.5)[0], torch.tensor(0.5 * 9**0.5))
    assert flow_scales(torch.tensor([1.0]), 0.5).tolist() == [0.5]  # one step, whose next level is 0


def test_a_strength_of_zero_is_eulers_step_to_the_bit():
    scheduler = FlowMatchScheduler(lambda *args, **kwargs: grid(10)[:-1].float())
    scheduler.set_timesteps(10)
    x, velocity, noise = normal(3, 2, 4, 6).float()
    for index, (sigma, following) in enumerate(zip(scheduler.levels[:-1], scheduler.levels[1:], strict=True)):
        both = [torch.full((2,), value) for value in (sigma, following, 0.0)]
        moved = transition(x, velocity, *both).sample(noise)
        assert torch.equal(moved, scheduler.step(velocity, index, x))


# Probabilities --------------------------------------------------------------------------------------------------------


def a_step(seed: int = 0, dtype=torch.float64) -> tuple[torch.Tensor, ...]:
    """Latents, two velocities, levels and scales of three steps of a 10-step grid."""
    levels, (x, own, other) = grid(10), normal(3, 3, 4, 5, seed=seed)
    places = torch.tensor([0, 4, 9])
    found = x, own, other, levels[places], levels[places + 1], flow_scales(levels[:-1], 0.7)[places]
    return tuple(value.to(dtype) for value in found)


def test_both_spellings_of_a_step_are_one():
    x, velocity, _, sigma, following, scale = (value[1:] for value in a_step())
    level, to, s = (value[:, None, None] for value in (sigma, following, scale))
    score = -(x + (1 - level) * velocity) / level
    expected = x + (velocity - s**2 / 2 * score) * (to - level)
    assert_close(transition(x, velocity, sigma, following, scale).mean, expected, rtol=0, atol=1e-14)


def test_the_density_of_a_step_integrates_to_one():
    step = Transition(torch.tensor([[0.3]], dtype=torch.float64), torch.tensor([0.7], dtype=torch.float64))
    density = torch.stack([step.log_prob(point.reshape(1, 1)) for point in POINTS[::40]]).exp()
    assert density.sum().item() * (POINTS[40] - POINTS[0]).item() == pytest.approx(1)


def test_the_log_probability_is_the_mean_over_dimensions():
    x, velocity, _, sigma, following, scale = a_step()
    step, noise = transition(x, velocity, sigma, following, scale), normal(3, 4, 5, seed=3)
    law = torch.distributions.Normal(step.mean, step.std[:, None, None])
    moved = step.sample(noise)
    assert_close(step.log_prob(moved), law.log_prob(moved).flatten(1).mean(1))


def test_with_unchanged_weights_the_ratio_is_one_to_the_bit():
    x, velocity, _, sigma, following, scale = a_step(dtype=torch.float32)
    old = transition(x, velocity, sigma, following, scale)
    moved = old.sample(normal(3, 4, 5, seed=3).float())
    again = transition(x.clone(), velocity.clone(), sigma, following, scale)
    assert torch.equal((again.log_prob(moved) - old.log_prob(moved)).exp(), torch.ones(3))


def test_the_divergence_of_a_step_by_means_and_by_velocities():
    x, own, other, sigma, following, scale = a_step()
    steps = [transition(x, velocity, sigma, following, scale) for velocity in (own, other)]
    by_velocity = kl_weight(sigma, following, scale) * (own - other).pow(2).flatten(1).mean(1)
    assert_close(steps[0].kl(steps[1].mean), by_velocity)
    laws = [torch.distributions.Normal(step.mean, step.std[:, None, None]) for step in steps]
    assert_close(torch.distributions.kl_divergence(*laws).flatten(1).mean(1), by_velocity)


def test_the_weights_of_the_divergence_span_four_orders_over_the_grid():
    levels = grid(10)
    found = kl_weight(levels[:-1], levels[1:], flow_scales(levels[:-1], 0.7))
    assert found[:2].tolist() == pytest.approx([0.0013, 0.0024], abs=5e-5)
    assert found[-3:].tolist() == pytest.approx([0.165, 0.377, 1.186], abs=5e-4)
    without_dt = found * (levels[:-1] - levels[1:])
    assert without_dt[[0, -1]].tolist() == pytest.approx([5e-5, 0.297], rel=0.1)


def test_ratios_under_the_old_policy_lie_below_one():
    """The mean moved by 1 % of the noise, in 65,536 dimensions: E[log ratio] = -KL, 10 % outside of ±1e-4."""
    mean, std, shift = torch.zeros(100, 65_536), torch.ones(100), 0.01
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
    old, new = Transition(mean, std), Transition(mean + shift, std)
    ratios = new.log_prob(noise) - old.log_prob(noise)
    assert old.kl(new.mean)[0].item() == pytest.approx(shift**2 / 2)
    assert ratios.mean().item() == pytest.approx(-5e-5, abs=1.2e-5)  # three standard errors
    assert ratios.std().item() == pytest.approx(3.9e-5, abs=8e-6)
    assert (ratios.abs() > 1e-4).double().mean().item() == pytest.approx(0.10, abs=0.09)
