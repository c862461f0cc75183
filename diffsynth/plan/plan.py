"""What a run will take, stage by stage, before any weight is read."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..core.data.order.buckets import Size
from ..core.memory import MemoryRecipe
from ..core.memory.live import bytes_of
from ..training.checkpoint import FILE_BYTES
from .few_blocks import FewBlocks
from .footprint import MemoryFootprint, kept
from .meta_module import MetaModules, copied
from .rehearsal import Rehearsal, Working
from .run import PlanRun
from .shares import Share, shares

STAGES = ("train", "sample", "save", "cache")


@dataclass(frozen=True)
class StageMemory:
    """Bytes of one stage on one device, in the host's memory and on disk.

    Args:
        name: One of `STAGES`; `cache` is make_cache.py, the others are of the training.
        size: (width, height) in pixels; None where it does not matter.
        activations: What the forward pass leaves for the backward pass.
        peak: The most that tensors hold at any moment, all the others among it.
    """

    name: str
    size: Size | None = None
    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    peak: int = 0
    host: int = 0
    disk: int = 0


@dataclass(frozen=True)
class Plan:
    """Stages of a run, of each kind the largest first, and what each of several devices would hold in training."""

    stages: Sequence[StageMemory]
    footprint: MemoryFootprint
    shares: Sequence[Share]
    download: int

    @property
    def worst(self) -> StageMemory:
        """Of the training; a cache is made by another command."""
        return max((stage for stage in self.stages if stage.name != "cache"), key=lambda stage: stage.peak)

    @property
    def host(self) -> int:
        return max(stage.host for stage in self.stages)

    def as_dict(self) -> dict[str, Any]:
        return {"peak": self.worst.peak, "host": self.host, **asdict(self)}


class Planner:
    """The rehearsals of a run; those of its variants share what is built for them.

    Args:
        few_blocks: Rehearse with few blocks of each kind and reckon what all of them take.
    """

    def __init__(self, run: PlanRun, meta_modules: MetaModules | None = None, few_blocks: bool = False):
        self.run, self.meta_modules, self.few_blocks = run, meta_modules or MetaModules(run), few_blocks
        self.trained: dict[Size | None, Working] = {}
        self.sampled: dict[str, Working] = self.meta_modules.sampled if few_blocks else {}

    def variant(self, memory: MemoryRecipe, micro_batch_size: int | None = None, few_blocks: bool = False) -> "Planner":
        """Of the same run with another recipe."""
        return Planner(self.run.variant(memory, micro_batch_size), self.meta_modules, few_blocks)

    def plan(self, devices: Iterable[int] = (1,), largest_only: bool = False) -> Plan:
        """Rehearse every stage, with every size of picture that there is.

        Args:
            devices: Numbers of devices whose shares are told.
            largest_only: Of pictures the largest alone, and not what make_cache.py would take.
        """
        sizes = self.run.sizes[:1] if largest_only else self.run.sizes
        footprint = {size: self.footprint(size) for size in sizes}
        stages = [self.training(size, own) for size, own in footprint.items()] + [*self.sampling(), self.saving()]
        if not largest_only and self.run.dataset.needs_encoders:
            stages += [self.caching(size) for size in sizes]
        stages.sort(key=lambda stage: (STAGES.index(stage.name), -stage.peak))
        worst = max(footprint.values(), key=lambda own: own.peak)
        return Plan(stages, worst, self.shares(worst, devices), self.meta_modules.download)

    def shares(self, footprint: MemoryFootprint, devices: Iterable[int]) -> list[Share]:
        """What is held on each of several devices, by every engine that could."""
        told = [share for count in devices if count % self.run.cp_size == 0 for share in shares(footprint, count)]
        if self.run.memory.stream_blocks:  # which other engines refuse
            return [share for share in told if share.engine == "ddp"]
        return told

    # What there is

    @cached_property
    def rehearsal(self) -> Rehearsal | FewBlocks:
        meta_module, recipe, cp_size = self.meta_modules.of(self.run), self.run.memory, self.run.cp_size
        return (
            FewBlocks(meta_module, recipe, cp_size)
            if self.few_blocks
            else Rehearsal(copied(meta_module, recipe), cp_size)
        )

    @property
    def kept(self) -> MemoryFootprint:
        """What is held whatever is trained on."""
        at_rest, unreached = self.rehearsal.at_rest, self.rehearsal.unreached
        return kept(self.rehearsal.module, at_rest, unreached, self.run.optimizer, self.run.ema, self.run.on_cuda)

    def footprint(self, size: Size | None) -> MemoryFootprint:
        """What a training on pictures of this size holds."""
        if size not in self.trained:
            row = self.meta_modules.encoded(size)[1] if self.run.is_to_be_cached else self.run.row(size)
            batches = self.run.batches
            rows, accumulates = [row] * batches.micro_batch_size, batches.accumulation > 1
            self.trained[size] = self.rehearsal.train(rows, accumulates)
        passes = self.trained[size]
        return replace(self.kept, working=passes.peak, activations=passes.activations, host=passes.host)

    # Stages

    def training(self, size: Size | None, footprint: MemoryFootprint) -> StageMemory:
        optimizer = footprint.optimizer + footprint.average
        host = footprint.host + (0 if self.run.is_cached else round(self.run.memory.remember * 2**30))
        return StageMemory(
            "train",
            size,
            footprint.weights,
            footprint.gradients,
            optimizer,
            footprint.activations,
            footprint.peak,
            host,
        )

    def sampling(self) -> list[StageMemory]:
        """The validation's prompts, drawn beside what training holds between two steps."""
        validation, pipe = self.run.validation, self.rehearsal.module.pipe
        if not (validation and (validation.prompts or validation.shown_rows(pipe))):
            return []
        request = {"prompt": (*validation.prompts, "a picture")[0], **validation.options}
        whole, kept = pipe.complete(request), self.kept
        peak = kept.between_steps + self.sample(request).peak
        size = whole["width"], whole["height"]
        return [StageMemory("sample", size, kept.weights, optimizer=kept.optimizer + kept.average, peak=peak)]

    def sample(self, request: Mapping) -> Working:
        """What drawing takes; it keeps nothing, so that few blocks tell it once for all policies."""
        storage = self.run.memory.storage
        if storage not in self.sampled:
            self.sampled[storage] = self.rehearsal.sample(request)
        return self.sampled[storage]

    def saving(self) -> StageMemory:
        """Checkpoints, one more than are kept while it is written, and the weights of every export."""
        kept, run = self.kept, self.run
        state, optimizer = kept.trained + kept.optimizer + kept.average, kept.optimizer + kept.average
        disk = (run.checkpoint.keep_last + 1) * state + run.exports * len(run.export.formats) * kept.trained
        host = min(state, FILE_BYTES)
        return StageMemory("save", None, kept.weights, 0, optimizer, 0, kept.between_steps, host=host, disk=disk)

    def caching(self, size: Size | None) -> StageMemory:
        """What make_cache.py takes."""
        working, made = self.meta_modules.encoded(size)
        tensors = [leaf for leaf in tree_leaves(made.made) if isinstance(leaf, Tensor)]
        disk = len(self.run.dataset.rows_by_size()[size].rows) * bytes_of(tensors)
        weights = self.meta_modules.encoding.at_rest
        return StageMemory("cache", size, weights, peak=weights + working.peak, disk=disk)
