"""What differs between ways of spreading a training over processes; this one is DDP."""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ...core.context_parallel import Devices
from ...core.sharing import together
from ...diffusion.token_split import check_split, split_predicting

ALTERNATIVE = "launch with --config_file conf/accelerate/ddp.yaml."  # what goes where another engine does not


class Engine:
    """Every process has the whole model, and DDP keeps them equal; a single process is one of them.

    Other engines differ in where weights, gradients and the optimizer's state are. What is kept and exported is whole,
    and under the same names, with all of them.

    Args:
        cp_size: How many processes, next to one another, have the tokens of a sample together; all of the engines
            average gradients over all processes, which is what that wants (see `core.context_parallel`).
    """

    name = "DDP"
    file = "ddp"  # conf/accelerate/<file>.yaml, by which a plan tells what a device holds
    has_master_weights = False  # whether fp32 weights are kept beside those that the model computes with

    def __init__(self, accelerator, cp_size: int = 1):
        self.accelerator, self.cp_size = accelerator, cp_size

    @property
    def replicas(self) -> int:
        """How many groups of processes train on samples of their own."""
        return self.accelerator.num_processes // self.cp_size

    @property
    def replica(self) -> int:
        """Which of them this process belongs to."""
        return self.accelerator.process_index // self.cp_size

    # Before weights are read

    def check(self, module, optimizer, accumulation: int, max_grad_norm: float | None) -> None:
        """Refuse what it cannot train, and a launcher's file that says otherwise than the configuration.

        Args:
            module: A `PipelineTrainingModule` whose models are on the meta device.
            optimizer: A class, or a partial of one.
            accumulation: Micro-batches an optimizer step.

        Raises:
            ValueError: Names the setting and what would go.
        """
        if self.cp_size > 1:
            check_split(module, self.cp_size)

    def in_host_memory(self, module) -> Collection[str]:
        """Names of the models that are read into host memory, as no device is to hold all of them."""
        return ()

    # Once

    def shard(self, module) -> None:
        """Leave this process its part of a loaded module, before there are optimizers."""
        if self.cp_size > 1:
            shape = (self.replicas, self.cp_size)
            mesh = torch.distributed.init_device_mesh(self.accelerator.device.type, shape, mesh_dim_names=("dp", "cp"))
            split_predicting(module, Devices(mesh["cp"].get_group()))

    def prepare(self, module, parts: Mapping[str, Any]) -> nn.Module:
        """What is called in the place of `module`, whose trained `parts` have their optimizers."""
        return self.accelerator.prepare(module)

    # Every step

    def accumulating(self, model: nn.Module, last: bool) -> AbstractContextManager:
        """One micro-batch, the `last` of its step or not."""
        return self.accelerator.accumulate(model)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of one micro-batch's mean loss."""
        self.accelerator.backward(loss)

    def step(self, parts: Sequence, limit: float, seed: int) -> list[float]:
        """Clip each part's gradient, and step their optimizers unless one is not finite; returns the norms."""
        norms = [self.clip(part.all, limit) for part in parts]
        if all(map(math.isfinite, norms)):
            for part in parts:
                part.step(seed)
        return norms

    def clip(self, parameters: Sequence[nn.Parameter], limit: float) -> float:
        """Clip the gradient of parameters to a norm of `limit`, and return the norm that it had."""
        return float(self.accelerator.clip_grad_norm_(parameters, limit))

    # Looking and keeping; all processes call these

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Forwards without gradients, in the precision of training."""
        with self.accelerator.autocast(), together(self.cp_size):
            yield

    def local(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """What this process holds of parameters; whoever writes to it calls `rewritten` afterwards."""
        return [parameter.detach() for parameter in parameters]

    def rewritten(self) -> None:
        """Forget copies of what was in `local` tensors."""

    def whole(self, parameter: nn.Parameter, local: Tensor) -> Tensor:
        """A tensor like `parameter`, put together from what each process has of it."""
        return local

    def part_of(self, parameter: nn.Parameter, whole: Tensor) -> Tensor:
        """What this process holds of a tensor like `parameter`."""
        return whole

    def keep(self, whole: Tensor) -> Tensor:
        """A whole tensor for the first process to save."""
        return whole

    def weights(self, part) -> dict[str, Tensor]:
        """The trained weights, as exact as they are kept."""
        return {name: parameter.detach() for name, parameter in part.parameters.items()}

    def set_weights(self, part, weights: Mapping[str, Tensor]) -> None:
        for (name, parameter), local in zip(part.parameters.items(), self.local(part.all), strict=True):
            local.copy_(self.part_of(parameter, weights[name]))
        self.rewritten()

    def optimizer_state(self, part) -> dict[str, Any]:
        """The optimizer's `state_dict`."""
        return part.optimizer.state_dict()

    def set_optimizer_state(self, part, state: dict[str, Any]) -> None:
        part.optimizer.load_state_dict(state)

    def exporting(self, module, parts: Mapping[str, Any]) -> AbstractContextManager:
        """Inside, the first process's module has whole trained parameters, to be saved."""
        return nullcontext()
