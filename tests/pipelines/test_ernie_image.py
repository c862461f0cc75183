"""ERNIE-Image: its noise levels, its prompts, a loss by hand, the released size, its files in diffusers, bad input."""

import diffusers
import pytest
import released
import torch
from families import FAMILIES
from miniatures import ernie_image, krea2, z_image
from miniatures.requests import REQUEST
from torch.testing import assert_close

from diffsynth.pipelines.ernie_image import ErnieImagePipeline, ErnieImageUnit_PromptEmbedder, model_fn_ernie_image

FAMILY = next(family for family in FAMILIES if family.name == "ernie_image")


def test_noise_levels_are_the_originals():
    grid = [1.0, 0.9996664, 0.9, 0.75, 0.5, 0.0059761, 0.002994]
    released.assert_training_grid(
        ErnieImagePipeline, grid, [0, 0.001849, 0.54656, 1.260943, 1.797838, 0.033122, 0.016595]
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=4.0)
    scheduler.set_timesteps(sigmas=[1 - step / 8 for step in range(8)])
    pipe = FAMILY.build()
    pipe.set_timesteps({**pipe.call_defaults, **REQUEST, "num_inference_steps": 8})
    assert_close(pipe.scheduler.sigmas, scheduler.sigmas[:-1])


@pytest.mark.slow
def test_a_prompt_has_the_states_of_diffusers_and_no_later_layer_is_run():
    pipe, theirs = FAMILY.load(), z_image.loaded(diffusers.ErnieImagePipeline, ernie_image.folder())
    pipe.text_encoder.get_decoder().layers[2].register_forward_pre_hook(lambda *_: pytest.fail("is run"))
    for prompt in ("", "a red apple"):
        found = ErnieImageUnit_PromptEmbedder().process(pipe, prompt=prompt)
        (states,) = theirs.encode_prompt(prompt, torch.device("cpu"))
        assert_close(found["prompt_emb"][0], states)
        assert found["prompt_emb_lengths"] == [len(states)]


def test_a_prompt_is_cut_off_where_the_tokenizer_does():
    pipe = FAMILY.build()
    pipe.tokenizer.model_max_length = 6
    assert pipe.cuts_off("red " * 9) and not pipe.cuts_off("red")
    assert ErnieImageUnit_PromptEmbedder().tokenize(pipe, "red " * 9)["input_ids"].shape == (1, 6)


def test_a_loss_is_the_one_by_hand():
    def velocity(dit, noisy, sigma, text):
        lengths = torch.tensor([text["prompt_emb"].shape[1]])
        return dit(noisy, 1000 * sigma, text["prompt_emb"], lengths, return_dict=False)[0]

    released.assert_loss_by_hand(FAMILY, velocity)


def test_the_autoencoder_is_normalised_with_the_epsilon_of_its_training():
    vae = FAMILY.load().vae
    mean, std = vae.statistics(torch.empty(0))
    assert vae.config.batch_norm_eps == 1e-4
    assert_close(std.flatten(), (vae.bn.running_var + 1e-5).sqrt())
    assert_close(mean.flatten(), vae.bn.running_mean)


def test_kohyas_file_is_read_with_its_alpha(tmp_path):
    layer = "layers.1.self_attention.to_out.0"
    name = f"lora_unet_{layer.replace('.', '_')}"
    released.assert_kohyas_file_is_read(FAMILY.build(), name, layer, folder=tmp_path)


@pytest.mark.slow
def test_diffusers_samples_an_exported_adapter(tmp_path):
    released.assert_diffusers_samples_an_export(FAMILY, tmp_path)


def test_the_released_network_has_its_parameters():
    assert released.parameters("baidu/ERNIE-Image") == pytest.approx(8.03e9, abs=5e6)


@pytest.mark.slow
def test_a_block_of_the_released_width_has_diffusers_velocity():
    sizes = {"hidden_size": 4096, "num_attention_heads": 32, "ffn_hidden_size": 12288, "text_in_dim": 3072}
    dit = released.with_random_weights(diffusers.ErnieImageTransformer2DModel, num_layers=1, **sizes)
    noise, text, steps = torch.randn(2, 128, 2, 3), torch.randn(2, 7, 3072), torch.tensor([500.0, 250.0])
    found = model_fn_ernie_image(dit, noise, steps, text, [[7], [4]])
    assert_close(found, dit(noise, steps, text, torch.tensor([7, 4]), return_dict=False)[0])


def test_a_transformer_of_another_family_is_refused_before_weights_are_read(no_weights_are_read):
    with pytest.raises(ValueError, match="ErnieImagePipeline has no place for a Krea2Transformer2DModel"):
        released.with_part(FAMILY, "dit", krea2.folder() / "transformer").load()


def test_a_text_encoder_of_another_width_is_refused_before_weights_are_read(no_weights_are_read, tmp_path):
    with pytest.raises(ValueError, match="takes text embeddings of width 3072, but text_encoder makes 64"):
        released.with_config(FAMILY, "dit", tmp_path, text_in_dim=3072).load()
