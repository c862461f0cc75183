"""Files of videos by PyAV, an extra: the package, and writing MP4."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from types import ModuleType

from PIL import Image


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
