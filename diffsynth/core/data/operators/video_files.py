"""Files of videos by PyAV, an extra: the package, and writing MP4."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, BinaryIO

from PIL import Image

from ..sources.picture_formats import how_it_begins

if TYPE_CHECKING:
    import av


def pyav() -> ModuleType:
    """The package `av`.

    Raises:
        ImportError: It is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise ImportError(f'Videos need PyAV: pip install "diffsynth-hydra[data]" ({error})') from error
    return av


def open_container(file: BinaryIO) -> "av.container.InputContainer":
    """Open a video by FFmpeg, reading its header from the beginning of an open file.

    Raises:
        ValueError: It is none that FFmpeg reads.
    """
    av = pyav()
    file.seek(0)
    try:
        # FFmpeg also opens playlists. Their entries may be any file or address, and must not be opened.
        container = av.open(file, options={"protocol_whitelist": "none"})
    except (av.error.FFmpegError, OSError):
        file.seek(0)
        raise ValueError(f"is not a video that FFmpeg can read; {how_it_begins(file.read(20))}") from None
    for stream in container.streams.video:
        stream.thread_type = "NONE"  # several files are decoded at a time, by threads or processes of our own
    return container


def write_mp4(frames: Sequence[Image.Image], path: Path, rate: float, comment: str = "") -> None:
    """Write RGB frames of one size, of even width and height, as H.264 in MP4.

    Args:
        rate: Frames per second.
        comment: Text that is stored in the file.

    Raises:
        ImportError: PyAV is not installed.
    """
    av = pyav()
    with av.open(str(path), "w", format="mp4") as container:
        container.metadata["comment"] = comment
        stream = container.add_stream("libx264", Fraction(rate).limit_denominator(1001))
        stream.width, stream.height = frames[0].size
        stream.pix_fmt = "yuv420p"  # what browsers play
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())
