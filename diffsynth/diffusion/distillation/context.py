"""`LossContext`: what an objective with several roles needs to compute its loss on a batch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..base_pipeline import BasePipeline
from ..randomness import GlobalRNG, SampleRNG
from ..trained import TrainProgress
from . import discriminator
from .roles import Roles


@dataclass(frozen=True, kw_only=True)
class LossContext:
    """A batch, the roles that predict on it, and the progress of the training.

    Args:
        progress: How far the training is; None evaluates the student as at the last step.
        clean: `input_latents` (B, …), fp32.
        size: `height` and `width` of the batch's images, in pixels.
        inputs: The network's other inputs, for the conditional prediction.
        negative: Inputs that the unconditional prediction has instead.
    """

    pipe: BasePipeline
    rng: SampleRNG | GlobalRNG
    roles: Roles
    progress: TrainProgress | None
    clean: Tensor
    size: Mapping[str, int]
    inputs: Mapping[str, Any]
    negative: Mapping[str, Any] | None

    @classmethod
    def of(
        cls,
        pipe: BasePipeline,
        rng: SampleRNG | GlobalRNG | None = None,
        roles: Roles | None = None,
        negative: Mapping[str, Any] | None = None,
        progress: TrainProgress | None = None,
        *,
        input_latents: Tensor,
        height: int,
        width: int,
        **inputs: Any,
    ) -> "LossContext":
        """The context of the inputs that an objective is called with; `input_latents` (B, …) are clean."""
        return cls(
            pipe=pipe,
            rng=rng or GlobalRNG(len(input_latents)),
            roles=roles,
            progress=progress,
            clean=input_latents.float(),
            size={"height": height, "width": width},
            inputs=inputs,
            negative=negative,
        )

    def sigmas(self, settings: Mapping[str, Any]) -> Tensor:
        """Noise levels (K,) at which images of this size are sampled with these sampling settings."""
        with self.pipe.sampling_steps({**self.size, **settings}) as scheduler:
            return scheduler.sigmas.to(self.clean.device)

    def velocity(self, role: str, latents: Tensor, sigma: Tensor, guidance: float = 1, trained: bool = False) -> Tensor:
        """Velocity (B, …), fp32, that `role` predicts for latents (B, …) at noise levels (B,); see `Roles.velocity`."""
        return self.roles.velocity(role, latents, sigma, self.inputs, self.negative, guidance, trained)

    def logits(self, role: str, latents: Tensor, sigma: Tensor, trained: bool = False) -> Tensor:
        """The discriminator's logits (B, K) for latents (B, …) at noise levels (B,); see `discriminator.logits`."""
        return discriminator.logits(self.roles, role, latents, sigma, self.inputs, trained)
