"""Two Gaussians in the plane as a model family of its own: its velocity is known, and sampling takes milliseconds."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffsynth.diffusion.base_pipeline import BasePipeline
from diffsynth.diffusion.pipeline.components import Network
from diffsynth.diffusion.pipeline.request import ImageRequest
from diffsynth.diffusion.pipeline.vae import Latents

MODES = torch.tensor([[-2.0, -1.0], [2.0, 1.0]])
WIDTH = 0.2


class Field(nn.Module):
    """A small network of (x, σ) beside the velocity that it starts from, of a mixture of Gaussians at `MODES`."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        seen = torch.cat([x, torch.stack([sigma, torch.cos(3 * sigma), torch.sin(3 * sigma)], dim=1)], dim=1)
        return mixture_velocity(x, sigma) + self.layers(seen)


def mixture_velocity(x: Tensor, sigma: Tensor) -> Tensor:
    """E[ε - x₀ | x_σ = x] (B, 2) of equal Gaussians N(m, w²) at the rows m of `MODES`."""
    sigma = sigma[:, None, None]
    variance = ((1 - sigma) * WIDTH) ** 2 + sigma**2  # of x_σ around (1 - σ) m
    apart = x[:, None] - (1 - sigma) * MODES
    which = torch.softmax(-apart.pow(2).sum(-1, keepdim=True) / (2 * variance), dim=1)
    noise = sigma * apart / variance
    clean = MODES + (1 - sigma) * WIDTH**2 * apart / variance
    return (which * (noise - clean)).sum(1)


@dataclass(kw_only=True)
class ToyRequest(ImageRequest):
    num_inference_steps: int = 40


class ToyPipeline(BasePipeline):
    """Samples points (B, 2, 1, 1) instead of images."""

    request = ToyRequest
    components = {"dit": Network("Field", lora="transformer")}
    latents = Latents(channels=2, factor=1)
    unit_classes = ()
    decoding_models = ()

    def __init__(self):
        super().__init__("cpu", torch.float32)
        self.dit = Field()
        self.progress_bar = iter

    @staticmethod
    def model_fn(dit: Field, latents: Tensor, timestep: Tensor) -> Tensor:
        return dit(latents[..., 0, 0], timestep / 1000)[..., None, None]

    @staticmethod
    def sigma_grid(num_inference_steps: int, denoising_strength: float = 1.0) -> Tensor:
        return torch.linspace(1, 0, num_inference_steps + 1)[:-1]

    def points(self, count: int, settings: dict, seed: int = 0) -> Tensor:
        """Sampled points (count, 2), from the noise of one generator."""
        noise = torch.randn(count, 2, 1, 1, generator=torch.Generator().manual_seed(seed))
        with self.sampling_steps(settings):
            shared = {
                "latents": noise,
                "cfg_scale": 1,
                "sampler": settings.get("sampler", "euler"),
                "seed": [*range(count)],
            }
            return self.denoise(shared, {}, {})[..., 0, 0]
