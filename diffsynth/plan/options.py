"""Recipes that a run could be trained by, and how much longer each is predicted to take."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product

from torch import nn

from ..core.gradient import honoured_policies, repeated_blocks
from ..core.memory import MemoryRecipe
from ..core.memory.live import bytes_of
from ..core.memory.streaming import spread
from ..diffusion.training_module import PipelineTrainingModule
from .meta_module import MetaModules
from .rehearsal import tensors_of
from .run import PlanRun

# Only the order of options hangs on these. A step that trades nothing is three passes: one forward, two backward.
PASSES = 3.0
RECOMPUTING = {"none": 0.0, "attention": 0.3, "feed_forward": 0.3, "blocks": 1.0}  # passes more
OFFLOADING = {"none": 1.5, "attention": 1.0, "feed_forward": 1.0, "blocks": 0.1}  # passes more, as long as copies take
DECODING = {"none": 1.0, "int8": 1.25, "nf4": 1.5}  # times as long; int8 before fp8, as it errs less in as many bits
HALF_A_BATCH = 1.05  # times as long, with half as many samples in a forward
STORED = {"none": 1.0, "nf4": 4.5 / 16}  # bytes for one of bf16; else a half
DEVICE_FLOPS, HOST_BYTES = 2e14, 2.5e10  # a second: of a large card in bf16, and of PCIe 4
STREAMED_PARTS = 10  # how finely numbers of streamed blocks are tried
PIXELS_A_TOKEN = 16 * 16


@dataclass(frozen=True)
class Option:
    """A recipe, the samples of a forward, and how many times as long a step takes as one that trades nothing."""

    recipe: MemoryRecipe
    micro_batch_size: int
    slowdown: float

    def __str__(self) -> str:
        names = ("checkpointing", "offload_activations", "storage", "stream_blocks")
        chosen = [f"memory.{name}={getattr(self.recipe, name)}".lower() for name in names]
        return " ".join([*chosen, f"micro_batch_size={self.micro_batch_size}"])


@dataclass(frozen=True)
class Streamed:
    """Bytes of frozen weights that wait in host memory, and of these what the device is spared."""

    host: int = 0
    spared: int = 0


NOTHING_STREAMED = Streamed()


@dataclass
class Options:
    """What a run's recipe could become; what it trades already, it goes on trading."""

    run: PlanRun
    meta_modules: MetaModules

    @property
    def module(self) -> PipelineTrainingModule:
        return self.meta_modules.of(self.run)

    def all(self) -> list[Option]:
        """The fastest first."""
        return sorted(self._each(), key=lambda option: option.slowdown)

    def _each(self) -> Iterator[Option]:
        for policy, storage, size in product(self.policies, self.storages, self.sizes):
            for offload, streamed in product(self.offloads(policy), self.streamed_numbers(policy)):
                recipe = replace(
                    self.run.memory,
                    checkpointing=policy,
                    checkpoint_every=self.run.memory.checkpoint_every if policy == "blocks" else 1,
                    offload_activations=offload,
                    storage=storage,
                    stream_blocks=streamed,
                )
                yield Option(recipe, size, self.slowdown(recipe, size))

    @property
    def policies(self) -> Sequence[str]:
        return honoured_policies(self.module.pipe.network) if self.run.task.calls_model_fn else ["none"]

    @property
    def storages(self) -> Sequence[str]:
        run, given = self.run, self.run.memory.storage
        merged = run.lora is not None and run.lora.preset is not None
        fixed = given != "none" or self.module.trainable_models or merged or run.engine != "ddp"
        return [given] if fixed else list(DECODING)

    def offloads(self, policy: str) -> Sequence[bool]:
        """Only what blocks keep is so little that copying it beats computing it again."""
        return [True] if self.run.memory.offload_activations else [False, *([True] if policy == "blocks" else [])]

    @property
    def sizes(self) -> list[int]:
        """Samples of a forward: as configured, and halves of it."""
        whole = self.run.batches.micro_batch_size
        return [whole // 2**n for n in range(whole.bit_length()) if whole % 2**n == 0]

    def streamed_numbers(self, policy: str) -> Sequence[int]:
        """Numbers of blocks to stream: none, or more than there are buffers for."""
        recipe, count = self.run.memory, len(self.blocks)
        if policy != "blocks" or recipe.checkpoint_every > 1 or recipe.compile != "none" or self.run.engine != "ddp":
            return [0]
        tried = {recipe.stream_blocks, *(-(-count * part // STREAMED_PARTS) for part in range(1, STREAMED_PARTS + 1))}
        return [*([] if recipe.stream_blocks else [0]), *sorted(n for n in tried if n > recipe.stream_buffers)]

    @cached_property
    def blocks(self) -> list[nn.Module]:
        """Those that could be streamed."""
        frozen = self.run.task.calls_model_fn and not self.module.trainable_models
        return repeated_blocks(self.module.pipe.network) if frozen else []

    def slowdown(self, recipe: MemoryRecipe, size: int) -> float:
        passes = PASSES + RECOMPUTING[recipe.checkpointing] / recipe.checkpoint_every
        passes += OFFLOADING[recipe.checkpointing] * recipe.offload_activations
        alone = PASSES * self.forward_seconds * size
        computing = passes / PASSES * alone * DECODING.get(recipe.storage, 1.25)
        stored = STORED.get(recipe.storage, 0.5) * self.module.pipe.torch_dtype.itemsize
        moving = 2 * recipe.stream_blocks * self.block_numbers * stored / HOST_BYTES if recipe.stream_blocks else 0
        return max(computing, moving) / alone * HALF_A_BATCH ** self.sizes.index(size) + 0.02 * (moving > 0)

    @cached_property
    def forward_seconds(self) -> float:
        """Of one sample of the largest size."""
        defaults = self.module.pipe.call_defaults
        width, height = self.run.sizes[0] or (defaults["width"], defaults["height"])
        tokens = self.run.tokens + width * height / PIXELS_A_TOKEN
        numbers = sum(parameter.numel() for parameter in self.module.pipe.network.parameters())
        return 2 * numbers * tokens / DEVICE_FLOPS

    @cached_property
    def block_numbers(self) -> int:
        """Weights of the largest block, in whatever bits they are."""
        network = self.meta_modules.meta_pipe.network
        return max(sum(p.numel() for p in block.parameters()) for block in repeated_blocks(network))

    def streamed(self, recipe: MemoryRecipe) -> Streamed:
        """What streaming moves, and leaves to the device."""
        if not recipe.stream_blocks:
            return NOTHING_STREAMED
        blocks = repeated_blocks(self.meta_modules.of(self.run.variant(recipe)).pipe.network)
        sizes = [_frozen_bytes(block) for block in spread(blocks, recipe.stream_blocks)]
        return Streamed(sum(sizes), sum(sizes) - recipe.stream_buffers * max(sizes))


def _frozen_bytes(block: nn.Module) -> int:
    return bytes_of(tensor for tensor in tensors_of(block) if not tensor.requires_grad)
