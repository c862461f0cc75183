"""Weights in bf16 learn what weights in fp32 learn."""

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from diffsynth.training import stochastic_rounding
from diffsynth.training.stochastic_rounding import StochasticRounding, round_stochastically

BF16 = ["lora=none", "model.torch_dtype=bfloat16", "memory.trained_dtype=bfloat16", "optimizer.lr=1e-5", "max_steps=4"]

FLOATS = st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)


@given(FLOATS, st.integers(0, 99))
def test_a_value_becomes_one_of_its_two_neighbours(value, seed):
    rounded = round_stochastically(torch.tensor([value]), torch.Generator().manual_seed(seed)).float().item()
    exact = torch.tensor(value)
    spacing = abs(value) * 2**-7 + 1e-38
    assert abs(rounded - value) < spacing
    assert rounded == value or exact.bfloat16() != exact  # what bf16 can say stays


def test_the_mean_is_exact_where_the_nearest_would_not_move():
    value = 1 + 2**-7 / 10  # a tenth of the way to the next
    rounded = round_stochastically(torch.full((100_000,), value), torch.Generator().manual_seed(0)).double()
    assert torch.tensor(value).bfloat16() == 1
    assert rounded.mean().item() == pytest.approx(value, abs=5 * 2**-7 * 0.3 / 100_000**0.5)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_many_small_steps_go_as_far_as_in_fp32(optimizer):
    torch.manual_seed(0)
    start = torch.randn(4096)
    exact, kept = nn.Parameter(start.clone()), nn.Parameter(start.bfloat16())
    rounding = StochasticRounding([kept])
    optimizers = optimizer([exact], lr=1e-5), optimizer(rounding.fp32_copies, lr=1e-5)
    for step in range(100):
        exact.grad, kept.grad = torch.ones(4096), torch.ones(4096, dtype=torch.bfloat16)
        optimizers[0].step()
        rounding.step(optimizers[1], seed=step)
    moved = [(p.detach().float() - q).mean().item() for p, q in ((exact, start), (kept, start.bfloat16().float()))]
    assert moved[1] == pytest.approx(moved[0], rel=0.2)
    assert all(p.numel() == 0 for p in rounding.fp32_copies)
    assert all(t.dtype == torch.float32 for s in optimizers[1].state.values() for t in s.values())


def test_many_tensors_are_stepped_at_once_as_they_are_one_by_one(monkeypatch):
    def stepped(at_once: int) -> tuple[int, list[torch.Tensor]]:
        monkeypatch.setattr(stochastic_rounding, "AT_ONCE", at_once)
        torch.manual_seed(0)
        weights = [nn.Parameter(torch.randn(size).bfloat16()) for size in (3, 5, 100, 2)]
        rounding = StochasticRounding(weights)
        optimizer = torch.optim.AdamW(rounding.fp32_copies, lr=0.1)
        calls = []
        optimizer.register_step_pre_hook(lambda *_: calls.append(1))
        for step in range(3):
            for weight in weights[:-1]:
                weight.grad = weight.detach().sin()
            rounding.step(optimizer, seed=step)
        return len(calls), weights

    (one_by_one, expected), (few, found) = stepped(1), stepped(50)
    assert (one_by_one, few) == (9, 6)  # 3 and 5 together, 100 alone
    assert all(map(torch.equal, found, expected))


def test_an_optimizer_that_counts_over_all_weights_is_refused():
    prodigy = pytest.importorskip("prodigyopt").Prodigy
    weights = [nn.Parameter(torch.ones(2, dtype=torch.bfloat16)) for _ in range(2)]
    rounding = StochasticRounding(weights)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    with pytest.raises(ValueError, match="Prodigy keeps a state over all weights at once.*trained_dtype=float32"):
        rounding.step(prodigy(rounding.fp32_copies), seed=0)


def test_a_run_in_bf16_goes_on_bit_for_bit(tmp_path):
    steps = [*BF16, "checkpoint.every=2"]
    tiny.cut_off(3, tmp_path / "cut", *steps)
    found, expected = (
        load_file(tiny.train(tmp_path / place, *steps) / "weights" / "epoch-1.safetensors")
        for place in ("cut", "whole")
    )
    assert all(t.dtype == torch.bfloat16 for t in expected.values())
    assert all((found[key] == expected[key]).all() for key in expected)


def test_bf16_weights_in_an_fp32_model_are_refused(tmp_path):
    with pytest.raises(ValueError, match="needs model.torch_dtype=bfloat16"):
        tiny.train(tmp_path, "lora=none", "memory.trained_dtype=bfloat16")
