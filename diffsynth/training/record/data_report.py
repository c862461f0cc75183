"""The data report of a run, written before its first step: what it trains on, with counts, warnings and samples."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ...core.data import MixedOrder, Row, TrainingData, is_video_column
from ...core.data.order.buckets import Size, is_upscaled, shown
from ...core.files import going_on_without, write_text
from ...core.json_text import to_json
from ...core.pictures import GRID_COLUMNS, beside, row, save_png, stack
from ...core.ranges import NonNegativeInt, check_fields
from ...diffusion.prompts.limits import length_key

if TYPE_CHECKING:
    from ...diffusion.base_pipeline import BasePipeline
    from ...diffusion.pipeline.media import Media

logger = logging.getLogger(__name__)

# Guesses.
THREADS = 8
THUMBNAIL = (16, 16)
CELL = (256, 256)  # largest width and height of an image in the grid, in pixels
STRIP_CELL, STRIP_ASPECT = (768, 256), 3  # of a film strip; an image that is wider than this times its height is one
NEAR = 3.0  # mean difference of two thumbnails' values in [0, 255]; saving an image again changes about as much


@dataclass
class DataReport:
    """Writes counts, warnings and a grid of samples of a run's data: `data_report.json` and `data_report.png`.

    Args:
        path: The run's folder.
        rows: Number of samples to check, evenly spread over all: whether their image is enlarged, whether their caption
            is cut off, and whether a validation sample is nearly equal. 0 checks none.
        pictures: Number of the first samples to show as they will be trained on; those from a cache are decoded.
    """

    path: str | Path
    rows: NonNegativeInt = 2000
    pictures: NonNegativeInt = 32

    def __post_init__(self):
        check_fields(self, "data_report.")

    def write(
        self,
        pipe: "BasePipeline",
        dataset: TrainingData,
        order: MixedOrder,
        validation: Mapping[str, TrainingData],
        seed: int,
        samples: int | None = None,
    ) -> dict:
        """Write the report and return its content.

        Args:
            pipe: The run's pipeline.
            dataset: The training data.
            order: The order in which training reads it.
            validation: The data sets that the run is validated on, by name.
            seed: The run's seed, which determines augmentations.
            samples: Number of the first samples that are trained on; None if all are.
        """
        content = {**self.counts(dataset), "trained_on": samples, **self.check(pipe, dataset, validation)}
        with going_on_without(f"{self.path}/data_report.json"):
            write_text(Path(self.path) / "data_report.json", to_json(content, indent=1, ensure_ascii=False))
        if self.pictures:
            sheet = self.sheet(pipe, dataset, order, seed)
            with going_on_without(f"{self.path}/data_report.png"):
                save_png(sheet, Path(self.path) / "data_report.png")
        logger.info("Data: %s; %s/data_report.json and data_report.png have more.", _summary(content), self.path)
        return content

    def counts(self, dataset: TrainingData) -> dict:
        """Count the samples by size, and list the skipped rows with the reason."""
        sizes = {"own" if size is None else _named(size): len(p.rows) for size, p in dataset.rows_by_size().items()}
        skipped = [asdict(row) for row in dataset.skipped]
        return {"samples": dataset.size, "an_epoch": len(dataset), "sizes": sizes, "skipped": skipped}

    def check(self, pipe: "BasePipeline", dataset: TrainingData, validation: Mapping[str, TrainingData]) -> dict:
        """List samples that are enlarged, have their caption cut off, or are in a validation data set as well.

        Of a validation data set that has the same rows, only the name is listed. Samples of a cache are not checked:
        their images are not there.
        """
        checks = _check_samples(pipe, dataset, spread(dataset.size, self.rows))
        mine = dataset.fingerprint()
        same_rows = [name for name, other in validation.items() if mine and other.fingerprint() == mine]
        pairs = {n: self._pairs(checks, pipe, other) for n, other in validation.items() if n not in same_rows}
        return {
            "checked": len(checks),
            "enlarged": [check.number for check in checks if check.is_enlarged],
            "caption_cut_off": [check.number for check in checks if check.is_cut_off],
            "caption_tokens_read": next(iter(pipe.prompt_limits().values()), None),
            "caption_tokens_key": length_key(pipe),
            "also_in_validation": pairs,
            "validation_of_the_same_rows": same_rows,
        }

    def _pairs(self, checks: Sequence["SampleCheck"], pipe: "BasePipeline", other: TrainingData) -> list[list[int]]:
        """Return the numbers of training samples and of samples of `other` that are nearly equal."""
        others = _check_samples(pipe, other, spread(other.size, self.rows))
        near = near_pairs([check.thumbnail for check in checks], [check.thumbnail for check in others])
        return [[checks[mine].number, others[theirs].number] for mine, theirs in near]

    def sheet(self, pipe: "BasePipeline", dataset: TrainingData, order: MixedOrder, seed: int) -> Image.Image:
        """Return a grid of the first samples with captions; under each are its other images, such as masks."""
        addresses = [order.sample(position) for position in range(min(self.pictures, dataset.size))]
        samples = [dataset.sample(address, seed)[0] for address in addresses]
        pictures = zip(_pictures(pipe, samples), samples, strict=True)
        cells = [_cell(images, sample.get("prompt", "")) for images, sample in pictures]
        columns = max(1, min(GRID_COLUMNS, GRID_COLUMNS * CELL[0] // max(cell.width for cell in cells)))
        return stack([beside(cells[start : start + columns]) for start in range(0, len(cells), columns)])


def _named(size: Size) -> str:
    """Return the name of a bucket: "832x480" of images, "832x480, 81 frames" of videos."""
    return shown(size).replace(" x ", "x").replace(" pixels", "")


@dataclass(frozen=True)
class SampleCheck:
    """The check of one sample.

    Args:
        number: Number of the sample in its data set.
        thumbnail: Its thumbnail, reduced, (16, 16, 3) in [0, 255].
        is_enlarged: Whether its image or video is smaller than the size at which it is trained on.
        is_cut_off: Whether its caption has more tokens than the text encoder reads.
    """

    number: int
    thumbnail: np.ndarray
    is_enlarged: bool
    is_cut_off: bool


def spread(size: int, count: int) -> list[int]:
    """Return at most `count` integers, evenly spread over range(size)."""
    return [number * size // min(count, size) for number in range(min(count, size))]


def near_pairs(mine: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> list[tuple[int, int]]:
    """Return the pairs of indices of thumbnails, (H, W, 3) each, that are nearly equal."""
    if not mine or not theirs:
        return []
    table = np.stack(mine).astype(np.float32)
    distances = ((index, np.abs(table - other).mean((1, 2, 3))) for index, other in enumerate(theirs))
    return [(int(number), index) for index, distance in distances for number in np.flatnonzero(distance < NEAR)]


def _check_samples(pipe: "BasePipeline", dataset: TrainingData, numbers: Iterable[int]) -> list[SampleCheck]:
    """Check samples in several threads; those that cannot be checked are skipped."""
    with ThreadPoolExecutor(THREADS) as pool:
        checks = list(pool.map(partial(_check_sample, pipe, dataset), numbers))
    return [check for check in checks if check is not None]


def _check_sample(pipe: "BasePipeline", dataset: TrainingData, number: int) -> SampleCheck | None:
    """Return None if a sample is cached or cannot be decoded; in the latter case, training will report it."""
    try:
        sample = dataset.preview(number)
        original = dataset.original_size(number)
    except ValueError:
        return None
    media = pipe.media
    if sample.made or media.column not in sample:
        return None
    value = sample[media.column]
    thumbnail = np.asarray(media.thumbnail(value).convert("RGB").resize(THUMBNAIL, Image.Resampling.BOX))
    enlarged = original is not None and is_upscaled(*original[:2], media.size(value)[:2])
    return SampleCheck(number, thumbnail, enlarged, pipe.cuts_off(sample["prompt"]))


def _cell(images: Sequence[Image.Image], prompt: str) -> Image.Image:
    """Return the first image above the prompt, with the other images below; large images are reduced."""
    images = images or [Image.new("RGB", (128, 128), "lightgray")]
    images = [_reduced(image) for image in images]
    first = row(images[:1], [prompt])
    others = [ImageOps.contain(image.convert("RGB"), (first.width, first.height)) for image in images[1:]]
    return stack([first, *others])


def _reduced(image: Image.Image) -> Image.Image:
    """Return an image, or a film strip, that fits into its cell."""
    cell = STRIP_CELL if image.width > STRIP_ASPECT * image.height else CELL
    return ImageOps.contain(image, cell) if image.width > cell[0] or image.height > cell[1] else image


@torch.no_grad()
def _pictures(pipe: "BasePipeline", samples: Sequence[Row]) -> list[list[Image.Image]]:
    """Return the pictures of each sample: its thumbnail first, then the images of its other columns, such as masks.

    Samples of a cache are decoded; without a decoder they have no pictures.
    """
    if not any(sample.made for sample in samples):
        return [_images(pipe.media, sample) for sample in samples]
    if any(getattr(pipe, name) is None for name in pipe.decoding_models):
        return [[] for _ in samples]
    with pipe.loaded(pipe.decoding_models):
        return [_decoded(pipe, sample.made["shared"]) for sample in samples]


def _images(media: "Media", sample: Row) -> list[Image.Image]:
    """Return the thumbnail of a sample that is not cached, then those of its other videos, and its other images."""
    images = [media.thumbnail(sample[media.column])] if media.column in sample else []
    strips = [name for name, value in sample.items() if is_video_column(name) and isinstance(value, list)]
    images += [media.thumbnail(sample[name]) for name in strips if name != media.column]
    values = [value for name, value in sample.items() if name not in (media.column, *strips)]
    elements = [element for value in values for element in (value if isinstance(value, list) else [value])]
    return images + [element for element in elements if isinstance(element, Image.Image)]


def _decoded(pipe: "BasePipeline", inputs: Mapping) -> list[Image.Image]:
    """Return the pictures of the pipeline's `inputs` that a cache holds for a sample."""
    latents = inputs.get("input_latents")
    if latents is None:
        return []
    shown = {"input_latents": latents, **inputs}  # what is trained on comes first, which makes it the largest
    return [image for value in shown.values() for image in _shown(pipe, value, latents)]


def _shown(pipe: "BasePipeline", value: Any, latents: Tensor) -> list[Image.Image]:
    """Return the pictures in an input of the pipeline.

    These are images themselves, masks (1, 1, h, w) in [0, 1] as grey images, and the thumbnails of decoded tensors that
    have as many dimensions and channels as `latents` (1, C, …).
    """
    if isinstance(value, list):
        return [image for element in value for image in _shown(pipe, element, latents)]
    if isinstance(value, Image.Image):
        return [value]
    if not isinstance(value, Tensor):
        return []
    if value.dim() == 4 and value.shape[1] == 1:
        return [Image.fromarray((value[0, 0].float() * 255).to(torch.uint8).cpu().numpy())]
    if value.dim() != latents.dim() or value.shape[1] != latents.shape[1]:
        return []
    return [pipe.media.thumbnail(pipe.decode(value.to(pipe.device), pipe.call_defaults))]


def _summary(content: Mapping) -> str:
    """Return the report's counts in one line of text."""
    sizes, skipped = len(content["sizes"]), len(content["skipped"])
    of_sizes = "each of its own size" if "own" in content["sizes"] else f"of {sizes} size{'s' * (sizes != 1)}"
    parts = [f"{content['samples']} samples {of_sizes}", f"{skipped} rows skipped"]
    parts += [f"trained on the first {content['trained_on']}"] * (content["trained_on"] is not None)
    key = f" ({content['caption_tokens_key']})" if content["caption_tokens_key"] else ""
    cut_off = f"with a caption that is cut off after {content['caption_tokens_read']} tokens{key}"
    for name, text in (("enlarged", "enlarged"), ("caption_cut_off", cut_off)):
        parts += [f"{len(content[name])} {text}"] * bool(content[name])
    for name, pairs in content["also_in_validation"].items():
        parts += [f"{len(pairs)} nearly equal to one of validation.datasets.{name}"] * bool(pairs)
    parts += [f"validation.datasets.{name} has the same rows" for name in content["validation_of_the_same_rows"]]
    return ", ".join(parts)
