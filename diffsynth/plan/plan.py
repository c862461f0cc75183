"""The memory plan of a run, stage by stage: training, evaluating, sampling, saving, and making a cache."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..core.data.order.buckets import Size
from ..core.live_bytes import bytes_of
from ..core.memory import MemoryRecipe
from ..diffusion.pipeline.generation import with_images
from ..training.checkpoint import FILE_BYTES
from ..training.validation.validation import BANDS
from .few_blocks import FewBlocks, block_lists
from .footprint import MemoryFootprint, static_footprint
from .meta_module import MetaModules, copied
from .rehearsal import Rehearsal, WorkingMemory
from .run import PlacedRun
from .shares import Share, shares

# Measured on one core: rehearsing few of Qwen-Image's 60 blocks took 14 s instead of 36 s, and few of the 25 of FLUX.2
# klein, which are of two kinds, 15 s instead of 9 s. Peaks and activations were equal.
MANY_BLOCKS = 40

STAGES = ("train", "roll out", "evaluate", "sample", "save", "cache")


@dataclass(frozen=True)
class StageMemory:
    """Bytes of one stage on one device, in host memory and on disk.

    Args:
        name: One of `STAGES`; `cache` is make_cache.py, `roll out` is what a reward training samples and scores, the
            others are stages of every training.
        size: (width, height) of the images in pixels; None if it does not matter, or each image has its own.
        weights, gradients, optimizer: Weights, gradients, and optimizer state with the EMA.
        activations: What the forward pass saves for the backward pass.
        peak: The most that tensors take on the device at any moment; it includes all of the above.
        host: Tensors in host memory.
        disk: Files that the stage writes.
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
    """The plan of a run.

    Args:
        stages: All stages; those of one name follow each other, the largest peak first.
        footprint: The training's footprint with images of the size that takes the most.
        shares: What each of several devices would take in training, by engine.
        download: Bytes of weights that have to be downloaded.
    """

    stages: Sequence[StageMemory]
    footprint: MemoryFootprint
    shares: Sequence[Share]
    download: int

    @property
    def worst(self) -> StageMemory:
        """The stage of the training with the largest peak; `cache` does not count, as another command makes it."""
        return max((stage for stage in self.stages if stage.name != "cache"), key=lambda stage: stage.peak)

    @property
    def host(self) -> int:
        """Bytes of host memory that the stage with the most takes."""
        return max(stage.host for stage in self.stages)

    def as_dict(self) -> dict[str, Any]:
        """Return the content of plan.json."""
        return {"peak": self.worst.peak, "host": self.host, **asdict(self)}


class Planner:
    """Plans a run by rehearsing its stages.

    Args:
        run: The run, with its number of devices and its engine.
        meta_modules: Modules on the meta device, shared with other planners of the run; None builds them.
        few_blocks: Rehearse with few blocks of each network, and extrapolate to all of them.
    """

    def __init__(self, run: PlacedRun, meta_modules: MetaModules | None = None, few_blocks: bool = False):
        self.run, self.meta_modules, self.few_blocks = run, meta_modules or MetaModules(run), few_blocks
        self.trained: dict[Size | None, WorkingMemory] = {}
        self.validated: dict[tuple[str, int, str], WorkingMemory] = self.meta_modules.validated if few_blocks else {}

    def variant(self, memory: MemoryRecipe, micro_batch_size: int | None = None, few_blocks: bool = False) -> "Planner":
        """Return a planner of the same run with other memory options."""
        return Planner(self.run.variant(memory, micro_batch_size), self.meta_modules, few_blocks)

    def quickest(self) -> "Planner":
        """Return this planner, or for a network of many blocks one that rehearses few of them; see `FewBlocks`."""
        blocks = sum(map(len, block_lists(self.meta_modules.of(self.run)).values()))
        if self.run.memory.stream_blocks or blocks < MANY_BLOCKS:
            return self
        return self.variant(self.run.memory, few_blocks=True)

    def plan(self, devices: Iterable[int] = (1,), largest_only: bool = False) -> Plan:
        """Rehearse every stage with every image size of the data set.

        Args:
            devices: Numbers of devices to compute shares for.
            largest_only: Rehearse the largest image size only, and leave make_cache.py out.
        """
        sizes = self.run.sizes[:1] if largest_only else self.run.sizes
        footprint = {size: self.footprint(size) for size in sizes}
        stages = [self.training(size, own) for size, own in footprint.items()]
        stages += [*self.rolling_out(), *self.evaluating(), *self.sampling(), self.saving()]
        if not largest_only and self.run.dataset.needs_encoders:
            stages += [self.caching(size) for size in sizes]
        stages.sort(key=lambda stage: (STAGES.index(stage.name), -stage.peak))
        worst = max(footprint.values(), key=lambda own: own.peak)
        return Plan(stages, worst, self.shares(worst, devices), self.meta_modules.download)

    def shares(self, footprint: MemoryFootprint, devices: Iterable[int]) -> list[Share]:
        """Return what each of several devices takes under every engine that this run could use."""
        found = [share for count in devices if count % self.run.cp_size == 0 for share in shares(footprint, count)]
        if self.run.memory.stream_blocks:  # only DDP supports it
            return [share for share in found if share.engine == "ddp"]
        return found

    # Rehearsals

    @cached_property
    def rehearsal(self) -> Rehearsal | FewBlocks:
        """The rehearsal of the run's training module."""
        meta_module, recipe, placement = self.meta_modules.of(self.run), self.run.memory, self.run.placement
        if self.few_blocks:
            return FewBlocks(meta_module, recipe, *placement)
        return Rehearsal(copied(meta_module, recipe), *placement)

    @property
    def static_footprint(self) -> MemoryFootprint:
        """The part of the footprint that does not depend on the samples."""
        at_rest, unreached = self.rehearsal.at_rest, self.rehearsal.unreached
        return static_footprint(
            self.rehearsal.module, at_rest, unreached, self.run.optimizer, self.run.ema, self.run.on_cuda
        )

    def footprint(self, size: Size | None) -> MemoryFootprint:
        """Rehearse training with images of one size, and return its footprint."""
        if size not in self.trained:
            row, batches = self.meta_modules.row(self.run, size), self.run.batches
            rows, accumulates = [row] * batches.micro_batch_size, batches.accumulation > 1
            self.trained[size] = self.rehearsal.train(rows, accumulates)
        passes = self.trained[size]
        return replace(self.static_footprint, working=passes.peak, activations=passes.activations, host=passes.host)

    # Stages

    def training(self, size: Size | None, footprint: MemoryFootprint) -> StageMemory:
        """Return the training stage with images of one size."""
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

    def rolling_out(self) -> list[StageMemory]:
        """Return the stage of a reward training that samples and scores, with the larger of network and scorer."""
        if not self.run.task.learns_from_samples:
            return []
        size = self.run.sizes[0]
        row, rounds = self.meta_modules.row(self.run, size), self.run.rounds
        stage = self._between_steps("roll out", size, lambda: self.rehearsal.roll_out(row, self.run.rollout_batch_size))
        scoring = self.static_footprint.between_steps + max(
            (own.network_bytes for own in rounds.all_rewards), default=0
        )
        return [replace(stage, peak=max(stage.peak, scoring))]

    def evaluating(self) -> list[StageMemory]:
        """Return the stage of measuring held-out losses, as if held-out images had the largest size of the training."""
        if not self.run.validation.datasets:
            return []
        size = self.run.sizes[0]
        row = self.meta_modules.row(self.run, size)
        return [self._between_steps("evaluate", size, lambda: self.rehearsal.evaluate(row, BANDS))]

    def sampling(self) -> list[StageMemory]:
        """Return the stage of sampling what the validation shows: of its kinds of requests, the one that takes most."""
        validation, module = self.run.validation, self.rehearsal.module
        requests = validation.one_of_each(module)
        if not requests:
            return []
        options = with_images(module.pipe, validation.options)
        stages = [self._sampling_of({**options, **request}, kind) for kind, request in enumerate(requests)]
        return [max(stages, key=lambda stage: stage.peak)]

    def _sampling_of(self, request: Mapping[str, Any], kind: int) -> StageMemory:
        """Return the stage of sampling one request, which is number `kind` of those of the validation."""
        pipe = self.rehearsal.module.pipe
        size = pipe.media.requested_size(pipe.complete(request))
        return self._between_steps("sample", size, lambda: self.rehearsal.sample(request), kind)

    def _between_steps(
        self, name: str, size: Size | None, rehearse: Callable[[], WorkingMemory], kind: int = 0
    ) -> StageMemory:
        """Return a stage of the validation, beside what training holds between two steps.

        It saves no activations, so that its memory is the same for all checkpointing policies and is rehearsed once per
        storage when planning with few blocks.
        """
        key = name, kind, self.run.memory.storage
        if key not in self.validated:
            self.validated[key] = rehearse()
        static = self.static_footprint
        peak = static.between_steps + self.validated[key].peak
        return StageMemory(name, size, static.weights, optimizer=static.optimizer + static.average, peak=peak)

    def saving(self) -> StageMemory:
        """Return the stage of saving: the most checkpoints that there are at a time, and all exports."""
        static, run = self.static_footprint, self.run
        optimizer = static.optimizer + static.average
        state = static.trained + optimizer
        disk = run.checkpoint.most(run.steps) * state + run.exports * len(run.export.formats) * static.trained
        host = min(state, FILE_BYTES)
        return StageMemory("save", None, static.weights, 0, optimizer, 0, static.between_steps, host=host, disk=disk)

    def caching(self, size: Size | None) -> StageMemory:
        """Return the stage of make_cache.py with images of one size."""
        working, made = self.meta_modules.encoded(size)
        tensors = [leaf for leaf in tree_leaves(made.made) if isinstance(leaf, Tensor)]
        disk = len(self.run.dataset.rows_by_size()[size].rows) * bytes_of(tensors)
        weights = self.meta_modules.encoding.at_rest
        return StageMemory("cache", size, weights, peak=weights + working.peak, disk=disk)
