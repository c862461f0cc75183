"""Frozen weights that wait in host memory and pass through a ring of buffers."""

import hashlib
from contextlib import nullcontext

import pytest
import tiny
import tiny_flux2
import torch
import warm
from diffusers import QwenImageTransformer2DModel
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensorMode

from diffsynth.core.memory import MemoryRecipe
from diffsynth.core.memory.streaming import BlockStream, StreamedBlock, spread, stream_blocks
from diffsynth.diffusion.adapters.lora import LoRA
from diffsynth.diffusion.distillation.roles import FAKE_SCORE, STUDENT, TEACHER, FakeScore, Roles
from diffsynth.diffusion.loss import AutoencoderLoss, FlowMatchSFT
from diffsynth.diffusion.training_module import PipelineTrainingModule

LORA = LoRA(rank=2, target_modules=["to_q", "to_k"], dropout=0.3)
PARTLY = FlowMatchSFT(trainable_models=["dit.transformer_blocks.1", "dit.transformer_blocks.3.attn"])
KINDS = pytest.mark.parametrize("task, lora", [(None, LORA), (PARTLY, None)], ids=["lora", "full in part"])


@pytest.fixture
def streams(monkeypatch) -> list[BlockStream]:
    """The streams made in a test, whose buffers are spoiled as soon as they are given back."""
    made, construct, leave = [], BlockStream.__init__, StreamedBlock.leave

    def spoil(block):
        block.buffer.fill_(255)  # NaN, whatever the dtype
        leave(block)

    monkeypatch.setattr(StreamedBlock, "leave", spoil)
    monkeypatch.setattr(BlockStream, "__init__", lambda self, *args: made.append(self) or construct(self, *args))
    return made


def moved(module):
    """Its adapters away from where they start, at which half of the gradients are zero."""
    torch.manual_seed(0)
    for name, parameter in module.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    return module.train()


def flux2(task=None, lora=None, **options) -> PipelineTrainingModule:
    return PipelineTrainingModule(tiny_flux2.pipeline(), task or FlowMatchSFT(), lora, memory=MemoryRecipe(**options))


def steps(module, samples) -> list[torch.Tensor]:
    """Losses and gradients of two steps of two forward passes and one backward, with an evaluation in between."""
    found = []
    for _ in range(2):
        torch.manual_seed(1)  # of dropout
        losses = [module(samples[:2])]
        with torch.no_grad():
            losses.append(module(samples))
        losses.append(module(samples[2:]))
        (losses[0].sum() + losses[2].sum()).backward()
        found += [*losses, *(p.grad.clone() for p in module.parameters() if p.grad is not None)]
    return found


def assert_equal(found, expected):
    assert len(found) == len(expected) > 6
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def fingerprint(stream: BlockStream) -> str:
    return hashlib.sha256(b"".join(block.host.numpy().tobytes() for block in stream.blocks)).hexdigest()


@KINDS
@pytest.mark.parametrize("buffers", tiny.mostly_slow([1, 2, 3], 1, 2))
def test_streaming_changes_nothing_to_the_bit(training_module, samples, streams, task, lora, buffers):
    count = 4 if lora else 3  # of the parts, the second block has no frozen weight
    if count == buffers:
        pytest.skip("as many buffers as blocks are refused")
    plain = moved(training_module(task, lora))
    streamed = moved(training_module(task, lora, checkpointing="blocks", stream_blocks=count, stream_buffers=buffers))
    before = fingerprint(streams[0])
    assert_equal(steps(streamed, samples), steps(plain, samples))
    assert fingerprint(streams[0]) == before


@pytest.mark.parametrize("offload", [False, True])
def test_so_it_is_where_blocks_differ_in_size(samples, streams, offload):
    options = {"checkpointing": "blocks", "stream_blocks": 5, "offload_activations": offload}
    plain, streamed = moved(flux2(lora=LORA).load()), moved(flux2(lora=LORA, **options).load())
    assert_equal(steps(streamed, samples), steps(plain, samples))
    sizes = {block.size for block in streams[0].blocks}
    assert len(sizes) == 2 and {len(buffer) for buffer in streams[0].buffers} == {max(sizes)}


def test_roles_on_one_base_are_recomputed_with_its_weights(training_module, streams):
    found = []
    for options in ({}, {"checkpointing": "blocks", "stream_blocks": 4}):
        module = training_module(lora=LORA, **options)
        roles = Roles(module.pipe, LORA, FakeScore())
        seen = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
        text, sigma = torch.ones(1, 3, module.pipe.dit.config.joint_attention_dim), torch.tensor([0.5])
        inputs = {"prompt_emb": text, "prompt_emb_mask": torch.ones(1, 3, dtype=torch.bool), **module.memory.inputs}
        moved(module)
        sampled = roles.velocity(FAKE_SCORE, seen, sigma, inputs, trained=True)
        judged = roles.velocity(TEACHER, sampled, sigma, inputs)
        roles.velocity(STUDENT, judged, sigma, inputs, trained=True).sum().backward()
        found.append([seen.grad, *(p.grad for p in module.parameters() if p.grad is not None)])
    assert_equal(*found)


@pytest.mark.parametrize("storage", tiny.mostly_slow(["none", "int8"], "int8"))
def test_a_run_is_the_same_and_leaves_the_same_adapter(storage, tmp_path):
    streaming, stored = ("memory=streaming", "memory.stream_blocks=3"), f"memory.storage={storage}"
    both = (("plain", ()), ("streamed", streaming))
    plain, streamed = (tiny.train(tmp_path / name, *more, stored) for name, more in both)
    assert [row["loss"] for row in tiny.metrics(plain)] == [row["loss"] for row in tiny.metrics(streamed)]
    (name,) = [name for name in tiny.weights(plain) if name.endswith(".safetensors")]
    assert_equal(*(list(load_file(run / "weights" / name).values()) for run in (plain, streamed)))


@pytest.mark.slow
def test_two_processes_stream_to_the_losses_of_one(tmp_path):
    chosen = ["memory=streaming", "memory.stream_blocks=3"]
    overrides = tiny.merged(tiny.train_overrides(tmp_path / "two"), chosen)
    assert warm.ranks(2, tiny.run, overrides) == [0, 0]
    (two,), one = (tmp_path / "two").iterdir(), tiny.train(tmp_path / "one", *chosen)
    losses = [[row["loss"] for row in tiny.metrics(run)] for run in (two, one)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_processes_that_train_together_leave_streamed_weights_to_each(training_module, streams):
    module = training_module(lora=LORA, checkpointing="blocks", stream_blocks=4)
    ignored = set(module._ddp_params_and_buffers_to_ignore)
    blocks = {n: p for n, p in module.named_parameters() if n.startswith("pipe.dit.transformer_blocks.")}
    assert ignored == {name for name, parameter in blocks.items() if not parameter.requires_grad} != set()


# What is on the device ------------------------------------------------------------------------------------------------


def test_the_device_never_holds_more_blocks_than_there_are_buffers(training_module, samples, streams, monkeypatch):
    module = moved(training_module(lora=LORA, checkpointing="blocks", stream_blocks=4))
    (stream,), most, bind = streams, [], StreamedBlock.bind
    places = {buffer.untyped_storage().data_ptr() for buffer in stream.buffers}

    def count(block, lane):
        bind(block, lane)
        blocks = [{t.untyped_storage().data_ptr() for t in other.tensors} for other in stream.blocks]
        assert all(len(of_one) == 1 for of_one in blocks)  # all of a block is in one place
        most.append(sum(of_one <= places for of_one in blocks))
        assert all(t.untyped_storage().data_ptr() in places for t in block.tensors)

    monkeypatch.setattr(StreamedBlock, "bind", count)
    steps(module, samples)
    assert max(most) == len(stream.buffers) == 2
    frozen = {id(p) for block in module.pipe.dit.transformer_blocks for p in block.parameters() if not p.requires_grad}
    assert frozen == {id(tensor) for tensor in stream.tensors}


def test_blocks_come_ahead_of_their_turn_and_only_as_often_as_they_must(training_module, samples, streams, monkeypatch):
    module = moved(training_module(lora=LORA, checkpointing="blocks", stream_blocks=4))
    (stream,), fetched = streams, []
    copy_into, enter = StreamedBlock.copy_into, BlockStream._enter
    late = []

    def note(block, *args):
        fetched.append(block)
        copy_into(block, *args)

    def watch(self, number, *args):
        late.append(number not in self.occupants)
        enter(self, number, *args)

    monkeypatch.setattr(StreamedBlock, "copy_into", note)
    for number, block in enumerate(module.pipe.dit.transformer_blocks):
        (hook,) = block._forward_pre_hooks
        block._forward_pre_hooks[hook] = lambda *_, number=number: watch(stream, number)
    module(samples).sum().backward()
    assert len(fetched) == 4 + 2 and late == [True] + 7 * [False]  # on the way back two are still there
    module(samples).sum().backward()
    assert len(fetched) == 6 + 4 and sum(late) == 1
    with torch.no_grad():  # as in sampling: from the last block to the first again
        for _ in range(3):
            module(samples)
    assert sum(late) == 1


def test_streamed_blocks_are_spread_over_the_network_and_end_with_the_last():
    assert spread(range(60), 4) == [14, 29, 44, 59]
    assert spread(range(6), 4) == [1, 2, 4, 5]
    assert spread(range(6), 6) == [0, 1, 2, 3, 4, 5]


def test_what_moves_a_network_leaves_its_streamed_weights_in_host_memory(training_module, streams):
    dit = training_module(lora=LORA, checkpointing="blocks", stream_blocks=2, stream_buffers=1).pipe.dit
    names = {id(parameter): name for name, parameter in dit.named_parameters()}
    streamed = {names[id(tensor)] for tensor in streams[0].tensors}
    dit.to(torch.float64)  # any device would be the same, and here is no other
    of = {
        dtype: {name for name, p in dit.named_parameters() if p.dtype == dtype}
        for dtype in (torch.float32, torch.float64)
    }
    assert (
        of[torch.float32] == streamed
        and of[torch.float64]
        and dit.transformer_blocks[1].attn.to_q.base_layer.weight.any()
    )


def test_buffers_and_weights_of_any_dtype_stream(streams):
    class Stored(torch.nn.Module):
        def __init__(self, number):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.full((3, 5), number).to(torch.float8_e4m3fn), requires_grad=False)
            self.register_buffer("scale", torch.tensor(2.0 + number))
            self.register_buffer("shift", torch.tensor([number], dtype=torch.int8), persistent=False)

        def forward(self, x):
            return x @ self.weight.to(x.dtype).T * self.scale + self.shift

    blocks = [Stored(number) for number in range(3)]
    x = torch.ones(1, 5)
    expected = [block(x) for block in blocks]
    stream = BlockStream(blocks, 1, torch.device("cpu"))
    with torch.no_grad():
        assert all(torch.equal(block(x), made) for block, made in zip(blocks, expected, strict=True))
    assert stream.blocks[2].buffer is not None and all(part.data_ptr() % 4 == 0 for part in stream.blocks[2].tensors)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_tensors_without_values_stream_as_others_do(device, streams):
    """As a plan of a run's memory does."""
    with FakeTensorMode() if device == "cpu" else nullcontext(), torch.device(device):
        network = QwenImageTransformer2DModel(
            num_layers=3, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=16, axes_dims_rope=(2, 2, 4)
        )
        network.requires_grad_(False)
        stream = stream_blocks(network, 3, 2, torch.device("cpu"))
        with torch.no_grad():
            for block in network.transformer_blocks:
                block(torch.ones(1, 4, 16), torch.ones(1, 3, 16), None, torch.ones(1, 16))
    size = sum(-(-p.nbytes // 256) * 256 for p in network.transformer_blocks[0].parameters())
    assert [len(buffer) for buffer in stream.buffers] == [size] * 2 and stream.occupants == [2, 0]


# What cannot be streamed ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"stream_blocks": -1}, "stream_blocks is -1; expected a whole number of at least 0"),
        ({"stream_blocks": 3, "stream_buffers": 0}, "stream_buffers is 0; expected a whole number of at least 1"),
        ({"stream_blocks": 2}, "stream_blocks=2 .*stream_buffers=2.* saves nothing"),
        ({"stream_blocks": 3, "checkpointing": "none"}, "in the backward pass.*set memory.checkpointing=blocks"),
        ({"stream_blocks": 3, "checkpointing": "attention"}, "checkpointing=attention"),
        ({"stream_blocks": 3, "checkpoint_every": 2}, "checkpoint_every=2"),
    ],
)
def test_a_recipe_that_cannot_stream_says_why(options, message):
    with pytest.raises(ValueError, match=message):
        MemoryRecipe(**{"checkpointing": "blocks"} | options)


@pytest.mark.parametrize(
    "task, lora, message",
    [
        (None, LORA, "stream_blocks=7: of the 6 repeated blocks of Flux2Transformer2DModel 6 have frozen weights"),
        (FlowMatchSFT(trainable_models=["dit"]), None, " 0 have frozen weights"),
        (FlowMatchSFT(trainable_models=["dit.transformer_blocks.1"]), None, " 5 have frozen weights"),
        (AutoencoderLoss(), None, "AutoencoderLoss runs no network"),
    ],
)
def test_more_blocks_than_there_are_with_frozen_weights_are_refused_before_weights_are_read(task, lora, message):
    with pytest.raises(ValueError, match=message):
        flux2(task, lora, checkpointing="blocks", stream_blocks=7)


def test_a_streamed_block_refuses_to_run_where_autograd_would_save_its_weights(training_module, samples):
    module = training_module(lora=LORA, checkpointing="blocks", stream_blocks=4)
    module.memory = MemoryRecipe()
    with pytest.raises(RuntimeError, match="without checkpointing"):
        module(samples)
