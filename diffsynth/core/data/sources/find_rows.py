"""Find the rows of a data set: in a metadata table, or from captions beside images."""

import os
from collections.abc import Callable

from .captions import read_captions
from .metadata import READERS, read_metadata
from .storage import is_file, is_remote
from .table import Rows


def find_rows(base_path: str | None, metadata: str | Callable | None, encoding: str) -> tuple[str, Rows]:
    """The path of the metadata and its rows.

    `metadata` is a file in `base_path` or a path of its own; None looks for the default names, then for captions.

    Raises:
        ValueError: There is no metadata.
    """
    if callable(metadata):
        return str(base_path), metadata(str(base_path))
    if base_path and not is_remote(str(base_path)) and not os.path.isdir(base_path):
        raise ValueError(f"there is no folder {base_path}; set the data set's path, dataset.path=…, to one that exists")
    if base_path is None and metadata is None:
        raise ValueError("base_path and metadata_path are both None; pass at least one")
    if base_path is None:
        return str(metadata), read_metadata(metadata, encoding)
    names = [f"metadata{suffix}" for suffix in READERS] if metadata is None else [metadata]
    candidates = [os.path.join(base_path, name) for name in names] + [str(metadata)] * (metadata is not None)
    for candidate in filter(is_file, candidates):
        return candidate, read_metadata(candidate, encoding)
    if metadata is None and (rows := read_captions(str(base_path), encoding)):
        return str(base_path), rows
    looked_for = ", ".join(dict.fromkeys(candidates)) + ", images" * (metadata is None)
    any_folder = (
        "" if metadata is None else f", or dataset=image_folder dataset.path={base_path} for a folder of your own"
    )
    raise ValueError(f"no metadata: looked for {looked_for}; set dataset.path or dataset.metadata{any_folder}")
