"""Names of layers and tensors in adapter files, those of any program, and which layer of a network each one means.

A family declares its `LayerNames`; what programs put before and after a layer's name is the same for all families.
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn

from .update import Parts, rank, scaled, split, with_halves_swapped

Scale = Callable[[str, int | None], float]  # of a layer's name and its update's rank

WRAPPER = "base_model.model."  # peft's, around any model
# kohya numbers encoders by kind: te3 is the T5, also where it is the second of two.
STARTS = {
    "transformer": (
        "transformer.", "pipe.transformer.", "pipe.dit.", "dit.", "diffusion_model.", "model.diffusion_model.", "unet.",
        "lora_unet_", "lora_transformer_", "lycoris_", "pipe.vace.",
    ),
    "transformer_2": ("transformer_2.", "pipe.transformer_2.", "pipe.dit2.", "dit2."),
    "text_encoder": ("text_encoder.", "pipe.text_encoder.", "lora_te_", "lora_te1_"),
    "text_encoder_2": ("text_encoder_2.", "pipe.text_encoder_2.", "lora_te2_", "lora_te3_"),
    "text_encoder_3": ("text_encoder_3.", "pipe.text_encoder_3.", "lora_te3_"),
    "text_conditioner": (  # Anima's, which other programs have inside the transformer
        "text_conditioner.", "pipe.text_conditioner.", "diffusion_model.llm_adapter.", "pipe.dit.llm_adapter.",
        "llm_adapter.", "lora_unet_llm_adapter_",
    ),
}  # fmt: skip
ENDINGS = {
    ".lora_A.weight": "lora_A.weight",
    ".lora_A": "lora_A.weight",
    ".lora_down.weight": "lora_A.weight",
    ".lora.down.weight": "lora_A.weight",
    "_lora.down.weight": "lora_A.weight",
    ".lora_linear_layer.down.weight": "lora_A.weight",
    ".lora_B.weight": "lora_B.weight",
    ".lora_B": "lora_B.weight",
    ".lora_up.weight": "lora_B.weight",
    ".lora.up.weight": "lora_B.weight",
    "_lora.up.weight": "lora_B.weight",
    ".lora_linear_layer.up.weight": "lora_B.weight",
    ".lora_magnitude_vector": "lora_magnitude_vector",
    ".lora_magnitude_vector.weight": "lora_magnitude_vector",
    ".dora_scale": "lora_magnitude_vector",
    **{f".hada_w{n}_{side}": f"hada_w{n}_{side}" for n in "12" for side in "ab"},
    **{f".lokr_w{n}{side}": f"lokr_w{n}{side}" for n in "12" for side in ("", "_a", "_b")},
    ".alpha": "alpha",
}


@dataclass(frozen=True, kw_only=True)
class LayerNames:
    """How adapter files name a network and its layers.

    Args:
        prefix: diffusers' name of the network, such as `transformer`.
        comfyui: ComfyUI's prefix of layers that `original` does not list; None takes `prefix` and a dot.
        common: The format whose names the format `common` takes: the one that most programs read. `original` is the
            names of `comfyui` without a tensor `alpha`, which diffusers' converter of some families takes amiss.
        studio: Whose names of layers DiffSynth-Studio has: those here, or those of `original`.
        original: Names of layers in the model's original code, with `*` for a block's number, and the layers here that
            each stands for. Several layers share the outputs of a fused one, in this order.
        swapped: The names in `original` of layers whose outputs here have their halves in the other order.
        others: Prefixes of the model's other networks, whose layers a file may have as well.
        shared: Prefix of the network whose names files have for this one as well; None if it has names of its own.
    """

    prefix: str
    comfyui: str | None = None
    common: Literal["comfyui", "original", "diffusers"] = "diffusers"
    studio: Literal["original", "diffusers"] = "diffusers"
    original: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    swapped: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    shared: str | None = None

    @property
    def written(self) -> str:
        """diffusers' name of the network in files that are written."""
        return self.shared or self.prefix

    def read_as(self, keys: Iterable[str]) -> str:
        """The name of the network in a file with these keys."""
        named = {owner(key, (self.prefix, *self.others)) for key in keys}
        return self.prefix if self.prefix in named else self.written

    def is_swapped(self, name: str) -> bool:
        """Whether a layer's name in a file says that the halves of its outputs are in the other order."""
        return _flat(name.removeprefix("diffusion_model.")) in map(_flat, self.swapped)

    def in_comfyui(self, layer: str) -> str:
        """ComfyUI's name of a layer."""
        original = self.in_original(layer)
        return f"{self.comfyui or f'{self.prefix}.'}{layer}" if original is None else f"diffusion_model.{original}"

    def in_studio(self, layer: str) -> str:
        """DiffSynth-Studio's name of a layer."""
        return self.in_comfyui(layer).removeprefix("diffusion_model.") if self.studio == "original" else layer

    def in_original(self, layer: str) -> str | None:
        """The original code's name of a layer; None if `original` does not list it, or only together with others."""
        for original, ours in self.original.items():
            if isinstance(ours, str) and (number := _number(ours, layer)) is not None:
                return original.replace("*", number)
        return None

    def of_network(self, network: nn.Module) -> dict[str, tuple[str, ...]]:
        """The layers of a network that each name stands for."""
        layers = [name for name, layer in network.named_modules() if hasattr(layer, "weight")]
        found = {layer: (layer,) for layer in layers}
        for layer in layers:
            for name in _older_names(layer):
                found.setdefault(name, (layer,))
        for original, ours in self.original.items():
            every = (ours,) if isinstance(ours, str) else ours
            numbers = [_number(every[0], layer) for layer in layers]
            for number in [number for number in numbers if number is not None]:
                found[original.replace("*", number)] = tuple(name.replace("*", number) for name in every)
        return {_flat(name): layers for name, layers in found.items()} | found


def _flat(name: str) -> str:
    """A layer's name as kohya's programs write it."""
    return name.replace(".", "_")


def _number(pattern: str, layer: str) -> str | None:
    """The block's number in a layer's name, "" in a pattern without one; None if the layer has another name."""
    found = re.fullmatch(re.escape(pattern).replace(r"\*", r"(\d+)"), layer)
    return found and "".join(found.groups())


def _older_names(layer: str) -> list[str]:
    """Names of a layer in files of old releases of diffusers, whose attention processors held the adapters."""
    parent, _, last = layer.removesuffix(".0").rpartition(".")
    return [f"{parent}.processor.{last}", f"{parent}.{last}"]


def owner(key: str, prefixes: Iterable[str] = ()) -> str | None:
    """Prefix of the network that a key in an adapter file names; None if it names none.

    Args:
        prefixes: Those of the model's networks, if it has other ones than `STARTS`.
    """
    bare = key.removeprefix(WRAPPER)
    last_first = (*sorted(prefixes, reverse=True), *sorted(STARTS, reverse=True))  # te3 is the third, if there is one
    found = [(start, prefix) for prefix in last_first for start in _starts(prefix) if bare.startswith(start)]
    return max(found, key=lambda pair: len(pair[0]), default=(None, None))[1]  # a network inside another starts longer


def layers_in(keys: Iterable[str]) -> set[str]:
    """The layers of all networks whose tensors a file has, under the file's names."""
    return {_without_ending(key)[0] for key in keys}


def _without_ending(key: str) -> tuple[str, str]:
    """A layer's name in a file, and the ending of the key, "" if no program has it."""
    plain = key.replace(".default.", ".").removesuffix(".default")
    ending = next((ending for ending in ENDINGS if plain.endswith(ending)), "")
    return plain.removesuffix(ending), ending


def _of_network(keys: Iterable[str], names: LayerNames, prefix: str) -> list[str]:
    """The keys that name a network; those that name none belong to the transformer, or to the only one in a file.

    Args:
        prefix: The network's name in the file.
    """
    owners = {key: owner(key, (names.prefix, *names.others)) for key in keys}
    bare = prefix == "transformer" or set(owners.values()) == {None}
    return [key for key, name in owners.items() if name == prefix or (bare and name is None)]


def _starts(prefix: str) -> tuple[str, ...]:
    return STARTS.get(prefix, (f"{prefix}.", f"pipe.{prefix}."))


def peft_names(
    tensors: Mapping[str, Tensor], names: LayerNames, network: nn.Module, source: str, stated: Scale | None = None
) -> Parts:
    """A network's tensors under peft's names, `blocks.0.to_q.lora_A.weight`, with their scale folded in.

    A tensor that belongs to no layer keeps the rest of its name.

    Args:
        tensors: An adapter's tensors under the names of any program.
        source: Where they come from, for errors.
        stated: The scale of a layer that the adapter's configuration states; a tensor `alpha` takes precedence.

    Raises:
        ValueError: An alpha is no finite number, a layer is named twice, or a fused layer's update cannot be divided
            among the layers here.
    """
    known, found = names.of_network(network), {}
    for name, parts in _by_layer(tensors, names, known, source).items():
        layers = known.get(name, (name,))
        alpha = parts.pop("alpha", None)
        scale = _scale(alpha, rank(parts), f"{source}: {name}") if alpha is not None else 1.0
        if alpha is None and stated is not None:
            scale = stated(layers[0], rank(parts))
        parts = with_halves_swapped(parts) if names.is_swapped(name) else parts
        sizes = [network.get_submodule(layer).weight.shape[0] for layer in layers] if len(layers) > 1 else []
        for layer, own in zip(layers, _split(scaled(parts, scale), sizes, f"{source}: {name}"), strict=True):
            named = {f"{layer}.{part}".rstrip("."): tensor for part, tensor in own.items()}
            _refuse_twice(named.keys() & found.keys(), source)
            found |= named
    return found


def _by_layer(
    tensors: Mapping[str, Tensor], names: LayerNames, known: Mapping[str, tuple[str, ...]], source: str
) -> dict[str, Parts]:
    """The tensors of a network by the layer's name in the file, and by peft's name of the part ("" if it has none)."""
    by_layer: dict[str, Parts] = defaultdict(dict)
    prefix = names.read_as(tensors)
    for key in _of_network(tensors, names, prefix):
        name, ending = _without_ending(key)
        parts = by_layer[_without_start(name, prefix, known)]
        part = ENDINGS.get(ending, "")
        _refuse_twice({key} if part in parts else (), source)
        parts[part] = tensors[key].flatten() if ending == ".dora_scale" else tensors[key]
    return by_layer


def _without_start(name: str, prefix: str, known: Mapping[str, tuple[str, ...]]) -> str:
    """A layer's name without what programs put before it."""
    while name not in known and (start := next(filter(name.startswith, (WRAPPER, *_starts(prefix))), None)):
        name = name.removeprefix(start)
    return name


def _scale(alpha: Tensor, rank: int | None, what: str) -> float:
    if alpha.numel() != 1 or not math.isfinite(value := alpha.item()):
        raise ValueError(f"{what}.alpha is {alpha.tolist()}, expected one finite number.")
    return value / rank if rank else 1.0  # LyCORIS: two whole matrices have no rank, and their alpha does nothing


def _split(parts: Parts, sizes: Sequence[int], what: str) -> list[Parts]:
    try:
        return split(parts, sizes) if sizes else [parts]
    except ValueError as error:
        raise ValueError(f"{what}: {error}; the file can be read only with the model's original code.") from error


def _refuse_twice(keys: Iterable[str], source: str) -> None:
    for key in sorted(keys):
        raise ValueError(f"{source}: a second tensor has the meaning of {key!r}; remove one of the two.")
