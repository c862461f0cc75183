"""Read a folder of images without a metadata table, with the prompt of each image in a text file beside it."""

import json
import os
from collections.abc import Iterator
from hashlib import blake2b
from itertools import groupby

from .metadata import open_text
from .picture_formats import suffixes_of
from .storage import absolute, list_files
from .table import Table, json_batches, make_table


def read_captions(folder: str, encoding: str = "utf-8", column: str = "image") -> Table:
    """A table of the images in a folder and below: `image` is the name, `prompt` the text of its `.txt`, or empty.

    With `column` "video", the table has that column instead of `image`, and the folder's videos as well.

    Raises:
        ValueError: A text file is not in that encoding, or no image has one.
    """
    digest, size = blake2b(digest_size=16), 0
    for file in list_files(folder):
        digest.update(os.fsencode(f"{file.name}\0{file.size}\0{file.version}\0"))
        size += len(file.name) + (file.size if file.name.endswith(".txt") else 0)
    texts = map(json.dumps, _rows(folder, encoding, column))
    kind = "captions" if column == "image" else f"captions of {column}s"
    return make_table(folder, json_batches(texts), size, kind, absolute(folder), digest.hexdigest(), encoding)


def _rows(folder: str, encoding: str, column: str) -> Iterator[dict]:
    suffixes = suffixes_of(column)
    names, first, captions = (file.name for file in list_files(folder)), None, 0
    for stem, group in groupby(names, key=lambda name: os.path.splitext(name)[0]):
        files, text = list(group), f"{stem}.txt"
        images = [name for name in files if name.lower().endswith(suffixes)]
        prompt = _read_text(os.path.join(folder, text), encoding) if images and text in files else ""
        yield from ({column: name, "prompt": prompt} for name in images)
        first, captions = first or (images[0] if images else None), captions + bool(prompt)
    if first and not captions:
        raise ValueError(
            f"{folder}: no {column} has a caption; write that of {first} into {os.path.splitext(first)[0]}.txt beside "
            f"it, or a metadata.csv with the columns {column},prompt, in which all {column}s may have one caption"
        )


def _read_text(path: str, encoding: str) -> str:
    try:
        with open_text(path, encoding) as file:
            return file.read().strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: {error}; save it as UTF-8, or set dataset.encoding=gbk") from error
