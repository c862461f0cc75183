"""A memory recipe: what is traded for what."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class MemoryRecipe:
    """How a training step saves memory.

    Args:
        checkpointing: `none` keeps all activations, `blocks` keeps each block's inputs and recomputes the rest,
            `offload` keeps even those in host memory.
        remember: GiB of host memory a process in which to keep what frozen encoders made of each sample, so that they
            see it once; 0 runs them every time.
        trained_dtype: What models trained in full are kept in. `bfloat16` takes 2 bytes for a weight and 2 for its
            gradient instead of 4 and 4; its updates are rounded stochastically. Adapters are fp32 in any case.
        compile: `blocks` compiles the blocks that the network repeats, which pays where a run has thousands of steps.
    """

    checkpointing: Literal["none", "blocks", "offload"] = "none"
    remember: float = 0.0
    trained_dtype: Literal["float32", "bfloat16"] = "float32"
    compile: Literal["none", "blocks"] = "none"

    @property
    def inputs(self) -> dict[str, bool]:
        """The inputs of `model_fn` that say how it is checkpointed."""
        return {
            "use_gradient_checkpointing": self.checkpointing == "blocks",
            "use_gradient_checkpointing_offload": self.checkpointing == "offload",
        }
