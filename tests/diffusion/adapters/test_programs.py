"""Adapter files and other programs: which program loads what is exported, and what is read of their files."""

import json
import re
from functools import cache

import pytest
import tiny
import torch
from families import FAMILIES
from programs import PIPELINES, are_equal, comfyui_names, lycoris_update, programs_that_load, updates_of
from safetensors.torch import load_file, save_file

from diffsynth.core.loader import save_safetensors
from diffsynth.diffusion.adapters import files
from diffsynth.diffusion.adapters.lora import LoHa, LoKr, LoRA
from diffsynth.diffusion.logger import ModelLogger

QWEN, FLUX2 = FAMILIES[:2]
KREA2, ERNIE = (next(family for family in FAMILIES if family.name == name) for name in ("krea2", "ernie_image"))
SD3, WAN, ANIMA = (
    next(family for family in FAMILIES if family.name == name) for name in ("sd3_5_medium", "wan21_t2v_1_3b", "anima")
)
EVERY = {"diffusers", "ComfyUI", "DiffSynth-Studio"}
# The table in docs/runs.md, and lines of the pages in docs/families.
LOADS = [
    (QWEN, "common", EVERY),
    (QWEN, "diffusers", {"diffusers"}),
    (QWEN, "diffsynth", EVERY),
    (QWEN, "comfyui", EVERY),
    (FLUX2, "common", {"diffusers", "ComfyUI"}),
    (FLUX2, "diffusers", {"diffusers"}),
    (FLUX2, "diffsynth", {"ComfyUI", "DiffSynth-Studio"}),
    (FLUX2, "comfyui", {"ComfyUI"}),
    (KREA2, "common", {"diffusers", "ComfyUI"}),
    (KREA2, "diffusers", {"diffusers"}),
    (KREA2, "diffsynth", {"ComfyUI"}),
    (KREA2, "comfyui", {"ComfyUI"}),
    (ERNIE, "common", {"diffusers", "ComfyUI"}),
    (ERNIE, "diffusers", {"diffusers"}),
    (ERNIE, "diffsynth", {"DiffSynth-Studio"}),
    (ERNIE, "comfyui", {"ComfyUI", "DiffSynth-Studio"}),
    (SD3, "common", {"diffusers", "ComfyUI"}),
    (SD3, "diffusers", {"diffusers"}),
    (SD3, "diffsynth", {"DiffSynth-Studio"}),
    (SD3, "comfyui", {"ComfyUI"}),
    (WAN, "common", EVERY),
    (WAN, "diffusers", {"diffusers"}),
    (WAN, "diffsynth", {"DiffSynth-Studio"}),
    (WAN, "comfyui", {"ComfyUI", "DiffSynth-Studio"}),  # diffusers refuses an alpha of layers outside of the blocks
    (ANIMA, "common", EVERY),
    (ANIMA, "diffusers", {"diffusers"}),
    (ANIMA, "diffsynth", {"DiffSynth-Studio"}),
    (ANIMA, "comfyui", {"ComfyUI", "DiffSynth-Studio"}),
]
LAST = {"krea2": "final_layer.linear", "ernie_image": "final_linear"}
DOUBLE, SINGLE = "transformer_blocks.1.attn", "single_transformer_blocks.1.attn"
QKV = [f"{DOUBLE}.to_{part}" for part in "qkv"]


@cache
def built(family):
    """The family's pipeline on the meta device, which no test changes."""
    return family.build()


def shaken(family, targets, kind=LoRA, **options):
    """A training module whose adapter's matrices are random, and the updates of its layers."""
    module = family.module(lora=kind(rank=4, alpha=6, target_modules=targets, **options)).load()
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return module, updates_of(module.pipe.dit)


def exported(module, format, path):
    tensors, metadata = module.export_weights(format)["lora"]
    save_safetensors(tensors, path, metadata)
    return path


# What is exported -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family", tiny.mostly_slow([QWEN, FLUX2, KREA2, ERNIE, SD3, WAN, ANIMA], QWEN, FLUX2, WAN), ids=str
)
def test_programs_load_the_formats_that_the_table_says(family, tmp_path):
    module, updates = shaken(family, [*family.layers, LAST.get(family.name, "proj_out")])
    for of_family, format, expected in LOADS:
        if of_family is family:
            file = exported(module, format, tmp_path / f"{format}.safetensors")
            assert programs_that_load(file, built(family).dit, family.name, updates) == expected, format


@pytest.mark.parametrize(
    ("kind", "options", "format", "expected"),
    [
        (LoRA, {"use_dora": True}, "common", {"diffusers"}),
        (LoRA, {"use_dora": True}, "comfyui", {"ComfyUI"}),
        (LoHa, {}, "common", {"ComfyUI"}),
        (LoKr, {"decompose_factor": 8}, "common", {"ComfyUI"}),
    ],
)
def test_other_kinds_of_adapters_load_in_one_program(kind, options, format, expected, tmp_path):
    module, updates = shaken(QWEN, ["to_q"], kind, **options)
    file = exported(module, format, tmp_path / "file.safetensors")
    assert programs_that_load(file, built(QWEN).dit, "emoji", updates) == expected


@pytest.mark.parametrize("family", [QWEN, FLUX2], ids=str)
def test_the_default_is_the_format_that_most_programs_load(family, tmp_path):
    assert ModelLogger(output_path="x").formats == ("common",)
    module, updates = shaken(family, list(family.layers), use_rslora=True)
    file = exported(module, "common", tmp_path / "file.safetensors")
    assert programs_that_load(file, built(family).dit, family.name, updates) >= {"diffusers", "ComfyUI"}


def test_comfyui_loads_every_layer_of_a_flux2_file(tmp_path):
    module, updates = shaken(FLUX2, "all-linear")
    file = exported(module, "comfyui", tmp_path / "all.safetensors")
    known = comfyui_names(built(FLUX2).dit, "emoji_flux2")
    assert {key.rpartition(".lora_")[0] or key.removesuffix(".alpha") for key in load_file(file)} <= known.keys()
    assert programs_that_load(file, built(FLUX2).dit, "emoji_flux2", updates) == {"ComfyUI"}
    module.check_export(file)


# What is read ---------------------------------------------------------------------------------------------------------


def pair(name, ours, family=QWEN, up="lora_up.weight", down="lora_down.weight", rank=2):
    """Matrices, under a name of another program, for layers of ours that it fuses."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = built(family).dit.get_submodule(ours[0]).weight.shape
    shapes = {down: (rank, columns), up: (rows * len(ours), rank)}
    return {f"{name}{end}": torch.randn(shape, generator=generator) for end, shape in shapes.items()}


def update(tensors, scale=1.0):
    """The update of one pair of matrices."""
    down, up = (next(t for key, t in tensors.items() if re.search(side, key)) for side in ("down|lora_A", "up|lora_B"))
    return scale * up @ down


def updates_read(path, family):
    """The updates that are read of a file, by layer."""
    tensors = files.read(path, built(family).layer_names("dit"), built(family).dit)
    layers = {key.rpartition(".lora_")[0] for key in tensors}
    return {layer: tensors[f"{layer}.lora_B.weight"] @ tensors[f"{layer}.lora_A.weight"] for layer in layers}


def flat(layer):
    return layer.replace(".", "_")


KOHYA, PEFT, OLD = (
    ("lora_up.weight", "lora_down.weight"),
    ("lora_B.weight", "lora_A.weight"),
    ("lora.up.weight", "lora.down.weight"),
)
SPELLINGS = {
    "kohya": (lambda layer: f"lora_unet_{flat(layer)}.", KOHYA),
    "lycoris": (lambda layer: f"lycoris_{flat(layer)}.", KOHYA),
    "onetrainer": (lambda layer: f"lora_transformer_{flat(layer)}.", KOHYA),
    "peft": (lambda layer: f"base_model.model.{layer}.", PEFT),
    "peft around diffusers": (lambda layer: f"base_model.model.transformer.{layer}.", PEFT),
    "earlier ComfyUI exports": (lambda layer: f"diffusion_model.{layer}.", KOHYA),
    "old diffusers": (lambda layer: f"transformer.{layer}.", OLD),
    "processors": (
        lambda layer: f"transformer.{layer.replace('.attn.', '.attn.processor.').removesuffix('.0')}_",
        OLD,
    ),
}


@pytest.mark.parametrize("family", tiny.mostly_slow([QWEN, FLUX2, KREA2], QWEN, FLUX2), ids=str)
def test_names_of_every_program_are_read(family, tmp_path):
    for layer in (QKV[0], f"{DOUBLE}.to_out.0"):
        for program, (name, endings) in SPELLINGS.items():
            tensors = pair(name(layer), [layer], family, *endings)
            save_file(tensors, tmp_path / "lora.safetensors")
            assert are_equal(updates_read(tmp_path / "lora.safetensors", family), {layer: update(tensors)}), program


@pytest.mark.parametrize(
    ("family", "layer", "ours"),
    [
        (QWEN, "lora_unet_transformer_blocks_1_attn_add_k_proj", [f"{DOUBLE}.add_k_proj"]),
        (QWEN, "lora_unet_proj_out", ["proj_out"]),
        (FLUX2, "lora_unet_double_blocks_1_img_attn_qkv", QKV),
        (FLUX2, "lora_unet_double_blocks_1_txt_attn_qkv", [f"{DOUBLE}.add_{part}_proj" for part in "qkv"]),
        (FLUX2, "lora_unet_double_blocks_1_txt_mlp_2", ["transformer_blocks.1.ff_context.linear_out"]),
        (FLUX2, "lora_unet_single_blocks_1_linear2", ["single_transformer_blocks.1.attn.to_out"]),
        (FLUX2, "diffusion_model.double_blocks.1.img_attn.qkv", QKV),
        (FLUX2, "base_model.model.double_blocks.1.img_attn.proj", [f"{DOUBLE}.to_out.0"]),
        (FLUX2, "diffusion_model.time_in.in_layer", ["time_guidance_embed.timestep_embedder.linear_1"]),
        *(
            pytest.param(family, name, [layer], marks=pytest.mark.slow)
            for family, name, layer in (
                (KREA2, "diffusion_model.blocks.1.attn.wq", f"{DOUBLE}.to_q"),
                (KREA2, "base_model.model.blocks.0.attn.gate", "transformer_blocks.0.attn.to_gate"),
                (KREA2, "diffusion_model.txtfusion.refiner_blocks.1.mlp.up", "text_fusion.refiner_blocks.1.ff.up"),
                (KREA2, "diffusion_model.txtmlp.3", "txt_in.linear_2"),
                (KREA2, "diffusion_model.last.linear", "final_layer.linear"),
                (ANIMA, "diffusion_model.blocks.1.self_attn.output_proj", "transformer_blocks.1.attn1.to_out.0"),
                (ANIMA, "diffusion_model.blocks.0.mlp.layer2", "transformer_blocks.0.ff.net.2"),
                (ANIMA, "diffusion_model.final_layer.adaln_modulation.2", "norm_out.linear_2"),
                (ERNIE, "diffusion_model.layers.1.self_attention.to_out.0", "layers.1.self_attention.to_out.0"),
            )
        ),
    ],
)
def test_a_file_means_what_diffusers_converter_makes_of_it(family, layer, ours, tmp_path):
    kohya = layer.startswith("lora_unet_")
    tensors = pair(f"{layer}.", ours, family, *(KOHYA if kohya else PEFT))
    if kohya:
        tensors[f"{layer}.alpha"] = torch.tensor(6.0)
    save_file(tensors, tmp_path / "lora.safetensors")
    converted = PIPELINES[family.name].lora_state_dict(dict(tensors))
    expected = {
        name: converted[f"transformer.{name}.lora_B.weight"] @ converted[f"transformer.{name}.lora_A.weight"]
        for name in ours
    }
    assert are_equal(updates_read(tmp_path / "lora.safetensors", family), expected)


def random(**shapes):
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


LYCORIS = {
    "loha": random(hada_w1_a=(576, 2), hada_w1_b=(2, 192), hada_w2_a=(576, 2), hada_w2_b=(2, 192)),
    "lokr": random(lokr_w1=(24, 8), lokr_w2_a=(24, 2), lokr_w2_b=(2, 24)),
    "lokr whole": random(lokr_w1=(24, 8), lokr_w2=(24, 24)),
    "lokr both": random(lokr_w1_a=(24, 2), lokr_w1_b=(2, 8), lokr_w2_a=(24, 2), lokr_w2_b=(2, 24)),
}


@pytest.mark.parametrize("kind", LYCORIS)
@pytest.mark.parametrize("fused", [False, True])
def test_lycoris_files_are_read_and_a_fused_layers_update_is_divided(kind, fused, tmp_path):
    parts, layers = LYCORIS[kind], QKV
    if not fused:  # the first third of the rows is an update of one layer
        rows = ("hada_w1_a", "hada_w2_a", "lokr_w1", "lokr_w1_a")
        parts = {name: t[: len(t) // 3].clone() if name in rows else t for name, t in parts.items()}
        layers = QKV[:1]
    stem = "lycoris_double_blocks_1_img_attn_qkv" if fused else f"lycoris_{flat(QKV[0])}"
    named = {f"{stem}.{name}": tensor for name, tensor in parts.items()}
    save_file({**named, f"{stem}.alpha": torch.tensor(6.0)}, tmp_path / "lycoris.safetensors")
    network = type(built(FLUX2).dit).from_config(built(FLUX2).dit.config)
    files.load(network, tmp_path / "lycoris.safetensors", built(FLUX2).layer_names("dit"))
    expected = lycoris_update(parts | {"alpha": torch.tensor(6.0)}).chunk(len(layers))
    assert are_equal(updates_of(network), dict(zip(layers, expected, strict=True)))


def test_a_kronecker_product_that_layers_cannot_share_is_refused(tmp_path):
    stem = "diffusion_model.double_blocks.1.img_attn.qkv"
    parts = random(lokr_w1=(8, 8), lokr_w2=(48, 16))
    save_file({f"{stem}.{name}": tensor for name, tensor in parts.items()}, tmp_path / "file.safetensors")
    with pytest.raises(ValueError, match=r"file.safetensors: double_blocks.1.img_attn.qkv: lokr_w1 has shape \(8, 8\)"):
        updates_read(tmp_path / "file.safetensors", FLUX2)


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"r": 2, "lora_alpha": 6}, 3),
        ({"r": 2, "lora_alpha": 6, "use_rslora": True}, 6 / 2**0.5),
        ({"r": 8, "lora_alpha": 6, "rank_pattern": {"to_q": 2}, "alpha_pattern": {"^.*to_k": 9, "attn.to_q": 4}}, None),
        ({"r": 8, "lora_alpha": 6, "rank_pattern": {".*": 2}, "alpha_pattern": {r"^transformer_blocks\.1": 9}}, 3),
        ({"r": 8, "lora_alpha": 6, "alpha_pattern": {f"^{QKV[0]}$".replace(".", r"\."): 4}}, 2),
    ],
)
def test_the_folder_that_peft_saves_is_read_with_its_scale(config, scale, tmp_path):
    tensors = pair(f"base_model.model.{QKV[0]}.", QKV[:1], QWEN, *PEFT)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "target_modules": "(.*)*Q"} | config)
    )
    if scale is None:
        with pytest.raises(ValueError, match=r"adapter_config.json has the expression '\^\.\*to_k' in alpha_pattern"):
            updates_read(tmp_path, QWEN)
    else:
        assert are_equal(updates_read(tmp_path, QWEN), {QKV[0]: update(tensors, scale)})


@pytest.mark.parametrize(
    ("config", "warns"), [({"r": 8}, 1), ({"r": 2}, 0), ({}, 0), ({"r": 8, "rank_pattern": {"q": 2}}, 0)]
)
def test_a_rank_that_is_not_that_of_the_tensors_is_warned_of_once(config, warns, tmp_path, caplog):
    tensors = pair(f"base_model.model.{QKV[0]}.", QKV[:1], QWEN, *PEFT)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 6} | config))
    for _ in range(2):
        assert are_equal(updates_read(tmp_path, QWEN), {QKV[0]: update(tensors, 3)})
    assert caplog.text.count("states r=8, but its tensors have rank 2, which counts") == warns


# What is refused ------------------------------------------------------------------------------------------------------

GOOD = {
    f"transformer.{QKV[0]}.lora_A.weight": torch.ones(2, 128),
    f"transformer.{QKV[0]}.lora_B.weight": torch.ones(128, 2),
}
CONFIG = {"r": 2, "lora_alpha": 2, "peft_type": "LORA", "target_modules": ["to_q"]}


def stating(**changes):
    return json.dumps({f"transformer.{key}": value for key, value in (CONFIG | changes).items()})


@pytest.mark.parametrize(
    ("metadata", "tensors", "message"),
    [
        ("{not json", GOOD, "lora_adapter_metadata is no JSON"),
        ("[]", GOOD, "lora_adapter_metadata is '\\[\\]', expected a JSON object"),
        ("[" * 100_000, GOOD, "lora_adapter_metadata is no JSON"),
        (stating(peft_type="EVIL"), GOOD, "peft_type='EVIL'; expected one of LORA"),
        (stating(peft_type=["LORA"]), GOOD, "peft_type=\\['LORA'\\]; expected one of LORA"),
        (stating(r="four"), GOOD, "r='four', expected a number above 0"),
        (stating(lora_alpha=float("nan")), GOOD, "lora_alpha='nan', expected a number"),
        (stating(lora_alpha=10**400), GOOD, "lora_alpha='1000.*, expected a number"),
        (stating(alpha_pattern=[1]), GOOD, "alpha_pattern=\\[1\\], expected alphas by layer"),
        (stating(alpha_pattern={"(.*)*Q": 1}), GOOD, "has the expression '\\(\\.\\*\\)\\*Q' in alpha_pattern"),
        (stating(), {key: torch.zeros(()) for key in GOOD}, "has shape \\(\\), expected a matrix"),
        (stating(), {key: t / 0 for key, t in GOOD.items()}, "values that are NaN or infinite"),
        (
            stating(),
            {key: t.to(torch.complex64) for key, t in GOOD.items()},
            "has dtype torch.complex64, expected a fl",
        ),
        (stating(), {key: t.byte().view(torch.float4_e2m1fn_x2) for key, t in GOOD.items()}, "has dtype torch.float4_"),
        (stating(), {key: t.to(torch.uint16) for key, t in GOOD.items()}, "has dtype torch.uint16, expected a float"),
        (stating(), GOOD | {"x" * 10_000: torch.ones(1)}, "the name 'x{40}'… has 10000 characters, expected at most"),
        (stating(), {key: t[:0] for key, t in GOOD.items()}, "has shape \\(0, .*\\), expected a matrix"),
        (stating(), {key: t[:, :128][: 128 if "B" in key else 1] for key, t in GOOD.items()}, "whose ranks differ"),
        (stating(), dict(list(GOOD.items())[:1]), "to_q has no lora_B.weight; the file is incomplete"),
        (stating(), GOOD | {f"{QKV[0]}.lora_up.weight": torch.zeros(128, 2)}, "a second tensor has the meaning of"),
        (stating(), GOOD | {f"transformer.{QKV[0]}.alpha": torch.zeros(2)}, "to_q.alpha is .*, expected one finite"),
        (stating(), GOOD | {f"transformer.{QKV[0]}.diff": torch.zeros(128)}, "to_q.diff' is a difference of weights"),
        (stating(), GOOD | {QKV[0]: torch.zeros(128, 128)}, "to_q' is a layer and no part of an adapter"),
        (stating(), {k: t[:, :1].repeat(1, 64) for k, t in GOOD.items()}, "takes 128 features; .* of another width"),
        (
            stating(),
            {k: t[:64] for k, t in GOOD.items()},
            "has 64 outputs and 128 inputs, but the layer has 128 and 128",
        ),
        (
            stating(),
            GOOD | {"single_blocks.0.linear1.lora_A.weight": torch.ones(2, 128)},
            "single_blocks.0.linear1.* belongs to no layer of Qwen.*: it lacks 1 of the file's 2 layers",
        ),
    ],
)
def test_what_is_wrong_with_a_file_is_said_in_one_line_that_names_it(metadata, tensors, message, tmp_path):
    save_file(tensors, path := tmp_path / "bad.safetensors", {"lora_adapter_metadata": metadata})
    with pytest.raises(ValueError, match=f"bad.safetensors.*{message}") as refused:
        built(QWEN).check_adapters([path])
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 600


def test_layers_of_another_text_encoder_are_named_as_the_file_writes_them(tmp_path):
    stem = "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora"
    clip = {f"{stem}_down.weight": torch.ones(2, 64), f"{stem}_up.weight": torch.ones(64, 2)}
    save_file(GOOD | clip, path := tmp_path / "kohya.safetensors")
    said = f"'{stem}_down.weight' belongs to no layer of .* \\(these layers are of another text encoder\\)"
    with pytest.raises(ValueError, match=f"{said}; .* it lacks 1 of the file's 2 layers"):
        built(QWEN).check_adapters([path])


@pytest.mark.parametrize("changes", [{"target_modules": "(.*)*" * 12 + "Q"}, {"r": 10**9}])
def test_layers_and_ranks_are_those_of_the_tensors(changes, tmp_path):
    save_file(GOOD, path := tmp_path / "odd.safetensors", {"lora_adapter_metadata": stating(**changes)})
    assert are_equal(updates_read(path, QWEN), {QKV[0]: update(GOOD)})


@pytest.mark.parametrize("about", ["{", "[]", '{"sampling": 3}'])
def test_a_files_sampling_settings_that_are_none_are_refused(about, tmp_path):
    save_file(GOOD, path := tmp_path / "odd.safetensors", {"diffsynth": about})
    with pytest.raises(ValueError, match="odd.safetensors: diffsynth "):
        built(QWEN).use_sampling_settings_of(path)
