"""Templates by folder or repository: one that is trained, or any number in front of a pipeline."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any

import torch

from ...core.loader import ModelConfig
from .cache import as_inputs, check_names, merge_caches
from .code import RESERVED, TemplateCode, read_code
from .model import Template, check_arguments, load_template
from .source import find_template


@dataclass(frozen=True, kw_only=True)
class Templates:
    """Which templates: folders, or a hub's repository.

    Args:
        path: A folder with a `model.py`, or several; its code runs.
        model_id: A hub's repository, "owner/name".
        revision: Its commit, 40 hex digits.
        trust_remote_code: That its code was read and may run here.
        from_scratch: Train from random weights, also where the template names trained ones.
    """

    path: str | Sequence[str] | None = None
    model_id: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    from_scratch: bool = False

    @property
    def configs(self) -> list[ModelConfig]:
        """Where each of them is."""
        folders = [self.path] if isinstance(self.path, str) else self.path or []
        configs = [ModelConfig(path=folder) for folder in folders]
        hub = {"revision": self.revision, "trust_remote_code": self.trust_remote_code}
        return configs + ([ModelConfig(model_id=self.model_id, **hub)] if self.model_id else [])

    def load_one(self, seed: int = 0) -> Template:
        """The template that is trained, from the weights it names or, without any, from random ones of this seed.

        Raises:
            ValueError: There is none, or several; it may not run, or is not in order.
        """
        if len(self.configs) != 1:
            raise ValueError(f"template.path is {self.path}; expected the folder of the one template that is trained.")
        code = read_code(find_template(self.configs[0]))
        return load_template(replace(code, weights=()) if self.from_scratch else code, seed)

    def load_all(self, pipe) -> "TemplatePipeline":
        """All of them, in front of a pipeline, on its device and in its dtype."""
        return TemplatePipeline(pipe.torch_dtype, pipe.device, self.configs)


class TemplatePipeline:
    """Any number of templates, in front of a pipeline.

    Args:
        torch_dtype, device: Of their networks.
        model_configs: Where each of them is.
        lazy_loading: Hold no network in memory but the one that is being called.

    Raises:
        FileNotFoundError, ValueError: One is not there, may not run, or is not in order.
    """

    def __init__(
        self,
        torch_dtype: torch.dtype = torch.bfloat16,
        device="cpu",
        model_configs: Sequence[ModelConfig] = (),
        lazy_loading: bool = False,
    ):
        self.torch_dtype, self.device = torch_dtype, device
        self.codes: list[TemplateCode] = [read_code(find_template(c)) for c in model_configs]
        self.templates = None if lazy_loading else [self._load(code) for code in self.codes]

    @classmethod
    def from_pretrained(
        cls,
        torch_dtype: torch.dtype = torch.bfloat16,
        device="cpu",
        model_configs: Sequence[ModelConfig] = (),
        lazy_loading: bool = False,
    ) -> "TemplatePipeline":
        """Read the templates' code and, unless they are to be loaded lazily, their weights."""
        return cls(torch_dtype, device, model_configs, lazy_loading)

    def __call__(
        self,
        pipe,
        template_inputs: Sequence[Mapping] = (),
        negative_template_inputs: Sequence[Mapping] = (),
        wins: Mapping[str, int] | None = None,
        **kwargs,
    ):
        """Draw with templates: `pipe(**kwargs)`, and what they add; see `arguments`.

        Raises:
            ValueError: An argument is given that a template makes.
        """
        made = self.arguments(pipe, template_inputs, negative_template_inputs, wins)
        if twice := sorted(made.keys() & {name for name, value in kwargs.items() if value is not None}):
            raise ValueError(f"{twice[0]} is given, and a template makes it, too; leave it out.")
        return pipe(**{**kwargs, **made})

    @torch.no_grad()
    def arguments(
        self,
        pipe,
        template_inputs: Sequence[Mapping] = (),
        negative_template_inputs: Sequence[Mapping] = (),
        wins: Mapping[str, int] | None = None,
    ) -> dict[str, Any]:
        """Arguments of the pipeline's call that the templates make.

        Args:
            template_inputs: Of each call of a template its inputs, and as `model_id` its number in `model_configs`, 0
                unless said. What it makes is read by the conditional prediction.
            negative_template_inputs: The same for the other prediction.
            wins: Where several return one name that cannot be merged, the place in the list of the one that is taken.

        Raises:
            ValueError: A template is not there, lacks an input, returns what the pipeline does not take, or what
                another one returns, too.
        """
        calls, caches = self.check(template_inputs, negative_template_inputs), {}
        for number in sorted({call.number for call in calls}):
            caches |= self._run(pipe, number, [call for call in calls if call.number == number])
        prefix, arguments = pipe.lora_prefixes[pipe.in_iteration_models[0]], {}
        for sign in ("", "negative_"):
            own = [(call.source, call.place, caches[call]) for call in calls if call.sign == sign]
            merged = merge_caches(own, prefix, wins)
            arguments |= {sign + name: value for name, value in merged.items()}
        return arguments

    def check(
        self, template_inputs: Sequence[Mapping] = (), negative_template_inputs: Sequence[Mapping] = ()
    ) -> list["_Call"]:
        """The calls that these inputs are, without making them.

        Raises:
            ValueError: A template is not there, or lacks an input.
        """
        given = {"": template_inputs or (), "negative_": negative_template_inputs or ()}
        return [self._call(sign, place, inputs) for sign, own in given.items() for place, inputs in enumerate(own)]

    def _call(self, sign: str, place: int, inputs: Mapping) -> "_Call":
        what = f"{sign}template_inputs[{place}]"
        if not isinstance(inputs, Mapping):
            raise ValueError(f"{what} is {inputs!r}, expected a dict of a template's inputs, and its {RESERVED}.")
        number = inputs.get(RESERVED, 0)
        if number not in range(len(self.codes)):
            raise ValueError(
                f"{what} has {RESERVED} {number!r}, expected the number of one of {len(self.codes)} templates."
            )
        own, code = {name: value for name, value in inputs.items() if name != RESERVED}, self.codes[number]
        check_arguments(code.model.process_inputs, own, f"{what} ({code.file})")
        return _Call(sign, place, number, own, f"{what} ({code.file})")

    def _run(self, pipe, number: int, calls: Sequence["_Call"]) -> dict["_Call", dict]:
        """The template caches of all calls of one template, whose network need not stay in memory."""
        template = self._load(self.codes[number]) if self.templates is None else self.templates[number]
        taken, caches = signature(type(pipe).__call__).parameters, {}
        for call in calls:
            cache = template.forward(template.process_inputs(call.inputs, pipe), pipe)
            check_names([call.sign + name for name in cache], taken, call.source, type(pipe).__name__)
            as_inputs(pipe, cache, call.source)
            caches[call] = cache
        return caches

    def _load(self, code: TemplateCode) -> Template:
        template = load_template(code)
        template.model.to(self.device, self.torch_dtype)
        return template


@dataclass(frozen=True, eq=False)
class _Call:
    """One call of a template: of which side of guidance, which one in its list, of which template, with what."""

    sign: str
    place: int
    number: int
    inputs: Mapping[str, Any]
    source: str
