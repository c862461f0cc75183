"""Two experts: two networks of one class, each of which predicts at its own part of the noise levels.

Balaji et al. 2022, "eDiff-I", §4.1 (https://arxiv.org/abs/2211.01324). `dit` predicts at noise levels of at least the
boundary, `dit2` below it. Each can be trained without the other.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

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

    Sampling needs both. A training trains one, and loads the other only if it samples.
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

    def predicting(self, timestep: Tensor, inputs: Mapping) -> dict[str, nn.Module]:
        name = self.expert_at(timestep, inputs)
        return {HIGH: self.replacements.get(name) or getattr(self, name)}

    def expert_at(self, timestep: Tensor, inputs: Mapping) -> str:
        """The expert that predicts at equal timesteps (B,) in [0, 1000]; `inputs` may have another `boundary`.

        A training does not read the timesteps back from the device: they are those of the expert that it trains.
        """
        if self.scheduler.training:
            return HIGH if self.scheduler.trained[0] > 0 else LOW
        return HIGH if timestep[0] >= inputs.get("boundary", self.boundary) * TRAINING_STEPS else LOW

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
        least, end = ALL_LEVELS
        return (self.boundary, end) if self.networks_in_training(trained) == [HIGH] else (least, self.boundary)

    def networks_in_training(self, trained: Collection[str]) -> Sequence[str]:
        roots = {name.split(".")[0] for name in trained}
        experts = [name for name in (HIGH, LOW) if name in roots]
        if len(experts) != 1:
            raise ValueError(
                f"{' and '.join(sorted(roots))} are to be trained, but a run trains one expert; set expert=high for "
                f"{HIGH} or expert=low for {LOW}, and train the other in a run of its own."
            )
        return experts

    def models_of(self, units: Iterable[PipelineUnit], *, model_fn: bool) -> set[str]:
        return super().models_of(units, model_fn=False) | ({HIGH, LOW} if model_fn else set())

    def drop_models(self, names: Iterable[str]) -> None:
        super().drop_models(names)
        there = [name for name in (HIGH, LOW) if getattr(self, name) is not None]
        self.in_iteration_models = tuple(there) or self.in_iteration_models
