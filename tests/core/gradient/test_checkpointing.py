"""What is kept for the backward pass, what is computed again, and where the kept part waits."""

import sys
from contextlib import nullcontext
from dataclasses import replace
from itertools import product
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import tiny
import tiny_flux2
import torch
from diffusers import ModelMixin
from torch.autograd.graph import saved_tensors_hooks

from diffsynth.core import host_memory
from diffsynth.core.gradient import gradient_checkpoint_forward
from diffsynth.core.gradient.offload import offloaded
from diffsynth.core.gradient.policies import has_dropout
from diffsynth.core.memory import MemoryRecipe
from diffsynth.diffusion.adapters.lora import LoRA
from diffsynth.diffusion.distillation.roles import FAKE_SCORE, STUDENT, TEACHER, FakeScore, Roles
from diffsynth.diffusion.loss import AutoencoderLoss, FlowMatchSFT
from diffsynth.diffusion.training_module import PipelineTrainingModule

LORA = LoRA(
    rank=2, target_modules={"dit": ["to_q", "to_k"], "text_encoder": ["q_proj"]}, models=("dit", "text_encoder")
)
WITH_DROPOUT = LoRA(rank=2, target_modules=["to_q", "to_k"], dropout=0.3)
FULL = FlowMatchSFT(trainable_models=["dit", "text_encoder"])
KINDS = {"lora": (None, LORA), "dropout": (None, WITH_DROPOUT), "full": (FULL, None)}
BLOCKS, EVERY_OTHER = {"checkpointing": "blocks"}, {"checkpointing": "blocks", "checkpoint_every": 2}
ATTENTION, FEED_FORWARD = {"checkpointing": "attention"}, {"checkpointing": "feed_forward"}
OFFLOAD = {"offload_activations": True}
SAVING = {
    "blocks": BLOCKS, "every other": EVERY_OTHER, "attention": ATTENTION, "feed_forward": FEED_FORWARD,
    "none, offloaded": OFFLOAD, "blocks, offloaded": BLOCKS | OFFLOAD, "every other, offloaded": EVERY_OTHER | OFFLOAD,
    "attention, offloaded": ATTENTION | OFFLOAD,
}  # fmt: skip


def flux2(task=None, lora=None, **options) -> PipelineTrainingModule:
    return PipelineTrainingModule(tiny_flux2.pipeline(), task or FlowMatchSFT(), lora, memory=MemoryRecipe(**options))


def moved(module):
    """Its adapters away from where they start, at which half of the gradients are zero."""
    torch.manual_seed(0)
    for name, parameter in module.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    return module


def loss_and_gradients(module, samples) -> list[torch.Tensor]:
    module.train()
    torch.manual_seed(1)  # of dropout
    loss = module(samples).mean()
    loss.backward()
    return [loss.detach(), *(p.grad for p in module.parameters() if p.grad is not None)]


def assert_equal(found, expected):
    assert len(found) == len(expected) > 1
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def kinds_and_policies(policies) -> list:
    """All pairs; by default those of dropout, which must be drawn again, and one policy of the other kinds."""
    pairs = list(product(KINDS, policies))
    default = [(kind, policy) for kind, policy in pairs if kind == "dropout" or policy == "blocks, offloaded"]
    return tiny.mostly_slow(pairs, *default)


@pytest.mark.parametrize("pair", kinds_and_policies(SAVING), ids=str)
def test_no_policy_changes_loss_or_gradients(training_module, samples, pair):
    (task, lora), options = KINDS[pair[0]], SAVING[pair[1]]
    plain, saving = moved(training_module(task, lora)), moved(training_module(task, lora, **options))
    assert_equal(loss_and_gradients(saving, samples), loss_and_gradients(plain, samples))


HONOURED = [name for name in SAVING if not name.startswith(("attention", "feed_forward"))]


@pytest.mark.parametrize("pair", kinds_and_policies(HONOURED), ids=str)
def test_nor_where_blocks_are_of_two_kinds(samples, pair):
    (task, lora), options = KINDS[pair[0]], SAVING[pair[1]]
    plain, saving = moved(flux2(task, lora).load()), moved(flux2(task, lora, **options).load())
    assert_equal(loss_and_gradients(saving, samples), loss_and_gradients(plain, samples))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("options", [BLOCKS, ATTENTION], ids=["blocks", "attention"])
def test_generators_are_saved_only_where_something_drops_activations(training_module, samples, options, dropout):
    module = training_module(lora=replace(WITH_DROPOUT, dropout=dropout), **options)
    module.train()
    with patch("torch.utils.checkpoint.torch.get_rng_state", wraps=torch.get_rng_state) as read:
        module(samples).mean().backward()
    by_frozen_units = len(samples)
    assert read.call_count >= by_frozen_units
    assert (read.call_count > by_frozen_units) == (dropout > 0)


class Network(ModelMixin):
    """A network as one of diffusers."""

    def __init__(self, layer: torch.nn.Module):
        super().__init__()
        self.layer = layer


def in_modules(**attributes) -> torch.nn.Module:
    """A network with one layer that has these attributes."""
    layer = torch.nn.Linear(2, 2)
    for name, value in attributes.items():
        setattr(layer, name, value)
    return Network(layer)


RANDOM = {
    "layer": Network(torch.nn.Dropout(0.1)),
    "of another library": torch.nn.Sequential(torch.nn.Linear(2, 2)),
    "by config as a dict": in_modules(config={"hidden_dropout": 0.1}),
    "functional": in_modules(attention_dropout=0.1),
    "by config": in_modules(config=SimpleNamespace(hidden_dropout=0.1)),
    "by adapter": in_modules(rank_dropout={"default": 0.1}),
}
FIXED = {
    "layer": Network(torch.nn.Dropout(0.0)),
    "functional": in_modules(attention_dropout=0.0),
    "what is no rate": in_modules(drop_table=torch.ones(3), drop=torch.nn.Identity()),
}


@pytest.mark.parametrize("network", RANDOM.values(), ids=RANDOM)
def test_dropout_is_found(network):
    assert has_dropout(network)


@pytest.mark.parametrize("network", FIXED.values(), ids=FIXED)
def test_a_rate_of_zero_is_no_dropout(network):
    assert not has_dropout(network)


def test_a_plain_function_repeats_its_dropout():
    layer, x = torch.nn.Dropout(0.5), torch.ones(100, requires_grad=True)
    made = gradient_checkpoint_forward(lambda seen: layer(seen) ** 2, True, False, x)
    torch.manual_seed(3)  # as other code may before the backward pass
    made.sum().backward()
    assert torch.equal(x.grad, 2 * made)


# What runs again ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, attention, feed_forward",
    [({}, 4, 4), (OFFLOAD, 4, 4), (BLOCKS, 8, 8), (EVERY_OTHER, 6, 6), (ATTENTION, 8, 4), (FEED_FORWARD, 4, 8)],
    ids=["none", "none, offloaded", "blocks", "every other", "attention", "feed_forward"],
)
def test_a_policy_runs_again_what_it_says(training_module, samples, options, attention, feed_forward):
    module, runs = moved(training_module(lora=LORA, **options)), []
    for blocks, parts in (
        (module.pipe.dit.transformer_blocks, ("attn.to_q", "img_mlp.net.0")),
        (module.pipe.text_encoder.model.language_model.layers, ("self_attn.q_proj", "mlp.up_proj")),
    ):
        for block, part in product(blocks, parts):
            block.get_submodule(part).register_forward_pre_hook(lambda *_, part=part: runs.append(part))
    loss_and_gradients(module, samples[:1])
    expected = {"attn.to_q": attention, "img_mlp.net.0": feed_forward}
    expected |= {"self_attn.q_proj": attention / 2, "mlp.up_proj": feed_forward / 2}  # it has half as many
    assert {part: runs.count(part) for part in expected} == expected


def kept_bytes(module, samples) -> int:
    """Of the tensors on the device that the backward pass will read, but for weights."""
    weights = {p.untyped_storage().data_ptr() for p in (*module.parameters(), *module.buffers())}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = module(samples)  # noqa: F841 - while it is there, so is what was saved
    return sum(storage.nbytes() for storage in kept.values())


def test_policies_keep_less_and_less(training_module, samples):
    def kept(**options):
        return kept_bytes(training_module(lora=WITH_DROPOUT, **options), samples)

    none, every_other, blocks, nothing = kept(), kept(**EVERY_OTHER), kept(**BLOCKS), kept(**BLOCKS, **OFFLOAD)
    parts = kept(**ATTENTION), kept(**FEED_FORWARD)
    assert none > max(parts) and min(parts) > blocks > nothing
    assert none > every_other > blocks


def test_what_is_offloaded_is_put_away_once_and_comes_back_as_often_as_it_is_asked_for(monkeypatch):
    put, fetched = [], []
    to_host, fill, to_device = host_memory.to_host, host_memory.fill, host_memory.to_device
    monkeypatch.setattr(host_memory, "to_host", lambda tensor: put.append(tensor.shape) or to_host(tensor))
    monkeypatch.setattr(host_memory, "fill", lambda new, tensor: fetched.append(tensor.shape) or fill(new, tensor))
    monkeypatch.setattr(
        host_memory, "to_device", lambda tensor, d: fetched.append(tensor.shape) or to_device(tensor, d)
    )
    layers = [torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Tanh()) for _ in range(3)]
    found = x = torch.randn(2, 3, requires_grad=True)
    for layer in layers:
        found = gradient_checkpoint_forward(layer, True, True, found)
    assert put == [(2, 3)] * 3 and not fetched  # weights stay where they are
    once = torch.autograd.grad(found.sum(), x, retain_graph=True)[0]
    assert len(fetched) == 3
    assert torch.equal(torch.autograd.grad(found.sum(), x)[0], once) and len(put) == 3
    assert torch.equal(torch.autograd.grad(torch.nn.Sequential(*layers)(x).sum(), x)[0], once)


def test_what_is_offloaded_comes_back_to_its_own_device():
    """A module on a GPU may save a tensor of the CPU as well, such as a table of scales."""
    with offloaded(lambda: None):
        weight = torch.ones(2, requires_grad=True)
        of_gpu = torch.ones(3, device="meta", requires_grad=True)
        kept = (of_gpu * torch.ones(3, device="meta")).sum(), (weight * torch.tensor([2.0, 3.0])).sum()
    on_gpu, on_cpu = torch.autograd.grad(kept[0], of_gpu)[0], torch.autograd.grad(kept[1], weight)[0]
    assert on_gpu.is_meta and torch.equal(on_cpu, torch.tensor([2.0, 3.0]))


@pytest.mark.parametrize("options", SAVING.values(), ids=SAVING)
def test_what_one_role_computed_is_computed_again_as_that_role(training_module, options):
    """The backward pass is called with the student at rest."""
    found = []
    for recipe in ({}, options):
        module = training_module(lora=WITH_DROPOUT, **recipe)
        roles = Roles(module.pipe, WITH_DROPOUT, FakeScore())
        seen = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
        text = torch.ones(1, 3, module.pipe.dit.config.joint_attention_dim)
        inputs = {"prompt_emb": text, "prompt_emb_mask": torch.ones(1, 3, dtype=torch.bool), **module.memory.inputs}
        moved(module).train()
        sampled = roles.velocity(FAKE_SCORE, seen, torch.tensor([0.5]), inputs, trained=True)
        sigma = torch.tensor([0.3])
        judged = roles.velocity(TEACHER, sampled, sigma, inputs)
        roles.velocity(STUDENT, judged, sigma, inputs, trained=True).sum().backward()
        found.append([seen.grad, *(p.grad for p in module.parameters() if p.grad is not None)])
    assert_equal(*found)


# By DeepSpeed ---------------------------------------------------------------------------------------------------------


class Configured:
    """Its re-entrant checkpointing as far as we call it, which needs a process group to run."""

    calls = 0

    @staticmethod
    def is_configured():
        return True

    @classmethod
    def checkpoint(cls, function, *values):
        cls.calls += 1
        return torch.utils.checkpoint.checkpoint(cls._forgetful(function), *values, use_reentrant=True)

    @staticmethod
    def _forgetful(function):
        """Unlike torch's, it runs again without the precision in which it ran at first, without gradients."""

        def run(*values):
            with torch.autocast("cpu", enabled=False) if torch.is_grad_enabled() else nullcontext():
                return function(*values)

        return run


@pytest.fixture
def configured(monkeypatch):
    counted = type("Counted", (Configured,), {"calls": 0})
    monkeypatch.setitem(sys.modules, "deepspeed", type("deepspeed", (), {"checkpointing": counted}))
    return counted


def test_what_a_configured_deepspeed_runs_again_is_in_the_precision_of_the_first_time(configured):
    layer, x = torch.nn.Linear(3, 3), torch.randn(2, 3, dtype=torch.bfloat16, requires_grad=True)
    gradients = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            made = gradient_checkpoint_forward(layer, enabled, False, x)
        x.grad = None
        made.sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


def test_a_configured_deepspeed_saves_what_inputs_lead_to(configured):
    layer, x = torch.nn.Bilinear(3, 3, 3), torch.randn(2, 3, requires_grad=True)
    plain = torch.autograd.grad(layer(x, x).sum(), x)[0]
    gradient_checkpoint_forward(layer, True, False, x, input2=x).sum().backward()
    assert torch.equal(x.grad, plain) and configured.calls == 1
    layer.zero_grad()
    gradient_checkpoint_forward(layer, True, False, x.detach(), input2=x.detach()).sum().backward()
    assert configured.calls == 1 and layer.weight.grad.any()  # which a re-entrant checkpoint would not have reached


# What cannot be -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["attention", "feed_forward"])
def test_a_network_that_cannot_follow_a_policy_says_so_before_its_weights_are_read(policy):
    with pytest.raises(
        ValueError, match=rf"={policy} .* Flux2\w+2DModel: .*Flux2SingleTransformerBlock.*'none', 'blocks'"
    ):
        flux2(checkpointing=policy)


def test_an_autoencoder_follows_none_but_is_trained_where_models_start_from_blocks(training_module, samples):
    loss_and_gradients(training_module(AutoencoderLoss(), checkpointing="blocks"), samples[:1])
    with pytest.raises(ValueError, match="=attention does not work with QwenImageVAE"):
        training_module(AutoencoderLoss(), checkpointing="attention")


def test_every_counts_checkpointed_blocks():
    with pytest.raises(ValueError, match="checkpoint_every is 0; expected a whole number of at least 1"):
        MemoryRecipe(checkpointing="blocks", checkpoint_every=0)
    with pytest.raises(ValueError, match="checkpoint_every=2 .* set memory.checkpointing=blocks"):
        MemoryRecipe(checkpointing="attention", checkpoint_every=2)
