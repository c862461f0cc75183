"""`Templates`, which the configuration chooses, and `TemplatePipeline`, which samples a pipeline with them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...core.loader import ModelConfig
from .cache import as_inputs, check_names, merge_caches
from .code import RESERVED, SIZE, TemplateCode, models_used, read_code
from .model import Template, check_arguments, load_template
from .source import find_template

if TYPE_CHECKING:
    from ..base_pipeline import BasePipeline


@dataclass(frozen=True, kw_only=True)
class Templates:
    """Where templates are: in folders, or in a hub's repository.

    Args:
        path: A folder with a `model.py`, or several; their code runs.
        model_id: A hub's repository, "owner/name".
        revision: Its commit, 40 hex digits.
        trust_remote_code: Whether its code may run on this machine; read it before.
        from_scratch: Train from random weights even if the template names trained ones.
    """

    path: str | Sequence[str] | None = None
    model_id: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    from_scratch: bool = False

    @property
    def configs(self) -> list[ModelConfig]:
        """The location of each template."""
        folders = [self.path] if isinstance(self.path, str) else self.path or []
        configs = [ModelConfig(path=folder) for folder in folders]
        hub = {"revision": self.revision, "trust_remote_code": self.trust_remote_code}
        return configs + ([ModelConfig(model_id=self.model_id, **hub)] if self.model_id else [])

    def load_one(self, seed: int = 0) -> Template:
        """Load the one template that is trained; a template that names no weights starts from random ones.

        Raises:
            ValueError: There is no template or several, its code may not run, or its code or weights are wrong.
        """
        if len(self.configs) != 1:
            raise ValueError(f"template.path is {self.path}; expected the folder of the one template that is trained.")
        code = read_code(find_template(self.configs[0]))
        return load_template(replace(code, weights=()) if self.from_scratch else code, seed)

    def load_all(self, pipe: "BasePipeline") -> "TemplatePipeline":
        """Load all templates, on a pipeline's device and in its dtype."""
        return TemplatePipeline(pipe.torch_dtype, pipe.device, self.configs)


class TemplatePipeline:
    """Any number of templates, which compute inputs of a pipeline.

    Args:
        torch_dtype, device: Dtype and device of their networks.
        model_configs: Where the templates are.
        lazy_loading: Load a network only for its call, and keep none in memory.

    Raises:
        FileNotFoundError, ValueError: A template is not there, its code may not run, or its code or weights are wrong.
    """

    def __init__(
        self,
        torch_dtype: torch.dtype = torch.bfloat16,
        device: str | torch.device = "cpu",
        model_configs: Sequence[ModelConfig] = (),
        lazy_loading: bool = False,
    ):
        self.torch_dtype, self.device = torch_dtype, device
        self.codes: list[TemplateCode] = [read_code(find_template(config)) for config in model_configs]
        self.templates = None if lazy_loading else [self._load(code) for code in self.codes]

    @classmethod
    def from_pretrained(
        cls,
        torch_dtype: torch.dtype = torch.bfloat16,
        device: str | torch.device = "cpu",
        model_configs: Sequence[ModelConfig] = (),
        lazy_loading: bool = False,
    ) -> "TemplatePipeline":
        """Read the templates' code and, unless `lazy_loading`, their weights."""
        return cls(torch_dtype, device, model_configs, lazy_loading)

    def __call__(
        self,
        pipe: "BasePipeline",
        template_inputs: Sequence[Mapping] = (),
        negative_template_inputs: Sequence[Mapping] = (),
        wins: Mapping[str, int] | None = None,
        **kwargs,
    ) -> Any:
        """Sample a pipeline with `kwargs` and the outputs of templates; see `arguments`.

        Raises:
            ValueError: `kwargs` has an argument that a template returns, too.
        """
        size = {name: kwargs[name] for name in SIZE if kwargs.get(name) is not None}
        outputs = self.arguments(pipe, template_inputs, negative_template_inputs, wins, size)
        if twice := sorted(outputs.keys() & {name for name, value in kwargs.items() if value is not None}):
            raise ValueError(f"{twice[0]} is given, and a template returns it, too; leave it out.")
        return pipe(**{**kwargs, **outputs})

    @torch.no_grad()
    def arguments(
        self,
        pipe: "BasePipeline",
        template_inputs: Sequence[Mapping] = (),
        negative_template_inputs: Sequence[Mapping] = (),
        wins: Mapping[str, int] | None = None,
        size: Mapping[str, int] | None = None,
    ) -> dict[str, Any]:
        """Arguments of the pipeline's call that the templates return.

        Args:
            template_inputs: One dict per call of a template: its inputs and, as `model_id`, its index in
                `model_configs`, by default 0. The conditional prediction reads the outputs.
            negative_template_inputs: The same for the unconditional prediction.
            wins: For an output that several calls return and that cannot be merged, the index of the call whose value
                is taken.
            size: `height` and `width` of the sample in pixels, where they are not the pipeline's defaults.

        Raises:
            ValueError: A template does not exist, lacks an input, or returns an output that the pipeline does not take
                or that several return.
        """
        calls, caches = self.check(template_inputs, negative_template_inputs), {}
        sides = {**{name: pipe.call_defaults[name] for name in SIZE}, **(size or {})}
        fitted = dict(zip(SIZE, pipe.latents.fitted(*(sides[name] for name in SIZE)), strict=True))
        for number in sorted({call.number for call in calls}):
            caches |= self._run(pipe, number, [call for call in calls if call.number == number], fitted)
        names, arguments = pipe.layer_names(pipe.in_iteration_models[0]), {}
        for sign in ("", "negative_"):
            of_side = [(call.source, call.index, caches[call]) for call in calls if call.sign == sign]
            merged = merge_caches(of_side, pipe.network, names, wins)
            arguments |= {sign + name: value for name, value in merged.items()}
        return arguments

    @property
    def models(self) -> list[nn.Module]:
        """The templates' networks, in the order of `model_configs`.

        Raises:
            ValueError: They are loaded for each call only (`lazy_loading`).
        """
        if self.templates is None:
            raise ValueError("lazy_loading=True keeps no network; set lazy_loading=False to read .models.")
        return [template.model for template in self.templates]

    def called_models(self, pipe: "BasePipeline") -> set[str]:
        """Names of the models of a pipeline that the templates may call."""
        methods = [(code, method) for code in self.codes for method in ("process_inputs", "forward")]
        return {name for code, method in methods for name in models_used(pipe, code, method)}

    def check(
        self, template_inputs: Sequence[Mapping] = (), negative_template_inputs: Sequence[Mapping] = ()
    ) -> list["_Call"]:
        """Check template inputs and turn them into calls, without running them.

        Raises:
            ValueError: A template does not exist, or lacks an input.
        """
        given = {"": template_inputs or (), "negative_": negative_template_inputs or ()}
        return [self._call(sign, index, inputs) for sign, own in given.items() for index, inputs in enumerate(own)]

    def _call(self, sign: str, index: int, inputs: Mapping) -> "_Call":
        what = f"{sign}template_inputs[{index}]"
        if not isinstance(inputs, Mapping):
            raise ValueError(f"{what} is {inputs!r}, expected a dict of a template's inputs, and its {RESERVED}.")
        number = inputs.get(RESERVED, 0)
        if number not in range(len(self.codes)):
            raise ValueError(
                f"{what} has {RESERVED} {number!r}, expected the number of one of {len(self.codes)} templates."
            )
        own, code = {name: value for name, value in inputs.items() if name != RESERVED}, self.codes[number]
        check_arguments(code.model.process_inputs, [*own, *code.size], f"{what} ({code.file})")
        return _Call(sign, index, number, own, f"{what} ({code.file})")

    def _run(
        self, pipe: "BasePipeline", number: int, calls: Sequence["_Call"], size: Mapping[str, int]
    ) -> dict["_Call", dict]:
        """Run all calls of one template, so that its network need not stay in memory; returns their template caches."""
        template = self._load(self.codes[number]) if self.templates is None else self.templates[number]
        accepted, caches = signature(type(pipe).__call__).parameters, {}
        for call in calls:
            cache = template.forward(template.process_inputs(call.inputs, pipe, size), pipe)
            check_names([call.sign + name for name in cache], accepted, call.source, type(pipe).__name__)
            as_inputs(pipe, cache, call.source)
            caches[call] = cache
        return caches

    def _load(self, code: TemplateCode) -> Template:
        template = load_template(code)
        template.model.to(self.device, self.torch_dtype)
        return template


@dataclass(frozen=True, eq=False)
class _Call:
    """One call of a template."""

    sign: str  # side of guidance: "" for the conditional prediction, "negative_" for the other
    index: int  # in the list of that side
    number: int  # the template's index in `model_configs`
    inputs: Mapping[str, Any]
    source: str  # name of the call in errors
