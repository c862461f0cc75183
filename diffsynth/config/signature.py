"""The signature of a run: eight hex digits of the settings that its results depend on; they name its folder."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ..core.masking import masked_values
from .moved import with_current_names

# Keys that do not change the trained weights: where and how fast a run trains, and what it logs, evaluates and saves.
# `device` and `micro_batch_size` change rounding; they are here so that a run may continue on other devices. Absent are
# memory.checkpointing and its like, which may change rounding on a GPU, and dataset.scan_rows: it decides which rows
# on_error=skip leaves out, and a checkpoint's fingerprint of the data depends on it.
NOT_SEMANTIC = (
    "hydra",
    "name",
    "output_root",
    "run_dir",
    "data_report",
    "device",
    "deterministic",
    "logger",
    "export",
    "checkpoint",
    "validation",
    "held_out",
    "max_bad_steps",
    "profile",
    "micro_batch_size",
    "teacher_path",
    "evaluation_reward",
    "prompts_path",
    "rounds.path",
    "rounds.keep_last",
    "rounds.evaluate_every",
    "rounds.held_out_prompts",
    "rounds.held_out_samples",
    "dataset.num_workers",
    "memory.check",
    "memory.remember",
    "model.training.micro_batch_size",
    "model.training.validate_every",
)
# The length of a run is left out as well if no step depends on it, so that a finished run can be extended. With these
# schedules, the learning rate of a step is the same in a longer run; the last one decays at the end, and
# `training.checkpoint` therefore resumes from a checkpoint before the decay.
LENGTH = ("max_steps", "num_epochs", "model.training.max_steps")
OPEN_ENDED_SCHEDULES = (
    "transformers.get_constant_schedule",
    "transformers.get_constant_schedule_with_warmup",
    "transformers.get_wsd_schedule",
)
TASKS_OF_KNOWN_LENGTH = ("diffsynth.diffusion.loss.HyperSD",)  # their loss depends on the fraction of the run


def signature(_root_: DictConfig) -> str:
    """Return eight hex digits that change with every setting that may change the weights, except `NOT_SEMANTIC`."""
    config = _plain(_root_)
    return _digest(config, () if bound_to_length(config) else LENGTH)


OmegaConf.register_new_resolver("signature", signature, replace=True)


def but_for_length(cfg: DictConfig) -> str:
    """Return a signature that leaves out the run's length: runs that differ only in their length share it."""
    return _digest(_plain(cfg), LENGTH)


def bound_to_length(config: Mapping[str, Any]) -> str | None:
    """Return the `_target_` (schedule or task) whose values depend on the run's length; None if there is none."""
    nodes = {name: config.get(name) for name in ("lr_scheduler", "task")}
    targets = {name: node.get("_target_") for name, node in nodes.items() if isinstance(node, Mapping)}
    if targets.get("lr_scheduler") not in (None, *OPEN_ENDED_SCHEDULES):
        return targets["lr_scheduler"]
    return targets["task"] if targets.get("task") in TASKS_OF_KNOWN_LENGTH else None


def _plain(cfg: DictConfig) -> dict[str, Any]:
    """Return the settings with credentials masked: a new token, or a newly signed URL, makes no other run."""
    return masked_values(with_current_names(OmegaConf.to_container(cfg, resolve=False)))


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
