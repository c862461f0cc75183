"""bf16 weights that do not lose small updates: a third of the memory of fp32 weights and their gradients is saved."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class StochasticRounding:
    """Steps of any optimizer in fp32 on weights that are kept in bf16, one tensor at a time.

    The result is rounded to one of its two bf16 neighbours with the probability that makes the mean exact, E[r(x)] = x.
    Rounding to the nearest would undo every update below half a unit in the last place: Zamirai et al. 2020
    (https://arxiv.org/abs/2010.06192, §3).

    Args:
        parameters: The weights. The optimizer is built on `fp32_copies`, which are fp32, so that its state is too; they
            hold a value only while their own tensor takes its step.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]):
        self.fp32_copies = [nn.Parameter(p.new_empty(0, dtype=torch.float32)) for p in parameters]
        self.weights = dict(zip(self.fp32_copies, parameters, strict=True))

    @torch.no_grad()
    def step(self, optimizer: Optimizer, seed: int) -> None:
        """Take one step; `seed` decides how it is rounded, and must be the same on every process.

        Raises:
            ValueError: The optimizer counts something over all its parameters, so that they cannot go one by one.
        """
        generators = {p.device: torch.Generator(p.device).manual_seed(seed) for p in self.fp32_copies}
        groups = [(group, group["params"], _options(group)) for group in optimizer.param_groups]
        for group, _, _ in groups:
            group["params"] = []
        for group, fp32_copies, options in groups:
            for fp32_copy in fp32_copies:
                if self.weights[fp32_copy].grad is not None:
                    group["params"] = [fp32_copy]
                    self._step_of(fp32_copy, optimizer, generators[fp32_copy.device])
            group["params"] = []
            if _options(group) != options:
                name = type(optimizer).__name__
                raise ValueError(f"{name} counts over all weights at once, so it needs memory.trained_dtype=float32.")
        for group, fp32_copies, _ in groups:
            group["params"] = fp32_copies

    def _step_of(self, fp32_copy: nn.Parameter, optimizer: Optimizer, generator: torch.Generator) -> None:
        weight = self.weights[fp32_copy]
        fp32_copy.data, fp32_copy.grad = weight.float(), weight.grad.float()
        optimizer.step()
        is_rounded = weight.dtype == torch.bfloat16
        weight.copy_(round_stochastically(fp32_copy.data, generator) if is_rounded else fp32_copy)
        fp32_copy.data, fp32_copy.grad = fp32_copy.new_empty(0), None


def round_stochastically(values: Tensor, generator: torch.Generator) -> Tensor:
    """fp32 values as bf16, up or down with the probability that makes E[r(x)] = x."""
    below_bf16 = torch.randint(0, 1 << 16, values.shape, dtype=torch.int32, device=values.device, generator=generator)
    bits = values.view(torch.int32) + below_bf16  # carries into what bf16 keeps as often as the rest is large
    return (bits & -(1 << 16)).view(torch.float32).bfloat16()


def _options(group: dict) -> dict:
    return {name: value for name, value in group.items() if name != "params"}
