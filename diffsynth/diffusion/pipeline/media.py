"""`Media`: the kind of media that a family generates, such as images; its column, size, tensors, files, thumbnails."""

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...core.data.operators.picture_files import in_mode
from ...core.data.operators.unread import Unread
from ...core.pictures import save_png

Size = tuple[int, ...]  # (width, height) in pixels; a video's further numbers follow


class Media:
    """One kind of media.

    Class attributes:
        column: Column of a data set that holds it.
        argument: Argument of the pipeline's call that holds a value to start from, or to train on.
        suffix: Suffix of its files.
        mode: Mode of its images: `RGB`, or `RGBA` where a family generates alpha as well.
        derived: Columns that a row need not have, because they follow from the value, and the functions that make them.
    """

    column: str
    argument: str
    suffix: str
    mode: str = "RGB"
    derived: Mapping[str, Callable[[Any], Any]] = {}

    def read(self, row: Mapping[str, Any], column: str) -> Any:
        """The value of a column of a data set's row; one of `derived` that the row lacks is made of the row's media.

        What is made of media that are not decoded is not decoded either.
        """
        if column in row or column not in self.derived:
            return row[column]
        whole, make = row[self.column], self.derived[column]
        return whole.part(make, column, whole.size[:2]) if isinstance(whole, Unread) else make(whole)

    def size(self, value: Any) -> Size:
        """Size of a value, which may not be read yet (`core.data.operators.unread.Unread`)."""
        raise NotImplementedError(f"{type(self).__name__} does not define `size`.")

    def requested_size(self, request: Mapping[str, Any]) -> Size:
        """Size of the value that a request asks for; the request is complete."""
        raise NotImplementedError(f"{type(self).__name__} does not define `requested_size`.")

    def resized(self, value: Any, height: int, width: int) -> Any:
        """A value as the `argument` of a request of `height` and `width` in pixels."""
        raise NotImplementedError(f"{type(self).__name__} does not define `resized`.")

    def inputs(self, value: Any) -> dict[str, Any]:
        """Inputs of the pipeline that train it to generate `value`."""
        raise NotImplementedError(f"{type(self).__name__} does not define `inputs`.")

    def preprocess(self, value: Any, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Convert a value, or a single image, to the tensor (1, …) in [-1, 1] that the autoencoder encodes."""
        raise NotImplementedError(f"{type(self).__name__} does not define `preprocess`.")

    def postprocess(self, pixels: Tensor) -> Any:
        """Convert the tensor (1, …) in [-1, 1] that the autoencoder decoded to a value."""
        raise NotImplementedError(f"{type(self).__name__} does not define `postprocess`.")

    def write(self, value: Any, path: Path, parameters: Mapping[str, Any] | None = None) -> None:
        """Write a value to a file, with the parameters that it was sampled with as metadata."""
        raise NotImplementedError(f"{type(self).__name__} does not define `write`.")

    def thumbnail(self, value: Any) -> Image.Image:
        """An RGB image of the value, for grids, reports and metrics; alpha is on white."""
        raise NotImplementedError(f"{type(self).__name__} does not define `thumbnail`.")

    def frames(self, value: Any) -> list[Image.Image]:
        """The value as RGB images that are shown one after another, small enough for a report; empty if it is still."""
        return []


class ImageMedia(Media):
    """Images, in RGB or with alpha.

    Args:
        mode: `RGB`, or `RGBA`, in which images without alpha are opaque.
    """

    column, argument, suffix = "image", "input_image", ".png"

    def __init__(self, mode: str = "RGB"):
        self.mode = mode

    def size(self, value: Any) -> Size:
        return tuple(value.size)

    def requested_size(self, request: Mapping[str, Any]) -> Size:
        return request["width"], request["height"]

    def resized(self, value: Image.Image, height: int, width: int) -> Image.Image:
        return in_mode(value, self.mode).resize((width, height))

    def inputs(self, value: Any) -> dict[str, Any]:
        width, height = self.size(value)
        return {self.argument: value, "height": height, "width": width}

    def preprocess(self, value: Image.Image, device: torch.device, dtype: torch.dtype) -> Tensor:
        """RGB (1, 3, H, W) or RGBA (1, 4, H, W) in [-1, 1].

        Pixels are rounded to `dtype` before they are scaled, as in DiffSynth-Studio.
        """
        pixels = torch.from_numpy(np.array(in_mode(value, self.mode), dtype=np.float32)).to(device, dtype)
        return (pixels * (2 / 255) - 1).permute(2, 0, 1).unsqueeze(0)

    def postprocess(self, pixels: Tensor) -> Image.Image:
        """The image of a tensor, RGB (1, 3, H, W) or RGBA (1, 4, H, W), in [-1, 1]."""
        values = ((pixels[0].float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return Image.fromarray(values.permute(1, 2, 0).cpu().numpy())

    def write(self, value: Image.Image, path: Path, parameters: Mapping[str, Any] | None = None) -> None:
        save_png(value, path, parameters)

    def thumbnail(self, value: Image.Image) -> Image.Image:
        return in_mode(value, "RGB")


class LayersMedia(ImageMedia):
    """An image in layers with alpha: a list of images of one size, from the back to the front."""

    def __init__(self):
        super().__init__("RGBA")

    def size(self, value: Sequence[Any]) -> Size:
        return super().size(value[0])

    def resized(self, value: Sequence[Image.Image], height: int, width: int) -> list[Image.Image]:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{self.argument} is {value!r}, expected a list: the composite, then its layers.")
        return [super(LayersMedia, self).resized(layer, height, width) for layer in value]

    def postprocess(self, pixels: Tensor) -> list[Image.Image]:
        """The layers of a tensor (n, 4, H, W) in [-1, 1]."""
        return [super(LayersMedia, self).postprocess(layer) for layer in pixels.split(1)]

    def write(self, value: Sequence[Image.Image], path: Path, parameters: Mapping[str, Any] | None = None) -> None:
        """Write the layers put over one another to `path`, and each layer beside it: for a.png to a_1.png and so on."""
        for number, layer in enumerate(value, start=1):
            save_png(layer, path.with_stem(f"{path.stem}_{number}"))
        save_png(composite(value), path, parameters)

    def thumbnail(self, value: Sequence[Image.Image]) -> Image.Image:
        return super().thumbnail(composite(value))


def composite(layers: Sequence[Image.Image]) -> Image.Image:
    """The RGBA image that layers give, put over one another from the back to the front."""
    return reduce(Image.alpha_composite, [layer.convert("RGBA") for layer in layers])
