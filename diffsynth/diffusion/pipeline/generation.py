"""Samples prompts to files: one image per prompt with its sampling parameters as metadata, and a grid of all."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from ...core.data.operators.masks import is_mask, read_mask
from ...core.data.operators.picture_files import read_image
from ...core.data.sources.metadata import open_text
from ...core.data.videos.open_video import open_video
from ...core.pictures import GRID_COLUMNS, beside, row, save_png, stack
from .remembered import Inputs, to_device
from .request import image_arguments, video_arguments

if TYPE_CHECKING:
    from ..base_pipeline import BasePipeline

logger = logging.getLogger(__name__)

GRID = "grid.png"


def read_prompts(prompt: str | Sequence[str]) -> list[str]:
    """A list of prompts from one prompt, from a list, or from the non-empty lines of a text file.

    Raises:
        ValueError: There are none, the file is absent or not in UTF-8, or the prompt is the path of another kind
            of file.
    """
    if not isinstance(prompt, str):
        if not prompt:
            raise ValueError("prompt is an empty list; expected a prompt, a list of prompts, or a text file.")
        return list(prompt)
    if not prompt.endswith(".txt"):
        if _is_file(prompt):
            raise ValueError(
                f"prompt={prompt} is a file, but prompts are read from .txt files only; rename it, or type "
                f"prompt=[{prompt}] to sample these words."
            )
        return [prompt]
    if not _is_file(prompt):
        raise ValueError(f"prompt={prompt}: no such file; expected a text file with one prompt per line.")
    try:
        with open_text(prompt, "utf-8") as file:
            lines = [line.strip() for line in file]
    except UnicodeDecodeError as error:
        raise ValueError(f"{prompt} is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8.") from error
    if not any(lines):
        raise ValueError(f"{prompt} holds no prompt; write one per line.")
    return [line for line in lines if line]


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # a prompt may be longer than a path
        return False


def warn_of_ignored(pipe: "BasePipeline", request: Mapping, completed: Mapping) -> None:
    """Log warnings of what a request asks for and does not get: a size, or a start from an image or a video.

    Args:
        completed: The same request, as `BasePipeline.complete` returns it.
    """
    width, height, *frames = size = pipe.media.requested_size(completed)
    asked = tuple(request.get(name) or own for name, own in zip(("width", "height", "num_frames"), size, strict=False))
    if asked[:2] != (width, height):
        message = "A size of %d x %d pixels is no multiple of what the model needs; %d x %d are sampled."
        logger.warning(message, *asked[:2], width, height)
    if asked[2:] != tuple(frames):
        logger.warning("num_frames=%d is not what the model needs; %d frames are sampled.", *asked[2:], *frames)
    starts = completed.get(pipe.media.argument) is not None and completed.get("inpaint_mask") is None
    if starts and completed["denoising_strength"] == 1:
        message = "%s has no effect with denoising_strength=1; set it below 1, such as 0.6."
        logger.warning(message, pipe.media.argument)
    if completed.get(pipe.media.argument) is None and (strength := completed["denoising_strength"]) != 1:
        message = "denoising_strength=%s is for something to start from; set %s=…, or leave it out."
        logger.warning(message, strength, pipe.media.argument)


def load_images(mode: str = "RGB", **paths: str | None) -> dict[str, Image.Image]:
    """The images at these paths in `mode`, by name, as training loads them; names without a path are left out.

    Raises:
        ValueError: One cannot be read; names it.
    """
    return {name: _read_image(name, path, mode) for name, path in paths.items() if path is not None}


def _read_image(name: str, path: str, mode: str = "RGB") -> Image.Image:
    try:
        return (read_mask if is_mask(name) else read_image)(path, mode)
    except Exception as error:  # Pillow's decoders raise exceptions of many types
        raise ValueError(f"{name}={path}: {error}") from error


def with_images(pipe: "BasePipeline", options: Mapping[str, Any] | None) -> dict[str, Any]:
    """Arguments of a pipeline's call, in which files of images and videos, or lists of files, are read.

    Raises:
        ValueError: One cannot be read; names it.
    """
    images, videos = image_arguments(pipe.request), video_arguments(pipe.request)

    def read(name: str, value: Any) -> Any:
        if name in videos:
            return _read_video(f"options.{name}", value)
        return _read_images(f"options.{name}", value, pipe.media.mode) if name in images else value

    return {name: read(name, value) for name, value in (options or {}).items()}


def _read_video(name: str, value: Any) -> Any:
    """The frames of a file, of a folder or of a list of files, as training reads them."""
    if value is None or (isinstance(value, list) and not all(isinstance(element, str) for element in value)):
        return value
    try:
        with open_video(value, lambda path: path) as video:
            return list(video.read(range(video.stored)))
    except Exception as error:  # decoders raise exceptions of many types
        raise ValueError(f"{name}={value}: {error}") from error


def _read_images(name: str, value: Any, mode: str) -> Any:
    if isinstance(value, str):
        return _read_image(name, value, mode)
    return [_read_images(name, element, mode) for element in value] if isinstance(value, Sequence) else value


def open_files(inputs: Mapping[str, object]) -> dict[str, object]:
    """Inputs of a template; a value that is the path of a file is opened as an image, as training does.

    Raises:
        ValueError: It cannot be read; names it.
    """
    is_file = {name: isinstance(value, str) and Path(value).is_file() for name, value in inputs.items()}
    return {name: _read_image(name, value) if is_file[name] else value for name, value in inputs.items()}


def check_free(folder: Path, count: int, suffix: str) -> None:
    """Check that a folder holds none of the `count` images that are to be written to it.

    Raises:
        ValueError: It holds one.
    """
    for path in [*(_path(folder, number, suffix) for number in range(count)), folder / GRID]:
        if path.exists():
            raise ValueError(
                f"{path} exists already, and would be replaced; set output=… to a new folder, or overwrite=true."
            )


def _path(folder: Path, number: int, suffix: str) -> Path:
    return folder / f"{number:04d}{suffix}"


@torch.no_grad()
def encode(pipe: "BasePipeline", requests: Sequence[Mapping]) -> list[Inputs]:
    """Each request's inputs (shared, positive, negative), in host memory, as there may be thousands of requests.

    Tuples stay on the device: they are outputs of templates, which all requests share.
    """
    prepared = pipe.prepare_each(requests)
    return [tuple(to_device(side, torch.device("cpu")) for side in sides) for sides in prepared]


def sample_to_files(
    pipe: "BasePipeline",
    requests: Sequence[Mapping],
    inputs: Sequence[Inputs],
    batch_size: int,
    folder: Path,
    source: Mapping,
) -> list[Path]:
    """Sample requests in batches and save each result, and a grid if there are several; returns the paths.

    Args:
        inputs: What `encode` has made of each request.
        source: Where the weights come from; it becomes metadata of each file, together with the request.
    """
    pictures, paths = [], []
    for start in range(0, len(requests), batch_size):
        batch, of_batch = (whole[start : start + batch_size] for whole in (requests, inputs))
        on_device = [tuple(to_device(side, pipe.device) for side in sides) for sides in of_batch]
        for result, request in zip(pipe.sample(batch, on_device), batch, strict=True):
            paths.append(_path(folder, len(paths), pipe.media.suffix))
            pipe.media.write(result, paths[-1], {**request, **source})
            pictures.append(row([pipe.media.thumbnail(result)], [request["prompt"]]))
    if len(pictures) > 1:
        paths.append(folder / GRID)
        rows = [pictures[start : start + GRID_COLUMNS] for start in range(0, len(pictures), GRID_COLUMNS)]
        save_png(stack([beside(pictures_of_row) for pictures_of_row in rows]), paths[-1])
    return paths
