"""The samples of each round on disk: latents, scores and pictures, by groups of one prompt, verified when read.

A round is a folder `round-N`. A group is complete when its `group-N.json` is there: that is written last, and holds the
key of what the samples depend on, and the checksum of their file.
"""

import logging
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...core.data.cache.shards import MALFORMED
from ...core.files import digest_of, write_text
from ...core.json_text import fits, read_json, to_json
from ...core.loader import load_state_dict, save_safetensors

logger = logging.getLogger(__name__)

FOLDER = re.compile(r"round-(\d{6,})")
INDEX = {"key": str, "digest": str, "prompt": str, "seeds": [int], "scores": {str: [float | int | None]}}


class Group(NamedTuple):
    """The samples of one prompt, and the scores (G,) that each reward gave them.

    Args:
        prompt: The prompt.
        seeds: The seeds (G) of the samples' noise.
        tensors: Clean `latents` (G, …), fp32, and what else the objective keeps of the sampling.
    """

    prompt: str
    seeds: Sequence[int]
    tensors: Mapping[str, Tensor]
    scores: Mapping[str, Tensor]


class RoundStore:
    """The rounds of one run.

    Args:
        path: Folder of the rounds.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def folder(self, number: int) -> Path:
        """Folder of a round."""
        return self.path / f"round-{number:06d}"

    def picture(self, number: int, group: int, member: int, suffix: str) -> Path:
        """Path of the picture of one sample of a group of a round."""
        return self.folder(number) / f"group-{group:05d}-{member:03d}{suffix}"

    def write(self, number: int, group: int, key: str, sampled: Group) -> None:
        """Write a group, whose pictures are there already.

        Raises:
            OSError: The disk is full, or the folder cannot be written.
        """
        file = self._file(number, group)
        save_safetensors(sampled.tensors, file)
        scores = {name: [None if x != x else x for x in values.tolist()] for name, values in sampled.scores.items()}
        content = {"prompt": sampled.prompt, "seeds": list(sampled.seeds), "scores": scores}
        write_text(file.with_suffix(".json"), to_json({"key": key, "digest": digest_of(file), **content}))

    def holds(self, number: int, group: int, key: str) -> bool:
        """Whether a group is there, undamaged, and was made with this key."""
        return self._index(number, group, key) is not None

    def read(self, number: int, group: int, key: str) -> Group:
        """Read a group that `holds` found.

        Raises:
            ValueError: It is not there: the processes do not see the same folder.
        """
        index = self._index(number, group, key)
        if index is None:
            raise ValueError(
                f"{self._file(number, group)} was sampled by another process, but is not here; expected run_dir on a "
                "file system that all machines share: set output_root=… to one."
            )
        scores = {n: torch.tensor([float("nan") if x is None else x for x in v]) for n, v in index["scores"].items()}
        return Group(index["prompt"], index["seeds"], load_state_dict(self._file(number, group)), scores)

    def prune(self, newest: int, keep: int) -> None:
        """Delete all rounds but the last `keep` up to the `newest`."""
        for folder in self.path.glob("round-*"):
            name = FOLDER.fullmatch(folder.name)
            if name and int(name[1]) <= newest - keep:
                shutil.rmtree(folder)

    def _file(self, number: int, group: int) -> Path:
        return self.folder(number) / f"group-{group:05d}.safetensors"

    def _index(self, number: int, group: int, key: str) -> dict[str, Any] | None:
        file = self._file(number, group)
        path = file.with_suffix(".json")
        if not path.exists():
            return None
        try:
            index = read_json(path)
            if not fits(index, INDEX) or digest_of(file) != index["digest"]:
                raise ValueError("its checksum or its content differs from what was written")
        except (OSError, *MALFORMED) as error:
            logger.warning("%s is damaged, and its prompt is sampled again: %s", file, error)
            return None
        return index if index["key"] == key else None
