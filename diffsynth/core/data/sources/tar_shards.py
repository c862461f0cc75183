"""Read tar shards of images and captions in WebDataset's layout: indexed once, then read by offset in any order."""

import glob
import itertools
import json
import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from posixpath import basename
from typing import Literal

from .picture_formats import suffixes_of
from .storage import absolute, file_system, is_remote, open_file, part_of, stored
from .table import Table, json_batches, make_table

RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def read_shards(
    path: str, shards: str = "*.tar", caption_key: str | None = None, column: Literal["image", "video"] = "image"
) -> Table:
    """A table of the samples in tar files: the positions of their images, and `prompt`.

    The members of a sample are consecutive, and their names are equal up to the first dot. `0001.png` is the sample's
    `image`, `0001.edit_image.png` its `edit_image`.

    Args:
        path: Folder of the shards.
        shards: Names of the shards, with ranges (`shard-{000..012}.tar`) or wildcards (`*.tar`).
        caption_key: Key of the prompt in a sample's `.json`; None takes the text of its `.txt`.
        column: Column of the files whose names say none: `0001.mp4` is the sample's `video` with "video", which also
            reads `0001.control_video.mp4`.

    Raises:
        ValueError: A shard does not exist or cannot be read.
    """
    names = _find_shards(path, shards)
    try:
        files = [stored(os.path.join(path, name)) for name in names]
    except FileNotFoundError as error:
        raise ValueError(
            f"shards {shards} of {path}: one is missing: {error}; correct dataset.metadata.shards"
        ) from None
    size = sum(file.size for file in files)
    texts = (json.dumps(row) for name in names for row in _read_shard(path, name, caption_key, column))
    kind = "shards" if column == "image" else f"shards of {column}s"
    identity = (kind, absolute(path), files, names, caption_key)
    return make_table(f"{path}/{shards}", json_batches(texts), size, *identity)


def expand(pattern: str) -> list[str]:
    """All names of a pattern with ranges of numbers: `{08..10}` stands for 08, 09, 10."""
    fixed, ranges = RANGE.split(pattern)[::3], RANGE.findall(pattern)
    numbers = [_numbers(first, last) for first, last in ranges]
    names = []
    for chosen in itertools.product(*numbers):
        pairs = zip(fixed, [*chosen, ""], strict=True)
        names.append("".join(itertools.chain(*pairs)))
    return names


def _numbers(first: str, last: str) -> list[str]:
    """The numbers of a range, with as many digits as the first one."""
    return [f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1)]


def _find_shards(path: str, pattern: str) -> list[str]:
    names = []
    for name in expand(pattern):
        names += _match(path, name) if "*" in name else [name]
    if not names:
        raise ValueError(f"no shards: no file in {path} matches {pattern}; set dataset.path or dataset.metadata.shards")
    return names


def _match(path: str, pattern: str) -> list[str]:
    if not is_remote(path):
        return sorted(glob.glob(pattern, root_dir=path))
    system = file_system(path)
    root = system._strip_protocol(path).rstrip("/") + "/"
    return sorted(name.removeprefix(root) for name in system.glob(os.path.join(path, pattern)))


def _read_shard(path: str, name: str, caption_key: str | None, column: str) -> Iterator[dict]:
    try:
        with open_file(os.path.join(path, name)) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for key, members in itertools.groupby(_members(archive), key=lambda member: _split(member.name)[0]):
                columns = dict(_columns(archive, name, members, caption_key, column))
                _require_key_without_dot(name, key, columns, column)
                yield {column: None, "prompt": ""} | columns
    except tarfile.TarError as error:
        raise ValueError(f"shard {name}: {error}; expected a complete, uncompressed tar file") from error


def _members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    while (member := archive.next()) is not None:
        archive.members.clear()  # else it would keep all members of the shard in memory
        if member.isreg() and not basename(member.name).startswith("."):
            yield member


def _split(name: str) -> tuple[str, str]:
    """Key of the sample and kind of the member: `a/0001.edit.png` is split into `a/0001.` and `edit.png`."""
    kind = basename(name).partition(".")[2]
    return name.removesuffix(kind), kind.lower()


def _require_key_without_dot(shard: str, key: str, columns: dict, main: str) -> None:
    """Raise ValueError if the name of a file, such as 22.05.png, was cut at a dot that belongs to its key."""
    numbers = [column for column in columns if column[0].isdigit()]
    if numbers and main not in columns:
        raise ValueError(
            f"shard {shard}: {key:.99}{numbers[0]:.99}.…: a sample's key ends at the first dot (WebDataset), so that "
            f"{numbers[0]!r:.99} would be the name of a column; write the shard with other names, such as "
            f"{key.rstrip('.'):.99}_{numbers[0]:.99}"
        )


def _columns(
    archive: tarfile.TarFile, shard: str, members: Iterable[tarfile.TarInfo], caption_key: str | None, main: str
) -> Iterator[tuple[str, str | None]]:
    """(column, value) of the members of a sample that are images, videos or its caption."""
    suffixes = suffixes_of(main)
    for member in members:
        kind = _split(member.name)[1]
        column, _, suffix = kind.rpartition(".")
        if f".{suffix}" in suffixes:
            yield column or main, part_of(shard, member.offset_data, member.size, member.name)
        elif kind == ("txt" if caption_key is None else "json"):
            yield "prompt", _caption(archive, member, caption_key)


def _caption(archive: tarfile.TarFile, member: tarfile.TarInfo, caption_key: str | None) -> str | None:
    try:
        text = archive.extractfile(member).read().decode("utf-8-sig")
        return text.strip() if caption_key is None else json.loads(text).get(caption_key)
    except (ValueError, AttributeError, RecursionError) as error:
        expected = "text" if caption_key is None else "one JSON object"
        raise ValueError(f"{member.name} of {archive.name}: {error}; expected {expected} in UTF-8") from error
