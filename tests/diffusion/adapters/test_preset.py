"""A preset that stays unmerged: on in training, off in what is sampled, and absent from exports."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny
import torch
from resumed import assert_same_run, uninterrupted
from safetensors.torch import load_file
from test_lora import KINDS, LAYER, TARGETS, adapter_file, assert_close, sample, train

from diffsynth.core.data.dataset import PlainData
from diffsynth.diffusion.adapters.lora import LoRA
from diffsynth.diffusion.adapters.preset import PRESET, without_preset
from diffsynth.diffusion.distillation.roles import STUDENT, TEACHER
from diffsynth.diffusion.loss import Prior, PriorPreservation
from diffsynth.training.validation import Validation

ELSEWHERE = "transformer_blocks.1.attn.to_v"  # a layer that the new adapter leaves alone


def assistant(folder, **options) -> LoRA:
    """An adapter over a preset that is off in sampling."""
    preset = adapter_file(folder / "preset.safetensors", names=(LAYER, ELSEWHERE))
    options = {"rank": 4, "target_modules": TARGETS, **options}
    return LoRA(preset=str(preset), preset_in_sampling=False, **options)


def shaken(module):
    generator = torch.Generator().manual_seed(0)
    for parameter in module.trainable_parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return module


@pytest.mark.slow
def test_it_trains_as_a_merged_preset_does(training_module, samples, tmp_path):
    apart = shaken(training_module(lora=assistant(tmp_path)))
    merged = shaken(training_module(lora=replace(assistant(tmp_path), preset_in_sampling=True)))
    losses = [module(samples) for module in (apart, merged)]
    for each in losses:
        each.mean().backward()
    assert_close(*losses)
    names = [{n for n, p in module.named_parameters() if p.requires_grad} for module in (apart, merged)]
    assert names[0] and not any(PRESET in name.split(".") for name in names[0])
    first, second = ([p.grad for p in module.trainable_parameters()] for module in (apart, merged))
    assert len(first) == len(second) and all(map(torch.allclose, first, second, [1e-3] * len(first)))


def test_pictures_are_of_the_base_and_the_new_adapter_and_the_export_has_no_preset(
    training_module, load_pipe, rows, tiny, tmp_path, caplog
):
    module = training_module(lora=assistant(tmp_path))
    file = train(module, rows, tmp_path)
    assert "THIS EXPORT IS WRONG" not in caplog.text  # it was read back and compared with the adapter
    keys = load_file(file).keys()
    assert keys and not any(PRESET in key or ELSEWHERE in key for key in keys)
    pipe = load_pipe(tiny)
    pipe.load_lora("dit", file)
    with without_preset(module.pipe):
        assert_close(sample(module.pipe), sample(pipe), atol=1e-6)
    pipe.load_lora("dit", tmp_path / "preset.safetensors")
    assert_close(sample(module.pipe), sample(pipe))
    assert (sample(module.pipe) - sample(load_pipe(tiny))).abs().max() > 0.02


@pytest.mark.parametrize("in_sampling", tiny.mostly_slow([True, False], False))
def test_a_validation_samples_without_it_and_measures_the_loss_with_it(
    training_module, rows, tmp_path, monkeypatch, in_sampling
):
    module, seen = training_module(lora=replace(assistant(tmp_path), preset_in_sampling=in_sampling)), []
    monkeypatch.setattr(Validation, "losses", lambda self, module, data: seen.append(active(module)) or {})
    monkeypatch.setattr(Validation, "_generate", lambda self, pipe, requests: seen.append(active(module)) or [])
    accelerator = SimpleNamespace(is_main_process=False, wait_for_everyone=lambda: None)
    Validation(tmp_path, datasets={"all": PlainData(rows)}, prompts=["a"])._evaluate(accelerator, module, 0, "")
    expected = [["default"]] * 3 if in_sampling else [[PRESET, "default"], ["default"], ["default"]]
    assert seen == expected and active(module) == expected[0]


def active(module) -> list[str]:
    return module.pipe.dit.get_submodule(LAYER).active_adapters


@pytest.mark.slow
def test_roles_have_it_too(training_module, load_pipe, tiny, tmp_path):
    """The base with the preset is the teacher of an adapter that learns over it."""
    module = shaken(training_module(PriorPreservation(prior=Prior()), assistant(tmp_path)))
    before = sample(module.pipe)
    with module.roles.active(TEACHER):
        teacher = sample(module.pipe)
    expected = load_pipe(tiny)
    expected.load_lora("dit", tmp_path / "preset.safetensors")
    assert_close(teacher, sample(expected))
    with module.roles.active(STUDENT):
        assert torch.equal(sample(module.pipe), before)
    assert torch.equal(sample(module.pipe), before) and (before - teacher).abs().max() > 1e-3
    assert not any(PRESET in n.split(".") for n, p in module.named_parameters() if p.requires_grad)


@pytest.mark.slow
def test_a_preset_of_another_kind_has_no_room_beside_the_adapter(training_module, tmp_path):
    lokr = replace(KINDS["lokr"], preset=assistant(tmp_path).preset, preset_in_sampling=False)
    with pytest.raises(
        ValueError, match="kind LORA, beside which .* LOKR; set lora=lora, or lora.preset_in_sampling=t"
    ):
        training_module(lora=lokr)
    training_module(lora=replace(KINDS["dora"], preset=lokr.preset, preset_in_sampling=False))


@pytest.mark.slow
def test_it_may_stand_beside_stored_weights_into_which_it_could_not_be_merged(training_module, samples, tmp_path):
    plain, stored = (shaken(training_module(lora=assistant(tmp_path), storage=storage)) for storage in ("none", "fp8"))
    assert_close(stored(samples), plain(samples), atol=0.2)
    with pytest.raises(
        ValueError, match="lora.preset cannot be merged into dit, .* lora.preset_in_sampling=false keeps"
    ):
        training_module(lora=replace(assistant(tmp_path), preset_in_sampling=True), storage="fp8")


@pytest.mark.slow
def test_a_run_with_an_assistant_ends_and_resumes(tmp_path):
    file = adapter_file(tmp_path / "preset.safetensors", names=(LAYER,), width=128)
    options = [f"lora.preset={file}", "lora.preset_in_sampling=false", "checkpoint.every=2", "max_steps=5"]
    tiny.cut_off(2, tmp_path, *options)
    assert_same_run(tiny.train(tmp_path, *options), uninterrupted(*options))
