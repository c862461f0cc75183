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
    """

    checkpointing: Literal["none", "blocks", "offload"] = "none"
    remember: float = 0.0

    @property
    def options(self) -> dict[str, bool | float]:
        """The options of `PipelineTrainingModule` that say so."""
        return {
            "remember": self.remember,
            "use_gradient_checkpointing": self.checkpointing == "blocks",
            "use_gradient_checkpointing_offload": self.checkpointing == "offload",
        }
