"""What the launcher's file asks for: `accelerate launch` hands it over in the environment."""

import os
from importlib.util import find_spec

import torch

ALTERNATIVE = "launch with --config_file conf/accelerate/ddp.yaml."


def choose_engine(accelerator):
    """The engine of the launcher's file.

    Raises:
        ValueError: It asks for something that is not to be had here.
    """
    from .engine import Engine

    if _asked("ACCELERATE_USE_PARALLELISM_CONFIG"):
        raise ValueError(
            f"The launcher's parallelism_config splits sequences or tensors, as nothing here does; {ALTERNATIVE}"
        )
    if _asked("ACCELERATE_USE_DEEPSPEED"):
        from .zero import ZeRO

        return ZeRO(accelerator)
    if _asked("ACCELERATE_USE_FSDP"):
        from .fsdp2 import FSDP2

        return FSDP2(accelerator)
    return Engine(accelerator)


def check_launch(device: str, torch_dtype: str) -> None:
    """Compare what the launcher's file says of device and precision with the configuration.

    Raises:
        ValueError: Names both, or what is not installed.
    """
    if _asked("ACCELERATE_USE_DEEPSPEED") and find_spec("deepspeed") is None:
        raise ValueError('DeepSpeed is not installed: pip install "diffsynth-hydra[cluster]"')
    said = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    computes = "bf16" if torch_dtype == "bfloat16" else "no"
    if said not in ("no", computes):
        raise ValueError(
            f"The launcher's file says mixed_precision: {said}, and model.torch_dtype is {torch_dtype}; leave "
            "mixed_precision out of the file, as model.torch_dtype decides."
        )
    if device != "cpu" and _asked("ACCELERATE_USE_CPU"):
        raise ValueError(f"The launcher's file says use_cpu: true, and device is {device}; set device=cpu.")
    for_gpus = {"LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"} <= os.environ.keys()  # torchrun sets only the first
    if device == "cpu" and for_gpus and torch.cuda.is_available():
        raise ValueError(
            "The launcher starts processes for GPUs, and device is cpu; set device=auto, or use_cpu: true."
        )


def _asked(name: str) -> bool:
    return os.environ.get(name, "false").lower() == "true"
