"""What of a training is cached: the frozen part of the unit graph, and a key for everything a unit makes.

A key is the hash of what the result depends on: the unit's code, the weights it calls, and the keys of its inputs, down
to the bytes of files and the text of prompts. So it is known before anything is run, and what changes, changes just the
keys of what has to be made again.
"""

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..core.code_version import code_version, forwards, plain_text
from ..core.data.cache import UnitJob
from ..core.data.operators.unread import Unread, Variants, identity, is_unread
from ..diffusion.pipeline.units import PipelineUnit, check_outputs, read_inputs, required_units

Sides = dict[str, dict]  # "shared" and "posi", and "nega" where a training reads that → inputs by name


class CacheKeys:
    """The frozen units of a training module whose outputs something after them reads."""

    def __init__(self, module):
        self.pipe, self.units, self.kept = module.pipe, module.frozen_units, set(module.kept_inputs)
        self.reads_negative = module.task.reads_negative
        self.trained = sorted(module.trained_roots)
        self.made_of = [unit_identity(unit, self.pipe) for unit in self.units]
        self._seeds = [identity(made_of) for made_of in self.made_of]

    @property
    def stored_units(self) -> list[int]:
        """Numbers of the units that leave something to keep."""
        return [number for number, unit in enumerate(self.units) if self.kept & set(unit.output_params)]

    def check(self) -> None:
        """Refuse a training of which nothing can be cached, or of which a network is missing.

        Raises:
            ValueError: Names what is trained, or what is missing.
        """
        if not self.stored_units:
            trained = " and ".join(self.trained)
            raise ValueError(f"Nothing can be cached: no frozen unit makes what a training of {trained} reads.")
        units = [unit for number in self.stored_units for unit in self.needed_units(number)]
        self.pipe.require({name: type(unit).__name__ for unit in units for name in unit.onload_model_names})

    def about(self) -> dict[str, Any]:
        """What a cache of this plan is made of."""
        units = {type(self.units[n]).__name__: self.made_of[n] for n in self.stored_units}
        separate = [self.units[number] for number in self.stored_units if self.reads_negative]
        names = {name for unit in separate if unit.separate_cfg for name in unit.output_params}
        negative = [f"negative {name}" for name in sorted(names & self.kept)]
        return {"pipeline": type(self.pipe).__name__, "units": units, "inputs": sorted(self.kept) + negative}

    def jobs(self, inputs: Sides) -> list[UnitJob]:
        """What is kept of one sample, from the pipeline's inputs, whose files need not be read but for their bytes."""
        known = {side: {name: value for name, value in names.items()} for side, names in inputs.items()}
        jobs = []
        for number, unit in enumerate(self.units):
            for side in self.sides_of(unit):
                key = identity([self._seeds[number], self._given(unit, known, side)])
                known[side] |= {name: f"{key}/{name}" for name in unit.output_params}
                if number in self.stored_units:
                    jobs.append(UnitJob(key, number, side))
        leaves = [(side, name) for side in inputs for name in inputs[side] if known[side][name] is inputs[side][name]]
        files = [(side, name) for side, name in leaves if name in self.kept and is_unread(inputs[side][name])]
        return jobs + [UnitJob(identity(inputs[side][name]), -1, side, name) for side, name in files]

    def sides_of(self, unit: PipelineUnit) -> tuple[str, ...]:
        """Where the outputs of a unit belong."""
        if not unit.separate_cfg:
            return ("shared",)
        return ("posi", "nega") if self.reads_negative else ("posi",)

    def _given(self, unit: PipelineUnit, sides: Sides, side: str) -> dict:
        """What a unit reads to make outputs of a side."""
        if side == "nega":
            return read_inputs(unit, self.pipe, sides["shared"], unit.input_params_nega, sides["nega"])
        return read_inputs(unit, self.pipe, sides["shared"], unit.input_params_posi, sides["posi"])

    def needed_units(self, number: int) -> list[PipelineUnit]:
        """The units that lead to what a unit reads, itself the last; none for an input of the pipeline."""
        if number < 0:
            return []
        unit = self.units[number]
        return [*required_units(self.units[:number], unit.fetch_input_params()), unit]

    def shape(self, job: UnitJob, inputs: Sides) -> list:
        """Sorts runs so that those whose networks see equal shapes stand side by side."""
        names = {name for unit in self.needed_units(job.unit) for name in unit.fetch_input_params()}
        values = [inputs[side][name] for side in sorted(inputs) for name in sorted(names & set(inputs[side]))]
        return [list(value.size) if isinstance(value, Unread) else len(value) for value in values if _has_shape(value)]

    def make(self, jobs: Sequence[UnitJob], inputs: Sequence[Sides]) -> list[dict]:
        """Run the same unit over several samples, and return what is kept of its outputs.

        Raises:
            ValueError: The unit draws random numbers.
        """
        inputs = [{side: dict(names) for side, names in sides.items()} for sides in inputs]
        outputs = [{job.name: sides[job.side].get(job.name)} for job, sides in zip(jobs, inputs, strict=True)]
        for unit in self.needed_units(jobs[0].unit):
            conditional = ["nega" if job.side == "nega" else "posi" for job in jobs]
            targets = conditional if unit.separate_cfg else ["shared"] * len(jobs)
            given = [self._given(unit, sides, side) for sides, side in zip(inputs, targets, strict=True)]
            before = _random_states(self.pipe.device)
            outputs = unit.process_batch(self.pipe, given)
            drew = before != _random_states(self.pipe.device)
            for sides, side, made in zip(inputs, targets, outputs, strict=True):
                check_outputs(unit, made)
                sides[side] |= made
        if jobs[0].unit >= 0 and drew:  # those before it may: nothing of that is kept
            raise ValueError(
                f"{type(unit).__name__} draws random numbers, which would be the same for ever from a cache. If they "
                "come from a seed, give each row its own: task.extra_inputs=[seed]."
            )
        return [{name: value for name, value in made.items() if name in self.kept} for made in outputs]


def describe(module, keys: CacheKeys, variants: Variants) -> tuple[dict, list[tuple[UnitJob, str, str]]]:
    """What is written down of a sample, and all runs that it needs, each with its shape and its variant."""
    record, wanted = {"weights": variants.weights, "variants": {}}, []
    for name, row in variants.rows.items():
        inputs = pipeline_inputs(module, row)
        jobs = keys.jobs(inputs)
        record["variants"][name] = {"row": _plain(row), "runs": [(job.key, job.side) for job in jobs]}
        wanted += [(job, json.dumps(keys.shape(job, inputs)), name) for job in jobs]
    return record, wanted


def pipeline_inputs(module, row: dict) -> Sides:
    """The inputs of the pipeline that a training module makes of a row."""
    shared, posi, nega = module.get_pipeline_inputs(row)
    return {"shared": shared, "posi": posi} | ({"nega": nega} if module.task.reads_negative else {})


def _plain(row: dict) -> dict[str, Any]:
    """The plain data of a row (no dates, say), and of its files their size and identity."""
    values = {name: _plain_value(value) for name, value in row.items()}
    return {name: value for name, value in values.items() if plain_text(value) is not None}


def _plain_value(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain_value(element) for element in value]
    if isinstance(value, dict):
        return {name: _plain_value(element) for name, element in value.items()}
    return {"unread": [*value.size, value.identity]} if isinstance(value, Unread) else value


def unit_identity(unit: PipelineUnit, pipe) -> dict[str, Any]:
    """What a unit's results depend on besides its inputs: code, settings, networks and tokenizers, dtype."""
    in_batches = type(unit).process_batch is not PipelineUnit.process_batch
    process = type(unit).process_batch if in_batches else type(unit).process
    models = [cls for network in pipe.networks().values() for cls in network.subclasses.values()]
    code, attributes = code_version([process], [type(unit), type(pipe), *models])
    settings = {name: plain_text(value) for name, value in vars(unit).items() if name not in vars(PipelineUnit())}
    names = {*unit.onload_model_names, *attributes.intersection(pipe.folders)}
    return {
        "code": code,
        "settings": {name: text for name, text in settings.items() if text is not None},
        "weights": {name: _network_identity(name, pipe) for name in sorted(names)},
        "dtype": str(pipe.torch_dtype),
        **unit.depends_on(pipe),
    }


def _network_identity(name: str, pipe) -> str | None:
    """Of a network's weights and of the code that is its own, or of a tokenizer; None of what is not there."""
    network = getattr(pipe, name)
    own = forwards(network) if isinstance(network, nn.Module) else {}
    code = f"-{code_version(own.values(), own)[0]}" if own else ""
    return None if network is None else f"{pipe.fingerprint(name)}{code}"


def _random_states(device: torch.device) -> list[bytes]:
    """Of torch's own generators, from which what has no seed is drawn."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return [state.numpy().tobytes() for state in states]


def _has_shape(value: Any) -> bool:
    return isinstance(value, Unread | str)
