"""What a training holds from step to step, and what of it comes and goes within one."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from ..core.memory.live import bytes_of
from ..diffusion.base_pipeline import BasePipeline
from ..diffusion.training_module import PipelineTrainingModule
from .optimizer_cost import optimizer_cost
from .rehearsal import tensors_of


@dataclass(frozen=True)
class MemoryFootprint:
    """Bytes of a training on one device.

    Args:
        frozen, trained: Weights.
        gradients, optimizer, average: Of what is trained.
        update: While the optimizer steps, beside all of these.
        block: Weights of the largest block, which engines that shard weights gather.
        masters: fp32 copies of what is trained, which ZeRO keeps beside it.
        encoders: Of the frozen weights, those of models outside of the training's network, which no engine shards.
        working: At the peak of forward and backward pass, beside weights, optimizer and average.
        activations: What the forward pass leaves for the backward pass.
        host: What waits in host memory.
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
        return self.frozen + self.trained

    @property
    def between_steps(self) -> int:
        return self.weights + self.optimizer + self.average

    @property
    def passing(self) -> int:
        """At the peak beside weights, optimizer and average: in the two passes, or while the optimizer steps."""
        return max(self.working, self.gradients + self.update)

    @property
    def peak(self) -> int:
        return self.between_steps + self.passing


def kept(
    module: PipelineTrainingModule,
    at_rest: int,
    unreached: Sequence[nn.Parameter],
    optimizer: Callable,
    ema=None,
    on_cuda: bool = False,
) -> MemoryFootprint:
    """What does not depend on what is trained on.

    Args:
        at_rest: Bytes of weights on the device.
        unreached: Weights that no gradient reaches, as those of the text after the last attention to it, have no
            optimizer's state; which they are is known when the passes have been rehearsed.
    """
    parts = [list(part.values()) for part in module.trained_parts().values()]
    weights = bytes_of(parameter for part in parts for parameter in part)
    trained = module.trainable_parameters()
    numbers = [parameter.numel() for parameter in trained]
    reached = sum(numbers) - sum(parameter.numel() for parameter in unreached)
    cost = optimizer_cost(optimizer, trained[0].dtype, on_cuda)
    averaged = ema is not None and ema.device is None
    return MemoryFootprint(
        frozen=at_rest - weights,
        trained=weights,
        gradients=bytes_of(trained) - bytes_of(unreached),
        optimizer=math.ceil(cost.state * reached),
        average=4 * sum(parameter.numel() for parameter in parts[0]) if averaged else 0,
        update=cost.update(reached, max(numbers)),
        block=largest_block(module.pipe.network),
        master_weights=4 * sum(parameter.numel() for part in parts for parameter in part),
        encoders=weights_of(module.pipe, encoders_of(module)),
    )


def weights_of(pipe: BasePipeline, names: Iterable[str]) -> int:
    """Bytes of the parameters and buffers of some of the pipeline's models."""
    return sum(bytes_of(tensors_of(getattr(pipe, name))) for name in names)


def encoders_of(module) -> set[str]:
    """Models that are there and neither predict nor are trained."""
    return module.pipe.built_models - {*module.pipe.in_iteration_models} - module.trained_roots


def largest_block(network: nn.Module) -> int:
    """Bytes of the largest module in any of a network's lists of modules."""
    blocks = [block for part in network.modules() if isinstance(part, nn.ModuleList) for block in part]
    return max((bytes_of(tensors_of(block)) for block in blocks), default=bytes_of(tensors_of(network)))
