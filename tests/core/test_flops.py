"""Operations are counted as torch counts them, with the attention of a CPU as well."""

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from diffsynth.core.flops import Flops


def counted(counter, run) -> int:
    with counter:
        run()
    return counter.total if isinstance(counter, Flops) else counter.get_total_flops()


def test_products_and_convolutions_are_counted_as_torch_does():
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(4 * 36, 5))

    def step():
        network(torch.ones(2, 3, 8, 8)).sum().backward()

    assert counted(Flops(), step) == counted(FlopCounterMode(display=False), step) > 0


def test_attention_takes_two_products_forwards_and_five_backwards():
    batch, heads, tokens, width = 2, 3, 64, 16
    product = 2 * batch * heads * tokens * tokens * width
    with FakeTensorMode():
        query, key, value = (torch.ones(batch, heads, tokens, width, requires_grad=True) for _ in range(3))
        with Flops() as forward:
            output = F.scaled_dot_product_attention(query, key, value)
        with Flops() as backward:
            output.sum().backward()
    assert (forward.total, backward.total) == (2 * product, 5 * product)
