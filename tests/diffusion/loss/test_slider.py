"""Concept sliders: the loss by hand, the prompts of a row, and what the scale of the adapter does."""

from dataclasses import replace
from itertools import combinations

import pytest
import tiny
import torch
from families import FAMILIES as TABLE
from miniatures.requests import samples as samples_of
from resumed import assert_same_run, losses, uninterrupted
from safetensors.torch import save_file
from test_distillation import ADAPTED, DEFAULTS, FAMILIES, ROW
from torch.testing import assert_close

from diffsynth.core.data import Row, Sample
from diffsynth.core.loader import ModelConfig
from diffsynth.diffusion.adapters.lora import LoRA
from diffsynth.diffusion.flow_match import interpolate
from diffsynth.diffusion.loss import ConceptSlider
from diffsynth.diffusion.loss.slider import NEGATIVE, POSITIVE
from diffsynth.diffusion.pipeline.units import PipelineUnit
from diffsynth.diffusion.randomness import SampleRNG
from diffsynth.diffusion.training_module import PipelineTrainingModule

LORA = LoRA(rank=2, target_modules=["to_q", "to_k"])
PROMPTS = {"positive": "a color emoji of {prompt}", "negative": "a line emoji of {prompt}, black on white"}
FROM_IMAGES = ConceptSlider(**PROMPTS, target="an emoji of {prompt}", strength=1.5, num_inference_steps=None)
FROM_PROMPTS = ConceptSlider(**PROMPTS, strength=1.5, num_inference_steps=3)


def embedded(pipe, prompt: str) -> dict:
    """The network's inputs for one prompt."""
    tokens = {name: tensor for name, tensor in pipe.tokenize(prompt).items()}
    text = pipe.text_encoder(**tokens, output_hidden_states=True).hidden_states[-1][:, 34:]
    return {"prompt_emb": text, "prompt_emb_mask": None}


def by_hand(module, sample, base) -> torch.Tensor:
    """mean ‖v_θ(x_t, c) - (v(x_t, c) + η (v(x_t, c₊) - v(x_t, c₋)))‖², x_t a noised image or on the base's path.

    Args:
        base: A pipeline without adapters.
    """
    task, row = module.task, sample.data
    rng = SampleRNG(module.seed, [(sample.epoch, sample.index)])
    prompts = [text.replace("{prompt}", row["prompt"]) for text in (task.target, task.positive, task.negative)]
    with torch.no_grad():
        asked = [embedded(base, prompt) for prompt in prompts]
        if task.num_inference_steps is None:
            sigma = task.timesteps(module.pipe.scheduler, rng.uniform("timestep"))
            pixels = base.preprocess_image(row["image"])
            clean = base.vae.encode(pixels)
            latents = interpolate(clean, rng.normal("noise", clean), sigma)
        else:
            request = {"height": row["image"].height, "width": row["image"].width}
            with base.sampling_steps({**request, "num_inference_steps": 3}) as scheduler:
                count = int(rng.uniform("timestep") * 3)
                latents = rng.normal("noise", torch.empty(1, 16, row["image"].height // 8, row["image"].width // 8))
                for step in range(count):
                    velocity = base.predict(scheduler.timesteps[step : step + 1], latents=latents, **asked[0])
                    latents = scheduler.step(velocity, step, latents)
                sigma = scheduler.sigmas[count : count + 1]
        kept, positive, negative = (base.predict(sigma * 1000, latents=latents, **inputs) for inputs in asked)
    moved = module.pipe.predict(sigma * 1000, latents=latents, **asked[0])
    return (moved - (kept + 1.5 * (positive - negative))).pow(2).mean()


def shaken(module):
    """A module whose adapter changes the velocity."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.trainable_parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return module


KINDS = {"images": FROM_IMAGES, "prompts": FROM_PROMPTS}


@pytest.mark.parametrize("kind", tiny.mostly_slow(KINDS, "prompts"))
def test_the_loss_and_its_gradient_are_their_formula(kind, training_module, load_pipe, tiny, samples):
    module, base = shaken(training_module(KINDS[kind], LORA)), load_pipe(tiny)
    samples = [sample._replace(index=number) for number, sample in enumerate(samples)]
    found, expected = module(samples), torch.stack([by_hand(module, sample, base) for sample in samples])
    assert expected.min() > 1e-3 and len({*expected.tolist()}) == 3
    assert_close(found, expected, atol=1e-5, rtol=1e-4)
    gradients = [torch.autograd.grad(each.sum(), module.trainable_parameters()) for each in (found, expected)]
    for own, other in zip(*gradients, strict=True):
        assert_close(own, other, atol=1e-5, rtol=1e-3)
    assert list(module.roles.networks) == []  # no second copy of the base


def test_units_of_columns_that_no_objective_reads_are_left_out(load_pipe, tiny):
    """Qwen-Image has such units: of images to go by, of areas with prompts of their own."""
    pipe = load_pipe(tiny)
    assert {unit.column for unit in pipe.units} > {None}
    assert {unit.column for unit in FROM_IMAGES.units(pipe)} == {None}


@pytest.mark.slow
def test_from_prompts_alone_no_autoencoder_is_read(training_module):
    assert training_module(FROM_PROMPTS, LORA).pipe.vae is None
    assert training_module(FROM_IMAGES, LORA).pipe.vae is not None


@pytest.mark.parametrize("scale", tiny.mostly_slow([0.0, -1.0], 0.0))
def test_at_scale_0_nothing_changes_and_below_it_the_update_is_reversed(
    scale, training_module, load_pipe, tiny, tmp_path
):
    module = shaken(training_module(FROM_PROMPTS, LORA))
    tensors, metadata = module.export_weights()["lora"]
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "slider.safetensors", metadata
    )
    pipe, base = load_pipe(tiny), load_pipe(tiny)
    pipe.load_lora("dit", tmp_path / "slider.safetensors", alpha=scale)
    for name, layer in module.pipe.dit.named_modules():
        if hasattr(layer, "get_delta_weight") and "default" in layer.lora_A:
            base.dit.get_submodule(name).weight.data += scale * layer.get_delta_weight("default").detach()
    found, expected = (velocity(each) for each in (pipe, base))
    assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert scale or torch.equal(found, velocity(load_pipe(tiny)))


def velocity(pipe) -> torch.Tensor:
    latents = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return pipe.predict(torch.tensor([500.0]), latents=latents, **embedded(pipe, "an owl"))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_qwen_image_and_flux2_slide_at_the_guidance_that_they_are_sampled_with(family):
    kind, folder, options = FAMILIES[family]
    parts = {name: ModelConfig(path=str(folder() / part)) for name, part in tiny.COMPONENTS.items()}
    pipe = kind.from_components(**parts, torch_dtype="float32", training=DEFAULTS, **options)
    module = PipelineTrainingModule(pipe, FROM_PROMPTS, ADAPTED).load()
    losses = module([Sample(Row(ROW), epoch=0, index=number) for number in range(2)])
    losses.sum().backward()
    assert losses.shape == (2,) and any(p.grad.any() for p in module.trainable_parameters() if p.grad is not None)
    shared, _, _ = module.get_pipeline_inputs(Row(ROW))
    assert shared.get("embedded_guidance") == pipe.complete({}).get("embedded_guidance")


@pytest.mark.parametrize("family", tiny.mostly_slow({str(family): family for family in TABLE}, "sd3_5_medium"))
def test_the_three_predictions_of_any_family_read_three_prompts(family):
    """Whatever the class of the unit that embeds prompts: Stable Diffusion 3.5's is a plain one."""
    family = next(own for own in TABLE if str(own) == family)
    module = family.module(replace(FROM_PROMPTS, extra_inputs=family.extra_inputs), LoRA(rank=2)).load()
    with torch.no_grad():
        shared, posi, _ = module._run_frozen_units(samples_of(family)[0])
    inputs, seen = shared | posi, 0
    for name in {name.removeprefix(POSITIVE) for name in inputs if name.startswith(POSITIVE)}:
        sides = [inputs[prefix + name] for prefix in ("", POSITIVE, NEGATIVE)]
        if isinstance(sides[0], torch.Tensor) and sides[0].is_floating_point():
            seen += 1
            assert not any(torch.equal(*pair) for pair in combinations(sides, 2))
    assert seen


def test_a_slider_of_videos_samples_clips():
    family = next(own for own in TABLE if str(own) == "wan21_t2v_1_3b")
    module = family.module(FROM_PROMPTS, LoRA(rank=2)).load()
    assert module(samples_of(family)[:1]).item() > 0


@pytest.mark.slow
def test_a_slider_of_stable_diffusion_needs_only_one_of_the_text_encoders():
    family = next(own for own in TABLE if str(own) == "sd3_5_medium")
    parts = {name: part for name, part in family.parts.items() if name not in ("text_encoder_3", "tokenizer_3")}
    module = replace(family, parts=parts).module(FROM_PROMPTS, LoRA(rank=2)).load()
    assert module(samples_of(family)[:1]).item() > 0


# What is refused ------------------------------------------------------------------------------------------------------


def test_a_slider_is_an_adapter_between_two_prompts(training_module):
    with pytest.raises(ValueError, match=r"task=slider needs the base as it was, which full training \(lora=none\)"):
        training_module(FROM_PROMPTS)
    with pytest.raises(ValueError, match="task.positive and task.negative are both 'a cat'; expected two prompts"):
        ConceptSlider(positive="a cat", negative="a cat")


def test_a_family_whose_embeddings_cannot_be_exchanged_is_refused_by_name(training_module, load_pipe, tiny):
    class Hidden(PipelineUnit):
        def process(self, pipe, prompt_emb):
            return {}

    pipe = load_pipe(tiny)
    pipe.units.append(Hidden())
    with pytest.raises(ValueError, match="task=slider embeds several prompts, but Hidden reads prompt_emb"):
        FROM_PROMPTS.check(pipe, LORA, cached=False)
    pipe.units = [unit for unit in pipe.units if not unit.input_params_posi]
    with pytest.raises(ValueError, match="no unit of QwenImagePipeline names 'prompt' in input_params_posi"):
        FROM_PROMPTS.check(pipe, LORA, cached=False)


# Runs -----------------------------------------------------------------------------------------------------------------

PAIR = ["task.positive='a bright {prompt}'", "task.negative='a dark {prompt}'"]
RUN = ["task=slider", *PAIR, "task.num_inference_steps=2"]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> list[str]:
    """A data set of prompts of several lengths."""
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("red apple\nowl\na very old lighthouse\nrocket\n")
    return ["dataset=prompts", f"dataset.path={file}", "dataset.height=32", "dataset.width=32"]


@pytest.mark.slow
def test_a_run_of_prompts_is_the_same_from_a_cache(prompts, tmp_path):
    plain = tiny.train(tmp_path / "plain", *prompts, *RUN)
    tiny.make_cache(tmp_path / "cache", *prompts, *RUN)
    cached = tiny.train(tmp_path / "two", "dataset=cache", f"dataset.path={tmp_path}/cache", *RUN)
    assert_close(losses(cached), losses(plain), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="bright"):
        tiny.train(
            tmp_path, "dataset=cache", f"dataset.path={tmp_path}/cache", *RUN, "task.positive='a light {prompt}'"
        )


@pytest.mark.slow
def test_a_run_that_was_cut_off_goes_on_as_if_nothing_had_been(prompts, tmp_path):
    options = [*prompts, *RUN, "checkpoint.every=2", "max_steps=5"]
    tiny.cut_off(2, tmp_path, *options)
    assert_same_run(tiny.train(tmp_path, *options), uninterrupted(*options))
