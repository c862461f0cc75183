"""Read a data set that Hugging Face's `datasets` saved on disk."""

import os
from hashlib import blake2b
from typing import TYPE_CHECKING

from .storage import open_file
from .table import Rows, read_cell

if TYPE_CHECKING:
    from datasets import Dataset


class HubRows(Rows):
    """Rows of a data set that `datasets` saved on disk; images stay undecoded in the table until they are used.

    Args:
        path: Folder of one split, which `save_to_disk` wrote.
        image_column: Column to rename to `image`.
        caption_column: Column to rename to `prompt`.

    Raises:
        ValueError: `datasets` is not installed, did not write the folder, or there is no such column.
    """

    def __init__(self, path: str, image_column: str = "image", caption_column: str = "text"):
        self.arguments = path, image_column, caption_column
        self.dataset = _load(path).with_format("arrow")
        renamed = {"image": image_column, "prompt": caption_column}
        for column in renamed.values():
            if column not in self.dataset.column_names:
                raise ValueError(
                    f"{path} has no column {column!r}, but {', '.join(self.dataset.column_names)}; set "
                    "dataset.metadata.image_column and dataset.metadata.caption_column."
                )
        others = [name for name in self.dataset.column_names if name not in renamed.values()]
        self.columns = dict(zip(others, others, strict=True)) | renamed

    def __reduce__(self) -> tuple:
        return HubRows, self.arguments  # each process opens the files by itself

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        row = self.dataset[index]
        return {name: read_cell(row.column(column), 0) for name, column in self.columns.items()}

    def digest(self) -> str:
        digest = blake2b(repr(self.arguments[1:]).encode(), digest_size=8)
        for name in ("state.json", "dataset_info.json"):  # these contain the fingerprint of `datasets`
            with open_file(os.path.join(self.arguments[0], name)) as file:
                digest.update(file.read())
        return digest.hexdigest()


def _load(path: str) -> "Dataset":
    try:
        from datasets import DatasetDict, load_from_disk
    except ImportError as error:
        raise ValueError(f'{path} needs datasets: pip install "diffsynth-hydra[data]"') from error
    try:
        dataset = load_from_disk(path)
    except FileNotFoundError as error:
        raise ValueError(
            f"{path} is not a folder that save_to_disk of `datasets` wrote: {error}; set dataset.path to one"
        ) from error
    if isinstance(dataset, DatasetDict):
        raise ValueError(
            f"{path} holds the splits {', '.join(dataset)}; choose one: dataset.path={path}/{min(dataset)}"
        )
    return dataset
