"""Two experts: two networks of one class, each of which predicts at its own part of the noise levels.

Balaji et al. 2022, "eDiff-I", §4.1 (https://arxiv.org/abs/2211.01324). `dit` predicts at noise levels of at least the
boundary, `dit2` below it. Each can be trained without the other.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..core.data import generator
from ..core.ranges import NonNegativeFloat, PositiveFraction
from .base_pipeline import BasePipeline
from .flow_match import ALL_LEVELS, TRAINING_STEPS
from .pipeline.request import Request
from .pipeline.units import PipelineUnit

HIGH, LOW = "dit", "dit2"


@dataclass(kw_only=True)
class ExpertsRequest(Request):
    """Sample with two experts.

    Args:
        boundary: Noise level from which `dit` predicts; `dit2` predicts below it.
        cfg_scale_2: Scale of guidance below the boundary; None takes `cfg_scale`.
    """

    boundary: PositiveFraction = 0.875
    cfg_scale_2: NonNegativeFloat | None = None


class TwoExperts(BasePipeline, abstract=True):
    """A pipeline with `dit` for high noise levels and `dit2` for low ones; the request has `ExpertsRequest`'s fields.

    Sampling needs both. A training of one loads the other only if it samples. In a training of both each optimizer step
    trains one, with the probability of its share of the noise levels, so that no batch has levels of both.
    """

    in_iteration_models = (HIGH, LOW)

    def complete(self, request: Mapping) -> dict:
        completed = super().complete(request)
        if completed["cfg_scale"] == 1 and completed["cfg_scale_2"] not in (None, 1):
            raise ValueError(
                f"cfg_scale_2 is {completed['cfg_scale_2']}, but cfg_scale=1 samples without a negative prompt; set "
                "cfg_scale above 1, or leave cfg_scale_2 out."
            )
        return completed

    def predict(self, timestep: Tensor, **inputs) -> Tensor:
        """Velocity (B, …) at timesteps (B,); held-out losses of both experts have timesteps on both sides."""
        if not self.scheduler.training or self.scheduler.trained != ALL_LEVELS:
            return super().predict(timestep, **inputs)
        high, velocity = timestep >= self.boundary * TRAINING_STEPS, torch.empty_like(inputs["latents"])
        levels = {HIGH: (self.boundary, ALL_LEVELS[1]), LOW: (ALL_LEVELS[0], self.boundary)}
        for name, chosen in ((HIGH, high), (LOW, ~high)):
            if chosen.any():
                self.scheduler.trained = levels[name]
                own = {key: value[chosen] if is_batch(value, len(high)) else value for key, value in inputs.items()}
                velocity[chosen] = super().predict(timestep[chosen], **own).to(velocity)
        self.scheduler.trained = ALL_LEVELS
        return velocity

    def predicting(self, timestep: Tensor, inputs: Mapping) -> dict[str, nn.Module]:
        name = self.expert_at(timestep, inputs)
        return {HIGH: self.replacements.get(name) or getattr(self, name)}

    def inputs_at(self, level: float, shared: Mapping) -> dict[str, Any]:
        boundary = np.float32(shared.get("boundary", self.boundary))  # levels are fp32, too
        return {"expert": HIGH if level >= boundary else LOW}

    def expert_at(self, timestep: Tensor, inputs: Mapping) -> str:
        """The expert that predicts at equal timesteps (B,) in [0, 1000].

        Neither a training nor a sampling reads the timesteps back from the device: those of a training are of the
        expert that it trains, and a sampling's `inputs` name the `expert`.
        """
        if self.scheduler.training:
            return HIGH if self.scheduler.trained[0] > 0 else LOW
        return inputs.get("expert") or self.inputs_at(timestep[0].item() / TRAINING_STEPS, inputs)["expert"]

    def guided_velocity(
        self, timestep: Tensor, cfg_scale: float, shared: Mapping, posi: Mapping, nega: Mapping
    ) -> Tensor:
        of_low = shared.get("cfg_scale_2")
        scale = cfg_scale if of_low is None or self.expert_at(timestep, shared) == HIGH else of_low
        return super().guided_velocity(timestep, scale, shared, posi, nega)

    @property
    def boundary(self) -> float:
        """The noise level from which `dit` predicts."""
        return self.call_defaults["boundary"]

    def trained_levels(self, trained: Collection[str]) -> tuple[float, float]:
        experts, (least, end) = self.networks_in_training(trained), ALL_LEVELS
        return self.boundary if LOW not in experts else least, self.boundary if HIGH not in experts else end

    def networks_in_training(self, trained: Collection[str]) -> Sequence[str]:
        roots = {name.split(".")[0] for name in trained}
        experts = [name for name in (HIGH, LOW) if name in roots]
        if not experts or (len(experts) == 2 < len(roots)):
            raise ValueError(
                f"{' and '.join(sorted(roots))} are to be trained, but a run trains {HIGH} (expert=high) or {LOW} "
                "(expert=low), perhaps with other models, or both experts alone (expert=both); set one of them."
            )
        return experts

    def taking_turns(self, trained: Collection[str]) -> Sequence[str]:
        experts = self.networks_in_training(trained)
        return experts if len(experts) == 2 else ()

    def turn(self, trained: Collection[str], step: int, seed: int) -> str:
        levels = self.sigma_grid(TRAINING_STEPS)
        share = (levels >= self.boundary).double().mean().item()
        drawn = torch.rand((), generator=generator(seed, "expert", 0, step)).item()
        return HIGH if drawn < share else LOW

    def models_of(self, units: Iterable[PipelineUnit], *, model_fn: bool) -> set[str]:
        return super().models_of(units, model_fn=False) | ({HIGH, LOW} if model_fn else set())

    def drop_models(self, names: Iterable[str]) -> None:
        super().drop_models(names)
        there = [name for name in (HIGH, LOW) if getattr(self, name) is not None]
        self.in_iteration_models = tuple(there) or self.in_iteration_models


def is_batch(value: Any, count: int) -> bool:
    """Whether a value is a tensor of `count` samples."""
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) == count
