"""The source `dataset=example`: example images of a model, downloaded from ModelScope once."""

import io
import logging
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path, PurePosixPath

import pyarrow as pa
from PIL import Image

from ...hub import answers, downloads_are_off, is_complete, locked, marked, modelscope_endpoint
from ...ranges import PositiveInt
from .find_rows import find_rows
from .table import Rows, Table

logger = logging.getLogger(__name__)

YOUR_OWN = "to train on your own images, set dataset=image_folder dataset.path=…"
BLANK = 1024  # a guess: height and width of a blank image, which the data set resizes to its own size


def read_example(
    path: str,
    repository: str,
    folder: str | None,
    columns: Sequence[str] = ("image",),
    fetch: bool = True,
    num_frames: PositiveInt | Sequence[PositiveInt] = 1,
    conditions: Mapping[str, object] | None = None,
) -> Rows:
    """Return the rows of DiffSynth-Studio's example images for a model; download the images if they are absent.

    Args:
        path: Local folder of the images; it ends in `folder`.
        repository: The data set on ModelScope, "owner/name".
        folder: Folder of the model's images in the repository; None if the repository has none for the model.
        columns: Columns that name files of images, or of videos if "video" is in their names.
        fetch: False downloads nothing and returns one row of blank images or videos if they are absent, to plan a run.
        num_frames: Frames of blank videos, or several numbers, of which the largest is taken.
        conditions: Columns that the data set makes of the images; the row of blank images has none of these.

    Raises:
        ValueError: There are no images for this model, or they are absent and cannot be downloaded.
    """
    if folder is None:
        raise ValueError(f"{repository} has no images for this model: {YOUR_OWN}.")
    if not is_complete(Path(path)):
        if not fetch:
            _log_once(f"{path} is absent: this plan has one blank sample instead of {repository}, {folder}.")
            columns = [name for name in columns if name not in (conditions or {})]
            return blank_rows(columns, num_frames if isinstance(num_frames, int) else max(num_frames))
        _fetch(Path(path), repository, folder)
    _, rows = find_rows(path, None, "utf-8")
    _log_once(f"Training data: {len(rows)} rows of {repository}, {folder}, in {path}; {YOUR_OWN}.")
    return rows


def blank_rows(columns: Sequence[str], num_frames: PositiveInt = 1) -> Table:
    """Return a table of one row: a white image in each column, or in those of videos an animation, and a prompt."""
    cells = {name: pa.array([_blank(name, num_frames)], pa.large_binary()) for name in columns}
    table = pa.table(cells | {"prompt": pa.array(["a picture"], pa.large_string())})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return Table(sink.getvalue())


@cache
def _blank(column: str, num_frames: int) -> bytes:
    """A white image, or if the column is one of videos an animation of `num_frames`."""
    file, white = io.BytesIO(), Image.new("L", (BLANK, BLANK), "white")
    if "video" not in column:
        white.save(file, "png")
        return file.getvalue()
    dotted = white.copy()
    dotted.putpixel((0, 0), 0)  # Pillow stores equal frames as one
    others = [white if number % 2 else dotted for number in range(num_frames - 1)]
    white.save(file, "gif", save_all=True, append_images=others, duration=100)
    return file.getvalue()


def _fetch(path: Path, repository: str, folder: str) -> None:
    with locked(_root(path, folder)):  # all processes of a run call this; the first one downloads
        reason = "" if is_complete(path) else _download(path, repository, folder)
    if not is_complete(path):
        raise ValueError(
            f"{path} is absent, and {repository} cannot be downloaded ({reason}); {YOUR_OWN}, or copy the "
            f"repository's folder {folder} to {path}."
        )


def _download(path: Path, repository: str, folder: str) -> str:
    """Download the folder; return why it is still absent, if it is."""
    if downloads_are_off():
        return "DIFFSYNTH_SKIP_DOWNLOAD is set"
    from modelscope import dataset_snapshot_download

    if not answers(endpoint := modelscope_endpoint()):
        return f"{endpoint} does not answer"
    try:
        with marked(path):
            dataset_snapshot_download(
                repository, local_dir=str(_root(path, folder)), allow_patterns=[f"{folder}/*"], ignore_patterns=[]
            )
    except Exception as error:  # the client's errors have no base class in common
        return f"{endpoint} answered: {type(error).__name__}: {error}"
    return f"{endpoint} has no {folder}"


def _root(path: str | Path, folder: str) -> Path:
    """The local folder of the repository: `path` without `folder` at its end."""
    return Path(path).absolute().parents[len(PurePosixPath(folder).parts) - 1]


@cache
def _log_once(text: str) -> None:
    """Log a line once, although the validation opens the data set again."""
    logger.info(text)
