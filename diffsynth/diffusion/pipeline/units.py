"""Pipeline units: small steps that compute the network's inputs, over three dictionaries.

`inputs_shared` holds the inputs of both predictions of classifier-free guidance, `inputs_posi` the inputs of the
conditional one only, and `inputs_nega` the inputs of the unconditional one only.
"""

import difflib
import inspect
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...core.code_version import code_version

if TYPE_CHECKING:
    from ..base_pipeline import BasePipeline


class PipelineUnit:
    """One step: reads some inputs of the pipeline and returns new ones as a dict.

    It reads the parameters of its `process`. A parameter without a value takes the default of the pipeline's
    `__call__`, or else that of `process`.

    Args:
        separate_cfg: Run once for each side of guidance; `input_params_posi` and `input_params_nega` map parameters of
            `process` to the keys of that side. `seperate_cfg`, DiffSynth-Studio's spelling, means the same.
        take_over: `process(pipe, inputs_shared, inputs_posi, inputs_nega)` gets and returns all three dictionaries.
        input_params: Names read from `inputs_shared`; None derives them from `process`, other values are checked
            against it.
        output_params: Names that it may return.
        onload_model_names: Models of the pipeline that it calls.
    """

    def __init__(
        self,
        separate_cfg: bool = False,
        take_over: bool = False,
        input_params: Iterable[str] | None = None,
        output_params: Iterable[str] = (),
        input_params_posi: Mapping[str, str] | None = None,
        input_params_nega: Mapping[str, str] | None = None,
        onload_model_names: Iterable[str] = (),
        seperate_cfg: bool = False,
    ):
        self.separate_cfg = separate_cfg or seperate_cfg
        self.take_over = take_over
        self.input_params_posi = dict(input_params_posi or {})
        self.input_params_nega = dict(input_params_nega or {})
        self.output_params = tuple(output_params)
        self.onload_model_names = tuple(onload_model_names or ())
        self.input_params = self._input_params(input_params)

    needs: str | None = None  # optional component of the pipeline; without it the unit is left out
    reads_alone = True  # whether no other unit reads its image, which would then be for nothing without that component
    model_with_it: str = "a model that has it"  # for errors, if it is absent: which option of `model` to take
    column: str | None = None  # column of the data set; an objective that does not read it leaves the unit out
    calls_released_weights = False  # whether it calls its models as they were before the training

    def process(self, pipe, **inputs) -> dict:
        """The unit's outputs for one sample, by name."""
        raise NotImplementedError(f"{type(self).__name__} has no process().")

    def process_batch(self, pipe, batch: Sequence[Mapping]) -> list[dict]:
        """The outputs of `process` for several samples; units whose networks take batches override it to be faster."""
        return [self.process(pipe, **inputs) for inputs in batch]

    def depends_on(self, pipe: "BasePipeline") -> dict[str, str]:
        """What the outputs depend on besides inputs, code and models, by name; it becomes part of a cache's keys."""
        return {}

    def fetch_input_params(self) -> list[str]:
        """All keys that this unit may read, from any of the three dictionaries."""
        return sorted({*self.input_params, *self.input_params_posi.values(), *self.input_params_nega.values()})

    def _parameters(self) -> dict[str, inspect.Parameter]:
        """The parameters whose names are the unit's inputs."""
        return dict(inspect.signature(self.process).parameters)

    def _input_params(self, declared: Iterable[str] | None) -> tuple[str, ...]:
        if self.take_over:
            return tuple(declared or ())
        self.parameters = self._parameters()
        derived = tuple(name for name in self.parameters if name not in ("pipe", *self.input_params_posi))
        wrong = sorted(set(declared or derived) ^ set(derived))
        if wrong:
            raise ValueError(
                f"{type(self).__name__} declares input_params={tuple(declared)}, but process() takes {derived}; "
                f"they differ in {wrong}. Leave input_params out to have it derived."
            )
        return derived


class WrappedEmbedder(PipelineUnit):
    """Base class of units that call a family's embedder with other inputs; a cache depends on the embedder's code too.

    Args:
        embedder: The family's unit.
        declared: Arguments of `PipelineUnit`.
    """

    def __init__(self, embedder: PipelineUnit, **declared: Any):
        self.embedder, self.column = embedder, embedder.column
        super().__init__(onload_model_names=embedder.onload_model_names, **declared)

    def depends_on(self, pipe: "BasePipeline") -> dict[str, str]:
        kind = type(self.embedder)
        code, attributes = code_version([kind.process, kind.process_batch], [kind, type(pipe)])
        folders = {name: str(pipe.fingerprint(name)) for name in sorted(attributes & pipe.folders.keys())}
        return {"embedder": code, **folders}

    def process(self, pipe, **inputs):
        return self.process_batch(pipe, [inputs])[0]

    def _parameters(self) -> dict[str, inspect.Parameter]:
        return self.embedder.parameters


class PipelineUnitRunner:
    """Runs one unit over the three dictionaries and returns them with its outputs added."""

    def __call__(
        self, unit: PipelineUnit, pipe: "BasePipeline", inputs_shared: dict, inputs_posi: dict, inputs_nega: dict
    ) -> tuple[dict, dict, dict]:
        if unit.take_over:
            return unit.process(pipe, inputs_shared=inputs_shared, inputs_posi=inputs_posi, inputs_nega=inputs_nega)
        if not unit.separate_cfg:
            outputs = _process(unit, pipe, inputs_shared, unit.input_params_posi, inputs_posi)
            return {**inputs_shared, **outputs}, inputs_posi, inputs_nega
        positive = negative = _process(unit, pipe, inputs_shared, unit.input_params_posi, inputs_posi)
        if inputs_shared.get("cfg_scale", 1) != 1:
            negative = _process(unit, pipe, inputs_shared, unit.input_params_nega, inputs_nega)
        return inputs_shared, {**inputs_posi, **positive}, {**inputs_nega, **negative}


def run_units(
    units: Iterable[PipelineUnit], pipe: "BasePipeline", inputs_shared: dict, inputs_posi: dict, inputs_nega: dict
) -> tuple[dict, dict, dict]:
    """Run units in order over the three dictionaries of one sample, and return them with the units' outputs."""
    for unit in units:
        inputs_shared, inputs_posi, inputs_nega = pipe.unit_runner(unit, pipe, inputs_shared, inputs_posi, inputs_nega)
    return inputs_shared, inputs_posi, inputs_nega


def run_units_together(units: Iterable[PipelineUnit], pipe: "BasePipeline", samples: Sequence[tuple]) -> list[tuple]:
    """Run units in order over the three dictionaries of several samples; units that take batches get all at once."""
    for unit in units:
        takes_batches = type(unit).process_batch is not PipelineUnit.process_batch
        if takes_batches and all(shared.get("cfg_scale", 1) == 1 for shared, _, _ in samples):
            samples = _process_together(unit, pipe, samples)
        else:
            samples = [pipe.unit_runner(unit, pipe, *sample) for sample in samples]
    return list(samples)


def _process_together(unit: PipelineUnit, pipe: "BasePipeline", samples: Sequence[tuple]) -> list[tuple]:
    batch = [read_inputs(unit, pipe, shared, unit.input_params_posi, posi) for shared, posi, _ in samples]
    results = unit.process_batch(pipe, batch)
    for outputs in results:
        check_outputs(unit, outputs)
    pairs = list(zip(samples, results, strict=True))
    if unit.separate_cfg:
        return [(shared, {**posi, **outputs}, {**nega, **outputs}) for (shared, posi, nega), outputs in pairs]
    return [({**shared, **outputs}, posi, nega) for (shared, posi, nega), outputs in pairs]


def required_units(units: Iterable[PipelineUnit], wanted: Iterable[str]) -> list[PipelineUnit]:
    """The units, in order, on whose outputs the `wanted` inputs depend; the others need not run."""
    wanted, required = set(wanted), []
    for unit in reversed(list(units)):
        if unit.take_over or wanted.intersection(unit.output_params):
            required.insert(0, unit)
            wanted.update(unit.fetch_input_params())
    return required


def optional_inputs(units: Iterable[PipelineUnit]) -> set[str]:
    """Inputs that units read if they are given: the parameters of `process` that have a default."""
    parameters = [unit.parameters for unit in units if not unit.take_over]
    return {name for own in parameters for name, p in own.items() if p.default is not inspect.Parameter.empty}


def split_units(units: Iterable[PipelineUnit], trained: set[str]) -> tuple[list[PipelineUnit], list[PipelineUnit]]:
    """Split units into frozen and live ones; the outputs of frozen units do not change while `trained` are trained.

    All frozen units can run before all live ones. A unit is live if it takes over all dictionaries, calls a trained
    model, reads an output of a live unit, or writes an input or output of a live unit before it.
    """
    frozen, live, touched, written = [], [], set(), set()
    for unit in units:
        reads, writes = set(unit.fetch_input_params()), set(unit.output_params)
        calls_trained = trained & set(unit.onload_model_names) and not unit.calls_released_weights
        if unit.take_over or calls_trained or reads & written or writes & touched:
            live.append(unit)
            touched |= reads | writes
            written |= writes
        else:
            frozen.append(unit)
    return frozen, live


def read_inputs(
    unit: PipelineUnit, pipe: "BasePipeline", inputs: Mapping, names: Mapping[str, str], side: Mapping
) -> dict:
    """The arguments of a unit's `process`.

    Args:
        inputs: The shared inputs.
        names: Parameters that are read from one side of guidance, and their keys there.
        side: The inputs of that side.
    """
    given = {parameter: _lookup(key, side, pipe, unit) for parameter, key in names.items()}
    for name in unit.input_params:
        if name in inputs or name in pipe.call_defaults or unit.parameters[name].default is inspect.Parameter.empty:
            given[name] = _lookup(name, inputs, pipe, unit)
    return given


def check_outputs(unit: PipelineUnit, outputs: Mapping) -> None:
    """Refuse outputs that a unit does not declare."""
    undeclared = sorted(set(outputs) - set(unit.output_params))
    if undeclared:
        raise ValueError(
            f"{type(unit).__name__} returned {undeclared}, which its output_params {unit.output_params} do not name; "
            "add them there."
        )


def in_groups(items: Sequence, kinds: Sequence[Hashable], make: Callable[[list], Sequence]) -> list:
    """Call `make` once per kind, with all items of that kind, and return one result per item, in the items' order."""
    results = [None] * len(items)
    for kind in dict.fromkeys(kinds):
        indices = [index for index, other in enumerate(kinds) if other == kind]
        group = make([items[index] for index in indices])
        for index, result in zip(indices, group, strict=True):
            results[index] = result
    return results


def _process(
    unit: PipelineUnit, pipe: "BasePipeline", inputs: Mapping, names: Mapping[str, str], side: Mapping
) -> dict:
    outputs = unit.process(pipe, **read_inputs(unit, pipe, inputs, names, side))
    check_outputs(unit, outputs)
    return outputs


def _lookup(name: str, inputs: Mapping, pipe: "BasePipeline", unit: PipelineUnit) -> Any:
    if name in inputs:
        return inputs[name]
    if name in pipe.call_defaults:
        return pipe.call_defaults[name]
    nearest = difflib.get_close_matches(name, inputs, 1)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    raise ValueError(f"{type(unit).__name__} needs {name!r}; have {sorted(inputs)}.{hint}")
