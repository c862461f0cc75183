"""The names that a module's weights have in files: libraries rename modules, and authors have layouts of their own."""

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

Names = tuple[str, ...]


@dataclass(frozen=True)
class Layout:
    """Another layout in which a network's weights are released, such as that of its authors' own code.

    Args:
        mark: Regular expression of the start of a key that files have in this layout only.
        names: The names in the library's released checkpoint for each of a file's keys. A tensor that the network does
            not have has none; several names share the tensor's rows equally, in this order.
    """

    mark: str
    names: Callable[[Collection[str]], Mapping[str, Names]]

    def holds(self, keys: Iterable[str]) -> bool:
        """Whether files with these keys are in this layout."""
        return any(re.match(self.mark, key) for key in keys)


def use_layouts(module: nn.Module, layouts: Sequence[Layout]) -> None:
    """Let a module's weights be read from files in other layouts, too."""
    module._layouts = tuple(layouts)  # every function that reads files of the module asks for them


def module_names(module: nn.Module, keys: Collection[str]) -> dict[str, Names]:
    """The names in the module for each key of its files; see `Layout.names`."""
    layout = next((each for each in getattr(module, "_layouts", ()) if each.holds(keys)), None)
    names = {key: (key,) for key in keys} if layout is None else dict(layout.names(keys))
    found = {name for each in names.values() for name in each}
    module._released_names = {}  # `to_released_keys` reads it
    if layout is not None and all(len(each) < 2 for each in names.values()):
        module._released_names = {each[0]: key for key, each in names.items() if each}
    if not is_transformers(module):
        return names
    current = _transformers_names(module, found)
    return {key: tuple(current[name] for name in each) for key, each in names.items()}


def _transformers_names(module: nn.Module, keys: Iterable[str]) -> dict[str, str]:
    """The name in the module of each key; they differ where transformers has renamed modules since the release."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    rules = [rule for rule in get_model_conversion_mapping(module) if isinstance(rule, WeightRenaming)]
    expected = module.state_dict()
    names = {key: rename_source_key(key, rules, [], module.base_model_prefix, expected)[0] for key in keys}
    # to_released_keys reverts these; from_pretrained sets the same attribute.
    module._weight_conversions = [rule for rule in rules if rule.was_used()]
    return names


def to_released_keys(module: nn.Module, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename weights, of any shape, to the names of the checkpoint that the module was loaded from.

    A module that was not loaded gets the names of its class's released checkpoints, and so does one whose files have
    tensors that the module divides.
    """
    if is_transformers(module):
        from transformers.core_model_loading import revert_weight_conversion

        state_dict = revert_weight_conversion(module, state_dict)
    released = getattr(module, "_released_names", {})
    return {released.get(name, name): tensor for name, tensor in state_dict.items()}


def is_transformers(module: nn.Module) -> bool:
    """Whether a module's class is one of transformers."""
    from transformers import PreTrainedModel

    return isinstance(module, PreTrainedModel)


def shares(tensor: Tensor, count: int) -> tuple[Tensor, ...]:
    """The equal shares (N / count, …) of the rows of a tensor (N, …)."""
    return (tensor,) if count == 1 else tensor.chunk(count)


def share_shape(shape: Sequence[int], count: int) -> tuple[int, ...]:
    """The shape of each of the equal shares of the rows of a tensor; that of the tensor if its rows have none."""
    return tuple(shape) if count == 1 or shape[0] % count else (shape[0] // count, *shape[1:])


def without_ones(shape: Sequence[int], dimensions: int) -> tuple[int, ...]:
    """A shape without the leading ones that it has beyond a number of dimensions."""
    extra = max(len(shape) - dimensions, 0)
    return tuple(shape[extra:]) if set(shape[:extra]) <= {1} else tuple(shape)
