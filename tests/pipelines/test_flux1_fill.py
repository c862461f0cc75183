"""FLUX.1 Fill: what it reads beside noisy latents, what it samples and trains."""

import inspect

import pytest
import test_family_contract as contract
import torch
from families import FLUX1_LAYERS, SIZES, Family
from miniatures import flux1
from miniatures.requests import LORA, REQUEST, gradients, image, sampled, samples, shaken
from PIL import Image
from torch.testing import assert_close

from diffsynth.core.data import Row
from diffsynth.diffusion.loss import FlowMatchSFT
from diffsynth.pipelines.flux1_fill import Flux1FillPipeline, white_pixels

meta_has_autocast = contract.meta_has_autocast  # a fixture of a statement below
FILL = Family(
    "flux1_fill",
    Flux1FillPipeline,
    flux1.fill,
    FLUX1_LAYERS,
    SIZES | {"max_sequence_length": flux1.MAX_TOKENS},
    parts=flux1.PARTS,
)


def mask(bottom: int) -> Image.Image:
    """White from a row on."""
    made = Image.new("L", (32, 48), 0)
    made.paste(255, (0, bottom, 32, 48))
    return made


def test_latents_are_those_that_diffusers_samples():
    pipe = FILL.load()
    requests = [REQUEST | {"input_image": image(0), "inpaint_mask": mask(19), "prompt": p} for p in ("a red", "a line")]
    shared, posi, nega = pipe.prepare(requests)
    with torch.no_grad():
        found = pipe.denoise(shared, posi, nega)
    assert_close(found, flux1.sampled_by_fill(requests, shared["noise"]), atol=1e-4, rtol=0)
    whole = [request | {"inpaint_mask": mask(0)} for request in requests]
    assert_close(sampled(pipe, *whole), sampled(pipe, *[REQUEST | {"prompt": r["prompt"]} for r in requests]))
    assert (sampled(pipe, *whole) - found).abs().max() > 1e-2


@pytest.mark.slow
def test_masks_of_a_training_reach_the_loss_and_a_batch_is_its_samples():
    module = shaken(FILL.module(FlowMatchSFT(extra_inputs=["inpaint_mask"]), LORA).load(), 0.01)
    batch = [
        sample._replace(data=Row({**sample.data, "inpaint_mask": mask(16 * number)}))
        for number, sample in enumerate(samples(FILL))
    ]
    losses, gradient = gradients(module, [batch])
    alone, mean = gradients(module, [[sample] for sample in batch])
    assert_close(losses, alone, atol=1e-5, rtol=1e-5)
    assert_close(gradient, mean, atol=1e-5, rtol=1e-3)
    without, _ = gradients(shaken(FILL.module(lora=LORA).load(), 0.01), [samples(FILL)])
    assert ((losses - without).abs() > 1e-5).tolist() == [False, True, True]  # the first mask is white all over


def test_the_networks_of_fill_and_of_the_others_do_not_stand_for_each_other():
    with pytest.raises(ValueError, match="reads 384 channels a token, expected 64: take model=flux1_fill"):
        Family("", Flux1FillPipeline.__base__, flux1.fill, (), FILL.settings, parts=flux1.PARTS).build()
    with pytest.raises(ValueError, match="reads 64 channels a token, expected 384: take model=flux1_fill"):
        Family("", Flux1FillPipeline, flux1.dev, (), FILL.settings, parts=flux1.PARTS).build()


meta_has_autocast = contract.meta_has_autocast


@pytest.mark.slow
@pytest.mark.parametrize(
    "statement",
    [
        "requests_of_a_batch_are_sampled_as_if_alone",
        "prompt_guidance_and_seed_decide_what_is_sampled",
        "weights_in_8_bits_change_the_loss_little",
        "a_micro_batch_reads_no_value_from_its_device_and_sends_without_waiting",
        "an_adapter_is_saved_and_loads_with_what_it_changes",
        "a_run_trains_evaluates_exports_and_resumes",
        "a_run_is_planned",
    ],
)
def test_statements_of_the_contract_that_give_no_image_hold(statement, request):
    test = getattr(contract, f"test_{statement}")
    fixtures = [name for name in inspect.signature(test).parameters if name != "family"]
    test(FILL, *map(request.getfixturevalue, fixtures))


def test_a_grey_is_white_from_128_on():
    greys = [white_pixels(Image.new("L", (8, 8), grey), 8, 8) for grey in (127, 128)]
    assert not greys[0].any() and greys[1].all()
