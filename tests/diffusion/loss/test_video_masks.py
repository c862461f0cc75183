"""A loss that counts only where a mask of a video is white."""

import numpy as np
import pytest
import torch
from families import FAMILIES
from miniatures.requests import samples, shaken
from PIL import Image
from torch.testing import assert_close

from diffsynth.core.data.dataset import Row
from diffsynth.diffusion.adapters.lora import LoRA
from diffsynth.diffusion.loss import FlowMatchSFT

MASKED = FlowMatchSFT(extra_inputs=["loss_mask"])
WAN, TI2V = (next(family for family in FAMILIES if family.name == name) for name in ("wan21_t2v_1_3b", "wan22_ti2v_5b"))


@pytest.fixture(scope="module")
def module():
    return shaken(WAN.module(MASKED, LoRA(rank=2)).load())


def grey(level: int, size: tuple[int, int]) -> Image.Image:
    return Image.new("L", size, level)


def with_mask(sample, mask):
    return sample._replace(data=Row({**sample.data, "loss_mask": mask}))


def losses(module, rows) -> torch.Tensor:
    with torch.no_grad():
        return module(rows)


def clip_like(sample, *levels: int) -> list[Image.Image]:
    return [grey(level, sample.data["video"][0].size) for level in levels]


def test_a_white_mask_changes_nothing(module):
    rows = samples(WAN)
    plain = losses(shaken(WAN.module(FlowMatchSFT(), LoRA(rank=2)).load()), rows)
    for mask in (lambda row: clip_like(row, *[255] * 5), lambda row: clip_like(row, 255)[0]):
        assert_close(losses(module, [with_mask(row, mask(row)) for row in rows]), plain, atol=1e-5, rtol=1e-5)


def test_frames_are_weighed_by_the_latent_frame_that_they_are_in(module):
    """The first is a latent frame, and the mean of the next four another: their losses add up to that of both."""
    (row, *_) = samples(WAN)
    first, later, both, half = (
        losses(module, [with_mask(row, clip_like(row, *levels))])
        for levels in ([255, 0, 0, 0, 0], [0] + [255] * 4, [255] * 5, [255, 255, 255, 0, 0])
    )
    assert (first - later).abs().item() > 1e-3
    assert_close((first + later) / 2, both, atol=1e-5, rtol=1e-5)
    assert_close((first + later / 2) / 1.5, half, atol=1e-5, rtol=1e-5)


def test_masks_of_a_batch_are_those_of_its_samples(module):
    rows = [
        with_mask(row, clip_like(row, 255, *[0] * 4) if number else clip_like(row, 255)[0])
        for number, row in enumerate(samples(WAN)[:2])
    ]
    alone = torch.cat([losses(module, [row]) for row in rows])
    assert_close(losses(module, rows), alone, atol=1e-5, rtol=1e-5)


def test_a_part_of_a_frame_is_the_loss_of_that_part(module):
    (row, *_) = samples(WAN)
    width, height = row.data["video"][0].size
    left = np.zeros((height, width), np.uint8)
    left[:, : width // 2] = 255
    parts = [Image.fromarray(left), Image.fromarray(255 - left)]
    found = [losses(module, [with_mask(row, part)]) for part in parts]
    assert_close(sum(found) / 2, losses(module, [with_mask(row, grey(255, (width, height)))]), atol=1e-5, rtol=1e-5)


def test_a_given_first_frame_is_not_learned_whatever_its_mask():
    module = shaken(TI2V.module(FlowMatchSFT(extra_inputs=["input_image", "loss_mask"]), LoRA(rank=2)).load())
    (row, *_) = samples(TI2V)
    white, later = (losses(module, [with_mask(row, clip_like(row, level, *[255] * 4))]) for level in (255, 0))
    assert_close(white, later)


@pytest.mark.parametrize(
    "mask, message",
    [
        (lambda row: clip_like(row, 255, 255), "sample 10 .*: loss_mask has 2 frames, but its video 5; give a clip"),
        (lambda row: grey(255, (16, 16)), "sample 10 .*: loss_mask is 16 x 16 pixels and its video 32 x 48"),
        (lambda row: clip_like(row, *[0] * 5), "sample 10 .*: loss_mask is black all over"),
    ],
)
def test_masks_that_do_not_fit_are_named(module, mask, message):
    (row, *_) = samples(WAN)
    with pytest.raises(ValueError, match=message):
        losses(module, [with_mask(row, mask(row))])
