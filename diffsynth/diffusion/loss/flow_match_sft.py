"""Supervised fine-tuning by flow matching.

Lipman et al. 2022, "Flow Matching for Generative Modeling" (https://arxiv.org/abs/2210.02747);
Liu et al. 2022, "Flow Straight and Fast", Eq. 1 (https://arxiv.org/abs/2209.03003).
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...core.host_memory import sent
from ...core.ranges import Probability
from ..base_pipeline import BasePipeline
from ..flow_match import TRAINING_STEPS, FlowMatchScheduler, interpolate
from ..randomness import GlobalRNG, SampleRNG
from ..timesteps import BellWeighting, UniformTimesteps
from .base import Objective
from .mask_weights import MaskWeights

SMALLEST = 1e-12  # below every sum of weights but 0; there is no error, as a step reads no value back from its device


@dataclass(frozen=True, kw_only=True)
class FlowMatchSFT(Objective):
    """w(σ) · mean ‖v_θ(x_t, t) - (ε - x₀)‖² with x_t = (1 - σ) x₀ + σ ε.

    With a mask m the mean is weighted, Σ W ‖…‖² / Σ W with W = inside · m + outside · (1 - m) (`MaskWeights`): over its
    white area alone by default, for example to leave out a background or a face. The size of the white area does not
    change the scale of the loss. A sample whose pixels all have weight 0 has loss 0.

    Args:
        timesteps: Distribution of the noise levels that are trained (`diffusion.timesteps`).
        weighting: w(σ).
        mask: Column of the mask, and its weights.
        given_probability: Probability that the first frames of a video, if they are given, are read. The others of its
            samples are trained without them, so that one network learns to generate both ways.
        exact_upstream: Round timesteps to the pipeline's dtype first, as DiffSynth-Studio does; in bf16 this reaches
            only 376 of the 1000 levels.
    """

    timesteps: UniformTimesteps = field(default_factory=UniformTimesteps)
    weighting: BellWeighting = field(default_factory=BellWeighting)
    mask: MaskWeights = field(default_factory=MaskWeights)
    given_probability: Probability = 1.0
    exact_upstream: bool = False

    @property
    def row_inputs(self) -> dict[str, str]:
        own = {} if self.mask.column is None else {"loss_mask": self.mask.column}
        return {**super().row_inputs, **own}

    def __call__(self, pipe: BasePipeline, rng: SampleRNG | GlobalRNG | None = None, **inputs) -> Tensor:
        """Loss per sample (B,).

        Args:
            inputs: Among them clean `input_latents` (B, …) of unit variance, and optionally `loss_mask` (B, 1, h, w) in
                [0, 1], the mask of the latent pixels, and `given_latents` (B, C, t, h, w), the first t latent frames of
                a video, which are given and not learned.
        """
        return self.loss(pipe, rng=rng or GlobalRNG(len(inputs["input_latents"])), **inputs)

    def loss(
        self,
        pipe: BasePipeline,
        input_latents: Tensor,
        rng: SampleRNG | GlobalRNG,
        loss_mask: Tensor | None = None,
        given_latents: Tensor | None = None,
        **inputs,
    ) -> Tensor:
        clean = input_latents.float()
        timestep, sigma = self.sample_timesteps(pipe.scheduler, rng, pipe.torch_dtype)
        weight = self.weighting(pipe.scheduler, sigma)  # before the networks: a GPU would have to end them first
        timestep, sigma, weight = sent(torch.stack([timestep, sigma, weight]), clean.device)
        noise = rng.normal("noise", clean)
        inputs |= {"latents": interpolate(clean, noise, sigma), "given_latents": given_latents}
        if given_latents is not None and self.given_probability < 1:
            inputs["is_given"] = sent(rng.uniform("given") < self.given_probability, clean.device)
        target = self.target(pipe, noise - clean, timestep, **inputs)
        velocity = pipe.predict(timestep, **inputs)
        weights = None if loss_mask is None else self.mask(loss_mask)
        error = (velocity.float() - target).pow(2)
        if given_latents is not None:
            learned = learned_frames(error, given_latents.shape[2], inputs.get("is_given"))
            weights = learned if weights is None else learned * weights
        return mean_where(error, weights) * weight

    def target(self, pipe: BasePipeline, velocity: Tensor, timestep: Tensor, **inputs) -> Tensor:
        """The velocity (B, …) to learn at timesteps (B,) in [0, 1000]; `velocity` is ε - x₀ (B, …).

        Args:
            inputs: Among them the noisy `latents` (B, …).
        """
        return velocity

    def sample_timesteps(
        self, scheduler: FlowMatchScheduler, rng: SampleRNG | GlobalRNG, dtype: torch.dtype = torch.bfloat16
    ) -> tuple[Tensor, Tensor]:
        """Random timesteps (B,) in [0, 1000] and their noise levels (B,) in [0, 1].

        Args:
            dtype: The dtype that `exact_upstream` rounds timesteps to.
        """
        sigma = self.timesteps(scheduler, rng.uniform("timestep"))
        timestep = sigma * TRAINING_STEPS
        if not self.exact_upstream:
            return timestep, sigma
        rounded = timestep.to(dtype).float()
        return rounded, scheduler.sigma(rounded)


def learned_frames(videos: Tensor, count: int, is_given: Tensor | None) -> Tensor:
    """Weights (B, 1, T, 1, 1) of the frames of videos (B, C, T, h, w): 0 for the first `count` where they are given.

    `is_given` (B,) is bool; None gives all samples theirs.
    """
    weights = videos.new_ones(len(videos), 1, videos.shape[2], 1, 1)
    if is_given is None:
        weights[:, :, :count] = 0
    else:
        weights[is_given, :, :count] = 0
    return weights


def mean_where(values: Tensor, weights: Tensor | None) -> Tensor:
    """Mean (B,) of values (B, C, …) by weights (B, 1, …) of like rank; the plain mean without, 0 if all are 0."""
    if weights is None:
        return values.flatten(1).mean(1)
    weights = weights.float().expand_as(values).flatten(1)
    return (values.flatten(1) * weights).sum(1) / weights.sum(1).clamp_min(SMALLEST)


FlowMatchSFTLoss = FlowMatchSFT()  # DiffSynth-Studio's name: a function with its timesteps and weighting
