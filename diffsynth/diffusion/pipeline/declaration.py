"""Checks a family's declaration, and gives its class the signatures that the configuration and `help()` read."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from ...core.loader import ModelConfig
from ..training_defaults import TrainingDefaults
from .components import Folder, Network
from .request import defaults_of, document, parameters_of
from .units import PipelineUnit

if TYPE_CHECKING:
    from ..base_pipeline import BasePipeline

PARTS = ("request", "components", "latents", "media", "model_fn", "sigma_grid", "unit_classes")
SHARED_SETTINGS = ("height", "width", "num_inference_steps", "cfg_scale")
KEYWORD = inspect.Parameter.KEYWORD_ONLY

COMPONENTS_DOC = """Build the pipeline on the meta device; `load_models` then reads the weights that a run needs.

Args:
    {components}: Where each component is (`core.loader.ModelConfig`); None for one that a run does not need, for
        example because a cache holds its outputs.
    torch_dtype: Dtype of frozen weights and of computation.
    {settings}: Defaults of this model's requests, see the call.
    training: Defaults of trainings of this model, see `TrainingDefaults`.
    device: Device that the weights are read to.
"""


def complete(cls: type["BasePipeline"], controlnets: Mapping[str, Network]) -> None:
    """Check a family's declaration, and set the signatures of its call and of `from_components`.

    Args:
        controlnets: The places of its ControlNets, which become components, and networks that `model_fn` calls.

    Raises:
        TypeError: The declaration lacks a part, or names a component or field that does not exist.
    """
    missing = [part for part in PARTS if not hasattr(cls, part)]
    if missing:
        raise TypeError(f"{cls.__name__} declares no {missing[0]}; a family needs {', '.join(PARTS)}.")
    components = cls.components.values() if isinstance(cls.components, Mapping) else [cls.components]
    if not all(isinstance(component, Network | Folder) for component in components):
        raise TypeError(f"{cls.__name__}.components is {cls.components!r}; expected a Network or Folder by each name.")
    if not all(isinstance(unit, type) and issubclass(unit, PipelineUnit) for unit in cls.unit_classes):
        raise TypeError(f"{cls.__name__}.unit_classes is {cls.unit_classes!r}; expected classes of units.")
    if not is_dataclass(cls.request):
        raise TypeError(f"{cls.__name__}.request is {cls.request!r}; expected a dataclass such as ImageRequest.")
    networks = {name: component for name, component in cls.components.items() if isinstance(component, Network)}
    if not networks:
        raise TypeError(f"{cls.__name__}.components names no Network; expected at least the one that model_fn calls.")
    cls.components = {**networks, **controlnets, **cls.components}
    unknown = [name for name in cls.model_settings if name not in defaults_of(cls.request)]
    if unknown:
        raise TypeError(
            f"{cls.__name__}.model_settings names {unknown[0]!r}; expected fields of {cls.request.__name__} that have "
            f"a default: {', '.join(defaults_of(cls.request))}."
        )
    lacking = [unit for unit in cls.unit_classes if unit.needs is not None and unit.needs not in cls.components]
    if lacking:
        raise TypeError(
            f"{lacking[0].__name__} needs {lacking[0].needs!r}, which is not among {cls.__name__}.components: "
            f"{', '.join(cls.components)}."
        )
    cls.in_iteration_models = cls.in_iteration_models or (next(iter(networks)), *controlnets)
    cls.__call__ = _signed(cls.__call__, [*parameters_of(cls.request), _keyword("progress_bar_cmd", tqdm)])
    cls.__call__.__doc__ = document(cls.request)
    cls.from_components = classmethod(_signed(cls.from_components.__func__, _component_parameters(cls), "cls"))
    cls.from_components.__func__.__doc__ = COMPONENTS_DOC.format(
        components=", ".join(cls.components), settings=", ".join(settings_of(cls))
    )


def settings_of(cls: type["BasePipeline"]) -> list[str]:
    """Fields of the request whose defaults each model sets for itself, as arguments of `from_components`."""
    return [*SHARED_SETTINGS, *(name for name in cls.model_settings if name not in SHARED_SETTINGS)]


def _component_parameters(cls: type["BasePipeline"]) -> list[inspect.Parameter]:
    required = inspect.Parameter.empty
    optional = {name for name, part in cls.components.items() if part.is_optional}
    components = [_keyword(name, None if name in optional else required, ModelConfig | None) for name in cls.components]
    annotations = {parameter.name: parameter.annotation for parameter in parameters_of(cls.request)}
    defaults = defaults_of(cls.request)
    settings = [_keyword(name, defaults[name], annotations[name]) for name in settings_of(cls)]
    return [
        *components,
        _keyword("torch_dtype", "bfloat16", str),
        *settings,
        _keyword("training", None, TrainingDefaults | None),
        _keyword("device", "cpu"),
    ]


def _keyword(name: str, default: Any, annotation: Any = inspect.Parameter.empty) -> inspect.Parameter:
    return inspect.Parameter(name, KEYWORD, default=default, annotation=annotation)


def _signed(function: Callable, parameters: list[inspect.Parameter], first: str = "self") -> Callable:
    """A new function that calls `function` and has these parameters as its signature."""
    inner = inspect.unwrap(function)

    @wraps(inner)
    def signed(*args, **kwargs):
        return inner(*args, **kwargs)

    own = inspect.Parameter(first, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    signed.__signature__ = inspect.Signature([own, *parameters])
    signed.__annotations__ = {p.name: p.annotation for p in parameters if p.annotation is not inspect.Parameter.empty}
    return signed
