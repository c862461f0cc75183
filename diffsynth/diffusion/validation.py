"""Looking at a run: held-out loss, fixed prompts drawn into a grid, and whether the prompt decides what is drawn.

Nothing here touches the training: all noise comes from its own seed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..core.data import Sample, UnifiedDataset
from .drawing import row, save_png, stack

LOSS_DRAWS = 4  # noise levels a held-out sample is measured at


@dataclass
class Validation:
    """What is looked at, and when: before the first step, after the last, and every `every` steps.

    Args:
        path: Folder of the grids.
        every: Optimizer steps between looks; None looks at the start and the end only.
        prompts: Drawn into `samples/step-N.png`, one row a look in `samples/progress.png`.
        seed: Of all noise here.
        options: Other arguments of the pipeline's call (`num_inference_steps`, `cfg_scale`, `height`, …).
        datasets: Rows to measure the loss on, by name.
        loss_samples: How many rows of each.
        retrieval_samples: How many rows of each to draw from their prompts; reports how often a drawing is nearer (in
            pixels) to its own row's image than to any other's: 1 / N is chance, 1 is always.
    """

    path: str | Path
    every: int | None = None
    prompts: Sequence[str] = ()
    seed: int = 0
    options: Mapping[str, object] = field(default_factory=dict)
    datasets: Mapping[str, UnifiedDataset] = field(default_factory=dict)
    loss_samples: int = 64
    retrieval_samples: int = 0
    drawn: list[Path] = field(default_factory=list, init=False)

    @property
    def saved(self) -> list[Path]:
        """The picture that shows all looks below one another."""
        return [Path(self.path) / "progress.png"] if self.drawn else []

    def models(self, pipe) -> set[str]:
        """The models of the pipeline that have to be loaded for this.

        Raises:
            ValueError: The pipeline does not take these options.
        """
        pipe.complete(self.options)
        draws = self.prompts or self.retrieval_samples
        return pipe.models_of(pipe.units, model_fn=True) if draws else set()

    def due(self, step: int, done: bool) -> bool:
        return step == 0 or done or (self.every is not None and step % self.every == 0)

    @torch.no_grad()
    def run(self, accelerator, model, step: int) -> dict[str, float]:
        """Measure and draw; returns the numbers, the same on every process."""
        module = accelerator.unwrap_model(model)
        values = {}
        with accelerator.autocast(), module.pipe.sampling() as pipe:
            for name, dataset in self.datasets.items():  # first: drawing changes the noise levels
                values[f"{name}_loss"] = self.loss(module, dataset)
            for name, dataset in self.datasets.items() if self.retrieval_samples else ():
                values[f"{name}_retrieval"] = self.retrieval(pipe, dataset)
            if self.prompts and accelerator.is_main_process:
                self.draw(pipe, step)
        accelerator.wait_for_everyone()
        return values

    def loss(self, module, dataset: UnifiedDataset) -> float:
        """Mean loss over the first rows, each at `LOSS_DRAWS` fixed noise levels."""
        losses = []
        for index in range(min(self.loss_samples, len(dataset))):
            row = dataset[index]
            samples = [Sample(row, draw, index) for draw in range(LOSS_DRAWS)]
            losses.append(module.loss(samples, self.seed).float())
        return torch.cat(losses).mean().item()

    def retrieval(self, pipe, dataset: UnifiedDataset) -> float:
        """Share of prompts whose drawing is nearest to its own target."""
        rows = [dataset[index] for index in range(min(self.retrieval_samples, len(dataset)))]
        drawn = self._generate(pipe, [row["prompt"] for row in rows])
        targets = _pixels([row["image"] for row in rows])
        nearest = torch.cdist(_pixels(drawn), targets).argmin(1)
        return (nearest == torch.arange(len(rows))).float().mean().item()

    def draw(self, pipe, step: int) -> None:
        """Draw the prompts and save them as one row, and with all earlier rows as `progress.png`."""
        captions = [f"{step}: {prompt}" for prompt in self.prompts]
        self.drawn.append(Path(self.path) / f"step-{step:06d}.png")
        save_png(row(self._generate(pipe, self.prompts), captions), self.drawn[-1])
        save_png(stack([Image.open(path) for path in self.drawn]), Path(self.path) / "progress.png")

    def _generate(self, pipe, prompts: Sequence[str]) -> list[Image.Image]:
        pipe.progress_bar = iter
        return pipe.generate([{**self.options, "prompt": p, "seed": self.seed + i} for i, p in enumerate(prompts)])


def _pixels(images: Sequence[Image.Image]) -> torch.Tensor:
    return torch.stack([torch.from_numpy(np.array(i.convert("RGB"), dtype=np.float32)).flatten() for i in images])
