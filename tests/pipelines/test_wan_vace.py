"""VACE: its context, references, what is trained of it, the released sizes, bad input."""

from dataclasses import replace

import numpy as np
import pytest
import released
import torch
from diffusers import WanVACETransformer3DModel
from families import FAMILIES
from miniatures import wan_vace
from miniatures.requests import REQUEST, made, sampled
from PIL import Image
from torch.testing import assert_close

from diffsynth.core.data import Row, Sample
from diffsynth.diffusion.loss import FlowMatchSFT
from diffsynth.diffusion.training_module import PipelineTrainingModule
from diffsynth.pipelines.wan_vace import mask_channels, model_fn_wan_vace, on_white

FAMILY = next(family for family in FAMILIES if family.name == "wan21_vace_1_3b")
VIDEO = made(FAMILY)
MASK = [Image.fromarray(np.uint8(255 * (np.indices((48, 32)).sum(0) % 2))) for _ in VIDEO]
PICTURE = VIDEO[0]


def compared(request: dict) -> float:
    """The largest difference of our latents and those of diffusers."""
    pipe = FAMILY.load()
    noise = pipe.prepare([request])[0]["noise"]
    of_diffusers = dict(request)
    if "vace_video_mask" in request:
        of_diffusers["vace_video_mask"] = [frame.convert("RGB") for frame in request["vace_video_mask"]]
    expected = wan_vace.sampled_by_diffusers([{"negative_prompt": "", **of_diffusers}], noise)
    return (sampled(pipe, request) - expected).abs().max().item()


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"vace_video": VIDEO},
        {"vace_video": VIDEO, "vace_video_mask": MASK},
        {"vace_reference_image": PICTURE},
        {"vace_video": VIDEO, "vace_video_mask": MASK, "vace_reference_image": PICTURE, "vace_scale": 0.5},
    ],
    ids=lambda given: "+".join(given) or "text",
)
def test_latents_are_those_that_diffusers_samples(given):
    assert compared(REQUEST | given) < 1e-5


def test_a_mask_keeps_its_pixels_in_the_order_of_rows_and_columns():
    mask = torch.arange(5 * 16 * 24, dtype=torch.float32).view(1, 1, 5, 16, 24)
    found = mask_channels(mask, 8, 2)
    assert found.shape == (1, 64, 2, 2, 3)
    for row, column, across, down in ((0, 0, 0, 0), (3, 5, 2, 1), (7, 7, 1, 0)):
        expected = mask[0, 0, 1, 8 * down + row, 8 * across + column]  # nearest-exact takes frames 1 and 3 of 5
        assert found[0, 8 * row + column, 0, down, across] == expected


def test_references_stand_in_front_of_the_frames_and_are_cut_off_again():
    pipe = FAMILY.load()
    alone = pipe.prepare([REQUEST | {"vace_video": VIDEO}])[0]
    two = REQUEST | {"vace_video": VIDEO, "vace_reference_image": [PICTURE, VIDEO[1]]}
    shared = pipe.prepare([two])[0]
    first = pipe.vae.encode(pipe.media.preprocess(PICTURE, pipe.device, pipe.torch_dtype))
    assert_close(shared["vace_context"][:, :16, :1], first)
    assert shared["vace_context"][:, 16:, :2].abs().max() == 0
    assert_close(shared["vace_context"][:, :, 2:], alone["vace_context"])
    assert len(pipe.generate([two | {"num_inference_steps": 1}])[0]) == FAMILY.num_frames


def test_a_reference_is_fitted_whole_into_white():
    found = np.asarray(on_white(Image.new("RGB", (20, 10), "black"), 40, 40))
    assert (found[:10] == 255).all() and (found[30:] == 255).all() and (found[10:30] == 0).all()


def test_full_training_trains_vaces_own_blocks():

    pipe = FAMILY.build()
    pipe.training_defaults = replace(
        pipe.training_defaults, full_models=["dit.vace_blocks", "dit.vace_patch_embedding"]
    )

    module = PipelineTrainingModule(pipe, FlowMatchSFT(extra_inputs=["vace_video"])).load()
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert {name.split(".")[2] for name in trained} == {"vace_blocks", "vace_patch_embedding"}
    module([Sample(Row({"video": VIDEO, "vace_video": VIDEO, "prompt": "a"}), 0, 0)]).mean().backward()
    moved = {n for n, p in module.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert moved == trained


@pytest.mark.parametrize("repository, count", [("1.3B", 2.154e9), ("14B", 17.338e9)])
def test_the_released_networks_have_their_parameters(repository, count):
    assert released.parameters(f"Wan-AI/Wan2.1-VACE-{repository}-diffusers") == pytest.approx(count, abs=5e6)


@pytest.mark.slow
def test_a_block_of_the_released_width_has_diffusers_velocity():
    sizes = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 1}
    dit = released.with_random_weights(WanVACETransformer3DModel, **sizes, vace_layers=[0])
    noise, text, context = torch.randn(2, 16, 3, 4, 6), torch.randn(2, 9, 4096), torch.randn(2, 96, 3, 4, 6)
    time = torch.tensor([500.0, 250.0])
    found = model_fn_wan_vace(dit, noise, time, text, context, 0.5)
    expected = dit(noise, time, text, None, context, torch.tensor([0.5]), return_dict=False)[0]
    assert_close(found, expected)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"vace_video_mask": MASK}, "vace_video_mask is given without vace_video, of which it masks a part; give both"),
        ({"vace_video": VIDEO[:3]}, "vace_video has 3 frames, expected at least num_frames=5"),
        ({"vace_video": ["a.mp4"]}, "vace_video is or holds 'a.mp4', expected images"),
        ({"input_image": PICTURE}, "input_image is given, but model.takes_input_image is false"),
    ],
)
def test_what_cannot_be_sampled_is_named(given, message):
    with pytest.raises(ValueError, match=message):
        FAMILY.load().prepare([REQUEST | given])
