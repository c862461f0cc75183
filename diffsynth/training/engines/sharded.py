"""The common part of the engines that shard: ZeRO and FSDP2."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ...core.sharing import together
from .engine import ALTERNATIVE, Engine

if TYPE_CHECKING:
    from ...core.memory import MemoryRecipe
    from ...diffusion.training_module import PipelineTrainingModule
    from ..state import TrainedPart

# torch.optim's optimizers that update every number by itself, so that the step of a shard is that of the full tensor.
ELEMENTWISE = ("Adam", "AdamW", "NAdam", "RAdam", "Adamax", "SGD", "RMSprop")


class ShardedEngine(Engine):
    """Optimizers get shards of tensors. Networks may be sharded too; then all processes run a forward pass together."""

    shards_weights = True
    computes_in_bf16 = False

    def check(
        self, module: "PipelineTrainingModule", optimizer: Callable, accumulation: int, max_grad_norm: float | None
    ) -> None:
        made = getattr(optimizer, "func", optimizer)
        if module.task.has_roles:
            raise ValueError(
                f"{type(module.task).__name__} predicts in several roles, each with its own adapter and optimizer, but "
                f"{self.name} supports only one; {ALTERNATIVE}"
            )
        if not (made.__module__.startswith("torch.optim") and made.__name__ in ELEMENTWISE):
            raise ValueError(
                f"{self.name} gives an optimizer shards of tensors, but {made.__name__} may need full tensors; choose "
                f"optimizer=adamw, or {ALTERNATIVE}"
            )
        self._check_memory(module.memory)

    def _check_memory(self, memory: "MemoryRecipe") -> None:
        """Refuse memory options that move or store weights in their own way, and blocks compiled before sharding."""
        required = {"stream_blocks": 0}
        if self.shards_weights:
            required |= {"storage": "none", "compile": "none"}
        for name, value in required.items():
            if (found := getattr(memory, name)) != value:
                raise ValueError(
                    f"memory.{name}={found} does not work with {self.name}, because both decide where the weights "
                    f"are; set memory.{name}={value}, or {ALTERNATIVE}"
                )

    def _wrap_forward(self, module: "PipelineTrainingModule") -> None:
        """Run a module's forward under autocast in its pipeline's precision, as accelerate does for DDP."""
        self.computes_in_bf16 = module.pipe.torch_dtype == torch.bfloat16
        module.forward = self._autocast()(module.forward)
        module.is_whole = not self.shards_weights

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=self.computes_in_bf16)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        group_size = self.accelerator.num_processes if self.shards_weights else self.cp_size
        with self._autocast(), together(group_size):
            yield

    def keep(self, full: Tensor) -> Tensor:
        """Return a full tensor (of any shape) in host memory on the first process, and an empty one on the others."""
        return full.cpu() if self.accelerator.is_main_process else full.new_empty(0, device="cpu")

    @contextmanager
    def exporting(self, module: "PipelineTrainingModule", parts: "Mapping[str, TrainedPart]") -> Iterator[None]:
        parameters = [parameter for part in parts.values() for parameter in part.all]
        pairs = zip(parameters, self.local(parameters), strict=True)
        full = {parameter: self.keep(self.whole(parameter, local)) for parameter, local in pairs}
        owners = [(owner, key, p) for owner in module.modules() for key, p in owner._parameters.items() if p in full]
        try:
            for owner, key, parameter in owners:
                owner._parameters[key] = nn.Parameter(full[parameter])
            yield
        finally:
            for owner, key, parameter in owners:
                owner._parameters[key] = parameter
