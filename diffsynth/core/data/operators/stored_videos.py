"""Videos as they are stored: the times of their frames without decoding, and some of their frames, upright, in RGB.

A video is a file that FFmpeg reads, an animation that Pillow reads, or a list of files, one a frame.
"""

import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import chain
from pathlib import PurePath
from typing import TYPE_CHECKING, BinaryIO
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from ..sources.picture_formats import picture_suffixes
from ..sources.storage import EmbeddedFile, is_remote, list_files
from ..sources.urls import is_url, read_url
from .picture_files import as_shown, open_image, read_image, upright_size
from .video import ROUNDING, open_bytes
from .video_files import open_container, pyav

if TYPE_CHECKING:
    import av

# Seconds to go back from a frame for the key frame before it, until one is found; 10 s is the longest usual distance.
STEPS_BACK = (0, 1, 10)


@dataclass(frozen=True)
class FrameTimes:
    """The times at which frames appear, as multiples of `unit` seconds.

    Args:
        starts: Time of each frame (N,), int64, ascending.
        end: The time at which the last frame disappears.
    """

    starts: np.ndarray
    end: int
    unit: Fraction

    def ticks(self, rate: float) -> int:
        """Number of frames at `rate` per second: the first, and those of later ticks before `end`."""
        length = (self.end - int(self.starts[0])) * self.unit - ROUNDING
        return max(1, math.ceil(length * Fraction(rate)))

    def at(self, rate: float, first: int, count: int) -> list[int]:
        """Numbers of the stored frames that are on the screen at ticks `first` to `first + count - 1`."""
        ticks = [(Fraction(tick) / Fraction(rate) + ROUNDING) / self.unit for tick in range(first, first + count)]
        passed = [int(self.starts[0]) + math.floor(tick) for tick in ticks]
        numbers = np.searchsorted(self.starts, passed, side="right") - 1
        return [0 if tick == 0 else int(number) for tick, number in enumerate(numbers, first)]


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

    def frames(self, rate: float | None, first: int, count: int) -> Iterator[tuple[int, int, Image.Image]]:
        """Frames `first` to `first + count - 1` at `rate`: number, how often it is shown in a row, and image.

        Raises:
            ValueError: They cannot be decoded.
        """
        numbers = list(range(first, first + count))
        if rate is not None and self.times is not None:
            numbers = self.times.at(rate, first, count)
        distinct = list(dict.fromkeys(numbers))
        for number, image in zip(distinct, self.read(distinct), strict=True):
            yield number, numbers.count(number), image

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
    """An animated GIF, WebP, PNG or AVIF; a still image is a video of one frame."""

    def __init__(self, image: Image.Image):
        self.image, self.size, self.stored = image, upright_size(image), getattr(image, "n_frames", 1)

    @cached_property
    def times(self) -> FrameTimes | None:
        if self.stored == 1:
            return None
        durations = []
        for number in range(self.stored):
            self.image.seek(number)
            self.image.load()
            durations.append(round(self.image.info.get("duration") or 100))  # ms; browsers take 100 for none
        ends = np.cumsum(durations, dtype=np.int64)
        return FrameTimes(ends - durations, int(ends[-1]), Fraction(1, 1000))

    def read(self, numbers: Sequence[int]) -> Iterator[Image.Image]:
        for number in numbers:
            self.image.seek(number)
            yield as_shown(self.image, "RGB")


class Container(StoredVideo):
    """A video that FFmpeg reads.

    Args:
        file: The open file; it stays open.

    Raises:
        ValueError: It holds no video, or is cut off.
    """

    def __init__(self, file: BinaryIO):
        self.file, self.is_used = file, False
        self.container = open_container(file)
        streams = self.container.streams
        if not any(stream.width for stream in streams.video[:1]):
            found = ", ".join(sorted({stream.type for stream in streams}))
            if not found:
                raise ValueError("has no complete header: it is cut off; copy or download it again")
            raise ValueError(f"holds no video that FFmpeg can read, but {found}; leave it out")
        # AVI stores decoding times and raw streams store no times: neither has presentation times.
        self.is_timed = self.container.format.name != "avi"

    @property
    def stream(self) -> "av.VideoStream":
        return self.container.streams.video[0]

    @cached_property
    def size(self) -> tuple[int, int]:
        return next(self.read([0])).size  # only a frame tells how it is turned

    @property
    def stored(self) -> int:
        return len(self.times.starts)

    @cached_property
    def times(self) -> FrameTimes:
        return self._indexed() or self._demuxed()

    def _indexed(self) -> FrameTimes | None:
        """The times by the index of an MP4; None if it has none, or frames differ in length."""
        entries = list(getattr(self.stream, "index_entries", ()))  # older versions of PyAV read every packet
        is_complete = len(entries) == self.stream.frames > 1 and "mp4" in self.container.format.name
        if not is_complete or any(entry.is_discard for entry in entries):
            return None
        end, size = max(entry.pos + entry.size for entry in entries), self._bytes()
        if end > size:
            raise ValueError(f"is cut off: it has {size} bytes of {end}; copy or download it again")
        steps = np.unique(np.diff([entry.timestamp for entry in entries]))
        if len(steps) > 1 or steps[0] <= 0:
            return None
        step, start = int(steps[0]), self.stream.start_time or 0
        starts = start + step * np.arange(len(entries), dtype=np.int64)
        return FrameTimes(starts, int(starts[-1]) + step, self.stream.time_base)

    def _bytes(self) -> int:
        """Size of the file; FFmpeg goes on to read where it was."""
        position, size = self.file.tell(), self.file.seek(0, 2)
        self.file.seek(position)
        return size

    def _demuxed(self) -> FrameTimes:
        """The times of all packets, which are read and not decoded."""
        shown = [packet for packet in self._packets() if packet is not None]
        if not shown:
            raise ValueError("holds no frame of its video; it is cut off, or was never finished")
        rate = self.stream.guessed_rate or 1
        if not self.is_timed or None in (start for start, _ in shown):
            self.is_timed = False
            return FrameTimes(np.arange(len(shown), dtype=np.int64), len(shown), 1 / Fraction(rate))
        last, duration = max(shown)
        starts = np.array(sorted(start for start, _ in shown), dtype=np.int64)
        return FrameTimes(starts, last + (duration or round(1 / rate / self.stream.time_base)), self.stream.time_base)

    def _packets(self) -> Iterator[tuple[int | None, int] | None]:
        """(time, duration) of each packet; None for one that is not shown."""
        with decoding_errors():
            for packet in self._unused().demux(self.stream):
                yield (packet.pts, packet.duration or 0) if packet.size and not packet.is_discard else None

    def _unused(self) -> "av.container.InputContainer":
        """The container at its beginning. It is opened again, because not all formats can seek to their beginning."""
        if self.is_used:
            self.container = open_container(self.file)
        self.is_used = True
        return self.container

    def read(self, numbers: Sequence[int]) -> Iterator[Image.Image]:
        times, last, found = self.times.starts[list(numbers)].tolist(), None, 0
        for time, frame in self._decoded_from(times[0]):
            # The decoder may leave a frame out, if it is damaged or never shown. The one before stays on the screen.
            while found < len(times) and time > times[found]:
                yield upright(last or frame)
                found += 1
            if found < len(times) and time == times[found]:
                yield upright(frame)
                found += 1
            if found == len(times):
                return
            last = frame
        raise ValueError(f"is cut off or damaged: frame {numbers[found] + 1} of {self.stored} cannot be decoded")

    def _decoded_from(self, time: int) -> Iterator[tuple[int, "av.VideoFrame"]]:
        """(time, frame) of the frames from the last key frame before `time` on, in order."""
        with decoding_errors():
            if not self.is_timed:
                yield from enumerate(self._unused().decode(self.stream))
                return
            frames = self._frames_before(time)
            yield from ((frame.pts, frame) for frame in frames if frame.pts is not None)

    def _frames_before(self, time: int) -> Iterator["av.VideoFrame"]:
        """The decoded frames, the first of which does not come after `time`."""
        container = self._unused()
        for seconds in STEPS_BACK if time > int(self.times.starts[0]) else ():
            container.seek(time - round(seconds / self.stream.time_base), stream=self.stream)
            frames = container.decode(self.stream)
            first = next(frames, None)
            # Formats seek by decoding time, and a key frame may be decoded before, and shown after, `time`.
            if first is not None and first.pts is not None and first.pts <= time:
                return chain([first], frames)
            container = self._unused()
        return container.decode(self.stream)


def upright(frame: "av.VideoFrame") -> Image.Image:
    """The upright image of a decoded frame, in RGB."""
    image = Image.fromarray(frame.to_ndarray(format="rgb24"))
    return image.rotate(frame.rotation, expand=True) if frame.rotation else image


@contextmanager
def decoding_errors() -> Iterator[None]:
    """Raise errors of FFmpeg as ValueError."""
    av = pyav()
    try:
        yield
    except av.error.FFmpegError as error:
        advice = "it may be cut off: copy or download it again"
        raise ValueError(f"cannot be decoded ({error.strerror}); {advice}") from error


@contextmanager
def open_video(data: str | EmbeddedFile | Sequence[str | EmbeddedFile], located: Callable) -> Iterator[StoredVideo]:
    """Open a video: a file or a URL, a folder of frames, or a list of files of frames.

    Args:
        located: Returns the path of a name.

    Raises:
        ImportError: The video needs PyAV, which is not installed.
        ValueError: It cannot be read; says why.
    """
    if isinstance(data, list | tuple):
        yield FrameFiles(data, located)
        return
    data = located(data)
    if is_folder(data):
        yield FrameFiles(frames_in(data), str)
    elif is_picture(data):
        with open_image(read_url(data) if is_url(data) else data) as image:
            yield Animation(image)
    else:
        with open_bytes(data) as file:
            yield Container(file)


def is_folder(data: str | EmbeddedFile) -> bool:
    """Whether a path is a folder; in an object store, a name without a suffix."""
    if isinstance(data, EmbeddedFile) or is_url(data):
        return False
    return not PurePath(data).suffix if is_remote(data) else os.path.isdir(data)


def frames_in(folder: str) -> list[str]:
    """The pictures in a folder, in the order of the numbers in their names: 2.png comes before 10.png."""
    names = [file.name for file in list_files(folder) if file.name.lower().endswith(picture_suffixes())]
    return [os.path.join(folder, name) for name in sorted(names, key=by_numbers)]


def by_numbers(name: str) -> list:
    """Sort key of a file name, in which digits count as numbers."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def is_picture(data: str | EmbeddedFile) -> bool:
    """Whether a file is a picture, by its suffix, or by its first bytes if it has none."""
    suffix = PurePath(urlsplit(str(data)).path).suffix.lower()
    if suffix or not isinstance(data, EmbeddedFile):
        return suffix in picture_suffixes()
    try:
        open_image(data).close()
    except ValueError:
        return False
    return True
