"""Recognises a cache that DiffSynth-Studio has written, whose files are pickles."""

from itertools import islice
from pathlib import Path

LOOKED_AT = 1000  # files of a folder that are looked at; a guess


def refuse_studio_cache(folder: str | Path) -> None:
    """Check that a folder is no cache of DiffSynth-Studio (`<folder>/<process>/<number>.pth`).

    Raises:
        ValueError: It is one; the message has the command that makes ours.
    """
    if Path(folder).is_dir() and any(path.suffix == ".pth" for path in islice(Path(folder).rglob("*"), LOOKED_AT)):
        raise ValueError(
            f"{folder} holds .pth files, as a cache of DiffSynth-Studio does; they are pickles, which are never "
            "loaded, as they can run code. Make a cache of the data set itself: python make_cache.py model=… "
            "dataset.path=<its folder> path=<folder of the new cache>"
        )
