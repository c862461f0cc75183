"""Under autocast, an adapter takes its layer's bf16 input as it is, and learns the same."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from diffsynth.diffusion.adapters.files import casts_left_to_autocast, leave_casts_to_autocast
from diffsynth.diffusion.adapters.lora import LoRA

TOKENS, WIDTH = 50, 64


class Fp32Copies(TorchDispatchMode):
    """Counts fp32 copies of the input."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        is_cast = func is torch.ops.aten._to_copy.default and result.dtype == torch.float32
        self.count += is_cast and result.shape == (TOKENS, WIDTH)
        return result


def step(alone: bool) -> tuple[int, list[torch.Tensor]]:
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH)).bfloat16()
    trained = LoRA(rank=2).add(network, ["0"], seed=0)
    for parameter in trained:
        torch.nn.init.normal_(parameter)
    if alone:
        leave_casts_to_autocast(network)
    x = torch.randn(TOKENS, WIDTH, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16), Fp32Copies() as copies:
        output = network(x)
    loss = output.float().square().mean()
    loss.backward()
    return copies.count, [loss.detach(), *(parameter.grad for parameter in trained)]


def test_no_fp32_copy_of_the_input_is_made_and_losses_and_gradients_are_the_same_to_the_bit():
    (before, expected), (after, found) = step(alone=False), step(alone=True)
    assert (before, after) == (1, 0)
    assert all(map(torch.equal, found, expected))


def test_after_training_a_network_is_called_without_autocast_again():
    network = torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH)).bfloat16()
    LoRA(rank=2).add(network, ["0"], seed=0)
    x = torch.ones(1, WIDTH, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="dtype"), casts_left_to_autocast(network):
        network(x)
    assert network(x).dtype == torch.bfloat16


@pytest.mark.parametrize("alone", [False, True])
def test_without_autocast_only_peft_casts(alone):
    network = torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH)).bfloat16()
    LoRA(rank=2).add(network, ["0"], seed=0)
    if alone:
        leave_casts_to_autocast(network)
        with pytest.raises(RuntimeError, match="dtype"):
            network(torch.ones(1, WIDTH, dtype=torch.bfloat16))
    else:
        assert network(torch.ones(1, WIDTH, dtype=torch.bfloat16)).dtype == torch.bfloat16
