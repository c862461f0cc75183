"""Optimizers of a GPU update all weights in one kernel, unless their options say otherwise."""

from functools import partial

import pytest
import torch

from diffsynth.training.fused import fused


@pytest.mark.parametrize("made", [torch.optim.AdamW, partial(torch.optim.Adam, lr=1e-3)])
def test_those_of_torch_that_have_such_a_kernel_use_it(made):
    assert fused(made)([torch.nn.Parameter(torch.ones(2))]).defaults["fused"] is True


@pytest.mark.parametrize("made", [partial(torch.optim.AdamW, foreach=True), torch.optim.RMSprop, lambda p: None])
def test_others_stay_as_they_are(made):
    assert fused(made) is made


def test_a_fused_step_is_the_step():
    def stepped(optimizer) -> torch.Tensor:
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(100))
        built = optimizer([weight])
        for _ in range(3):
            weight.grad = weight.detach().sin()
            built.step()
        return weight.detach()

    plain = partial(torch.optim.AdamW, lr=1e-2)
    torch.testing.assert_close(stepped(fused(plain)), stepped(plain), rtol=1e-6, atol=1e-6)
