"""Who plays what in a distillation: student, teacher and further roles, on as few weights as can be.

Where the student is an adapter, so are the others: of one frozen base, which alone is the teacher. A student that is
trained in full leaves no base behind; its teacher is a frozen copy, of which the others are adapters.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ...core.gradient import recomputing_in
from ...core.memory.storage import restore
from ..adapters import files as lora_files
from ..adapters.lora import Adapter, LoRA
from ..base_pipeline import BasePipeline
from ..flow_match import TRAINING_STEPS
from ..trained import MODEL

STUDENT, TEACHER, FAKE_SCORE, DISCRIMINATOR = "student", "teacher", "fake_score", "discriminator"
RANK_BESIDE_FULL = 64  # of a fake score whose student is trained in full; a guess


@dataclass(frozen=True, kw_only=True)
class FakeScore:
    """A network that learns what the student draws.

    Args:
        rank: Of its adapter; None takes the student's, or 64 where that has none.
        full: Train a whole copy of the base instead, as large as the base once more, in fp32.
        learning_rate: None takes the student's.
    """

    rank: int | None = None
    full: bool = False
    learning_rate: float | None = None


class AdaptedNetwork:
    """One network with several adapters, one active at a time; `parameters` are all its trainable parameters."""

    def __init__(self, network: nn.Module, adapter: str | None):
        self.network = network
        self.layers = [layer for layer in network.modules() if isinstance(layer, BaseTunerLayer)]
        self.parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
        self.state: tuple[str | None, bool] | None = None  # which adapter is active, and whether gradients reach it
        self.activate(adapter, trained=True)

    def activate(self, adapter: str | None, trained: bool) -> None:
        """Make `adapter` the active one, or none; gradients reach the trainable parameters if `trained`."""
        if (adapter, trained) == self.state:
            return
        for layer in self.layers:
            layer.enable_adapters(adapter is not None)
            if adapter is not None:
                layer.set_adapter(adapter)
        for parameter in self.parameters:  # peft's switches change these flags
            parameter.requires_grad_(trained)
        self.state = adapter, trained

    @contextmanager
    def activated(self, adapter: str | None, trained: bool) -> Iterator[None]:
        before = self.state
        self.activate(adapter, trained)
        try:
            yield
        finally:
            self.activate(*before)


class Role(NamedTuple):
    """The network that a role predicts with, and the adapter that is active meanwhile; None is the network alone."""

    network: AdaptedNetwork
    adapter: str | None


class Roles:
    """The roles of one training, on loaded weights; outside of `active` the pipeline samples as the student.

    Args:
        lora: The student's adapter, which the pipeline has; None for a student that is trained in full.
        fake_score: None for methods without.
        heads: Of a discriminator, None for methods without.
        seed: Of the adapters' initial values.
    """

    def __init__(
        self,
        pipe: "BasePipeline",
        lora: Adapter | None = None,
        fake_score: FakeScore | None = None,
        heads: nn.Module | None = None,
        seed: int = 0,
    ):
        self.pipe, self.heads = pipe, heads
        self.networks = nn.ModuleDict()  # those that are not the pipeline's
        self.parameters: dict[str, list[nn.Parameter]] = {}  # of each role that is trained beside the student
        network = pipe.network
        if lora is None:
            self.networks[TEACHER] = _frozen_copy(network, pipe.torch_dtype)
        base = network if lora else self.networks[TEACHER]
        shares_base = fake_score is not None and not fake_score.full
        if shares_base:
            adapter = _adapter_of(fake_score, lora, pipe.in_iteration_models[0])
            self.parameters[FAKE_SCORE] = adapter.add(base, _targets(pipe, base, adapter), seed, FAKE_SCORE)
        elif fake_score is not None:
            self.networks[FAKE_SCORE] = _frozen_copy(network, torch.float32).requires_grad_(True)
            self.parameters[FAKE_SCORE] = list(self.networks[FAKE_SCORE].parameters())
        if heads is not None:
            self.networks[DISCRIMINATOR] = heads
            self.parameters[DISCRIMINATOR] = list(heads.parameters())
        adapted = AdaptedNetwork(base, "default" if lora else FAKE_SCORE if shares_base else None)
        self.roles = {TEACHER: Role(adapted, None)}
        self.roles[STUDENT] = Role(adapted, "default") if lora else Role(AdaptedNetwork(network, None), None)
        if shares_base:
            self.roles[FAKE_SCORE] = Role(adapted, FAKE_SCORE)
        elif fake_score is not None:
            self.roles[FAKE_SCORE] = Role(AdaptedNetwork(self.networks[FAKE_SCORE], None), None)

    @contextmanager
    def active(self, role: str, trained: bool = False) -> Iterator[nn.Module]:
        """The pipeline predicts as `role` inside; gradients reach its weights if `trained`, else only its inputs.

        What is checkpointed inside is recomputed as the same role, wherever the backward pass is called.
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
        """What `role` predicts (B, …), fp32, of latents (B, …) at noise levels (B,) in [0, 1].

        Args:
            inputs: The network's others, as an objective gets them.
            negative: Those of them that guidance leads away from.
            guidance: Scale of classifier-free guidance; 1 is none.
            trained: Whether gradients reach the role's weights.
        """
        posi = {**inputs, "latents": latents}
        nega = {**posi, **(negative or {})}
        with self.active(role, trained):
            return self.pipe.guided_velocity(sigma * TRAINING_STEPS, guidance, {}, posi, nega).float()

    def partition(self, named: Mapping[str, nn.Parameter]) -> dict[str, dict[str, nn.Parameter]]:
        """The parameters `named`, by role: the student's first, as `MODEL`, then those of each role beside it."""
        role_of = {id(parameter): role for role, own in self.parameters.items() for parameter in own}
        parts: dict[str, dict[str, nn.Parameter]] = {MODEL: {}, **{role: {} for role in self.parameters}}
        for name, parameter in named.items():
            parts[role_of.get(id(parameter), MODEL)][name] = parameter
        return parts


def _adapter_of(fake_score: FakeScore, lora: Adapter | None, name: str) -> Adapter:
    if lora is None:
        return LoRA(rank=fake_score.rank or RANK_BESIDE_FULL, models=(name,))
    alpha = lora.alpha if fake_score.rank is None else None
    return replace(lora, rank=fake_score.rank or lora.rank, alpha=alpha, checkpoint=None, preset=None)


def _targets(pipe, network: nn.Module, adapter: Adapter) -> list[str]:
    """Layers of a network that get a further adapter: those that have one, or else those of the pipeline's LoRA."""
    adapted = [name for name, layer in network.named_modules() if isinstance(layer, BaseTunerLayer)]
    return adapted or adapter.targets(pipe, pipe.in_iteration_models[0])


def _frozen_copy(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The base itself, as far as the network has adapters, in plain weights even where its own are stored."""
    return restore(lora_files.remove(copy.deepcopy(network))).to(dtype).requires_grad_(False).eval()
