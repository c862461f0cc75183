"""The configuration of plan.py, and a run with the devices that it is planned for."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

from ..core.ranges import BatchSize, PositiveInt, Tokens
from ..training.run import Run

if TYPE_CHECKING:
    from ..core.data import BatchLayout, Row
    from ..core.data.order.buckets import Size
    from ..core.memory import MemoryRecipe

# Guesses: the share of memory that CUDA's allocator loses between tensors, and the bytes of its context with the
# workspaces of libraries.
CUDA_WASTE, CUDA_CONTEXT = 0.05, 7 * 2**30 // 10
ROWS_SEEN = 200  # a guess: this many images include one of the largest, and are read in a second


@dataclass(kw_only=True)
class PlanRun(Run):
    """A run to plan; the fields beside those of `Run` are the top level of conf/plan.yaml.

    Args:
        devices: Numbers of devices for which the table says what each device takes.
        cp_size: Context-parallel size: N devices share one sample's tokens.
        tokens: Tokens of each prompt, unless the family pads prompts to a length of its own.
        cached: Plan as if the data set were cached already.
        cache_batch_size: Samples per forward pass of an encoder when a cache is made.
        rollout_batch_size: Samples that a reward training samples at once.
        fetch_data: Whether `dataset=example` is downloaded; otherwise a blank image replaces it if it is absent.
        path: Folder of plan.json and plan.svg.
    """

    devices: Sequence[BatchSize] = (1,)
    cp_size: PositiveInt = 1
    tokens: Tokens = 256
    cached: bool = False
    cache_batch_size: BatchSize = 8
    rollout_batch_size: BatchSize = 32
    fetch_data: bool = False
    path: str = "outputs/plan"


@dataclass(kw_only=True)
class PlacedRun(PlanRun):
    """A run to plan, and where it is to run.

    Args:
        processes, engine: Number of devices that the run is spread over, and the engine that does so (`plan.shares`).
        on_cuda: Whether the run is planned for CUDA.
    """

    processes: int = 1
    engine: str = "ddp"
    on_cuda: bool = True

    @classmethod
    def of(cls, run: Run, **placement) -> "PlacedRun":
        """Place a run: `placement` has `processes`, `engine`, `cp_size`, `on_cuda`."""
        names = {field.name for field in fields(cls)} & {field.name for field in fields(run)}
        sampled = {} if run.rounds.batch_size is None else {"rollout_batch_size": run.rounds.batch_size}
        return cls(**{**{name: getattr(run, name) for name in names}, **sampled, **placement})

    def variant(self, memory: "MemoryRecipe", micro_batch_size: int | None = None) -> "PlacedRun":
        """Return the same run with other memory options."""
        return replace(self, memory=memory, micro_batch_size=micro_batch_size or self.micro_batch_size)

    def estimated(self, size: int) -> int:
        """Return the bytes that a device must have free for `size` bytes of tensors."""
        return round(size * (1 + CUDA_WASTE)) + CUDA_CONTEXT if self.on_cuda else size

    @property
    def placement(self) -> tuple[int, bool]:
        """The arguments of a `Rehearsal` that do not depend on memory options."""
        return self.cp_size, self.on_cuda

    @property
    def batches(self) -> "BatchLayout":
        """How the batch is split over devices and micro-batches."""
        from ..core.data import BatchLayout

        return BatchLayout(self.batch_size, self.micro_batch_size, self.processes // self.cp_size)

    @property
    def is_cached(self) -> bool:
        """Whether training is planned from a cache, existing or not."""
        return self.cached or not self.dataset.needs_encoders

    @property
    def is_to_be_cached(self) -> bool:
        """Whether training is planned from a cache that does not exist yet."""
        return self.cached and self.dataset.needs_encoders

    @property
    def sizes(self) -> list["Size | None"]:
        """Sizes of the images, (width, height) in pixels, the largest first; None if each image has its own."""
        return sorted(self.dataset.rows_by_size(), key=lambda size: -math.prod(size or ()))

    @property
    def steps(self) -> int:
        """Number of optimizer steps."""
        if self.max_steps is not None:
            return self.max_steps
        return self.dataset.order(self.batch_size, self.seed, self.samples).steps_of(self.num_epochs)

    @property
    def exports(self) -> int:
        """How often the run exports weights."""
        epochs, every = self.num_epochs, self.export.save_steps
        if self.max_steps is None or every is None:
            return math.ceil(epochs if self.max_steps is None else self.max_steps * self.batch_size / len(self.dataset))
        return math.ceil(self.max_steps / every)

    def row(self, size: "Size | None") -> "Row":
        """Return a row of the data set of this size; for None, the largest of about `ROWS_SEEN` rows."""
        numbers: Sequence[int] = self.dataset.rows_by_size()[size].rows
        if size is not None or not self.dataset.needs_encoders:
            return self.dataset[int(numbers[0])]
        rows = (self.dataset[int(number)] for number in numbers[:: max(1, len(numbers) // ROWS_SEEN)])
        return max(rows, key=lambda row: math.prod(self.media.size(row[self.media.column])))
