"""Open a video of any kind: a file, an address, an animation, a folder or a list of files of frames."""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import PurePath
from urllib.parse import urlsplit

from ..operators.picture_files import open_image
from ..operators.video import open_bytes
from ..sources.picture_formats import picture_suffixes
from ..sources.storage import EmbeddedFile, is_remote, list_files
from ..sources.urls import is_url, read_url
from .container import Container
from .stored import Animation, FrameFiles, StoredVideo


@contextmanager
def open_video(data: str | EmbeddedFile | Sequence[str | EmbeddedFile], located: Callable) -> Iterator[StoredVideo]:
    """Open a video: a file or a URL, a folder of frames, or a list of files of frames.

    Args:
        located: Returns the path of a name.

    Raises:
        ImportError: The video needs PyAV, which is not installed.
        ValueError: It cannot be read; says why.
    """
    if isinstance(data, list | tuple):
        yield FrameFiles(data, located)
        return
    data = located(data)
    if is_folder(data):
        yield FrameFiles(frames_in(data), str)
    elif is_picture(data):
        with open_image(read_url(data) if is_url(data) else data) as image:
            yield Animation(image, partial(open_bytes, data))
    else:
        with open_bytes(data) as file, closing(Container(file)) as container:
            yield container


def is_folder(data: str | EmbeddedFile) -> bool:
    """Whether a path is a folder; in an object store, a name without a suffix."""
    if isinstance(data, EmbeddedFile) or is_url(data):
        return False
    return not PurePath(data).suffix if is_remote(data) else os.path.isdir(data)


def frames_in(folder: str) -> list[str]:
    """The pictures in a folder, in the order of the numbers in their names: 2.png comes before 10.png."""
    names = [file.name for file in list_files(folder) if file.name.lower().endswith(picture_suffixes())]
    return [os.path.join(folder, name) for name in sorted(names, key=by_numbers)]


def by_numbers(name: str) -> list:
    """Sort key of a file name, in which digits count as numbers."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def is_picture(data: str | EmbeddedFile) -> bool:
    """Whether a file is a picture, by its suffix, or by its first bytes if it has none."""
    # Only in a URL does a # end the path: a part of a tar file is named a.tar#512+800/b.webp.
    path = urlsplit(data).path if is_url(data) else str(data)
    suffix = PurePath(path).suffix.lower()
    if suffix or not isinstance(data, EmbeddedFile):
        return suffix in picture_suffixes()
    try:
        open_image(data).close()
    except ValueError:
        return False
    return True
