"""What every objective shares."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ..trained import MODEL

GIVEN = {"pipe", "rng", "inputs", "context"}  # parameters of losses that are no inputs


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

    default_model: ClassVar[str] = "dit"
    calls_model_fn: ClassVar[bool] = True
    provides: ClassVar[Sequence[str]] = ("latents", "timestep")  # inputs of `model_fn` that it makes itself
    reads_negative: ClassVar[bool] = False  # whether guidance in training leads away from `negative_prompt`
    negative_prompt: ClassVar[str] = ""
    optional_columns: ClassVar[Sequence[str]] = ()  # columns that are extra inputs wherever a row has them

    def __call__(self, pipe, rng=None, **inputs) -> Tensor:
        """Loss per sample (B,).

        Args:
            draw: Where random numbers come from (`randomness.SampleRNG`); None takes torch's global generator.
            inputs: What the pipeline's units made of the samples, shared and positive, collated; of an objective with
                roles, also `roles`, the `negative` inputs and the `progress`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no loss.")

    @property
    def keeps_images(self) -> bool:
        """Whether images have to stay as they are in their files, down to the pixel."""
        return False

    @property
    def reads_features(self) -> bool:
        """Whether it reads what a network's own layers make of their tokens."""
        return False

    @property
    def sampling(self) -> Mapping[str, Any] | None:
        """Arguments of the pipeline that what it trains is to be drawn with; None leaves them as they are."""
        return None

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that every row has to have."""
        return tuple(self.extra_inputs)

    def units(self, pipe) -> list:
        """The units of the pipeline that lead to what it reads."""
        return pipe.required_units(self.wanted_inputs(pipe))

    def wanted_inputs(self, pipe) -> set[str]:
        """Names of the pipeline inputs this objective reads, itself or through `model_fn`.

        What its `loss` has a default for is wanted only where it is a column that it reads.
        """
        parameters, read = inspect.signature(self.loss).parameters.items(), {*self.extra_inputs, *self.optional_columns}
        own = {name for name, p in parameters if p.default is p.empty or name in read} - GIVEN
        of_model_fn = set(inspect.signature(pipe.model_fn).parameters) - {*self.provides, *pipe.in_iteration_models}
        return own | (of_model_fn if self.calls_model_fn else set())

    def check(self, pipe, lora, cached: bool) -> None:
        """Refuse what it cannot train, or not on such data, before any weight is read."""

    def sampling_inputs(self, pipe) -> dict[str, Any]:
        """Arguments of the pipeline that training sets as drawing does."""
        return {}

    def check_row(self, row: Mapping) -> None:
        """Refuse a row of the data set that it cannot be trained on."""

    # Roles that train beside the model; see `distillation.Distillation`

    @property
    def has_roles(self) -> bool:
        """Whether others play beside the model."""
        return type(self).build_roles is not Objective.build_roles

    def build_roles(self, pipe, lora, seed: int):
        """The `roles.Roles` of the training, None where there is but one; on loaded weights."""

    def trained_at(self, step: int) -> Sequence[str]:
        """Roles whose weights optimizer step `step`, counted from 0, changes."""
        return (MODEL,)

    def learning_rate(self, role: str) -> float | None:
        """Of a role beside the model; None is the model's own."""
        return None
