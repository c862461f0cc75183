"""The interface of engines, and its plainest one: DDP, or a single process.

Terms: a *full* tensor has all its numbers; a *local* tensor is what this process has of it, its shard. Under DDP, and
in a single process, both are the same.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...core.context_parallel import Devices
from ...core.sharing import together
from ...diffusion.token_split import check_split, split_predicting

if TYPE_CHECKING:
    from accelerate import Accelerator

    from ...diffusion.training_module import DiffusionTrainingModule, PipelineTrainingModule
    from ..state import TrainedPart

ALTERNATIVE = "launch with --config_file conf/accelerate/ddp.yaml."  # the advice at the end of engines' errors


class Engine:
    """DDP: every process has the full model, and gradients are averaged; a single process is the simplest case.

    Other engines differ in which process has which shard of the weights, gradients and optimizer state. Checkpoints and
    exports have full tensors under the same names with every engine.

    Args:
        accelerator: Device and precision.
        cp_size: Context-parallel size: N consecutive processes share the tokens of one sample. Gradients are averaged
            over all processes, as context parallelism requires (see `core.context_parallel`).
    """

    name = "DDP"
    file = "ddp"  # conf/accelerate/<file>.yaml; `plan.shares` knows the engine by this name
    has_master_weights = False  # whether the engine keeps fp32 master weights beside the model's weights

    def __init__(self, accelerator: "Accelerator", cp_size: int = 1):
        self.accelerator, self.cp_size = accelerator, cp_size

    @property
    def replicas(self) -> int:
        """Number of groups of processes that each train on samples of their own (the data-parallel size)."""
        return self.accelerator.num_processes // self.cp_size

    @property
    def replica(self) -> int:
        """Number of the group that this process belongs to, from 0."""
        return self.accelerator.process_index // self.cp_size

    # Before weights are read

    def check(
        self, module: "PipelineTrainingModule", optimizer: Callable, accumulation: int, max_grad_norm: float | None
    ) -> None:
        """Refuse what this engine cannot train, and a launcher's file that contradicts the configuration.

        Args:
            module: A training module whose models are on the meta device.
            optimizer: A class, or a partial of one.
            accumulation: Micro-batches per optimizer step.
            max_grad_norm: The gradient's norm is clipped to this; None does not clip.

        Raises:
            ValueError: Names the setting, and what to set instead.
        """
        if self.cp_size > 1:
            check_split(module, self.cp_size)

    def in_host_memory(self, module: "PipelineTrainingModule") -> Collection[str]:
        """Names of the models that are read into host memory, because one device cannot hold all of their weights."""
        return ()

    # Once, before training

    def shard(self, module: "DiffusionTrainingModule") -> None:
        """Leave this process its shard of a loaded module; called before the optimizers are made."""
        if self.cp_size > 1:
            shape = (self.replicas, self.cp_size)
            mesh = torch.distributed.init_device_mesh(self.accelerator.device.type, shape, mesh_dim_names=("dp", "cp"))
            split_predicting(module, Devices(mesh["cp"].get_group()))

    def prepare(self, module: "DiffusionTrainingModule", parts: "Mapping[str, TrainedPart]") -> nn.Module:
        """Wrap `module`, whose trained `parts` have their optimizers, and return the module to call instead."""
        return self.accelerator.prepare(module)

    # Every step

    def accumulating(self, model: nn.Module, last: bool) -> AbstractContextManager:
        """The context of one micro-batch; gradients are averaged over processes in the `last` one of a step only."""
        return self.accelerator.accumulate(model)

    def backward(self, loss: Tensor) -> None:
        """Backpropagate the mean loss () of one micro-batch; its gradient adds to that of the step's others."""
        self.accelerator.backward(loss)

    def step(self, parts: "Sequence[TrainedPart]", limit: float, seed: int) -> list[float]:
        """Clip each part's gradient to a norm of `limit`, then step all optimizers if all gradients are finite.

        Args:
            seed: Determines the stochastic rounding of bf16 weights.

        Returns:
            Each part's gradient norm before clipping.
        """
        norms = [self.clip(part.all, limit) for part in parts]
        if all(map(math.isfinite, norms)):
            for part in parts:
                part.step(seed)
        return norms

    def clip(self, parameters: Sequence[nn.Parameter], limit: float) -> float:
        """Clip the gradient of parameters to a norm of `limit`, and return its norm before clipping."""
        return float(self.accelerator.clip_grad_norm_(parameters, limit))

    # Evaluating and saving; all processes call these

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Inside the block, forward passes run in the precision of training."""
        with self.accelerator.autocast(), together(self.cp_size):
            yield

    def local(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """Return this process's local tensors of parameters; after writing to them, call `rewritten`."""
        return [parameter.detach() for parameter in parameters]

    def rewritten(self) -> None:
        """Discard gathered copies of weights, whose `local` tensors were written to."""

    def whole(self, parameter: nn.Parameter, local: Tensor) -> Tensor:
        """Gather the full tensor, of the shape that `parameter` has in full, from every process's `local` one.

        Both tensors are of any shape.
        """
        return local

    def part_of(self, parameter: nn.Parameter, full: Tensor) -> Tensor:
        """Return this process's local part of a full tensor of `parameter`'s shape; both are of any shape."""
        return full

    def keep(self, full: Tensor) -> Tensor:
        """Return a full tensor (of any shape) for the first process to save; it may be empty on the others."""
        return full

    def weights(self, part: "TrainedPart") -> dict[str, Tensor]:
        """Return the full trained weights by name: the fp32 master weights if the engine keeps them."""
        return {name: parameter.detach() for name, parameter in part.parameters.items()}

    def set_weights(self, part: "TrainedPart", weights: Mapping[str, Tensor]) -> None:
        """Load full weights by name."""
        for (name, parameter), local in zip(part.parameters.items(), self.local(part.all), strict=True):
            local.copy_(self.part_of(parameter, weights[name]))
        self.rewritten()

    def optimizer_state(self, part: "TrainedPart") -> dict[str, Any]:
        """Return the optimizer's `state_dict` with full tensors."""
        return part.optimizer.state_dict()

    def set_optimizer_state(self, part: "TrainedPart", state: dict[str, Any]) -> None:
        """Load a `state_dict` with full tensors into the optimizer."""
        part.optimizer.load_state_dict(state)

    def exporting(
        self, module: "DiffusionTrainingModule", parts: "Mapping[str, TrainedPart]"
    ) -> AbstractContextManager:
        """Inside the block, the first process's module has full trained parameters, to be saved."""
        return nullcontext()
