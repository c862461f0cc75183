"""What every objective shares."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Objective:
    """A loss over a batch of pipeline inputs, and what it trains.

    Args:
        trainable_models: Models trained in full (dotted names reach into one); None trains the default model when
            there is no LoRA, and nothing but the LoRA otherwise.
        extra_inputs: Columns of the data set passed to the pipeline as inputs of the same name.
    """

    trainable_models: Sequence[str] | None = None
    extra_inputs: Sequence[str] = ()

    default_model = "dit"
    calls_model_fn = True
    provides = ("latents", "timestep")  # inputs of `model_fn` that the objective makes itself

    def __call__(self, pipe, draw=None, **inputs) -> Tensor:
        """Loss per sample (B,).

        Args:
            draw: Where random numbers come from (`randomness.Draw`); None takes torch's global generator.
            inputs: What the pipeline's units made of the samples, shared and positive, collated.
        """
        raise NotImplementedError(f"{type(self).__name__} has no loss.")

    def wanted_inputs(self, pipe) -> set[str]:
        """Names of the pipeline inputs this objective reads, itself or through `model_fn`.

        What its `loss` has a default for is wanted only where it is one of the `extra_inputs`.
        """
        parameters = inspect.signature(self.loss).parameters.items()
        own = {name for name, p in parameters if p.default is p.empty or name in self.extra_inputs}
        own -= {"pipe", "draw", "inputs"}
        of_model_fn = set(inspect.signature(pipe.model_fn).parameters) - {*self.provides, *pipe.in_iteration_models}
        return own | (of_model_fn if self.calls_model_fn else set())
