"""What a run's results depend on, as eight hex digits that name its folder."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from .moved import with_todays_names

# Keys that change where, how fast or how loudly a run goes, and what is seen of it, but not what comes out of it.
NOT_SEMANTIC = (
    "hydra",
    "name",
    "output_root",
    "run_dir",
    "data_report",
    "device",
    "logger",
    "export",
    "checkpoint",
    "validation",
    "held_out",
    "max_bad_steps",
    "profile",
    "micro_batch_size",
    "teacher_path",
    "dataset.num_workers",
    "model.training.micro_batch_size",
    "model.training.validate_every",
)
# A run's length is left out, too, where no step depends on it, so that a finished run can be extended: these schedules
# have the same rate at a step of a longer run (the last one until it decays, which `training.checkpoint` looks at).
LENGTH = ("max_steps", "num_epochs", "model.training.max_steps")
OPEN_ENDED_SCHEDULES = (
    "transformers.get_constant_schedule",
    "transformers.get_constant_schedule_with_warmup",
    "transformers.get_wsd_schedule",
)
TASKS_OF_KNOWN_LENGTH = ("diffsynth.diffusion.loss.HyperSD",)  # what they train changes with the part of the run


def signature(_root_: DictConfig) -> str:
    """Eight hex digits that change with whatever changes a run's results, and with nothing else."""
    config = _todays(_root_)
    return _digest(config, () if bound_to_length(config) else LENGTH)


OmegaConf.register_new_resolver("signature", signature, replace=True)


def but_for_length(cfg: DictConfig) -> str:
    """The signature that runs share which differ in their length only."""
    return _digest(_todays(cfg), LENGTH)


def bound_to_length(config: Mapping[str, Any]) -> str | None:
    """What sets every step by the length of the run; None where a longer run takes the same steps, and more."""
    nodes = {name: config.get(name) for name in ("lr_scheduler", "task")}
    targets = {name: node.get("_target_") for name, node in nodes.items() if isinstance(node, Mapping)}
    if targets.get("lr_scheduler") not in (None, *OPEN_ENDED_SCHEDULES):
        return targets["lr_scheduler"]
    return targets["task"] if targets.get("task") in TASKS_OF_KNOWN_LENGTH else None


def _todays(cfg: DictConfig) -> dict[str, Any]:
    return with_todays_names(OmegaConf.to_container(cfg, resolve=False))


def _digest(config: dict[str, Any], left_out: Sequence[str]) -> str:
    for key in (*NOT_SEMANTIC, *left_out):
        _remove(config, key)
    return hashlib.sha1(json.dumps(config, sort_keys=True).encode()).hexdigest()[:8]


def _remove(config: dict, key: str) -> None:
    *parents, last = key.split(".")
    for name in parents:
        config = config.get(name) if isinstance(config, dict) else None
    if isinstance(config, dict):
        config.pop(last, None)
