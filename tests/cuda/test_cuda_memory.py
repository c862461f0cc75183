"""Copies, waits and memory of a GPU."""

import pytest
import resumed
import tiny
import torch
from on_device import DEVICE, train
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffsynth.core import host_memory
from diffsynth.core.data import SampleAddress
from diffsynth.diffusion.base_pipeline import BasePipeline
from diffsynth.diffusion.randomness import SampleRNG
from diffsynth.training.state import TrainingState
from diffsynth.training.stochastic_rounding import StochasticRounding

DEVICE_OF = torch.device(DEVICE)
MIB = 1 << 20
on_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="a CPU has no copies of its own")


def test_what_goes_to_host_memory_comes_back():
    for size in (1, 1000, 5 * MIB):
        there = torch.randint(256, (size,), dtype=torch.uint8).to(DEVICE_OF)
        host = host_memory.to_host(there)
        back = host_memory.to_device(host, DEVICE_OF)
        assert torch.equal(back, there) and host.device.type == "cpu"


@on_gpu
def test_host_memory_is_pinned_however_small_its_buffers_are():
    buffers = [host_memory.empty(size, DEVICE_OF) for size in (1, 100, 3 * MIB)]  # the first two would share a page
    assert all(buffer.is_pinned() for buffer in buffers)
    assert host_memory.to_host(torch.ones(10, device=DEVICE_OF)).is_pinned()


@on_gpu
def test_tensors_that_leave_do_not_pile_up_while_the_gpu_is_behind(monkeypatch):
    monkeypatch.setattr(host_memory, "MOST_LEAVING", 16 * MIB)
    lane = host_memory.Lane(DEVICE_OF)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for _ in range(40):
        torch.cuda._sleep(1_000_000)  # about a millisecond
        saved = torch.ones(8 * MIB, dtype=torch.uint8, device=DEVICE_OF)
        with lane.after_computation():
            host_memory.to_host(saved)
        lane.keep(saved)
        del saved
    lane.let_go()
    assert torch.cuda.max_memory_allocated() - before <= 40 * MIB  # of 320 that were made


@on_gpu
def test_a_micro_batch_never_waits_for_the_gpu(monkeypatch, tmp_path):
    """From the second epoch on, when the outputs of the encoders are in host memory."""
    losses, backward = TrainingState.losses, TrainingState.backward

    def without_waiting(run):
        def guarded(state, given):
            torch.cuda.set_sync_debug_mode("error" if state.step >= 2 else "default")
            try:
                return run(state, given)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        return guarded

    monkeypatch.setattr(TrainingState, "losses", without_waiting(losses))
    monkeypatch.setattr(TrainingState, "backward", without_waiting(backward))
    train(tmp_path, "max_steps=4", "deterministic=false")


def test_a_batch_of_equal_prompts_runs_in_flash_attention(monkeypatch, tmp_path):
    """Which takes no mask; the miniature's heads and dtype are those that flash attention knows."""
    predict = BasePipeline.predict

    def in_flash(*args, **kwargs):
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return predict(*args, **kwargs)

    monkeypatch.setattr(BasePipeline, "predict", in_flash)
    train(
        tmp_path,
        f"dataset.path={_equal_prompts(tmp_path / 'data')}",
        "model.torch_dtype=bfloat16",
        "deterministic=false",
    )


def _equal_prompts(folder):
    tiny.write_dataset(folder)
    return tiny.write_rows(folder, [{"image": f"{number}.png", "prompt": "a red apple"} for number in range(8)])


def test_rounding_is_unbiased():
    torch.manual_seed(0)
    begin = torch.randn(4096)
    kept = nn.Parameter(begin.bfloat16().to(DEVICE_OF))
    rounding = StochasticRounding([kept])
    optimizer = torch.optim.AdamW(rounding.fp32_copies, lr=1e-5, weight_decay=0, fused=True)
    for step in range(100):
        kept.grad = torch.ones_like(kept)
        rounding.step(optimizer, seed=step)
    moved = (kept.detach().float().cpu() - begin.bfloat16().float()).mean().item()
    assert moved == pytest.approx(-1e-3, rel=0.2)


def test_noise_is_that_of_a_cpu():
    rng = SampleRNG(3, [SampleAddress(0, 1), SampleAddress(2, 5)])
    found, expected = (rng.normal("noise", torch.zeros(2, 4, 8, 8, device=device)) for device in (DEVICE, "cpu"))
    assert found.device.type == DEVICE and torch.equal(found.cpu(), expected)


def test_two_runs_without_deterministic_kernels_are_near_each_other(tmp_path):
    given = ("deterministic=false", "model.torch_dtype=bfloat16")
    both = [resumed.losses(train(tmp_path / name, *given)) for name in "ab"]
    assert both[0] == pytest.approx(both[1], rel=1e-2)
