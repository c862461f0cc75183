"""Augmentation: random choices of a sample's caption, of mirroring, and of the crop of its image.

Each choice is a function of (seed, epoch, index), so that it does not depend on the number of processes or on a resume.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...ranges import NonNegativeFloat, NonNegativeInt, Probability, check_fields
from ..order.addresses import SampleAddress, sample_seed
from ..sources.table import is_empty

CENTRE = (0.5, 0.5)


@dataclass(frozen=True)
class AugmentationChoice:
    """The augmentation of one sample.

    Args:
        caption: Number of the caption; None selects the empty caption.
        tags: Seed that shuffles the tags; None keeps their order.
        mirrored: Whether left and right are exchanged.
        position: Position (x, y) of the crop, from 0 (left, top) to 1 (right, bottom).
        conditions: Seed of random conditions; None takes their random numbers from the image.
        start: Position of a clip in its video, from 0 (its beginning) to 1; None takes the fixed one.
    """

    caption: int | None = 0
    tags: int | None = None
    mirrored: bool = False
    position: tuple[float, float] = CENTRE
    conditions: int | None = None
    start: float | None = None

    @property
    def variant(self) -> str | None:
        """Name of the variant; None with a random order of tags, crop, condition or start, which can't be listed."""
        if self.position != CENTRE or (self.tags, self.conditions, self.start) != (None, None, None):
            return None
        parts = ["mirrored"] if self.mirrored else []
        if self.caption is None:
            parts = ["no caption", *parts]
        elif self.caption > 0:
            parts = [f"caption {self.caption}", *parts]
        return ", ".join(parts)


@dataclass(frozen=True)
class Augmentation:
    """Random choices about each sample.

    Args:
        captions: Weights of the columns that hold captions; None is {"prompt": 1}. A cell with a list of texts divides
            its weight equally among them. An empty caption is chosen only where a row has no other.
        caption_dropout: Probability of an empty caption, for classifier-free guidance.
        prefix, suffix: Text before and after every caption that is not empty, such as a trigger word.
        shuffle_tags: Shuffle the parts of a caption between `tag_separator`, except the first `keep_tags`.
        keep_tags: Number of tags that stay in front.
        tag_separator: Text between two tags.
        flip: Probability that an image is mirrored.
        random_crop: Crop at a random position instead of the centre.

    Raises:
        ValueError: A probability is not in [0, 1], all weights are 0, or `tag_separator` is empty.
    """

    captions: Mapping[str, NonNegativeFloat] | None = None
    caption_dropout: Probability = 0.0
    prefix: str = ""
    suffix: str = ""
    shuffle_tags: bool = False
    keep_tags: NonNegativeInt = 0
    tag_separator: str = ","
    flip: Probability = 0.0
    random_crop: bool = False

    def __post_init__(self):
        if self.captions is None:
            object.__setattr__(self, "captions", {"prompt": 1.0})
        check_fields(self)
        if not self.captions or min(self.captions.values()) < 0 or max(self.captions.values()) == 0:
            raise ValueError(
                f"captions are {dict(self.captions)}; expected columns with weights, at least one above 0."
            )
        if not self.tag_separator:
            raise ValueError('tag_separator is empty; expected the text between two tags, such as ",".')

    def texts(self, row: Mapping) -> list[tuple[str, float]]:
        """The captions of a row that may be chosen, with their weights; the empty caption if there is none.

        Raises:
            ValueError: A caption is not text, or has half of a character.
        """
        weights = {column: weight for column, weight in self.captions.items() if weight > 0}
        captions = []
        for column, weight in weights.items():
            texts = _texts(column, row.get(column))
            captions += [(text, weight / len(texts)) for text in texts]
        return captions or [("", 1.0)]

    def choose(self, weights: Sequence[float], seed: int, address: SampleAddress) -> AugmentationChoice:
        """The choice for the sample at an address of a run, whose captions have these weights."""
        if len(weights) == 1 and not any((self.caption_dropout, self.flip, self.shuffle_tags, self.random_crop)):
            return AugmentationChoice()
        rng = random.Random(sample_seed(seed, "augmentation", *address))
        # All random numbers are generated, so that an option does not change the choices of the others.
        dropout, flip, *position = (rng.random() for _ in range(4))
        caption = rng.choices(range(len(weights)), weights)[0]
        return AugmentationChoice(
            None if dropout < self.caption_dropout else caption,
            rng.getrandbits(32) if self.shuffle_tags else None,
            flip < self.flip,
            tuple(position) if self.random_crop else CENTRE,
        )

    def choices(self, weights: Sequence[float]) -> list[AugmentationChoice]:
        """All choices that `choose` may return for such a sample; the one without augmentation comes first.

        Raises:
            ValueError: They can't be listed, because tags are shuffled or crops are random.
        """
        unlisted = [name for name in ("shuffle_tags", "random_crop") if getattr(self, name)]
        if unlisted:
            raise ValueError(
                f"dataset.augmentation.{unlisted[0]}=true makes new variants each time, which cannot be cached; "
                "set it to false."
            )
        captions = [number for number, weight in enumerate(weights) if weight > 0]
        captions += [None] * (self.caption_dropout > 0)
        flips = [flip for flip in (False, True) if (self.flip if flip else 1 - self.flip) > 0]
        choices = [AugmentationChoice(caption, mirrored=flip) for flip in flips for caption in captions]
        return choices if AugmentationChoice() in choices else [AugmentationChoice(), *choices]

    def prompt(self, row: Mapping, choice: AugmentationChoice) -> str:
        """The chosen caption of a row, its tags shuffled, with prefix and suffix."""
        if choice.caption is None:
            return ""
        text = self.texts(row)[choice.caption][0]
        if choice.tags is not None:
            text = self._shuffled(text, random.Random(choice.tags))
        return f"{self.prefix}{text}{self.suffix}" if text else ""

    def _shuffled(self, text: str, rng: random.Random) -> str:
        tags = [tag.strip() for tag in text.split(self.tag_separator) if tag.strip()]
        kept, others = tags[: self.keep_tags], tags[self.keep_tags :]
        rng.shuffle(others)
        separator = self.tag_separator if self.tag_separator.isspace() else f"{self.tag_separator.strip()} "
        return separator.join(kept + others)


def _texts(column: str, cell: Any) -> list[str]:
    """The texts in a cell that are not empty."""
    texts = [text for text in (cell if isinstance(cell, list) else [cell]) if not is_empty(text)]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{column} is {cell!r:.99}; expected text, or a list of texts")
    if halves := [text for text in texts if not _is_unicode(text)]:
        raise ValueError(f"{column} is {halves[0]!r:.99}, with half of a character (such as \\ud83d); write it whole")
    return texts


def _is_unicode(text: str) -> bool:
    """Whether a text has no lone surrogate, which JSON can spell and tokenizers refuse."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
