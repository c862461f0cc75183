"""Units see one sample, `model_fn` sees a batch: this is where samples become one."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad


def collate(samples: list[dict]) -> dict:
    """Stacks what the units returned for each sample into one batch.

    - Tensors (1, ...) of one shape become (B, ...).
    - Text `X` (1, L, D) with its `X_mask` (1, L) is padded with zeros on the right to the longest, (B, L, D), (B, L).
    - Lists and tuples of tensors become a list of such batches, element by element; dicts become a dict, key by key.
    - Numbers, strings, booleans and None that all samples share stay one value.
    - Everything else becomes a list of B.

    Raises:
        ValueError: Samples differ in their keys, or in tensors that cannot be stacked; names the key and the remedy.
    """
    require_same_keys(samples)
    return {key: _collate_key(key, samples) for key in samples[0]}


def require_same_keys(samples: list[dict]) -> None:
    for key in dict.fromkeys(key for sample in samples for key in sample):
        count = sum(key in sample for sample in samples)
        if count < len(samples):
            raise ValueError(f"{key} is in {count} of {len(samples)} samples of a batch; set micro_batch_size=1")


def _collate_key(key: str, samples: list[dict]):
    values = [sample[key] for sample in samples]
    if is_shared_scalar(values):
        return values[0]
    if all(isinstance(value, dict) for value in values):
        return _collate_dicts(key, values)
    stackable = [isinstance(value, Tensor) or is_tensor_list(value) for value in values]
    if not any(stackable):
        return values
    if not all(stackable) or len({type(value) for value in values}) > 1:
        kinds = ", ".join(type(value).__name__ for value in values)
        raise ValueError(f"{key}: samples of a batch hold {kinds}, which do not stack; set micro_batch_size=1")
    text = is_text(key, samples[0])
    return _stack_lists(key, values, text) if is_tensor_list(values[0]) else _stack(key, values, text)


def _collate_dicts(key: str, values: list[dict]) -> dict:
    named = [{f"{key}[{name!r}]": element for name, element in value.items()} for value in values]
    return dict(zip(values[0], collate(named).values(), strict=True))


def is_shared_scalar(values: list) -> bool:
    first = values[0]
    scalar = first is None or isinstance(first, bool | int | float | str)
    return scalar and all(type(value) is type(first) and value == first for value in values)


def is_tensor_list(value) -> bool:
    return isinstance(value, list | tuple) and len(value) > 0 and all(isinstance(element, Tensor) for element in value)


def is_text(key: str, sample: dict) -> bool:
    """Whether `key` is one of a pair `X` (1, L, D), `X_mask` (1, L), or of lists of such pairs."""
    name = key.removesuffix("_mask")
    texts, masks = as_list(sample.get(name)), as_list(sample.get(f"{name}_mask"))
    return len(texts) == len(masks) and all(map(is_text_and_mask, texts, masks))


def is_text_and_mask(text, mask) -> bool:
    tensors = isinstance(text, Tensor) and isinstance(mask, Tensor)
    return tensors and text.ndim == 3 and mask.shape == text.shape[:2]


def as_list(value) -> list:
    return value if isinstance(value, list) else [value]


def _stack_lists(key: str, values: list[Sequence[Tensor]], text: bool) -> list[Tensor]:
    lengths = [len(value) for value in values]
    if len(set(lengths)) > 1:
        raise ValueError(f"{key}: samples of a batch hold {lengths} tensors; set micro_batch_size=1")
    return [_stack(f"{key}[{n}]", list(tensors), text) for n, tensors in enumerate(zip(*values, strict=True))]


def _stack(key: str, tensors: list[Tensor], text: bool) -> Tensor:
    if len(tensors) == 1:
        return tensors[0]
    if text:
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
    """Pads dimension 1 of (1, L) or (1, L, D) with zeros on the right."""
    return pad(tensor, (0, 0) * (tensor.ndim - 2) + (0, length - tensor.shape[1]))
