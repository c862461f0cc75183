"""Training modules on the meta device: built once for a run, and copied for each set of memory options to try."""

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property

import torch
from torch import nn

from ..core.data import Row
from ..core.data.order.buckets import Size
from ..core.memory import MemoryRecipe
from ..diffusion.flow_match import TRAINING_STEPS
from ..diffusion.pipeline.remembered import UnitMemory
from ..diffusion.training_module import PipelineTrainingModule
from ..training.rounds.samples import blank
from .meta_pipeline import download_bytes, meta_pipeline
from .rehearsal import Rehearsal, WorkingMemory
from .run import PlacedRun

Counts = Mapping[str, int]  # number of blocks to keep, by the name of the module list


class MetaModules:
    """Builds a run's training module on the meta device, once for each storage of its frozen weights.

    Results of rehearsals that are equal for all memory options are remembered here too.
    """

    def __init__(self, run: PlacedRun):
        self.meta_pipe = meta_pipeline(run.model, run.tokens)
        self.download = download_bytes(self.meta_pipe, run.model)
        self.modules: dict[tuple[str, bool], PipelineTrainingModule] = {}
        plain = replace(run.memory, storage="none", stored=None, stream_blocks=0, compile="none")
        self.caching = replace(run, cached=False, memory=plain)  # make_cache.py has no memory options
        self.rows: dict[Size | None, tuple[WorkingMemory, Row]] = {}
        self.validated: dict[tuple[str, int, str], WorkingMemory] = {}  # by stage, kind of request and storage

    def of(self, run: PlacedRun) -> PipelineTrainingModule:
        """Return the run's module with its adapters, before memory options are applied; copy it before changing it."""
        key = run.memory.storage, run.is_cached
        if key not in self.modules:
            self.modules[key] = self._build(run)
        return self.modules[key]

    def _build(self, run: PlacedRun) -> PipelineTrainingModule:
        module = self._unread(run)
        return read(module, run.validation.models(module), run.is_cached)

    def _unread(self, run: PlacedRun) -> PipelineTrainingModule:
        # The template is copied, because planning replaces its weights by ones without values.
        pipe, template = copy.deepcopy(self.meta_pipe), copy.deepcopy(run.template)
        return PipelineTrainingModule(pipe, run.task.rehearsed(), run.lora, run.seed, template, run.memory)

    def row(self, run: PlacedRun, size: Size | None) -> Row:
        """Return a row of this size as the run's training reads it, from a cache that does not exist yet if need be."""
        row = self.encoded(size)[1] if run.is_to_be_cached else run.row(size)
        is_prompt = run.task.learns_from_samples and "input_latents" not in row.made.get("shared", {})
        return blank(row, run.task, run.latents, run.media.size(row[run.media.column])) if is_prompt else row

    def encoded(self, size: Size | None) -> tuple[WorkingMemory, Row]:
        """Return the memory of the frozen units when a cache is made, and the cached row of this size."""
        if size not in self.rows:
            self.rows[size] = self.encoding.encode([self.caching.row(size)] * self.caching.cache_batch_size)
        return self.rows[size]

    @cached_property
    def encoding(self) -> Rehearsal:
        """The rehearsal of the frozen units, with their models only."""
        module = self._unread(self.caching)
        with torch.device("meta"):
            module.pipe.load_models(module.pipe.models_of(module.frozen_units, model_fn=False))
        module.pipe.scheduler.set_timesteps(TRAINING_STEPS, training=True)  # as make_cache.py does
        return Rehearsal(module, on_cuda=self.caching.on_cuda)


def read(module: PipelineTrainingModule, also: Iterable[str] = (), cached: bool = False) -> PipelineTrainingModule:
    """Prepare a module of a `meta_pipeline` for training, as reading its weights does, on the meta device.

    Args:
        module: The training module; it is changed and returned.
        also: Names of further models, such as those of the validation.
        cached: Whether the outputs of frozen units come from a cache, so that their models are not needed.
    """
    module.remembered = UnitMemory(0)
    with torch.device("meta"):
        module.read(also, cached)
    return module


def copied(
    module: PipelineTrainingModule, recipe: MemoryRecipe, counts: Counts | None = None
) -> PipelineTrainingModule:
    """Return a copy of a module with other memory options, which must have the same storage of frozen weights.

    Args:
        counts: Shortens module lists to their last blocks; see `shortened`.
    """
    with shortened(module, counts or {}):
        copied = copy.deepcopy(module)
    copied.memory = recipe
    return copied


@contextmanager
def shortened(module: nn.Module, counts: Counts) -> Iterator[None]:
    """Inside the block, the named module lists have their last blocks only.

    The last ones are kept, because the very last block may be special: no layer may read some of its outputs.
    """
    lists = {module.get_submodule(name): count for name, count in counts.items()}
    complete = {blocks: blocks._modules for blocks in lists}
    for blocks, count in lists.items():
        last = list(blocks)[-count:]
        blocks._modules = {str(number): block for number, block in enumerate(last)}
    try:
        yield
    finally:
        for blocks, modules in complete.items():
            blocks._modules = modules
