"""`VideoMedia`: videos as lists of frames, which are images of one size.

Shapes: F frames, H W size in pixels.
"""

import json
from collections.abc import Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...core.data.operators.picture_files import in_mode
from ...core.data.operators.video_files import write_mp4
from ...core.files import replacing
from ...core.pictures import beside
from .media import Media, Size

STRIP_FRAMES = 5  # frames of a film strip, evenly spaced; a guess
SHOWN_FRAMES, SHOWN_WIDTH = 33, 256  # of a clip in a validation's animation: most frames, and pixels; guesses
FRAME_RATE = 16.0  # frames per second for requests that name none


class VideoMedia(Media):
    """Videos in RGB: lists of frames, in files of MP4."""

    column, argument, suffix = "video", "input_video", ".mp4"
    derived = {"input_image": itemgetter(0), "end_image": itemgetter(-1)}  # as in DiffSynth-Studio's trainings

    def size(self, value: Any) -> Size:
        """(width, height, number of frames)."""
        return (*value[0].size, len(value)) if isinstance(value, list | tuple) else tuple(value.size)

    def requested_size(self, request: Mapping[str, Any]) -> Size:
        return request["width"], request["height"], request["num_frames"]

    def resized(
        self, value: Sequence[Image.Image], height: int, width: int, num_frames: int, name: str = argument
    ) -> list[Image.Image]:
        """The first `num_frames` frames, resized; `name` is that of the argument, for errors.

        Raises:
            ValueError: There are fewer.
        """
        if len(value) < num_frames:
            raise ValueError(
                f"{name} has {len(value)} frames, expected at least num_frames={num_frames}; set "
                f"num_frames={len(value)} or fewer, or take a longer video."
            )
        return [in_mode(frame, self.mode).resize((width, height)) for frame in value[:num_frames]]

    def inputs(self, value: Any) -> dict[str, Any]:
        width, height, num_frames = self.size(value)
        return {self.argument: value, "height": height, "width": width, "num_frames": num_frames}

    def preprocess(self, value: Any, device: torch.device, dtype: torch.dtype) -> Tensor:
        """RGB (1, 3, F, H, W) in [-1, 1] of frames, or of a single image as one frame.

        Pixels are rounded to `dtype` before they are scaled, as in DiffSynth-Studio.
        """
        frames = value if isinstance(value, list | tuple) else [value]
        pixels = np.stack([np.asarray(in_mode(frame, self.mode)) for frame in frames])
        scaled = torch.from_numpy(pixels).to(device).to(dtype) * (2 / 255) - 1
        return scaled.permute(3, 0, 1, 2).unsqueeze(0)

    def postprocess(self, pixels: Tensor) -> list[Image.Image]:
        """The frames of a tensor (1, 3, F, H, W) in [-1, 1]."""
        values = ((pixels[0].float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return [Image.fromarray(frame) for frame in values.permute(1, 2, 3, 0).cpu().numpy()]

    def write(self, value: Sequence[Image.Image], path: Path, parameters: Mapping[str, Any] | None = None) -> None:
        """Write frames as MP4 (H.264) at the parameters' `frame_rate`; the parameters are its comment, as JSON."""
        rate = (parameters or {}).get("frame_rate") or FRAME_RATE
        comment = json.dumps(dict(parameters or {}), ensure_ascii=False)
        with replacing(path) as partial:
            write_mp4([in_mode(frame, "RGB") for frame in value], partial, rate, comment)

    def thumbnail(self, value: Sequence[Image.Image]) -> Image.Image:
        """A film strip: some frames side by side, from the first to the last."""
        return beside([in_mode(value[number], "RGB") for number in evenly_spaced(len(value), STRIP_FRAMES)])

    def frames(self, value: Sequence[Image.Image]) -> list[Image.Image]:
        """At most `SHOWN_FRAMES` of the frames, evenly spaced, and at most `SHOWN_WIDTH` pixels wide."""
        shown = [in_mode(value[number], "RGB") for number in evenly_spaced(len(value), SHOWN_FRAMES)]
        scale = min(1, SHOWN_WIDTH / shown[0].width)
        return [frame.resize((round(frame.width * scale), round(frame.height * scale))) for frame in shown]


def evenly_spaced(count: int, most: int) -> list[int]:
    """Numbers of at most `most` of `count` frames, from the first to the last."""
    wanted = min(count, most)
    return [round(number * (count - 1) / max(1, wanted - 1)) for number in range(wanted)]
