"""Krea 2: its noise levels, its prompts, a loss by hand, the released size, its files in diffusers, bad input."""

from types import SimpleNamespace

import diffusers
import pytest
import released
import torch
from families import FAMILIES
from miniatures import krea2, z_image
from torch.testing import assert_close

from diffsynth.pipelines.krea2 import Krea2Pipeline, Krea2Unit_PromptEmbedder, krea2_sigmas, model_fn_krea2, text_depths

FAMILY = next(family for family in FAMILIES if family.name == "krea2")


def test_noise_levels_are_the_originals():
    grid = [1.0, 0.9995503, 0.8697344, 0.6899744, 0.4258967, 0.0044402, 0.0022228]  # FLUX.2's
    released.assert_training_grid(Krea2Pipeline, grid, [0, 0.002346, 0.663539, 1.393012, 1.645582, 0.023169, 0.011599])
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    for options, mu in (({"dynamic_shift_len": 4096}, 0.90625), ({"exponential_shift_mu": 1.15}, 1.15)):
        scheduler.set_timesteps(sigmas=[1 - step / 8 for step in range(8)], mu=mu)
        assert_close(krea2_sigmas(8, **options), scheduler.sigmas[:-1])


@pytest.mark.slow
def test_a_prompt_without_padding_has_the_states_of_diffusers_padded_one():
    pipe, theirs = FAMILY.load(), z_image.loaded(diffusers.Krea2Pipeline, krea2.folder())
    pipe.text_encoder.get_decoder().layers[5].register_forward_pre_hook(lambda *_: pytest.fail("is run"))
    for prompt in ("", "a red apple", "a very long word " * 9):
        with torch.no_grad():
            found = Krea2Unit_PromptEmbedder().process(pipe, prompt=prompt, max_sequence_length=20)
            states, mask = theirs.get_text_hidden_states(prompt, 20)
        assert_close(found["prompt_emb"], states[:, mask[0]], atol=1e-5, rtol=1e-5)
        assert found["prompt_emb_mask"].all()
    depths = text_depths(SimpleNamespace(config=SimpleNamespace(num_hidden_layers=36)))
    assert tuple(depths) == diffusers.Krea2Pipeline(*[None] * 5).text_encoder_select_layers


def test_a_prompt_is_cut_off_where_its_tokens_end():
    pipe = FAMILY.build()
    assert pipe.cuts_off("red " * 508) and not pipe.cuts_off("red " * 505)


def velocity(dit, noisy, sigma, text, mask=None):
    """The transformer's velocity, with the tokens and positions that diffusers' pipeline makes."""
    (batch, _, height, width), sizes = noisy.shape, SimpleNamespace(patch_size=2, vae_scale_factor=8)
    tokens = diffusers.Krea2Pipeline._pack_latents(sizes, noisy, batch, 16, height, width)
    ids = diffusers.Krea2Pipeline.prepare_position_ids(text.shape[1], height // 2, width // 2, "cpu")
    predicted = dit(tokens, text, sigma, ids, mask, return_dict=False)[0]
    return diffusers.Krea2Pipeline._unpack_latents(sizes, predicted, 8 * height, 8 * width)[:, :, 0]


def test_a_loss_is_the_one_by_hand():
    released.assert_loss_by_hand(
        FAMILY, lambda dit, noisy, sigma, text: velocity(dit, noisy, sigma, text["prompt_emb"])
    )


def test_kohyas_file_of_krea_names_is_read_with_its_alpha(tmp_path):
    pipe = FAMILY.build()
    names = {"blocks_1_attn_wq": "transformer_blocks.1.attn.to_q", "first": "img_in"}
    for name, layer in names.items():
        released.assert_kohyas_file_is_read(pipe, f"lora_unet_{name}", layer, folder=tmp_path)


@pytest.mark.slow
def test_diffusers_samples_an_exported_adapter(tmp_path):
    released.assert_diffusers_samples_an_export(FAMILY, tmp_path)


def test_the_released_network_has_its_parameters():
    assert released.parameters("krea/Krea-2-Raw") == pytest.approx(12.82e9, abs=5e6)


@pytest.mark.slow
def test_a_block_of_the_released_width_has_diffusers_velocity():
    few = {"num_layers": 1, "num_layerwise_text_blocks": 0, "num_refiner_text_blocks": 0}
    dit = released.with_random_weights(diffusers.Krea2Transformer2DModel, **few)
    noise, text, mask = torch.randn(2, 16, 4, 6), torch.randn(2, 7, 12, 2560), torch.ones(2, 7, dtype=torch.bool)
    mask[1, 4:] = False
    found = model_fn_krea2(dit, noise, torch.tensor([500.0, 250.0]), text, mask)
    assert_close(found, velocity(dit, noise, torch.tensor([0.5, 0.25]), text, mask), atol=1e-5, rtol=1e-4)


def test_a_transformer_of_another_family_is_refused_before_weights_are_read(no_weights_are_read):
    with pytest.raises(ValueError, match="Krea2Pipeline has no place for a ZImageTransformer2DModel"):
        released.with_part(FAMILY, "dit", z_image.base() / "transformer").load()


@pytest.mark.slow
def test_a_text_encoder_of_another_size_is_refused_before_weights_are_read(no_weights_are_read, tmp_path):
    other = released.with_config(FAMILY, "dit", tmp_path, num_text_layers=12, text_hidden_dim=2560)
    with pytest.raises(ValueError, match="embeddings of width 12 x 2560, but text_encoder makes 2 x 64"):
        other.load()


@pytest.mark.slow
def test_a_tokenizer_that_cuts_the_template_elsewhere_is_refused_before_weights_are_read(no_weights_are_read):
    with pytest.raises(ValueError, match=r"makes \[\d+, \d+\] tokens of the start .*, expected \[34, 5\]"):
        released.with_part(FAMILY, "tokenizer", z_image.base() / "tokenizer").load()
