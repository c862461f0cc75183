"""The networks of a run without values: built once, and copied for every recipe that is laid on them."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property

import torch
from torch import nn

from ..core.data import Row
from ..core.data.order.buckets import Size
from ..core.memory import MemoryRecipe
from ..diffusion.pipeline.remembered import UnitMemory
from ..diffusion.training_module import PipelineTrainingModule
from .meta_pipeline import download_bytes, meta_pipeline
from .rehearsal import Rehearsal, Working
from .run import PlanRun

Counts = Mapping[str, int]  # blocks that are kept, by the name of the list that they stand in


class MetaModules:
    """A run's training module on the meta device, for each way in which its frozen weights are stored."""

    def __init__(self, run: PlanRun):
        self.meta_pipe = meta_pipeline(run.model, run.tokens)
        self.download = download_bytes(self.meta_pipe, run.model)
        self.modules: dict[tuple[str, bool], PipelineTrainingModule] = {}
        plain = replace(run.memory, storage="none", stored=None, stream_blocks=0)
        self.caching = replace(run, cached=False, memory=plain)  # make_cache.py trades nothing
        self.rows: dict[Size | None, tuple[Working, Row]] = {}
        self.sampled: dict[str, Working] = {}

    def of(self, run: PlanRun) -> PipelineTrainingModule:
        """The run's module with its adapters, not laid out; not to be changed."""
        key = run.memory.storage, run.is_cached
        if key not in self.modules:
            self.modules[key] = self._build(run)
        return self.modules[key]

    def _build(self, run: PlanRun) -> PipelineTrainingModule:
        module = self._unread(run)
        return read(module, run.validation.models(module) if run.validation else (), run.is_cached)

    def _unread(self, run: PlanRun) -> PipelineTrainingModule:
        pipe, template = copy.deepcopy(self.meta_pipe), copy.deepcopy(run.template)  # which loses its values
        return PipelineTrainingModule(pipe, run.task, run.lora, run.seed, template, run.memory)

    def encoded(self, size: Size | None) -> tuple[Working, Row]:
        """What the frozen units take when a cache is made, and what it keeps of a row of this size."""
        if size not in self.rows:
            self.rows[size] = self.encoding.encode([self.caching.row(size)] * self.caching.cache_batch_size)
        return self.rows[size]

    @cached_property
    def encoding(self) -> Rehearsal:
        """Of the frozen units and their models alone."""
        module = self._unread(self.caching)
        with torch.device("meta"):
            module.pipe.load_models(module.pipe.models_of(module.frozen_units, model_fn=False))
        return Rehearsal(module)


def read(module: PipelineTrainingModule, also=(), cached: bool = False) -> PipelineTrainingModule:
    """Read a module's weights, none of which has values; its pipeline is one of sketches (`meta_pipeline`).

    Args:
        also: Models beside those that are trained with, such as those of the validation.
        cached: What frozen units make is read from a cache.
    """
    module.remembered = UnitMemory(0)
    with torch.device("meta"):
        module.read(also, cached)
    return module


def copied(
    module: PipelineTrainingModule, recipe: MemoryRecipe, counts: Counts | None = None
) -> PipelineTrainingModule:
    """A copy that is to be laid out by another recipe, which stores frozen weights in the same way."""
    with shortened(module, counts or {}):
        copied = copy.deepcopy(module)
    copied.memory = recipe
    return copied


@contextmanager
def shortened(module: nn.Module, counts: Counts) -> Iterator[None]:
    """Leave of some lists their last blocks only; the last of all may differ in what follows it."""
    whole = {module.get_submodule(name): count for name, count in counts.items()}
    kept = {blocks: blocks._modules for blocks in whole}
    for blocks, count in whole.items():
        last = list(blocks)[-count:]
        blocks._modules = {str(number): block for number, block in enumerate(last)}
    try:
        yield
    finally:
        for blocks, modules in kept.items():
            blocks._modules = modules
