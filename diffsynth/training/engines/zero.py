"""DeepSpeed's ZeRO: gradients and the optimizer's state in parts (stage 2), and the weights as well (stage 3).

Rajbhandari et al. 2020 (https://arxiv.org/abs/1910.02054); offload: Rajbhandari et al. 2021
(https://arxiv.org/abs/2104.07857).
"""

import copy
import math
import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .sharded import ShardedEngine


class ZeRO(ShardedEngine):
    """One DeepSpeed engine around the training module; its optimizer keeps fp32 weights, each process a part of them.

    DeepSpeed's own mixed precision stays off: parameters keep their dtypes, and the module computes as under DDP.
    """

    has_master_weights = True

    def __init__(self, accelerator, cp_size: int = 1):
        super().__init__(accelerator, cp_size)
        if accelerator.device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        from accelerate import DistributedType
        from accelerate.utils import DeepSpeedPlugin

        is_set_up = accelerator.distributed_type == DistributedType.DEEPSPEED  # as it never is on a CPU
        self.config = (accelerator.deepspeed_plugin if is_set_up else DeepSpeedPlugin()).deepspeed_config
        self.stage = self.config["zero_optimization"]["stage"]
        self.shards_weights = self.stage == 3
        self.name = f"DeepSpeed ZeRO-{self.stage}"
        offload = "_offload" if self._device("offload_optimizer") else ""
        self.file = f"zero{self.stage}{offload}" if (self.stage, offload) != (3, "") else "fsdp2"  # which shards alike

    def check(self, module, optimizer, accumulation: int, max_grad_norm: float | None) -> None:
        super().check(module, optimizer, accumulation, max_grad_norm)
        self._check_agreed("gradient_accumulation_steps", accumulation, "batch_size and micro_batch_size make it")
        self._check_agreed("gradient_clipping", max_grad_norm or 0.0, "max_grad_norm is")
        self._check_file(module)
        if module.trained_dtype == torch.bfloat16 and module.trainable_models and module.lora:
            raise ValueError(f"{self.name} trains one dtype: a lora needs memory.trained_dtype=float32 beside it.")

    def _check_file(self, module) -> None:
        if guessed := [key for key, value in self.config["zero_optimization"].items() if value == "auto"]:
            raise ValueError(
                f"The DeepSpeed file says {guessed[0]}: auto, which nothing here can tell; write a number."
            )
        for section in ("optimizer", "scheduler"):
            if section in self.config:
                key = "lr_scheduler" if section == "scheduler" else section
                raise ValueError(f"The DeepSpeed file has a section {section!r}; leave it out, as {key}=… decides.")
        if self.config.get("fp16", {}).get("enabled") is True:
            raise ValueError("The DeepSpeed file enables fp16, in which nothing here trains; leave it out.")
        if self.config.get("bf16", {}).get("enabled") is True and module.pipe.torch_dtype != torch.bfloat16:
            raise ValueError("The DeepSpeed file enables bf16, and model.torch_dtype is float32; they must agree.")
        if "activation_checkpointing" in self.config and module.memory.checkpointing == "none":
            raise ValueError(
                "The DeepSpeed file has activation_checkpointing, and memory.checkpointing is none; set "
                "memory.checkpointing=blocks, or leave it out of the file."
            )
        if "nvme" in (self._device("offload_optimizer"), self._device("offload_param")):
            raise ValueError("The DeepSpeed file offloads to nvme, from where no checkpoint is made; offload to cpu.")

    def _check_agreed(self, key: str, value: float, why: str) -> None:
        said = self.config.get(key, "auto")
        if said != "auto" and said != value:
            raise ValueError(
                f"The launcher's file says {key}: {said}, but {why} {value:g}; write auto in a DeepSpeed file, as "
                "conf/accelerate/zero2.json does."
            )

    def _device(self, offload: str) -> str | None:
        return (self.config["zero_optimization"].get(offload) or {}).get("device")

    def in_host_memory(self, module) -> Collection[str]:
        return {*module.trained_roots, *module.pipe.in_iteration_models} if self.stage == 3 else ()

    def prepare(self, module, parts: Mapping[str, Any]) -> nn.Module:
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiled for a minute; gloo does the same
        deepspeed.init_distributed(torch.distributed.get_backend(), auto_mpi_discovery=False, verbose=False)
        (part,) = parts.values()
        config = self._settled_config()
        self.take(module)
        if self.stage == 3:
            self._shard_networks(module, config)
        if "activation_checkpointing" in config:
            deepspeed.checkpointing.configure(None, deepspeed_config=config)
        self.engine, *_ = deepspeed.initialize(model=module, optimizer=part.optimizer, config=config)
        self.zero = self.engine.optimizer
        self.zero.check_grad_overflow = True  # of bf16 gradients too
        return self.engine

    def _settled_config(self) -> dict[str, Any]:
        """The launcher's, with what the configuration decides filled in."""
        return {
            **self.config,
            "train_micro_batch_size_per_gpu": 1,  # only counted
            "train_batch_size": self.accelerator.gradient_accumulation_steps * self.accelerator.num_processes,
            "gradient_accumulation_steps": self.accelerator.gradient_accumulation_steps,
            "gradient_clipping": 0.0,  # set in each step
            "bf16": {"enabled": False},
            "fp16": {"enabled": False},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,  # the configured one is used
        }

    def _shard_networks(self, module, config: dict[str, Any]) -> None:
        """Partition weights one by one, from the host memory they were read into.

        Frozen encoders stay whole and unseen by DeepSpeed: processes call them when they need to, not all at once.
        """
        import deepspeed

        pipe = module.pipe
        for name, model in list(pipe.named_children()):
            trained = any(parameter.requires_grad for parameter in model.parameters())
            if name not in pipe.in_iteration_models and not trained:
                object.__setattr__(pipe, name, pipe._modules.pop(name))
        for buffer in module.buffers():  # DeepSpeed moves only parameters
            buffer.data = buffer.data.to(self.accelerator.device)
        deepspeed.zero.Init(module=module, config_dict_or_path=config, dtype=torch.float32)

    # Every step

    def accumulating(self, model: nn.Module, last: bool) -> AbstractContextManager:
        self.engine.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)

    def step(self, parts: Sequence, limit: float, seed: int) -> list[float]:
        self.zero.clip_grad = 0.0 if math.isinf(limit) else limit
        self.engine.step()  # leaves out what is not finite
        return [math.inf if self.zero.overflow else float(self.engine.get_global_grad_norm())]

    # Looking and keeping

    def local(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        return [p.ds_tensor.detach() for p in parameters] if self.stage == 3 else super().local(parameters)

    def rewritten(self) -> None:
        if self.stage == 3:
            self.zero._partition_all_parameters()

    def whole(self, parameter: nn.Parameter, local: Tensor) -> Tensor:
        if self.stage != 3:
            return local
        mine = local.to(self.accelerator.device).contiguous()
        gathered = mine.new_empty(self.accelerator.num_processes * mine.numel())
        torch.distributed.all_gather_into_tensor(gathered, mine)
        return gathered[: parameter.ds_numel].view(parameter.ds_shape)

    def part_of(self, parameter: nn.Parameter, whole: Tensor) -> Tensor:
        if self.stage != 3:
            return whole
        size = parameter.ds_tensor.numel()  # the last one is padded
        flat = nn.functional.pad(whole.flatten(), (0, size * self.accelerator.num_processes - whole.numel()))
        return flat.narrow(0, size * self.accelerator.process_index, size)

    def exporting(self, module, parts: Mapping[str, Any]) -> AbstractContextManager:
        return super().exporting(module, parts) if self.stage == 3 else nullcontext()

    def weights(self, part) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_fp32_param

        return {name: self.keep(safe_get_full_fp32_param(p)) for name, p in part.parameters.items()}

    def set_weights(self, part, weights: Mapping[str, Tensor]) -> None:
        super().set_weights(part, weights)
        for name, parameter in part.parameters.items():
            self._set_kept(parameter, weights[name])

    def optimizer_state(self, part) -> dict[str, Any]:
        """As it would be without DeepSpeed, which has the optimizer step flat parts of many tensors at once."""
        from deepspeed.utils import safe_get_full_optimizer_state

        flat = next(iter(part.optimizer.state.values()), None)
        states = {}
        for number, parameter in enumerate(part.all if flat else ()):
            states[number] = {
                key: self.keep(safe_get_full_optimizer_state(parameter, key)) if _is_moment(value) else value
                for key, value in flat.items()
            }
        return {"state": states, "param_groups": [{**_options(part.optimizer), "params": list(range(len(part.all)))}]}

    def set_optimizer_state(self, part, state: dict[str, Any]) -> None:
        (group,) = state["param_groups"]
        part.optimizer.param_groups[0].update({key: group[key] for key in _options(part.optimizer)})
        self._make_room(part.optimizer, next(iter(state["state"].values()), {}))
        for number, kept in state["state"].items():
            for key, value in kept.items():
                if _is_moment(value):
                    self._set_kept(part.all[number], value, key)

    def _make_room(self, optimizer, example: Mapping[str, Any]) -> None:
        """Give the optimizer state like `example`, which it would make in its first step."""
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

    def _set_kept(self, parameter: nn.Parameter, whole: Tensor, key: str | None = None) -> None:
        """Set what the optimizer keeps of a parameter: its moment `key`, or the fp32 weight itself."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        if self.stage == 3:
            self.zero.set_local_hp_param(self.part_of(parameter, whole), parameter, key)
        elif key is None:
            safe_set_full_fp32_param(parameter, whole)
        else:
            safe_set_full_optimizer_state(parameter, whole, key)


def _is_moment(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def _options(optimizer) -> dict[str, Any]:
    return {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
