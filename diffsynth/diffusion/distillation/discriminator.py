"""A discriminator that tells pictures by what a frozen network's own layers make of them.

Sauer et al. 2023, "Adversarial Diffusion Distillation" (https://arxiv.org/abs/2311.17042), put light heads on DINO's
features of images; Sauer et al. 2024, "Fast High-Resolution Image Synthesis with Latent Adversarial Diffusion
Distillation" (https://arxiv.org/abs/2403.12015), on the teacher's own features of renoised latents. The latter is done
here: it takes neither a further network nor pixels, and the features know the prompt and the noise level.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from ..flow_match import TRAINING_STEPS


@dataclass(frozen=True, kw_only=True)
class Discriminator:
    """D_k(x_σ) = mean over tokens of h_k(F_k(x_σ, σ)): a head h_k on the features F_k of each of a network's layers.

    Args:
        layers: Names of layers that put out tokens (B, L, D); None takes the network's blocks after 1/4, 2/4 and 3/4.
        hidden: Width of the heads.
        learning_rate: None takes the student's.
    """

    layers: Sequence[str] | None = None
    hidden: int = 256
    learning_rate: float | None = None

    def heads(self, network: nn.Module, seed: int) -> "Heads":
        """One head for each layer, the same for the same seed; works on the meta device.

        Raises:
            ValueError: A layer that the network does not have, a network that does not say its blocks or its width.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return Heads(self._layers_of(network), _width(network), self.hidden)

    def _layers_of(self, network: nn.Module) -> list[str]:
        if self.layers is None:
            return _spread(network)
        known = [name for name, _ in network.named_modules()]
        for name in self.layers:
            if name not in known:
                nearest = difflib.get_close_matches(name, known, 3)
                raise ValueError(
                    f"task.discriminator.layers: {type(network).__name__} has no layer {name!r}; nearest: {nearest}."
                )
        return list(self.layers)


class Heads(nn.ModuleList):
    """Logits (B, K), fp32, of the features (B, L, D) of K layers, each layer's by a head of its own.

    Args:
        layers: Their names.
        width: D.
    """

    def __init__(self, layers: Sequence[str], width: int, hidden: int):
        super().__init__(_head(width, hidden) for _ in layers)
        self.layers, self.width = list(layers), width

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        return torch.cat([head(x.float()).mean(1) for head, x in zip(self, features, strict=True)], dim=1).float()


def _head(width: int, hidden: int) -> nn.Module:
    normalised = nn.LayerNorm(width, elementwise_affine=False)
    return nn.Sequential(normalised, nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, 1)).float()


def _width(network: nn.Module) -> int:
    if not hasattr(network, "inner_dim"):
        raise ValueError(
            f"{type(network).__name__} has no inner_dim, the width of the tokens that a discriminator reads."
        )
    return network.inner_dim


def _spread(network: nn.Module) -> list[str]:
    kinds = getattr(network, "_repeated_blocks", None) or ()
    blocks = [name for name, module in network.named_modules() if type(module).__name__ in kinds]
    if not blocks:
        raise ValueError(
            f"{type(network).__name__} does not say which blocks it repeats; name those that the discriminator reads "
            "in task.discriminator.layers."
        )
    return list(dict.fromkeys(blocks[len(blocks) * quarters // 4] for quarters in (1, 2, 3)))


@contextmanager
def features(network: nn.Module, layers: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """What layers put out, by name, when the network first predicts inside; recomputing them changes nothing.

    Of a block's outputs (text, image) it is the image tokens; where both are one sequence, all of it.
    """
    found = {}

    def keep(name: str, layer: nn.Module, inputs: tuple, output: Tensor | tuple[Tensor, ...]) -> None:
        found.setdefault(name, output[-1] if isinstance(output, tuple) else output)

    hooks = [network.get_submodule(name).register_forward_hook(partial(keep, name)) for name in layers]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def logits(roles, role: str, latents: Tensor, sigma: Tensor, inputs: Mapping, trained: bool = False) -> Tensor:
    """Logits (B, K), fp32, of the roles' heads on what `role` makes of latents (B, …) at noise levels (B,) in [0, 1].

    Args:
        inputs: The network's others, as an objective gets them.
        trained: Gradients reach the heads alone; else the latents alone.

    Raises:
        ValueError: A layer puts out no tokens.
    """
    heads = roles.heads
    with (
        torch.set_grad_enabled(torch.is_grad_enabled() and not trained),
        roles.active(role) as network,
        features(network, heads.layers) as found,
    ):
        roles.pipe.predict(sigma * TRAINING_STEPS, **{**inputs, "latents": latents})
    tokens = [_tokens(found, name, heads.width) for name in heads.layers]
    weights = {name: weight if trained else weight.detach() for name, weight in heads.named_parameters()}
    return functional_call(heads, weights, (tokens,))


def _tokens(found: Mapping[str, Tensor], name: str, width: int) -> Tensor:
    shape = tuple(found[name].shape) if name in found else ()
    if len(shape) != 3 or shape[-1] != width:
        raise ValueError(
            f"task.discriminator.layers: {name!r} puts out {shape or 'nothing'}, expected tokens (B, L, {width}); "
            "choose whole blocks."
        )
    return found[name]


# Losses (B,) of logits (B, K), means over the heads -------------------------------------------------------------------


def generator_hinge(fake: Tensor) -> Tensor:
    """-D(fake); ADD, Eq. 2."""
    return -fake.mean(1)


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """max(0, 1 - D(real)) + max(0, 1 + D(fake)); ADD, Eq. 3 without its gradient penalty."""
    return (F.relu(1 - real) + F.relu(1 + fake)).mean(1)


def generator_softplus(fake: Tensor) -> Tensor:
    """-log sigmoid D(fake), the non-saturating loss; Goodfellow et al. 2014 (https://arxiv.org/abs/1406.2661)."""
    return F.softplus(-fake).mean(1)


def softplus_loss(real: Tensor, fake: Tensor) -> Tensor:
    """-log sigmoid D(real) - log(1 - sigmoid D(fake))."""
    return (F.softplus(-real) + F.softplus(fake)).mean(1)
