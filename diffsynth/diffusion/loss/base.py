"""`Objective`: a loss, which inputs it reads, and which models it trains."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from ..pipeline.units import required_units
from ..randomness import GlobalRNG, SampleRNG
from ..trained import MODEL

if TYPE_CHECKING:
    from ..adapters.lora import Adapter
    from ..base_pipeline import BasePipeline
    from ..distillation.roles import Roles
    from ..distillation.teacher import Teacher
    from ..pipeline.units import PipelineUnit

NOT_INPUTS = {"pipe", "rng", "inputs", "context"}  # parameters of `loss` that are no inputs of the pipeline


@dataclass(frozen=True, kw_only=True)
class Objective:
    """A loss over a batch of pipeline inputs, and the models that it trains.

    A subclass writes `loss`, and `__call__`, which calls it. The names of `loss`'s parameters are the inputs that the
    units have to compute; see `wanted_inputs`.

    Args:
        trainable_models: Models trained in full; a dotted name trains a part of one. None trains the default model if
            there is no LoRA, and nothing but the LoRA otherwise.
        extra_inputs: Columns of the data set that become inputs of the pipeline, under the same name. `input_image` and
            `end_image` of a video are its first and last frame in rows that have no such column.
    """

    trainable_models: Sequence[str] | None = None
    extra_inputs: Sequence[str] = ()

    default_models: ClassVar[Sequence[str]] = ()  # trained in full unless a run names others; (): the model's
    calls_model_fn: ClassVar[bool] = True
    samples_in_training: ClassVar[bool] = False  # whether the loss calls the networks of all noise levels
    provides: ClassVar[Sequence[str]] = ("latents", "timestep")  # inputs of `model_fn` that the objective computes
    reads_negative: ClassVar[bool] = False  # whether a guided prediction in training reads `negative_prompt`
    negative_prompt: ClassVar[str] = ""
    is_distillation: ClassVar[bool] = (
        False  # whether a student learns to sample in few steps, so that distill.py can run it
    )
    teacher: "ClassVar[Teacher | None]" = None  # how a teacher samples the images to learn from; None: none does
    reads_regularisation: ClassVar[bool] = False  # whether rows for regularisation have a loss of their own
    learns_from_samples: ClassVar[bool] = False  # whether it learns from rewards of the model's samples
    optional_columns: ClassVar[Sequence[str]] = ()  # columns that are extra inputs of the rows that have them
    image_columns: ClassVar[Sequence[str]] = ()  # columns of further images that every row must have

    def __call__(self, pipe: "BasePipeline", rng: SampleRNG | GlobalRNG | None = None, **inputs) -> Tensor:
        """Loss per sample (B,).

        Args:
            rng: Source of the random numbers; None takes torch's global generator.
            inputs: The shared and positive inputs of B samples after the units, as a batch; for an objective with
                roles also `roles`, the `negative` inputs and the `progress` of the training.
        """
        raise NotImplementedError(f"{type(self).__name__} has no loss.")

    @property
    def keeps_images(self) -> bool:
        """Whether images must be read pixel by pixel as they are in their files, neither resized nor augmented."""
        return False

    @property
    def reads_images(self) -> bool:
        """Whether the loss learns from the images of the data set."""
        return True

    @property
    def reads_features(self) -> bool:
        """Whether the loss reads outputs of layers inside a network."""
        return False

    @property
    def sampling_settings(self) -> Mapping[str, Any] | None:
        """Sampling settings (steps, guidance, …) stored with the exported weights; None stores none."""
        return None

    def rehearsed(self) -> "Objective":
        """This objective for a rehearsal by `plan.py`: it takes equal memory, and less time where that is possible."""
        return self

    @property
    def row_inputs(self) -> dict[str, str]:
        """Inputs of the pipeline that rows give, besides the image and the prompt, each with its column."""
        return {name: name for name in self.extra_inputs}

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that every row must have, besides the image and the prompt."""
        return tuple(dict.fromkeys(self.row_inputs.values()))

    def units(self, pipe: "BasePipeline") -> "list[PipelineUnit]":
        """The units of the pipeline that compute the inputs that this objective reads."""
        columns = {None, *self.extra_inputs, *self.optional_columns}
        required = required_units(self.all_units(pipe), self.wanted_inputs(pipe))
        return [unit for unit in required if unit.column in columns]

    def all_units(self, pipe: "BasePipeline") -> "list[PipelineUnit]":
        """The pipeline's units, from which `units` chooses; an objective may put units of its own in their place."""
        return pipe.units

    def wanted_inputs(self, pipe: "BasePipeline") -> set[str]:
        """Names of the pipeline inputs that this objective reads, itself or through `model_fn`.

        They are the parameters of `loss` and of `model_fn`. A parameter of `loss` that has a default is requested only
        if `row_inputs` or `optional_columns` names it.
        """
        named = {*self.row_inputs, *self.optional_columns}
        parameters = inspect.signature(self.loss).parameters.items()
        of_loss = {name for name, p in parameters if p.default is p.empty or name in named} - NOT_INPUTS
        if not self.calls_model_fn:
            return of_loss
        return of_loss | (pipe.model_fn_inputs() - {*self.provides})

    def check(self, pipe: "BasePipeline", lora: "Adapter | None", cached: bool) -> None:
        """Refuse models, adapters or data that this objective cannot train on; called before any weight is read.

        Args:
            cached: Whether the data set is a cache.
        """

    def sampling_inputs(self, pipe: "BasePipeline") -> dict[str, Any]:
        """Inputs of the pipeline that must have the same value in training as in sampling."""
        return {}

    def check_row(self, row: Mapping) -> None:
        """Refuse a row of the data set that this objective cannot train on."""

    def called_models(self, pipe: "BasePipeline") -> set[str]:
        """Names of the models that this objective calls besides those that its units and `model_fn` call."""
        return set()

    # Roles that are trained besides the model; see `distillation.RoleDistillation`

    @property
    def has_roles(self) -> bool:
        """Whether further roles, such as a teacher, predict in training."""
        return type(self).build_roles is not Objective.build_roles

    def build_roles(self, pipe: "BasePipeline", lora: "Adapter | None", seed: int) -> "Roles | None":
        """The roles of a training whose weights are loaded; None if the model is the only one."""

    def trained_at(self, step: int) -> Sequence[str]:
        """Roles whose weights optimizer step `step` (from 0) updates."""
        return (MODEL,)

    def learning_rate(self, role: str) -> float | None:
        """Learning rate of a role; None takes the model's."""
        return None


def sampled_with(pipe: "BasePipeline") -> dict[str, Any]:
    """Defaults of the request that are parameters of `model_fn`, such as an embedded guidance scale."""
    named = inspect.signature(pipe.model_fn).parameters.keys() & pipe.call_defaults.keys()
    return {name: pipe.call_defaults[name] for name in sorted(named) if pipe.call_defaults[name] is not None}
