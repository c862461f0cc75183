"""What a run is made of."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..core.data import BatchPlan, CachedDataset
from ..core.memory import MemoryRecipe

# An estimate: what CUDA's allocator loses between tensors, and its context with the libraries' workspaces.
CUDA_WASTE, CUDA_CONTEXT = 0.05, 7 * 2**30 // 10
ROWS_SEEN = 200  # of pictures that keep their own sizes

Size = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Run:
    """The parts of a run, as its configuration built them; see train.py.

    Args:
        tokens: Of each prompt, where it is not padded to a length of its own.
        cache_batch_size: Samples that go through an encoder together when a cache is made.
        on_cuda: Whether the run is to be there.
        processes, engine: How many devices it is spread over, and by which engine (`shares`).
        cp_size: How many of them have the tokens of a sample together.
        cached: As if the data set were cached already.
    """

    model: Any
    dataset: Any
    task: Any
    memory: MemoryRecipe
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
    cp_size: int = 1
    cached: bool = False

    def variant(self, memory: MemoryRecipe, micro_batch_size: int | None = None) -> "Run":
        """The same with another recipe."""
        return replace(self, memory=memory, micro_batch_size=micro_batch_size or self.micro_batch_size)

    def estimated(self, size: int) -> int:
        """What a device has to have free for so many bytes of tensors."""
        return round(size * (1 + CUDA_WASTE)) + CUDA_CONTEXT if self.on_cuda else size

    @property
    def batches(self) -> BatchPlan:
        return BatchPlan(self.batch_size, self.micro_batch_size, self.processes // self.cp_size)

    @property
    def has_cache(self) -> bool:
        return isinstance(self.dataset, CachedDataset)

    @property
    def is_cached(self) -> bool:
        return self.cached or self.has_cache

    @property
    def is_to_be_cached(self) -> bool:
        """Rows are as a cache would have them, which there is not yet."""
        return self.cached and not self.has_cache

    @property
    def sizes(self) -> list[Size | None]:
        """Of pictures, (width, height) in pixels, the largest first; None where each has its own."""
        return sorted(self.dataset.parts(), key=lambda size: -math.prod(size or ()))

    @property
    def exports(self) -> int:
        """How often weights are saved."""
        epochs, every = self.num_epochs, self.export.save_steps
        if self.max_steps is None or every is None:
            return math.ceil(epochs if self.max_steps is None else self.max_steps * self.batch_size / len(self.dataset))
        return math.ceil(self.max_steps / every)

    def row(self, size: Size | None):
        """A row of the data set of this size; of those that each have their own, the largest that is seen."""
        numbers: Sequence[int] = self.dataset.parts()[size].rows
        if size is not None or self.has_cache:
            return self.dataset[int(numbers[0])]
        rows = (self.dataset[int(number)] for number in numbers[:: max(1, len(numbers) // ROWS_SEEN)])
        return max(rows, key=lambda row: row["image"].width * row["image"].height)
