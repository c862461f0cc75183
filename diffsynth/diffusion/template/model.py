"""`Template`: a template's network, which is built from its code, filled with its weights, and called."""

import inspect
import logging
from collections.abc import Callable, Iterable, Mapping
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ...core import loader
from ...core.data.sources.storage import open_parts
from .code import TemplateCode, errors_of, read_code

if TYPE_CHECKING:
    from ..base_pipeline import BasePipeline

logger = logging.getLogger(__name__)

LISTED_PROBLEMS = 3  # most tensors that an error about weights lists; a guess
CHECKPOINTING = ("use_gradient_checkpointing", "use_gradient_checkpointing_offload")


class Template:
    """A template's code and network.

    Its methods are called in this order: `process_data` (for rows of a data set only), `process_inputs`, `forward`.
    """

    def __init__(self, code: TemplateCode, model: nn.Module):
        self.code, self.model = code, model
        with errors_of(code.file, "TEMPLATE_DATA_PROCESSOR cannot be built"):
            self.data_processor = code.data_processor() if code.data_processor else None

    def __str__(self) -> str:
        return str(self.code.file)

    def process_data(self, template_inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Run the data processor on a row's `template_inputs`; returns arguments of `process_inputs`.

        Files in tar shards are opened first.

        Raises:
            ValueError: The data processor raises an error, or returns no dict.
        """
        if self.data_processor is None:
            return open_parts(template_inputs)
        with errors_of(self.code.file, f"TEMPLATE_DATA_PROCESSOR of {dict(template_inputs)}"):
            processed = self.data_processor(**open_parts(template_inputs))
        return self._dict(processed, "TEMPLATE_DATA_PROCESSOR")

    @torch.no_grad()
    def process_inputs(
        self, inputs: Mapping[str, Any], pipe: "BasePipeline", size: Mapping[str, int] | None = None
    ) -> dict[str, Any]:
        """Run the template's `process_inputs` without gradients; returns arguments of `forward`.

        Args:
            size: `height` and `width` of the sample in pixels, which the method gets if it names them.

        Raises:
            ValueError: An argument is missing, or the template returns no dict.
        """
        inputs = {**{name: value for name, value in (size or {}).items() if name in self.code.size}, **inputs}
        check_arguments(self.model.process_inputs, inputs, str(self))
        return self._dict(self.model.process_inputs(**inputs, pipe=pipe), "process_inputs")

    def forward(self, features: Mapping[str, Any], pipe: "BasePipeline", **checkpointing: bool) -> dict[str, Any]:
        """Run the template's network; returns the template cache.

        Args:
            checkpointing: `use_gradient_checkpointing`, `use_gradient_checkpointing_offload`.

        Raises:
            ValueError: An argument is missing, or the template returns no dict.
        """
        check_arguments(self.model.forward, features, str(self))
        return self._dict(self.model(**features, pipe=pipe, **checkpointing), "forward")

    def _dict(self, result: Any, what: str) -> dict[str, Any]:
        if not isinstance(result, Mapping):
            raise ValueError(f"{self}: {what} returns a {type(result).__name__}, expected a dict of values by name.")
        return dict(result)


def check_arguments(function: Callable, given: Iterable[str], source: str) -> None:
    """Refuse a missing argument with an error that names the file, unlike Python's TypeError."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(function).parameters.values()
    needed = [p.name for p in parameters if p.default is p.empty and p.kind in named]
    absent = [name for name in needed if name not in (*given, "self", "pipe", *CHECKPOINTING)]
    if absent:
        raise ValueError(f"{source}: {function.__name__} needs {absent[0]!r}; it was given {sorted(given)}.")


def load_template(code: TemplateCode, seed: int = 0) -> Template:
    """Build a template's network on the CPU, frozen, and read its weights into it.

    Args:
        seed: Of the constructor's random numbers.

    Raises:
        ValueError: The network cannot be built, or its weights do not fit.
    """
    model = _construct(code, seed)
    if code.weights:
        _fill(model, code, seed)
    return Template(code, model.eval().requires_grad_(False))


def _construct(code: TemplateCode, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]), errors_of(code.file, f"{code.model.__name__} cannot be built"):
        torch.manual_seed(seed)
        return code.model(**code.config)


def _fill(model: nn.Module, code: TemplateCode, seed: int) -> None:
    """Copy the tensors of the weights' files; a tensor that they lack must not depend on the constructor's seed."""
    found, own = loader.load_state_dict(code.weights), model.state_dict()
    absent = {key: tensor for key, tensor in own.items() if key not in found}
    of_other_seed = _construct(code, seed + 1).state_dict() if absent else {}
    shapes = {key: (tuple(found[key].shape), tuple(own[key].shape)) for key in own if key in found}
    problems = [
        *(f"{key} is unexpected" for key in found if key not in own),
        *(f"{key} is {has}, expected {wanted}" for key, (has, wanted) in shapes.items() if has != wanted),
        *(f"{key} is missing, and random" for key in absent if not torch.equal(absent[key], of_other_seed[key])),
    ]
    if problems:
        more = [f"and {len(problems) - LISTED_PROBLEMS} more"] if len(problems) > LISTED_PROBLEMS else []
        raise ValueError(
            f"{', '.join(map(str, code.weights))} does not fit {code.model.__name__} of {code.file}:\n  "
            + "\n  ".join(problems[:LISTED_PROBLEMS] + more)
            + "\nExpected the names and shapes of its state_dict(). If frozen parts are in a file of their own, name "
            "both: TEMPLATE_MODEL_PATH = [frozen, trained]."
        )
    model.load_state_dict(found, strict=False)


def load_template_model(
    path: str | Path, torch_dtype: torch.dtype = torch.bfloat16, device: str | torch.device = "cpu"
) -> nn.Module:
    """The network of the template in a folder, with the weights that its TEMPLATE_MODEL_PATH names.

    Tensors that the files lack keep the constructor's values, which must not be random.

    Raises:
        FileNotFoundError, ValueError: There is no template, or its code or weights are wrong.
    """
    code = read_code(Path(path))
    model = load_template(code).model
    if not code.weights and any(True for _ in model.parameters()):
        logger.warning(
            "%s sets no TEMPLATE_MODEL_PATH, so that its weights are the initial ones of %s(), not trained ones. To "
            "merge its state_dict() with trained weights, set TEMPLATE_MODEL_PATH to their file first.",
            code.file,
            code.model.__name__,
        )
    return model.to(device, torch_dtype)


def is_below(parts: Iterable[str], name: str) -> bool:
    """Whether a dotted name is one of `parts`, or is below one."""
    return any(f"{name}.".startswith(f"{part}.") for part in parts)


def refuse_running_statistics(template: Template, name: str, trained: Iterable[str]) -> None:
    """Refuse to train layers that track running statistics, because exports would not save the statistics.

    Args:
        name: Name of the template's network in the pipeline.
        trained: Dotted names of the trained parts of the pipeline.
    """
    for key, part in template.model.named_modules():
        if isinstance(part, _BatchNorm) and part.track_running_stats and is_below(trained, f"{name}.{key}"):
            raise ValueError(
                f"{template}: {key} is a {type(part).__name__} that is trained; its running statistics are no weights, "
                "so that exports would not save them. Use GroupNorm or LayerNorm, or set track_running_stats=False."
            )


def cast_frozen(model: nn.Module, name: str, trained: Iterable[str], dtype: torch.dtype) -> None:
    """Convert the weights of the model `name` that are not below `trained` to the dtype of frozen weights."""
    for key, tensor in chain(model.named_parameters(), model.named_buffers()):
        if tensor.is_floating_point() and not is_below(trained, f"{name}.{key}"):
            tensor.data = tensor.data.to(dtype)


def weights_digest(model: nn.Module, name: str, trained: Iterable[str]) -> str:
    """Digest, 16 hex digits, of the weights of the model `name` that are not below `trained`."""
    digest = blake2b(digest_size=8)
    for key, tensor in sorted(model.state_dict().items()):
        if not is_below(trained, f"{name}.{key}"):
            digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
