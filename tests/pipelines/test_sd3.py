"""Stable Diffusion 3.5: noise levels, three text encoders and absent ones, names in files, the released sizes."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import released
import tiny
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from families import FAMILIES
from miniatures import sd3, z_image
from miniatures.requests import GUIDED, REQUEST, image, sampled
from torch.testing import assert_close
from transformers import T5Config, T5EncoderModel

from diffsynth.pipelines.prompts.sd3 import ENCODERS, clip_embeddings
from diffsynth.pipelines.sd3 import SD3Pipeline, model_fn_sd3, sd3_sigmas

ARCHITECTURES = Path(__file__).parents[2] / "diffsynth" / "plan" / "architectures"
FAMILY = next(family for family in FAMILIES if family.name == "sd3_5_medium")


def without(*encoders: str) -> SD3Pipeline:
    """The miniature without some of its text encoders, whose weights are not read yet."""
    absent = {*encoders, *(ENCODERS[name] for name in encoders)}
    return replace(FAMILY, parts={name: part for name, part in FAMILY.parts.items() if name not in absent}).build()


# Noise levels ---------------------------------------------------------------------------------------------------------


def test_noise_levels_are_those_of_the_released_scheduler():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    for steps in (1, 4, 28, 1000):
        scheduler.set_timesteps(steps)
        assert_close(sd3_sigmas(steps), scheduler.sigmas[:-1], atol=2e-7, rtol=0)
    assert_close(sd3_sigmas(4), torch.tensor([1, 0.8576924, 0.6021506, 0.0089286]), atol=1e-6, rtol=0)
    grid = [1, 0.9996671, 0.9002394, 0.7507477, 0.501992, 0.0118812, 0.0089286]
    weights = [0, 0.001842, 0.544227, 1.255476, 1.794302, 0.065713, 0.049387]  # FLUX.1's
    released.assert_training_grid(SD3Pipeline, grid, weights)


def test_a_loss_is_the_one_by_hand():
    def velocity(dit, noisy, sigma, text):
        return dit(noisy, text["prompt_emb"], text["pooled_prompt_emb"], 1000 * sigma).sample

    released.assert_loss_by_hand(FAMILY, velocity)


def test_images_and_prompts_of_a_training_are_encoded_as_diffusers_does():
    pipe, reference, picture = FAMILY.load(), sd3.loaded(), image(0)
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        clean = (reference.vae.encode(pixels).latent_dist.mean - 0.0609) * 1.5305
        text, _, pooled, _ = reference.encode_prompt("a red apple", None, None, max_sequence_length=sd3.T5_TOKENS)
    assert_close(pipe.vae.encode(pipe.preprocess_image(picture)), clean)
    _, found, _ = pipe.prepare([REQUEST])
    assert_close((found["prompt_emb"], found["pooled_prompt_emb"]), (text, pooled))


# Text encoders --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_without_t5_latents_are_those_that_diffusers_samples():
    pipe = without("text_encoder_3")
    pipe.load_models()
    shared, posi, nega = pipe.prepare([GUIDED])
    with torch.no_grad():
        found = pipe.denoise(shared, posi, nega)
    expected = sd3.sampled_by_diffusers([GUIDED], shared["noise"], text_encoder_3=None, tokenizer_3=None)
    assert_close(found, expected, atol=1e-4, rtol=0)
    assert (found - sampled(FAMILY.load(), GUIDED)).abs().max() > 1e-2


def test_an_absent_clip_leaves_zeros_in_its_channels():
    first, second, both = without("text_encoder_2"), without("text_encoder"), FAMILY.load()
    for pipe in (first, second):
        pipe.load_models()
    with torch.no_grad():
        for one, other, whole in zip(
            *(clip_embeddings(pipe, ["a red apple"]) for pipe in (first, second, both)), strict=True
        ):
            assert one.any() and other.any() and torch.equal(one + other, whole)
            assert not one[..., 16:].any() and not other[..., :16].any()


def test_only_a_pipeline_without_any_text_encoder_is_refused_and_before_weights_are_read():
    users = dict.fromkeys(ENCODERS, "SD3Unit_PromptEmbedder")
    without("text_encoder", "text_encoder_3").require(users)
    with pytest.raises(ValueError, match="SD3Unit_PromptEmbedder needs text_encoder, but model.text_encoder is null"):
        without(*ENCODERS).require(users)


MISFITS = {
    "text_encoder is 24 wide .*exchange": {"text_encoder": "text_encoder_2", "text_encoder_2": "text_encoder"},
    "pooled embeddings of width 40, but the CLIPs make 48": {"text_encoder": "text_encoder_2"},
    "text embeddings of width 64, but text_encoder_3 makes 32": {"text_encoder_3": "wide"},
    "SD3Pipeline has no place for a ZImageTransformer2DModel": {"dit": "z_image"},
}


@pytest.mark.parametrize("message", tiny.mostly_slow(MISFITS, list(MISFITS)[0]))
def test_networks_that_do_not_fit_each_other_are_refused_before_weights_are_read(
    message, tmp_path, no_weights_are_read
):
    T5EncoderModel(T5Config(vocab_size=8, d_model=32, d_kv=8, d_ff=8, num_layers=1)).save_pretrained(tmp_path / "wide")
    folders = {"wide": tmp_path / "wide", "z_image": z_image.base() / "transformer"}
    wrong = {name: str(folders.get(part, part)) for name, part in MISFITS[message].items()}
    with pytest.raises(ValueError, match=message):
        replace(FAMILY, parts=FAMILY.parts | wrong).load()


@pytest.mark.slow
def test_sizes_beyond_the_last_position_and_prompts_beyond_the_last_token_are_noticed():
    pipe = FAMILY.build()
    with pytest.raises(ValueError, match="height x width is 272 x 32, but the positions of dit end at 256 pixels"):
        pipe.prepare([REQUEST | {"height": 272}])
    assert pipe.cuts_off("red " * 24) and not pipe.cuts_off("red " * 23)
    assert without("text_encoder_3").cuts_off("a " * 76) and not without("text_encoder_3").cuts_off("a " * 75)


# Adapter files --------------------------------------------------------------------------------------------------------


def test_names_of_the_original_code_mean_what_diffusers_converter_makes_of_them():
    pipe = FAMILY.load()
    names, ours, original = pipe.layer_names("dit"), pipe.dit.state_dict(), {}
    for name, layers in names.of_network(pipe.dit).items():
        if name.startswith(("joint_blocks.", "final_layer.", "x_embedder", "t_embedder", "y_embedder", "context_emb")):
            for end in ("weight", "bias"):
                whole = torch.cat([ours[f"{layer}.{end}"] for layer in layers])
                original[f"{name}.{end}"] = torch.cat(whole.chunk(2)[::-1]) if names.is_swapped(name) else whole
    for key in ours:
        if norm := re.fullmatch(r"transformer_blocks\.(\d+)\.(attn2?)\.norm_(added_)?([qk])\.weight", key):
            stream = "context_block" if norm[3] else "x_block"
            original[f"joint_blocks.{norm[1]}.{stream}.{norm[2]}.ln_{norm[4]}.weight"] = ours[key]
    original["pos_embed"] = ours["pos_embed.pos_embed"]
    assert_close(convert_sd3_transformer_checkpoint_to_diffusers(original), dict(ours), atol=0, rtol=0)


CLIP_MLP = "text_model.encoder.layers.1.mlp.fc1"
FILES = {
    "lora_unet_joint_blocks_1_x_block_attn2_qkv": ("dit", [f"transformer_blocks.1.attn2.to_{part}" for part in "qkv"]),
    "diffusion_model.joint_blocks.0.x_block.mlp.fc1": ("dit", ["transformer_blocks.0.ff.net.0.proj"]),
    "lora_te1_text_model_encoder_layers_1_mlp_fc1": ("text_encoder", [CLIP_MLP]),
    "lora_te2_text_model_encoder_layers_1_mlp_fc1": ("text_encoder_2", [CLIP_MLP]),
    "lora_te3_encoder_block_0_layer_0_SelfAttention_q": ("text_encoder_3", ["encoder.block.0.layer.0.SelfAttention.q"]),
}


@pytest.mark.parametrize("name", tiny.mostly_slow(FILES, list(FILES)[0]))
def test_kohyas_and_comfyuis_names_are_read_with_their_alpha(name, tmp_path):
    (network, ours), pipe = FILES[name], FAMILY.build()
    file = released.assert_kohyas_file_is_read(pipe, name, *ours, network=network, folder=tmp_path)
    assert pipe.adapted_by(file) == [network]


@pytest.mark.slow
def test_diffusers_samples_an_exported_adapter(tmp_path):
    released.assert_diffusers_samples_an_export(FAMILY, tmp_path)


# The released sizes ---------------------------------------------------------------------------------------------------


def architecture(variant: str, **changes) -> SD3Transformer2DModel:
    config = json.loads((ARCHITECTURES / f"sd3_5_{variant}.json").read_text())["components"]["transformer"]
    return SD3Transformer2DModel.from_config(config | changes)


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "parameters", "positions"), [("medium", 2.243, 0.226), ("large", 8.057, 0.090)])
def test_numbers_of_parameters_are_the_released_ones(variant, parameters, positions):
    with torch.device("meta"):
        dit = architecture(variant)
    counts = (sum(tensor.numel() for tensor in tensors) / 1e9 for tensors in (dit.parameters(), dit.buffers()))
    assert tuple(round(count, 3) for count in counts) == (parameters, positions)


@pytest.mark.slow
def test_blocks_of_the_released_width_predict_with_checkpointing_what_diffusers_does():
    torch.manual_seed(0)
    dit = architecture("medium", num_layers=2, pos_embed_max_size=16).to(torch.bfloat16)
    latents, timestep = torch.randn(2, 16, 6, 8), torch.tensor([900.0, 20.0])
    text = {"encoder_hidden_states": torch.randn(2, 9, 4096), "pooled_projections": torch.randn(2, 2048)}
    velocity = model_fn_sd3(dit, latents, timestep, *text.values(), use_gradient_checkpointing=True)
    dit.disable_gradient_checkpointing()
    in_bf16 = {name: tensor.to(torch.bfloat16) for name, tensor in text.items()}
    expected = dit(latents.to(torch.bfloat16), timestep=timestep, **in_bf16).sample
    assert velocity.requires_grad and torch.equal(velocity, expected)
