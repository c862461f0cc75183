"""What a family is compared with: its training grid, a loss by hand, files of other programs, its released size."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from families import Family
from miniatures.requests import GUIDED, REQUEST, sampled
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.testing import assert_close

from diffsynth.core.data import SampleAddress
from diffsynth.core.loader import build_module, save_safetensors
from diffsynth.diffusion.adapters import files
from diffsynth.diffusion.adapters.lora import LoRA
from diffsynth.diffusion.architectures import architectures
from diffsynth.diffusion.base_pipeline import BasePipeline
from diffsynth.diffusion.flow_match import FlowMatchScheduler
from diffsynth.diffusion.loss import FlowMatchSFT
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
    """Compare a loss with w(σ) · mean ‖v - (ε - x₀)‖² of `velocity(dit, x_σ, σ, text)`, called as diffusers does.

    `text` are the inputs that the family's units make of a prompt, by name.
    """
    pipe, rng = family.load(), SampleRNG(0, [SampleAddress(0, 3)])
    _, text, _ = pipe.prepare([REQUEST])
    pipe.scheduler.set_timesteps(1000, training=True)
    clean = torch.randn(pipe.latents.shape(32, 32), generator=torch.Generator().manual_seed(0))
    found = FlowMatchSFT()(pipe, rng=rng, input_latents=clean, **text)

    level, sigmas, noise = int(1000 * rng.uniform("timestep")), pipe.scheduler.sigmas, rng.normal("noise", clean)
    sigma, bell = sigmas[level], torch.exp(-2 * (sigmas - 0.5) ** 2)
    weights = (bell - bell.min()) * 1000 / (bell - bell.min()).sum()
    predicted = velocity(pipe.dit, (1 - sigma) * clean + sigma * noise, sigma[None], text)
    assert_close(found, (predicted - (noise - clean)).pow(2).mean()[None] * weights[level])


def assert_diffusers_samples_an_export(family: Family, folder: Path, strength: float = 0.3) -> None:
    """Compare the latents that we and that diffusers sample with an adapter file in the default format."""
    file, pipe = exported(family, folder, strength), family.load()
    noise, before = pipe.prepare([GUIDED])[0]["noise"], sampled(pipe, GUIDED)
    pipe.load_lora("dit", file)
    found = sampled(pipe, GUIDED)
    assert (found - before).abs().max() > 1e-2
    assert_close(found, family.reference([GUIDED], noise, file), atol=1e-4, rtol=0)


def with_config(family: Family, component: str, folder: Path, **changes) -> Family:
    """The family with a component whose config.json has other values; its weights are zeros in a folder."""
    config = json.loads((family.folder() / family.parts[component] / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    shapes = build_module([], config).state_dict()
    save_file({name: torch.zeros(tensor.shape) for name, tensor in shapes.items()}, folder / "model.safetensors")
    return with_part(family, component, folder)


def with_part(family: Family, component: str, folder: Path) -> Family:
    """The family with a component from another folder."""
    return replace(family, parts=family.parts | {component: str(folder)})


def exported(family: Family, folder: Path, strength: float) -> Path:
    """The adapter file of a training in the default format; its matrices have a standard deviation of `strength`."""
    module = family.module(lora=LoRA(rank=RANK, alpha=ALPHA)).load()
    generator = torch.Generator().manual_seed(0)
    for parameter in module.trainable_parameters():
        parameter.data = strength * torch.randn(parameter.shape, generator=generator)
    tensors, metadata = module.export_weights("common")["lora"]
    save_safetensors(tensors, folder / "lora.safetensors", metadata)
    return folder / "lora.safetensors"


def assert_kohyas_file_is_read(pipe: BasePipeline, name: str, *layers: str, network="dit", folder: Path) -> Path:
    """Compare the update that is read from a file whose alpha is not its rank, for layers that `name` fuses."""
    weights = [getattr(pipe, network).get_submodule(layer).weight for layer in layers]
    up, down = torch.randn(sum(map(len, weights)), RANK), torch.randn(RANK, weights[0].shape[1])
    tensors = {"lora_up.weight": up, "lora_down.weight": down, "alpha": torch.tensor(ALPHA)}
    file = folder / f"{name}.safetensors"
    save_file({f"{name}.{part}": tensor for part, tensor in tensors.items()}, file)
    read = files.read(file, pipe.layer_names(network), getattr(pipe, network))
    updates = [read[f"{layer}.lora_B.weight"] @ read[f"{layer}.lora_A.weight"] for layer in layers]
    assert_close(torch.cat(updates), ALPHA / RANK * up @ down)
    return file


def with_random_weights(kind: type[nn.Module], **sizes: int) -> nn.Module:
    """A network of some size, which its own initialisation would take long to fill."""
    torch.manual_seed(0)
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
