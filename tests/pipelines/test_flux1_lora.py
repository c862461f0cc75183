"""LoRA files of FLUX.1 and Chroma: fused layers of other programs, and ours in diffusers."""

import diffusers
import pytest
import released
import tiny
import torch
from diffusers import FluxTransformer2DModel
from families import FAMILIES
from miniatures import flux1
from safetensors.torch import save_file
from torch.testing import assert_close

from diffsynth.diffusion.adapters import files
from diffsynth.pipelines.networks.flux1 import LORA_NAMES

DEV, CHROMA = (next(f for f in FAMILIES if f.name == name) for name in ("flux1_dev", "chroma"))
WIDTH = 3072
FUSED = {  # Black Forest Labs' names: DiffSynth-Studio's, numbers of outputs and inputs
    "double_blocks.0.img_attn.qkv": ("blocks.0.attn.a_to_qkv", 3 * WIDTH, WIDTH),
    "double_blocks.0.txt_attn.qkv": ("blocks.0.attn.b_to_qkv", 3 * WIDTH, WIDTH),
    "double_blocks.0.img_attn.proj": ("blocks.0.attn.a_to_out", WIDTH, WIDTH),
    "double_blocks.0.txt_mlp.0": ("blocks.0.ff_b.0", 4 * WIDTH, WIDTH),
    "double_blocks.0.img_mlp.2": ("blocks.0.ff_a.2", WIDTH, 4 * WIDTH),
    "double_blocks.0.img_mod.lin": ("blocks.0.norm1_a.linear", 6 * WIDTH, WIDTH),
    "single_blocks.0.linear1": ("single_blocks.0.to_qkv_mlp", 7 * WIDTH, WIDTH),
    "single_blocks.0.linear2": ("single_blocks.0.proj_out", WIDTH, 5 * WIDTH),
    "single_blocks.0.modulation.lin": ("single_blocks.0.norm.linear", 3 * WIDTH, WIDTH),
}


def test_files_with_fused_layers_mean_what_diffusers_converter_makes_of_them(tmp_path):
    with torch.device("meta"):
        dit = FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
    kohya, others = {}, ({}, {})
    for name, (studio, rows, columns) in FUSED.items():
        down, up = torch.randn(2, columns), torch.randn(rows, 2)
        flat = f"lora_unet_{name.replace('.', '_')}"
        kohya |= {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up, f"{flat}.alpha": torch.tensor(6.0)}
        for tensors, layer in zip(others, (f"diffusion_model.{name}", studio), strict=True):
            tensors |= {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": 3 * up}
    expected = diffusers.FluxPipeline.lora_state_dict(dict(kohya))
    pairs = {key.removesuffix(".lora_A.weight") for key in expected if "lora_A" in key}
    expected = {n: expected[f"{n}.lora_B.weight"] @ expected[f"{n}.lora_A.weight"][:, :64] for n in pairs}
    for tensors in (kohya, *others):
        save_file(tensors, tmp_path / "lora.safetensors")
        found = files.read(tmp_path / "lora.safetensors", LORA_NAMES, dit)
        layers = {key.rpartition(".lora_")[0] for key in found}
        found = {f"transformer.{n}": found[f"{n}.lora_B.weight"] @ found[f"{n}.lora_A.weight"][:, :64] for n in layers}
        assert_close(found, expected)


@pytest.mark.parametrize("family", tiny.mostly_slow([DEV, CHROMA], DEV), ids=str)
def test_diffusers_samples_an_exported_adapter(family, tmp_path):
    released.assert_diffusers_samples_an_export(family, tmp_path, strength=0.1)


def test_a_lora_of_clip_has_the_names_of_its_released_layers(tmp_path):
    down, up = torch.randn(2, flux1.CLIP_WIDTH), torch.randn(flux1.CLIP_WIDTH, 2)
    name = "lora_te1_text_model_encoder_layers_1_self_attn_q_proj"
    file = tmp_path / "lora.safetensors"
    save_file({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}, file)
    pipe = DEV.build()
    found = files.read(file, pipe.layer_names("text_encoder"), pipe.text_encoder)
    assert pipe.adapted_by(file) == ["text_encoder"]
    assert_close(found["encoder.layers.1.self_attn.q_proj.lora_B.weight"], up)


def test_kohyas_third_text_encoder_is_the_t5_which_is_the_second_here(tmp_path, caplog):
    layer = "encoder.block.0.layer.0.SelfAttention.q"
    pipe, name = DEV.build(), f"lora_te3_{layer.replace('.', '_')}"
    file = released.assert_kohyas_file_is_read(pipe, name, layer, network="text_encoder_2", folder=tmp_path)
    assert pipe.adapted_by(file) == ["text_encoder_2"] and not caplog.records


def test_tensors_of_networks_that_the_model_does_not_have_are_named_once(tmp_path, caplog):
    layer = "transformer_blocks.0.attn.to_q"
    width = DEV.build().dit.get_submodule(layer).weight.shape[0]
    keys = {
        f"transformer.{layer}.lora_A.weight": torch.zeros(2, width),
        f"transformer.{layer}.lora_B.weight": torch.zeros(width, 2),
    }
    keys |= {f"text_encoder_3.q.lora_{part}.weight": torch.zeros(2, 2) for part in "AB"}
    save_file(keys, tmp_path / "lora.safetensors")
    pipe = DEV.load()
    pipe.check_adapters([tmp_path / "lora.safetensors"])
    pipe.load_adapter(tmp_path / "lora.safetensors")
    (record,) = caplog.records
    assert "2 tensors, such as 'text_encoder_3.q.lora_A.weight', are of a network that" in record.getMessage()
