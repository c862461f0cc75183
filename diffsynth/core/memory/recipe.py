"""The settings that trade time or precision for memory: the node `memory` of the configuration."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ..ranges import NonNegativeFloat, NonNegativeInt, PositiveInt, check_fields
from .sizes import parse_size


@dataclass(frozen=True, kw_only=True)
class FrozenMemory:
    """How frozen weights save memory, in sampling and in training.

    Args:
        storage: Format of the weights of frozen models, which are decoded for each product; see `storage.py`.
        stored: Names of the models whose weights have this format; None selects every transformer.
        stream_blocks: Number of blocks whose frozen weights stay in host memory and are copied in when a block runs.
        stream_buffers: Number of streamed blocks that the device has room for; with 1, nothing computes during a copy.

    Raises:
        ValueError: A number is out of range, or two settings exclude each other.
    """

    storage: Literal["none", "fp8", "fp8_cast", "int8", "nf4"] = "none"
    stored: Sequence[str] | None = None
    stream_blocks: NonNegativeInt = 0
    stream_buffers: PositiveInt = 2

    def __post_init__(self):
        check_fields(self, "memory.")
        if self.stored is not None and self.storage == "none":
            raise ValueError(
                f"memory.stored names {list(self.stored)}, but memory.storage is none; set memory.storage=fp8, say."
            )
        if 0 < self.stream_blocks <= self.stream_buffers:
            raise ValueError(
                f"memory.stream_blocks={self.stream_blocks} with memory.stream_buffers={self.stream_buffers} saves "
                "nothing; set memory.stream_blocks above memory.stream_buffers, or to 0."
            )


@dataclass(frozen=True, kw_only=True)
class MemoryRecipe(FrozenMemory):
    """How a training step saves memory: the settings of frozen weights (`FrozenMemory`), and these.

    Args:
        checkpointing: `none` saves all activations; `blocks` saves each block's inputs and computes the rest again in
            the backward pass; `attention` and `feed_forward` compute these parts of each block again.
        checkpoint_every: With `checkpointing=blocks`, checkpoint every Nth block; the others save all activations.
        offload_activations: Keep the saved activations in host memory until the backward pass.
        remember: GiB of host memory per process that cache the outputs of frozen encoders by sample, so that they
            encode each sample once; 0 encodes samples each time.
        trained_dtype: Dtype of models that are trained in full. `bfloat16` takes 2 bytes per weight and 2 per gradient
            instead of 4 and 4; its updates are rounded stochastically. Adapters are fp32 in any case.
        budget: Most memory that the run may use on the device, such as `24GiB`. The settings above are then chosen so
            that the run fits, with the least predicted slowdown. None leaves them as they are given.
        host_budget: Most host memory that offloading and streaming may use, with `budget`.
        check: Predict the run's memory before it starts, and refuse a run that needs more than there is.
        compile: `blocks` compiles the network's repeated blocks; that takes minutes, and pays in runs of thousands of
            steps.

    Raises:
        ValueError: A number is out of range, or two settings exclude each other.
    """

    checkpointing: Literal["none", "blocks", "attention", "feed_forward"] = "none"
    checkpoint_every: PositiveInt = 1
    offload_activations: bool = False
    remember: NonNegativeFloat = 0.0
    trained_dtype: Literal["float32", "bfloat16"] = "float32"
    compile: Literal["none", "blocks"] = "none"
    budget: str | PositiveInt | None = None
    host_budget: str | PositiveInt | None = None
    check: bool = True

    def __post_init__(self):
        super().__post_init__()
        if self.budget is not None:
            _ = self.budgets  # raises if one is no amount of memory
        if self.host_budget is not None and self.budget is None:
            raise ValueError(
                f"memory.host_budget={self.host_budget} limits what memory.budget chooses, which is not set; set "
                "memory.budget as well."
            )
        if self.checkpoint_every > 1 and self.checkpointing != "blocks":
            raise ValueError(
                f"memory.checkpoint_every={self.checkpoint_every} needs memory.checkpointing=blocks, but "
                f"memory.checkpointing={self.checkpointing}; set memory.checkpointing=blocks."
            )
        if self.stream_blocks and (self.checkpointing, self.checkpoint_every) != ("blocks", 1):
            raise ValueError(
                f"memory.stream_blocks={self.stream_blocks} with memory.checkpointing={self.checkpointing}, "
                f"checkpoint_every={self.checkpoint_every}: a block that is not checkpointed needs its weights in the "
                "backward pass, when another block's have replaced them; set memory.checkpointing=blocks and "
                "memory.checkpoint_every=1."
            )
        if self.stream_blocks and self.compile == "blocks":
            raise ValueError(
                f"memory.stream_blocks={self.stream_blocks} with memory.compile=blocks: compiled blocks "
                "keep the addresses of their weights, which streaming changes; set memory.stream_blocks=0 or "
                "memory.compile=none."
            )

    @property
    def budgets(self) -> tuple[int, int | None]:
        """`budget` and `host_budget` in bytes; the latter None if it is not set."""
        host = None if self.host_budget is None else parse_size(self.host_budget, "memory.host_budget")
        return parse_size(self.budget, "memory.budget"), host

    @property
    def inputs(self) -> dict[str, bool]:
        """The arguments of `model_fn` that turn checkpointing of its blocks on."""
        blocks = self.checkpointing == "blocks"
        return {
            "use_gradient_checkpointing": blocks and not self.offload_activations,
            "use_gradient_checkpointing_offload": blocks and self.offload_activations,
        }
