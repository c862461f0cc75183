"""Prior preservation: fine-tuning on a few images of one subject must not change what its class looks like.

Ruiz et al. 2022, "DreamBooth" (https://arxiv.org/abs/2208.12242), Eq. 2: images of the class are trained as well.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ...core.data.dataset import REGULARISATION
from ...core.host_memory import sent
from ...core.ranges import PositiveFloat, check_fields
from ..adapters.lora import Adapter
from ..base_pipeline import BasePipeline
from ..distillation.roles import TEACHER, Roles, check_base_is_kept
from ..flow_match import per_sample
from ..randomness import GlobalRNG, SampleRNG
from .flow_match_sft import FlowMatchSFT


@dataclass(frozen=True, kw_only=True)
class Prior:
    """What rows for regularisation teach.

    Args:
        weight: λ, the factor of their loss.
        target: `base` learns the velocity that the frozen base predicts without the adapter; `images` learns the rows'
            own images, as DreamBooth does.
    """

    weight: PositiveFloat = 1.0
    target: Literal["base", "images"] = "base"

    def __post_init__(self):
        check_fields(self, "task.prior.")


@dataclass(frozen=True, kw_only=True)
class PriorPreservation(FlowMatchSFT):
    """The loss of `FlowMatchSFT`, and for rows of regularisation λ w(σ) · mean ‖v_θ(x_t, t) - sg v(x_t, t)‖².

    v is the frozen base: the network without its adapter, which takes no memory of its own. Rows of regularisation are
    those with a true `regularisation`; `dataset=mixed` writes that column.

    Args:
        prior: λ and the target of these rows.
    """

    prior: Prior = field(default_factory=Prior)

    optional_columns: ClassVar[Sequence[str]] = (REGULARISATION,)
    reads_regularisation: ClassVar[bool] = True

    def loss(
        self,
        pipe: BasePipeline,
        input_latents: Tensor,
        rng: SampleRNG | GlobalRNG,
        loss_mask: Tensor | None = None,
        regularisation: bool | Sequence[bool] = False,
        roles: Roles | None = None,
        **inputs,
    ) -> Tensor:
        """Loss per sample (B,); see `FlowMatchSFT`.

        Args:
            regularisation: Whether the samples are for regularisation, one bool for all or B.
            roles: Predict as the base; None with `task.prior.target=images`.
        """
        marks = [regularisation] * len(input_latents) if isinstance(regularisation, bool) else regularisation
        own = {"input_latents": input_latents, "loss_mask": loss_mask, "regularisation": marks, "roles": roles}
        losses = super().loss(pipe, rng=rng, **own, **inputs)
        factors = torch.tensor([self.prior.weight if mark else 1.0 for mark in marks])
        return losses * sent(factors, losses.device)

    def target(
        self,
        pipe: BasePipeline,
        velocity: Tensor,
        timestep: Tensor,
        regularisation: Sequence[bool] = (),
        roles: Roles | None = None,
        **inputs,
    ) -> Tensor:
        if self.prior.target == "images" or not any(regularisation):
            return velocity
        with torch.no_grad(), roles.active(TEACHER):
            base = pipe.predict(timestep, **inputs).float()
        marks = sent(torch.tensor(regularisation), velocity.device)
        return torch.where(per_sample(marks, velocity), base, velocity)

    @property
    def has_roles(self) -> bool:
        return self.prior.target == "base"

    def build_roles(self, pipe: BasePipeline, lora: Adapter | None, seed: int) -> Roles | None:
        return Roles(pipe, lora, seed=seed) if self.has_roles else None

    def check(self, pipe: BasePipeline, lora: Adapter | None, cached: bool) -> None:
        if self.has_roles:
            remedy = "or set task.prior.target=images, which learns the images themselves"
            check_base_is_kept("task.prior.target=base", pipe, lora, self.trainable_models, remedy)

    def check_row(self, row: Mapping) -> None:
        if not isinstance(found := row.get(REGULARISATION, False), bool):
            raise ValueError(
                f"the column {REGULARISATION} is {found!r}; expected true or false, which dataset=mixed writes there: "
                "give the column another name, and name data sets in dataset.regularisation."
            )
