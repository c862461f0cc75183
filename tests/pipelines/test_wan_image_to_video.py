"""Wan's image-to-video: latents as diffusers samples them, what the transformer reads, trainings, bad input."""

import pytest
import torch
from families import SIZES, Family
from miniatures import wan_image
from test_family_contract import GUIDED, image, sampled
from torch.testing import assert_close

from diffsynth.pipelines.wan_image_to_video import WanImageToVideoPipeline

LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")
SETTINGS = SIZES | {"num_frames": 5}
I2V = Family(
    "wan22_i2v", WanImageToVideoPipeline, wan_image.image_to_video, LAYERS, SETTINGS | {"max_sequence_length": 24}
)
CLIP_I2V = Family(
    "wan21_i2v_14b_480p",
    WanImageToVideoPipeline,
    wan_image.image_to_video_with_clip,
    LAYERS,
    SETTINGS,
    parts=wan_image.CLIP_PARTS,
)
FLF2V = Family(
    "wan21_flf2v_14b_720p",
    WanImageToVideoPipeline,
    wan_image.first_and_last_frame,
    LAYERS,
    SETTINGS,
    parts=wan_image.CLIP_PARTS,
)
FIRST, LAST = image(0, (48, 48)), image(1, (48, 48))
SQUARE = GUIDED | {"height": 48, "width": 48, "num_frames": 5, "input_image": FIRST}


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize(
    "family, frames",
    [(I2V, {}), (I2V, {"end_image": LAST}), (CLIP_I2V, {}), (FLF2V, {"end_image": LAST})],
    ids=["first frame", "first and last frame", "CLIP", "CLIP of both"],
)
def test_latents_are_those_that_diffusers_samples(family, frames, guidance):
    requests = [SQUARE | frames | {"cfg_scale": guidance, "prompt": p} for p in ("a red apple", "a line " * 9)]
    pipe = family.load()
    shared, posi, nega = pipe.prepare(requests)
    with torch.no_grad():
        found = pipe.denoise(shared, posi, nega)
    assert (found[0] - found[1]).abs().max() > 1e-2
    theirs = wan_image.sampled_by_diffusers(family.folder(), list(map(pipe.complete, requests)), shared["noise"])
    print("largest difference", family, guidance, (found - theirs).abs().max().item())
    assert_close(found, theirs, atol=1e-4, rtol=0)
    for change in ({"input_image": image(2, (48, 48))}, *[{"end_image": image(3, (48, 48))}] * bool(frames)):
        assert (sampled(pipe, *[request | change for request in requests]) - found).abs().max() > 1e-3
