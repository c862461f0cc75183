"""What the launcher's file asks for: `accelerate launch` hands it over in the environment."""

import os
from importlib.util import find_spec

import torch

SIZES = ("cp_size", "tp_size", "sp_size", "dp_replicate_size")  # of a parallelism_config


def asked_cp_size(processes: int) -> int:
    """How many processes are to have the tokens of a sample together.

    Raises:
        ValueError: It does not divide the number of processes, or tensors are to be split.
    """
    if not asked("ACCELERATE_USE_PARALLELISM_CONFIG"):
        return 1
    cp_size, *others = (int(os.environ.get(f"PARALLELISM_CONFIG_{name.upper()}", 1)) for name in SIZES)
    for name, size in zip(SIZES[1:], others, strict=True):
        if size > 1:
            raise ValueError(
                f"The launcher's parallelism_config_{name} is {size}; leave it out, as only cp_size splits anything "
                "here: see conf/accelerate/context_parallel.yaml."
            )
    if processes % cp_size:
        raise ValueError(
            f"The launcher's parallelism_config_cp_size is {cp_size}, which does not divide its {processes} processes."
        )
    return cp_size


def own_parallelism(device: str):
    """Accelerate's part in a `parallelism_config`: none, but that FSDP2 shards over all processes.

    It would split sequences by hooks on every layer that is called `self_attn`, those of text encoders among them.
    """
    from accelerate import ParallelismConfig

    if not asked("ACCELERATE_USE_PARALLELISM_CONFIG"):
        return None
    shards = asked("ACCELERATE_USE_FSDP") and device != "cpu"  # where accelerate starts no FSDP2
    sharded = int(os.environ.get("WORLD_SIZE", 1)) if shards else 1
    return ParallelismConfig(dp_replicate_size=1, dp_shard_size=sharded, tp_size=1, cp_size=1, sp_size=1)


def check_launch(device: str, torch_dtype: str) -> None:
    """Compare what the launcher's file says of device and precision with the configuration.

    Raises:
        ValueError: Names both, or what is not installed.
    """
    if asked("ACCELERATE_USE_DEEPSPEED") and find_spec("deepspeed") is None:
        raise ValueError('DeepSpeed is not installed: pip install "diffsynth-hydra[cluster]"')
    said = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    computes = "bf16" if torch_dtype == "bfloat16" else "no"
    if said not in ("no", computes):
        raise ValueError(
            f"The launcher's file says mixed_precision: {said}, and model.torch_dtype is {torch_dtype}; leave "
            "mixed_precision out of the file, as model.torch_dtype decides."
        )
    if device != "cpu" and asked("ACCELERATE_USE_CPU"):
        raise ValueError(f"The launcher's file says use_cpu: true, and device is {device}; set device=cpu.")
    for_gpus = {"LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"} <= os.environ.keys()  # torchrun sets only the first
    if device == "cpu" and for_gpus and torch.cuda.is_available():
        raise ValueError(
            "The launcher starts processes for GPUs, and device is cpu; set device=auto, or use_cpu: true."
        )


def asked(name: str) -> bool:
    return os.environ.get(name, "false").lower() == "true"
