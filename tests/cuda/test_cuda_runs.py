"""Whole trainings on a GPU: what is equal on a CPU is equal there, with deterministic kernels to the last bit."""

import numpy as np
import pytest
import resumed
import tiny
import torch
from on_device import DEVICE, ON, adapters, assert_equal, assert_near, train
from PIL import Image

BLOCKS = "memory.checkpointing=blocks"
BF16 = "model.torch_dtype=bfloat16"
FULL_BF16 = ["lora=none", BF16, "memory.trained_dtype=bfloat16"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The adapters of a run that saves no memory."""
    return adapters(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """The adapters after one step, in which half of them stay where they began."""
    return adapters(tmp_path_factory.mktemp("start"), "max_steps=1")


@pytest.mark.parametrize("more", [(), FULL_BF16, ("lora.dropout=0.2",)], ids=["lora", "full in bf16", "dropout"])
def test_a_resumed_run_is_the_uninterrupted_one(more, tmp_path):
    tiny.cut_off(3, tmp_path, *resumed.STEPS, *ON, *more)
    found = train(tmp_path, *resumed.STEPS, *more)
    resumed.assert_same_run(found, resumed.uninterrupted(*ON, *more))


@pytest.mark.parametrize(
    "options",
    [(BLOCKS,), (BLOCKS, "memory.offload_activations=true"), (BLOCKS, "memory.stream_blocks=3"),
     (BLOCKS, "memory.checkpoint_every=2"), ("memory.offload_activations=true",)],
    ids=["blocks", "offloaded", "streamed", "every 2nd", "all offloaded"],
)  # fmt: skip
def test_what_saves_memory_changes_nothing_to_the_bit(plain, options, tmp_path):
    assert_equal(adapters(tmp_path, *options), plain)


def test_streamed_blocks_may_be_stored_in_8_bits(tmp_path):
    stored = ("memory.storage=int8", BLOCKS)
    found = adapters(tmp_path / "streamed", *stored, "memory.stream_blocks=3")
    assert_equal(found, adapters(tmp_path / "resident", *stored))


@pytest.mark.parametrize("storage, least", [("int8", 0.99), ("fp8", 0.97), ("nf4", 0.8)])
def test_stored_weights_learn_what_plain_ones_learn(plain, start, storage, least, tmp_path):
    if storage == "nf4":
        pytest.importorskip("bitsandbytes")
    assert_near(adapters(tmp_path, f"memory.storage={storage}"), start, plain, least)


def test_compiled_blocks_learn_what_others_learn(plain, start, tmp_path):
    if DEVICE == "cuda":
        pytest.importorskip("triton")
    assert_near(adapters(tmp_path, "memory.compile=blocks"), start, plain, 0.99)


def test_mixed_precision_learns_what_fp32_learns(plain, start, tmp_path):
    assert_near(adapters(tmp_path, BF16), start, plain, 0.9)


def test_an_average_in_host_memory_is_that_on_the_device(tmp_path):
    average = ["ema=constant", "ema.decay=0.5", "max_steps=4"]
    both = [train(tmp_path / name, *average, f"ema.device={device}") for name, device in (("a", "null"), ("b", "cpu"))]
    found = [resumed.read_checkpoint(sorted((run / "checkpoints").iterdir())[-1]) for run in both]
    assert found[0].keys() == found[1].keys()
    weights = [resumed.final_weights(run) for run in both]
    torch.testing.assert_close(*weights, rtol=1e-6, atol=1e-7)


def test_the_log_says_what_the_allocator_took(tmp_path):
    (*_, last) = tiny.metrics(train(tmp_path))
    if DEVICE == "cuda":
        assert last["memory_gb"] == pytest.approx(torch.cuda.max_memory_reserved() / 1e9)
    assert last["memory_gb"] > 0


def test_one_process_of_a_process_group_trains_as_a_process_alone(plain, tmp_path):
    """NCCL, and DDP's buckets, with nobody to talk to."""
    given = tiny.merged(tiny.train_overrides(tmp_path), ON)
    tiny.process("torchrun", "--standalone", "--nproc_per_node=1", "train.py", *given)
    (run,) = tmp_path.glob("tiny-*")
    torch.testing.assert_close(resumed.final_weights(run), plain, rtol=1e-4, atol=1e-6)


def test_a_seed_samples_the_image_of_a_cpu(tmp_path):
    small = ["options.num_inference_steps=2", "options.height=32", "options.width=48", "seed=[0,1]"]
    pictures = []
    for number, device in enumerate((DEVICE, "cpu")):
        given = [*tiny.model_overrides(), *small, f"device={device}", f"output={tmp_path}/{number}"]
        (first, *_) = tiny.call("generate", tiny.compose("generate", *given))
        pictures.append(np.array(Image.open(first), dtype=int))
    assert np.abs(pictures[0] - pictures[1]).max() <= 1  # of 255: sums in another order
