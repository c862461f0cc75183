"""Direct preference optimisation (DPO): of two images of a prompt, the adapter learns to prefer the chosen one.

Rafailov et al. 2023, "Direct Preference Optimization" (https://arxiv.org/abs/2305.18290); Wallace et al. 2023,
"Diffusion Model Alignment Using Direct Preference Optimization" (https://arxiv.org/abs/2311.12908); for velocities Liu
et al. 2025, "Improving Video Generation with Human Feedback" (https://arxiv.org/abs/2501.13918).
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ....core.data.pairs import REJECTED
from ....core.host_memory import sent
from ....core.ranges import NonNegativeFloat, PositiveFloat, PositiveInt, check_fields
from ...adapters.lora import Adapter
from ...base_pipeline import BasePipeline
from ...distillation.roles import STUDENT, TEACHER, Roles, check_base_is_kept
from ...flow_match import interpolate
from ...noted import note
from ...pipeline.units import PipelineUnit, WrappedEmbedder
from ...randomness import GlobalRNG, SampleRNG
from ...timesteps import LogitNormalTimesteps, UniformTimesteps
from ..base import Objective, sampled_with


class RejectedImageEmbedder(WrappedEmbedder):
    """Encodes `rejected_image` to `rejected_latents`, as the family encodes the row's own image to `input_latents`.

    Args:
        argument: The argument of the family's unit that takes the image.
    """

    def __init__(self, embedder: PipelineUnit, argument: str):
        self.argument = argument
        super().__init__(embedder, output_params=("rejected_latents",))

    def process_batch(self, pipe, batch: Sequence[Mapping]) -> list[dict]:
        for inputs in batch:
            check_pair(pipe, inputs[self.argument], inputs[REJECTED])
        asked = [{**inputs, self.argument: inputs[REJECTED]} for inputs in batch]
        own = [{name: inputs[name] for name in self.embedder.parameters if name in inputs} for inputs in asked]
        return [{"rejected_latents": made["input_latents"]} for made in self.embedder.process_batch(pipe, own)]

    def _parameters(self) -> dict[str, inspect.Parameter]:
        rejected = inspect.Parameter(REJECTED, inspect.Parameter.KEYWORD_ONLY, default=None)
        return {**super()._parameters(), REJECTED: rejected}


def check_pair(pipe: BasePipeline, chosen: Any, rejected: Any) -> None:
    """Refuse two images of which none can be preferred.

    Raises:
        ValueError: Their sizes or numbers of layers differ, or their pixels are all equal.
    """
    own, other = ([value] if not isinstance(value, list | tuple) else list(value) for value in (chosen, rejected))
    sizes = [[f"{image.width} x {image.height}" for image in each] for each in (own, other)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"{pipe.media.column} has {', '.join(sizes[0])} pixels and {REJECTED} {', '.join(sizes[1])}; expected one "
            "size: set dataset.height and dataset.width, or dataset.buckets=true."
        )
    if all(a.mode == b.mode and a.tobytes() == b.tobytes() for a, b in zip(own, other, strict=True)):
        raise ValueError(
            f"{pipe.media.column} and {REJECTED} have the same pixels, so that none can be preferred; name two "
            "pictures, or leave the row out."
        )


class PairErrors(NamedTuple):
    """Errors e(v) = mean ‖v - (ε - x₀)‖² (B,) on both images of a pair, the network's own and the base's."""

    chosen: Tensor
    rejected: Tensor
    base_chosen: Tensor
    base_rejected: Tensor

    @property
    def margin(self) -> Tensor:
        """Δ_l - Δ_w (B,), above 0 where the network prefers the chosen image more than the base does."""
        return (self.rejected - self.base_rejected) - (self.chosen - self.base_chosen)

    def figures(self) -> dict[str, Tensor]:
        """What tells how a training goes (B,): Δ_w and Δ_l apart, as both may grow, and the share of right pairs.

        A pair counts as right at a margin of 0 too, at which every training starts.
        """
        return {
            "chosen_error": self.chosen - self.base_chosen,
            "rejected_error": self.rejected - self.base_rejected,
            "accuracy": (self.margin >= 0).float(),
        }


@dataclass(frozen=True, kw_only=True)
class DPO(Objective):
    """-log sigmoid(-(β/2) (Δ_w - Δ_l)) + λ e_w(v_θ), with Δ = e(v_θ) - e(v) and e(v) = mean ‖v - (ε - x₀)‖².

    w is the chosen image, which stands in the column `image`, and l the one in `rejected_image`. v is the frozen base:
    the network without its adapter. Both images of a pair have the same σ and ε. With several noise levels Δ is the
    mean over them, before the sigmoid: so the loss comes nearer to that of the whole path, of which one level is an
    upper bound (Jensen's inequality; Wallace et al., §4).

    Args:
        beta: β. The errors are means over the latents' dimensions: a β for sums is smaller by their number.
        levels: Noise levels of a pair in each step, one in each of as many equally likely parts of `timesteps`.
        anchor_weight: λ. Only the difference of the errors is bounded, so both may grow; the anchor holds e_w.
        timesteps: Distribution of the noise levels.
    """

    beta: PositiveFloat = 2000.0
    levels: PositiveInt = 1
    anchor_weight: NonNegativeFloat = 0.0
    timesteps: UniformTimesteps | LogitNormalTimesteps = field(default_factory=LogitNormalTimesteps)

    image_columns: ClassVar[Sequence[str]] = (REJECTED,)

    def __post_init__(self):
        check_fields(self, "task.")

    @property
    def row_inputs(self) -> dict[str, str]:
        return {**super().row_inputs, REJECTED: REJECTED}

    def all_units(self, pipe: BasePipeline) -> list[PipelineUnit]:
        """The pipeline's units and, last, the one that encodes the rejected image."""
        (embedder,) = (unit for unit in pipe.units if "input_latents" in unit.output_params)
        return [*pipe.units, RejectedImageEmbedder(embedder, pipe.media.argument)]

    def sampling_inputs(self, pipe: BasePipeline) -> dict[str, Any]:
        return sampled_with(pipe)

    def check(self, pipe: BasePipeline, lora: Adapter | None, cached: bool) -> None:
        check_base_is_kept("task=reward/dpo", pipe, lora, self.trainable_models, "or choose another task")

    def build_roles(self, pipe: BasePipeline, lora: Adapter | None, seed: int) -> Roles:
        return Roles(pipe, lora, seed=seed)

    def __call__(self, pipe: BasePipeline, rng: SampleRNG | GlobalRNG | None = None, **inputs) -> Tensor:
        """Loss per sample (B,).

        Args:
            inputs: Among them `roles`, and clean `input_latents` and `rejected_latents` (B, …) of unit variance.
        """
        return self.loss(pipe, rng=rng or GlobalRNG(len(inputs["input_latents"])), **inputs)

    def loss(
        self,
        pipe: BasePipeline,
        input_latents: Tensor,
        rejected_latents: Tensor,
        rng: SampleRNG | GlobalRNG,
        roles: Roles | None = None,
        **inputs,
    ) -> Tensor:
        pair, uniform = (input_latents.float(), rejected_latents.float()), rng.uniform("timestep")
        by_level = []
        for level in range(self.levels):
            sigma = sent(self.timesteps(pipe.scheduler, (level + uniform) / self.levels), pair[0].device)
            by_level.append(pair_errors(roles, pair, rng.normal(f"noise {level}", pair[0]), sigma, inputs))
        errors = PairErrors(*torch.stack(by_level).mean(0))
        for name, values in errors.figures().items():
            note(name, values)
        return preference_loss(errors.margin, self.beta) + self.anchor_weight * errors.chosen


def pair_errors(
    roles: Roles, pair: tuple[Tensor, Tensor], noise: Tensor, sigma: Tensor, inputs: Mapping[str, Any]
) -> Tensor:
    """The fields of `PairErrors` (4, B) at one noise level; gradients reach the network's own errors only.

    Args:
        pair: Clean latents (B, …) of the chosen and of the rejected images.
        noise: ε (B, …).
        sigma: Noise levels (B,).
        inputs: The network's other inputs.
    """

    def error(role: str, clean: Tensor) -> Tensor:
        noisy = interpolate(clean, noise, sigma)
        velocity = roles.velocity(role, noisy, sigma, inputs, trained=role == STUDENT)
        return (velocity - (noise - clean)).pow(2).flatten(1).mean(1)

    with torch.no_grad():
        base = [error(TEACHER, clean) for clean in pair]
    return torch.stack([*(error(STUDENT, clean) for clean in pair), *base])


def preference_loss(margin: Tensor, beta: float) -> Tensor:
    """-log sigmoid((β/2) m) (B,) of margins m = Δ_l - Δ_w (B,); log 2 at a margin of 0."""
    return -logsigmoid(beta / 2 * margin)
