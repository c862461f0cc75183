"""A data set of videos, and of images beside them: each sample is a list of frames."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, Literal

from PIL import Image

from ..ranges import NonNegativeInt, Pixels, PositiveFloat, PositiveInt, Repeat, Side, Workers, at_least
from .dataset import Row
from .operators.augmentation import Augmentation, AugmentationChoice
from .operators.images import ImageCropAndResize
from .operators.loaders import mask_loaders
from .operators.masks import is_mask
from .order.addresses import SampleAddress, sample_seed
from .order.buckets import AspectBuckets, Size
from .unified_dataset import UnifiedDataset, called, errors_named
from .videos.buckets import ClipBuckets, ClipLengths
from .videos.load_clip import LoadClip

logger = logging.getLogger(__name__)

Start = Literal["first", "middle", "random"]
# Of each GPU; a guess: one core decodes 81 frames of 1280 x 720 and shrinks them in 1.4 s (measured 2026-12-01).
VIDEO_WORKERS = 4
WHITE = 250  # of 255; H.264 stores white a little darker, a guess


class ClipFit(ImageCropAndResize):
    """Resizes and crops frames; `check` also holds videos to the lengths.

    Args:
        lengths: The numbers of frames.
        options: Those of `ImageCropAndResize`.
    """

    def __init__(self, lengths: ClipLengths, *options: Any):
        super().__init__(*options)
        self.lengths = lengths

    def check(self, data: Size, size: Size | None = None) -> Size:
        """The size to which an image (width, height) or a video (width, height, frames) is brought."""
        if size is not None or len(data) == 2:
            return super().check(data[:2], size and size[:2])
        return *super().check(data[:2]), self.lengths.choose(data[2])


class VideoDataset(UnifiedDataset):
    """The rows of a metadata table, with clips of their videos.

    The columns among `data_file_keys` whose names contain "video" hold videos, and the others images. All videos of a
    row give the same frames, cropped and mirrored alike.

    Args:
        lengths: The numbers of frames of clips.
        start: The beginning of a clip in its video: `first` frame, the `middle` of what is left over, or `random`, a
            function of seed, epoch and sample.
        options: Those of `UnifiedDataset`.

    Raises:
        ValueError: The first of `data_file_keys` holds no videos.
    """

    column = "video"
    bucketed_by = "several sizes or dataset.num_frames"
    default_workers = VIDEO_WORKERS

    def __init__(self, *args: Any, lengths: ClipLengths, start: Start = "first", **options: Any):
        super().__init__(*args, **options)
        self.lengths, self.start, self.has_white_mask = lengths, start, False
        self.video_keys = [key for key in self.data_file_keys if is_video_column(key)]
        if self.data_file_keys[0] not in self.video_keys:
            raise ValueError(
                f"dataset.data_file_keys={self.data_file_keys} begins with a column of images, but "
                "dataset=video_folder reads videos; choose a model of videos, or dataset=image_folder, or "
                "data_file_keys=[video]"
            )

    @classmethod
    def from_folder(
        cls,
        path: str,
        metadata: str | Callable | None = None,
        height: Side | None = None,
        width: Side | None = None,
        num_frames: PositiveInt | Sequence[PositiveInt] = 81,
        frame_rate: PositiveFloat | None = None,
        start: Start = "first",
        max_pixels: Pixels | Sequence[Pixels] = 832 * 480,
        max_aspect: Annotated[float, at_least(1)] = 2.0,
        division_factor: Side = 16,
        time_division_factor: PositiveInt = 4,
        upscale: bool = False,
        data_file_keys: Sequence[str] = ("video",),
        repeat: Repeat = 1,
        on_error: Literal["raise", "skip"] = "raise",
        num_workers: Workers | None = None,
        encoding: str = "utf-8",
        scan_rows: NonNegativeInt = 1_000_000,
        augmentation: Augmentation | None = None,
        allow_urls: bool = False,
    ) -> "VideoDataset":
        """Make a data set of a folder of videos.

        Args:
            height, width: Fixed size in pixels of all frames; None takes the sizes of `AspectBuckets`.
            num_frames, frame_rate, time_division_factor: See `ClipLengths`.
            start: See the class.
            max_pixels, max_aspect, division_factor, upscale: See `AspectBuckets`.
            num_workers: See `TrainingData`.

        All other arguments are those of `UnifiedDataset.from_folder`.

        Raises:
            ValueError: A number of frames does not fit the model, or sides are no multiples of `division_factor`.
        """
        lengths = ClipLengths(num_frames, time_division_factor, frame_rate)
        largest = max_pixels if isinstance(max_pixels, int) else max(max_pixels)
        fit = ClipFit(lengths, height, width, largest, division_factor, division_factor)
        sizes = AspectBuckets(max_pixels, division_factor, max_aspect, upscale)
        fixed = None if height is None else (width, height)
        is_one_size = fixed and len(lengths.num_frames) == 1
        buckets = None if is_one_size else ClipBuckets(lengths, sizes, fixed)
        clip, image = LoadClip(path, allow_urls, frame_rate), cls.image_loader(path, allow_urls)
        loaders = mask_loaders(data_file_keys, path, allow_urls)
        loaders |= {key: clip for key in data_file_keys if is_video_column(key)}
        options = {"on_error": on_error, "encoding": encoding, "scan_rows": scan_rows, "augmentation": augmentation}
        options |= {"lengths": lengths, "start": start, "fit": fit, "buckets": buckets}
        dataset = cls(path, metadata, repeat, data_file_keys, image, loaders, **options)
        dataset.num_workers = num_workers
        return dataset

    def check_variants(self) -> None:
        super().check_variants()
        if self.start == "random":
            raise ValueError(
                "dataset.start=random takes other frames each time, which cannot be cached; set dataset.start=first or "
                "middle."
            )

    def fault_of_sizes(self, stored: Mapping[str, Size | None]) -> str | None:
        main, *others = self.video_keys
        if stored.get(main) is None:
            return super().fault_of_sizes(stored)
        others = [key for key in others if stored.get(key)]
        wrong = [key for key in others if stored[key][2] < self._frames_needed(stored[main][2])]
        if not wrong:
            return super().fault_of_sizes(stored)
        found, expected = stored[wrong[0]][2], stored[main][2]
        return (
            f"{wrong[0]} has {found} frames and {main} {expected}; cut both to one length, or set dataset.start=first "
            "and fewer dataset.num_frames"
        )

    def _frames_needed(self, available: int) -> int:
        """The frames that a clip of a video may be read from, or as many of another column."""
        return self.lengths.choose(available) if self.start == "first" else available

    def preview(self, number: int) -> Row:
        """Sample `number` with the frame in the middle of its clip as its video."""
        row, key, (*size, count) = self.rows[self._row_number(number)], self.data_file_keys[0], self._size_of(number)
        choice = AugmentationChoice()
        if key not in row:
            return Row(row)
        fit = partial(self._fitted, size=tuple(size), choice=choice)
        with errors_named(key, row[key]):
            frames = self.operators[key].load(row[key], self._start_of(row, count, choice) + count // 2, 1, fit)
        return Row({**row, key: frames, "prompt": self.augmentation.prompt(row, choice)})

    def _fixed_size(self) -> Size | None:
        size = super()._fixed_size()
        return size and (*size, self.lengths.num_frames[0])

    def _size_of(self, number: int) -> Size | None:
        return super()._size_of(number) or self._fixed_size()

    def _choice(self, address: SampleAddress, seed: int, row: dict) -> AugmentationChoice:
        choice = super()._choice(address, seed, row)
        if self.start != "random":
            return choice
        return replace(choice, start=sample_seed(seed, "start", *address) / 2**64)

    def _cell(self, row: Mapping, key: str, size: Size, choice: AugmentationChoice, apply: Callable) -> Any:
        if key not in self.video_keys:
            return super()._cell(row, key, size[:2], choice, apply)
        clip, cell, start = self.operators[key], row[key], self._start_of(row, size[2], choice)
        fit = partial(self._fitted, size=size[:2], choice=choice)
        if apply is called:
            frames = clip.load(cell, start, size[2], fit)
            self._note_white_mask(key, cell, frames)
            return frames
        return clip.unread_clip(cell, start, size, fit, ["fitted", size[:2], choice.mirrored])

    def _note_white_mask(self, key: str, cell: Any, frames: Sequence[Image.Image]) -> None:
        """Warn of the first mask that is white in all frames: some programs write masks the other way round."""
        if is_mask(key) and not self.has_white_mask and all(map(is_white, frames)):
            self.has_white_mask = True
            logger.warning(
                "%s %.99r is white in all frames of a clip, so that all of it is to be generated; if black is meant, "
                "invert the masks.",
                key,
                cell,
            )

    def _start_of(self, row: Mapping, count: int, choice: AugmentationChoice) -> int:
        """Number of the first frame of a clip of `count` frames in the video of a row."""
        if self.start == "first":
            return 0
        main = self.data_file_keys[0]
        return start_of(self.operators[main].count(row[main]), count, choice.start)


def is_white(frame: Image.Image) -> bool:
    """Whether a frame is white all over, as far as lossy videos keep white."""
    return frame.convert("L").getextrema()[0] >= WHITE


def is_video_column(name: str) -> bool:
    """Whether a column holds videos, such as `video`, `control_video` and `vace_video_mask`."""
    return "video" in name


def start_of(available: int, count: int, position: float | None) -> int:
    """Number of the first of `count` frames of a video of `available` frames.

    Args:
        position: From 0 to 1, exclusive; each possible start has the same share of it. None takes the middle.
    """
    return max(0, int((available - count + 1) * (0.5 if position is None else position)))
