"""What a family is compared with: its training grid, a loss by hand, files of other programs, its released size."""

from collections.abc import Callable
from pathlib import Path

import torch
from families import Family
from safetensors.torch import save_file
from test_family_contract import GUIDED, REQUEST, sampled
from torch import Tensor, nn
from torch.testing import assert_close

from diffsynth.core.data import SampleAddress
from diffsynth.core.loader import build_module, save_safetensors
from diffsynth.diffusion.adapters.lora import LoRA
from diffsynth.diffusion.base_pipeline import BasePipeline
from diffsynth.diffusion.flow_match import FlowMatchScheduler
from diffsynth.diffusion.loss import FlowMatchSFT
from diffsynth.diffusion.pipeline.architectures import architectures
from diffsynth.diffusion.randomness import SampleRNG

LEVELS = [0, 1, 250, 500, 750, 998, 999]
RANK, ALPHA = 2, 6.0


def assert_training_grid(pipeline: type[BasePipeline], sigmas: list[float], weights: list[float]) -> None:
    """Compare the noise levels and loss weights at `LEVELS` of the training grid."""
    scheduler = FlowMatchScheduler(pipeline.sigma_grid)
    scheduler.set_timesteps(1000, training=True)
    assert_close(scheduler.sigmas[LEVELS], torch.tensor(sigmas), atol=2e-6, rtol=0)
    assert_close(scheduler.training_weight(scheduler.timesteps)[LEVELS], torch.tensor(weights), atol=2e-6, rtol=0)


def assert_loss_by_hand(family: Family, velocity: Callable[..., Tensor]) -> None:
    """Compare a loss with w(σ) · mean ‖v - (ε - x₀)‖² of `velocity(dit, x_σ, σ, text)`, called as diffusers does."""
    pipe, rng = family.load(), SampleRNG(0, [SampleAddress(0, 3)])
    _, text, _ = pipe.prepare([REQUEST])
    pipe.scheduler.set_timesteps(1000, training=True)
    clean = torch.randn(pipe.latents.shape(32, 32), generator=torch.Generator().manual_seed(0))
    found = FlowMatchSFT()(pipe, rng=rng, input_latents=clean, **text)

    level, sigmas, noise = int(1000 * rng.uniform("timestep")), pipe.scheduler.sigmas, rng.normal("noise", clean)
    sigma, bell = sigmas[level], torch.exp(-2 * (sigmas - 0.5) ** 2)
    weights = (bell - bell.min()) * 1000 / (bell - bell.min()).sum()
    predicted = velocity(pipe.dit, (1 - sigma) * clean + sigma * noise, sigma[None], text["prompt_emb"])
    assert_close(found, (predicted - (noise - clean)).pow(2).mean()[None] * weights[level])


def assert_diffusers_samples_an_export(family: Family, folder: Path) -> None:
    """Compare the latents that we and that diffusers sample with an adapter file in the default format."""
    file, pipe = exported(family, folder), family.load()
    noise, before = pipe.prepare([GUIDED])[0]["noise"], sampled(pipe, GUIDED)
    pipe.load_lora("dit", file)
    found = sampled(pipe, GUIDED)
    assert (found - before).abs().max() > 1e-2
    assert_close(found, family.reference([GUIDED], noise, file), atol=1e-4, rtol=0)


def exported(family: Family, folder: Path) -> Path:
    """The adapter file of a training, whose matrices are random, in the default format."""
    module = family.module(lora=LoRA(rank=RANK, alpha=ALPHA)).load()
    generator = torch.Generator().manual_seed(0)
    for parameter in module.trainable_parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    tensors, metadata = module.export_weights("common")["lora"]
    save_safetensors(tensors, folder / "lora.safetensors", metadata)
    return folder / "lora.safetensors"


def kohya_file(layer: nn.Module, name: str, folder: Path) -> tuple[Path, Tensor]:
    """A file of kohya's programs with one layer, whose alpha is not its rank, and the layer's update."""
    up, down = torch.randn(layer.weight.shape[0], RANK), torch.randn(RANK, layer.weight.shape[1])
    tensors = {"lora_up.weight": up, "lora_down.weight": down, "alpha": torch.tensor(ALPHA)}
    save_file({f"lora_unet_{name}.{part}": tensor for part, tensor in tensors.items()}, folder / f"{name}.safetensors")
    return folder / f"{name}.safetensors", ALPHA / RANK * up @ down


def with_random_weights(kind: type[nn.Module], **sizes: int) -> nn.Module:
    """A network of some size, which its own initialisation would take long to fill."""
    with torch.device("meta"):
        network = kind(**sizes)
    network = network.to_empty(device="cpu").requires_grad_(False)
    for parameter in network.parameters():
        parameter.normal_(std=0.02)
    return network


def parameters(repository: str, component: str = "transformer") -> int:
    """The number of parameters of a released network, by the configuration that plans of it have."""
    module = build_module([], architectures()[repository][component])
    return sum(parameter.numel() for parameter in module.parameters())
