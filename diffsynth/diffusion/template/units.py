"""A template as two units of a pipeline: what is done without gradients, which may be cached, and what is trained."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ...core.code_version import code_version
from ..pipeline.units import PipelineUnit, run_units
from .cache import as_inputs, check_names
from .model import CHECKPOINTING, Template, cast_frozen, refuse_running_statistics, weights_digest
from .rows import as_dict

FEATURES = "template_features"  # what process_inputs made, as [[name, value], …]
ASKED_OF_TENSORS = {"dtype", "device", "shape", "ndim", "requires_grad", "is_meta", "is_cuda", "layout", "is_leaf"}
ASKED_OF_TENSORS |= {"size", "dim", "numel", "stride", "element_size", "is_floating_point", "is_contiguous"}


def attach(pipe, template: Template, trained: Iterable[str] = ()) -> None:
    """Make a template part of a pipeline: `template_inputs` then go with a request.

    Args:
        trained: Parts of the pipeline that are being trained, by their dotted names; the rest of the template gets the
            dtype of frozen weights.

    Raises:
        ValueError: Training would change what is no weight.
    """
    trained = frozenset(trained)
    refuse_running_statistics(template, "template_model", trained)
    cast_frozen(template.model, "template_model", trained, pipe.torch_dtype)
    pipe.template, pipe.template_model = template, template.model.to(pipe.device)
    pipe.units += [TemplateProcessInputs(pipe, template, trained), TemplateForward(template)]


class TemplateProcessInputs(PipelineUnit):
    """`template_inputs` of a row through the data processor and `process_inputs`.

    It is frozen although it calls a template that is trained: what it calls of it must not be, or reading the results
    from a cache would be another training.
    """

    def __init__(self, pipe, template: Template, trained: frozenset[str]):
        sides = {"template_inputs": "template_inputs"}
        super().__init__(
            separate_cfg=True,
            input_params_posi=sides,
            input_params_nega=sides,
            output_params=(FEATURES,),
            onload_model_names=models_used(pipe, template, "process_inputs"),
        )
        self.template, self.trained = template, trained

    def process(self, pipe, template_inputs=None):
        if template_inputs is None:
            return {}
        inputs = self.template.process_data(as_dict(template_inputs))
        with self._reading_nothing_trained(pipe):
            made = self.template.process_inputs(inputs, pipe)
        return {FEATURES: [[name, storable(value, f"{self.template}: {name}")] for name, value in made.items()]}

    def depends_on(self, pipe) -> dict[str, str]:
        weights = weights_digest(self.template.model, "template_model", self.trained)
        return {"template": f"{self.template.code.digest[:16]}-{weights}"}

    @contextmanager
    def _reading_nothing_trained(self, pipe) -> Iterator[None]:
        parts = {name: pipe.named_model(name) for name in self.trained}
        names = {id(p): f"{part}.{name}" for part, module in parts.items() for name, p in module.named_parameters()}
        with _Forbidden(names, self.template):
            yield


class _Forbidden(TorchFunctionMode):
    """Refuses functions of some tensors, given by id and name; what they are may be asked, not what they hold."""

    def __init__(self, names: Mapping[int, str], template: Template):
        super().__init__()
        self.names, self.template = names, template

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        read = [tensor for tensor in tree_leaves((args, kwargs)) if id(tensor) in self.names]
        if read and _name_of(func) not in ASKED_OF_TENSORS:
            raise ValueError(
                f"{self.template}: process_inputs reads {self.names[id(read[0])]}, which is being trained: what it "
                "makes would be stale after one step. Move that to forward, or leave it out of task.trainable_models."
            )
        return func(*args, **kwargs)


def _name_of(func) -> str:
    """Of a function or, where an attribute is read, of the attribute."""
    own = getattr(func, "__name__", "")
    return getattr(getattr(func, "__self__", None), "__name__", own) if own == "__get__" else own


class TemplateForward(PipelineUnit):
    """What `process_inputs` made through `forward`, whose results become inputs of that side of guidance."""

    def __init__(self, template: Template):
        super().__init__(take_over=True, input_params=(FEATURES,), onload_model_names=("template_model",))
        self.template = template

    def process(self, pipe, inputs_shared, inputs_posi, inputs_nega):
        posi = self._cache(pipe, inputs_shared, inputs_posi)
        nega = self._cache(pipe, inputs_shared, inputs_nega) if inputs_shared.get("cfg_scale", 1) != 1 else posi
        both = {name: inputs_shared[name] for name in {*posi, *nega} & inputs_shared.keys()}
        shared = {name: value for name, value in inputs_shared.items() if name not in both}
        return shared, {**_rest(inputs_posi), **both, **posi}, {**_rest(inputs_nega), **both, **nega}

    def _cache(self, pipe, shared: Mapping[str, Any], side: Mapping[str, Any]) -> dict[str, Any]:
        if side.get(FEATURES) is None:
            return {}
        flags = {name: shared.get(name, False) for name in CHECKPOINTING}
        cache = self.template.forward(dict(side[FEATURES]), pipe, **flags)
        known = signature(pipe.model_fn).parameters.keys() - set(pipe.in_iteration_models)
        check_names(cache, known, str(self.template), f"{type(pipe).__name__}.model_fn")
        return as_inputs(pipe, cache, str(self.template))


def _rest(side: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in side.items() if name not in (FEATURES, "template_inputs")}


def rehearse(pipe, inputs: tuple[dict, dict, dict]) -> None:
    """Run a pipeline's template once, unless it calls networks whose weights are not read yet."""
    *_, first, second = pipe.units
    is_cached = FEATURES in inputs[1]
    if models_used(pipe, pipe.template, "forward") or (first.onload_model_names and not is_cached):
        return
    in_bf16 = pipe.torch_dtype == torch.bfloat16
    with torch.random.fork_rng(), torch.autocast(pipe.device.type, torch.bfloat16, enabled=in_bf16):
        run_units([second] if is_cached else [first, second], pipe, *inputs)


def models_used(pipe, template: Template, method: str) -> list[str]:
    """Models of the pipeline that a method of the template may call, by the names that its code leads to."""
    function, built = getattr(template.code.model, method), pipe.built_models
    if "pipe" not in signature(function).parameters:
        return []
    classes = [type(getattr(pipe, name)) for name in built]
    _, attributes = code_version([function], [template.code.model, type(pipe), *classes])
    return sorted(attributes & built)


def storable(value: Any, what: str) -> Any:
    """A value as a cache gives it back.

    Raises:
        ValueError: It is none that a cache holds.
    """
    if isinstance(value, list | tuple):
        return [storable(element, f"{what}[{number}]") for number, element in enumerate(value)]
    if isinstance(value, Tensor) or value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(
        f"{what}, which process_inputs returns, is a {type(value).__name__}; expected a tensor, a number, text, or a "
        "list of these, as they are what a cache holds (torch.as_tensor makes a tensor of an array)."
    )
