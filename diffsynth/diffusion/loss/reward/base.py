"""`RewardObjective`: the base class of objectives that learn from samples of the model itself and their rewards."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from ....core.ranges import NonNegativeFloat, PositiveFraction, SamplingSteps, check_fields
from ...adapters.lora import Adapter
from ...base_pipeline import BasePipeline
from ...distillation.context import LossContext
from ...distillation.roles import STUDENT
from ...flow_match import TRAINING_STEPS, interpolate
from ...pipeline.units import PipelineUnit
from ...randomness import GlobalRNG, SampleRNG
from ...timesteps import UniformTimesteps
from ..base import Objective, sampled_with


@dataclass(frozen=True, kw_only=True)
class PolicySampling:
    """How the policy samples what it is rewarded for.

    Args:
        num_inference_steps: Number of steps.
        cfg_scale: Scale of classifier-free guidance; 1 switches it off, and the training learns what guidance did.
        negative_prompt: Prompt of the unconditional prediction.
        sampler: `euler`, `heun`, `dpmpp_2m` or `renoise`.
        sigmas: Noise levels, decreasing from 1; None takes the family's.
    """

    num_inference_steps: SamplingSteps = 10
    cfg_scale: NonNegativeFloat = 1.0
    negative_prompt: str = ""
    sampler: str = "euler"
    sigmas: list[PositiveFraction] | None = None

    def __post_init__(self):
        check_fields(self, "task.sampling.")

    @property
    def settings(self) -> dict[str, Any]:
        """Arguments of the pipeline's call."""
        names = ("num_inference_steps", "cfg_scale", "sampler", "sigmas")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, kw_only=True)
class RewardObjective(Objective):
    """An objective on clean latents that the policy sampled, each with its advantage among samples of its prompt.

    Class attributes:
        samples_as: The role that samples.
        kept: What `roll_out` keeps for the loss besides the clean latents; the loss finds it in `context.inputs`.

    Args:
        sampling: How the policy samples.
    """

    sampling: PolicySampling = field(default_factory=PolicySampling)

    learns_from_samples: ClassVar[bool] = True
    samples_as: ClassVar[str] = STUDENT
    kept: ClassVar[Sequence[str]] = ()

    def __call__(
        self, pipe: BasePipeline, rng: SampleRNG | GlobalRNG | None = None, *, advantage: Tensor, **inputs: Any
    ) -> Tensor:
        """Loss per sample (B,) from their `advantage` (B,) and sampled clean `input_latents` (B, …).

        Args:
            inputs: See `LossContext.of`.
        """
        context = LossContext.of(pipe, rng, **inputs)
        return self.loss(context, advantage.to(context.clean.device))

    def loss(self, context: LossContext, advantage: Tensor) -> Tensor:
        """Loss per sample (B,)."""
        raise NotImplementedError(f"{type(self).__name__} has no loss.")

    def roll_out(self, pipe: BasePipeline, shared: dict, posi: dict, nega: dict) -> dict[str, Tensor]:
        """Sample a batch of inputs (shared, positive, negative) at the pipeline's sampling steps.

        Returns:
            Tensors (B, …) by name that are kept for the loss: clean `latents`, which become its `input_latents`, and
            others, which the loss gets under their own names.
        """
        return {"latents": pipe.denoise(shared, posi, nega)}

    def blank(self, shape: Sequence[int]) -> dict[str, Tensor]:
        """What `roll_out` returns for one sample whose latents have this shape (1, …), without its content."""
        return {"latents": torch.zeros(shape)}

    def advantages(self, normalised: Tensor) -> Tensor:
        """What `loss` gets as advantages (P, G), from the normalised rewards (P, G) of G samples of each of P prompts.

        The reward of a sample that could not be scored is NaN; its advantage is 0.
        """
        return normalised.nan_to_num(0)

    def decay(self, step: int) -> float | None:
        """The decay d with which the role `old` follows the policy before a round; None if there is no such role.

        Args:
            step: Number of optimizer steps taken.
        """
        return None

    @property
    def guidance(self) -> float:
        """Scale of guidance in sampling."""
        return self.sampling.cfg_scale

    @property
    def negative_prompt(self) -> str:
        return self.sampling.negative_prompt

    @property
    def reads_negative(self) -> bool:
        return self.guidance != 1

    @property
    def reads_images(self) -> bool:
        return False

    @property
    def sampling_settings(self) -> Mapping[str, Any]:
        """The guidance that the weights were rewarded with, which sampling should use as well."""
        return {"cfg_scale": self.guidance}

    def all_units(self, pipe: BasePipeline) -> list[PipelineUnit]:
        """The pipeline's units without the one that encodes the data set's images: there are none."""
        return [unit for unit in pipe.units if "input_latents" not in unit.output_params]

    def wanted_inputs(self, pipe: BasePipeline) -> set[str]:
        return super().wanted_inputs(pipe) | {"input_latents", "height", "width", *self.kept}

    def sampling_inputs(self, pipe: BasePipeline) -> dict[str, Any]:
        return sampled_with(pipe)

    def called_models(self, pipe: BasePipeline) -> set[str]:
        return set(pipe.decoding_models)

    def check(self, pipe: BasePipeline, lora: Adapter | None, cached: bool) -> None:
        """Refuse a training of other models than the network, and guidance for a model from which it was distilled."""
        check_network_alone(pipe, lora, self.trainable_models)
        if self.guidance != 1 and pipe.call_defaults.get("cfg_scale") == 1:
            raise ValueError(
                f"task.sampling.cfg_scale is {self.guidance:g}, but this model samples without classifier-free "
                "guidance (its default is cfg_scale=1); set task.sampling.cfg_scale=1, or choose the base that it was "
                "distilled from."
            )


def check_network_alone(pipe: BasePipeline, lora: Adapter | None, trainable_models: Sequence[str] | None) -> None:
    """Refuse a training of other models than the network.

    Raises:
        ValueError: Another one is trained; names it.
    """
    network = pipe.in_iteration_models[0]
    trained = {*(lora.models if lora else ()), *(name.split(".")[0] for name in trainable_models or ())}
    if trained - {network}:
        raise ValueError(
            f"task.trainable_models and lora.models name {sorted(trained)}; reward training trains {network} alone."
        )


@dataclass(frozen=True, kw_only=True)
class RenoisingObjective(RewardObjective):
    """An objective that adds noise to the samples again, so that any sampler may have made them.

    Args:
        timesteps: Distribution of the noise levels at which samples are trained.
    """

    timesteps: UniformTimesteps = field(default_factory=UniformTimesteps)

    def noised(self, context: LossContext) -> tuple[Tensor, Tensor, Tensor]:
        """Noisy latents x_σ = (1 - σ) x₀ + σ ε (B, …), their noise ε (B, …) and noise levels σ (B,)."""
        sigma = self.timesteps(context.pipe.scheduler, context.rng.uniform("timestep")).to(context.clean.device)
        noise = context.rng.normal("noise", context.clean)
        return interpolate(context.clean, noise, sigma), noise, sigma

    def policy_velocity(self, context: LossContext, latents: Tensor, sigma: Tensor) -> Tensor:
        """Velocity (B, …), fp32, that the policy predicts for latents (B, …) at noise levels (B,), with gradients."""
        return context.pipe.predict(sigma * TRAINING_STEPS, latents=latents, **context.inputs).float()
