"""A memory recipe: what is traded for what."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class MemoryRecipe:
    """How a training step saves memory.

    Args:
        checkpointing: `none` keeps all activations, `blocks` keeps each block's inputs and recomputes the rest,
            `offload` keeps even those in host memory.
    """

    checkpointing: Literal["none", "blocks", "offload"] = "none"

    @property
    def model_inputs(self) -> dict[str, bool]:
        """The inputs of `model_fn` that say so."""
        return {
            "use_gradient_checkpointing": self.checkpointing == "blocks",
            "use_gradient_checkpointing_offload": self.checkpointing == "offload",
        }
