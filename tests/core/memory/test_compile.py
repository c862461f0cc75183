"""Compiled blocks: they train as the others do, share graphs, keep names; and where they cannot be, it is said."""

import logging

import pytest
import tiny
import torch
from diffusers import AutoencoderKL
from torch._subclasses import FakeTensorMode
from torch.testing import assert_close

from diffsynth.core.data import Sample
from diffsynth.core.data.dataset import Row
from diffsynth.core.memory import compile as compiling
from diffsynth.core.memory.compile import check_compilable, compile_blocks
from diffsynth.diffusion.adapters.lora import LoRA
from diffsynth.diffusion.loss import DMD2, AutoencoderLoss
from diffsynth.diffusion.trained import TrainProgress

LORA = LoRA(rank=4)


@pytest.fixture(autouse=True)
def graphs(monkeypatch, caplog):
    """`graphs()`: how many were compiled; by tracing alone, the compiler's own work is left out."""
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")
    caplog.set_level(logging.INFO, logger=compiling.__name__)
    yield lambda: sum("Compiled a block" in record.message for record in caplog.records)
    torch.compiler.reset()


def gradients(module, samples, progress=None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss (B,) of a batch, and the gradient of everything trained."""
    module.zero_grad()
    loss = module(samples, progress)
    loss.sum().backward()
    return loss.detach(), {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def shaken(module):
    """With an adapter that does something."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.trainable_parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return module


def pair(training_module, *arguments, **options):
    """A module whose blocks are compiled, and the same uncompiled."""
    return [shaken(training_module(*arguments, compile=choice, **options)) for choice in ("blocks", "none")]


def resized(samples, width: int) -> list[Sample]:
    return [Sample(Row({**s.data, "image": s.data["image"].resize((width, 48))}), s.epoch, s.index) for s in samples]


def assert_same_gradients(compiled, plain, samples) -> None:
    (loss, grads), (expected_loss, expected) = (gradients(module, samples) for module in (compiled, plain))
    assert_close(loss, expected_loss)
    assert_close({name: grads[name] for name in expected}, expected)
    assert not any(
        grads[name].any() for name in grads.keys() - expected.keys()
    )  # the last block's text, which none reads


COMPILED = [{}, {"checkpointing": "blocks", "offload_activations": True}]


@pytest.mark.parametrize("options", tiny.mostly_slow(COMPILED, COMPILED[1]))
def test_compiled_blocks_train_an_adapter_as_uncompiled_ones(options, training_module, samples, graphs):
    compiled, plain = pair(training_module, None, LORA, **options)
    assert_same_gradients(compiled, plain, samples)
    assert graphs() == 2  # the first block, and all the others


@pytest.mark.slow
def test_sizes_and_prompts_of_any_length_share_their_graphs(training_module, samples, graphs):
    compiled, plain = pair(training_module, None, LORA, checkpointing="blocks")
    for width, rows in ((32, samples[:2]), (64, samples[1:]), (48, samples[1:]), (96, samples[:2])):
        assert_same_gradients(compiled, plain, resized(rows, width))
    assert graphs() == 4  # for one size, then for any


@pytest.mark.slow
def test_full_training_is_compiled_as_well(training_module, samples, graphs):
    compiled, plain = pair(training_module)
    assert_same_gradients(compiled, plain, samples)
    assert graphs() == 1


def test_names_of_weights_do_not_change(training_module, samples):
    compiled, plain = pair(training_module, None, LORA)
    assert list(compiled.state_dict()) == list(plain.state_dict())
    assert compiled.export_weights()["lora"][0].keys() == plain.export_weights()["lora"][0].keys()


def test_more_graphs_than_expected_are_told(training_module, samples, monkeypatch, caplog):
    monkeypatch.setattr(compiling, "VARIANTS", 1)
    training_module(None, LORA, compile="blocks")(samples)  # two graphs: the first block, and the others
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1 and "memory.compile=none" in warnings[0]


def test_a_network_that_repeats_no_block_is_refused():
    with pytest.raises(ValueError, match="AutoencoderKL .* memory.compile=none"):
        check_compilable(AutoencoderKL(block_out_channels=(32,)))


def test_a_torch_that_cannot_compile_blocks_is_refused(monkeypatch):
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.6.0+cpu"))
    with pytest.raises(ValueError, match="memory.compile=blocks needs torch 2.7 or newer, and this is 2.6.0"):
        check_compilable(AutoencoderKL(block_out_channels=(32,)))


def test_an_objective_that_calls_no_such_network_is_refused(training_module):
    with pytest.raises(ValueError, match="memory.compile=blocks: AutoencoderLoss calls no network"):
        training_module(AutoencoderLoss(), compile="blocks")


def test_tensors_without_numbers_run_as_they_are(pipe):
    assert compile_blocks(pipe.dit.to("meta")) is None
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert compile_blocks(type(pipe.dit).from_config(pipe.dit.config)) is None
    assert all(block._compiled_call_impl is None for block in pipe.dit.transformer_blocks)


def distilled(training_module, samples, compile: str) -> list:
    """Loss and gradients of a student's step and of its fake score's."""
    module = shaken(training_module(DMD2(), LORA, compile=compile, checkpointing="blocks"))
    found = []
    for step in (0, 1):
        found.append(gradients(module, samples, TrainProgress(step, 10)))
    return found


@pytest.mark.slow  # half a minute of tracing
def test_roles_that_share_a_network_switch_adapters_as_before(training_module, samples, graphs):
    assert_close(distilled(training_module, samples, "blocks"), distilled(training_module, samples, "none"))
    assert graphs() <= compiling.VARIANTS


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["none", "blocks"])
def test_the_compiler_that_a_run_uses_computes_the_same(checkpointing, training_module, samples, graphs, monkeypatch):
    monkeypatch.setattr(compiling, "BACKEND", "inductor")
    compiled, plain = pair(training_module, None, LORA, checkpointing=checkpointing)
    assert_same_gradients(compiled, plain, samples)
    assert_same_gradients(compiled, plain, resized(samples, 64))
    assert graphs() == 4
