"""FLUX.2: text-to-image and editing.

Black Forest Labs 2025, "FLUX.2" (https://bfl.ai/blog/flux-2). Networks: diffusers, transformers.
"""

import torch
from torch import Tensor

from ..diffusion.flow_match import exponential_shift

TRAINING_MU = 0.8  # shift of the training grid at every resolution
MANY_TOKENS = 4300  # from here on the number of steps no longer matters


def flux2_sigmas(
    num_inference_steps: int, denoising_strength: float = 1.0, dynamic_shift_len: int | None = None
) -> Tensor:
    """Noise levels (N,) of FLUX.2: linear down to 1 / N, shifted by μ (of the numbers of tokens and of steps).

    Args:
        dynamic_shift_len: Image tokens (H/16 · W/16); None takes the training grid's μ = 0.8.
    """
    last = 1 / num_inference_steps
    linear = torch.linspace(last + (1 - last) * denoising_strength, last, num_inference_steps)
    mu = TRAINING_MU if dynamic_shift_len is None else _empirical_shift(dynamic_shift_len, num_inference_steps)
    return exponential_shift(linear, mu)


def _empirical_shift(tokens: int, steps: int) -> float:
    """μ as released: linear in the tokens at 10 and at 200 steps, and in the steps between the two."""
    at_200 = 0.00016927 * tokens + 0.45666666
    if tokens > MANY_TOKENS:
        return at_200
    at_10 = 8.73809524e-05 * tokens + 1.89833333
    return at_200 + (steps - 200) * (at_200 - at_10) / (200 - 10)
