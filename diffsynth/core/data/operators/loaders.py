"""The operators that data sets load files by unless they are given others."""

from collections.abc import Sequence

from ..sources.storage import EmbeddedFile
from .base import RouteByExtensionName, RouteByType, SequentialProcess, ToAbsolutePath, ToList
from .images import ImageCropAndResize, LoadImage
from .masks import LoadMask, is_mask
from .video import LoadGIF, LoadVideo


def image_loader(
    base_path: str = "", allow_urls: bool = False, mode: str = "RGB", kind: type[LoadImage] = LoadImage
) -> RouteByType:
    """Operator that loads an image, or every image of a list, at its own size."""
    image = ToAbsolutePath(base_path, allow_urls) >> kind(mode)
    return RouteByType([(str, image), (list, SequentialProcess(image)), (EmbeddedFile, image)])


def mask_loaders(columns: Sequence[str], base_path: str = "", allow_urls: bool = False) -> dict[str, RouteByType]:
    """Operators that load the columns that hold masks, which are those whose names end in "mask"."""
    masks = [column for column in columns if is_mask(column)]
    return dict.fromkeys(masks, image_loader(base_path, allow_urls, kind=LoadMask))


def default_image_operator(
    base_path: str = "",
    max_pixels: int = 1024 * 1024,
    height: int | None = None,
    width: int | None = None,
    height_division_factor: int = 16,
    width_division_factor: int = 16,
    allow_urls: bool = False,
) -> RouteByType:
    """Operator that loads an image, or every image of a list, resized and cropped by `ImageCropAndResize`."""
    crop = ImageCropAndResize(height, width, max_pixels, height_division_factor, width_division_factor)
    image = ToAbsolutePath(base_path, allow_urls) >> LoadImage() >> crop
    return RouteByType([(str, image), (list, SequentialProcess(image)), (EmbeddedFile, image)])


def default_video_operator(
    base_path: str = "",
    max_pixels: int = 1024 * 1024,
    height: int | None = None,
    width: int | None = None,
    height_division_factor: int = 16,
    width_division_factor: int = 16,
    num_frames: int = 81,
    time_division_factor: int = 4,
    time_division_remainder: int = 1,
    frame_rate: float | None = None,
    allow_urls: bool = False,
) -> RouteByType:
    """Operator that loads the frames of a video or animation as a list; a still image becomes a list of one.

    Raises:
        ImportError: PyAV is not installed.
    """
    crop = ImageCropAndResize(height, width, max_pixels, height_division_factor, width_division_factor)
    length = (num_frames, time_division_factor, time_division_remainder, crop, frame_rate)
    extensions = [
        (("jpg", "jpeg"), LoadImage() >> crop >> ToList()),
        (("gif", "webp", "png", "apng", "avif"), LoadGIF(*length)),
        (("mp4", "m4v", "mov", "mkv", "webm", "avi", "wmv", "flv", "mpg", "mpeg", "ts"), LoadVideo(*length)),
    ]
    video = ToAbsolutePath(base_path, allow_urls) >> RouteByExtensionName(extensions)
    return RouteByType([(str, video), (EmbeddedFile, video)])
