"""Reads and checks what the launcher's file asks for; `accelerate launch` passes it on as environment variables."""

import os
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from accelerate import ParallelismConfig

SIZES = ("cp_size", "tp_size", "sp_size", "dp_replicate_size")  # keys of the file's parallelism_config


def asked_cp_size(processes: int) -> int:
    """Return the context-parallel size that the launcher's file asks for: N processes share one sample's tokens.

    Raises:
        ValueError: The size does not divide the number of processes, or the file asks for another kind of parallelism.
    """
    if not asked("ACCELERATE_USE_PARALLELISM_CONFIG"):
        return 1
    cp_size, *others = (int(os.environ.get(f"PARALLELISM_CONFIG_{name.upper()}", 1)) for name in SIZES)
    for name, size in zip(SIZES[1:], others, strict=True):
        if size > 1:
            raise ValueError(
                f"The launcher's parallelism_config_{name} is {size}; leave it out, because only cp_size is supported "
                "here: see conf/accelerate/context_parallel.yaml."
            )
    if processes % cp_size:
        raise ValueError(
            f"The launcher's parallelism_config_cp_size is {cp_size}, which does not divide its {processes} processes; "
            "set it to a divisor."
        )
    return cp_size


def own_parallelism(device: str) -> "ParallelismConfig | None":
    """Return the parallelism that accelerate itself sets up: none, except that FSDP2 shards over all processes.

    Context parallelism is this project's own, because accelerate splits sequences by hooks on every layer that is named
    `self_attn`, and text encoders have such layers too.
    """
    from accelerate import ParallelismConfig

    if not asked("ACCELERATE_USE_PARALLELISM_CONFIG"):
        return None
    shards = asked("ACCELERATE_USE_FSDP") and device != "cpu"  # accelerate starts no FSDP2 on a CPU
    sharded = int(os.environ.get("WORLD_SIZE", 1)) if shards else 1
    return ParallelismConfig(dp_replicate_size=1, dp_shard_size=sharded, tp_size=1, cp_size=1, sp_size=1)


def check_launch(device: str, torch_dtype: str) -> None:
    """Check that the launcher's file agrees with the configuration on device and precision.

    Raises:
        ValueError: They disagree, or DeepSpeed is asked for and not installed.
    """
    if asked("ACCELERATE_USE_DEEPSPEED") and find_spec("deepspeed") is None:
        raise ValueError('DeepSpeed is not installed: pip install "diffsynth-hydra[cluster]"')
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    configured = "bf16" if torch_dtype == "bfloat16" else "no"
    if launched not in ("no", configured):
        raise ValueError(
            f"The launcher's file has mixed_precision: {launched}, but model.torch_dtype is {torch_dtype}, which "
            "decides here; leave mixed_precision out of the file."
        )
    if device != "cpu" and asked("ACCELERATE_USE_CPU"):
        raise ValueError(f"The launcher's file has use_cpu: true, but device is {device}; set device=cpu.")
    # `torchrun` sets only the first of the two, and may well start processes for a CPU.
    is_for_gpus = {"LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"} <= os.environ.keys()
    if device == "cpu" and is_for_gpus and torch.cuda.is_available():
        raise ValueError(
            "The launcher starts processes for GPUs, but device is cpu; set device=auto, or write use_cpu: true in the "
            "launcher's file."
        )


def asked(name: str) -> bool:
    """Whether `accelerate launch` has set the environment variable `name` to true."""
    return os.environ.get(name, "false").lower() == "true"
