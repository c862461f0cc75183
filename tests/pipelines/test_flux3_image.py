"""FLUX.3 klein: noise levels, text windows, editing, the distilled flow map, names in files, the released size."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux3Transformer2DModel
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_flux3_lora_to_diffusers
from families import FAMILIES
from miniatures import flux3, sd3
from test_family_contract import GUIDED, REQUEST, image, sampled, samples
from torch.testing import assert_close

from diffsynth.core.sharing import together
from diffsynth.diffusion.flow_match import FlowMatchScheduler
from diffsynth.pipelines.flux3_image import flux3_sigmas

ARCHITECTURE = Path(__file__).parents[2] / "diffsynth" / "plan" / "architectures" / "flux3_klein.json"
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
    grid = FlowMatchScheduler(flux3_sigmas)
    grid.set_timesteps(1000, training=True)
    where = [0, 1, 250, 500, 750, 998, 999]
    expected = torch.tensor([1, 0.9998556, 0.9541074, 0.8738966, 0.6978852, 0.0136975, 0.0068891])
    assert_close(grid.sigmas[where], expected, atol=1e-6, rtol=0)
    weights = torch.tensor([0, 0.001039, 0.329385, 0.887431, 1.887755, 0.098569, 0.049585])
    assert_close(grid.training_weight(grid.timesteps[where]), weights, atol=2e-6, rtol=0)


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
def test_what_does_not_fit_is_refused_before_weights_are_read():
    with pytest.raises(ValueError, match="sampler is 'heun', but the distilled FLUX.3 reads where an Euler step ends"):
        DISTILLED.build().prepare([REQUEST | {"sampler": "heun"}])
    with pytest.raises(ValueError, match="no place for a SD3Transformer2DModel"):
        replace(BASE, parts=BASE.parts | {"dit": str(sd3.medium() / "transformer")}).build()
    pipe = replace(BASE, settings=BASE.settings | {"max_sequence_length": 24}).build()
    assert pipe.cuts_off("red " * 25) and not pipe.cuts_off("red")
    pipe.dit.register_to_config(joint_attention_dim=99)
    with pytest.raises(ValueError, match="text embeddings of width 99, but text_encoder makes 256"):
        pipe.check_networks()


def test_names_of_the_original_code_mean_what_diffusers_converter_makes_of_them():
    pipe = BASE.build()
    for name, layers in pipe.layer_names("dit").original.items():
        (key,) = _convert_non_diffusers_flux3_lora_to_diffusers({f"diffusion_model.{name.replace('*', '0')}.x": 0})
        assert key == f"transformer.{layers.replace('*', '0')}.x"
        assert pipe.dit.get_submodule(layers.replace("*", "0"))


@pytest.mark.slow
@pytest.mark.parametrize("flow_map, parameters", [(False, 5.538), (True, 5.549)])
def test_the_number_of_parameters_is_the_released_one(flow_map, parameters):
    config = json.loads(ARCHITECTURE.read_text())["components"]["transformer"]
    with torch.device("meta"):
        dit = Flux3Transformer2DModel.from_config(config | {"flow_map": flow_map})
    assert round(sum(p.numel() for p in dit.parameters()) / 1e9, 3) == parameters
