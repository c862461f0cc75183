"""Released networks with random weights, and samples as a cache would hold them: nothing is downloaded."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor, nn

from diffsynth.core.data import Row, TrainingData
from diffsynth.core.loader import load_weights
from diffsynth.core.memory.storage import stored_layers
from diffsynth.diffusion.pipeline import networks

DEVIATION = 0.02  # of the weights; a guess: activations stay finite
TILE = 1 << 20  # random numbers that a weight repeats, because a CPU would take minutes for 20 billion; a guess


@contextmanager
def random_weights() -> Iterator[None]:
    """Inside, pipelines on the meta device load random weights instead of files."""
    with mock.patch.object(networks, "load_weights", randomised):
        yield


def randomised(
    module: nn.Module, files: None, dtype: torch.dtype, device: torch.device | str, storage: str = "none"
) -> nn.Module:
    """Do what `load_weights` does, with random values; buffers, which the constructor computed, stay."""
    buffers = {name: buffer for name, buffer in module.named_buffers() if not buffer.is_meta}
    load_weights(module, files, dtype, device, storage)
    for name, buffer in module.named_buffers():
        if name in buffers:
            buffer.copy_(buffers[name])
    encoded: dict[tuple[int, int], dict[str, Tensor]] = {}
    for layer in stored_layers(module).values():
        shape = layer.out_features, layer.in_features
        if shape not in encoded:
            encoded[shape] = layer.encode(filled(torch.empty(shape, dtype=dtype, device=device)))
        for part, value in encoded[shape].items():
            getattr(layer, part).data.copy_(value)
    for parameter in module.parameters():
        if parameter.is_floating_point():
            filled(parameter.data)
    return module


def filled(tensor: Tensor) -> Tensor:
    """Fill a tensor of any shape with normal numbers, and return it."""
    tile = torch.randn(TILE, device=tensor.device).mul_(DEVIATION).to(tensor.dtype)
    flat = tensor.view(-1)
    whole = len(flat) // TILE * TILE
    flat[:whole].view(-1, TILE).copy_(tile.expand(whole // TILE, -1))
    flat[whole:].copy_(tile[: len(flat) - whole])
    return tensor


class Samples(TrainingData):
    """A data set of these rows, whose inputs are made already."""

    needs_encoders = False

    def __init__(self, rows: Sequence[Row]):
        self.rows, self.size = rows, len(rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]


def with_random_values(row: Row, tokens: int | None = None) -> Row:
    """A planned row (all zeros) with random values; `tokens` shortens its prompt to that many."""
    made = {
        side: {name: _value(value, tokens if name.startswith("prompt_emb") else None) for name, value in inputs.items()}
        for side, inputs in row.made.items()
    }
    return Row(row, made)


def _value(zeros: Tensor, tokens: int | None) -> Tensor:
    shortened = zeros[:, :tokens]
    return torch.ones_like(shortened) if shortened.dtype == torch.bool else torch.randn_like(shortened)
