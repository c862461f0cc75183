"""DeepSpeed ZeRO: gradients and optimizer state are sharded (stage 2), and the weights as well (stage 3).

Rajbhandari et al. 2020 (https://arxiv.org/abs/1910.02054); offload: Rajbhandari et al. 2021
(https://arxiv.org/abs/2104.07857).
"""

import copy
import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .sharded import ShardedEngine

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.optim import Optimizer

    from ...diffusion.training_module import PipelineTrainingModule
    from ..state import TrainedPart


class ZeRO(ShardedEngine):
    """Runs the training module in one DeepSpeed engine, whose optimizer shards fp32 master weights over processes.

    DeepSpeed's own mixed precision stays off: parameters keep their dtypes, and the module computes as under DDP.
    """

    has_master_weights = True

    def __init__(self, accelerator: "Accelerator", cp_size: int = 1):
        super().__init__(accelerator, cp_size)
        if accelerator.device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        from accelerate import DistributedType
        from accelerate.utils import DeepSpeedPlugin

        is_set_up = accelerator.distributed_type == DistributedType.DEEPSPEED  # never on a CPU
        self.config = (accelerator.deepspeed_plugin if is_set_up else DeepSpeedPlugin()).deepspeed_config
        self.stage = self.config["zero_optimization"]["stage"]
        self.shards_weights = self.stage == 3
        self.name = f"DeepSpeed ZeRO-{self.stage}"
        offload = "_offload" if self._device("offload_optimizer") else ""
        # ZeRO-3 without offload shards as FSDP2 does, and has no file of its own.
        self.file = f"zero{self.stage}{offload}" if (self.stage, offload) != (3, "") else "fsdp2"

    def check(
        self, module: "PipelineTrainingModule", optimizer: Callable, accumulation: int, max_grad_norm: float | None
    ) -> None:
        super().check(module, optimizer, accumulation, max_grad_norm)
        self._check_equal("gradient_accumulation_steps", accumulation, "batch_size and micro_batch_size make it")
        self._check_equal("gradient_clipping", max_grad_norm or 0.0, "max_grad_norm is")
        self._check_file(module)
        if module.trained_dtype == torch.bfloat16 and module.trainable_models and module.lora:
            raise ValueError(
                f"{self.name} trains parameters of one dtype only, but the lora is fp32 and the weights of "
                f"{module.trainable_models} are bf16; set memory.trained_dtype=float32."
            )

    def _check_file(self, module: "PipelineTrainingModule") -> None:
        """Refuse a DeepSpeed file that sets what the configuration sets, or what this trainer does not support."""
        if automatic := [key for key, value in self.config["zero_optimization"].items() if value == "auto"]:
            raise ValueError(
                f"The DeepSpeed file has {automatic[0]}: auto, but nothing here fills it in; write a number."
            )
        for section in ("optimizer", "scheduler"):
            if section in self.config:
                key = "lr_scheduler" if section == "scheduler" else section
                raise ValueError(
                    f"The DeepSpeed file has a section {section!r}, but {key}=… decides that here; leave it out."
                )
        if self.config.get("fp16", {}).get("enabled") is True:
            raise ValueError(
                "The DeepSpeed file enables fp16, but this trainer computes in bf16 or fp32; leave it out."
            )
        if self.config.get("bf16", {}).get("enabled") is True and module.pipe.torch_dtype != torch.bfloat16:
            raise ValueError(
                "The DeepSpeed file enables bf16, but model.torch_dtype is float32; set model.torch_dtype=bfloat16, or "
                "leave bf16 out of the file."
            )
        if "activation_checkpointing" in self.config and module.memory.checkpointing == "none":
            raise ValueError(
                "The DeepSpeed file has activation_checkpointing, but memory.checkpointing is none; set "
                "memory.checkpointing=blocks, or leave it out of the file."
            )
        if "nvme" in (self._device("offload_optimizer"), self._device("offload_param")):
            raise ValueError(
                "The DeepSpeed file offloads to nvme, from which no checkpoint can be saved; offload to cpu."
            )

    def _check_equal(self, key: str, value: float, why: str) -> None:
        found = self.config.get(key, "auto")
        if found != "auto" and found != value:
            raise ValueError(
                f"The launcher's file has {key}: {found}, but {why} {value:g}; write auto in the DeepSpeed file, as "
                "conf/accelerate/zero2.json does."
            )

    def _device(self, offload: str) -> str | None:
        return (self.config["zero_optimization"].get(offload) or {}).get("device")

    def in_host_memory(self, module: "PipelineTrainingModule") -> Collection[str]:
        return {*module.trained_roots, *module.pipe.in_iteration_models} if self.stage == 3 else ()

    def prepare(self, module: "PipelineTrainingModule", parts: "Mapping[str, TrainedPart]") -> nn.Module:
        import deepspeed

        # This op takes a minute to compile, and gloo does the same.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(torch.distributed.get_backend(), auto_mpi_discovery=False, verbose=False)
        (part,) = parts.values()
        config = self._complete_config()
        self._wrap_forward(module)
        if self.stage == 3:
            self._shard_networks(module, config)
        if "activation_checkpointing" in config:
            deepspeed.checkpointing.configure(None, deepspeed_config=config)
        self.engine, *_ = deepspeed.initialize(model=module, optimizer=part.optimizer, config=config)
        self.zero = self.engine.optimizer
        self.zero.check_grad_overflow = True  # otherwise only fp16 gradients are checked
        return self.engine

    def _complete_config(self) -> dict[str, Any]:
        """Return the DeepSpeed file's content, with the values that this run's configuration determines."""
        return {
            **self.config,
            "train_micro_batch_size_per_gpu": 1,  # DeepSpeed only counts with it
            "train_batch_size": self.accelerator.gradient_accumulation_steps * self.accelerator.num_processes,
            "gradient_accumulation_steps": self.accelerator.gradient_accumulation_steps,
            "gradient_clipping": 0.0,  # `step` sets it
            "bf16": {"enabled": False},
            "fp16": {"enabled": False},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,  # keep the configured optimizer
        }

    def _shard_networks(self, module: "PipelineTrainingModule", config: dict[str, Any]) -> None:
        """Shard weights one by one, from the host memory into which they were read.

        Frozen encoders stay full and hidden from DeepSpeed, because each process calls them on its own.
        """
        import deepspeed

        pipe = module.pipe
        for name, model in list(pipe.named_children()):
            trained = any(parameter.requires_grad for parameter in model.parameters())
            if name not in pipe.in_iteration_models and not trained:
                object.__setattr__(pipe, name, pipe._modules.pop(name))
        for buffer in module.buffers():  # DeepSpeed moves parameters only
            buffer.data = buffer.data.to(self.accelerator.device)
        deepspeed.zero.Init(module=module, config_dict_or_path=config, dtype=torch.float32)

    # Every step

    def accumulating(self, model: nn.Module, last: bool) -> AbstractContextManager:
        self.engine.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)

    def step(self, parts: "Sequence[TrainedPart]", limit: float, seed: int) -> list[float]:
        self.zero.clip_grad = 0.0 if math.isinf(limit) else limit
        self.engine.step()  # it skips a step whose gradient is not finite
        return [math.inf if self.zero.overflow else float(self.engine.get_global_grad_norm())]

    # Evaluating and saving

    def local(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        return [p.ds_tensor.detach() for p in parameters] if self.stage == 3 else super().local(parameters)

    def rewritten(self) -> None:
        if self.stage == 3:
            self.zero._partition_all_parameters()

    def whole(self, parameter: nn.Parameter, local: Tensor) -> Tensor:
        if self.stage != 3:
            return local
        local = local.to(self.accelerator.device).contiguous()
        gathered = local.new_empty(self.accelerator.num_processes * local.numel())
        torch.distributed.all_gather_into_tensor(gathered, local)
        return gathered[: parameter.ds_numel].view(parameter.ds_shape)

    def part_of(self, parameter: nn.Parameter, full: Tensor) -> Tensor:
        if self.stage != 3:
            return full
        size = parameter.ds_tensor.numel()  # all shards have one size; DeepSpeed pads the last one
        flat = nn.functional.pad(full.flatten(), (0, size * self.accelerator.num_processes - full.numel()))
        return flat.narrow(0, size * self.accelerator.process_index, size)

    def exporting(self, module: "PipelineTrainingModule", parts: "Mapping[str, TrainedPart]") -> AbstractContextManager:
        return super().exporting(module, parts) if self.stage == 3 else nullcontext()

    def weights(self, part: "TrainedPart") -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_fp32_param

        return {name: self.keep(safe_get_full_fp32_param(p)) for name, p in part.parameters.items()}

    def set_weights(self, part: "TrainedPart", weights: Mapping[str, Tensor]) -> None:
        super().set_weights(part, weights)
        for name, parameter in part.parameters.items():
            self._set_optimizer_value(parameter, weights[name])

    def optimizer_state(self, part: "TrainedPart") -> dict[str, Any]:
        """Return the optimizer's `state_dict` as it would be without DeepSpeed, with one full tensor per parameter.

        DeepSpeed's optimizer itself has flat tensors, each the local shards of many parameters.
        """
        from deepspeed.utils import safe_get_full_optimizer_state

        flat = next(iter(part.optimizer.state.values()), None)
        states = {}
        for number, parameter in enumerate(part.all if flat else ()):
            states[number] = {
                key: self.keep(safe_get_full_optimizer_state(parameter, key)) if _is_moment(value) else value
                for key, value in flat.items()
            }
        return {"state": states, "param_groups": [{**_options(part.optimizer), "params": list(range(len(part.all)))}]}

    def set_optimizer_state(self, part: "TrainedPart", state: dict[str, Any]) -> None:
        (group,) = state["param_groups"]
        part.optimizer.param_groups[0].update({key: group[key] for key in _options(part.optimizer)})
        self._create_state(part.optimizer, next(iter(state["state"].values()), {}))
        for number, values in state["state"].items():
            for key, value in values.items():
                if _is_moment(value):
                    self._set_optimizer_value(part.all[number], value, key)

    def _create_state(self, optimizer: "Optimizer", example: Mapping[str, Any]) -> None:
        """Create the optimizer's state, which it would create in its first step, with the keys of `example`."""
        if not example:
            return
        flats = self.zero.fp32_partitioned_groups_flat if self.stage == 3 else self.zero.single_partition_of_fp32_groups
        for flat in flats:
            optimizer.state[flat] = {
                key: torch.zeros_like(flat) if _is_moment(value) else copy.deepcopy(value)
                for key, value in example.items()
            }
        if self.stage != 3:
            self.zero._hp_optimizer_states_linked = False
            self.zero._lazy_init_hp_params_optimizer_state()

    def _set_optimizer_value(self, parameter: nn.Parameter, full: Tensor, key: str | None = None) -> None:
        """Set the optimizer's moment `key` of a parameter, or its fp32 master weight if `key` is None."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        if self.stage == 3:
            self.zero.set_local_hp_param(self.part_of(parameter, full), parameter, key)
        elif key is None:
            safe_set_full_fp32_param(parameter, full)
        else:
            safe_set_full_optimizer_state(parameter, full, key)


def _is_moment(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def _options(optimizer: "Optimizer") -> dict[str, Any]:
    return {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
