import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffsynth.diffusion.flow_match import FlowMatchScheduler, exponential_shift, stretch_to_terminal
from diffsynth.diffusion.timesteps import BellWeighting, LogitNormalTimesteps, UniformTimesteps, UniformWeighting
from diffsynth.pipelines.flux2_image import flux2_sigmas
from diffsynth.pipelines.qwen_image import qwen_image_sigmas

GRIDS = {"qwen": qwen_image_sigmas, "flux2": flux2_sigmas}
INDICES = [0, 1, 250, 500, 750, 998, 999]
MU = st.floats(-3, 3)
LEVELS = st.lists(st.floats(0, 1), min_size=2, max_size=20).map(lambda x: torch.tensor(sorted(x), dtype=torch.double))


def scheduler_of(grid, steps=1000, **options):
    scheduler = FlowMatchScheduler(GRIDS[grid])
    scheduler.set_timesteps(steps, training=True, **options)
    return scheduler


def assert_close(found, expected, atol=2e-6):
    torch.testing.assert_close(found, torch.tensor(expected), atol=atol, rtol=0)


# The originals' numbers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "grid, sigmas, weights",
    [
        (
            "qwen",
            [1.0, 0.9995583, 0.8720553, 0.6954981, 0.4361254, 0.0221778, 0.02],
            [0, 0.002291, 0.648451, 1.367906, 1.647851, 0.11497, 0.103693],
        ),
        (
            "flux2",
            [1.0, 0.9995503, 0.8697344, 0.6899744, 0.4258967, 0.0044402, 0.0022228],
            [0, 0.002346, 0.663539, 1.393012, 1.645582, 0.023169, 0.011599],
        ),
    ],
)
def test_training_grid_and_weights_are_the_originals(grid, sigmas, weights):
    scheduler = scheduler_of(grid)
    assert_close(scheduler.sigmas[INDICES], sigmas)
    assert_close(scheduler.training_weight(scheduler.timesteps)[INDICES], weights)


def test_training_weight_of_qwen_image_is_greatest_at_level_698():
    scheduler = scheduler_of("qwen")
    weight, index = scheduler.training_weight(scheduler.timesteps).max(0)
    assert weight.item() == pytest.approx(1.682603, abs=2e-6)
    assert index == 698


@pytest.mark.parametrize(
    "grid, sigmas, weights",
    [
        ("qwen", [1, 0.777635, 0.470783, 0.02], [1.503731, 3.007462, 3.8545, 1.649231]),
        ("flux2", [1, 0.869734, 0.689974, 0.425897], [0.716927, 1.433853, 2.222018, 2.494909]),
    ],
)
def test_four_steps_are_the_originals(grid, sigmas, weights):
    scheduler = scheduler_of(grid, 4)
    assert_close(scheduler.sigmas, sigmas)
    assert_close(scheduler.training_weight(scheduler.timesteps), weights)


@pytest.mark.parametrize(
    "grid, sigmas", [("qwen", [1, 0.766709, 0.455614, 0.02]), ("flux2", [1, 0.967384, 0.908144, 0.7672])]
)
def test_four_steps_at_1024_pixels_are_the_originals(grid, sigmas):
    assert_close(GRIDS[grid](4, dynamic_shift_len=64 * 64), sigmas)


@pytest.mark.parametrize(
    "grid, steps, size, mu",
    [("qwen", 30, 1328, 0.834325), ("flux2", 30, 1024, 2.139798), ("flux2", 50, 1024, 2.023351)],
)
def test_shift_of_a_size_is_the_originals(grid, steps, size, mu):
    shifted = exponential_shift(torch.tensor([1, 1 - 1 / steps, 1 / steps]), mu)
    expected = {"qwen": stretch_to_terminal(shifted, 0.02), "flux2": shifted}[grid]
    torch.testing.assert_close(GRIDS[grid](steps, dynamic_shift_len=(size // 16) ** 2)[[0, 1, -1]], expected)


@pytest.mark.parametrize("tokens", [256, 4096, 4300, 4301, 16384])
@pytest.mark.parametrize("steps", [4, 28, 50])
def test_flux2_samples_at_the_levels_that_diffusers_does(tokens, steps):
    from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

    expected = exponential_shift(torch.linspace(1, 1 / steps, steps), compute_empirical_mu(tokens, steps))
    torch.testing.assert_close(flux2_sigmas(steps, dynamic_shift_len=tokens), expected)


# Properties ----------------------------------------------------------------------------------------------------------


@given(LEVELS, MU)
def test_shift_keeps_order_ends_and_range(sigmas, mu):
    shifted = exponential_shift(sigmas, mu)
    assert (shifted.diff() >= 0).all() and (shifted >= 0).all() and (shifted <= 1 + 1e-12).all()
    assert exponential_shift(torch.tensor([0.0, 1.0]), mu).tolist() == pytest.approx([0, 1])


@given(LEVELS, MU, MU)
def test_shifts_add_up_and_undo_each_other(sigmas, mu, nu):
    torch.testing.assert_close(exponential_shift(exponential_shift(sigmas, mu), nu), exponential_shift(sigmas, mu + nu))
    torch.testing.assert_close(exponential_shift(exponential_shift(sigmas, mu), -mu), sigmas)


@given(st.floats(0.01, 0.99), MU)
def test_shift_is_the_published_formula(sigma, mu):
    published = torch.tensor(mu).exp() / (torch.tensor(mu).exp() + 1 / sigma - 1)
    torch.testing.assert_close(exponential_shift(torch.tensor(sigma), mu), published)


@given(st.integers(2, 60), st.floats(0.001, 0.2), st.floats(0.1, 1.0))
def test_stretching_ends_at_the_terminal_and_keeps_pure_noise(steps, terminal, strength):
    stretched = stretch_to_terminal(torch.linspace(strength, 0, steps + 1)[:-1], terminal)
    assert stretched[-1].item() == pytest.approx(terminal, abs=1e-6)
    assert (stretched.diff() < 0).all()
    assert strength < 1 or stretched[0] == 1


@given(st.sampled_from(sorted(GRIDS)), st.integers(1, 100), st.floats(0.05, 1.0), st.none() | st.integers(1, 20000))
def test_grids_fall_from_noise_towards_data(grid, steps, strength, tokens):
    sigmas = GRIDS[grid](steps, denoising_strength=strength, dynamic_shift_len=tokens)
    assert sigmas.shape == (steps,) and sigmas.dtype == torch.float32
    assert (sigmas.diff() < 0).all() and (sigmas > 0).all() and (sigmas <= 1 + 1e-6).all()
    assert strength < 1 or sigmas[0] == pytest.approx(1)


@pytest.mark.parametrize("grid", GRIDS)
def test_one_step_goes_from_noise_to_data(grid):
    scheduler = scheduler_of(grid, 1)
    noise, clean = torch.randn(2, 1, 16, 4, 4)
    torch.testing.assert_close(scheduler.step(noise - clean, 0, noise), clean)


@given(st.integers(1, 12))
def test_euler_steps_are_exact_where_the_velocity_is_constant(steps):
    scheduler = scheduler_of("qwen", steps)
    noise, clean = torch.randn(2, 1, 4)
    sample = noise
    for index in range(steps):
        sample = scheduler.step(noise - clean, index, sample)
    torch.testing.assert_close(sample, clean, atol=1e-5, rtol=0)


# Scheduler -----------------------------------------------------------------------------------------------------------


def test_given_noise_levels_replace_the_grid():
    scheduler = FlowMatchScheduler(qwen_image_sigmas)
    scheduler.set_timesteps(30, sigmas=[1.0, 0.5])
    assert scheduler.timesteps.tolist() == [1000, 500]
    assert not scheduler.training


def test_noise_is_added_to_each_sample_at_its_own_level():
    scheduler, (noise, clean) = scheduler_of("qwen", 4), torch.randn(2, 3, 16, 4, 4)
    noised = scheduler.add_noise(clean, noise, scheduler.timesteps[[0, 1, 3]])
    for index, sigma in enumerate([1, 0.777635, 0.02]):
        torch.testing.assert_close(noised[index], (1 - sigma) * clean[index] + sigma * noise[index])


def test_a_timestep_between_two_levels_takes_the_nearest():
    scheduler = FlowMatchScheduler(qwen_image_sigmas)
    scheduler.set_timesteps(sigmas=[1.0, 0.5, 0.1])
    assert_close(scheduler.sigma(torch.tensor([800.0, 700, 301, 299, 0])), [1, 0.5, 0.5, 0.1, 0.1])


# Noise levels to train -----------------------------------------------------------------------------------------------


def test_uniform_timesteps_reach_every_level_equally():
    scheduler = scheduler_of("qwen")
    sigmas = UniformTimesteps()(scheduler, (torch.arange(2000) + 0.5) / 2000)
    torch.testing.assert_close(sigmas, scheduler.sigmas.repeat_interleave(2))


def test_boundaries_keep_to_their_part_of_the_grid():
    scheduler = scheduler_of("qwen")
    sigmas = UniformTimesteps(min_boundary=0.2, max_boundary=0.5)(scheduler, torch.tensor([0, 0.999999]))
    assert_close(sigmas, scheduler.sigmas[[200, 499]].tolist())


@pytest.mark.parametrize("low, high", [(0.5, 0.5), (-0.1, 1), (0, 1.1)])
def test_boundaries_out_of_order_are_refused(low, high):
    named = f"task.timesteps.min_boundary={low}, task.timesteps.max_boundary={high}; expected 0 <= min_boundary < max"
    with pytest.raises(ValueError, match=named):
        UniformTimesteps(min_boundary=low, max_boundary=high)


@pytest.mark.parametrize("std", [0, -0.5])
def test_a_spread_of_noise_levels_that_is_not_above_0_is_refused(std):
    with pytest.raises(ValueError, match=f"task.timesteps.std is {std}; expected a number above 0"):
        LogitNormalTimesteps(std=std)


def test_logit_normal_timesteps_have_the_quantiles_they_are_named_after():
    sigmas = LogitNormalTimesteps(mean=0.3, std=0.7)(scheduler_of("qwen"), torch.tensor([0.0, 0.1587, 0.5, 0.8413]))
    assert 0 < sigmas[0] < 0.05
    assert_close(sigmas[1:].logit(), [0.3 - 0.7, 0.3, 0.3 + 0.7], atol=1e-3)


def test_weights_have_mean_one_over_the_training_grid():
    scheduler = scheduler_of("qwen")
    for weighting in (BellWeighting(), UniformWeighting()):
        assert weighting(scheduler, scheduler.sigmas).mean().item() == pytest.approx(1, abs=1e-4)
