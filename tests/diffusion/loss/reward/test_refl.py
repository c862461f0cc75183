"""Gradients of a reward: which steps have them, that the sample is the sampler's own, and what is refused."""

from dataclasses import replace

import pytest
import tiny
import torch
import toy
from families import FAMILIES as TABLE
from miniatures.requests import samples as samples_of
from resumed import losses
from torch.testing import assert_close
from toys import grid

from diffsynth.core.data import SampleAddress
from diffsynth.diffusion.adapters.lora import LoRA
from diffsynth.diffusion.loss.reward import ReFL
from diffsynth.diffusion.loss.reward.refl import decoded, sample_last_steps
from diffsynth.diffusion.randomness import SampleRNG
from diffsynth.diffusion.rewards import Brightness, JpegSize

LORA = LoRA(rank=2, target_modules=["to_q", "to_k"])
BRIGHT = ReFL(reward={"bright": Brightness(target=1.0, weight=3.0)}, num_inference_steps=3)
NOISE = torch.randn(2, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def shaken(module):
    """A module whose adapter changes the velocity."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.trainable_parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return module


# Which steps have gradients -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("last_steps, expected", [(1, 0.25), (2, 0.4286), (5, 0.75), (10, 1.0)])
def test_of_a_constant_velocity_the_gradient_is_minus_the_level_where_gradients_begin(last_steps, expected):
    constant = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    ends = sample_last_steps(lambda x, sigma: constant.expand(2, 1), NOISE, grid(10), [10, 10], last_steps)
    (gradient,) = torch.autograd.grad(ends[0].sum(), constant)
    assert gradient.item() == pytest.approx(-expected, abs=5e-5)


def test_an_estimate_from_a_level_has_minus_that_level_for_each_sample():
    constant = torch.zeros(2, 1, dtype=torch.float64, requires_grad=True)
    levels = grid(10)
    ends = sample_last_steps(lambda x, sigma: constant, NOISE, levels, [4, 9], 1)
    (gradient,) = torch.autograd.grad(ends.sum(), constant)
    assert_close(gradient[:, 0], -levels[[3, 8]])


def test_of_the_toy_the_last_step_alone_is_known_too():
    """One step from x_σ: dx₀/db = -σ of the bias b that its field ends with, whatever the field before is."""
    pipe = toy.ToyPipeline()
    levels, noise = torch.linspace(1, 0, 6), torch.randn(4, 2, 1, 1, generator=torch.Generator().manual_seed(0))
    ends = sample_last_steps(lambda x, sigma: pipe.predict(sigma * 1000, latents=x), noise, levels, [5] * 4, 1)
    (gradient,) = torch.autograd.grad(ends.sum(), pipe.dit.layers[-1].bias)
    assert_close(gradient, torch.full((2,), -4 * levels[4].item()))


def test_what_only_the_first_steps_read_gets_no_gradient():
    early, late = (torch.tensor(0.3, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def velocity(x, sigma):
        return x * torch.where(sigma[:, None] > 0.9, early, late)

    levels = grid(10)
    assert (levels > 0.9).sum() == 3  # of ten
    ends = sample_last_steps(velocity, NOISE, levels, [10, 10], 7).sum()
    gradients = torch.autograd.grad(ends, [early, late], allow_unused=True)
    assert not gradients[0] and gradients[1].abs() > 1e-3
    further = sample_last_steps(velocity, NOISE, levels, [10, 10], 8).sum()
    assert torch.autograd.grad(further, early)[0].abs() > 1e-3
    assert_close(further, ends)  # the sample itself is the same


@pytest.mark.parametrize("last_steps", [1, 3])
def test_the_sample_is_the_samplers_own(last_steps, training_module, samples):
    """From the same noise, in the same steps, whichever of them have gradients."""
    module, rng = shaken(training_module(replace(BRIGHT, last_steps=last_steps), LORA)), an_rng(samples[:1])
    inputs = frozen_inputs(module, samples[0])
    found = module.task.sample(module.pipe, 48, 32, rng, inputs)
    with torch.no_grad(), module.pipe.sampling_steps({"height": 48, "width": 32, "num_inference_steps": 3}):
        shared = {"latents": rng.normal("noise", found), "cfg_scale": 1}
        expected = module.pipe.denoise(shared, {k: v for k, v in inputs.items() if k.startswith("prompt_emb")}, {})
    assert_close(found.detach(), expected)


def an_rng(samples) -> SampleRNG:
    return SampleRNG(0, [SampleAddress(sample.epoch, sample.index) for sample in samples])


def frozen_inputs(module, sample) -> dict:
    shared, posi, _ = module._run_frozen_units(sample)
    return {name: value for name, value in {**shared, **posi}.items() if name not in ("height", "width", "prompt")}


# The loss -------------------------------------------------------------------------------------------------------------


def test_the_loss_is_minus_the_weighted_rewards_of_the_decoded_pictures(training_module, samples):
    rewards = {"bright": Brightness(target=1.0, weight=3.0), "dark": Brightness(target=0.0, weight=-0.5)}
    module = shaken(training_module(replace(BRIGHT, reward=rewards), LORA))
    found = module(samples[:1]).detach()
    latents = module.task.sample(module.pipe, 48, 32, an_rng(samples[:1]), frozen_inputs(module, samples[0])).detach()
    brightness = ((module.pipe.vae.decode(latents) + 1) / 2).clamp(0, 1).mean((1, 2, 3))
    assert_close(found, 3 * (brightness - 1) ** 2 - 0.5 * brightness**2, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("random_ends", [1, 3])
def test_a_batch_has_the_losses_of_its_samples(random_ends, training_module, samples):
    module = shaken(training_module(replace(BRIGHT, random_ends=random_ends), LORA))
    with torch.no_grad():
        assert_close(module(samples), torch.cat([module([sample]) for sample in samples]), atol=1e-5, rtol=1e-4)


def test_a_reward_reads_the_prompt_of_each_picture_also_where_all_are_equal(training_module, samples, monkeypatch):
    module, seen = training_module(BRIGHT, LORA), []
    own = Brightness.score_pixels
    monkeypatch.setattr(
        Brightness, "score_pixels", lambda self, pixels, *others: seen.append(others) or own(self, pixels, *others)
    )
    module(samples)
    module([samples[1], samples[1]])
    assert seen[0][0] == [sample.data["prompt"] for sample in samples]
    assert seen[1] == (["a red apple"] * 2, [{}, {}])


def test_checkpointing_changes_no_gradient(training_module, samples):
    found = []
    for kind in ("none", "blocks"):
        module = shaken(training_module(replace(BRIGHT, last_steps=2), LORA, checkpointing=kind))
        found.append(torch.autograd.grad(module(samples).sum(), module.trainable_parameters()))
    for own, other in zip(*found, strict=True):
        assert torch.equal(own, other) and own.any()


def test_under_checkpointing_a_picture_is_decoded_again_in_the_backward_pass(training_module, samples, monkeypatch):
    module, calls = training_module(BRIGHT, LORA, checkpointing="blocks"), []
    own = module.pipe.pixels_of
    monkeypatch.setattr(module.pipe, "pixels_of", lambda latents, request: calls.append(1) or own(latents, request))
    losses_ = module(samples)
    assert len(calls) == 3
    losses_.sum().backward()
    assert len(calls) == 6


def test_pixels_beyond_white_are_clamped_and_keep_their_gradients_and_alpha_is_on_white(pipe, monkeypatch):
    monkeypatch.setattr(pipe, "pixels_of", lambda latents, request: latents)
    latents = torch.tensor([-3.0, 0.0, 5.0]).reshape(1, 3, 1, 1).requires_grad_(True)
    pixels = decoded(pipe, latents, {})
    assert pixels.flatten().tolist() == [0, 0.5, 1]
    pixels.sum().backward()
    assert latents.grad.flatten().tolist() == [0.5, 0.5, 0.5]
    half_seen = torch.tensor([-1.0, -1.0, 1.0, 0.0]).reshape(1, 4, 1, 1)
    assert decoded(pipe, half_seen, {}).flatten().tolist() == [0.5, 0.5, 1]


def test_only_the_adapter_gets_gradients_and_no_image_is_encoded(training_module, samples):
    module = training_module(BRIGHT, LORA)
    module(samples).sum().backward()
    assert all(p.grad is None for p in module.parameters() if not p.requires_grad)
    assert any(p.grad is not None and p.grad.any() for p in module.trainable_parameters())
    assert not any("input_latents" in unit.output_params for unit in module.units)


IMAGES = {str(family): family for family in TABLE if not family.num_frames and not family.edits}


@pytest.mark.slow
@pytest.mark.parametrize("name", IMAGES)
def test_every_family_of_images_is_reached_by_a_reward(name):
    family = IMAGES[name]
    module = family.module(replace(BRIGHT, extra_inputs=family.extra_inputs), LoRA(rank=2)).load()
    found = module(samples_of(family)[:2])
    gradients = torch.autograd.grad(found.sum(), module.trainable_parameters(), allow_unused=True)
    assert found.shape == (2,) and any(own is not None and own.any() for own in gradients)


# What is refused ------------------------------------------------------------------------------------------------------

REFUSED = {
    "no gradients": (
        {"reward": {"size": JpegSize()}},
        r"task.reward.size \(JpegSize\) has no gradients, .*clip_score, or train for it by reward.py task=reward/nft",
    ),
    "none": ({"reward": {}}, 'There is no reward: choose one or several, such as "reward@task.reward=clip_score"'),
    "no reward": ({"reward": {"size": "large"}}, "task.reward.size is 'large'; expected an option of the group reward"),
    "steps": ({"last_steps": 3, "random_ends": 2}, "reach beyond task.num_inference_steps=3; set it to at least 4"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_cannot_be_trained_are_refused(name):
    options, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        replace(BRIGHT, **options)


def test_a_training_of_another_model_is_refused(training_module):
    with pytest.raises(ValueError, match=r"name \['vae'\]; reward training trains dit alone"):
        training_module(replace(BRIGHT, trainable_models=["vae"]))


def test_a_model_of_videos_is_refused():
    family = next(own for own in TABLE if own.num_frames and not own.extra_inputs)
    with pytest.raises(ValueError, match="task=reward/refl scores images, but WanPipeline samples VideoMedia"):
        family.module(BRIGHT, LoRA(rank=2))


# Runs -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> list[str]:
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("red apple\nowl\na very old lighthouse\nrocket\n")
    return ["dataset=prompts", f"dataset.path={file}", "dataset.height=32", "dataset.width=32"]


RUN = ["task=reward/refl", "reward@task.reward=brightness", "task.num_inference_steps=2", "optimizer.lr=1e-2"]


def test_a_run_raises_the_reward_it_logs_and_is_the_same_from_a_cache(prompts, tmp_path):
    plain = tiny.train(tmp_path / "plain", *prompts, *RUN, "max_steps=4")
    rewards = [line["reward_brightness"] for line in tiny.metrics(plain) if "reward_brightness" in line]
    assert_close(rewards, [-loss for loss in losses(plain)], rtol=1e-5, atol=1e-7)
    assert rewards[-1] > rewards[0]
    tiny.make_cache(tmp_path / "cache", *prompts, *RUN[:2])
    cached = tiny.train(tmp_path / "two", "dataset=cache", f"dataset.path={tmp_path}/cache", *RUN, "max_steps=4")
    assert_close(losses(cached), losses(plain), rtol=1e-5, atol=1e-6)


def test_without_a_reward_or_with_one_without_gradients_no_weight_is_read(prompts, tmp_path, no_weights_are_read):
    for chosen, message in (("none", "There is no reward"), ("[brightness,jpeg_size]", "task.reward.jpeg_size .* no")):
        with pytest.raises(ValueError, match=message):
            tiny.train(tmp_path, *prompts, *RUN, f"reward@task.reward={chosen}")


@pytest.mark.slow
def test_a_run_is_planned(prompts, tmp_path):
    said = tiny.call("plan", tiny.compose("plan", "model=emoji", *prompts, *RUN, f"path={tmp_path}/plan"))
    assert "| train" in said


@pytest.mark.slow
def test_the_embedded_model_brightens_its_pictures_in_tens_of_steps(tmp_path):
    run_dir = tiny.run(
        [
            *("task=reward/refl", "reward@task.reward=brightness", "task.reward.brightness.target=0.3"),
            *("dataset=prompts", f"dataset.path={tiny.ROOT}/data/emoji/color_train.csv", "validation=base"),
            *("max_steps=20", "batch_size=4", "optimizer.lr=1e-3", "lr_scheduler=constant", "logger.every=1"),
            *("device=cpu", f"output_root={tmp_path}"),
        ]
    )
    rewards = [line["reward_brightness"] for line in tiny.metrics(run_dir) if "reward_brightness" in line]
    assert sum(rewards[-5:]) > 0.5 * sum(rewards[:5])  # both are below 0
