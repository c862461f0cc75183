"""FSDP2: weights, gradients and optimizer state are sharded; a network's blocks are gathered one at a time.

Zhao et al. 2023 (https://arxiv.org/abs/2304.11277), as torch's `fully_shard` implements it.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ...core.gradient import repeated_blocks
from .engine import ALTERNATIVE
from .sharded import ShardedEngine

if TYPE_CHECKING:
    from accelerate import Accelerator

    from ...diffusion.training_module import PipelineTrainingModule
    from ..state import TrainedPart


class FSDP2(ShardedEngine):
    """Shards the networks that `model_fn` calls; frozen encoders stay full on every process.

    Adapters keep their dtype, so that one in fp32 works with a bf16 base, and the module computes as under DDP.
    """

    name, file = "FSDP2", "fsdp2"

    def __init__(self, accelerator: "Accelerator", cp_size: int = 1):
        super().__init__(accelerator, cp_size)
        from accelerate.utils import FullyShardedDataParallelPlugin

        self.plugin = FullyShardedDataParallelPlugin()  # reads the launcher's file from the environment
        self.networks: list[nn.Module] = []

    def check(
        self, module: "PipelineTrainingModule", optimizer: Callable, accumulation: int, max_grad_norm: float | None
    ) -> None:
        super().check(module, optimizer, accumulation, max_grad_norm)
        if self.plugin.fsdp_version != 2:
            raise ValueError(
                f"The launcher's file has fsdp_version: {self.plugin.fsdp_version}; this trainer needs FSDP2. Write "
                "fsdp_version: 2."
            )
        if self.plugin.activation_checkpointing:
            raise ValueError(
                "The launcher's file has fsdp_activation_checkpointing: true, but memory.checkpointing decides that "
                "here; leave it out of the file."
            )
        if others := sorted(module.trained_roots - set(module.pipe.in_iteration_models)):
            raise ValueError(
                f"FSDP2 shards only the networks that model_fn calls, but this run also trains {others}; {ALTERNATIVE}"
            )
        if module.trained_dtype == torch.bfloat16:
            raise ValueError(
                "memory.trained_dtype is bfloat16, but FSDP2 has no stochastic rounding for sharded weights; set "
                "memory.trained_dtype=float32."
            )

    def in_host_memory(self, module: "PipelineTrainingModule") -> Collection[str]:
        return module.pipe.in_iteration_models

    def shard(self, module: "PipelineTrainingModule") -> None:
        super().shard(module)
        for name in module.pipe.in_iteration_models:
            network = getattr(module.pipe, name)
            if network is not None:
                self.networks.append(shard_network(network, self._options(module)))

    def _options(self, module: "PipelineTrainingModule") -> dict[str, Any]:
        mesh = torch.distributed.init_device_mesh(self.accelerator.device.type, (self.accelerator.num_processes,))
        offload = {"offload_policy": self.plugin.cpu_offload} if self.plugin.cpu_offload else {}
        options = {"mesh": mesh, "reshard_after_forward": bool(self.plugin.reshard_after_forward), **offload}
        if module.trainable_models and module.pipe.torch_dtype == torch.bfloat16:
            # Full training has fp32 weights, of which networks compute with bf16 copies: half as much is gathered.
            from torch.distributed.fsdp import MixedPrecisionPolicy

            options["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        return options

    def prepare(self, module: "PipelineTrainingModule", parts: "Mapping[str, TrainedPart]") -> nn.Module:
        self._wrap_forward(module)
        return module

    # Every step

    def accumulating(self, model: nn.Module, last: bool) -> AbstractContextManager:
        # Gradients are sharded after every micro-batch: until then each process holds the whole ones, 76 GiB for full
        # training of 20 billion weights (computed), and the weights themselves are sent twice per micro-batch anyway.
        return nullcontext()

    def clip(self, parameters: Sequence[nn.Parameter], limit: float) -> float:
        norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    # Evaluating and saving

    def local(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        return [parameter.detach().to_local() for parameter in parameters]

    def rewritten(self) -> None:
        for network in self.networks:
            network.reshard()  # the weights outside of the blocks stay gathered after a forward pass

    def whole(self, parameter: DTensor, local: Tensor) -> Tensor:
        local = local.to(self.accelerator.device)
        return DTensor.from_local(
            local, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
        ).full_tensor()

    def part_of(self, parameter: DTensor, full: Tensor) -> Tensor:
        return self._distributed(parameter, full).to_local()

    def _distributed(self, parameter: DTensor, full: Tensor) -> DTensor:
        return distribute_tensor(
            full.to(self.accelerator.device), parameter.device_mesh, parameter.placements, src_data_rank=None
        )

    def weights(self, part: "TrainedPart") -> dict[str, Tensor]:
        named = zip(part.parameters.items(), self.local(part.all), strict=True)
        return {name: self.keep(self.whole(parameter, local)) for (name, parameter), local in named}

    def optimizer_state(self, part: "TrainedPart") -> dict[str, Any]:
        state = part.optimizer.state_dict()
        return {**state, "state": {number: self._gathered(values) for number, values in state["state"].items()}}

    def _gathered(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return one parameter's optimizer state with full tensors."""
        return {key: self.keep(v.full_tensor()) if isinstance(v, DTensor) else v for key, v in values.items()}

    def set_optimizer_state(self, part: "TrainedPart", state: dict[str, Any]) -> None:
        states = {number: self._sharded(part.all[number], values) for number, values in state["state"].items()}
        part.optimizer.load_state_dict({**state, "state": states})

    def _sharded(self, parameter: DTensor, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return one parameter's optimizer state with its moments sharded like the parameter."""
        is_moment = {key: isinstance(v, Tensor) and v.shape == parameter.shape for key, v in values.items()}
        return {key: self._distributed(parameter, v) if is_moment[key] else v for key, v in values.items()}


def shard_network(network: nn.Module, options: Mapping[str, Any]) -> nn.Module:
    """Shard a network's weights: each block is a unit of its own, and the remaining weights are one more.

    FSDP2 requires that the trained weights of a unit have one dtype.

    Args:
        options: Keyword arguments of `fully_shard`.
    """
    from torch.distributed.fsdp import fully_shard

    for block in repeated_blocks(network):
        fully_shard(block, **options)
    return fully_shard(network, **options)
