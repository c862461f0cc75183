"""Wan's text-to-video and TI2V-5B: noise levels, a loss by hand, first frames, released sizes, bad input."""

import pytest
import released
import torch
from families import SIZES, Family
from miniatures import wan, wan_image
from test_family_contract import GUIDED, image, sampled
from torch.testing import assert_close

from diffsynth.pipelines.wan import Wan22TI2VPipeline, WanPipeline, wan_sigmas

LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")
SETTINGS = SIZES | {"num_frames": 5, "max_sequence_length": wan.MAX_TOKENS}
T2V = Family("wan21_t2v_1_3b", WanPipeline, wan.text_to_video, LAYERS, SETTINGS)
TI2V = Family(
    "wan22_ti2v_5b",
    Wan22TI2VPipeline,
    wan_image.text_and_image_to_video,
    LAYERS,
    SETTINGS | {"takes_input_image": True},
)
WIDE = {"height": 64, "width": 96}  # sides that TI2V-5B need not round
FRAME = image(0, (96, 64))
CLIP = [image(number, (96, 64)) for number in range(5)]


def test_noise_levels_are_the_originals():
    grid = [1.0, 0.9997998, 0.9375, 0.8333333, 0.625, 0.0099206, 0.0049801]
    weights = [0, 0.001281, 0.397952, 1.024862, 1.914043, 0.063499, 0.031879]
    released.assert_training_grid(WanPipeline, grid, weights)
    four = {3.0: [1, 0.9, 0.75, 0.5], 8.0: [1, 0.96, 0.888889, 0.727273], 16.0: [1, 0.979592, 0.941176, 0.842105]}
    for shift, levels in four.items():
        assert_close(wan_sigmas(4, sigma_shift=shift), torch.tensor(levels), atol=1e-6, rtol=0)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_latents_after_a_first_frame_are_those_that_diffusers_samples(guidance):
    requests = [
        GUIDED | WIDE | {"cfg_scale": guidance, "prompt": prompt, "input_image": FRAME, "num_frames": 5}
        for prompt in ("a red apple", "a line " * 9)
    ]
    pipe = TI2V.load()
    shared, posi, nega = pipe.prepare(requests)
    with torch.no_grad():
        found = pipe.denoise(shared, posi, nega)
    assert (found[0] - found[1]).abs().max() > 1e-2
    theirs = wan_image.sampled_by_diffusers(TI2V.folder(), requests, shared["noise"])
    print("largest difference", guidance, (found - theirs).abs().max().item())
    assert_close(found, theirs, atol=1e-4, rtol=0)
    assert_close(found[:, :, :1], shared["given_latents"], atol=1e-5, rtol=1e-5)
    without = [{name: value for name, value in request.items() if name != "input_image"} for request in requests]
    assert (sampled(pipe, *without) - found).abs().max() > 1e-2
