"""What a family makes: where a row has it, how large it is, how it becomes a tensor, a file, a thumbnail."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...core.pictures import save_png

Size = tuple[int, ...]  # (width, height) in pixels; a video's further numbers follow


class Media:
    """One kind of media.

    Args:
        column: The column of a data set that has it.
        suffix: Of its files.
    """

    column: str
    suffix: str

    def size(self, value: Any) -> Size:
        """Size of a value, loaded or not (`core.data.operators.unread.Unread`)."""
        raise NotImplementedError(f"{type(self).__name__} has no size.")

    def inputs(self, value: Any) -> dict[str, Any]:
        """Inputs of the pipeline that train it to make `value`."""
        raise NotImplementedError(f"{type(self).__name__} names no inputs.")

    def preprocess(self, value: Any, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The tensor (1, …) in [-1, 1] that an autoencoder reads."""
        raise NotImplementedError(f"{type(self).__name__} becomes no tensor.")

    def postprocess(self, pixels: Tensor) -> Any:
        """What an autoencoder's tensor (1, …) in [-1, 1] shows."""
        raise NotImplementedError(f"{type(self).__name__} comes from no tensor.")

    def write(self, value: Any, path: Path, parameters: Mapping[str, Any] | None = None) -> None:
        """Write a file, with the parameters that it was sampled with."""
        raise NotImplementedError(f"{type(self).__name__} has no files.")

    def thumbnail(self, value: Any) -> Image.Image:
        """A picture of it, for grids and reports."""
        raise NotImplementedError(f"{type(self).__name__} has no thumbnail.")


class ImageMedia(Media):
    """RGB images."""

    column, suffix = "image", ".png"

    def size(self, value: Any) -> Size:
        return tuple(value.size)

    def inputs(self, value: Any) -> dict[str, Any]:
        width, height = self.size(value)
        return {"input_image": value, "height": height, "width": width}

    def preprocess(self, value: Image.Image, device: torch.device, dtype: torch.dtype) -> Tensor:
        """RGB (1, 3, H, W) in [-1, 1]; rounded to `dtype` first, as DiffSynth-Studio does."""
        pixels = torch.from_numpy(np.array(value, dtype=np.float32)).to(device, dtype)
        return (pixels * (2 / 255) - 1).permute(2, 0, 1).unsqueeze(0)

    def postprocess(self, pixels: Tensor) -> Image.Image:
        """The image of RGB (1, 3, H, W) in [-1, 1]."""
        values = ((pixels[0].float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return Image.fromarray(values.permute(1, 2, 0).cpu().numpy())

    def write(self, value: Image.Image, path: Path, parameters: Mapping[str, Any] | None = None) -> None:
        save_png(value, path, parameters)

    def thumbnail(self, value: Image.Image) -> Image.Image:
        return value
