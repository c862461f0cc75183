"""Random choices about a sample: which of its captions, mirrored or not, which part of its image.

Each is a function of (seed, epoch, index), so that any number of processes and a resumed run choose alike.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..order.addresses import SampleAddress, sample_seed
from ..scan import is_empty

CENTRE = (0.5, 0.5)


@dataclass(frozen=True)
class AugmentationChoice:
    """What was chosen for one sample.

    Args:
        caption: Which of its captions; None for the empty one.
        tags: Seed of the order of its tags; None leaves them as they are.
        mirrored: Left and right are exchanged.
        position: Which part of the image is kept, from 0 (left, top) to 1 (right, bottom).
    """

    caption: int | None = 0
    tags: int | None = None
    mirrored: bool = False
    position: tuple[float, float] = CENTRE

    @property
    def variant(self) -> str | None:
        """A name among the finitely many variants of a sample; None if there are too many to name."""
        if self.tags is not None or self.position != CENTRE:
            return None
        caption = "no caption" if self.caption is None else f"caption {self.caption}" if self.caption else ""
        return ", ".join(filter(None, [caption, "mirrored" if self.mirrored else ""]))


@dataclass(frozen=True)
class Augmentation:
    """What is left to chance.

    Args:
        captions: Columns that hold captions, and how often each is chosen, by default {"prompt": 1}; of a list of texts
            each is as likely. An empty one is never chosen where a row has another.
        caption_dropout: Share of samples that are shown without a caption, for classifier-free guidance.
        prefix, suffix: Put around every caption but the empty one; a trigger word, say.
        shuffle_tags: Put the parts between `tag_separator` in random order, all but the first `keep_tags`.
        flip: Share of samples whose images are mirrored.
        random_crop: Keep a random part of what does not fit, instead of the middle.

    Raises:
        ValueError: A share is not in [0, 1], no caption may be chosen, or tags cannot be told apart.
    """

    captions: Mapping[str, float] | None = None
    caption_dropout: float = 0.0
    prefix: str = ""
    suffix: str = ""
    shuffle_tags: bool = False
    keep_tags: int = 0
    tag_separator: str = ","
    flip: float = 0.0
    random_crop: bool = False

    def __post_init__(self):
        if self.captions is None:
            object.__setattr__(self, "captions", {"prompt": 1.0})
        for name in ("caption_dropout", "flip"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a share in [0, 1].")
        if not self.captions or min(self.captions.values()) < 0 or max(self.captions.values()) == 0:
            raise ValueError(f"captions are {dict(self.captions)}; expected columns with weights, one above 0.")
        if not self.tag_separator or self.keep_tags < 0:
            found = f"tag_separator is {self.tag_separator!r} and keep_tags {self.keep_tags}"
            raise ValueError(f'{found}; expected what stands between tags, such as ",", and 0 or more.')

    def texts(self, row: Mapping) -> list[tuple[str, float]]:
        """The captions that may be chosen of a row, each with its weight; the empty one where there is none.

        Raises:
            ValueError: A caption is not text.
        """
        weights = {column: weight for column, weight in self.captions.items() if weight > 0}
        lists = [(_texts(column, row.get(column)), weight) for column, weight in weights.items()]
        return [(text, weight / len(texts)) for texts, weight in lists for text in texts] or [("", 1.0)]

    def choose(self, weights: Sequence[float], seed: int, address: SampleAddress) -> AugmentationChoice:
        """The choice for a sample whose captions have these weights, at its address in a run."""
        if len(weights) == 1 and not any((self.caption_dropout, self.flip, self.shuffle_tags, self.random_crop)):
            return AugmentationChoice()
        chance = random.Random(sample_seed(seed, "augmentation", *address))
        dropped, mirrored, *position = (chance.random() for _ in range(4))  # all, so that options do not move others
        caption = chance.choices(range(len(weights)), weights)[0]
        return AugmentationChoice(
            None if dropped < self.caption_dropout else caption,
            chance.getrandbits(32) if self.shuffle_tags else None,
            mirrored < self.flip,
            tuple(position) if self.random_crop else CENTRE,
        )

    def choices(self, weights: Sequence[float]) -> list[AugmentationChoice]:
        """All that may be drawn, the plain one first.

        Raises:
            ValueError: There is no end of them.
        """
        endless = [name for name in ("shuffle_tags", "random_crop") if getattr(self, name)]
        if endless:
            raise ValueError(f"{endless[0]} makes every pass another one, which cannot be cached: set it to false.")
        captions = [number for number, weight in enumerate(weights) if weight > 0]
        captions += [None] * (self.caption_dropout > 0)
        flips = [flip for flip in (False, True) if (self.flip if flip else 1 - self.flip) > 0]
        drawn = [AugmentationChoice(caption, mirrored=flip) for flip in flips for caption in captions]
        return drawn if AugmentationChoice() in drawn else [AugmentationChoice(), *drawn]

    def prompt(self, row: Mapping, choice: AugmentationChoice) -> str:
        """The chosen caption."""
        if choice.caption is None:
            return ""
        text = self.texts(row)[choice.caption][0]
        if choice.tags is not None:
            text = self._shuffled(text, random.Random(choice.tags))
        return f"{self.prefix}{text}{self.suffix}" if text else ""

    def _shuffled(self, text: str, chance: random.Random) -> str:
        tags = [tag.strip() for tag in text.split(self.tag_separator) if tag.strip()]
        kept, others = tags[: self.keep_tags], tags[self.keep_tags :]
        chance.shuffle(others)
        joint = self.tag_separator if self.tag_separator.isspace() else f"{self.tag_separator.strip()} "
        return joint.join(kept + others)


def _texts(column: str, cell: Any) -> list[str]:
    """What a cell holds that is not empty."""
    texts = [text for text in (cell if isinstance(cell, list) else [cell]) if not is_empty(text)]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{column} is {cell!r}; expected text, or a list of texts")
    return texts
