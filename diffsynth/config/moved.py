"""Names that saved configurations have and today's code does not: a run of an older layout replays by its own file."""

from typing import Any

from omegaconf import DictConfig, OmegaConf

# Modules or targets, as they were called until 2026-11-30.
MOVED = {
    "diffsynth.diffusion.checkpoint": "diffsynth.training.checkpoint",
    "diffsynth.diffusion.discriminator": "diffsynth.diffusion.distillation.discriminator",
    "diffsynth.diffusion.ema": "diffsynth.training.ema",
    "diffsynth.diffusion.few_steps": "diffsynth.training.validation.few_steps",
    "diffsynth.diffusion.logger.LocalLogger": "diffsynth.training.record.numbers.LocalLogger",
    "diffsynth.diffusion.lora": "diffsynth.diffusion.adapters.lora",
    "diffsynth.diffusion.metrics": "diffsynth.training.validation.metrics",
    "diffsynth.diffusion.models": "diffsynth.diffusion.pipeline.networks",
    "diffsynth.diffusion.receipt.DataReceipt": "diffsynth.training.record.data_report.DataReport",
    "diffsynth.diffusion.roles": "diffsynth.diffusion.distillation.roles",
    "diffsynth.diffusion.teacher": "diffsynth.diffusion.distillation.teacher",
    "diffsynth.diffusion.trackers": "diffsynth.training.record.trackers",
    "diffsynth.diffusion.validation": "diffsynth.training.validation.validation",
}
RENAMED = {"receipt": "data_report"}  # keys of the top level


def up_to_date(cfg: DictConfig) -> DictConfig:
    """A configuration under today's names; the same object where it has no others."""
    said = OmegaConf.to_container(cfg, resolve=False)
    renamed = with_todays_names(said)
    return cfg if renamed == said else OmegaConf.create(renamed)


def with_todays_names(config: dict[str, Any]) -> dict[str, Any]:
    """The same of a plain dictionary."""
    return {RENAMED.get(key, key): _with_todays_targets(value) for key, value in config.items()}


def _with_todays_targets(node: Any) -> Any:
    if isinstance(node, list):
        return [_with_todays_targets(element) for element in node]
    if not isinstance(node, dict):
        return node
    return {key: _todays(value) if key == "_target_" else _with_todays_targets(value) for key, value in node.items()}


def _todays(target: str) -> str:
    module, _, name = target.rpartition(".")
    return MOVED.get(target) or (f"{MOVED[module]}.{name}" if module in MOVED else target)
