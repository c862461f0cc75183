"""Example images of a model, fetched from ModelScope where they are not on this machine yet."""

import io
import logging
from collections.abc import Sequence
from functools import cache
from pathlib import Path, PurePosixPath

import pyarrow as pa
from filelock import FileLock
from PIL import Image

from ...hub import answers, downloads_are_off, is_whole, marked, modelscope_endpoint
from ..unified_dataset import find_rows
from .table import Rows, Table

logger = logging.getLogger(__name__)

YOUR_OWN = "train on images of your own by dataset=image_folder dataset.path=…"
BLANK = 1024  # pixels of a blank image's sides; it is then brought to the size of the data set's images


def read_example(
    path: str, repository: str, folder: str | None, columns: Sequence[str] = ("image",), fetch: bool = True
) -> Rows:
    """Rows of the images that DiffSynth-Studio trains a model on, fetched first where they are absent.

    Args:
        path: Where they are kept; it ends as `folder` does.
        repository: The data set of ModelScope that has them, "owner/name".
        folder: Theirs in it; None of a model that it has no images for.
        columns: Those of images.
        fetch: False gives a single row of blank images where they are absent, which is enough to plan a run.

    Raises:
        ValueError: There are none for this model, or they are neither here nor to be had.
    """
    if folder is None:
        raise ValueError(f"{repository} has no images for this model: {YOUR_OWN}.")
    if not is_whole(Path(path)):
        if not fetch:
            _say(f"Planned with one blank picture in the place of {repository}, {folder}.")
            return blank_rows(columns)
        _fetch(Path(path), repository, folder)
    _, rows = find_rows(path, None, "utf-8")
    _say(f"Training data: {len(rows)} rows of {repository}, {folder}, in {path}; {YOUR_OWN}.")
    return rows


def blank_rows(columns: Sequence[str]) -> Table:
    """A table of one row: a white image in each of the columns, and a prompt."""
    file = io.BytesIO()
    Image.new("RGB", (BLANK, BLANK), "white").save(file, "png")
    cells = {name: pa.array([file.getvalue()], pa.large_binary()) for name in columns}
    table = pa.table(cells | {"prompt": pa.array(["a picture"], pa.large_string())})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return Table(sink.getvalue())


def _fetch(path: Path, repository: str, folder: str) -> None:
    with FileLock(_root(path, folder) / ".lock"):  # every process of a run comes here
        reason = "" if is_whole(path) else _download(path, repository, folder)
    if not is_whole(path):
        raise ValueError(
            f"{repository} cannot be fetched ({reason}): {YOUR_OWN}, or copy its folder {folder} to {path}."
        )


def _download(path: Path, repository: str, folder: str) -> str:
    """Download the folder; returns why it may still be absent."""
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
    """Where the repository's folders are kept; made where it is not there."""
    root = Path(path).absolute().parents[len(PurePosixPath(folder).parts) - 1]
    root.mkdir(parents=True, exist_ok=True)
    return root


@cache
def _say(text: str) -> None:
    """Log a line once, also where the data set is opened again for the validation."""
    logger.info(text)
