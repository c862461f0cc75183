"""Small videos whose frames tell their number."""

import json
import math
import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

SIZE = (64, 48)
CODECS = {".webm": "libvpx-vp9", ".avi": "mpeg4"}


def picture(number: int, size=SIZE) -> Image.Image:
    """Frame `number`, whose upper half is of a grey for number % 8, and its lower half of one for number // 8."""
    rows = np.repeat([number % 8, number // 8 % 8], size[1] // 2)
    return Image.fromarray(np.repeat(30 * rows[:, None] + 20, size[0], axis=1).astype(np.uint8)).convert("RGB")


def number(frame: Image.Image) -> int:
    upper, lower = np.split(np.asarray(frame.convert("L"), dtype=float), 2)
    return round((upper.mean() - 20) / 30) + 8 * round((lower.mean() - 20) / 30)


def numbers(frames: Sequence[Image.Image]) -> list[int]:
    return [number(frame) for frame in frames]


def write_video(path: Path, count=30, rate=16, size=SIZE, times=None, pictures=None, **options: str) -> Path:
    """A video of `picture`s with a key frame every 12, at `times` counted in 1/rate seconds."""
    pictures = pictures or [picture(index, size) for index in range(count)]
    with av.open(str(path), "w") as container:
        codec = options.pop("codec", CODECS.get(path.suffix, "libx264"))
        stream = container.add_stream(codec, rate=rate, options={"g": "12", **options})
        (stream.width, stream.height), stream.pix_fmt = size, "yuv420p"
        for time, image in zip(times or range(len(pictures)), pictures, strict=True):
            frame = av.VideoFrame.from_image(image)
            frame.pts, frame.time_base = time, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def write_animation(path: Path, count=8, duration=40, **options) -> Path:
    """A GIF, WebP, PNG or AVIF of `picture`s, each shown for `duration` milliseconds."""
    first, *others = [picture(index) for index in range(count)]
    lossless = {".webp": {"lossless": True}, ".avif": {"quality": 100}}.get(path.suffix, {})
    first.save(path, save_all=True, append_images=others, duration=duration, **lossless, **options)
    return path


def write_frames(folder: Path, count=8, name="{}.png") -> Path:
    """A folder of `picture`s."""
    folder.mkdir()
    for index in range(count):
        picture(index).save(folder / name.format(index))
    return folder


def write_rows(folder: Path, *rows: dict) -> Path:
    lines = [json.dumps({"prompt": "a film", **row}) for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def turn(path: Path, degrees: int) -> None:
    """Write into an MP4 that it is shown turned: the matrix in its track header, of 16.16 fixed-point numbers."""
    data = bytearray(path.read_bytes())
    cos, sin = (round(of(math.radians(degrees))) << 16 for of in (math.cos, math.sin))
    struct.pack_into(">5i", data, data.index(b"tkhd") + 44, cos, -sin, 0, sin, cos)
    path.write_bytes(data)
