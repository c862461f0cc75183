"""What an objective with several roles is told of a batch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..randomness import GlobalRNG, SampleRNG
from ..trained import TrainProgress
from . import discriminator
from .roles import Roles


@dataclass(frozen=True, kw_only=True)
class LossContext:
    """A batch, who predicts of it, and when.

    Args:
        moment: Of the training; None measures the student as the last step would.
        clean: `input_latents` (B, …), fp32.
        size: `height` and `width` of its pictures.
        inputs: The network's others; `negative` are those of them that guidance leads away from.
    """

    pipe: Any
    rng: SampleRNG | GlobalRNG
    roles: Roles
    progress: TrainProgress | None
    clean: Tensor
    size: Mapping[str, int]
    inputs: Mapping[str, Any]
    negative: Mapping[str, Any] | None

    def sigmas(self, settings: Mapping[str, Any]) -> Tensor:
        """Noise levels (K,) at which pictures of this size are drawn with these arguments of the pipeline."""
        with self.pipe.sampling_steps({**self.size, **settings}) as scheduler:
            return scheduler.sigmas.to(self.clean.device)

    def velocity(self, role: str, latents: Tensor, sigma: Tensor, guidance: float = 1, trained: bool = False) -> Tensor:
        """What `role` predicts (B, …), fp32, of latents (B, …) at noise levels (B,); see `Roles.velocity`."""
        return self.roles.velocity(role, latents, sigma, self.inputs, self.negative, guidance, trained)

    def logits(self, role: str, latents: Tensor, sigma: Tensor, trained: bool = False) -> Tensor:
        """The discriminator's (B, K) on what `role` makes of latents (B, …); see `discriminator.logits`."""
        return discriminator.logits(self.roles, role, latents, sigma, self.inputs, trained)
