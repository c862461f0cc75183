"""Anima: its noise levels, its prompts, the text conditioner in training, its files in other programs, bad input."""

from dataclasses import replace
from functools import partial

import pytest
import released
import torch
from diffusers import CosmosTransformer3DModel, FlowMatchEulerDiscreteScheduler
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_anima_lora_to_diffusers
from families import FAMILIES, pairs
from miniatures import anima, krea2
from miniatures.requests import GUIDED, REQUEST, gradients, sampled, samples, shaken
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from diffsynth.cache.make import launch_data_process_task
from diffsynth.core.data import CachedDataset, Sample, UnifiedDataset
from diffsynth.core.loader import save_safetensors
from diffsynth.diffusion.adapters import files
from diffsynth.diffusion.adapters.lora import LoRA
from diffsynth.pipelines.anima import (
    AnimaPipeline,
    AnimaTransformer,
    anima_sigmas,
    model_fn_anima,
)
from diffsynth.training.accelerator import make_accelerator

FAMILY = next(family for family in FAMILIES if family.name == "anima")
CONDITIONED = LoRA(rank=2, models=("dit", "text_conditioner"), target_modules=r".*(to_q|q_proj)")


def test_noise_levels_are_the_originals():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    for steps in (1, 8, 50):
        scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist())
        assert_close(anima_sigmas(steps), scheduler.sigmas[:-1], atol=2e-7, rtol=0)
    grid = [1.0, 0.9996664, 0.9, 0.75, 0.5, 0.0059761, 0.002994]  # Z-Image's, as DiffSynth-Studio trains Anima
    released.assert_training_grid(AnimaPipeline, grid, [0, 0.001849, 0.54656, 1.260943, 1.797838, 0.033122, 0.016595])


# Prompts --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_prompts_of_a_batch_are_sampled_as_diffusers_does_whether_empty_or_cut():
    family = replace(FAMILY, settings=FAMILY.settings | {"max_sequence_length": 512})
    requests = [GUIDED | {"prompt": prompt} for prompt in ("", "red apple", "red " * 600)]
    pipe = family.load()
    shared, posi, nega = pipe.prepare(requests)
    assert posi["prompt_emb"].shape == (3, 512, anima.TEXT_WIDTH)
    with torch.no_grad():
        found = pipe.denoise(shared, posi, nega)
    assert_close(found, FAMILY.reference(requests, shared["noise"]), atol=1e-4, rtol=0)


def test_a_prompt_is_cut_off_where_either_tokenizer_ends():
    pipe = replace(FAMILY, settings=FAMILY.settings | {"max_sequence_length": 12}).build()
    assert pipe.prompt_limits() == {"tokenizer": 12, "t5_tokenizer": 12}
    assert pipe.cuts_off("red " * 13) and not pipe.cuts_off("red apple")
    with pytest.raises(ValueError, match=r"max_sequence_length is 513; expected a whole number in \[1, 512\]"):
        pipe.complete(REQUEST | {"max_sequence_length": 513})


# Training -------------------------------------------------------------------------------------------------------------


def test_a_loss_is_the_one_by_hand():
    def velocity(dit, noisy, sigma, text):
        theirs = CosmosTransformer3DModel.from_pretrained(anima.folder() / "transformer")  # with its mask of padding
        with anima.without_torchvision():
            mask, video = torch.zeros(1, 1, 32, 32), noisy.unsqueeze(2)
            return theirs(video, sigma, text["prompt_emb"], padding_mask=mask, return_dict=False)[0].squeeze(2)

    released.assert_loss_by_hand(FAMILY, velocity)


def test_a_batch_trains_the_text_conditioner_as_its_samples_do():
    module, batch = shaken(FAMILY.module(lora=CONDITIONED).load(), 0.01), samples(FAMILY)
    losses, gradient = gradients(module, [batch])
    alone, mean = gradients(module, [[sample] for sample in batch])
    assert_close(losses, alone, atol=1e-5, rtol=1e-5)
    assert_close(gradient, mean, atol=1e-5, rtol=1e-3)
    assert any("text_conditioner" in name and own.any() for name, own in gradient.items())


@pytest.mark.slow
def test_a_cache_has_the_text_of_a_frozen_text_conditioner_only(tmp_path):
    rows = UnifiedDataset.from_folder(str(pairs()), "metadata.jsonl", height=32, width=32)
    rows.scan()
    for trained, held in (("dit", {"prompt_emb"}), ("text_conditioner", set())):
        make, folder = partial(FAMILY.module, FAMILY.task(trained)), tmp_path / trained
        launch_data_process_task(make_accelerator("cpu", "float32"), rows, make(), folder)
        cached = CachedDataset(str(folder))
        assert cached[0].made["posi"].keys() == held
        modules = [make().load(cached=data is cached) for data in (rows, cached)]
        assert (modules[1].pipe.text_encoder is None) == (trained == "dit")
        losses = [
            module([Sample(data[n], 0, n) for n in range(4)])
            for module, data in zip(modules, (rows, cached), strict=True)
        ]
        assert_close(losses[0], losses[1], atol=1e-6, rtol=1e-6)


# Files of other programs ----------------------------------------------------------------------------------------------


def test_names_of_the_original_code_mean_what_diffusers_converter_makes_of_them():
    pipe = FAMILY.build()
    for name, layer in pipe.layer_names("dit").original.items():
        (key,) = _convert_non_diffusers_anima_lora_to_diffusers({f"diffusion_model.{name.replace('*', '1')}.x": 0})
        assert key == f"transformer.{layer.replace('*', '1')}.x"
        assert pipe.dit.get_submodule(layer.replace("*", "1"))
    linear = {name for name, own in pipe.dit.named_modules() if isinstance(own, torch.nn.Linear)}
    named = {layers for layers in pipe.layer_names("dit").of_network(pipe.dit).values()}
    assert {(name,) for name in linear} <= named
    assert len([name for name in linear if pipe.layer_names("dit").in_comfyui(name).startswith("transformer.")]) == 0


@pytest.mark.parametrize("start", ["lora_unet_", "diffusion_model.", ""])
def test_a_file_with_both_networks_is_read_by_each(start, tmp_path):
    """kohya's, ComfyUI's and DiffSynth-Studio's names: all have the text conditioner inside the transformer."""
    pipe, tensors = FAMILY.build(), {}
    for name, rows, columns in (("blocks.1.self_attn.q_proj", 96, 96), ("llm_adapter.blocks.0.mlp.2", 64, 256)):
        stem = start + (name.replace(".", "_") if start == "lora_unet_" else name)
        tensors |= {f"{stem}.lora_up.weight": torch.ones(rows, 2), f"{stem}.lora_down.weight": torch.ones(2, columns)}
    save_file(tensors, file := tmp_path / "both.safetensors")
    pipe.check_adapters([file])
    for network, layer in (("dit", "transformer_blocks.1.attn1.to_q"), ("text_conditioner", "blocks.0.mlp.2")):
        read = files.read(file, pipe.layer_names(network), getattr(pipe, network))
        assert read.keys() == {f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"}


def test_diffusers_samples_an_exported_adapter(tmp_path):
    released.assert_diffusers_samples_an_export(FAMILY, tmp_path)


def test_diffusers_samples_an_exported_adapter_of_both_networks_under_comfyuis_names(tmp_path):
    module = shaken(FAMILY.module(lora=CONDITIONED).load(), 0.3)
    tensors, metadata = module.export_weights()["lora"]
    save_safetensors(tensors, file := tmp_path / "lora.safetensors", metadata)
    assert all(key.startswith("diffusion_model.") for key in load_file(file))
    assert any(key.startswith("diffusion_model.llm_adapter.blocks.0.self_attn.q_proj.lora_A") for key in tensors)
    noise = module.pipe.prepare([GUIDED])[0]["noise"]
    with module.pipe.sampling():
        found = sampled(module.pipe, GUIDED)
    assert_close(found, FAMILY.reference([GUIDED], noise, file), atol=1e-4, rtol=0)
    pipe = FAMILY.load()
    for network in ("dit", "text_conditioner"):
        pipe.load_lora(network, file)
    assert_close(sampled(pipe, GUIDED), found, atol=1e-4, rtol=0)


# The released size ----------------------------------------------------------------------------------------------------


def test_the_released_networks_have_their_parameters():
    """NVIDIA names the transformer 2B; the file of both networks has 4.18 GB in bf16."""
    repository = "circlestone-labs/Anima-Base-v1.0-Diffusers"
    sizes = {"transformer": 1_956_405_248, "text_conditioner": 134_663_680, "text_encoder": 596_049_920}
    for component, count in sizes.items():
        assert released.parameters(repository, component) == count


@pytest.mark.slow
def test_a_block_of_the_released_width_has_diffusers_velocity():
    sizes = {"num_attention_heads": 16, "extra_pos_embed_type": None, "rope_scale": (1.0, 4.0, 4.0), "num_layers": 1}
    dit = released.with_random_weights(CosmosTransformer3DModel, **sizes)
    noise, text, mask = torch.randn(2, 16, 4, 6), torch.randn(2, 512, 1024), torch.zeros(1, 1, 32, 48)
    with anima.without_torchvision():
        expected = dit(noise.unsqueeze(2), torch.tensor([0.5, 0.25]), text, padding_mask=mask, return_dict=False)[0]
    dit.__class__ = AnimaTransformer
    assert_close(model_fn_anima(dit, noise, torch.tensor([500.0, 250.0]), text), expected.squeeze(2))


# Bad input ------------------------------------------------------------------------------------------------------------


def test_a_transformer_of_another_family_is_refused_before_weights_are_read(no_weights_are_read):
    with pytest.raises(ValueError, match="AnimaPipeline has no place for a Krea2Transformer2DModel"):
        released.with_part(FAMILY, "dit", krea2.folder() / "transformer").load()


MISFITS = {
    "dit reads 17 channels, but Anima's latents have 16: .* Cosmos transformer of videos": ("dit", {"in_channels": 17}),
    "dit takes text embeddings of width 1024, but text_conditioner makes 48": ("dit", {"text_embed_dim": 1024}),
    "text_conditioner takes states of width 99, but text_encoder makes 32": ("text_conditioner", {"source_dim": 99}),
}


@pytest.mark.parametrize("message", MISFITS)
def test_networks_of_different_models_are_refused_before_weights_are_read(message, no_weights_are_read, tmp_path):
    component, changes = MISFITS[message]
    with pytest.raises(ValueError, match=message):
        released.with_config(FAMILY, component, tmp_path, **changes).load()


def test_a_tokenizer_of_another_vocabulary_is_refused_before_weights_are_read(no_weights_are_read, tmp_path):
    anima.T5Tokenizer(vocab=[*anima.PIECES, ("apple", -4.0)], extra_ids=0).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has 33 tokens, but text_conditioner has embeddings of 32: it is not T5's"):
        released.with_part(FAMILY, "t5_tokenizer", tmp_path).load()


def test_a_size_beyond_the_positions_is_refused(no_weights_are_read):
    pipe = FAMILY.build()
    with pytest.raises(ValueError, match="height x width is 32 x 272, but the positions of dit end at 256 pixels"):
        pipe.complete(REQUEST | {"height": 32, "width": 272})
    pipe.complete(REQUEST | {"height": 32, "width": 256})
