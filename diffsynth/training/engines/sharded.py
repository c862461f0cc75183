"""What engines share that leave each process a part of the training."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...core.sharing import together
from .engine import ALTERNATIVE, Engine

# They treat every number on its own, so that a part of a tensor takes the step that the whole would.
ELEMENTWISE = ("Adam", "AdamW", "NAdam", "RAdam", "Adamax", "SGD", "RMSprop")


class ShardedEngine(Engine):
    """Optimizers get parts of tensors; networks may be in parts as well, so that a forward needs all processes."""

    shards_weights = True
    computes_in_bf16 = False

    def check(self, module, optimizer, accumulation: int, max_grad_norm: float | None) -> None:
        made = getattr(optimizer, "func", optimizer)
        if module.task.has_roles:
            raise ValueError(
                f"{type(module.task).__name__} trains several roles, each with an optimizer of its own, which "
                f"{self.name} cannot take; {ALTERNATIVE}"
            )
        if not (made.__module__.startswith("torch.optim") and made.__name__ in ELEMENTWISE):
            raise ValueError(
                f"{self.name} gives an optimizer parts of tensors, and {made.__name__} may need whole ones; choose "
                f"optimizer=adamw, or {ALTERNATIVE}"
            )
        self._check_memory(module.memory)

    def _check_memory(self, memory) -> None:
        """Refuse other ways of keeping weights, and blocks compiled before they are sharded."""
        nothing = {"stream_blocks": 0}
        if self.shards_weights:
            nothing |= {"storage": "none", "compile": "none"}
        for name, value in nothing.items():
            if (asked := getattr(memory, name)) != value:
                raise ValueError(
                    f"memory.{name}={asked} and {self.name} would both decide where the weights are; set "
                    f"memory.{name}={value}, or {ALTERNATIVE}"
                )

    def take(self, module) -> None:
        """Let a module's forward compute in its pipeline's precision, as accelerate does it for DDP."""
        self.computes_in_bf16 = module.pipe.torch_dtype == torch.bfloat16
        module.forward = self._autocast()(module.forward)
        module.is_whole = not self.shards_weights

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=self.computes_in_bf16)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        alike = self.accelerator.num_processes if self.shards_weights else self.cp_size
        with self._autocast(), together(alike):
            yield

    def keep(self, whole: Tensor) -> Tensor:
        """In the first process's host memory; the others, which save nothing, let go of it."""
        return whole.cpu() if self.accelerator.is_main_process else whole.new_empty(0, device="cpu")

    @contextmanager
    def exporting(self, module, parts: Mapping[str, Any]) -> Iterator[None]:
        parameters = [parameter for part in parts.values() for parameter in part.all]
        copies = {p: self.keep(self.whole(p, x)) for p, x in zip(parameters, self.local(parameters), strict=True)}
        places = [(owner, key, p) for owner in module.modules() for key, p in owner._parameters.items() if p in copies]
        try:
            for owner, key, parameter in places:
                owner._parameters[key] = nn.Parameter(copies[parameter])
            yield
        finally:
            for owner, key, parameter in places:
                owner._parameters[key] = parameter
