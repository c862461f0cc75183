"""A family's class, completed from its declaration: signatures that the configuration and `help()` read."""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING

from tqdm import tqdm

from ...core.loader import ModelConfig
from .components import Folder, Network
from .networks import TrainingDefaults
from .request import defaults_of, document, parameters_of

if TYPE_CHECKING:
    from ..base_pipeline import BasePipeline

PARTS = ("request", "components", "latents", "media", "model_fn", "sigma_grid", "unit_classes")
SHARED_SETTINGS = ("height", "width", "num_inference_steps", "cfg_scale")
KEYWORD = inspect.Parameter.KEYWORD_ONLY

COMPONENTS_DOC = """Build the pipeline on the meta device; `load_models` then reads the weights a run needs.

Args:
    {components}: Where each component is (`core.loader.ModelConfig`); None for one that a run does not need, for
        example because a cache holds what it made.
    torch_dtype: What frozen weights and computation are in.
    {settings}: Defaults of this model's requests, see the call.
    training: What a training of this model starts from.
    device: Where the weights are read to.
"""


def complete(cls: type["BasePipeline"]) -> None:
    """Check a family's declaration, and give its call and its constructors the signatures that follow from it.

    Raises:
        TypeError: A part is missing, or names what is not there.
    """
    missing = [part for part in PARTS if not hasattr(cls, part)]
    if missing:
        raise TypeError(f"{cls.__name__} declares no {missing[0]}; a family needs {', '.join(PARTS)}.")
    networks = [name for name, component in cls.components.items() if isinstance(component, Network)]
    if not networks:
        raise TypeError(f"{cls.__name__}.components names no Network, so that nothing predicts.")
    unknown = [name for name in cls.model_settings if name not in defaults_of(cls.request)]
    if unknown:
        raise TypeError(f"{cls.__name__}.model_settings names {unknown[0]!r}, which {cls.request.__name__} has not.")
    strangers = [unit for unit in cls.unit_classes if unit.needs is not None and unit.needs not in cls.components]
    if strangers:
        raise TypeError(
            f"{strangers[0].__name__} needs {strangers[0].needs!r}, which {cls.__name__}.components has not."
        )
    cls.in_iteration_models = getattr(cls, "in_iteration_models", None) or tuple(networks[:1])
    cls.__call__ = _signed(cls.__call__, [*parameters_of(cls.request), _keyword("progress_bar_cmd", tqdm)])
    cls.__call__.__doc__ = document(cls.request)
    cls.from_components = classmethod(_signed(cls.from_components.__func__, _component_parameters(cls), "cls"))
    cls.from_components.__func__.__doc__ = COMPONENTS_DOC.format(
        components=", ".join(cls.components), settings=", ".join(settings_of(cls))
    )


def settings_of(cls: type["BasePipeline"]) -> list[str]:
    """Fields of the request whose defaults are a matter of the single model."""
    return [*SHARED_SETTINGS, *(name for name in cls.model_settings if name not in SHARED_SETTINGS)]


def _component_parameters(cls: type["BasePipeline"]) -> list[inspect.Parameter]:
    where, absent = ModelConfig | None, inspect.Parameter.empty
    optional = {name for name, part in cls.components.items() if isinstance(part, Folder) and part.needed_by is None}
    components = [_keyword(name, None if name in optional else absent, where) for name in cls.components]
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


def _keyword(name: str, default, annotation=inspect.Parameter.empty) -> inspect.Parameter:
    return inspect.Parameter(name, KEYWORD, default=default, annotation=annotation)


def _signed(function: Callable, parameters: list[inspect.Parameter], first: str = "self") -> Callable:
    """A function of its own that calls `function`, with a signature and annotations of its own."""
    inner = inspect.unwrap(function)

    @wraps(inner)
    def signed(*args, **kwargs):
        return inner(*args, **kwargs)

    own = inspect.Parameter(first, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    signed.__signature__ = inspect.Signature([own, *parameters])
    signed.__annotations__ = {p.name: p.annotation for p in parameters if p.annotation is not inspect.Parameter.empty}
    return signed
