"""Adapters by peft: LoRA, LoHa and LoKr, which layers get one, and how they are added to a network.

Hu et al. 2021, "LoRA" (https://arxiv.org/abs/2106.09685): W x becomes W x + (α / r) B A x.
"""

import difflib
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftConfig, inject_adapter_in_model
from torch import nn

from ...core.ranges import FractionBelowOne, PositiveFloat, PositiveInt, check_fields
from .files import fill, infer_config, load, read
from .formats import kind, scale
from .preset import PRESET, activate, has_preset
from .update import scaled_layers

if TYPE_CHECKING:
    from ..base_pipeline import BasePipeline

logger = logging.getLogger(__name__)

ADAPTABLE = (nn.Linear, nn.Conv2d)


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """The settings and methods that all kinds of adapters share.

    Args:
        rank: Rank r of the update.
        alpha: The update is scaled by alpha / rank; None takes alpha = rank.
        models: Models of the pipeline that get an adapter.
        target_modules: Ends of layer names, one regular expression over full names, or `all-linear`; a mapping if it
            differs by model; None takes each model's defaults.
        checkpoint: Adapter file that the new adapter starts from; it computes what the file does, whatever its alpha.
        preset: Adapter file added to the frozen weights first, so that the new adapter learns the difference.
        preset_in_sampling: Whether images that are sampled during the training have the preset. If so, it is merged
            into the weights; otherwise it stays an adapter of its own. Exports never contain it.
    """

    rank: PositiveInt = 32
    alpha: PositiveFloat | None = None
    models: Sequence[str] = ("dit",)
    target_modules: Mapping[str, Sequence[str] | str] | Sequence[str] | str | None = None
    checkpoint: str | None = None
    preset: str | None = None
    preset_in_sampling: bool = True

    def __post_init__(self):
        check_fields(self, "lora.")

    def targets(self, pipe: "BasePipeline", name: str) -> list[str]:
        """Full names of the layers of model `name` that get an adapter."""
        targets = self.target_modules or pipe.training_defaults.lora_target_modules
        if isinstance(targets, Mapping):
            targets = targets.get(name, ())
        return find_layers(pipe.named_model(name, key="lora.models"), targets, name)

    def check(self, pipe: "BasePipeline") -> None:
        """Refuse targets and adapter files that do not fit the models; works on the meta device.

        Raises:
            ValueError: A target matches no layer, the rank is beyond every layer, or a file is of another model.
        """
        for name in self.models:
            self.check_rank(pipe.named_model(name, key="lora.models"), self.targets(pipe, name))
            for path in filter(None, (self.preset, self.checkpoint)):
                tensors = read(path, pipe.layer_names(name), pipe.named_model(name))
                if path == self.checkpoint:
                    self.check_start(infer_config(tensors, path), path)
                elif not self.preset_in_sampling:
                    self.check_beside(infer_config(tensors, path), path)

    def check_rank(self, module: nn.Module, targets: Sequence[str], key: str = "lora.rank") -> None:
        """Refuse a rank above the full rank of every layer, where it gains nothing; warn if it is above some layers'.

        Raises:
            ValueError: The rank is above every layer's full rank; names the layer of the largest.
        """
        bounds = {name: full_rank(module.get_submodule(name)) for name in targets}
        beyond = [name for name, bound in bounds.items() if self.rank > bound]
        if not beyond:
            return
        widest = max(bounds, key=bounds.get)
        if len(beyond) == len(bounds):
            raise ValueError(
                f"{key} is {self.rank}; a rank above {bounds[widest]}, the full rank of {widest}, gains nothing in any "
                f"layer: set {key}={bounds[widest]} or less."
            )
        message = "%s=%d gains nothing in %d of %d layers, whose full rank is lower: that of %s is %d."
        logger.warning(message, key, self.rank, len(beyond), len(bounds), beyond[0], bounds[beyond[0]])

    def check_start(self, found: PeftConfig, path: str | Path) -> None:
        """Refuse to start from a file with an adapter of another kind or rank; its scale may differ."""
        ours = self.peft_config([])
        if kind(found) != kind(ours):
            raise ValueError(
                f"{path} has an adapter of the kind {kind(found)}, this run one of the kind {kind(ours)}; set "
                f"lora={kind(found).lower()}."
            )
        # Whole Kronecker matrices do not tell their rank; `fill` compares their shapes.
        if found.r != ours.r and not isinstance(ours, LoKrConfig):
            raise ValueError(f"{path} has lora.rank={found.r}, this run {ours.r}; set lora.rank={found.r}.")

    def check_beside(self, found: PeftConfig, path: str | Path) -> None:
        """Refuse a preset that stays unmerged, but cannot stand beside the new adapter in one layer."""
        ours = self.peft_config([])
        if found.peft_type != ours.peft_type:
            raise ValueError(
                f"{path} has an adapter of the kind {kind(found)}, beside which a layer has no room for this run's "
                f"{kind(ours)}; set lora={kind(found).lower()}, or lora.preset_in_sampling=true, which merges it."
            )

    def inject(self, pipe: "BasePipeline", seed: int) -> None:
        """Add trainable fp32 adapters to the pipeline's models; their initial values depend on `seed` alone."""
        for name in self.models:
            module, names, targets = pipe.named_model(name), pipe.layer_names(name), self.targets(pipe, name)
            if self.preset:
                load(module, self.preset, names, fuse=self.preset_in_sampling, adapter=PRESET)
            self.add(module, targets, seed)
            if has_preset(module):
                activate(module, [PRESET, "default"])
            if self.checkpoint:
                # Divided by this run's scale, so that the first step computes what the file does.
                start = scaled_layers(read(self.checkpoint, names, module), 1 / scale(module.peft_config["default"]))
                fill(module, start, "default", self.checkpoint)

    def add(self, module: nn.Module, targets: Sequence[str], seed: int, name: str = "default") -> list[nn.Parameter]:
        """Add a trainable fp32 adapter to a network, make it the active one, and return its parameters.

        Adapters that the network already has are kept.

        Args:
            targets: Full names of the layers that get the adapter.
            seed: Of the initial values.
            name: Name of the adapter.
        """
        before = list(module.parameters())
        trainable_before = [parameter for parameter in before if parameter.requires_grad]
        with torch.random.fork_rng(devices=[]):  # peft draws on the CPU
            torch.manual_seed(seed)
            inject_adapter_in_model(self.peft_config(targets), module, adapter_name=name)
        known = set(map(id, before))
        added = [parameter for parameter in module.parameters() if id(parameter) not in known]
        for parameter in added:
            parameter.data = parameter.data.float()  # bf16 loses small updates
        for parameter in (*added, *trainable_before):  # peft freezes the latter
            parameter.requires_grad_(True)
        return added

    def peft_config(self, targets: Sequence[str]) -> PeftConfig:
        """The adapter's configuration for peft, for layers of these names."""
        raise NotImplementedError(f"{type(self).__name__} has no peft configuration.")


@dataclass(frozen=True, kw_only=True)
class LoRA(Adapter):
    """Low-rank adaptation.

    Args:
        dropout: Probability of dropping an input of the adapter in training.
        use_rslora: Scale by alpha / √rank; Kalajdzievski 2023 (https://arxiv.org/abs/2312.03732).
        use_dora: Also train the length of each output's weight vector; Liu et al. 2024 (https://arxiv.org/abs/2402.09353).
    """

    dropout: FractionBelowOne = 0.0
    use_rslora: bool = False
    use_dora: bool = False

    def peft_config(self, targets: Sequence[str]) -> LoraConfig:
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha or self.rank,
            lora_dropout=self.dropout,
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
            target_modules=list(targets),
        )


@dataclass(frozen=True, kw_only=True)
class LoHa(Adapter):
    """Hadamard product of two low-rank updates; Hyeon-Woo et al. 2021 (https://arxiv.org/abs/2108.06098).

    Args:
        dropout: Probability of dropping a rank in training.
    """

    dropout: FractionBelowOne = 0.0

    def peft_config(self, targets: Sequence[str]) -> LoHaConfig:
        return LoHaConfig(
            r=self.rank, alpha=self.alpha or self.rank, rank_dropout=self.dropout, target_modules=list(targets)
        )


@dataclass(frozen=True, kw_only=True)
class LoKr(Adapter):
    """Kronecker product of a small matrix and a low-rank one; Edalati et al. 2022 (https://arxiv.org/abs/2212.10650).

    Args:
        dropout: Probability of dropping a rank in training.
        decompose_factor: Side of the small matrix; -1 makes both matrices about equally large.
    """

    dropout: FractionBelowOne = 0.0
    decompose_factor: Literal[-1] | PositiveInt = -1

    def check_rank(self, module: nn.Module, targets: Sequence[str], key: str = "lora.rank") -> None:
        """Accept every rank: from the half of a factor's side on, peft trains the whole factor."""

    def peft_config(self, targets: Sequence[str]) -> LoKrConfig:
        return LoKrConfig(
            r=self.rank,
            alpha=self.alpha or self.rank,
            rank_dropout=self.dropout,
            decompose_factor=self.decompose_factor,
            target_modules=list(targets),
        )


def full_rank(layer: nn.Linear | nn.Conv2d) -> int:
    """The rank of a layer's weight, as a matrix, at most."""
    return min(layer.weight.shape[0], math.prod(layer.weight.shape[1:]))


def find_layers(module: nn.Module, targets: Sequence[str] | str, model: str) -> list[str]:
    """Full names of the linear and convolution layers that `targets` match.

    Args:
        targets: Ends of names (a list, or one string with commas), a regular expression over full names, `all-linear`.
        model: Name of the model, for the error.

    Raises:
        ValueError: A target matches no layer, or is no regular expression.
    """
    layers = [name for name, layer in module.named_modules() if isinstance(layer, ADAPTABLE)]
    if targets == "all-linear":
        return [name for name in layers if isinstance(module.get_submodule(name), nn.Linear)]
    if isinstance(targets, str):
        targets = targets.split(",") if "," in targets else [targets]
    for target in targets:
        _check_expression(target, layers)
    found = {target: [name for name in layers if _matches(target, name)] for target in targets}
    missing = [target for target, names in found.items() if not names]
    if missing or not found:
        raise ValueError(_no_match(missing, layers, model))
    return sorted(set().union(*found.values()), key=layers.index)


def _check_expression(target: str, layers: Sequence[str]) -> None:
    try:
        re.compile(target)
    except re.error as error:
        end = target.strip("*.")
        is_end = any(f".{name}".endswith(f".{end}") for name in layers)
        remedy = (
            f"type {end!r} for all layers whose names end so" if is_end else f"the layers end in {_endings(layers)}"
        )
        raise ValueError(
            f"lora.target_modules: {target!r} is neither the end of a layer's name nor a regular expression ({error}); "
            f"{remedy}."
        ) from error


def _matches(target: str, name: str) -> bool:
    return name == target or name.endswith("." + target) or re.fullmatch(target, name) is not None


def _endings(layers: Sequence[str]) -> list[str]:
    return sorted({re.sub(r"^.*\.\d+\.", "", name) for name in layers})


def _no_match(missing: Sequence[str], layers: Sequence[str], model: str) -> str:
    endings = _endings(layers)
    tails = [name.split(".", start)[-1] for name in endings for start in range(name.count(".") + 1)]
    nearest = difflib.get_close_matches(missing[0], tails, 1) if missing else []
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    return f"lora.target_modules: {list(missing)} match no layer of {model}.{hint} Its layers end in {endings}."
