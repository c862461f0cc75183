"""Find the rows of a data set: in a metadata table, or from captions beside images."""

import logging
import os
from collections.abc import Callable

from .captions import read_captions
from .metadata import READERS, read_metadata
from .storage import is_file, is_remote
from .studio_cache import refuse_studio_cache
from .table import RenamedRows, Rows

logger = logging.getLogger(__name__)

# Columns of `datasets`' folders of images and videos (https://huggingface.co/docs/datasets/image_dataset).
FILE_COLUMN, TEXT_COLUMN = "file_name", "text"


def find_rows(
    base_path: str | None, metadata: str | Callable | None, encoding: str, column: str = "image"
) -> tuple[str, Rows]:
    """The path of the metadata and its rows.

    `metadata` is a file in `base_path` or a path of its own; None looks for the default names, then for captions. A
    table of a folder of Hugging Face's `datasets` gets the names of columns that are used here. `column` is that of the
    files: `image` or `video`.

    Raises:
        ValueError: There is no metadata.
    """
    if callable(metadata):
        return str(base_path), metadata(str(base_path))
    own = "" if metadata is None else f"for {column}s of your own type dataset={column}_folder dataset.path={{}}; "
    if base_path and os.path.isfile(base_path):
        folder = os.path.dirname(base_path) or "."
        raise ValueError(f"{base_path} is a file; set the data set's path to its folder, dataset.path={folder}")
    if base_path and not is_remote(str(base_path)) and not os.path.isdir(base_path):
        raise ValueError(
            f"there is no folder {base_path}; {own.format('…')}set the data set's path, dataset.path=…, to one that "
            "exists"
        )
    if base_path is None and metadata is None:
        raise ValueError("base_path and metadata_path are both None; pass at least one")
    if base_path is None:
        return str(metadata), read_metadata(metadata, encoding)
    names = [f"metadata{suffix}" for suffix in READERS] if metadata is None else [metadata]
    candidates = [os.path.join(base_path, name) for name in names] + [str(metadata)] * (metadata is not None)
    for candidate in filter(is_file, candidates):
        return candidate, _with_our_names(candidate, read_metadata(candidate, encoding), column)
    if metadata is None and (rows := read_captions(str(base_path), encoding, column)):
        return str(base_path), rows
    if base_path:
        refuse_studio_cache(base_path)
    looked_for = ", ".join(dict.fromkeys(candidates)) + f", {column}s" * (metadata is None)
    raise ValueError(
        f"no metadata: {own.format(base_path or '…')}set dataset.path or dataset.metadata; looked for {looked_for}"
    )


def _with_our_names(path: str, rows: Rows, column: str) -> Rows:
    found = rows[0] if rows else {}
    if FILE_COLUMN not in found or column in found:
        return rows
    pairs = ((FILE_COLUMN, column), (TEXT_COLUMN, "prompt"))
    names = {theirs: ours for theirs, ours in pairs if theirs in found and ours not in found}
    logger.info("%s: %s", path, ", ".join(f"{theirs} is taken as {ours}" for theirs, ours in names.items()))
    return RenamedRows(rows, names)
