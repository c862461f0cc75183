"""Stack samples into a batch: the pipeline's units process one sample at a time, `model_fn` a batch.

Shapes: B batch, L tokens, D width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad


def collate(samples: list[dict]) -> dict:
    """Stack the units' outputs of several samples into one batch.

    - Tensors (1, ...) of one shape become (B, ...).
    - Text `X` (1, L, …) with its `X_mask` (1, L) is padded with zeros on the right to the longest: (B, L, …), (B, L).
      The mask of one sample is True everywhere. Where no text was padded, `X_mask` is None, which means all tokens:
      with a mask, attention could not run its fastest kernels.
    - Text `X` (1, L, …) with its `X_lengths`, a list of ints that add up to L, is padded likewise.
    - Lists and tuples of tensors are stacked element by element, dicts key by key.
    - A number, string, bool or None that is equal in all samples stays one value.
    - All other values become a list of B values.

    Raises:
        ValueError: Samples have different keys, or tensors that cannot be stacked; names the key and the remedy.
    """
    _require_same_keys(samples)
    return {key: _collate_key(key, samples) for key in samples[0]}


def _require_same_keys(samples: list[dict]) -> None:
    for key in dict.fromkeys(key for sample in samples for key in sample):
        count = sum(key in sample for sample in samples)
        if count < len(samples):
            raise ValueError(f"{key} is in {count} of {len(samples)} samples of a batch; set micro_batch_size=1")


def _collate_key(key: str, samples: list[dict]) -> Any:
    values = [sample[key] for sample in samples]
    if _is_shared_scalar(values):
        return values[0]
    if all(isinstance(value, dict) for value in values):
        return _collate_dicts(key, values)
    stackable = [isinstance(value, Tensor) or _is_tensor_list(value) for value in values]
    if not any(stackable):
        return values
    if not all(stackable) or len({type(value) for value in values}) > 1:
        kinds = ", ".join(type(value).__name__ for value in values)
        raise ValueError(f"{key}: samples of a batch hold {kinds}, which do not stack; set micro_batch_size=1")
    is_text = _is_text(key, samples[0])
    return _stack_lists(key, values, is_text) if _is_tensor_list(values[0]) else _stack(key, values, is_text)


def _collate_dicts(key: str, values: list[dict]) -> dict:
    named = [{f"{key}[{name!r}]": element for name, element in value.items()} for value in values]
    return dict(zip(values[0], collate(named).values(), strict=True))


def _is_shared_scalar(values: list) -> bool:
    """Whether all values are one number, string, bool or None."""
    first = values[0]
    scalar = first is None or isinstance(first, bool | int | float | str)
    return scalar and all(type(value) is type(first) and value == first for value in values)


def _is_tensor_list(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) > 0 and all(isinstance(element, Tensor) for element in value)


def _is_text(key: str, sample: dict) -> bool:
    """Whether `key` belongs to a pair `X` (1, L, …), `X_mask` (1, L), or to a pair of lists, or is `X` of lengths."""
    name = key.removesuffix("_mask")
    if _has_lengths(sample.get(name), sample.get(f"{name}_lengths")):
        return True
    texts, masks = _as_list(sample.get(name)), _as_list(sample.get(f"{name}_mask"))
    return len(texts) == len(masks) and all(map(_is_text_and_mask, texts, masks))


def _has_lengths(text: Any, lengths: Any) -> bool:
    return isinstance(text, Tensor) and isinstance(lengths, list) and text.ndim > 2 and sum(lengths) == text.shape[1]


def _is_text_and_mask(text: Any, mask: Any) -> bool:
    are_tensors = isinstance(text, Tensor) and isinstance(mask, Tensor)
    return are_tensors and text.ndim > 2 and mask.shape == text.shape[:2]


def _as_list(value: Any) -> list:
    return value if isinstance(value, list) else [value]


def _stack_lists(key: str, values: list[Sequence[Tensor]], is_text: bool) -> list[Tensor | None]:
    lengths = [len(value) for value in values]
    if len(set(lengths)) > 1:
        raise ValueError(f"{key}: samples of a batch hold {lengths} tensors; set micro_batch_size=1")
    by_position = zip(*values, strict=True)
    return [_stack(f"{key}[{n}]", list(tensors), is_text) for n, tensors in enumerate(by_position)]


def _stack(key: str, tensors: list[Tensor], is_text: bool) -> Tensor | None:
    is_mask = is_text and tensors[0].ndim == 2
    if is_mask and len({tensor.shape for tensor in tensors}) == 1:
        return None
    if len(tensors) == 1:
        return tensors[0]
    if is_text:
        length = max(tensor.shape[1] for tensor in tensors)
        tensors = [_pad_length(tensor, length) for tensor in tensors]
    shapes = [tuple(tensor.shape) for tensor in tensors]
    if len(set(shapes)) > 1:
        raise ValueError(
            f"{key}: shapes {', '.join(map(str, shapes))} differ; batches need one latent size: "
            "set dataset.height and dataset.width, or micro_batch_size=1"
        )
    if shapes[0][:1] != (1,):
        raise ValueError(f"{key}: shape {shapes[0]} has no leading batch dimension of 1; set micro_batch_size=1")
    return torch.cat(tensors)


def _pad_length(tensor: Tensor, length: int) -> Tensor:
    """Pad dimension 1 of a tensor (1, L, …) with zeros on the right."""
    return pad(tensor, (0, 0) * (tensor.ndim - 2) + (0, length - tensor.shape[1]))
