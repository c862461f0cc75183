"""`LoadClip`, which loads frames of a video from a start on, and describes them without decoding."""

from collections.abc import Callable
from functools import partial
from typing import Any

from PIL import Image

from ..operators.base import Operator, ToAbsolutePath
from ..operators.picture_files import describe_file
from ..operators.unread import Unread
from ..sources.storage import EmbeddedFile
from ..sources.urls import is_url
from .open_video import open_video
from .stored import FrameFiles

Video = str | EmbeddedFile | list


class LoadClip(Operator):
    """Loads frames of a video, an animation, a still image, a folder of frames or a list of their files.

    Args:
        base_path, allow_urls: See `ToAbsolutePath`.
        frame_rate: Frames per second to resample to; None takes the frames as they are stored. Files of single frames
            have no times, and are taken as they are.
    """

    def __init__(self, base_path: str = "", allow_urls: bool = False, frame_rate: float | None = None):
        self.located, self.frame_rate = ToAbsolutePath(base_path, allow_urls), frame_rate

    def __call__(self, data: Video) -> list[Image.Image]:
        """All frames."""
        return self.load(data, 0, self.count(data), lambda frame: frame)

    def check(self, data: Video) -> tuple[int, int, int] | None:
        """(width, height, number of frames) of the whole video; None for a URL, which only the call fetches."""
        return None if isinstance(data, str) and is_url(data) else self.size(data)

    def size(self, data: Video) -> tuple[int, int, int]:
        """(width, height, number of frames) of the whole video. No frame but the first is decoded."""
        with open_video(data, self.located) as video:
            return *video.size, video.count(self.frame_rate)

    def count(self, data: Video) -> int:
        """Number of frames of the whole video."""
        with open_video(data, self.located) as video:
            return video.count(self.frame_rate)

    def load(self, data: Video, start: int, count: int, fit: Callable[[Image.Image], Any]) -> list:
        """Frames `start` to `start + count - 1`, each after `fit`.

        Raises:
            ValueError: There are fewer, or they cannot be decoded.
        """
        with open_video(data, self.located) as video:
            if start + count > (available := video.count(self.frame_rate)):
                raise ValueError(
                    f"has {available} frames, expected {start + count}; take a longer video, or set a smaller "
                    "dataset.num_frames"
                )
            shown = [[fit(image)] * times for image, times in video.frames(self.frame_rate, start, count)]
        return [frame for frames in shown for frame in frames]

    def unread(self, data: Video) -> Unread:
        size = self.size(data)
        return self.unread_clip(data, 0, size, lambda frame: frame, None)

    def unread_clip(
        self, data: Video, start: int, size: tuple[int, int, int], fit: Callable[[Image.Image], Any], fitted: Any
    ) -> Unread:
        """The list that `load` returns, as one `Unread` of a size (width, height, frames).

        Args:
            fitted: What `fit` does, as JSON data.
        """
        count = size[2]
        load = partial(self.load, data, start, count, fit)
        return Unread(size, load, partial(self._described, data, start, count, fitted))

    def _described(self, data: Video, start: int, count: int, fitted: Any) -> list:
        """A hash of the files that a clip is read from, and what is taken of them."""
        with open_video(data, self.located) as video:
            if isinstance(video, FrameFiles):
                own = map(video.located, video.files[start : start + count])
                return ["frames", [describe_file(file, []) for file in own], fitted]
        return describe_file(self.located(data), ["clip", self.frame_rate, start, count, fitted])
