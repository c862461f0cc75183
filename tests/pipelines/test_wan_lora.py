"""LoRA files of Wan: those of every program mean the same, and ours sample in diffusers what they sample here."""

import diffusers
import pytest
import torch
from diffusers import WanTransformer3DModel, WanVACETransformer3DModel
from families import FAMILIES
from miniatures import wan, wan_image
from miniatures.requests import LORA, REQUEST, sampled, shaken
from safetensors.torch import save_file
from torch.testing import assert_close

from diffsynth.core.loader import save_safetensors
from diffsynth.diffusion.adapters import files
from diffsynth.diffusion.adapters.lora import LoRA
from diffsynth.pipelines.layouts.wan import LORA_NAMES

WAN, EXPERTS = (next(f for f in FAMILIES if f.name == name) for name in ("wan21_t2v_1_3b", "wan22_t2v_a14b"))
BLOCK = {  # layers of a block: Wan's names and diffusers'
    **{f"self_attn.{part}": f"attn1.to_{part}" for part in "qkv"},
    **{f"cross_attn.{part}": f"attn2.to_{part}" for part in "qkv"},
    "self_attn.o": "attn1.to_out.0",
    "cross_attn.o": "attn2.to_out.0",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}
OF_IMAGE = {"cross_attn.k_img": "attn2.add_k_proj", "cross_attn.v_img": "attn2.add_v_proj"}
AROUND = {
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
}
IN_BLOCKS = {
    f"blocks.{n}.{theirs}": f"blocks.{n}.{ours}" for n in (0, 1) for theirs, ours in (BLOCK | OF_IMAGE).items()
}
KOHYA, PEFT = ("lora_down.weight", "lora_up.weight"), ("lora_A.weight", "lora_B.weight")
# Programs: how each writes a layer's name, its two matrices, and whether it writes alpha.
PROGRAMS = {
    "original": (lambda name, ours: name, ("lora_A.default.weight", "lora_B.default.weight"), False),
    "original with its prefix": (lambda name, ours: f"pipe.dit.{name}", PEFT, False),
    "comfyui": (lambda name, ours: f"diffusion_model.{name}", PEFT, False),
    "comfyui with alpha": (lambda name, ours: f"diffusion_model.{name}", KOHYA, True),
    "musubi": (lambda name, ours: f"lora_unet_{name.replace('.', '_')}", KOHYA, True),
    "diffusers": (lambda name, ours: f"transformer.{ours}", PEFT, False),
}
ALPHA, RANK = 6.0, 4


def i2v() -> WanTransformer3DModel:
    """A network with every kind of layer of Wan's, but VACE's."""
    return wan_image.with_clip()


def matrices(network, layers: dict[str, str]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Random matrices of an update for each layer."""
    generator = torch.Generator().manual_seed(0)
    sizes = {name: network.get_submodule(ours).weight.shape for name, ours in layers.items()}
    return {
        name: (torch.randn(RANK, columns, generator=generator), torch.randn(rows, RANK, generator=generator))
        for name, (rows, columns) in sizes.items()
    }


def as_written(program: str, layers: dict[str, str], updates) -> dict[str, torch.Tensor]:
    """A program's file; where it writes no alpha, the scale is in the second matrix."""
    write, (down, up), has_alpha = PROGRAMS[program]
    tensors = {}
    for name, ours in layers.items():
        key, (a, b) = write(name, ours), updates[name]
        tensors |= {f"{key}.{down}": a, f"{key}.{up}": b if has_alpha else b * ALPHA / RANK}
        tensors |= {f"{key}.alpha": torch.tensor(ALPHA)} if has_alpha else {}
    return tensors


def products(tensors, start: str = "") -> dict[str, torch.Tensor]:
    """The update of each layer, from matrices under peft's names."""
    layers = {key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")}
    update = {name: tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"] for name in layers}
    return {name.removeprefix(start): tensor for name, tensor in update.items()}


@pytest.mark.parametrize("program", PROGRAMS)
def test_files_of_every_program_give_the_same_update(program, tmp_path):
    network, layers = i2v(), IN_BLOCKS | AROUND
    updates = matrices(network, layers)
    save_file(as_written(program, layers, updates), path := tmp_path / "lora.safetensors")
    found = products(files.read(path, LORA_NAMES, network))
    expected = {layers[name]: ALPHA / RANK * b @ a for name, (a, b) in updates.items()}
    assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("program", "layers"),
    [("comfyui", IN_BLOCKS | AROUND), ("comfyui with alpha", IN_BLOCKS), ("musubi", IN_BLOCKS)],
)
def test_a_file_means_what_diffusers_converters_make_of_it(program, layers, tmp_path):
    network = i2v()
    tensors = as_written(program, layers, matrices(network, layers))
    save_file(tensors, path := tmp_path / "lora.safetensors")
    expected = products(diffusers.WanPipeline.lora_state_dict(dict(tensors)), "transformer.")
    assert_close(products(files.read(path, LORA_NAMES, network)), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("start", ["", "diffusion_model.", "pipe.vace."])
def test_layers_of_vace_are_read(start, tmp_path):
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 8, "num_layers": 2, "text_dim": 8}
    network = WanVACETransformer3DModel(**sizes, vace_layers=[0, 1])
    layers = {f"vace_blocks.1.{theirs}": f"vace_blocks.1.{ours}" for theirs, ours in BLOCK.items()}
    layers |= {
        "vace_blocks.0.before_proj": "vace_blocks.0.proj_in",
        "vace_blocks.1.after_proj": "vace_blocks.1.proj_out",
    }
    updates = matrices(network, layers)
    tensors = {f"{start}{key}": t for key, t in as_written("original", layers, updates).items()}
    save_file(tensors, path := tmp_path / "lora.safetensors")
    assert products(files.read(path, LORA_NAMES, network)).keys() == {*layers.values()}


def test_the_first_convolution_has_one_name(tmp_path):
    network = wan.transformer()
    parts = {"lora_A.weight": torch.ones(2, 16, 1, 2, 2), "lora_B.weight": torch.ones(64, 2, 1, 1, 1)}
    tensors = {f"diffusion_model.patch_embedding.{part}": tensor for part, tensor in parts.items()}
    save_file(tensors, path := tmp_path / "lora.safetensors")
    assert LORA_NAMES.in_comfyui("patch_embedding") == "diffusion_model.patch_embedding"
    assert set(files.read(path, LORA_NAMES, network)) == {f"patch_embedding.{part}" for part in parts}


@pytest.mark.parametrize("name", ["norm_k.diff", "q.diff_b"])
def test_differences_of_weights_and_biases_are_refused_by_name(name, tmp_path):
    network, layers = wan.transformer(), {"blocks.0.self_attn.q": "blocks.0.attn1.to_q"}
    tensors = as_written("comfyui", layers, matrices(network, layers))
    key = f"diffusion_model.blocks.0.self_attn.{name}"
    save_file(tensors | {key: torch.zeros(64)}, path := tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match=f"{key}' is a difference of weights.*1 of them.*merge"):
        files.read(path, LORA_NAMES, network)


# Ours in diffusers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["common", "diffusers"])
def test_diffusers_samples_our_latents_with_our_lora(format, tmp_path):
    module = shaken(WAN.module(lora=LORA).load(), strength=0.5)
    tensors, metadata = module.export_weights(format)["lora"]
    save_safetensors(tensors, path := tmp_path / "lora.safetensors", metadata)
    pipe = WAN.load()
    before = sampled(pipe, REQUEST)
    pipe.load_lora("dit", path)
    noise = pipe.prepare([REQUEST])[0]["noise"]
    found = sampled(pipe, REQUEST)
    theirs = wan.sampled_by_diffusers([pipe.complete(REQUEST)], noise, lora=path)
    assert_close(found, theirs, atol=5e-4, rtol=0)
    assert (found - before).abs().max() > 1e-2


# Two experts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["common", "diffusers", "diffsynth", "comfyui"])
def test_a_file_of_the_second_expert_has_the_names_of_the_first(format, tmp_path):
    exported = {}
    for expert in ("dit", "dit2"):
        lora = LoRA(rank=2, alpha=6, models=(expert,), target_modules=list(EXPERTS.layers))
        module = shaken(EXPERTS.module(lora=lora).load(), strength=0.5)
        tensors, metadata = module.export_weights(format)["lora"]
        save_safetensors(tensors, path := tmp_path / f"{expert}.safetensors", metadata)
        module.check_export(path)
        exported[expert] = tensors.keys()
    assert exported["dit"] == exported["dit2"]


def test_diffusers_loads_a_file_into_its_second_transformer(tmp_path):
    module = shaken(EXPERTS.module(lora=LoRA(rank=2, models=("dit2",), target_modules=["to_q"])).load())
    tensors, metadata = module.export_weights("diffusers")["lora"]
    save_safetensors(tensors, path := tmp_path / "low.safetensors", metadata)
    pipe = diffusers.WanPipeline.from_pretrained(wan.experts())
    pipe.load_lora_weights(str(path), load_into_transformer_2=True)
    assert hasattr(pipe.transformer_2, "peft_config") and not hasattr(pipe.transformer, "peft_config")


def test_a_file_says_by_its_names_its_metadata_or_its_user_which_expert_it_is_for(tmp_path):
    pipe = EXPERTS.build()
    layers = {"blocks.0.self_attn.q": "blocks.0.attn1.to_q"}
    updates = matrices(pipe.dit, layers)
    theirs, ours = as_written("musubi", layers, updates), as_written("diffusers", layers, updates)
    save_file(theirs, musubi := tmp_path / "musubi.safetensors")
    save_file(
        {f"transformer_2.{key.partition('.')[2]}": t for key, t in ours.items()},
        named := tmp_path / "named.safetensors",
    )
    save_file(ours, stated := tmp_path / "stated.safetensors", {"diffsynth_adapter": '{"network": "transformer_2"}'})
    assert [pipe.adapted_by(path) for path in (musubi, named, stated)] == [["dit"], ["dit2"], ["dit2"]]
    pipe.check_adapters([chosen := f"dit2:{musubi}"])
    assert pipe.adapted_by(chosen) == ["dit2"] and pipe.adapter_file(chosen) == str(musubi)
    read = [files.read(path, pipe.layer_names("dit2"), pipe.dit2) for path in (musubi, named, stated)]
    assert_close([products(each) for each in read], [products(read[0])] * 3, atol=1e-4, rtol=0)


def test_a_file_goes_to_the_expert_that_is_typed_before_it(tmp_path):
    layers = {"blocks.0.self_attn.q": "blocks.0.attn1.to_q"}
    save_file(as_written("musubi", layers, matrices(EXPERTS.build().dit, layers)), path := tmp_path / "low.safetensors")
    found = []
    for typed in (path, f"dit2:{path}"):
        pipe = EXPERTS.load()
        pipe.load_adapter(typed)
        found.append([name for name in ("dit", "dit2") if hasattr(getattr(pipe, name), "peft_config")])
    assert found == [["dit"], ["dit2"]]
