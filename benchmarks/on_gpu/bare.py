"""The shortest training loop over the same network: what our loop is compared with."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate import init_empty_weights
from peft import LoraConfig
from torch import Tensor, nn

from diffsynth.core.data import Row, collate
from diffsynth.diffusion.adapters.lora import LoRA
from diffsynth.diffusion.base_pipeline import BasePipeline
from diffsynth.diffusion.flow_match import TRAINING_STEPS, interpolate
from diffsynth.diffusion.pipeline.remembered import to_device

from .clock import Clock
from .networks import random_weights


def network_with_adapter(pipe: BasePipeline, lora: LoRA) -> list[nn.Parameter]:
    """Give the pipeline diffusers' own network, random weights and a LoRA by peft; return the LoRA's parameters."""
    root = pipe.in_iteration_models[0]
    # A new network, because the pipeline's has our attention processors.
    with init_empty_weights(include_buffers=False):
        fresh = type(pipe.network).from_config(pipe.network.config)
    setattr(pipe, root, fresh)
    with random_weights():
        pipe.load_models([root])
    fresh.add_adapter(LoraConfig(r=lora.rank, target_modules=lora.targets(pipe, root)))
    trained = [parameter for parameter in fresh.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    return trained


def train(pipe: BasePipeline, lora: LoRA, row: Row, memory: Mapping[str, bool], clock: Clock) -> float:
    """Train until the clock has what it needs, and return the mean loss.

    Args:
        row: The inputs of every step.
        memory: Arguments of `model_fn` that turn checkpointing on.
    """
    trained = network_with_adapter(pipe, lora)
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    inputs: dict[str, Any] = {**row.made["shared"], **row.made["posi"], **memory}
    step = flow_matching(pipe, collate([to_device(inputs, pipe.device)]))
    losses: list[Tensor] = []
    with clock:
        for _ in range(clock.total):
            loss = step()
            losses.append(loss.detach())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            clock.step()
    return torch.stack(losses).mean().item()


def flow_matching(pipe: BasePipeline, inputs: dict[str, Any]) -> Callable[[], Tensor]:
    """A function that returns the loss () at a random noise level."""
    clean = inputs.pop("input_latents").float()

    def loss() -> Tensor:
        noise, sigma = torch.randn_like(clean), torch.rand(1, device=pipe.device)
        with torch.autocast(pipe.device.type, torch.bfloat16, enabled=pipe.torch_dtype == torch.bfloat16):
            velocity = pipe.predict(sigma * TRAINING_STEPS, latents=interpolate(clean, noise, sigma), **inputs)
        return (velocity.float() - (noise - clean)).pow(2).mean()

    return loss
