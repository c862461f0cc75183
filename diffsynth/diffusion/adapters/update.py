"""The tensors of one layer's update, by peft's names.

The weight W becomes W + B A (LoRA), W + (A₁ B₁) ∘ (A₂ B₂) (LoHa) or W + W₁ ⊗ W₂ (LoKr).
"""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Parts = dict[str, Tensor]
NAME = re.compile(r"(.*)\.((?:lora|hada|lokr)_.*)")

# For each list of a kind, an update has all parts of one of its sets.
GROUPS = {
    "LORA": ([{"lora_A.weight"}], [{"lora_B.weight"}]),
    "LOHA": ([{"hada_w1_a"}], [{"hada_w1_b"}], [{"hada_w2_a"}], [{"hada_w2_b"}]),
    "LOKR": ([{"lokr_w1"}, {"lokr_w1_a", "lokr_w1_b"}], [{"lokr_w2"}, {"lokr_w2_a", "lokr_w2_b"}]),
}
LINEAR = ("lora_B.weight", "hada_w1_a", "lokr_w1", "lokr_w1_a")  # the update is proportional to one of these
PRODUCTS = (
    ("lora_B.weight", "lora_A.weight"),
    *((f"{matrix}_a", f"{matrix}_b") for matrix in ("hada_w1", "hada_w2", "lokr_w1", "lokr_w2")),
)
ROWS = ("lora_B.weight", "lora_magnitude_vector", "hada_w1_a", "hada_w2_a", "lokr_w1", "lokr_w1_a")
RANKS = ("lora_A.weight", "hada_w1_b", "lokr_w2_b", "lokr_w1_b")  # their first dimension is the rank


def by_layer(tensors: Mapping[str, Tensor]) -> dict[str, Parts]:
    """An adapter's tensors by layer and part; what is no part stands alone, under its own name."""
    layers: dict[str, Parts] = {}
    for key, tensor in tensors.items():
        layer, part = found.groups() if (found := NAME.fullmatch(key)) else (key, "")
        layers.setdefault(layer, {})[part] = tensor
    return layers


def kind(parts: Mapping[str, Tensor]) -> str:
    """`LORA`, `LOHA` or `LOKR`, by the first part's name."""
    return {"lora": "LORA", "hada": "LOHA", "lokr": "LOKR"}[next(iter(parts)).split("_")[0]]


def missing(parts: Mapping[str, Tensor]) -> list[str]:
    """The parts that the update lacks; of a matrix that may be whole or a product, the name of the whole one."""
    groups = GROUPS[kind(parts)]
    return [min(choices[0]) for choices in groups if not any(choice <= parts.keys() for choice in choices)]


def unmatched(parts: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """Names of two matrices whose ranks differ, so that they have no product."""
    present = (pair for pair in PRODUCTS if parts.keys() >= {*pair})
    return next((pair for pair in present if parts[pair[0]].shape[1] != parts[pair[1]].shape[0]), None)


def rank(parts: Mapping[str, Tensor]) -> int | None:
    """Rank of the update; None if all its matrices are whole."""
    return next((parts[name].shape[0] for name in RANKS if name in parts and parts[name].dim()), None)


def left_size(parts: Mapping[str, Tensor]) -> tuple[int, int]:
    """Shape of the first matrix of a Kronecker product."""
    whole = parts.get("lokr_w1")
    return tuple(whole.shape) if whole is not None else (parts["lokr_w1_a"].shape[0], parts["lokr_w1_b"].shape[1])


def size(parts: Mapping[str, Tensor]) -> tuple[int, int]:
    """Outputs and inputs of the layer that the update fits; a convolution's inputs are those of one position."""
    named = {name: tuple(tensor.flatten(1).shape) for name, tensor in parts.items() if tensor.dim() > 1}
    if kind(parts) == "LORA":
        return named["lora_B.weight"][0], named["lora_A.weight"][1]
    if kind(parts) == "LOHA":
        return named["hada_w1_a"][0], named["hada_w1_b"][1]
    whole = [named.get(f"lokr_w{n}") or (named[f"lokr_w{n}_a"][0], named[f"lokr_w{n}_b"][1]) for n in "12"]
    return whole[0][0] * whole[1][0], whole[0][1] * whole[1][1]


def scaled(parts: Mapping[str, Tensor], factor: float) -> Parts:
    """The parts of the update times a factor; the scaled part is fp32, because bf16 would round it."""
    name = next((name for name in LINEAR if name in parts), None)
    if factor == 1 or name is None:
        return dict(parts)
    return {**parts, name: parts[name].float() * factor}


def scaled_layers(tensors: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]:
    """The tensors of an adapter, under peft's names, whose updates are multiplied by a factor."""
    layers = {layer: scaled(parts, factor) for layer, parts in by_layer(tensors).items()}
    return {f"{layer}.{part}": tensor for layer, parts in layers.items() for part, tensor in parts.items()}


def with_halves_swapped(parts: Parts) -> Parts:
    """The update of a layer whose outputs have their halves in the other order."""
    rows = [name for name in ROWS if name in parts and parts[name].dim()]
    return {**parts, **{name: torch.cat(parts[name].chunk(2)[::-1]) for name in rows}}


def split(parts: Parts, sizes: Sequence[int]) -> list[Parts]:
    """The updates of layers of some sizes (numbers of outputs), which share a fused layer's outputs in this order.

    Raises:
        ValueError: A part's rows cannot be divided so, as in a Kronecker product whose first matrix has too few.
    """
    rows, total = [name for name in ROWS if name in parts], sum(sizes)
    whole = {
        name: parts[name].dim() and all(parts[name].shape[0] * size % total == 0 for size in sizes) for name in rows
    }
    if undivided := [name for name in rows if not whole[name]]:
        raise ValueError(
            f"{undivided[0]} has shape {tuple(parts[undivided[0]].shape)}, which {len(sizes)} layers cannot share"
        )
    shares = {name: parts[name].split([len(parts[name]) * size // total for size in sizes]) for name in rows}
    return [{**parts, **{name: shares[name][number] for name in rows}} for number in range(len(sizes))]
