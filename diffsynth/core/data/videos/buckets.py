"""Buckets of clips: numbers of frames, and sizes (width, height, frames), so that clips of one shape form batches."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..order.buckets import AspectBuckets, Size


@dataclass(frozen=True)
class ClipLengths:
    """The numbers of frames at which videos are trained.

    Args:
        num_frames: One or several; 1 takes still images, and the first frame of short videos.
        time_division_factor: Each number leaves the remainder 1 divided by it; the video autoencoder sets it.
        frame_rate: Frames per second that videos are resampled to; None takes frames as they are stored.

    Raises:
        ValueError: A number leaves another remainder; names those that fit.
    """

    num_frames: int | Sequence[int] = 81
    time_division_factor: int = 4
    frame_rate: float | None = None

    def __post_init__(self):
        numbers = {self.num_frames} if isinstance(self.num_frames, int) else set(self.num_frames)
        if not numbers:
            raise ValueError("dataset.num_frames is empty; set one number of frames or several, such as 81")
        for number in numbers:
            self._check(number)
        object.__setattr__(self, "num_frames", tuple(sorted(numbers)))

    def _check(self, number: int) -> None:
        factor = self.time_division_factor
        if number < 1 or (number - 1) % factor:
            below = max(0, number - 1) // factor * factor + 1
            fitting = f"{below} or {below + factor}" if number > 0 else "1"
            raise ValueError(
                f"dataset.num_frames={number}: the model takes {factor}n + 1 frames; set dataset.num_frames={fitting}"
            )

    def choose(self, available: int) -> int:
        """The largest of the numbers that a video of `available` frames fills.

        Raises:
            ValueError: It has fewer frames than the smallest.
        """
        fitting = [number for number in self.num_frames if number <= available]
        if fitting:
            return fitting[-1]
        at_rate = "" if self.frame_rate is None else f" at {self.frame_rate:g} per second"
        below = (available - 1) // self.time_division_factor * self.time_division_factor + 1
        shorter = ",".join(map(str, (below, *self.num_frames)))
        raise ValueError(
            f"has {available} frame{'s' * (available != 1)}{at_rate}, expected {self.num_frames[0]}; take a longer "
            f"video, or add a smaller number: dataset.num_frames=[{shorter}]"
        )


@dataclass(frozen=True)
class ClipBuckets:
    """The sizes (width, height, frames) that videos are cut to.

    Args:
        lengths: The numbers of frames; a video gets the largest that it fills.
        images: The sizes of frames.
        size: One fixed size (width, height) of frames, instead of `images`.
    """

    lengths: ClipLengths
    images: AspectBuckets
    size: Size | None = None

    def assign(self, width: int, height: int, frames: int) -> dict[int, Size]:
        """The buckets of a video by the budget of pixels of a frame; see `AspectBuckets.assign`."""
        count = self.lengths.choose(frames)
        sizes = self.images.assign(width, height) if self.size is None else {0: self.size}
        return {budget: (*size, count) for budget, size in sizes.items()}
