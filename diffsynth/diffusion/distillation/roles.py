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
from ..flow_match import TRAINING_STEPS

STUDENT, TEACHER, FAKE_SCORE, DISCRIMINATOR = "student", "teacher", "fake_score", "discriminator"
RANK_BESIDE_FULL = 64  # of a fake score whose student has no rank


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


class Stage:
    """A network with the adapters it has, one of which plays at a time; `parameters` are those trained at all."""

    def __init__(self, network: nn.Module, at_rest: str | None):
        self.network = network
        self.layers = [layer for layer in network.modules() if isinstance(layer, BaseTunerLayer)]
        self.parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
        self.now = None
        self.switch(at_rest, trained=True)

    def switch(self, adapter: str | None, trained: bool) -> None:
        """Play `adapter`, or none; gradients reach what is trained of the network, or nothing of it."""
        if (adapter, trained) == self.now:
            return
        for layer in self.layers:
            layer.enable_adapters(adapter is not None)
            if adapter is not None:
                layer.set_adapter(adapter)
        for parameter in self.parameters:  # peft's switches change these flags
            parameter.requires_grad_(trained)
        self.now = adapter, trained

    @contextmanager
    def switched(self, adapter: str | None, trained: bool) -> Iterator[None]:
        before = self.now
        self.switch(adapter, trained)
        try:
            yield
        finally:
            self.switch(*before)


class Place(NamedTuple):
    """Where a role is: the adapter of that name on a stage, or the stage's network alone."""

    stage: Stage
    adapter: str | None


class Roles:
    """The roles of one training, on loaded weights; outside of `playing` the pipeline draws as the student.

    Args:
        lora: The student's adapter, which the pipeline has; None for a student that is trained in full.
        fake_score: None for methods without.
        heads: Of a discriminator, None for methods without.
        seed: Of the adapters' initial values.
    """

    def __init__(
        self,
        pipe,
        lora: Adapter | None = None,
        fake_score: FakeScore | None = None,
        heads: nn.Module | None = None,
        seed: int = 0,
    ):
        self.pipe = pipe
        self.networks = nn.ModuleDict()  # those that are not the pipeline's
        name, network = pipe.in_iteration_models[0], pipe.network
        if lora is None:
            self.networks[TEACHER] = _frozen_copy(network, pipe.torch_dtype)
        base = network if lora else self.networks[TEACHER]
        shares_base = fake_score is not None and not fake_score.full
        if shares_base:
            adapter = _adapter_of(fake_score, lora, name)
            adapter.add(base, _targets(pipe, base, adapter), seed, FAKE_SCORE)
        at_rest = "default" if lora else FAKE_SCORE if shares_base else None
        stage = Stage(base, at_rest)
        self.places = {TEACHER: Place(stage, None)}
        self.places[STUDENT] = Place(stage, "default") if lora else Place(Stage(network, None), None)
        if shares_base:
            self.places[FAKE_SCORE] = Place(stage, FAKE_SCORE)
        elif fake_score is not None:
            self.networks[FAKE_SCORE] = _frozen_copy(network, torch.float32).requires_grad_(True)
            self.places[FAKE_SCORE] = Place(Stage(self.networks[FAKE_SCORE], None), None)
        if heads is not None:
            self.networks[DISCRIMINATOR] = heads
        self.heads = heads

    @contextmanager
    def playing(self, role: str, trained: bool = False) -> Iterator[nn.Module]:
        """The pipeline predicts as `role` inside; gradients reach its weights if `trained`, else only its inputs.

        What is checkpointed inside is recomputed as the same role, wherever the backward pass is called.
        """
        stage, adapter = self.places[role]
        before = self.pipe.stand_ins
        self.pipe.stand_ins = {**before, self.pipe.in_iteration_models[0]: stage.network}
        try:
            with stage.switched(adapter, trained), recomputing_in(lambda _: self.playing(role, trained)):
                yield stage.network
        finally:
            self.pipe.stand_ins = before

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
        with self.playing(role, trained):
            return self.pipe.guided_velocity(sigma * TRAINING_STEPS, guidance, {}, posi, nega).float()

    def trained(self, named: Mapping[str, nn.Parameter]) -> dict[str, dict[str, nn.Parameter]]:
        """The trained parameters among `named`, by name, of each role that is trained beside the student."""
        parts = {role: {} for role in (FAKE_SCORE, DISCRIMINATOR) if role in self.places or role in self.networks}
        for name, parameter in named.items():
            for role in parts:
                if f".{role}." in name:
                    parts[role][name] = parameter
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
