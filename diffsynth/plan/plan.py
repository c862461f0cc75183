"""What a run will take, stage by stage, before any weight is read."""

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..core.data import BatchPlan, CachedDataset, CachedRow
from ..core.memory.live import bytes_of
from ..diffusion.checkpoint import FILE_BYTES
from ..diffusion.training_module import PipelineTrainingModule
from .engines import Share, shares
from .held import Held, kept
from .rehearsal import Rehearsal
from .sketch import download_bytes, sketched

# An estimate: what CUDA's allocator loses between tensors, and its context with the libraries' workspaces.
CUDA_WASTE, CUDA_CONTEXT = 0.05, 7 * 2**30 // 10
ROWS_SEEN = 200  # of pictures that keep their own sizes
STAGES = ("train", "draw", "save", "cache")


@dataclass(frozen=True)
class Stage:
    """Bytes of one stage on one device, in the host's memory and on disk.

    Args:
        name: One of `STAGES`; `cache` is make_cache.py, the others are of the training.
        size: (width, height) in pixels; None where it does not matter.
        activations: What the forward pass leaves for the backward pass.
        peak: The most that tensors hold at any moment, all the others among it.
    """

    name: str
    size: tuple[int, int] | None = None
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

    stages: Sequence[Stage]
    held: Held
    shares: Sequence[Share]
    download: int

    @property
    def worst(self) -> Stage:
        """Of the training; a cache is made by another command."""
        return max((stage for stage in self.stages if stage.name != "cache"), key=lambda stage: stage.peak)

    @property
    def host(self) -> int:
        return max(stage.host for stage in self.stages)

    def as_dict(self) -> dict[str, Any]:
        return {"peak": self.worst.peak, "host": self.host, **asdict(self)}


@dataclass(frozen=True, kw_only=True)
class Run:
    """The parts of a run, as its configuration built them; see train.py.

    Args:
        tokens: Of each prompt, where it is not padded to a length of its own.
        cache_batch_size: Samples that go through an encoder together when a cache is made.
        on_cuda: Whether the run is to be there.
        processes, engine: How many devices it is spread over, and by which engine (`shares`).
        cached: As if the data set were cached already.
        sizes: Of the pictures to be looked at, (width, height); None is all.
    """

    model: Any
    dataset: Any
    task: Any
    memory: Any
    optimizer: Any
    checkpoint: Any
    export: Any
    lora: Any = None
    template: Any = None
    ema: Any = None
    validation: Any = None
    seed: int = 0
    max_steps: int | None = None
    num_epochs: float = 1
    batch_size: int = 1
    micro_batch_size: int | None = None
    tokens: int = 256
    cache_batch_size: int = 8
    on_cuda: bool = True
    processes: int = 1
    engine: str = "ddp"
    cached: bool = False
    sizes: Sequence[tuple[int, int]] | None = None

    def plan(self, devices: Iterable[int] = (1,), caching: bool = True) -> Plan:
        """Rehearse every stage, with every size of picture that there is.

        Args:
            devices: Numbers of devices whose shares are told.
            caching: Also what make_cache.py would take.
        """
        download = download_bytes(self.module.pipe, self.model)  # before a recipe changes how weights are kept
        parts = {size: part for size, part in self.dataset.parts().items() if self.sizes is None or size in self.sizes}
        rows = {size: self.row(part.rows, size) for size, part in parts.items()}
        encoded = {size: self.encoded(size, row) for size, row in rows.items()} if self.encodes(caching) else {}
        if self.cached and not isinstance(self.dataset, CachedDataset):
            rows = {size: row for size, (_, row) in encoded.items()}
        held = {size: self.held(row) for size, row in rows.items()}
        stages = [self.training(size, own) for size, own in held.items()] + [*self.drawing(), self.saving()]
        stages += [stage for stage, _ in encoded.values()] if caching else []
        stages.sort(key=lambda stage: (STAGES.index(stage.name), -stage.peak))
        worst = max(held.values(), key=lambda own: own.peak)
        told = [share for count in devices for share in shares(worst, count)]
        if self.memory.stream_blocks:  # which other engines refuse
            told = [share for share in told if share.engine == "ddp"]
        return Plan(stages, worst, told, download)

    def variant(self, memory, micro_batch_size: int | None = None) -> "Run":
        """The same with another recipe."""
        return replace(self, memory=memory, micro_batch_size=micro_batch_size or self.micro_batch_size)

    def estimated(self, size: int) -> int:
        """What a device has to have free for so many bytes of tensors."""
        return round(size * (1 + CUDA_WASTE)) + CUDA_CONTEXT if self.on_cuda else size

    @property
    def largest(self) -> tuple[int, int] | None:
        """The size of pictures with the most pixels."""
        sizes = [size for size in self.dataset.parts() if size is not None]
        return max(sizes, key=lambda size: size[0] * size[1], default=None)

    @property
    def batches(self) -> BatchPlan:
        return BatchPlan(self.batch_size, self.micro_batch_size, self.processes)

    # What there is

    @cached_property
    def module(self) -> PipelineTrainingModule:
        pipe, template = sketched(self.model, self.tokens), copy.deepcopy(self.template)  # which loses its values
        return PipelineTrainingModule(pipe, self.task, self.lora, self.seed, template, self.memory)

    @cached_property
    def rehearsal(self) -> Rehearsal:
        also = self.validation.models(self.module) if self.validation else ()
        return Rehearsal(self.module, also, self.is_cached)

    @property
    def is_cached(self) -> bool:
        return self.cached or isinstance(self.dataset, CachedDataset)

    def encodes(self, caching: bool) -> bool:
        """Whether frozen units are to be rehearsed by themselves."""
        return (caching or self.cached) and not isinstance(self.dataset, CachedDataset)

    @cached_property
    def uncached(self) -> "Run":
        return replace(self, cached=False) if self.cached else self

    @cached_property
    def kept(self) -> Held:
        return kept(self.rehearsal, self.optimizer, self.ema, self.on_cuda)

    def held(self, row) -> Held:
        """What a training on rows like this one holds."""
        size, accumulates = self.batches.micro_batch_size, self.batches.accumulation > 1
        passes = self.rehearsal.train([row] * size, accumulates)
        return replace(self.kept, working=passes.peak, activations=passes.activations, host=passes.host)

    def row(self, numbers: Sequence[int], size: tuple[int, int] | None):
        """One of these rows of the data set; of those that each have a size of their own, the largest that is seen."""
        if size is not None or isinstance(self.dataset, CachedDataset):
            return self.dataset[int(numbers[0])]
        rows = (self.dataset[int(number)] for number in numbers[:: max(1, len(numbers) // ROWS_SEEN)])
        return max(rows, key=lambda row: row["image"].width * row["image"].height)

    # Stages

    def training(self, size, held: Held) -> Stage:
        optimizer, remembered = held.optimizer + held.average, 0 if self.is_cached else self.memory.remember * 2**30
        host = held.host + round(remembered)
        return Stage("train", size, held.weights, held.gradients, optimizer, held.activations, held.peak, host)

    def drawing(self) -> list[Stage]:
        """The validation's prompts, drawn beside what training holds between two steps."""
        if not (self.validation and self.validation.prompts):
            return []
        request = {"prompt": self.validation.prompts[0], **self.validation.options}
        whole, kept = self.module.pipe.complete(request), self.kept
        peak = kept.between_steps + self.rehearsal.draw(request).peak
        size = whole["width"], whole["height"]
        return [Stage("draw", size, kept.weights, optimizer=kept.optimizer + kept.average, peak=peak)]

    def saving(self) -> Stage:
        """Checkpoints, one more than are kept while it is written, and the weights of every export."""
        kept = self.kept
        state, exports = kept.trained + kept.optimizer + kept.average, self.exports * len(self.export.formats)
        disk = (self.checkpoint.keep_last + 1) * state + exports * kept.trained
        optimizer = kept.optimizer + kept.average
        return Stage(
            "save", None, kept.weights, 0, optimizer, 0, kept.between_steps, host=min(state, FILE_BYTES), disk=disk
        )

    @property
    def exports(self) -> int:
        """How often weights are saved."""
        epochs, every = self.num_epochs, self.export.save_steps
        if self.max_steps is None or every is None:
            return math.ceil(epochs if self.max_steps is None else self.max_steps * self.batch_size / len(self.dataset))
        return math.ceil(self.max_steps / every)

    def encoded(self, size, row) -> tuple[Stage, CachedRow]:
        """What make_cache.py takes, which reads the models of the frozen units alone, and what it leaves of a row."""
        module, rehearsal = self.uncached.module, self.uncached.rehearsal
        working, made = rehearsal.encode([row] * self.cache_batch_size)
        weights = rehearsal.weights(module.pipe.models_of(module.frozen_units, model_fn=False))
        tensors = [leaf for leaf in tree_leaves(made.made) if isinstance(leaf, Tensor)]
        disk = len(self.dataset.parts()[size].rows) * bytes_of(tensors)
        return Stage("cache", size, weights, peak=weights + working.peak, disk=disk), made
