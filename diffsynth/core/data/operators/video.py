"""Operators that load videos and animations as lists of frames, of a length that a video autoencoder accepts."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from itertools import chain, islice, pairwise
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from PIL import Image, ImageSequence

from ..sources.storage import EmbeddedFile, open_file
from ..sources.urls import is_url, read_url
from .base import Operator, check, unread
from .picture_files import as_shown, describe_file, describe_image, not_found, open_image, upright_size
from .unread import Unread
from .video_files import open_container, pyav

if TYPE_CHECKING:
    import av

# Seconds. Matroska stores times in whole milliseconds, so that a frame may start a little after its tick.
ROUNDING = Fraction(1, 1000)


class Frame(NamedTuple):
    """A frame, and the times in seconds at which it appears and disappears."""

    start: Fraction
    end: Fraction
    image: Image.Image


@dataclass(frozen=True)
class LoadFrames(Operator):
    """Loads the first n frames of a file.

    Args:
        num_frames: Upper limit of n. n is the largest available number of frames with
            n % time_division_factor == time_division_remainder.
        time_division_factor, time_division_remainder: See `num_frames`; the video autoencoder sets them.
        frame_processor: Applied to each frame, such as `ImageCropAndResize`.
        frame_rate: Frames per second to resample to; None takes the frames as they are stored.

    Raises:
        ValueError: The file has too few frames for any n, or cannot be read.
    """

    num_frames: int = 81
    time_division_factor: int = 4
    time_division_remainder: int = 1
    frame_processor: Callable | None = None
    frame_rate: float | None = None

    def __post_init__(self):
        self.divisible(self.num_frames)
        if self.frame_rate is not None and self.frame_rate <= 0:
            raise ValueError(
                f"frame_rate={self.frame_rate}, expected frames per second, or None to take frames as they are stored"
            )

    def __call__(self, data: str | EmbeddedFile) -> list[Image.Image]:
        with self.open(data) as file:
            frames = self.frames(file)
            if self.frame_rate is not None:
                frames = resample(frames, self.frame_rate)
            images = [self.process(frame.image) for frame in islice(frames, self.divisible(self.num_frames))]
        return images[: self.divisible(len(images))]

    def check(self, data: str | EmbeddedFile) -> list[tuple[int, int]] | None:
        """A list with one (width, height), since a header does not tell the number of frames; None for a URL."""
        if is_url(data):
            return None
        with self.open(data) as file:
            size = self.size(file)
        known = size if self.frame_processor is None else check(self.frame_processor, size)
        return None if known is None else [known]

    def unread(self, data: str | EmbeddedFile) -> Unread:
        """The list of frames as one `Unread`, whose size is that of each frame."""
        with self.open(data) as file:
            frame, colours = Unread(self.size(file), tuple, tuple), self.colours(file)  # only the frame's size is used
        if self.frame_processor is not None:
            frame = unread(self.frame_processor, frame)
        selection = [self.num_frames, self.time_division_factor, self.time_division_remainder, self.frame_rate]
        description = [type(self).__name__, selection, frame.describe(), *colours]
        return Unread(frame.size, partial(self, data), partial(describe_file, data, description))

    def process(self, image: Image.Image) -> Any:
        """A frame after `frame_processor`."""
        return image if self.frame_processor is None else self.frame_processor(image)

    def divisible(self, count: int) -> int:
        """The largest number of frames up to `count` that the autoencoder accepts."""
        factor, remainder = self.time_division_factor, self.time_division_remainder
        number = count - (count - remainder) % factor
        if number < 1:
            raise ValueError(
                f"{count} frames are too few: their number divided by {factor} must leave {remainder}, "
                f"so use {number + factor} or more"
            )
        return number

    def open(self, data: str | EmbeddedFile) -> AbstractContextManager:
        """A context manager of the open file. Opening reads only the header."""
        raise NotImplementedError

    def size(self, file: Any) -> tuple[int, int]:
        """(width, height) in pixels of an open file, as its header tells."""
        raise NotImplementedError

    def colours(self, file: Any) -> list[str]:
        """What the colours of an open file are converted to, if they are converted."""
        return []

    def frames(self, file: Any) -> Iterator[Frame]:
        """The frames of an open file, in order."""
        raise NotImplementedError


class LoadVideo(LoadFrames):
    """Loads the first frames of a video, upright, as RGB; see `LoadFrames`.

    Raises:
        ImportError: PyAV is not installed.
    """

    def __post_init__(self):
        super().__post_init__()
        pyav()

    @contextmanager
    def open(self, data: str | EmbeddedFile) -> Iterator:
        with open_bytes(data) as file, open_container(file) as container:
            if not any(stream.width for stream in container.streams.video[:1]):
                raise ValueError("holds no video that FFmpeg can read")
            yield container

    def size(self, file: "av.container.InputContainer") -> tuple[int, int]:
        stream = file.streams.video[0]
        return stream.width, stream.height

    def frames(self, file: "av.container.InputContainer") -> Iterator[Frame]:
        stream = file.streams.video[0]
        for number, frame in enumerate(file.decode(stream)):
            # AVI stores decoding times and raw streams store no times: neither has presentation times.
            untimed = frame.pts is None or file.format.name == "avi"
            start = number / stream.guessed_rate if untimed else frame.pts * frame.time_base
            image = Image.fromarray(frame.to_ndarray(format="rgb24")).rotate(frame.rotation, expand=True)
            yield Frame(start, start + frame.duration * frame.time_base, image)


class LoadGIF(LoadFrames):
    """Loads the first frames of an animated GIF, WebP, PNG or AVIF, as RGB; see `LoadFrames`, `LoadImage` for alpha.

    A still image has one frame.
    """

    def open(self, data: str | EmbeddedFile) -> Image.Image:
        return open_image(read_url(data) if is_url(data) else data)

    def size(self, file: Image.Image) -> tuple[int, int]:
        return upright_size(file)

    def colours(self, file: Image.Image) -> list[str]:
        return describe_image(file, "RGB")[2:]

    def frames(self, file: Image.Image) -> Iterator[Frame]:
        start = Fraction(0)
        for frame in ImageSequence.Iterator(file):
            image = as_shown(frame, "RGB")
            # The duration is known once a frame is decoded. Browsers show a frame without a duration for 100 ms.
            milliseconds = frame.info.get("duration") or (100 if getattr(file, "is_animated", False) else 0)
            end = start + Fraction(milliseconds) / 1000
            yield Frame(start, end, image)
            start = end


def open_bytes(data: str | EmbeddedFile) -> BinaryIO:
    """Open a path, URL or embedded file for reading."""
    try:
        return read_url(data) if is_url(data) else open_file(data)
    except FileNotFoundError:
        raise not_found(data) from None


def resample(frames: Iterator[Frame], rate: float) -> Iterator[Frame]:
    """The frame that is on the screen at each of `rate` ticks per second, counted from the first frame."""
    step, tick = 1 / Fraction(rate), None
    for frame, following in pairwise(chain(frames, [None])):
        if tick is None:
            yield frame
            tick = frame.start + step
        until = frame.end if following is None else following.start
        while tick + ROUNDING < until:
            yield frame
            tick += step
