"""Weights of the loss inside and outside of a mask."""

from dataclasses import dataclass

from torch import Tensor

from ...core.ranges import NonNegativeFloat, check_fields


@dataclass(frozen=True, kw_only=True)
class MaskWeights:
    """W = inside · m + outside · (1 - m), the weights of latent pixels for a mask m in [0, 1], 1 where it is white.

    Args:
        column: Column of the mask; None takes `loss_mask` if the task's `extra_inputs` name it, and otherwise no mask.
        inside, outside: Weights of white and of black. Only their ratio matters: the loss is divided by the sum of W.

    Raises:
        ValueError: A weight is negative, or both are 0.
    """

    column: str | None = None
    inside: NonNegativeFloat = 1.0
    outside: NonNegativeFloat = 0.0

    def __post_init__(self):
        check_fields(self, "task.mask.")
        if self.inside + self.outside == 0:
            raise ValueError("task.mask.inside=0 and task.mask.outside=0 train nothing; set one of them above 0.")

    def __call__(self, mask: Tensor) -> Tensor:
        """Weights (B, 1, …) of a mask (B, 1, …) of latents (B, C, …), in fp32."""
        mask = mask.float()
        return self.inside * mask + self.outside * (1 - mask)
