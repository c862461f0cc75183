"""A recipe that fits: of all whose plan fits a budget, the one that is predicted to cost the least time."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import product

from ..core.data import BatchPlan
from ..core.gradient import honoured_policies, repeated_blocks
from ..core.memory import MemoryRecipe
from ..core.memory.live import bytes_of
from ..core.memory.sizes import shown_size
from .engines import shares
from .held import Held
from .plan import Run
from .rehearsal import Working, tensors_of

# Only the order of recipes hangs on these. A step without any of them is a forward pass and two that go backward.
PASSES = 3.0
RECOMPUTED = {"none": 0.0, "attention": 0.3, "feed_forward": 0.3, "blocks": 1.0}  # forward passes more
OFFLOADING = {"none": 1.5, "attention": 1.0, "feed_forward": 1.0, "blocks": 0.1}  # as much time as so many passes
DECODING = {"none": 1.0, "fp8": 1.15, "nf4": 1.3}  # times as long; docs/memory.md has what was measured
HALF_A_BATCH = 1.05  # times as long with half as many samples in a forward
DEVICE_FLOPS, HOST_BYTES = 2e14, 2.5e10  # a second, of a large card in bf16 and of PCIe 4
STREAMED = 10  # how finely the number of streamed blocks is tried
PIXELS_A_TOKEN = 16 * 16
DEVICES = (2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Option:
    """A recipe and a micro-batch size, and how many times as long a step is predicted to take as without any of it."""

    recipe: MemoryRecipe
    micro_batch_size: int
    slowdown: float

    @property
    def passes_by(self) -> tuple:
        """What the two passes' memory depends on."""
        recipe = self.recipe
        return recipe.checkpointing, recipe.checkpoint_every, recipe.offload_activations, self.micro_batch_size

    def __str__(self) -> str:
        shown = ("checkpointing", "offload_activations", "storage", "stream_blocks")
        chosen = [f"memory.{name}={getattr(self.recipe, name)}" for name in shown]
        return " ".join([*chosen, f"micro_batch_size={self.micro_batch_size}"])


@dataclass(frozen=True)
class Choice:
    """What was chosen, and the bytes it is predicted to take on the device and in the host's memory."""

    option: Option
    device: int
    host: int

    def why(self) -> str:
        return (
            f"{self.option}: {shown_size(self.device)} on the device, {shown_size(self.host)} in host memory, a step "
            f"{self.option.slowdown:.2f} times as long as if memory were free."
        )


@dataclass
class Budget:
    """The search for a recipe within `device` bytes on the device and `host` bytes beside it.

    Args:
        run: As it is configured; what its recipe already trades is kept.
        margin: Bytes on the device for so many of tensors, with what an allocator wastes.
    """

    run: Run
    device: int
    host: int | None = None
    measured: dict[tuple, Working] = field(default_factory=dict)
    stored: dict[str, Held] = field(default_factory=dict)

    def choose(self) -> Choice:
        """The fastest option that fits, rehearsed as a whole.

        Raises:
            ValueError: None does; names what is missing and the smallest change that would do.
        """
        options = sorted(self.options(), key=lambda option: option.slowdown)
        for option in options:
            if self.fits(self.predict(option)) and self.fits(choice := self.rehearse(option)):
                return choice
        raise ValueError(self.missing(options))

    def fits(self, choice: Choice) -> bool:
        return choice.device <= self.device and (self.host is None or choice.host <= self.host)

    # What could be chosen

    def options(self) -> Iterator[Option]:
        given = self.run.memory
        policies = honoured_policies(self.run.module.pipe.network) if self.run.task.calls_model_fn else ["none"]
        storages = [given.storage] if given.storage != "none" or not self.can_store else DECODING
        for policy, offload, storage, size in product(policies, (False, True), storages, self.micro_batch_sizes):
            for streamed in self.streamed if policy == "blocks" and given.checkpoint_every == 1 else (0,):
                recipe = replace(
                    given,
                    checkpointing=policy,
                    checkpoint_every=given.checkpoint_every if policy == "blocks" else 1,
                    offload_activations=offload or given.offload_activations,
                    storage=storage,
                    stream_blocks=streamed,
                )
                yield Option(recipe, size, self.slowdown(recipe, size))

    @property
    def can_store(self) -> bool:
        """Whether every transformer is frozen, adapters aside."""
        return not self.run.module.trainable_models

    @property
    def micro_batch_sizes(self) -> list[int]:
        """The configured one, and its halves."""
        whole = BatchPlan(self.run.batch_size, self.run.micro_batch_size).micro_batch_size
        return [whole // 2**n for n in range(whole.bit_length()) if whole % 2**n == 0]

    @property
    def streamed(self) -> Sequence[int]:
        """Numbers of blocks to stream: more than there are buffers, or none."""
        count, buffers = len(self.blocks), self.run.memory.stream_buffers
        tried = {-(-count * part // STREAMED) for part in range(1, STREAMED + 1)}
        return [0, *sorted(n for n in tried if n > buffers)]

    @cached_property
    def blocks(self) -> list[int]:
        """Frozen bytes of each block that could be streamed."""
        blocks = repeated_blocks(self.run.module.pipe.network) if self.can_store else []
        return [bytes_of(tensors_of(block)) for block in blocks]

    # What it costs

    def slowdown(self, recipe: MemoryRecipe, micro_batch_size: int) -> float:
        passes = PASSES + RECOMPUTED[recipe.checkpointing] / recipe.checkpoint_every
        passes += OFFLOADING[recipe.checkpointing] * recipe.offload_activations
        halvings = self.micro_batch_sizes.index(micro_batch_size)
        computing = self.forward_seconds * micro_batch_size * passes * DECODING.get(recipe.storage, 1.0)
        moving = 2 * self.streamed_bytes(recipe) / HOST_BYTES
        seconds = max(computing, moving) * HALF_A_BATCH**halvings
        return seconds / (self.forward_seconds * micro_batch_size * PASSES) + 0.01 * (moving > 0)

    @cached_property
    def forward_seconds(self) -> float:
        """Of one sample through the network."""
        numbers = sum(parameter.numel() for parameter in self.run.module.pipe.network.parameters())
        width, height = self.largest_size
        return 2 * numbers * (self.run.tokens + width * height / PIXELS_A_TOKEN) / DEVICE_FLOPS

    @cached_property
    def largest_size(self) -> tuple[int, int]:
        defaults = self.run.module.pipe.call_defaults
        sizes = [size for size in self.run.dataset.parts() if size] or [(defaults["width"], defaults["height"])]
        return max(sizes, key=lambda size: size[0] * size[1])

    def streamed_bytes(self, recipe: MemoryRecipe) -> int:
        halved = {"none": 1, "nf4": 4}.get(recipe.storage, 2)
        return recipe.stream_blocks * max(self.blocks, default=0) // halved

    # What it takes

    def predict(self, option: Option) -> Choice:
        """Put together from what was rehearsed of other options; far from `rehearse` only where they act on each other."""
        recipe = option.recipe
        kept = self.kept(recipe.storage)
        block = self.streamed_bytes(recipe) // recipe.stream_blocks if recipe.stream_blocks else 0
        saved = self.streamed_bytes(recipe) - recipe.stream_buffers * block
        least = replace(kept, frozen=kept.frozen - saved)
        host = self.streamed_bytes(recipe)
        if self.run.estimated(least.peak) > self.device:  # whatever the passes take
            return Choice(option, self.run.estimated(least.peak), host)
        passes = self.passes(option)
        held = replace(least, working=passes.peak)
        return Choice(option, self.run.estimated(held.peak), host + passes.host)

    def kept(self, storage: str) -> Held:
        if storage not in self.stored:
            run = replace(self.run, memory=replace(self.run.memory, storage=storage, stream_blocks=0))
            self.stored[storage] = run.kept
        return self.stored[storage]

    def passes(self, option: Option) -> Working:
        if option.passes_by not in self.measured:
            recipe = replace(option.recipe, storage=self.run.memory.storage, stream_blocks=0)
            self.measured[option.passes_by] = self.variant(recipe, option.micro_batch_size).worst_passes
        return self.measured[option.passes_by]

    def rehearse(self, option: Option) -> Choice:
        plan = self.variant(option.recipe, option.micro_batch_size).plan()
        return Choice(option, self.run.estimated(plan.worst.peak), plan.worst.host)

    def variant(self, recipe: MemoryRecipe, micro_batch_size: int) -> Run:
        return replace(self.run, memory=recipe, micro_batch_size=micro_batch_size)
