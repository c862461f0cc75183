"""FSDP2: weights, gradients and the optimizer's state in parts, a network's blocks gathered one at a time.

Zhao et al. 2023 (https://arxiv.org/abs/2304.11277); here by torch's `fully_shard`.
"""

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ...core.gradient import repeated_blocks
from .engine import ALTERNATIVE
from .sharded import ShardedEngine


class FSDP2(ShardedEngine):
    """The networks that the model's function calls are in parts; frozen encoders stay whole.

    Parameters keep their dtypes, so that fp32 adapters stand beside a bf16 base, and the module computes as under DDP.
    """

    name, file = "FSDP2", "fsdp2"

    def __init__(self, accelerator, cp_size: int = 1):
        super().__init__(accelerator, cp_size)
        from accelerate.utils import FullyShardedDataParallelPlugin

        self.plugin = FullyShardedDataParallelPlugin()  # as the launcher's file says
        self.networks: list[nn.Module] = []

    def check(self, module, optimizer, accumulation: int, max_grad_norm: float | None) -> None:
        super().check(module, optimizer, accumulation, max_grad_norm)
        if self.plugin.fsdp_version != 2:
            raise ValueError("The launcher's file asks for the first FSDP; write fsdp_version: 2.")
        if self.plugin.activation_checkpointing:
            raise ValueError(
                "The launcher's file says fsdp_activation_checkpointing: true; leave it out, as "
                "memory.checkpointing decides."
            )
        if others := sorted(module.trained_roots - set(module.pipe.in_iteration_models)):
            raise ValueError(f"FSDP2 trains what predicts, {others} are called in other ways; {ALTERNATIVE}")
        if module.trained_dtype == torch.bfloat16:
            raise ValueError(
                "FSDP2 keeps fp32 weights in parts and has no rounding of its own; set memory.trained_dtype=float32."
            )

    def in_host_memory(self, module) -> Collection[str]:
        return module.pipe.in_iteration_models

    def shard(self, module) -> None:
        super().shard(module)
        for name in module.pipe.in_iteration_models:
            network = getattr(module.pipe, name)
            if network is not None:
                self.networks.append(shard_network(network, self._options()))

    def _options(self) -> dict[str, Any]:
        mesh = torch.distributed.init_device_mesh(self.accelerator.device.type, (self.accelerator.num_processes,))
        offload = {"offload_policy": self.plugin.cpu_offload} if self.plugin.cpu_offload else {}
        return {"mesh": mesh, "reshard_after_forward": bool(self.plugin.reshard_after_forward), **offload}

    def prepare(self, module, parts: Mapping[str, Any]) -> nn.Module:
        self.take(module)
        return module

    # Every step

    def accumulating(self, model: nn.Module, last: bool) -> AbstractContextManager:
        for network in self.networks:
            network.set_requires_gradient_sync(last)
        return nullcontext()

    def clip(self, parameters: Sequence[nn.Parameter], limit: float) -> float:
        norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    # Looking and keeping

    def local(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        return [parameter.detach().to_local() for parameter in parameters]

    def rewritten(self) -> None:
        for network in self.networks:
            network.reshard()  # the outermost weights stay gathered after a forward

    def whole(self, parameter: DTensor, local: Tensor) -> Tensor:
        local = local.to(self.accelerator.device)
        return DTensor.from_local(
            local, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
        ).full_tensor()

    def part_of(self, parameter: DTensor, whole: Tensor) -> Tensor:
        return self._distributed(parameter, whole).to_local()

    def _distributed(self, parameter: DTensor, whole: Tensor) -> DTensor:
        return distribute_tensor(
            whole.to(self.accelerator.device), parameter.device_mesh, parameter.placements, src_data_rank=None
        )

    def weights(self, part) -> dict[str, Tensor]:
        named = zip(part.parameters.items(), self.local(part.all), strict=True)
        return {name: self.keep(self.whole(parameter, local)) for (name, parameter), local in named}

    def optimizer_state(self, part) -> dict[str, Any]:
        state = part.optimizer.state_dict()
        return {**state, "state": {number: self._gathered(kept) for number, kept in state["state"].items()}}

    def _gathered(self, kept: Mapping[str, Any]) -> dict[str, Any]:
        return {key: self.keep(v.full_tensor()) if isinstance(v, DTensor) else v for key, v in kept.items()}

    def set_optimizer_state(self, part, state: dict[str, Any]) -> None:
        states = {number: self._spread(part.all[number], kept) for number, kept in state["state"].items()}
        part.optimizer.load_state_dict({**state, "state": states})

    def _spread(self, parameter: DTensor, kept: Mapping[str, Any]) -> dict[str, Any]:
        is_like = {key: isinstance(value, Tensor) and value.shape == parameter.shape for key, value in kept.items()}
        return {key: self._distributed(parameter, v) if is_like[key] else v for key, v in kept.items()}


def shard_network(network: nn.Module, options: Mapping[str, Any]) -> nn.Module:
    """Put a network's weights in parts, its blocks each on its own; what is trained of a unit has one dtype.

    Args:
        options: Of `fully_shard`.
    """
    from torch.distributed.fsdp import fully_shard

    for block in repeated_blocks(network):
        fully_shard(block, **options)
    return fully_shard(network, **options)
