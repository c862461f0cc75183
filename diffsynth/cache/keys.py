"""Cache keys: which outputs of units a training can cache, and under which key each is stored.

A unit can be cached if it is frozen: training does not change its outputs. A key is the hash of everything that an
output depends on: the unit's code, the weights it calls, and the keys of its inputs, down to the bytes of files and the
text of prompts. So a key is known before any network runs, and after a change only the outputs that depend on it have
new keys and are made again.
"""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..core.code_version import code_version, forwards, plain_text
from ..core.data.cache import KEPT_FILE, UnitJob
from ..core.data.operators.unread import Unread, Variants, identity, is_unread
from ..diffusion.pipeline.units import PipelineUnit, check_outputs, read_inputs, required_units

if TYPE_CHECKING:
    from ..diffusion.base_pipeline import BasePipeline
    from ..diffusion.training_module import PipelineTrainingModule

# Inputs of the pipeline by name, under "shared" and "posi", and under "nega" if the training reads a negative prompt.
Sides = dict[str, dict]


class CacheKeys:
    """Knows which frozen units of a training module are cached, and computes the keys of their outputs.

    Only outputs that the loss, `model_fn` or a later unit reads are kept. A unit's number is its index in `units`, the
    frozen units in order.
    """

    def __init__(self, module: "PipelineTrainingModule"):
        self.module = module
        self.pipe, self.units, self.kept = module.pipe, module.frozen_units, set(module.kept_inputs)
        self.reads_negative = module.task.reads_negative
        self.trained = sorted(module.trained_roots)
        self.identities = [unit_identity(unit, self.pipe) for unit in self.units]
        self._hashes = [identity(content) for content in self.identities]

    @property
    def stored_units(self) -> list[int]:
        """Numbers of the units that have outputs to keep."""
        return [number for number, unit in enumerate(self.units) if self.kept & set(unit.output_params)]

    def check(self) -> None:
        """Check that the training has something to cache, and that the pipeline has every network it takes.

        Raises:
            ValueError: Nothing can be cached, or a network is missing; the message names it.
        """
        if not self.stored_units:
            trained = " and ".join(self.trained)
            raise ValueError(
                f"Nothing can be cached: no frozen unit makes what a training of {trained} reads; train on the data "
                "set without a cache."
            )
        units = [unit for number in self.stored_units for unit in self.needed_units(number)]
        self.pipe.require({name: type(unit).__name__ for unit in units for name in unit.onload_model_names})

    def about(self) -> dict[str, Any]:
        """Return what a cache for this training depends on, besides the data: pipeline, units and kept inputs."""
        units = {type(self.units[n]).__name__: self.identities[n] for n in self.stored_units}
        separate = [self.units[number] for number in self.stored_units if self.reads_negative]
        names = {name for unit in separate if unit.separate_cfg for name in unit.output_params}
        negative = [f"negative {name}" for name in sorted(names & self.kept)]
        return {"pipeline": type(self.pipe).__name__, "units": units, "inputs": sorted(self.kept) + negative}

    def jobs(self, inputs: Sides, hashes: Sequence[str] | None = None) -> list[UnitJob]:
        """Return the jobs of one sample, each with its key: its stored units, and the files that are kept as they are.

        No unit runs: the key of a unit's output stands for its value in the inputs of later units.

        Args:
            inputs: The pipeline's inputs of the sample, with files not yet decoded.
            hashes: Hashes of the units' identities; None takes those of this training.
        """
        hashes = self._hashes if hashes is None else hashes
        known = {side: dict(names) for side, names in inputs.items()}
        jobs = []
        for number, unit in enumerate(self.units):
            for side in self.sides_of(unit):
                key = identity([hashes[number], self._inputs_of(unit, known, side)])
                known[side] |= {name: f"{key}/{name}" for name in unit.output_params}
                if number in self.stored_units:
                    jobs.append(UnitJob(key, number, side))
        unchanged = [(side, n) for side in inputs for n in inputs[side] if known[side][n] is inputs[side][n]]
        files = [(side, name) for side, name in unchanged if name in self.kept and is_unread(inputs[side][name])]
        return jobs + [UnitJob(identity(inputs[side][name]), KEPT_FILE, side, name) for side, name in files]

    def of(self, row: dict, units: Mapping[str, Any]) -> set[tuple[str, str]]:
        """Return key and side of the entries that a cache must have for a row whose files are not decoded.

        Args:
            units: The identities of the cache's units by name, as `about` returned them: this pipeline may lack their
                networks. Entries of other networks are left out.
        """
        hashes = [units.get(type(unit).__name__) for unit in self.units]
        hashes = [own if cached is None else identity(cached) for own, cached in zip(self._hashes, hashes, strict=True)]
        jobs = self.jobs(pipeline_inputs(self.module, row), hashes)
        return {(job.key, job.side) for job in jobs if self._is_known(job.unit, units)}

    def _is_known(self, number: int, units: Mapping[str, Any]) -> bool:
        """Whether the identity of each unit that an output needs is in `units` or complete here."""
        identities = zip(self.units, self.identities, strict=True)
        absent = [unit for unit, own in identities if None in own["weights"].values()]
        return all(unit not in absent or type(unit).__name__ in units for unit in self.needed_units(number))

    def sides_of(self, unit: PipelineUnit) -> tuple[str, ...]:
        """Return the sides to which the outputs of a unit belong: `shared`, or `posi` and, if it is read, `nega`."""
        if not unit.separate_cfg:
            return ("shared",)
        return ("posi", "nega") if self.reads_negative else ("posi",)

    def _inputs_of(self, unit: PipelineUnit, sides: Sides, side: str) -> dict:
        """Return the arguments of a unit whose outputs belong to `side`."""
        if side == "nega":
            return read_inputs(unit, self.pipe, sides["shared"], unit.input_params_nega, sides["nega"])
        return read_inputs(unit, self.pipe, sides["shared"], unit.input_params_posi, sides["posi"])

    def needed_units(self, number: int) -> list[PipelineUnit]:
        """Return a unit and, before it, the units whose outputs it needs; none for a kept file."""
        if number == KEPT_FILE:
            return []
        unit = self.units[number]
        return [*required_units(self.units[:number], unit.fetch_input_params()), unit]

    def shape(self, job: UnitJob, inputs: Sides) -> list:
        """Sort key that puts jobs with inputs of equal shape next to each other, so that they form a batch."""
        names = {name for unit in self.needed_units(job.unit) for name in unit.fetch_input_params()}
        values = [inputs[side][name] for side in sorted(inputs) for name in sorted(names & set(inputs[side]))]
        return [list(value.size) if isinstance(value, Unread) else len(value) for value in values if _has_shape(value)]

    def make(self, jobs: Sequence[UnitJob], inputs: Sequence[Sides]) -> list[dict]:
        """Run one unit, after the units that it needs, for a batch of samples, and return its outputs to keep.

        Args:
            jobs: One job per sample, all of the same unit.
            inputs: The pipeline's inputs of each sample, with files decoded.

        Raises:
            ValueError: The unit uses random numbers.
        """
        inputs = [{side: dict(names) for side, names in sides.items()} for sides in inputs]
        outputs = [{job.name: sides[job.side].get(job.name)} for job, sides in zip(jobs, inputs, strict=True)]
        for unit in self.needed_units(jobs[0].unit):
            conditional = ["nega" if job.side == "nega" else "posi" for job in jobs]
            targets = conditional if unit.separate_cfg else ["shared"] * len(jobs)
            arguments = [self._inputs_of(unit, sides, side) for sides, side in zip(inputs, targets, strict=True)]
            before = _random_states(self.pipe.device)
            outputs = unit.process_batch(self.pipe, arguments)
            is_random = before != _random_states(self.pipe.device)
            for sides, side, made in zip(inputs, targets, outputs, strict=True):
                check_outputs(unit, made)
                sides[side] |= made
        if jobs[0].unit >= 0 and is_random:  # the units before it may be random, as nothing of theirs is kept here
            raise ValueError(
                f"{type(unit).__name__} uses random numbers, which a cache would repeat in every epoch. If they come "
                "from a seed, give each row a seed of its own: task.extra_inputs=[seed]."
            )
        return [{name: value for name, value in made.items() if name in self.kept} for made in outputs]


def describe(
    module: "PipelineTrainingModule", keys: CacheKeys, variants: Variants
) -> tuple[dict, list[tuple[UnitJob, str, str]]]:
    """Return the record of a sample for the cache's index, and all of its jobs, each with shape and variant name.

    The record has, for each variant, its row as plain data and the keys of its entries.
    """
    record, wanted = {"weights": variants.weights, "variants": {}}, []
    for name, row in variants.rows.items():
        inputs = pipeline_inputs(module, row)
        jobs = keys.jobs(inputs)
        record["variants"][name] = {"row": _plain(row), "runs": [(job.key, job.side) for job in jobs]}
        wanted += [(job, json.dumps(keys.shape(job, inputs)), name) for job in jobs]
    return record, wanted


def pipeline_inputs(module: "PipelineTrainingModule", row: dict) -> Sides:
    """Return the pipeline's inputs of a row, by side, as the training module reads it."""
    shared, posi, nega = module.get_pipeline_inputs(row)
    return {"shared": shared, "posi": posi} | ({"nega": nega} if module.task.reads_negative else {})


def _plain(row: dict) -> dict[str, Any]:
    """Return the values of a row that are plain data (no dates, for example), with size and identity for files."""
    values = {name: _plain_value(value) for name, value in row.items()}
    return {name: value for name, value in values.items() if plain_text(value) is not None}


def _plain_value(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain_value(element) for element in value]
    if isinstance(value, dict):
        return {name: _plain_value(element) for name, element in value.items()}
    return {"unread": [*value.size, value.identity]} if isinstance(value, Unread) else value


def unit_identity(unit: PipelineUnit, pipe: "BasePipeline") -> dict[str, Any]:
    """Return what a unit's outputs depend on besides its inputs: code, settings, networks and tokenizers, dtype."""
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


def _network_identity(name: str, pipe: "BasePipeline") -> str | None:
    """Return a fingerprint of a tokenizer, or of a network's weights and code; None if the pipeline lacks it.

    The code is that of the network's own modules whose classes are not a library's.
    """
    network = getattr(pipe, name)
    own = forwards(network) if isinstance(network, nn.Module) else {}
    code = f"-{code_version(own.values(), own)[0]}" if own else ""
    return None if network is None else f"{pipe.fingerprint(name)}{code}"


def _random_states(device: torch.device) -> list[bytes]:
    """Return the states of torch's global generators, which random numbers without a seed of their own come from."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return [state.numpy().tobytes() for state in states]


def _has_shape(value: Any) -> bool:
    return isinstance(value, Unread | str)
