"""What a run is about to train on, written down before its first step."""

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ...core.data.order.buckets import is_upscaled
from ...core.files import write_text
from ...core.pictures import GRID_COLUMNS, beside, row, save_png, stack

logger = logging.getLogger(__name__)

THREADS = 8
THUMBNAIL = (16, 16)
NEAR = 3.0  # mean difference of two thumbnails' values in [0, 255]: what saving an image again changes, and little more


@dataclass
class DataReport:
    """Counts, warnings and a contact sheet of a run's data: `data_report.json` and `data_report.png`.

    Args:
        path: The run's folder.
        rows: How many samples are looked at closely, evenly spread over all: are they enlarged, is their caption cut
            off, is one of them nearly the same as one that the run is validated on. 0 looks at none.
        pictures: How many of the first samples are shown, as they will be trained on; from a cache, decoded.
    """

    path: str | Path
    rows: int = 2000
    pictures: int = 32

    def write(self, pipe, dataset, order, validation: Mapping, seed: int) -> dict:
        """Write the receipt of `dataset` in the order in which it will be trained on, and return its content."""
        content = {**self.counts(dataset), **self.look(pipe, dataset, validation)}
        write_text(Path(self.path) / "data_report.json", json.dumps(content, indent=1, ensure_ascii=False))
        if self.pictures:
            save_png(self.sheet(pipe, dataset, order, seed), Path(self.path) / "data_report.png")
        logger.info("Data: %s; %s/data_report.json and data_report.png have more.", _summary(content), self.path)
        return content

    def counts(self, dataset) -> dict:
        """How many samples of which size, and how many rows are left out and why."""
        skipped = dataset.skipped
        sizes = {
            "own" if size is None else f"{size[0]}x{size[1]}": len(p.rows) for size, p in dataset.rows_by_size().items()
        }
        reasons = [{"row": fault.row, "file": fault.file, "reason": fault.reason} for fault in skipped]
        return {"samples": dataset.size, "an_epoch": len(dataset), "sizes": sizes, "left_out": reasons}

    def look(self, pipe, dataset, validation: Mapping) -> dict:
        """What is enlarged, cut off, or shown in validation as well; of samples that are not cached."""
        numbers = spread(dataset.size, self.rows)
        seen = [look for look in _look_at_all(pipe, dataset, numbers) if look is not None]
        pairs = {name: self._pairs(seen, pipe, other) for name, other in validation.items()}
        return {
            "looked_at": len(seen),
            "enlarged": [look.number for look in seen if look.is_enlarged],
            "caption_cut_off": [look.number for look in seen if look.is_cut_off],
            "also_in_validation": pairs,
        }

    def _pairs(self, seen: Sequence["Look"], pipe, other) -> list[list[int]]:
        others = [look for look in _look_at_all(pipe, other, spread(other.size, self.rows)) if look is not None]
        near = near_pairs([look.thumbnail for look in seen], [look.thumbnail for look in others])
        return [[seen[mine].number, others[theirs].number] for mine, theirs in near]

    def sheet(self, pipe, dataset, order, seed: int) -> Image.Image:
        """The first samples of a run with their captions; under each its other pictures: controls, masks."""
        addresses = [order.sample(position) for position in range(min(self.pictures, dataset.size))]
        samples = [dataset.sample(address, seed)[0] for address in addresses]
        cells = [_cell(sample) for sample in _decoded(pipe, samples)]
        return stack([beside(cells[start : start + GRID_COLUMNS]) for start in range(0, len(cells), GRID_COLUMNS)])


@dataclass(frozen=True)
class Look:
    """What was seen of one sample."""

    number: int
    thumbnail: np.ndarray
    is_enlarged: bool
    is_cut_off: bool


def spread(size: int, count: int) -> list[int]:
    """At most `count` numbers, evenly spread over range(size)."""
    return [number * size // min(count, size) for number in range(min(count, size))]


def near_pairs(mine: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> list[tuple[int, int]]:
    """Indices of thumbnails that are nearly equal."""
    if not mine or not theirs:
        return []
    table = np.stack(mine).astype(np.float32)
    close = ((index, np.abs(table - other).mean((1, 2, 3))) for index, other in enumerate(theirs))
    return [(int(number), index) for index, distance in close for number in np.flatnonzero(distance < NEAR)]


def _look_at_all(pipe, dataset, numbers: Iterable[int]) -> list[Look | None]:
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(partial(_check_row, pipe, dataset), numbers))


def _check_row(pipe, dataset, number: int) -> Look | None:
    """None where a sample is cached, or cannot be decoded: training says so when it comes to it."""
    try:
        sample = dataset[number]
        original = dataset.original_size(number)
    except ValueError:
        return None
    images = _images(sample)
    if not images:
        return None
    thumbnail = np.asarray(images[0].convert("RGB").resize(THUMBNAIL, Image.Resampling.BOX))
    enlarged = original is not None and is_upscaled(*original, images[0].size)
    return Look(number, thumbnail, enlarged, pipe.cuts_off(sample["prompt"]))


def _images(sample: Mapping) -> list[Image.Image]:
    values = [value if isinstance(value, list) else [value] for value in sample.values()]
    return [element for value in values for element in value if isinstance(element, Image.Image)]


def _cell(sample: Mapping) -> Image.Image:
    images = _images(sample) or [Image.new("RGB", (128, 128), "lightgray")]
    first = row(images[:1], [sample["prompt"]])
    others = [ImageOps.contain(image.convert("RGB"), (first.width, first.height)) for image in images[1:]]
    return stack([first, *others])


@torch.no_grad()
def _decoded(pipe, samples: Sequence) -> list[Mapping]:
    """Rows as they are; of those from a cache the prompt and, where the run has a decoder, what their inputs show."""
    if not any(sample.made for sample in samples):
        return samples
    rows = [{"prompt": sample.get("prompt", "")} for sample in samples]
    if any(getattr(pipe, name) is None for name in pipe.decoding_models):
        return rows
    with pipe.loaded(pipe.decoding_models):
        for row, sample in zip(rows, samples, strict=True):
            inputs = dict(sample.made["shared"])
            if (latents := inputs.pop("input_latents", None)) is not None:
                shown = {"input_latents": latents, **inputs}  # the first, as the largest
                row |= {name: _shown(pipe, value, latents) for name, value in shown.items()}
    return rows


def _shown(pipe, value: Any, latents: Tensor) -> list[Image.Image]:
    """The pictures in an input: images, what is as `latents` are decoded, and masks (1, 1, h, w) in [0, 1] as grey."""
    if isinstance(value, list):
        return [image for element in value for image in _shown(pipe, element, latents)]
    if isinstance(value, Image.Image):
        return [value]
    if not isinstance(value, Tensor) or value.dim() != 4 or value.shape[1] not in (1, latents.shape[1]):
        return []
    if value.shape[1] == 1:
        return [Image.fromarray((value[0, 0].float() * 255).to(torch.uint8).cpu().numpy())]
    return [pipe.decode(value.to(pipe.device), pipe.call_defaults)]


def _summary(content: Mapping) -> str:
    sizes, left_out = len(content["sizes"]), len(content["left_out"])
    parts = [f"{content['samples']} samples of {sizes} size{'s' * (sizes != 1)}", f"{left_out} rows left out"]
    for name, text in (("enlarged", "enlarged"), ("caption_cut_off", "with a caption that is cut off")):
        parts += [f"{len(content[name])} {text}"] * bool(content[name])
    for name, pairs in content["also_in_validation"].items():
        parts += [f"{len(pairs)} nearly equal to one of validation.datasets.{name}"] * bool(pairs)
    return ", ".join(parts)
