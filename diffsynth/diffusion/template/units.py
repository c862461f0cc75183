"""A template as two units of a pipeline: `process_inputs`, without gradients and cachable, and `forward`, trained."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ..pipeline.units import PipelineUnit, run_units
from .cache import as_inputs, check_names
from .code import models_used
from .model import CHECKPOINTING, Template, cast_frozen, refuse_running_statistics, weights_digest
from .rows import as_dict

if TYPE_CHECKING:
    from ..base_pipeline import BasePipeline

FEATURES = "template_features"  # the outputs of process_inputs, as [[name, value], …]
# Attributes and methods of a tensor that do not read its values.
METADATA = {"dtype", "device", "shape", "ndim", "requires_grad", "is_meta", "is_cuda", "layout", "is_leaf"}
METADATA |= {"size", "dim", "numel", "stride", "element_size", "is_floating_point", "is_contiguous"}


def attach(pipe: "BasePipeline", template: Template, trained: Iterable[str] = ()) -> None:
    """Make a template part of a pipeline, whose requests then have an argument `template_inputs`.

    Args:
        trained: Dotted names of the trained parts of the pipeline; the other weights of the template are converted to
            the dtype of frozen weights.

    Raises:
        ValueError: The template has running statistics, which training would change but exports would not save.
    """
    trained = frozenset(trained)
    refuse_running_statistics(template, "template_model", trained)
    cast_frozen(template.model, "template_model", trained, pipe.torch_dtype)
    pipe.template, pipe.template_model = template, template.model.to(pipe.device)
    pipe.units += [TemplateProcessInputs(pipe, template, trained), TemplateForward(template)]


class TemplateProcessInputs(PipelineUnit):
    """Runs the data processor and `process_inputs` on the `template_inputs` of a row.

    The unit counts as frozen, although the template is trained. Therefore `process_inputs` must not read trained
    weights: its outputs may come from a cache, which does not follow them.
    """

    def __init__(self, pipe: "BasePipeline", template: Template, trained: frozenset[str]):
        self.template, self.trained = template, trained
        sides = {"template_inputs": "template_inputs"}
        super().__init__(
            separate_cfg=True,
            input_params_posi=sides,
            input_params_nega=sides,
            output_params=(FEATURES,),
            onload_model_names=models_used(pipe, template.code, "process_inputs"),
        )

    def process(self, pipe, template_inputs=None, **size):
        if template_inputs is None:
            return {}
        inputs = self.template.process_data(as_dict(template_inputs))
        with self._refusing_trained_weights(pipe):
            features = self.template.process_inputs(inputs, pipe, size)
        return {FEATURES: [[name, storable(value, f"{self.template}: {name}")] for name, value in features.items()]}

    def depends_on(self, pipe: "BasePipeline") -> dict[str, str]:
        weights = weights_digest(self.template.model, "template_model", self.trained)
        return {"template": f"{self.template.code.digest[:16]}-{weights}"}

    def _parameters(self) -> dict[str, inspect.Parameter]:
        """`template_inputs`, and the size of the sample if the template reads it: caches then depend on it."""
        *own, size = inspect.signature(self.process).parameters.values()
        return {p.name: p for p in own} | {n: size.replace(name=n) for n in self.template.code.size}

    @contextmanager
    def _refusing_trained_weights(self, pipe: "BasePipeline") -> Iterator[None]:
        parts = {name: pipe.named_model(name) for name in self.trained}
        names = {id(p): f"{part}.{name}" for part, module in parts.items() for name, p in module.named_parameters()}
        with _RefuseReads(names, self.template):
            yield


class _RefuseReads(TorchFunctionMode):
    """Inside, functions must not read the values of some tensors, given by id and name; their metadata is allowed."""

    def __init__(self, names: Mapping[int, str], template: Template):
        super().__init__()
        self.names, self.template = names, template

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        read = [tensor for tensor in tree_leaves((args, kwargs)) if id(tensor) in self.names]
        if read and _name_of(func) not in METADATA:
            raise ValueError(
                f"{self.template}: process_inputs reads {self.names[id(read[0])]}, which is being trained: its outputs "
                "would be stale after one step. Move that to forward, or leave it out of task.trainable_models."
            )
        return func(*args, **kwargs)


def _name_of(func: Callable) -> str:
    """Name of a function or, if it reads an attribute, of the attribute."""
    own = getattr(func, "__name__", "")
    return getattr(getattr(func, "__self__", None), "__name__", own) if own == "__get__" else own


class TemplateForward(PipelineUnit):
    """Runs `forward` on the outputs of `process_inputs`, on each side of guidance; its outputs become inputs there."""

    def __init__(self, template: Template):
        super().__init__(take_over=True, input_params=(FEATURES,), onload_model_names=("template_model",))
        self.template = template

    def process(self, pipe, inputs_shared, inputs_posi, inputs_nega):
        posi = self._cache(pipe, inputs_shared, inputs_posi)
        nega = self._cache(pipe, inputs_shared, inputs_nega) if inputs_shared.get("cfg_scale", 1) != 1 else posi
        # A shared input that the template returns for one side moves to both sides, where the template's value counts.
        moved = {name: inputs_shared[name] for name in {*posi, *nega} & inputs_shared.keys()}
        shared = {name: value for name, value in inputs_shared.items() if name not in moved}
        posi = {**_without_template(inputs_posi), **moved, **posi}
        nega = {**_without_template(inputs_nega), **moved, **nega}
        return shared, posi, nega

    def _cache(self, pipe: "BasePipeline", shared: Mapping[str, Any], side: Mapping[str, Any]) -> dict[str, Any]:
        if side.get(FEATURES) is None:
            return {}
        flags = {name: shared.get(name, False) for name in CHECKPOINTING}
        cache = self.template.forward(dict(side[FEATURES]), pipe, **flags)
        check_names(cache, pipe.model_fn_inputs(), str(self.template), f"{type(pipe).__name__}.model_fn")
        return as_inputs(pipe, cache, str(self.template))


def _without_template(side: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in side.items() if name not in (FEATURES, "template_inputs")}


def rehearse(pipe: "BasePipeline", inputs: tuple[dict, dict, dict]) -> None:
    """Run a pipeline's template once on a sample's inputs, unless it calls networks whose weights are not read yet."""
    *_, first, second = pipe.units
    is_cached = FEATURES in inputs[1]
    if models_used(pipe, pipe.template.code, "forward") or (first.onload_model_names and not is_cached):
        return
    in_bf16 = pipe.torch_dtype == torch.bfloat16
    with torch.random.fork_rng(), torch.autocast(pipe.device.type, torch.bfloat16, enabled=in_bf16):
        run_units([second] if is_cached else [first, second], pipe, *inputs)


def storable(value: Any, what: str) -> Any:
    """The value as a cache returns it: lists instead of tuples.

    Raises:
        ValueError: A cache cannot hold the value.
    """
    if isinstance(value, list | tuple):
        return [storable(element, f"{what}[{number}]") for number, element in enumerate(value)]
    if isinstance(value, Tensor) or value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(
        f"{what}, which process_inputs returns, is a {type(value).__name__}; expected a tensor, a number, text, or a "
        "list of these, because a cache holds nothing else (torch.as_tensor makes a tensor of an array)."
    )
