"""Rewards and metrics by a network, which is read at its first use.

Shapes: B pictures, H W their size, S the side of the network's input, all in pixels.
"""

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from ...core.input_files import all_in, describe, digest_of_all
from ...core.loader import ModelConfig
from ...core.loader.safetensors_files import read_shapes
from ...core.ranges import BatchSize, NonZero
from .base import Pictures, Reward, Rows, pixels_of


class LoadedNetwork:
    """What rewards and metrics with a network have in common; a subclass has it as `network`.

    Args:
        model: Where its files are.
        batch_size: Pictures per forward.
    """

    network: nn.Module

    def __init__(self, model: ModelConfig, batch_size: BatchSize = 16):
        self.model, self.batch_size = model, batch_size

    @cached_property
    def files(self) -> list[Path]:
        """The network's files, downloaded if they are absent."""
        return self.model.resolve()

    def find(self) -> None:
        _ = self.files

    @property
    def folder(self) -> Path:
        """Folder of the network's files."""
        return self.files[0] if self.files[0].is_dir() else self.files[0].parent

    def batched(self, embed: Callable[..., Tensor], device: torch.device, *columns: Sequence) -> Tensor:
        """Run `embed(*batch)` over all rows in batches, and concatenate its results (B, …) to (N, …) on the CPU.

        The network is on the device only meanwhile.
        """
        self.network.to(device)
        starts = range(0, len(columns[0]), self.batch_size)
        batches = [[column[start : start + self.batch_size] for column in columns] for start in starts]
        results = [embed(*batch).float().cpu() for batch in batches]
        self.network.to("cpu")
        return torch.cat(results)


class NetworkReward(LoadedNetwork, Reward):
    """Scores pictures by a network, which computes in fp32 with frozen weights. A subclass writes:

    - `network`;
    - `prepare(pixels)`: the network's input (B, 3, S, S) of pictures (B, 3, H, W) in [0, 1];
    - `score_prepared(inputs, prompts)`: the scores (B,) of that input.

    `score` has the network on the device only meanwhile. `score_pixels` leaves it there, as its gradients need it.
    """

    differentiable = True

    def __init__(self, model: ModelConfig, batch_size: BatchSize = 16, weight: NonZero = 1.0):
        LoadedNetwork.__init__(self, model, batch_size)
        Reward.__init__(self, weight)

    @cached_property
    def version(self) -> str:
        return f"{type(self).__name__} {digest_of_folder(self.folder)}"

    @property
    def network_bytes(self) -> int:
        shapes = [shape for file in self.files if file.suffix == ".safetensors" for shape in read_shapes(file).values()]
        return sum(map(math.prod, shapes)) * torch.float32.itemsize

    def prepare(self, pixels: Tensor) -> Tensor:
        raise NotImplementedError

    def score_prepared(self, inputs: Tensor, prompts: Sequence[str]) -> Tensor:
        raise NotImplementedError

    @torch.no_grad()
    def score(self, pictures: Pictures, prompts: Sequence[str], rows: Rows, device: torch.device) -> Tensor:
        def scores(some: Pictures, texts: Sequence[str]) -> Tensor:
            inputs = [self.prepare(pixels_of(picture)[None].to(device)) for picture in some]
            return self._in_fp32(torch.cat(inputs), texts)

        return self.batched(scores, device, pictures, prompts)

    def score_pixels(self, pixels: Tensor, prompts: Sequence[str], rows: Rows) -> Tensor:
        self.network.to(pixels.device)
        return self._in_fp32(self.prepare(pixels.float()), prompts)

    def _in_fp32(self, inputs: Tensor, prompts: Sequence[str]) -> Tensor:
        """The scores, without a surrounding autocast: bf16 has 3 digits, in the third of which pictures differ."""
        with torch.autocast(inputs.device.type, enabled=False):
            return self.score_prepared(inputs, prompts)


def digest_of_folder(folder: Path) -> str:
    """16 hex digits of the files in a network's folder."""
    return digest_of_all(describe(all_in(folder)))


def frozen(network: nn.Module) -> nn.Module:
    """The network in fp32, in evaluation mode, whose weights get no gradients."""
    return network.float().eval().requires_grad_(False)
