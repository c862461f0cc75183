"""Flow-GRPO: policy gradients on the few sampling steps that are stochastic, so that they have a probability.

Liu et al. 2025, "Flow-GRPO" (https://arxiv.org/abs/2505.05470); a window of stochastic steps: Li et al. 2025, "MixGRPO"
(https://arxiv.org/abs/2507.21802); the ratio without bias: Wang et al. 2025, "GRPO-Guard"
(https://arxiv.org/abs/2510.22319).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ....core.data import generator
from ....core.ranges import NonNegativeFloat, PositiveFloat, PositiveFraction, PositiveInt, check_fields
from ...adapters.lora import Adapter
from ...base_pipeline import BasePipeline
from ...distillation.context import LossContext
from ...distillation.roles import STUDENT, TEACHER, Roles
from ...flow_match import FlowMatchScheduler
from ...noted import note
from ...pipeline.samplers import Noise, Velocity
from ...sde import Transition, flow_scales, transition
from .base import RewardObjective

KEPT = ("window_path", "window_sigmas", "window_scales", "window_means", "window_log_probs")


class WindowSampler:
    """Euler's method, with stochastic steps in a window of each sample's own; keeps what a loss needs of these.

    Args:
        starts: Numbers (B) of the first step of each sample's window.
        length: Steps W of a window.
        strength: a, see `sde.flow_scales`.
    """

    def __init__(self, starts: Sequence[int], length: int, strength: float):
        self.starts, self.length, self.strength = torch.tensor(starts), length, strength

    def __call__(
        self, velocity: Velocity, latents: Tensor, scheduler: FlowMatchScheduler, noise: Noise
    ) -> Iterator[Tensor]:
        """Yield the latents (B, …), fp32, at each noise level and at 0; see `pipeline.samplers`."""
        latents, scales = latents.float(), flow_scales(scheduler.sigmas, self.strength)
        levels, count = torch.tensor(scheduler.levels), len(latents)
        points, steps = [latents], []
        yield latents
        for index in range(len(scheduler.timesteps)):
            within = (self.starts <= index) & (index < self.starts + self.length)
            scale = torch.where(within, scales[index], 0.0)
            numbers = (levels[index].expand(count), levels[index + 1].expand(count), scale)
            numbers = [each.to(latents.device) for each in numbers]
            steps.append(transition(latents, velocity(latents, index).float(), *numbers))
            latents = steps[-1].sample(noise(index, latents))
            points.append(latents)
            yield latents
        self._keep(points, steps, levels, scales)

    def _keep(self, points: Sequence[Tensor], steps: Sequence[Transition], levels: Tensor, scales: Tensor) -> None:
        """Keep, of each sample's window, the path (B, W + 1, …), noise levels, scales, means and log-probabilities."""
        number = torch.arange(len(self.starts))
        places = self.starts[:, None] + torch.arange(self.length + 1)
        inside, device = places[:, :-1], points[0].device
        log_probs = [step.log_prob(after) for step, after in zip(steps, points[1:], strict=True)]  # NaN outside
        self.kept = {
            "window_path": torch.stack(points, 1)[number[:, None], places],
            "window_sigmas": levels[places].to(device),
            "window_scales": scales[inside].to(device),
            "window_means": torch.stack([step.mean for step in steps], 1)[number[:, None], inside],
            "window_log_probs": torch.stack(log_probs, 1)[number[:, None].to(device), inside.to(device)],
        }


@dataclass(frozen=True, kw_only=True)
class FlowGRPO(RewardObjective):
    """max(-A ρ, -A clip(ρ, 1 - ε, 1 + ε)) + λ KL(policy's step, base's step) of a random step of the window.

    ρ = exp(log p - log p_old) is the ratio of the step's probabilities now and when it was sampled, with log p the
    mean over dimensions. With `unbiased`, log ρ = (log p - log p_old + ‖μ - μ_old‖² / (2 s²)) s, whose mean is 0; μ and
    s are the step's mean and standard deviation (GRPO-Guard). Before the first update ρ = 1.

    Args:
        window: Stochastic steps of each sample, one after another.
        window_end: The windows lie in this share of the steps, from the noisy end: the last steps' noise stays visible.
        strength: a, how much noise a stochastic step adds; 0.7 to 1.2 are in use.
        clip: ε; the ratios are of means over dimensions, so that 1e-4 is large.
        unbiased: See above; ε is then about 2e-6.
        kl: λ.
    """

    window: PositiveInt = 2
    window_end: PositiveFraction = 0.5
    strength: PositiveFloat = 0.7
    clip: PositiveFloat = 2e-6
    unbiased: bool = True
    kl: NonNegativeFloat = 0.01

    kept: ClassVar[Sequence[str]] = KEPT

    def __post_init__(self):
        check_fields(self, "task.")
        if self.window > self.last_step:
            raise ValueError(
                f"task.window is {self.window}, but windows lie in {self.last_step} steps: task.window_end="
                f"{self.window_end:g} of task.sampling.num_inference_steps={self.sampling.num_inference_steps}; set "
                f"task.window={max(self.last_step, 1)} or less, or more steps."
            )

    @property
    def last_step(self) -> int:
        """Number of steps in which windows lie; the last step of all is not among them."""
        steps = self.sampling.num_inference_steps
        return min(int(steps * self.window_end), steps - 1)

    def build_roles(self, pipe: BasePipeline, lora: Adapter | None, seed: int) -> Roles:
        return Roles(pipe, lora, seed=seed)

    def roll_out(self, pipe: BasePipeline, shared: dict, posi: dict, nega: dict) -> dict[str, Tensor]:
        seeds = shared["seed"] if isinstance(shared["seed"], list) else [shared["seed"]] * len(shared["latents"])
        ends = self.last_step - self.window + 1
        starts = [int(torch.randint(ends, (), generator=generator(seed, "window", 0, 0))) for seed in seeds]
        sampler = WindowSampler(starts, self.window, self.strength)
        for latents in pipe.trajectory({**shared, "sampler": sampler}, posi, nega):  # noqa: B007
            pass
        return {"latents": latents, **sampler.kept}

    def blank(self, shape: Sequence[int]) -> dict[str, Tensor]:
        one, *rest = shape
        path = torch.zeros(one, self.window + 1, *rest)
        numbers = torch.full([one, self.window + 1], 0.5)
        own = (path, numbers, numbers[:, 1:], path[:, 1:], numbers[:, 1:])
        return {**super().blank(shape), **dict(zip(KEPT, own, strict=True))}

    def loss(self, context: LossContext, advantage: Tensor) -> Tensor:
        path, sigmas, scales, means, log_probs = (context.inputs[name] for name in KEPT)
        chosen = torch.tensor(context.rng.integers("window step", self.window), device=path.device)
        number = torch.arange(len(path), device=path.device)
        before, after, old = path[number, chosen], path[number, chosen + 1], means[number, chosen]
        levels = sigmas[number, chosen], sigmas[number, chosen + 1], scales[number, chosen]
        velocity = context.velocity(STUDENT, before, levels[0], self.guidance, trained=True)
        step = transition(before, velocity, *levels)
        log_ratio = step.log_prob(after) - log_probs[number, chosen]
        note("log_prob_difference", log_ratio.abs())
        if self.unbiased:
            log_ratio = (log_ratio + step.kl(old)) * step.std
        ratio = log_ratio.exp()
        loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - self.clip, 1 + self.clip))
        note("clipped", ((ratio - 1).abs() > self.clip).float())
        if not self.kl:
            return loss
        with torch.no_grad():
            base = transition(before, context.velocity(TEACHER, before, levels[0], self.guidance), *levels)
        apart = step.kl(base.mean)
        note("kl", apart)
        return loss + self.kl * apart
