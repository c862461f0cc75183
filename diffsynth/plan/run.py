"""A run whose memory is planned, and where it is to be."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

from ..training.run import Run

if TYPE_CHECKING:
    from ..core.data import BatchLayout, Row
    from ..core.data.order.buckets import Size
    from ..core.memory import MemoryRecipe

# Guesses: what CUDA's allocator loses between tensors, and its context with the libraries' workspaces.
CUDA_WASTE, CUDA_CONTEXT = 0.05, 7 * 2**30 // 10
ROWS_SEEN = 200  # of pictures that keep their own sizes; enough to meet one of the largest, and read in a second


@dataclass(kw_only=True)
class PlanRun(Run):
    """A run that is planned; the fields beside those of `Run` are the top level of conf/plan.yaml.

    Args:
        devices: Numbers of devices for which the share of each is told.
        cp_size: Devices that have the tokens of a sample together (context parallelism).
        tokens: Tokens of each prompt, where it is not padded to a length of its own.
        cached: Plan as if the data set were cached already.
        cache_batch_size: Samples that go through an encoder together when a cache is made.
        fetch_data: Whether `dataset=example` is fetched; else one blank picture is planned where it is absent.
        path: Folder of plan.json and plan.svg.
        processes, engine: How many devices the run is spread over, and by which engine (`plan.shares`).
        on_cuda: Whether the run is to be on CUDA.
    """

    devices: Sequence[int] = (1,)
    cp_size: int = 1
    tokens: int = 256
    cached: bool = False
    cache_batch_size: int = 8
    fetch_data: bool = False
    path: str = "outputs/plan"
    processes: int = 1
    engine: str = "ddp"
    on_cuda: bool = True

    @classmethod
    def of(cls, run: Run, **placement) -> "PlanRun":
        """A run to be trained, planned where it is to be: `processes`, `engine`, `cp_size`, `on_cuda`."""
        own = {field.name: getattr(run, field.name) for field in fields(Run)}
        return cls(**own, **placement)

    def variant(self, memory: "MemoryRecipe", micro_batch_size: int | None = None) -> "PlanRun":
        """The same with another recipe."""
        return replace(self, memory=memory, micro_batch_size=micro_batch_size or self.micro_batch_size)

    def estimated(self, size: int) -> int:
        """Bytes that a device has to have free for `size` bytes of tensors."""
        return round(size * (1 + CUDA_WASTE)) + CUDA_CONTEXT if self.on_cuda else size

    @property
    def batches(self) -> "BatchLayout":
        from ..core.data import BatchLayout

        return BatchLayout(self.batch_size, self.micro_batch_size, self.processes // self.cp_size)

    @property
    def is_cached(self) -> bool:
        return self.cached or not self.dataset.needs_encoders

    @property
    def is_to_be_cached(self) -> bool:
        """Whether rows are planned as a cache would have them, which there is not yet."""
        return self.cached and self.dataset.needs_encoders

    @property
    def sizes(self) -> list["Size | None"]:
        """Sizes of pictures, (width, height) in pixels, the largest first; None where each has its own."""
        return sorted(self.dataset.rows_by_size(), key=lambda size: -math.prod(size or ()))

    @property
    def exports(self) -> int:
        """How often weights are saved."""
        epochs, every = self.num_epochs, self.export.save_steps
        if self.max_steps is None or every is None:
            return math.ceil(epochs if self.max_steps is None else self.max_steps * self.batch_size / len(self.dataset))
        return math.ceil(self.max_steps / every)

    def row(self, size: "Size | None") -> "Row":
        """A row of the data set of this size; where each row has its own size, the largest of those looked at."""
        numbers: Sequence[int] = self.dataset.rows_by_size()[size].rows
        if size is not None or not self.dataset.needs_encoders:
            return self.dataset[int(numbers[0])]
        rows = (self.dataset[int(number)] for number in numbers[:: max(1, len(numbers) // ROWS_SEEN)])
        return max(rows, key=lambda row: math.prod(self.media.size(row[self.media.column])))
