"""A discriminator: small heads on the features that layers of a frozen diffusion network compute.

Sauer et al. 2023, "Adversarial Diffusion Distillation" (https://arxiv.org/abs/2311.17042), put the heads on DINO's
features of images. Sauer et al. 2024, "Fast High-Resolution Image Synthesis with Latent Adversarial Diffusion
Distillation" (https://arxiv.org/abs/2403.12015), put them on the teacher's features of renoised latents. This file does
the latter: it needs no further network and no pixels, and the features depend on the prompt and the noise level.
"""

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from ...core.gradient import repeated_lists
from ...core.ranges import LearningRate, Width
from ..flow_match import TRAINING_STEPS

if TYPE_CHECKING:
    from .roles import Roles


@dataclass(frozen=True, kw_only=True)
class Discriminator:
    """D_k(x_σ) = mean over tokens of h_k(F_k(x_σ, σ)), with a head h_k for the features F_k of each of several layers.

    Args:
        layers: Names of layers whose outputs are tokens (B, L, D); None takes the network's blocks at 1/4, 2/4 and 3/4
            of its depth.
        hidden: Width of the heads' hidden layer; 256 is a guess.
        learning_rate: Learning rate of the heads; None takes the student's.
    """

    layers: Sequence[str] | None = None
    hidden: Width = 256
    learning_rate: LearningRate | None = None

    def heads(self, network: nn.Module, seed: int) -> "Heads":
        """New heads, one for each layer; their initial values depend on `seed` alone. Works on the meta device.

        Raises:
            ValueError: The network has no such layer, or does not declare its blocks or its width.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return Heads(self._layers_of(network), _width(network), self.hidden)

    def _layers_of(self, network: nn.Module) -> list[str]:
        if self.layers is None:
            return _blocks_at_quarters(network)
        known = [name for name, _ in network.named_modules()]
        for name in self.layers:
            if name not in known:
                nearest = " or ".join(difflib.get_close_matches(name, known, 3))
                hint = f"did you mean {nearest}?" if nearest else "null chooses four of its blocks."
                raise ValueError(f"task.discriminator.layers: {type(network).__name__} has no layer {name!r}; {hint}")
        return list(self.layers)


class Heads(nn.ModuleList):
    """K heads, which compute logits (B, K), fp32, from the features (B, L, D) of K layers.

    Args:
        layers: Names of the K layers.
        width: Width D of the features.
        hidden: Width of the heads' hidden layer.
    """

    def __init__(self, layers: Sequence[str], width: int, hidden: Width):
        super().__init__(_head(width, hidden) for _ in layers)
        self.layers, self.width = list(layers), width

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        return torch.cat([head(x.float()).mean(1) for head, x in zip(self, features, strict=True)], dim=1).float()


def _head(width: int, hidden: Width) -> nn.Module:
    normalised = nn.LayerNorm(width, elementwise_affine=False)
    return nn.Sequential(normalised, nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, 1)).float()


def _width(network: nn.Module) -> int:
    """Width of the tokens: diffusers' networks state it by one of several names, or as heads and their width."""
    if hasattr(network, "inner_dim"):
        return network.inner_dim
    config = getattr(network, "config", {})
    for names in (("dim",), ("hidden_size",), ("num_attention_heads", "attention_head_dim")):
        if all(config.get(name) for name in names):
            return math.prod(config[name] for name in names)
    raise ValueError(f"{type(network).__name__} does not state inner_dim, the width of the tokens for a discriminator.")


def _blocks_at_quarters(network: nn.Module) -> list[str]:
    """Names of the blocks at 1/4, 2/4 and 3/4 of a network's depth.

    One or two lists of blocks run one after another. Of more, some refine an input or belong to one that may be absent;
    the longest is then the depth.
    """
    lists = repeated_lists(network)
    if not lists:
        raise ValueError(
            f"{type(network).__name__} does not say which blocks it repeats; name those that the discriminator reads "
            "in task.discriminator.layers."
        )
    depth = lists if len(lists) <= 2 else [max(reversed(lists), key=lambda name: len(lists[name]))]
    blocks = [f"{name}.{number}" for name in depth for number in range(len(lists[name]))]
    return list(dict.fromkeys(blocks[len(blocks) * quarters // 4] for quarters in (1, 2, 3)))


@contextmanager
def features(network: nn.Module, layers: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Inside, the outputs of these layers are collected by name, each from its first call.

    Recomputation under gradient checkpointing calls a layer again, which changes nothing. If a block returns (text,
    image), the image tokens are collected; if it returns one sequence of both, all of it.
    """
    outputs = {}

    def collect(name: str, layer: nn.Module, inputs: tuple, output: Tensor | tuple[Tensor, ...]) -> None:
        outputs.setdefault(name, output[-1] if isinstance(output, tuple) else output)

    hooks = [network.get_submodule(name).register_forward_hook(partial(collect, name)) for name in layers]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def logits(roles: "Roles", role: str, latents: Tensor, sigma: Tensor, inputs: Mapping, trained: bool = False) -> Tensor:
    """Logits (B, K), fp32, of the heads on `role`'s features of latents (B, …) at noise levels (B,) in [0, 1].

    Args:
        inputs: The network's other inputs.
        trained: If true, gradients reach the heads alone; else they reach the latents alone.

    Raises:
        ValueError: The output of a layer is no sequence of tokens.
    """
    heads = roles.heads
    with (
        torch.set_grad_enabled(torch.is_grad_enabled() and not trained),
        roles.active(role) as network,
        features(network, heads.layers) as outputs,
    ):
        roles.pipe.predict(sigma * TRAINING_STEPS, **{**inputs, "latents": latents})
    tokens = [_tokens(outputs, name, heads.width, len(latents)) for name in heads.layers]
    weights = {name: weight if trained else weight.detach() for name, weight in heads.named_parameters()}
    return functional_call(heads, weights, (tokens,))


def _tokens(outputs: Mapping[str, Tensor], name: str, width: int, batch_size: int) -> Tensor:
    """The output of a layer as tokens (B, L, D)."""
    shape = tuple(outputs[name].shape) if name in outputs else ()
    if len(shape) != 3 or shape[-1] != width:
        raise ValueError(
            f"task.discriminator.layers: the output of {name!r} is {shape or 'nothing'}, expected tokens "
            f"(B, L, {width}); name whole blocks of the network, such as transformer_blocks.0."
        )
    return outputs[name] if shape[0] == batch_size else outputs[name].transpose(0, 1)  # ERNIE-Image's blocks: (L, B, D)


# Losses (B,) from logits (B, K), each the mean over the K heads -------------------------------------------------------


def generator_hinge(fake: Tensor) -> Tensor:
    """Generator's hinge loss (B,), -D(fake); ADD, Eq. 2."""
    return -fake.mean(1)


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Discriminator's hinge loss (B,), max(0, 1 - D(real)) + max(0, 1 + D(fake)); ADD, Eq. 3 without its penalty R1."""
    return (F.relu(1 - real) + F.relu(1 + fake)).mean(1)


def generator_softplus(fake: Tensor) -> Tensor:
    """Generator's non-saturating loss (B,), -log sigmoid D(fake).

    Goodfellow et al. 2014, "Generative Adversarial Nets" (https://arxiv.org/abs/1406.2661).
    """
    return F.softplus(-fake).mean(1)


def softplus_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Discriminator's cross-entropy (B,), -log sigmoid D(real) - log(1 - sigmoid D(fake))."""
    return (F.softplus(-real) + F.softplus(fake)).mean(1)
