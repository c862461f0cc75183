"""The memory options that a run could be trained with, each with its predicted slowdown."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product

from torch import nn

from ..core.gradient import honoured_policies, repeated_blocks
from ..core.live_bytes import bytes_of
from ..core.memory import MemoryRecipe
from ..core.memory.storage import what_to_install
from ..core.memory.streaming import spread
from ..diffusion.training_module import PipelineTrainingModule
from .few_blocks import FewBlocks
from .meta_module import MetaModules
from .rehearsal import tensors_of
from .run import PlacedRun

# All of these are guesses, unless a line says otherwise; only the order in which options are tried depends on them.
# Times are in units of a forward pass.
RECOMPUTING = {"none": 0.0, "attention": 0.3, "feed_forward": 0.3, "blocks": 1.0}  # added by checkpointing
OFFLOADING = {"none": 1.5, "attention": 1.0, "feed_forward": 1.0, "blocks": 0.1}  # added by copies to the host and back
# Factors of a step's time, by storage. int8 is tried before fp8, because its error is smaller at as many bits.
DECODING = {"none": 1.0, "int8": 1.25, "nf4": 1.5}
HALF_A_BATCH = 1.05  # factor of a step's time each time the samples of a forward pass are halved
# Bytes per byte of bf16 weights, by arithmetic: nf4 has 4 bits and a scale; the others, with 8 bits, take half.
STORED = {"none": 1.0, "nf4": 4.5 / 16}
DEVICE_FLOPS, HOST_BYTES = 2e14, 2.5e10  # per second: a large GPU in bf16, and PCIe 4 (its x16 bandwidth is 3.2e10)
STREAMED_PARTS = 10  # the numbers of streamed blocks that are tried are tenths of all


@dataclass(frozen=True)
class Option:
    """Memory options, the samples per forward pass, and the slowdown.

    The slowdown is a step's predicted time over that of a step that saves no memory.
    """

    recipe: MemoryRecipe
    micro_batch_size: int
    slowdown: float

    def __str__(self) -> str:
        names = ("checkpointing", "offload_activations", "storage", "stream_blocks")
        chosen = [f"memory.{name}={getattr(self.recipe, name)}".lower() for name in names]
        return " ".join([*chosen, f"micro_batch_size={self.micro_batch_size}"])


@dataclass(frozen=True)
class Streamed:
    """Bytes of streamed weights in host memory, and how many bytes fewer the device holds (buffers remain there)."""

    host: int = 0
    spared: int = 0


NOTHING_STREAMED = Streamed()


@dataclass
class Options:
    """Lists the memory options that a run could be trained with; options that the run sets itself stay set."""

    run: PlacedRun
    meta_modules: MetaModules

    @property
    def module(self) -> PipelineTrainingModule:
        """The run's training module on the meta device."""
        return self.meta_modules.of(self.run)

    def all(self) -> list[Option]:
        """Return all options, those with the smallest slowdown first."""
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
        """Checkpointing policies to try."""
        return honoured_policies(self.module.pipe.network) if self.run.task.calls_model_fn else ["none"]

    @property
    def storages(self) -> Sequence[str]:
        """Storage formats of frozen weights to try whose packages are installed."""
        return [name for name in self._possible_storages if what_to_install(name) is None]

    @property
    def missing_storages(self) -> Sequence[str]:
        """Storage formats that could be tried if their packages were installed."""
        return [name for name in self._possible_storages if what_to_install(name) is not None]

    @property
    def _possible_storages(self) -> Sequence[str]:
        run, configured = self.run, self.run.memory.storage
        is_merged = run.lora is not None and run.lora.preset is not None and run.lora.preset_in_sampling
        is_fixed = configured != "none" or self.module.trainable_models or is_merged or run.engine != "ddp"
        return [configured] if is_fixed else list(DECODING)

    def offloads(self, policy: str) -> Sequence[bool]:
        """Values of `offload_activations` to try.

        Offloading pays only with checkpointing=blocks: block inputs are small enough to copy faster than to recompute.
        """
        return [True] if self.run.memory.offload_activations else [False, *([True] if policy == "blocks" else [])]

    @property
    def sizes(self) -> list[int]:
        """Samples per forward pass to try: the configured number, and its halves as long as they are whole."""
        configured = self.run.batches.micro_batch_size
        return [configured // 2**n for n in range(configured.bit_length()) if configured % 2**n == 0]

    def streamed_numbers(self, policy: str) -> Sequence[int]:
        """Numbers of streamed blocks to try: none, and some that are larger than the number of buffers."""
        recipe, count = self.run.memory, len(self.blocks)
        if policy != "blocks" or recipe.checkpoint_every > 1 or recipe.compile != "none" or self.run.engine != "ddp":
            return [0]
        tried = {recipe.stream_blocks, *(-(-count * part // STREAMED_PARTS) for part in range(1, STREAMED_PARTS + 1))}
        return [*([] if recipe.stream_blocks else [0]), *sorted(n for n in tried if n > recipe.stream_buffers)]

    @cached_property
    def blocks(self) -> list[nn.Module]:
        """The network's blocks, if they can be streamed because they are frozen."""
        is_frozen = self.run.task.calls_model_fn and not self.module.trainable_models
        return repeated_blocks(self.module.pipe.network) if is_frozen else []

    def slowdown(self, recipe: MemoryRecipe, size: int) -> float:
        """Predict a step's time with these options, over that of a step that saves no memory.

        Streaming runs beside the computation of each pass, so that the slower of the two counts there.

        Args:
            size: Samples per forward pass.
        """
        forward, backward = self.seconds
        again = RECOMPUTING[recipe.checkpointing] / recipe.checkpoint_every
        again += OFFLOADING[recipe.checkpointing] * recipe.offload_activations
        decoding = DECODING.get(recipe.storage, 1.25)
        passes = (forward * size * decoding, (backward + again * forward) * size * decoding)
        stored = STORED.get(recipe.storage, 0.5) * self.module.pipe.torch_dtype.itemsize
        moving = recipe.stream_blocks * self.block_numel * stored / HOST_BYTES if recipe.stream_blocks else 0
        step = sum(max(computing, moving) for computing in passes)
        return step / ((forward + backward) * size) * HALF_A_BATCH ** self.sizes.index(size) + 0.02 * (moving > 0)

    @cached_property
    def seconds(self) -> tuple[float, float]:
        """Predicted seconds of the forward and the backward pass of one sample of the largest size, by their FLOPs."""
        plain = replace(self.run.memory, checkpointing="none", checkpoint_every=1, offload_activations=False)
        run = self.run.variant(replace(plain, storage="none", stored=None, stream_blocks=0, compile="none"))
        work = FewBlocks(self.meta_modules.of(run), run.memory).work([self.meta_modules.row(run, run.sizes[0])])
        return work.forward / DEVICE_FLOPS, work.backward / DEVICE_FLOPS

    @cached_property
    def block_numel(self) -> int:
        """Number of parameters of the largest block, before any storage packs them."""
        network = self.meta_modules.meta_pipe.network
        return max(sum(p.numel() for p in block.parameters()) for block in repeated_blocks(network))

    def streamed(self, recipe: MemoryRecipe) -> Streamed:
        """Return how many bytes streaming keeps in host memory and spares the device."""
        if not recipe.stream_blocks:
            return NOTHING_STREAMED
        blocks = repeated_blocks(self.meta_modules.of(self.run.variant(recipe)).pipe.network)
        sizes = [_frozen_bytes(block) for block in spread(blocks, recipe.stream_blocks)]
        return Streamed(sum(sizes), sum(sizes) - recipe.stream_buffers * max(sizes))


def _frozen_bytes(block: nn.Module) -> int:
    return bytes_of(tensor for tensor in tensors_of(block) if not tensor.requires_grad)
