"""Training bf16 weights without losing small updates, by stochastic rounding.

Weights, gradients and AdamW's two moments take 12 bytes per parameter (2 + 2 + 8) instead of fp32's 16.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

# Numbers that are stepped at once, 256 MiB of fp32: a model of thousands of tensors then takes a few hundred steps of
# Python instead of thousands. A guess.
AT_ONCE = 1 << 26


class StochasticRounding:
    """Runs an optimizer's step in fp32 on bf16 weights, a few tensors at a time.

    Each fp32 result x is rounded to one of its two bf16 neighbours at random, so that the mean is exact: E[r(x)] = x.
    Rounding to the nearest would lose every update below half a unit in the last place: Zamirai et al. 2020
    (https://arxiv.org/abs/2010.06192, §3).

    Args:
        parameters: The weights. The optimizer is built on `fp32_copies` of them, so that its state is fp32. A copy has
            values only while its own tensor is stepped.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]):
        self.fp32_copies = [nn.Parameter(p.new_empty(0, dtype=torch.float32)) for p in parameters]
        self.weights = dict(zip(self.fp32_copies, parameters, strict=True))

    @torch.no_grad()
    def step(self, optimizer: Optimizer, seed: int) -> None:
        """Take one optimizer step; `seed` determines the rounding and must be equal on every process.

        Raises:
            ValueError: The optimizer changed its options during the step: it has a state over all its parameters, so
                that they cannot be stepped a few at a time.
        """
        generators = {p.device: torch.Generator(p.device).manual_seed(seed) for p in self.fp32_copies}
        groups = [(group, group["params"], _options(group)) for group in optimizer.param_groups]
        for group, _, _ in groups:
            group["params"] = []
        for group, fp32_copies, options in groups:
            with_gradient = [copy for copy in fp32_copies if self.weights[copy].grad is not None]
            for few in self._few_at_a_time(with_gradient):
                group["params"] = few
                self._step_of(few, optimizer, generators)
            group["params"] = []
            if _options(group) != options:
                name = type(optimizer).__name__
                raise ValueError(
                    f"{name} keeps a state over all weights at once, but bf16 weights are stepped a few at a time: set "
                    "memory.trained_dtype=float32, or choose another optimizer=…."
                )
        for group, fp32_copies, _ in groups:
            group["params"] = fp32_copies

    def _few_at_a_time(self, fp32_copies: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
        """Yield runs of copies that have at most `AT_ONCE` numbers together, or are a single tensor."""
        few, numel = [], 0
        for fp32_copy in fp32_copies:
            size = self.weights[fp32_copy].numel()
            if few and numel + size > AT_ONCE:
                yield few
                few, numel = [], 0
            few, numel = [*few, fp32_copy], numel + size
        if few:
            yield few

    def _step_of(self, fp32_copies: Sequence[nn.Parameter], optimizer: Optimizer, generators: Mapping) -> None:
        for fp32_copy in fp32_copies:
            weight = self.weights[fp32_copy]
            fp32_copy.data, fp32_copy.grad = weight.float(), weight.grad.float()
        optimizer.step()
        for fp32_copy in fp32_copies:
            weight, generator = self.weights[fp32_copy], generators[fp32_copy.device]
            is_rounded = weight.dtype == torch.bfloat16
            weight.copy_(round_stochastically(fp32_copy.data, generator) if is_rounded else fp32_copy)
            fp32_copy.data, fp32_copy.grad = fp32_copy.new_empty(0), None


def round_stochastically(values: Tensor, generator: torch.Generator) -> Tensor:
    """Round fp32 values (a tensor of any shape) to bf16, up or down at random so that E[r(x)] = x.

    A bf16 number is the upper 16 bits of an fp32 number. Adding a uniform random number to the lower 16 bits carries
    into the upper ones with a probability of lower / 2^16; then the lower bits are cut off.
    """
    uniform = torch.randint(0, 1 << 16, values.shape, dtype=torch.int32, device=values.device, generator=generator)
    bits = values.view(torch.int32) + uniform
    return (bits & -(1 << 16)).view(torch.float32).bfloat16()


def _options(group: dict) -> dict:
    return {name: value for name, value in group.items() if name != "params"}
