"""Old names of targets and keys, mapped to today's, so that the saved configuration of an old run still works."""

from typing import Any

from omegaconf import DictConfig, OmegaConf

# Modules and targets under the names that they once had.
MOVED = {
    "diffsynth.core.data.sources.prompts.prompt_dataset": "diffsynth.core.data.prompt_dataset",
    "diffsynth.diffusion.checkpoint": "diffsynth.training.checkpoint",
    "diffsynth.diffusion.discriminator": "diffsynth.diffusion.distillation.discriminator",
    "diffsynth.diffusion.distillation.teacher": "diffsynth.diffusion.distillation.settings",
    "diffsynth.diffusion.ema": "diffsynth.training.ema",
    "diffsynth.diffusion.few_steps": "diffsynth.training.validation.few_steps",
    "diffsynth.diffusion.logger.LocalLogger": "diffsynth.training.record.numbers.LocalLogger",
    "diffsynth.diffusion.lora": "diffsynth.diffusion.adapters.lora",
    "diffsynth.diffusion.metrics.ClipScore": "diffsynth.diffusion.rewards.ClipScore",
    "diffsynth.diffusion.metrics": "diffsynth.training.validation.metrics",
    "diffsynth.diffusion.models": "diffsynth.diffusion.pipeline.networks",
    "diffsynth.diffusion.models.TrainingDefaults": "diffsynth.diffusion.training_defaults.TrainingDefaults",
    "diffsynth.diffusion.pipeline.networks.TrainingDefaults": "diffsynth.diffusion.training_defaults.TrainingDefaults",
    "diffsynth.diffusion.receipt.DataReceipt": "diffsynth.training.record.data_report.DataReport",
    "diffsynth.diffusion.roles": "diffsynth.diffusion.distillation.roles",
    "diffsynth.diffusion.teacher": "diffsynth.diffusion.distillation.settings",
    "diffsynth.diffusion.trackers": "diffsynth.training.record.trackers",
    "diffsynth.diffusion.validation": "diffsynth.training.validation.validation",
    "diffsynth.training.validation.metrics.ClipScore": "diffsynth.diffusion.rewards.ClipScore",
}
RENAMED = {"receipt": "data_report"}  # keys at the top level


def up_to_date(cfg: DictConfig) -> DictConfig:
    """Return a configuration with today's names; the same object if nothing in it has an old name."""
    saved = OmegaConf.to_container(cfg, resolve=False)
    renamed = with_current_names(saved)
    return cfg if renamed == saved else OmegaConf.create(renamed)


def with_current_names(config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration, given as a plain dictionary, with today's names."""
    current = {RENAMED.get(key, key): _with_current_targets(value) for key, value in config.items()}
    validation = current.get("validation") or {}
    if "template_samples" in validation:  # the number of rows if a template is trained, beside `row_samples`
        of_template = validation.pop("template_samples")
        validation["row_samples"] = of_template if current.get("template") else validation.get("row_samples")
    return current


def _with_current_targets(node: Any) -> Any:
    if isinstance(node, list):
        return [_with_current_targets(element) for element in node]
    if not isinstance(node, dict):
        return node
    return {
        key: _current_target(value) if key == "_target_" else _with_current_targets(value)
        for key, value in node.items()
    }


def _current_target(target: str) -> str:
    module, _, name = target.rpartition(".")
    return MOVED.get(target) or (f"{MOVED[module]}.{name}" if module in MOVED else target)
