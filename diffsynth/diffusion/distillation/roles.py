"""The roles of a distillation (student, teacher, fake score, discriminator) on as few weights as possible.

If the student is an adapter, the frozen base without it is the teacher, and the fake score is a second adapter of the
same base. If the student is trained in full, no frozen base remains: the teacher is then a frozen copy, and the fake
score an adapter of that copy. In reward training, the student is the policy, the teacher is the base that it must not
leave, and `old` are weights of the policy that lag behind: a further adapter, or a frozen copy.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ...core.gradient import recomputing_in
from ...core.memory.storage import restore
from ...core.ranges import LearningRate, PositiveInt
from ..adapters import files as lora_files
from ..adapters.lora import Adapter, LoRA
from ..adapters.preset import PRESET
from ..base_pipeline import BasePipeline
from ..flow_match import TRAINING_STEPS
from ..trained import MODEL

STUDENT, TEACHER, FAKE_SCORE, DISCRIMINATOR = "student", "teacher", "fake_score", "discriminator"
OLD = "old"  # also the name of its adapter
RANK_BESIDE_FULL = 64  # rank of the fake score's adapter if the student is trained in full; a guess


@dataclass(frozen=True, kw_only=True)
class FakeScore:
    """A diffusion network that is trained on the student's samples.

    Args:
        rank: Rank of its adapter; None takes the student's, or 64 if the student has no adapter.
        full: Train a whole copy of the base, in fp32, instead of an adapter.
        learning_rate: None takes the student's.
    """

    rank: PositiveInt | None = None
    full: bool = False
    learning_rate: LearningRate | None = None


class AdaptedNetwork:
    """One network with several adapters, of which one is active at a time, and an unmerged preset always.

    `parameters` are all its trainable parameters, and `frozen` those of adapters that are not trained.
    """

    def __init__(self, network: nn.Module, adapter: str | None):
        self.network = network
        self.layers = [layer for layer in network.modules() if isinstance(layer, BaseTunerLayer)]
        self.has_preset = any(PRESET in name.split(".") for name, _ in network.named_parameters())
        self.frozen = [p for name, p in network.named_parameters() if {PRESET, OLD} & {*name.split(".")}]
        self.parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
        self.state: tuple[str | None, bool] | None = None  # the active adapter, and whether gradients reach it
        self.activate(adapter, trained=True)

    def activate(self, adapter: str | None, trained: bool) -> None:
        """Activate one adapter, or none; gradients reach the trainable parameters only if `trained`."""
        if (adapter, trained) == self.state:
            return
        active = [name for name in (PRESET if self.has_preset else None, adapter) if name is not None]
        for layer in self.layers:
            layer.enable_adapters(bool(active))
            if active:
                layer.set_adapter(active)
        for parameter in self.parameters:  # `set_adapter` and `enable_adapters` change these flags
            parameter.requires_grad_(trained)
        for parameter in self.frozen:
            parameter.requires_grad_(False)
        self.state = adapter, trained

    @contextmanager
    def activated(self, adapter: str | None, trained: bool) -> Iterator[None]:
        """Inside, `adapter` is active; afterwards the one that was active before."""
        before = self.state
        self.activate(adapter, trained)
        try:
            yield
        finally:
            self.activate(*before)


class Role(NamedTuple):
    """The network that a role predicts with, and the adapter that is then active; None for no adapter."""

    network: AdaptedNetwork
    adapter: str | None


class Lagging(NamedTuple):
    """A parameter of the role `old`, and the student's parameter that it follows."""

    old: nn.Parameter
    followed: nn.Parameter


class Roles:
    """The roles of one training, on loaded weights; outside of `active` the pipeline samples as the student.

    Args:
        lora: The student's adapter, which the pipeline already has; None if the student is trained in full.
        fake_score: Settings of the fake score; None for methods without one.
        heads: Heads of the discriminator; None for methods without one.
        seed: Of the adapters' initial values.
        keeps_old: Whether there is a role `old`, which starts as the student and changes by `follow` alone.

    Attributes:
        lagging: For each parameter of `old`, by name, the student's parameter that it follows.
    """

    def __init__(
        self,
        pipe: BasePipeline,
        lora: Adapter | None = None,
        fake_score: FakeScore | None = None,
        heads: nn.Module | None = None,
        seed: int = 0,
        keeps_old: bool = False,
    ):
        self.pipe, self.heads = pipe, heads
        self.networks = nn.ModuleDict()  # networks that the pipeline does not have
        self.parameters: dict[str, list[nn.Parameter]] = {}  # trainable parameters of each role but the student
        network = pipe.network
        if lora is None:
            self.networks[TEACHER] = _frozen_copy(network, pipe.torch_dtype)
        base = network if lora else self.networks[TEACHER]
        shares_base = fake_score is not None and not fake_score.full
        if shares_base:
            adapter = adapter_of(fake_score, lora, pipe.in_iteration_models[0])
            self.parameters[FAKE_SCORE] = adapter.add(base, _targets(pipe, base, adapter), seed, FAKE_SCORE)
        elif fake_score is not None:
            self.networks[FAKE_SCORE] = _frozen_copy(network, torch.float32).requires_grad_(True)
            self.parameters[FAKE_SCORE] = list(self.networks[FAKE_SCORE].parameters())
        if heads is not None:
            self.networks[DISCRIMINATOR] = heads
            self.parameters[DISCRIMINATOR] = list(heads.parameters())
        old, self.lagging = self._add_old(lora, seed) if keeps_old else (None, {})
        adapted = AdaptedNetwork(base, "default" if lora else FAKE_SCORE if shares_base else None)
        self.roles = {TEACHER: Role(adapted, None)}
        self.roles[STUDENT] = Role(adapted, "default") if lora else Role(AdaptedNetwork(network, None), None)
        if shares_base:
            self.roles[FAKE_SCORE] = Role(adapted, FAKE_SCORE)
        elif fake_score is not None:
            self.roles[FAKE_SCORE] = Role(AdaptedNetwork(self.networks[FAKE_SCORE], None), None)
        if keeps_old:
            self.roles[OLD] = Role(adapted, OLD) if old is None else Role(AdaptedNetwork(old, None), None)

    def _add_old(self, lora: Adapter | None, seed: int) -> tuple[nn.Module | None, dict[str, Lagging]]:
        """Add the role `old`: return its network, None if it is an adapter, and its parameters with the student's."""
        network = self.pipe.network
        if lora is None:
            self.networks[OLD] = _frozen_copy(network, torch.float32)
            students = dict(network.named_parameters())
            pairs = {n: Lagging(own, students[n]) for n, own in self.networks[OLD].named_parameters()}
            return self.networks[OLD], {n: pair for n, pair in pairs.items() if pair.followed.requires_grad}
        adapter = replace(lora, checkpoint=None, preset=None)
        targets = [name for name, layer in network.named_modules() if isinstance(layer, BaseTunerLayer)]
        adapter.add(network, targets, seed, OLD)
        named = dict(network.named_parameters())
        own = {name: name.replace(f".{OLD}.", ".default.") for name in named if OLD in name.split(".")}
        pairs = {name: Lagging(named[name], named[other]) for name, other in own.items()}
        for old, student in pairs.values():
            old.requires_grad_(False)
            old.data.copy_(student.data)
        return None, pairs

    @contextmanager
    def active(self, role: str, trained: bool = False) -> Iterator[nn.Module]:
        """Inside, the pipeline predicts as `role`; gradients reach the role's weights only if `trained`.

        Gradient checkpointing recomputes with the same role, even if the backward pass is called outside.
        """
        adapted, adapter = self.roles[role]
        before = self.pipe.replacements
        self.pipe.replacements = {**before, self.pipe.in_iteration_models[0]: adapted.network}
        try:
            with adapted.activated(adapter, trained), recomputing_in(lambda _: self.active(role, trained)):
                yield adapted.network
        finally:
            self.pipe.replacements = before

    def velocity(
        self,
        role: str,
        latents: Tensor,
        sigma: Tensor,
        inputs: Mapping,
        negative: Mapping | None = None,
        guidance: float = 1,
        trained: bool = False,
    ) -> Tensor:
        """Velocity (B, …), fp32, that `role` predicts for latents (B, …) at noise levels (B,) in [0, 1].

        Args:
            inputs: The network's other inputs, for the conditional prediction.
            negative: Inputs that the unconditional prediction has instead.
            guidance: Scale of classifier-free guidance; 1 switches it off.
            trained: Whether gradients reach the role's weights.
        """
        posi = {**inputs, "latents": latents}
        nega = {**posi, **(negative or {})}
        with self.active(role, trained):
            return self.pipe.guided_velocity(sigma * TRAINING_STEPS, guidance, {}, posi, nega).float()

    def partition(self, named: Mapping[str, nn.Parameter]) -> dict[str, dict[str, nn.Parameter]]:
        """Sort named parameters by role: first the student's, as `MODEL`, then those of each other role."""
        role_of = {id(parameter): role for role, own in self.parameters.items() for parameter in own}
        parts: dict[str, dict[str, nn.Parameter]] = {MODEL: {}, **{role: {} for role in self.parameters}}
        for name, parameter in named.items():
            parts[role_of.get(id(parameter), MODEL)][name] = parameter
        return parts


def check_base_is_kept(
    setting: str, pipe: BasePipeline, lora: Adapter | None, trainable_models: Sequence[str] | None, remedy: str
) -> None:
    """Refuse a training after which the base is not what remains without the adapter.

    Args:
        setting: What needs the base, for the error.
        remedy: What else to do than to train an adapter alone.

    Raises:
        ValueError: There is no adapter, or it is not the only one that changes what the network predicts.
    """
    network = pipe.in_iteration_models[0]
    if lora is None:
        raise ValueError(
            f"{setting} needs the base as it was, which full training (lora=none) overwrites; set lora=lora, {remedy}."
        )
    changed = sorted({*lora.models, *(trainable_models or ())} - {network})
    if changed or trainable_models:
        raise ValueError(
            f"{setting} needs the base as it was, but {', '.join(changed) or network} is trained as well; set "
            f"lora.models=[{network}] and task.trainable_models=null, {remedy}."
        )


def adapter_of(fake_score: FakeScore, lora: Adapter | None, name: str) -> Adapter:
    """Return the fake score's adapter of the network `name`: like the student's, except for its rank."""
    if lora is None:
        return LoRA(rank=fake_score.rank or RANK_BESIDE_FULL, models=(name,))
    alpha = lora.alpha if fake_score.rank is None else None
    return replace(lora, rank=fake_score.rank or lora.rank, alpha=alpha, checkpoint=None, preset=None)


def _targets(pipe: BasePipeline, network: nn.Module, adapter: Adapter) -> list[str]:
    """Layers of a network that get the fake score's adapter: those with an adapter already, else LoRA's defaults."""
    adapted = [name for name, layer in network.named_modules() if isinstance(layer, BaseTunerLayer)]
    return adapted or adapter.targets(pipe, pipe.in_iteration_models[0])


def _frozen_copy(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A frozen copy of a network without its adapters, with plain weights where the network's are stored."""
    return restore(lora_files.remove(copy.deepcopy(network))).to(dtype).requires_grad_(False).eval()
