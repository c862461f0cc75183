"""Wan's text-to-video and TI2V-5B: noise levels, losses by hand, first frames, released sizes, bad input."""

import logging
from inspect import signature

import pytest
import released
import test_family_contract as contract
import torch
from diffusers import WanTransformer3DModel
from families import SIZES, Family
from miniatures import wan, wan_image
from miniatures.requests import GUIDED, LORA, image, sampled
from torch.testing import assert_close

from diffsynth.core.data import Row, Sample, SampleAddress
from diffsynth.core.data.operators.unread import Unread
from diffsynth.core.loader import ModelConfig
from diffsynth.diffusion.loss import FlowMatchSFT
from diffsynth.diffusion.pipeline.generation import warn_of_ignored
from diffsynth.diffusion.pipeline.video_media import VideoMedia
from diffsynth.diffusion.randomness import SampleRNG
from diffsynth.diffusion.template.rows import required_columns
from diffsynth.pipelines.wan import Wan22TI2VPipeline, WanPipeline, model_fn_wan, wan_sigmas

LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")
SETTINGS = SIZES | {"num_frames": 5, "max_sequence_length": wan.MAX_TOKENS}


class Continued(Family):
    """A family whose trainings give the first frame."""

    extra_inputs = property(lambda self: ["input_image"])


T2V = Family("wan21_t2v_1_3b", WanPipeline, wan.text_to_video, LAYERS, SETTINGS)
TI2V = Continued(
    "wan22_ti2v_5b",
    Wan22TI2VPipeline,
    wan_image.text_and_image_to_video,
    LAYERS,
    SETTINGS | {"takes_input_image": True},
)
GIVEN = FlowMatchSFT(extra_inputs=["input_image"])
CLIP = [image(number, (96, 64)) for number in range(5)]
REQUEST = GUIDED | {"height": 64, "width": 96, "input_image": CLIP[0]}


def sample(**columns) -> Sample:
    return Sample(Row({"video": CLIP, "prompt": "a red apple"} | columns), epoch=0, index=3)


# Sampling -------------------------------------------------------------------------------------------------------------


def test_noise_levels_are_the_originals():
    grid = [1.0, 0.9997998, 0.9375, 0.8333333, 0.625, 0.0099206, 0.0049801]
    weights = [0, 0.001281, 0.397952, 1.024862, 1.914043, 0.063499, 0.031879]
    released.assert_training_grid(WanPipeline, grid, weights)
    four = {3.0: [1, 0.9, 0.75, 0.5], 8.0: [1, 0.96, 0.888889, 0.727273], 16.0: [1, 0.979592, 0.941176, 0.842105]}
    for shift, levels in four.items():
        assert_close(wan_sigmas(4, sigma_shift=shift), torch.tensor(levels), atol=1e-6, rtol=0)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_latents_after_a_first_frame_are_those_that_diffusers_samples(guidance):
    requests = [REQUEST | {"cfg_scale": guidance, "prompt": prompt} for prompt in ("a red apple", "a line " * 9)]
    pipe = TI2V.load()
    shared, posi, nega = pipe.prepare(requests)
    with torch.no_grad():
        found = pipe.denoise(shared, posi, nega)
    assert (found[0] - found[1]).abs().max() > 1e-2
    theirs = wan_image.sampled_by_diffusers(TI2V.folder(), list(map(pipe.complete, requests)), shared["noise"])
    assert_close(found, theirs, atol=1e-4, rtol=0)
    assert_close(found[:, :, :1], shared["given_latents"], atol=1e-5, rtol=1e-5)
    without = [request | {"input_image": None} for request in requests]
    assert (sampled(pipe, *without) - found).abs().max() > 1e-2


def test_each_request_of_a_batch_continues_its_own_frame():
    pipe, requests = TI2V.load(), [REQUEST | {"input_image": CLIP[number], "seed": number} for number in (0, 1)]
    alone = torch.cat([sampled(pipe, request) for request in requests])
    assert_close(sampled(pipe, *requests), alone, atol=1e-5, rtol=1e-4)
    assert (alone[0, :, 0] - alone[1, :, 0]).abs().max() > 1e-2


@pytest.mark.parametrize("family", [T2V, TI2V], ids=str)
def test_the_first_frame_is_encoded_to_the_first_latent_frame_of_its_video(family):
    pipe = family.load()
    whole, first = (pipe.vae.encode(pipe.media.preprocess(v, pipe.device, torch.float32)) for v in (CLIP, CLIP[0]))
    assert whole.shape[2] == 2 and first.shape[2] == 1
    assert_close(first, whole[:, :, :1], atol=1e-6, rtol=1e-6)


def test_sides_that_are_no_multiples_of_32_are_rounded_with_a_warning(caplog):
    pipe, request = TI2V.build(), {"prompt": "", "height": 48, "width": 80, "num_frames": 6}
    whole = pipe.complete(request)
    assert (whole["height"], whole["width"], whole["num_frames"]) == (64, 96, 9)
    with caplog.at_level(logging.WARNING):
        warn_of_ignored(pipe, request, whole)
    assert "80 x 48 pixels" in caplog.text and "96 x 64 are sampled" in caplog.text and "9 frames" in caplog.text


# Training -------------------------------------------------------------------------------------------------------------


def velocity(dit, noisy, sigma, text):
    """The transformer's velocity at a noise level, as diffusers calls it."""
    return dit(noisy, 1000 * sigma, text, return_dict=False)[0]


def test_a_loss_is_the_one_by_hand():
    released.assert_loss_by_hand(T2V, lambda *at: velocity(*at[:3], at[3]["prompt_emb"]))


def test_a_loss_after_a_first_frame_is_that_of_the_later_frames_by_hand():
    pipe, rng = TI2V.load(), SampleRNG(0, [SampleAddress(0, 3)])
    _, text, _ = pipe.prepare([REQUEST])
    pipe.scheduler.set_timesteps(1000, training=True)
    clean = torch.randn(1, 48, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    found = FlowMatchSFT()(pipe, rng=rng, input_latents=clean, given_latents=clean[:, :, :1], **text)

    level, noise = int(1000 * rng.uniform("timestep")), rng.normal("noise", clean)
    sigma, weight = pipe.scheduler.sigmas[level], pipe.scheduler.training_weight(pipe.scheduler.timesteps)[level]
    noisy = (1 - sigma) * clean + sigma * noise
    noisy[:, :, 0] = clean[:, :, 0]
    times = 1000 * sigma * torch.tensor([0.0, 1.0, 1.0]).repeat_interleave(2 * 3)[None]
    predicted = pipe.dit(noisy, times, text["prompt_emb"], return_dict=False)[0]
    errors = (predicted - (noise - clean)).pow(2)
    assert_close(found, errors[:, :, 1:].mean()[None] * weight)


def test_with_a_probability_each_sample_is_trained_with_its_first_frame_or_without():
    pipe, addresses = TI2V.load(), [SampleAddress(0, number) for number in range(4)]
    _, text, _ = pipe.prepare([REQUEST] * 4)
    pipe.scheduler.set_timesteps(1000, training=True)
    clean = torch.randn(4, 48, 3, 4, 6, generator=torch.Generator().manual_seed(0))

    def losses(probability, given):
        inputs = {"input_latents": clean, "given_latents": given}
        return FlowMatchSFT(given_probability=probability)(pipe, rng=SampleRNG(0, addresses), **inputs, **text)

    is_given = SampleRNG(0, addresses).uniform("given") < 0.5
    assert 0 < is_given.sum() < 4
    given, without = losses(1.0, clean[:, :, :1]), losses(1.0, None)
    assert ((given - without).abs() > 1e-4).all()
    assert_close(losses(0.5, clean[:, :, :1]), torch.where(is_given, given, without))


def test_the_loss_has_no_gradient_by_the_first_frames_velocity(monkeypatch):
    module = TI2V.module(GIVEN, LORA).load()
    outputs = []
    module.pipe.dit.register_forward_hook(lambda *call: (call[-1][0].retain_grad(), outputs.append(call[-1][0]))[0])
    module([sample()]).mean().backward()
    (predicted,) = outputs
    assert predicted.grad[:, :, 0].abs().max() == 0 and predicted.grad[:, :, 1].abs().max() > 0


def test_a_first_frame_is_the_videos_unless_the_row_has_another():
    module = TI2V.module(GIVEN, LORA).load()
    with torch.no_grad():
        own, same, other = (
            module([row]) for row in (sample(), sample(input_image=CLIP[0]), sample(input_image=CLIP[3]))
        )
    assert torch.equal(own, same) and (own - other).abs() > 1e-5
    text_alone = TI2V.module(FlowMatchSFT(), LORA).load()
    assert (text_alone([sample()]) - own).abs() > 1e-5
    assert "FirstFrameEmbedder" not in {type(unit).__name__ for unit in text_alone.units}


def test_rows_need_no_column_that_follows_from_their_video():
    task = FlowMatchSFT(extra_inputs=["input_image", "end_image", "control_video"])
    assert required_columns(VideoMedia(), task, None) == ("video", "prompt", "control_video")
    whole = Unread((96, 64, 5), lambda: CLIP, lambda: ["a.mp4"])
    first, last = (VideoMedia().read({"video": whole}, column) for column in ("input_image", "end_image"))
    assert first.size == last.size == (96, 64) and first.identity != last.identity
    assert (first.load(), last.load()) == (CLIP[0], CLIP[4])


@pytest.mark.slow
@pytest.mark.parametrize(
    "statement",
    [
        "a_batch_has_the_mean_loss_and_gradient_of_its_samples",
        "gradients_reach_all_that_is_trained_and_nothing_else",
        "checkpointing_changes_nothing",
        "weights_in_8_bits_change_the_loss_little",
    ],
)
def test_trainings_after_a_first_frame_are_those_of_any_family(statement):
    test = getattr(contract, f"test_{statement}")
    test(TI2V, *([(), LORA] if "trained" in signature(test).parameters else []))


# Released models ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "repository, count",
    [
        ("Wan2.1-T2V-1.3B-Diffusers", 1.419e9),
        ("Wan2.1-T2V-14B-Diffusers", 14.288e9),
        ("Wan2.1-I2V-14B-480P-Diffusers", 16.395e9),
        ("Wan2.1-FLF2V-14B-720P-diffusers", 16.396e9),
        ("Wan2.2-TI2V-5B-Diffusers", 5.000e9),
    ],
)
def test_released_networks_have_their_parameters(repository, count):
    assert released.parameters(f"Wan-AI/{repository}") == pytest.approx(count, abs=1e6)


def test_the_released_autoencoders_have_their_parameters():
    assert released.parameters("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "vae") == pytest.approx(0.127e9, abs=1e6)
    assert released.parameters("Wan-AI/Wan2.2-TI2V-5B-Diffusers", "vae") == pytest.approx(0.705e9, abs=1e6)


@pytest.mark.slow
@pytest.mark.parametrize("heads, ffn, channels", [(12, 8960, 16), (24, 14336, 48)], ids=["1.3B", "5B"])
def test_a_block_of_the_released_width_has_diffusers_velocity(heads, ffn, channels):
    sizes = {"num_attention_heads": heads, "ffn_dim": ffn, "num_layers": 1, "text_dim": 4096}
    dit = released.with_random_weights(WanTransformer3DModel, **sizes, in_channels=channels, out_channels=channels)
    dit.rope = type(dit.rope)(128, (1, 2, 2), 1024)  # its tables are no parameters
    latents, text, times = torch.randn(2, channels, 3, 4, 6), torch.randn(2, 9, 4096), torch.tensor([500.0, 250.0])
    assert_close(model_fn_wan(dit, latents, times, text), velocity(dit, latents, times / 1000, text))
    given = torch.randn(2, channels, 1, 4, 6)
    by_token = times[:, None] * torch.tensor([0.0, 1.0, 1.0]).repeat_interleave(6)
    theirs = velocity(dit, torch.cat([given, latents[:, :, 1:]], dim=2), by_token / 1000, text)
    assert_close(model_fn_wan(dit, latents, times, text, given)[:, :, 1:], theirs[:, :, 1:])


# Bad input ------------------------------------------------------------------------------------------------------------


def test_a_model_of_text_alone_refuses_a_first_frame():
    pipe = T2V.build()
    with pytest.raises(ValueError, match="input_image is given, but model.takes_input_image is false.*wan22_ti2v_5b"):
        pipe.prepare([REQUEST])
    with pytest.raises(ValueError, match="task.extra_inputs names input_image, but model.takes_input_image is false"):
        T2V.module(GIVEN, LORA).load()


@pytest.mark.parametrize(
    "given, message", [("a.png", "input_image is or holds 'a.png'"), (CLIP, "input_image holds 5 images, expected one")]
)
def test_a_first_frame_that_is_no_image_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        TI2V.load().prepare([REQUEST | {"input_image": given}])


@pytest.mark.parametrize(
    "family, other, part, message",
    [
        (
            T2V,
            TI2V,
            "transformer",
            "reads 48 channels and predicts 48, expected 16 and 16; take model=wan22_ti2v_5b",
        ),
        (TI2V, T2V, "transformer", "reads 16 channels and predicts 16, expected 48 and 48; take model=wan21_t2v_1_3b"),
        (T2V, TI2V, "vae", "vae makes latents of 48 channels, but dit reads 16"),
        (TI2V, T2V, "vae", "vae makes latents of 16 channels, but dit reads 48"),
    ],
)
def test_networks_of_neighbouring_models_are_refused_before_weights_are_read(family, other, part, message):
    name = {"transformer": "dit"}.get(part, part)
    parts = {n: ModelConfig(path=str(family.folder() / folder)) for n, folder in family.parts.items()}
    parts[name] = ModelConfig(path=str(other.folder() / part))
    with pytest.raises(ValueError, match=message):
        family.pipeline.from_components(**parts)
