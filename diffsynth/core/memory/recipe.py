"""A memory recipe: what is traded for what."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from .sizes import parse_size


@dataclass(frozen=True, kw_only=True)
class MemoryRecipe:
    """How a training step saves memory.

    Args:
        checkpointing: `none` keeps all activations; `blocks` keeps each block's inputs and computes the rest again in
            the backward pass; `attention` and `feed_forward` compute these parts of each block again.
        checkpoint_every: Under `blocks`, one of so many blocks is checkpointed, the others keep all.
        offload_activations: What is kept for the backward pass waits in host memory.
        stream_blocks: Blocks of the network whose frozen weights wait in host memory and pass through the device.
        stream_buffers: Blocks that the device has room for meanwhile; with one, nothing computes while it is filled.
        remember: GiB of host memory a process in which to keep what frozen encoders made of each sample, so that they
            see it once; 0 runs them every time.
        trained_dtype: What models trained in full are kept in. `bfloat16` takes 2 bytes for a weight and 2 for its
            gradient instead of 4 and 4; its updates are rounded stochastically. Adapters are fp32 in any case.
        storage: How weights of frozen models are kept; see `storage.py`. They are decoded for each product.
        stored: Names of the models whose weights are; None takes every transformer.
        budget: What the device may hold, such as `24GiB`: everything above is then chosen so that it fits, with the
            least predicted slowdown; None takes it as it is given.
        host_budget: What may wait in host memory.
        check: Plan the run first, and refuse one that needs more memory than there is.
        compile: `blocks` compiles the blocks that the network repeats, which pays where a run has thousands of steps.

    Raises:
        ValueError: Numbers out of range, or choices that exclude each other.
    """

    checkpointing: Literal["none", "blocks", "attention", "feed_forward"] = "none"
    checkpoint_every: int = 1
    offload_activations: bool = False
    stream_blocks: int = 0
    stream_buffers: int = 2
    remember: float = 0.0
    trained_dtype: Literal["float32", "bfloat16"] = "float32"
    storage: Literal["none", "fp8", "fp8_cast", "int8", "nf4"] = "none"
    stored: Sequence[str] | None = None
    compile: Literal["none", "blocks"] = "none"
    budget: str | int | None = None
    host_budget: str | int | None = None
    check: bool = True

    def __post_init__(self):
        least = {"checkpoint_every": 1, "stream_blocks": 0, "stream_buffers": 1}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ValueError(f"memory.{name} is {getattr(self, name)}; expected at least {value}.")
        if self.budget is not None:
            _ = self.budgets  # refuses what is no amount
        if self.host_budget is not None and self.budget is None:
            raise ValueError("memory.host_budget is what a recipe is chosen within; set memory.budget too.")
        if self.checkpoint_every > 1 and self.checkpointing != "blocks":
            raise ValueError(
                f"memory.checkpoint_every={self.checkpoint_every} counts checkpointed blocks, of which "
                f"memory.checkpointing={self.checkpointing} has none; set memory.checkpointing=blocks."
            )
        if self.stream_blocks and (self.checkpointing, self.checkpoint_every) != ("blocks", 1):
            raise ValueError(
                f"memory.stream_blocks={self.stream_blocks} with memory.checkpointing={self.checkpointing}, "
                f"checkpoint_every={self.checkpoint_every}: a block that is not computed again would need its weights "
                "in the backward pass, when others have taken their place; set memory.checkpointing=blocks and "
                "memory.checkpoint_every=1."
            )
        if self.stored is not None and self.storage == "none":
            raise ValueError(
                f"memory.stored names {list(self.stored)}, but memory.storage is none; set it to fp8, say."
            )
        if self.stream_blocks and self.compile == "blocks":
            raise ValueError(
                f"memory.stream_blocks={self.stream_blocks} with memory.compile=blocks: compiled blocks hold on to "
                "where their weights lay; set one of them to 0 or none."
            )
        if 0 < self.stream_blocks <= self.stream_buffers:
            raise ValueError(
                f"memory.stream_blocks={self.stream_blocks} pass through memory.stream_buffers={self.stream_buffers}, "
                "which saves nothing; stream more blocks than there are buffers, or none."
            )

    @property
    def budgets(self) -> tuple[int, int | None]:
        """Bytes of `budget` and of `host_budget`."""
        host = None if self.host_budget is None else parse_size(self.host_budget, "memory.host_budget")
        return parse_size(self.budget, "memory.budget"), host

    @property
    def inputs(self) -> dict[str, bool]:
        """The inputs of `model_fn` that say how it is checkpointed."""
        blocks = self.checkpointing == "blocks"
        return {
            "use_gradient_checkpointing": blocks and not self.offload_activations,
            "use_gradient_checkpointing_offload": blocks and self.offload_activations,
        }
