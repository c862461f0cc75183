"""Pipeline units: conditioning as a list of small steps over three dictionaries of inputs.

`inputs_shared` holds what both sides of classifier-free guidance read, `inputs_posi` and `inputs_nega` what differs.
"""

import difflib
import inspect
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence


class PipelineUnit:
    """One step: reads some inputs of the pipeline, returns new ones as a dict.

    What it reads are the parameters of its `process`; a parameter nobody gave a value takes the default of the
    pipeline's `__call__`, then that of `process`.

    Args:
        separate_cfg: Run once for each side of guidance; `input_params_posi` and `input_params_nega` map parameters of
            `process` to the keys of that side. `seperate_cfg`, the original's spelling, means the same.
        take_over: `process(pipe, inputs_shared, inputs_posi, inputs_nega)` gets and returns all three dictionaries.
        input_params: Names read from `inputs_shared`; derived from `process` when left out, else checked against it.
        output_params: Names it may return.
        onload_model_names: Models of the pipeline it calls.
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

    needs: str | None = None  # component of the pipeline without which the unit has no work
    calls_released_weights = False  # whether the models that it calls are as they were before any training

    def process(self, pipe, **inputs) -> dict:
        raise NotImplementedError(f"{type(self).__name__} has no process().")

    def process_batch(self, pipe, batch: Sequence[Mapping]) -> list[dict]:
        """What `process` returns for each of several inputs; a unit whose network takes batches may be faster here."""
        return [self.process(pipe, **inputs) for inputs in batch]

    def depends_on(self, pipe) -> dict[str, str]:
        """What else its results depend on, by name, besides its inputs, its code and the models that it calls."""
        return {}

    def fetch_input_params(self) -> list[str]:
        """Every key this unit may read, of any of the three dictionaries."""
        return sorted({*self.input_params, *self.input_params_posi.values(), *self.input_params_nega.values()})

    def _parameters(self) -> dict[str, inspect.Parameter]:
        """What it reads."""
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


class PipelineUnitRunner:
    """Runs one unit over the three dictionaries and returns them with its outputs added."""

    def __call__(self, unit: PipelineUnit, pipe, inputs_shared: dict, inputs_posi: dict, inputs_nega: dict):
        if unit.take_over:
            return unit.process(pipe, inputs_shared=inputs_shared, inputs_posi=inputs_posi, inputs_nega=inputs_nega)
        if not unit.separate_cfg:
            made = _process(unit, pipe, inputs_shared, unit.input_params_posi, inputs_posi)
            return {**inputs_shared, **made}, inputs_posi, inputs_nega
        positive = negative = _process(unit, pipe, inputs_shared, unit.input_params_posi, inputs_posi)
        if inputs_shared.get("cfg_scale", 1) != 1:
            negative = _process(unit, pipe, inputs_shared, unit.input_params_nega, inputs_nega)
        return inputs_shared, {**inputs_posi, **positive}, {**inputs_nega, **negative}


def run_units(units: Iterable[PipelineUnit], pipe, inputs_shared: dict, inputs_posi: dict, inputs_nega: dict):
    """Run units in order and return the three dictionaries."""
    for unit in units:
        inputs_shared, inputs_posi, inputs_nega = pipe.unit_runner(unit, pipe, inputs_shared, inputs_posi, inputs_nega)
    return inputs_shared, inputs_posi, inputs_nega


def run_units_together(units: Iterable[PipelineUnit], pipe, samples: Sequence[tuple]) -> list[tuple]:
    """Run units in order over the three dictionaries of each of several samples, those that can over all at once."""
    for unit in units:
        takes_batches = type(unit).process_batch is not PipelineUnit.process_batch
        if takes_batches and all(shared.get("cfg_scale", 1) == 1 for shared, _, _ in samples):
            samples = _process_together(unit, pipe, samples)
        else:
            samples = [pipe.unit_runner(unit, pipe, *sample) for sample in samples]
    return list(samples)


def _process_together(unit: PipelineUnit, pipe, samples: Sequence[tuple]) -> list[tuple]:
    given = [read_inputs(unit, pipe, shared, unit.input_params_posi, posi) for shared, posi, _ in samples]
    made = unit.process_batch(pipe, given)
    for outputs in made:
        check_outputs(unit, outputs)
    both = list(zip(samples, made, strict=True))
    if unit.separate_cfg:
        return [(shared, {**posi, **outputs}, {**nega, **outputs}) for (shared, posi, nega), outputs in both]
    return [({**shared, **outputs}, posi, nega) for (shared, posi, nega), outputs in both]


def required_units(units: Iterable[PipelineUnit], wanted: Iterable[str]) -> list[PipelineUnit]:
    """The units, in order, whose outputs lead to the `wanted` names; the others need not run, nor their models load."""
    wanted, required = set(wanted), []
    for unit in reversed(list(units)):
        if unit.take_over or wanted.intersection(unit.output_params):
            required.insert(0, unit)
            wanted.update(unit.fetch_input_params())
    return required


def optional_inputs(units: Iterable[PipelineUnit]) -> set[str]:
    """What units read where it is given, and do without otherwise: their `process` has a default for it."""
    parameters = [unit.parameters for unit in units if not unit.take_over]
    return {name for own in parameters for name, p in own.items() if p.default is not inspect.Parameter.empty}


def split_units(units: Iterable[PipelineUnit], trained: set[str]) -> tuple[list[PipelineUnit], list[PipelineUnit]]:
    """Units whose results training the models `trained` does not change, and the others; to be run in this order.

    A unit is of the others if it calls a trained model, reads what one of them returned, or writes what one of them
    reads or returned before it.
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


def read_inputs(unit: PipelineUnit, pipe, inputs: Mapping, names: Mapping[str, str], side: Mapping) -> dict:
    """The arguments of `process`: `names` of them (parameter → key) from one side of guidance, the rest shared."""
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
            f"{type(unit).__name__} returned {undeclared}, which its output_params {unit.output_params} do not name."
        )


def in_groups(items: Sequence, kinds: Sequence[Hashable], make: Callable[[list], Sequence]) -> list:
    """What `make` makes of the items of each kind together, one result an item, in the items' order."""
    results = [None] * len(items)
    for kind in dict.fromkeys(kinds):
        places = [place for place, other in enumerate(kinds) if other == kind]
        for place, made in zip(places, make([items[place] for place in places]), strict=True):
            results[place] = made
    return results


def _process(unit: PipelineUnit, pipe, inputs: Mapping, names: Mapping[str, str], side: Mapping) -> dict:
    outputs = unit.process(pipe, **read_inputs(unit, pipe, inputs, names, side))
    check_outputs(unit, outputs)
    return outputs


def _lookup(name: str, inputs: Mapping, pipe, unit: PipelineUnit):
    if name in inputs:
        return inputs[name]
    if name in pipe.call_defaults:
        return pipe.call_defaults[name]
    nearest = difflib.get_close_matches(name, inputs, 1)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    raise ValueError(f"{type(unit).__name__} needs {name!r}; have {sorted(inputs)}.{hint}")
