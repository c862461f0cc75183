"""FLUX.3 klein: noise levels, text windows, editing, the distilled flow map, names in files, the released size."""

from dataclasses import replace
from pathlib import Path

import pytest
import released
import tiny
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_flux3_lora_to_diffusers
from families import FAMILIES
from miniatures import flux3, sd3
from miniatures.requests import GUIDED, REQUEST, image, sampled, samples
from torch.testing import assert_close

from diffsynth.core.sharing import together
from diffsynth.pipelines.flux3_image import flux3_sigmas

BASE = next(family for family in FAMILIES if family.name == "flux3_klein_base")
DISTILLED = replace(BASE, name="flux3_klein", folder=flux3.distilled)
LONG = GUIDED | {"prompt": "a red apple on a table beside a green one, " * 8}


def compared(family, folder: Path, *requests: dict):
    """The latents of some requests, ours and those of diffusers' blocks."""
    pipe = family.load()
    shared, posi, nega = pipe.prepare(requests)
    with torch.no_grad():
        return pipe.denoise(shared, posi, nega), flux3.sampled_by_diffusers(list(requests), shared["noise"], folder)


def test_noise_levels_are_those_of_the_released_scheduler():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=6.93)
    for steps in (1, 16, 50):
        scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist())
        assert_close(flux3_sigmas(steps), scheduler.sigmas[:-1], atol=2e-7, rtol=0)
    grid = [1, 0.9998556, 0.9541074, 0.8738966, 0.6978852, 0.0136975, 0.0068891]
    weights = [0, 0.001039, 0.329385, 0.887431, 1.887755, 0.098569, 0.049585]
    released.assert_training_grid(BASE.pipeline, grid, weights)


@pytest.mark.slow
def test_prompts_of_different_windows_are_sampled_as_if_alone_and_as_diffusers_does():
    found, expected = compared(BASE, flux3.base(), GUIDED, LONG, GUIDED | {"prompt": "a tiger"})
    assert_close(found, expected, atol=1e-4, rtol=0)
    pipe = BASE.load()
    lengths = [pipe.prepare([request])[1]["prompt_emb_lengths"] for request in (GUIDED, LONG)]
    assert lengths == [[[80]], [[160]]]
    with together(2), pytest.raises(ValueError, match=r"have \[80, 160\] tokens; .* set micro_batch_size=1"):
        sampled(pipe, GUIDED, LONG)


@pytest.mark.parametrize("images", tiny.mostly_slow([[(70, 40)], [(70, 40), (64, 64)]], [(70, 40)]))
def test_edit_images_of_any_size_are_prepared_as_diffusers_does(images):
    request = REQUEST | {"edit_image": [image(number, size) for number, size in enumerate(images)]}
    found, expected = compared(BASE, flux3.base(), request | {"negative_prompt": ""})
    assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_the_distilled_network_reads_where_each_step_ends_as_diffusers_tells_it():
    request = REQUEST | {"num_inference_steps": 4, "negative_prompt": ""}
    found, expected = compared(DISTILLED, flux3.distilled(), request, request | {"seed": 2, "prompt": "a tiger"})
    assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_in_training_the_distilled_network_reads_the_level_itself_as_the_end():
    module, seen = DISTILLED.module(lora=None, task=DISTILLED.task("dit")).load(), {}
    module.pipe.dit.register_forward_pre_hook(lambda _, __, inputs: seen.update(inputs), with_kwargs=True)
    module(samples(DISTILLED)).mean().backward()
    assert torch.equal(seen["timestep"], seen["target_timestep"])
    assert module.pipe.dit.target_timestep_embedder.linear_1.weight.grad.any()


@pytest.mark.slow
def test_the_distilled_network_is_sampled_by_euler_only():
    with pytest.raises(ValueError, match="sampler is 'heun', but the distilled FLUX.3 reads where an Euler step ends"):
        DISTILLED.build().prepare([REQUEST | {"sampler": "heun"}])


@pytest.mark.slow
def test_a_prompt_is_cut_off_at_max_sequence_length():
    pipe = replace(BASE, settings=BASE.settings | {"max_sequence_length": 24}).build()
    assert pipe.cuts_off("red " * 25) and not pipe.cuts_off("red")


@pytest.mark.slow
def test_a_transformer_of_another_family_is_refused_before_weights_are_read(no_weights_are_read):
    with pytest.raises(ValueError, match="no place for a SD3Transformer2DModel"):
        released.with_part(BASE, "dit", sd3.medium() / "transformer").load()


def test_a_text_encoder_of_another_width_is_refused_before_weights_are_read(no_weights_are_read, tmp_path):
    with pytest.raises(ValueError, match="text embeddings of width 99, but text_encoder makes 256"):
        released.with_config(BASE, "dit", tmp_path, joint_attention_dim=99).load()


def test_names_of_the_original_code_mean_what_diffusers_converter_makes_of_them():
    pipe = BASE.build()
    for name, layers in pipe.layer_names("dit").original.items():
        (key,) = _convert_non_diffusers_flux3_lora_to_diffusers({f"diffusion_model.{name.replace('*', '0')}.x": 0})
        assert key == f"transformer.{layers.replace('*', '0')}.x"
        assert pipe.dit.get_submodule(layers.replace("*", "0"))


@pytest.mark.slow
@pytest.mark.parametrize("variant, billions", [("klein-base", 5.538), ("klein", 5.549)])
def test_the_released_network_has_its_parameters(variant, billions):
    assert released.parameters(f"black-forest-labs/flux-3-image-{variant}") == pytest.approx(billions * 1e9, abs=5e5)
