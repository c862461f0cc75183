"""Bad steps: optimizer steps that are skipped because their gradient is not finite. Too many in a row end the run."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate.utils import gather_object

from ..core.data import SampleAddress
from ..core.files import forget_after
from ..core.json_lines import JsonLines

if TYPE_CHECKING:
    from accelerate import Accelerator

    from .state import TrainingState


@dataclass
class BadSteps:
    """Writes down which samples a bad step had, and ends the run after too many bad steps in a row.

    Args:
        path: File with one JSON line per bad step, `{step, samples: [{epoch, index, loss}, …]}`, where a loss that is
            not finite is null; None writes no file.
        max_in_a_row: The run ends after this many bad steps in a row.
    """

    path: str | Path | None = None
    max_in_a_row: int = 10

    def __post_init__(self):
        self.lines = None if self.path is None else JsonLines(self.path)

    def start(self, step: int) -> None:
        """Delete the lines of steps after `step`, from which the run resumes and which it will take again."""
        if self.path is not None:
            forget_after(self.path, step)

    def note(
        self,
        accelerator: "Accelerator",
        state: "TrainingState",
        batches: Sequence[Sequence[SampleAddress]],
        kept: str = "",
    ) -> None:
        """Write down the samples of the step that `state` skipped; all processes call it with their micro-batches.

        Args:
            kept: A sentence about the newest checkpoint, which is from before these steps.

        Raises:
            FloatingPointError: The last `max_in_a_row` steps were bad.
        """
        pairs = zip(chain(*batches), torch.cat(state.skipped_losses).tolist(), strict=True)
        # Processes that share one sample's tokens report the same sample.
        losses = dict(gather_object([(address, loss) for address, loss in pairs]))
        samples = [{**address._asdict(), "loss": loss} for address, loss in losses.items()]
        if accelerator.is_main_process and self.lines is not None:
            self.lines.append(state.step, {"samples": samples})
        if state.skipped_in_a_row >= self.max_in_a_row:
            rows = sorted(sample["index"] for sample in samples)
            raise FloatingPointError(
                f"{state.skipped_in_a_row} steps in a row had a gradient that is not finite. The last one, step "
                f"{state.step}, had the rows {rows}{f'; all are listed in {self.path}' if self.path else ''}. Check "
                f"these rows, lower optimizer.lr, or set max_grad_norm; max_bad_steps is {self.max_in_a_row}, and a "
                f"larger one allows more. {kept}".rstrip()
            )
