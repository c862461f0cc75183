"""The memory footprint of a training: bytes between two optimizer steps, and the extra bytes during a step."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from ..core.live_bytes import bytes_of
from ..diffusion.base_pipeline import BasePipeline
from ..diffusion.training_module import PipelineTrainingModule
from .optimizer_cost import optimizer_cost
from .rehearsal import tensors_of

if TYPE_CHECKING:
    from ..training.absent import NoEMA
    from ..training.ema import EMA


@dataclass(frozen=True)
class MemoryFootprint:
    """Bytes that a training takes on one device.

    Args:
        frozen, trained: Frozen and trained weights.
        gradients, optimizer, average: Gradients, optimizer state and EMA of the trained weights.
        update: Extra bytes during the optimizer step.
        block: Weights of the largest block, which engines that shard weights gather.
        master_weights: fp32 copies of the trained weights, which ZeRO keeps.
        encoders: The part of `frozen` that belongs to models other than the trained network; no engine shards it.
        working: Peak of forward and backward pass beyond weights, optimizer state and average.
        activations: Tensors that the forward pass saves for the backward pass.
        host: Tensors that wait in host memory.
    """

    frozen: int
    trained: int
    gradients: int
    optimizer: int
    average: int
    update: int
    block: int
    master_weights: int
    encoders: int
    working: int = 0
    activations: int = 0
    host: int = 0

    @property
    def weights(self) -> int:
        """Frozen and trained weights."""
        return self.frozen + self.trained

    @property
    def between_steps(self) -> int:
        """Bytes between two steps: weights, optimizer state and average."""
        return self.weights + self.optimizer + self.average

    @property
    def passing(self) -> int:
        """Extra bytes at the peak of a step, which is in the two passes or in the optimizer step."""
        return max(self.working, self.gradients + self.update)

    @property
    def peak(self) -> int:
        """Most bytes at any moment of a step."""
        return self.between_steps + self.passing


def static_footprint(
    module: PipelineTrainingModule,
    at_rest: int,
    unreached: Sequence[nn.Parameter],
    optimizer: Callable,
    ema: "EMA | NoEMA",
    on_cuda: bool = False,
) -> MemoryFootprint:
    """Return the footprint without `working`, `activations` and `host`, which depend on the samples.

    Args:
        module: The training module, its memory options applied.
        at_rest: Bytes of all weights on the device.
        unreached: Trained parameters that get no gradient, such as those of the text after the last attention; they
            have no optimizer state. They are known after the passes have been rehearsed.
        optimizer: Called as `optimizer(parameters)`.
        ema: Average of the weights.
        on_cuda: Whether the run is on CUDA, where optimizers may step all tensors at once.
    """
    parts = [list(part.values()) for part in module.trained_parts().values()]
    weights = bytes_of(parameter for part in parts for parameter in part)
    trained = module.trainable_parameters()
    numel = [parameter.numel() for parameter in trained]
    reached = sum(numel) - sum(parameter.numel() for parameter in unreached)
    cost = optimizer_cost(optimizer, trained[0].dtype, on_cuda)
    return MemoryFootprint(
        frozen=at_rest - weights,
        trained=weights,
        gradients=bytes_of(trained) - bytes_of(unreached),
        optimizer=math.ceil(cost.state * reached),
        average=4 * sum(parameter.numel() for parameter in parts[0]) if ema.on_device else 0,
        update=cost.update(reached, max(numel)),
        block=largest_block(module.pipe.network),
        master_weights=4 * sum(parameter.numel() for part in parts for parameter in part),
        encoders=weights_of(module.pipe, encoders_of(module)),
    )


def weights_of(pipe: BasePipeline, names: Iterable[str]) -> int:
    """Return the bytes of parameters and buffers of the named models of a pipeline."""
    return sum(bytes_of(tensors_of(getattr(pipe, name))) for name in names)


def encoders_of(module: PipelineTrainingModule) -> set[str]:
    """Return the names of the built models that `model_fn` does not call and that are not trained."""
    return module.pipe.built_models - {*module.pipe.in_iteration_models} - module.trained_roots


def largest_block(network: nn.Module) -> int:
    """Return the bytes of the largest module in a network's module lists; of the network itself if it has no list."""
    blocks = [block for part in network.modules() if isinstance(part, nn.ModuleList) for block in part]
    return max((bytes_of(tensors_of(block)) for block in blocks), default=bytes_of(tensors_of(network)))
