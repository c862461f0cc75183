"""`Container`: a video that FFmpeg reads, of which only the frames that are wanted are decoded."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from PIL import Image

from ..operators.video_files import open_container, pyav
from .stored import StoredVideo
from .times import FrameTimes

if TYPE_CHECKING:
    import av

# Seconds to go back from a frame for the key frame before it, until one is found; 10 s is the longest usual distance.
STEPS_BACK = (0, 1, 10)
# AVI stores decoding times, MPEG program streams times of some frames, raw streams none: their frames are counted.
UNTIMED = ("avi", "mpeg")


class Container(StoredVideo):
    """A video that FFmpeg reads.

    Args:
        file: The open file; it stays open.

    Raises:
        ValueError: It holds no video, or is cut off.
    """

    def __init__(self, file: BinaryIO):
        self.file, self.is_used = file, False
        self.file_size = file.seek(0, 2)  # before FFmpeg reads, which would not notice that the file was moved
        self.container = open_container(file)
        # One for all frames: a frame's own one would be set up anew for each.
        self.reformatter = pyav().video.reformatter.VideoReformatter()
        streams = self.container.streams
        if not any(stream.width for stream in streams.video[:1]):
            found = ", ".join(sorted({stream.type for stream in streams}))
            if not found:
                raise ValueError("has no complete header: it is cut off; copy or download it again")
            raise ValueError(f"holds no video that FFmpeg can read, but {found}; leave it out")
        self.is_timed = self.container.format.name not in UNTIMED

    def close(self) -> None:
        self.container.close()

    @property
    def stream(self) -> "av.VideoStream":
        return self.container.streams.video[0]

    @cached_property
    def size(self) -> tuple[int, int]:
        _, frame = next(self._decoded_from(int(self.times.starts[0])))
        return (frame.height, frame.width) if frame.rotation % 180 else (frame.width, frame.height)

    @property
    def stored(self) -> int:
        return len(self.times.starts)

    @cached_property
    def times(self) -> FrameTimes:
        return self._indexed() or self._demuxed()

    def _indexed(self) -> FrameTimes | None:
        """The times by the index of an MP4; None if it has none, or frames differ in length.

        The index has decoding times. If they are evenly spaced, the times of showing are taken to be so too.
        """
        entries = list(getattr(self.stream, "index_entries", ()))  # older versions of PyAV read every packet
        is_complete = len(entries) == self.stream.frames > 1 and "mp4" in self.container.format.name
        if not is_complete or any(entry.is_discard for entry in entries):
            return None
        end = max(entry.pos + entry.size for entry in entries)
        if end > self.file_size:
            raise ValueError(f"is cut off: it has {self.file_size} bytes of {end}; copy or download it again")
        steps = np.unique(np.diff([entry.timestamp for entry in entries]))
        if len(steps) > 1 or steps[0] <= 0:
            return None
        step, start = int(steps[0]), self.stream.start_time or 0
        starts = start + step * np.arange(len(entries), dtype=np.int64)
        return FrameTimes(starts, int(starts[-1]) + step, self.stream.time_base)

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
            self.container.close()
            self.container = open_container(self.file)
        self.is_used = True
        return self.container

    def read(self, numbers: Sequence[int]) -> Iterator[Image.Image]:
        times, last, found = self.times.starts[list(numbers)].tolist(), None, 0
        for time, frame in self._decoded_from(times[0]):
            # The decoder may leave a frame out, if it is damaged or never shown. The one before stays on the screen.
            while found < len(times) and time > times[found]:
                yield self._upright(last or frame)
                found += 1
            if found < len(times) and time == times[found]:
                yield self._upright(frame)
                found += 1
            if found == len(times):
                return
            last = frame
        raise ValueError(f"is cut off or damaged: frame {numbers[found] + 1} of {self.stored} cannot be decoded")

    def _upright(self, frame: "av.VideoFrame") -> Image.Image:
        """The upright image of a decoded frame, in RGB."""
        image = Image.fromarray(self.reformatter.reformat(frame, format="rgb24").to_ndarray())
        return image.rotate(frame.rotation, expand=True) if frame.rotation else image

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
        for seconds in STEPS_BACK if time > int(self.times.starts[0]) else ():
            container = self._unused()
            if not sought(container, self.stream, time - round(seconds / self.stream.time_base)):
                break
            frames = container.decode(self.stream)
            first = next(frames, None)
            # Formats seek by decoding time, and a key frame may be decoded before, and shown after, `time`.
            if first is not None and first.pts is not None and first.pts <= time:
                return chain([first], frames)
        container = self._unused()
        return container.decode(self.stream)


def sought(container: "av.container.InputContainer", stream: "av.VideoStream", time: int) -> bool:
    """Go to the key frame before `time`; return whether the format can."""
    try:
        container.seek(time, stream=stream)
    except pyav().error.FFmpegError:
        return False
    return True


@contextmanager
def decoding_errors() -> Iterator[None]:
    """Raise errors of FFmpeg as ValueError."""
    av = pyav()
    try:
        yield
    except av.error.FFmpegError as error:
        advice = "it may be cut off: copy or download it again"
        raise ValueError(f"cannot be decoded ({error.strerror}); {advice}") from error
