"""Steps whose gradient is not finite: left out, written down, and too many in a row end the run."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from accelerate.utils import gather_object

from ..core.data import SampleAddress
from ..core.files import forget_after


@dataclass
class BadSteps:
    """What is done about them.

    Args:
        path: File of one JSON line a bad step, `{step, samples: [{epoch, index, loss}, …]}`; None writes none.
        max_in_a_row: So many end the run.
    """

    path: str | Path | None = None
    max_in_a_row: int = 10

    def start(self, step: int) -> None:
        """Go on from `step`: what came after it is forgotten, as it will come again."""
        if self.path is not None:
            forget_after(self.path, step)

    def note(self, accelerator, state, batches: Sequence[Sequence[SampleAddress]]) -> None:
        """Write down the samples of the step that `state` left out; all processes call it with their micro-batches.

        Raises:
            FloatingPointError: It was the last of too many in a row.
        """
        pairs = zip(chain(*batches), torch.cat(state.left_out).tolist(), strict=True)
        seen = dict(gather_object([(address, loss) for address, loss in pairs]))  # some by several processes
        samples = [{**address._asdict(), "loss": loss} for address, loss in seen.items()]
        if accelerator.is_main_process and self.path is not None:
            with Path(self.path).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.step, "samples": samples}) + "\n")
        if state.skipped_in_a_row >= self.max_in_a_row:
            raise FloatingPointError(
                f"{state.skipped_in_a_row} steps in a row had a gradient that is not finite, the last of them step "
                f"{state.step} with rows "
                f"{sorted(sample['index'] for sample in samples)}. Lower optimizer.lr, set max_grad_norm, or look at "
                f"these rows{f' in {self.path}' if self.path else ''}; max_bad_steps={self.max_in_a_row} allows more."
            )
