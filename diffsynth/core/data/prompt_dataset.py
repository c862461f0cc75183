"""A data set of prompts and seeds without images, from which a teacher samples images."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image

from ..ranges import Repeat, Seed, Side, Workers
from .operators.augmentation import Augmentation
from .operators.base import Operator
from .operators.unread import Unread, identity
from .sources.metadata import open_text, read_metadata
from .sources.table import Rows, Table, json_batches, make_table
from .unified_dataset import UnifiedDataset


def prompt_dataset(
    path: str,
    height: Side,
    width: Side,
    seeds: Repeat | Sequence[Seed] = 1,
    first_seed: Seed = 0,
    encoding: str = "utf-8",
    num_workers: Workers | None = None,
    augmentation: Augmentation | None = None,
) -> UnifiedDataset:
    """Make a data set of prompts and seeds; its images are empty, with the size at which images are sampled.

    Args:
        path: A table with a column `prompt`, and any others, or a text file with one prompt per line.
        height, width: Size in pixels of the sampled images.
        seeds: The seeds of each prompt, which become the column `seed`: a list that all prompts share, or a number of
            seeds. Seeds by number are consecutive over the whole data set, so that no two rows share their noise.
        first_seed: The first of the consecutive seeds.
        encoding: Text encoding of the file.
        num_workers: See `TrainingData`.
        augmentation: Random choices about captions.

    Raises:
        ValueError: There are no prompts or no seeds, or the augmentation would change images.
    """
    if (seeds if isinstance(seeds, int) else len(seeds)) < 1:
        raise ValueError(f"dataset.seeds is {seeds}; expected at least one seed per prompt.")
    if augmentation and (augmentation.flip or augmentation.random_crop):
        raise ValueError(
            "dataset.augmentation.flip and random_crop change images, and prompts have none; set flip=0 and "
            "random_crop=false."
        )
    seeds = (seeds, first_seed) if isinstance(seeds, int) else list(seeds)
    read = partial(_read, path, encoding, seeds, (width, height))
    options = {"main_data_operator": Canvas(), "augmentation": augmentation}
    dataset = UnifiedDataset(str(Path(path).parent), read, **options)
    dataset.num_workers, dataset.metadata_path, dataset.has_images = num_workers, path, False
    return dataset


def _read(path: str, encoding: str, seeds: tuple[int, int] | list[int], size: tuple[int, int], folder: str) -> Rows:
    is_text = Path(path).suffix.lower() == ".txt"
    prompts = read_lines(path, encoding) if is_text else read_metadata(path, encoding)
    if not prompts:
        raise ValueError(f"prompts {path}: there are none; write one per line, or in a column prompt")
    return SeededPrompts(prompts, seeds, size)


def read_lines(path: str, encoding: str = "utf-8") -> Table:
    """A table with the lines of a text file, except blank ones, as the column `prompt`.

    Raises:
        ValueError: The file does not exist, or is not in that encoding.
    """
    try:
        with open_text(path, encoding) as file:
            lines = [line.strip() for line in file]
    except FileNotFoundError:
        raise ValueError(f"prompts {path}: not found; set dataset.path") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"prompts {path}: {error}; save it as UTF-8, or set dataset.encoding=gbk") from error
    texts = (json.dumps({"prompt": line}) for line in lines if line)
    return make_table(path, json_batches(texts), 0)


@dataclass(frozen=True)
class SeededPrompts(Rows):
    """The rows of a table, repeated for each seed, with the size (width, height) of an empty image in `image`.

    Args:
        prompts: The rows.
        seeds: A list that all rows share, or a tuple: number of seeds per row, first seed of all.
        size: (width, height) in pixels.
    """

    prompts: Rows
    seeds: tuple[int, int] | list[int]
    size: tuple[int, int]

    @property
    def per_prompt(self) -> int:
        """Number of seeds per prompt."""
        return self.seeds[0] if isinstance(self.seeds, tuple) else len(self.seeds)

    def __len__(self) -> int:
        return len(self.prompts) * self.per_prompt

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        number, repetition = divmod(index, self.per_prompt)
        seed = self.seeds[1] + index if isinstance(self.seeds, tuple) else self.seeds[repetition]
        return {**self.prompts[number], "image": list(self.size), "seed": seed}

    def digest(self) -> str:
        return identity([self.prompts.digest(), self.seeds, self.size])[:16]


class Canvas(Operator):
    """Makes an empty image of a size (width, height)."""

    def __call__(self, data: Sequence[int]) -> Image.Image:
        return Image.new("RGB", tuple(data))

    def check(self, data: Sequence[int]) -> tuple[int, int]:
        return tuple(data)

    def unread(self, data: Sequence[int]) -> Unread:
        return Unread(tuple(data), partial(self, data), partial(list, ["canvas", *data]))
