"""Videos as they are stored: the times of their frames without decoding, and some of their frames, upright, in RGB."""

import struct
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from fractions import Fraction
from functools import cached_property
from typing import BinaryIO

import numpy as np
from PIL import Image

from ..operators.picture_files import as_shown, open_image, read_image, upright_size
from ..sources.storage import EmbeddedFile
from .durations import durations
from .times import FrameTimes


class StoredVideo:
    """A video that is open.

    Attributes:
        size: (width, height) in pixels of its upright frames.
        stored: Number of its frames.
        times: Their times; None if none are stored, as of files of single frames.
    """

    size: tuple[int, int]
    stored: int
    times: FrameTimes | None = None

    def count(self, rate: float | None) -> int:
        """Number of frames at `rate` per second; None takes frames as they are stored."""
        return self.stored if rate is None or self.times is None else self.times.ticks(rate)

    def frames(self, rate: float | None, first: int, count: int) -> Iterator[tuple[Image.Image, int]]:
        """The images of frames `first` to `first + count - 1` at `rate`, and for how many frames each is shown.

        Raises:
            ValueError: They cannot be decoded.
        """
        numbers = list(range(first, first + count))
        if rate is not None and self.times is not None:
            numbers = self.times.at(rate, first, count)
        shown = Counter(numbers)
        return zip(self.read([*shown]), shown.values(), strict=True)

    def read(self, numbers: Sequence[int]) -> Iterator[Image.Image]:
        """The stored frames of these ascending numbers."""
        raise NotImplementedError


class FrameFiles(StoredVideo):
    """A video of files, one a frame; only the first is opened for its size.

    Args:
        files: Names of the files.
        located: Returns the path of a name.

    Raises:
        ValueError: There are none.
    """

    def __init__(self, files: Sequence[str | EmbeddedFile], located: Callable):
        if not files:
            raise ValueError("has no frames; expected files of images")
        self.files, self.located, self.stored = files, located, len(files)

    @cached_property
    def size(self) -> tuple[int, int]:
        with open_image(self.located(self.files[0])) as image:
            return upright_size(image)

    def read(self, numbers: Sequence[int]) -> Iterator[Image.Image]:
        for number in numbers:
            image = read_image(self.located(self.files[number]))
            if image.size != self.size:
                found, expected = (f"{width} x {height}" for width, height in (image.size, self.size))
                raise ValueError(
                    f"frame {number + 1}, {self.files[number]}, has {found} pixels and the first {expected}; save all "
                    "at one size"
                )
            yield image


class Animation(StoredVideo):
    """An animated GIF, WebP, PNG or AVIF; a still image is a video of one frame.

    Args:
        image: The open image.
        file: Opens its file.
    """

    def __init__(self, image: Image.Image, file: Callable[[], BinaryIO]):
        self.file = file
        self.image, self.size, self.stored = image, upright_size(image), getattr(image, "n_frames", 1)

    @cached_property
    def times(self) -> FrameTimes | None:
        if self.stored == 1:
            return None
        found = [round(duration) or 100 for duration in self._durations()]  # browsers take 100 ms for none
        ends = np.cumsum(found, dtype=np.int64)
        return FrameTimes(ends - found, int(ends[-1]), Fraction(1, 1000))

    def _durations(self) -> Sequence[float]:
        """The duration of each frame in milliseconds."""
        with self.file() as file, suppress(struct.error, IndexError):
            if len(found := durations(file, self.image.format)) == self.stored:
                return found
        return [self._decoded_duration(number) for number in range(self.stored)]

    def _decoded_duration(self, number: int) -> float:
        self.image.seek(number)
        self.image.load()
        return self.image.info.get("duration") or 0

    def read(self, numbers: Sequence[int]) -> Iterator[Image.Image]:
        for number in numbers:
            self.image.seek(number)
            yield as_shown(self.image, "RGB")
