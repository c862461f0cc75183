"""FLUX.1 and Chroma: noise levels, loss, released sizes, and what is refused."""

import shutil

import diffusers
import pytest
import released
import torch
from diffusers import FluxTransformer2DModel
from families import FAMILIES
from miniatures import flux1
from miniatures.requests import LORA, REQUEST, sampled, samples
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from diffsynth.core.data import Row
from diffsynth.core.loader import ModelConfig
from diffsynth.diffusion.loss import FlowMatchSFT
from diffsynth.pipelines.flux1_image import Flux1ImagePipeline, Flux1Unit_EditImageEmbedder
from diffsynth.pipelines.shared.flux1 import flux1_sigmas

DEV, CHROMA = (next(f for f in FAMILIES if f.name == name) for name in ("flux1_dev", "chroma"))

# Noise levels ---------------------------------------------------------------------------------------------------------


def test_the_training_grid_and_its_weights_are_those_of_diffsynth_studio():
    grid = [1, 0.9996671, 0.9002394, 0.7507477, 0.501992, 0.0118812, 0.0089286]
    weights = [0, 0.001842, 0.544227, 1.255476, 1.794302, 0.065713, 0.049387]
    released.assert_training_grid(Flux1ImagePipeline, grid, weights)
    assert_close(flux1_sigmas(4), torch.tensor([1, 0.8576924, 0.6021506, 0.0089286]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("tokens", [256, 4096, 9216])
def test_sampling_steps_are_those_of_diffusers(tokens):
    mu = diffusers.pipelines.flux.pipeline_flux.calculate_shift(tokens)
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    theirs.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], mu=mu)
    assert_close(flux1_sigmas(4, dynamic_shift_len=tokens), theirs.sigmas[:-1], atol=1e-6, rtol=0)
    schnell = flux1_sigmas(4, dynamic_shift_len=tokens, exponential_shift_mu=0.0)
    assert schnell.tolist() == [1.0, 0.75, 0.5, 0.25]


# Training -------------------------------------------------------------------------------------------------------------


def velocity(dit, noisy, sigma, text):
    """The transformer's velocity at a guidance of 1, with the tokens and positions that diffusers' pipeline makes."""
    (batch, channels, height, width), flux = noisy.shape, diffusers.FluxPipeline
    predicted = dit(
        flux._pack_latents(noisy, batch, channels, height, width),
        text["prompt_emb"],
        text["pooled_prompt_emb"],
        sigma,
        flux._prepare_latent_image_ids(1, height // 2, width // 2, "cpu", torch.float32),
        torch.zeros(text["prompt_emb"].shape[1], 3),
        guidance=torch.ones(1),
    ).sample
    return flux._unpack_latents(predicted, 8 * height, 8 * width, 8)


def test_a_loss_is_the_one_by_hand():
    released.assert_loss_by_hand(DEV, velocity)


def test_the_embedded_guidance_of_a_training_is_one_unless_the_rows_say_so():
    batch = samples(DEV)[1:2]
    plain = DEV.module(lora=LORA).load()(batch)
    for guidance, differs in ((1.0, False), (4.0, True)):
        told = [batch[0]._replace(data=Row({**batch[0].data, "embedded_guidance": guidance}))]
        found = DEV.module(FlowMatchSFT(extra_inputs=["embedded_guidance"]), LORA).load()(told)
        assert bool((found - plain).abs() > 1e-4) == differs


# Released sizes -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "repository, billions", [("black-forest-labs/FLUX.1-dev", 11.901), ("lodestones/Chroma1-HD", 8.90)]
)
def test_the_released_network_has_its_parameters(repository, billions):
    assert released.parameters(repository) / 1e9 == pytest.approx(billions, abs=0.005)


@pytest.mark.slow
def test_blocks_of_the_released_width_denoise_as_in_diffusers():
    sizes = {"num_layers": 1, "num_single_layers": 1, "guidance_embeds": True}
    dit = released.with_random_weights(FluxTransformer2DModel, **sizes)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    theirs = diffusers.FluxPipeline(scheduler, None, None, None, None, None, dit)
    theirs.set_progress_bar_config(disable=True)
    text, pooled, noise = torch.randn(1, 7, 4096), torch.randn(1, 768), torch.randn(1, 16, 8, 8)
    embeddings = {
        "prompt_embeds": text,
        "pooled_prompt_embeds": pooled,
        "latents": theirs._pack_latents(noise, 1, 16, 8, 8),
    }
    expected = theirs(**embeddings, height=64, width=64, num_inference_steps=2, output_type="latent").images

    pipe = Flux1ImagePipeline(torch_dtype=torch.float32)
    pipe.dit, pipe.progress_bar = dit, iter
    pipe.scheduler.set_timesteps(2, dynamic_shift_len=16)
    shared = {"latents": noise, "cfg_scale": 1.0, "embedded_guidance": 3.5}
    found = pipe.denoise(shared, {"prompt_emb": text, "pooled_prompt_emb": pooled}, {})
    assert (found - noise).abs().max() > 1e-2
    assert_close(found, theirs._unpack_latents(expected, 64, 64, 8), atol=1e-4, rtol=0)


# What is read of images and prompts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [DEV, CHROMA], ids=str)
def test_a_prompt_is_cut_off_where_t5_ends(family):
    pipe = family.build()
    assert pipe.cuts_off("a " * flux1.MAX_TOKENS) and not pipe.cuts_off("a " * (flux1.MAX_TOKENS - 1))


@pytest.mark.parametrize(
    ("size", "pixels", "resized"),
    [((600, 400), 1 << 20, (1248, 832)), ((50, 50), 64 * 64, (64, 64)), ((600, 400), 90000, (368, 240))],
)
def test_kontext_reads_images_at_the_sizes_that_it_was_trained_at(size, pixels, resized):
    assert Flux1Unit_EditImageEmbedder.resize(Image.new("RGB", size), pixels).size == resized


def built(kind: type = Flux1ImagePipeline, **folders) -> Flux1ImagePipeline:
    """A pipeline whose networks come from some folders, without their weights."""
    pipe = kind(torch_dtype=torch.float32)
    pipe.build_models([ModelConfig(path=str(folder / flux1.PARTS[name])) for name, folder in folders.items()])
    return pipe


def test_schnell_reads_no_guidance_scale():
    pipe = built(dit=flux1.schnell(), text_encoder=flux1.dev(), text_encoder_2=flux1.dev(), vae=flux1.dev())
    for name in ("tokenizer", "tokenizer_2"):
        pipe.build_folder(name, ModelConfig(path=str(flux1.dev() / name)))
    pipe.load_models()
    pipe.progress_bar = iter
    request = REQUEST | {"max_sequence_length": flux1.MAX_TOKENS}
    found = []
    for scale in (1.0, 9.0):
        pipe.call_defaults["embedded_guidance"] = scale
        found.append(sampled(pipe, request))
    assert torch.equal(*found)


def test_clip_is_read_under_the_names_of_its_released_file(tmp_path):
    shutil.copytree(flux1.dev() / "text_encoder", tmp_path, dirs_exist_ok=True)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file({f"text_model.{name}": tensor for name, tensor in tensors.items()}, file, {"format": "pt"})
    pipe = Flux1ImagePipeline(torch_dtype=torch.float32)
    pipe.build_models([ModelConfig(path=str(tmp_path))])
    pipe.load_models()
    assert_close(dict(pipe.text_encoder.state_dict()), tensors)


OTHERS = {
    "width 48, but text_encoder_2 makes 32: they are of different models": {"joint_attention_dim": 48},
    "width 40, but text_encoder makes 24: they are of different models": {"pooled_projection_dim": 40},
}


@pytest.mark.parametrize("message", OTHERS)
def test_a_transformer_for_other_text_encoders_is_refused_before_weights_are_read(
    message, no_weights_are_read, tmp_path
):
    with pytest.raises(ValueError, match=message):
        released.with_config(DEV, "dit", tmp_path, **OTHERS[message]).load()


def test_a_transformer_of_another_family_is_refused_before_weights_are_read(no_weights_are_read):
    with pytest.raises(ValueError, match="Flux1ImagePipeline has no place for a ChromaTransformer2DModel"):
        released.with_part(DEV, "dit", flux1.chroma() / "transformer").load()
