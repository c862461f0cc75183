"""Adapter files under the names of other programs."""

import copy
import json
import logging
from collections.abc import Callable
from functools import partial

import pytest
import torch
import yaml
from families import FAMILIES
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from diffsynth.diffusion.adapters.files import export
from diffsynth.diffusion.adapters.formats import FORMATS
from diffsynth.diffusion.adapters.lora import LoHa, LoKr, LoRA, find_layers
from diffsynth.diffusion.logger import ModelLogger
from diffsynth.training.accelerator import make_accelerator

TARGETS = ["to_q", "img_mlp.net.2"]
LAYER = "transformer_blocks.0.attn.to_q"


@pytest.fixture
def trained(training_module):
    """A training module whose adapter does something."""

    def make(**options):
        module = training_module(lora=LoRA(rank=4, alpha=8, target_modules=TARGETS, **options))
        generator = torch.Generator().manual_seed(0)
        for name, parameter in module.named_parameters():
            if parameter.requires_grad and "lora_" in name:
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
        return module

    return make


def save(module, folder, *formats, **options):
    logger = ModelLogger(folder / "weights", formats=formats, **options)
    logger.save(make_accelerator("cpu", "float32"), module, "step-1")
    return logger.saved


def answers(module, samples):
    with torch.no_grad():
        return module(samples)


@pytest.mark.parametrize("names", FORMATS)
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}], ids=["lora", "rslora"])
def test_a_file_of_any_format_gives_a_fresh_model_what_was_trained(
    names, options, trained, training_module, samples, tmp_path
):
    module = trained(**options)
    (path,) = save(module, tmp_path, names)
    fresh = training_module(lora=LoRA(rank=1, target_modules=["to_out.0"]))  # an adapter that is zero
    fresh.pipe.load_lora("dit", path)
    torch.testing.assert_close(answers(fresh, samples), answers(module, samples), atol=1e-5, rtol=1e-5)


def test_dora_goes_through_comfyui_names(trained, training_module, samples, tmp_path):
    module = trained(use_dora=True)
    (path,) = save(module, tmp_path, "comfyui")
    fresh = training_module(lora=LoRA(rank=1, target_modules=["to_out.0"]))
    fresh.pipe.load_lora("dit", path)
    torch.testing.assert_close(answers(fresh, samples), answers(module, samples), atol=1e-5, rtol=1e-5)


def test_each_format_has_its_names(trained, tmp_path):
    paths = {path.name.split(".")[1]: path for path in save(trained(), tmp_path, *FORMATS)}
    keys = {names: set(load_file(path)) for names, path in paths.items()}
    assert f"transformer.{LAYER}.lora_A.weight" in keys["diffusers"]
    assert f"{LAYER}.lora_A.default.weight" in keys["diffsynth"]
    assert {f"diffusion_model.{LAYER}.{part}" for part in ("lora_down.weight", "lora_up.weight", "alpha")} <= keys[
        "comfyui"
    ]
    assert load_file(paths["comfyui"])[f"diffusion_model.{LAYER}.alpha"].item() == 8


def test_a_file_says_where_it_comes_from(trained, tmp_path):
    prompts = ["a line emoji", "https://me:it's@h/x", "/home/alice/secret/a"]
    (path,) = save(trained(), tmp_path, "diffusers", trigger_prompts=prompts)
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["diffsynth"])
    assert about["trigger_prompts"] == ["a line emoji", "https://***@h/x", "***/a"]
    assert about["dit"] == {"kind": "LORA", "rank": 4, "alpha": 8}
    assert len(about["base_model"]["dit"]["fingerprint"]) == 16


def test_a_file_says_how_it_was_made_without_credentials_and_folders(trained, tmp_path):
    config = {"output_root": str(tmp_path), "run_dir": "${output_root}/x", "dataset": {"path": "https://me:pw@h/x"}}
    model = {"model_id": "Qwen/Qwen-Image", "path": "/home/alice/secret/dit", "license": "${oc.env:KEY}"}
    hydra = {"run": {"dir": str(tmp_path)}}
    text = yaml.safe_dump(config | {"model": model, "hydra": hydra, "lr": 1e-4})
    (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
    (path,) = save(trained(), tmp_path, "diffusers")
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    about = json.loads(metadata["diffsynth"])
    assert str(tmp_path.parent) not in str(metadata) and about["base_model"]["dit"]["path"] == "***/transformer"
    assert yaml.safe_load(about["config"]) == {
        "output_root": f"***/{tmp_path.name}",
        "run_dir": "${output_root}/x",
        "dataset": {"path": "https://***@h/x"},
        "model": {"model_id": "Qwen/Qwen-Image", "path": "***/dit", "license": "${oc.env:KEY}"},
        "lr": 1e-4,
    }


def test_what_a_format_has_no_names_for_is_refused(training_module):
    module = training_module(lora=LoHa(rank=2, target_modules=TARGETS))
    for names in ("diffsynth", "comfyui"):
        with pytest.raises(ValueError, match=f"{names} has no names for LOHA"):
            module.export_weights(names)


def test_an_unknown_format_is_refused_with_those_there_are(tmp_path):
    with pytest.raises(ValueError, match="diffusers.*diffsynth.*comfyui"):
        ModelLogger(tmp_path, formats=["kohya"])


@pytest.mark.parametrize("change", [lambda t: t * 1.01, lambda t: t.flip(0)], ids=["scaled", "turned"])
def test_a_file_that_does_not_hold_what_was_trained_is_found_out(change, trained, tmp_path):
    module = trained()
    (path,) = save(module, tmp_path, "diffusers")
    tensors = load_file(path)
    key = f"transformer.{LAYER}.lora_B.weight"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file({**tensors, key: change(tensors[key])}, path, metadata)
    with pytest.raises(ValueError, match=f"{LAYER} differs"):
        module.check_export(path)


def test_a_file_with_a_key_too_few_is_found_out(trained, tmp_path):
    module = trained()
    (path,) = save(module, tmp_path, "diffsynth")
    tensors = load_file(path)
    del tensors[f"{LAYER}.lora_A.default.weight"], tensors[f"{LAYER}.lora_B.default.weight"]
    save_file(tensors, path)
    with pytest.raises(ValueError, match=f"{LAYER} differs"):
        module.check_export(path)


def test_dropout_is_no_difference(trained, tmp_path, caplog):
    save(trained(dropout=0.5), tmp_path, *FORMATS)
    assert caplog.text == ""


def test_a_wrong_export_is_named_loudly_and_kept(trained, tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(FORMATS, "diffsynth", without_scale)
    with caplog.at_level(logging.ERROR):
        (path,) = save(trained(), tmp_path, "diffsynth")
    assert "THIS EXPORT IS WRONG" in caplog.text and path.exists()


def without_scale(tensors, config, prefix):
    return {key.replace(".weight", ".default.weight"): tensor for key, tensor in tensors.items()}


def test_reading_a_file_back_leaves_the_training_as_it_was(trained, samples, tmp_path):
    module = trained(dropout=0.5)
    modes = [part.training for part in module.modules()]
    before = {name: (p.clone(), p.requires_grad) for name, p in module.named_parameters()}
    torch.manual_seed(0)
    expected = answers(module, samples)
    save(module, tmp_path, *FORMATS)
    assert modes == [part.training for part in module.modules()] and any(modes)
    after = dict(module.named_parameters())
    assert before.keys() == after.keys()
    assert all(torch.equal(p, after[name]) and grad == after[name].requires_grad for name, (p, grad) in before.items())
    torch.manual_seed(0)
    assert torch.equal(answers(module, samples), expected)


ADAPTERS = {
    "lora": LoRA(rank=4),
    "rslora": LoRA(rank=4, use_rslora=True),
    "dora": LoRA(rank=4, use_dora=True),
    "loha": LoHa(rank=4),
    "lokr": LoKr(rank=4),
}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_what_cannot_be_written_is_refused_before_there_is_anything_to_write(family, tmp_path):
    """For every option of lora, family and format: the check refuses exactly what an export would refuse."""
    pipe = family.build()
    network, names = pipe.network, pipe.layer_names(pipe.in_iteration_models[0])
    (layer,) = find_layers(network, family.layers, "dit")[:1]
    for adapter in ADAPTERS.values():
        parent = nn.ModuleDict({layer.rpartition(".")[2]: copy.deepcopy(network.get_submodule(layer))})
        adapter.add(parent, list(parent), seed=0)
        for format in FORMATS:
            check = partial(ModelLogger(tmp_path, formats=[format]).check_formats, adapter, family.pipeline)
            written, checked = refusal(partial(export, parent, names, format)), refusal(check)
            assert checked == written and "\n" not in checked


def refusal(act: Callable[[], object]) -> str:
    try:
        act()
    except ValueError as error:
        return str(error)
    return ""


def test_a_format_of_adapters_is_refused_where_there_is_no_adapter(tmp_path):
    with pytest.raises(ValueError, match=r"export\.formats is \['comfyui'\].*in full \(lora=none\)"):
        ModelLogger(tmp_path, formats=["comfyui"]).check_formats(None, FAMILIES[0].pipeline)
