"""State to resume from: whole or not there, checked before it is used, and never the frozen base."""

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file
from torch import Tensor

from ..core.files import remove_leftovers, replacing_folder, write_text
from ..core.loader import save_safetensors
from ..core.safe_tree import join_state, split_state

if TYPE_CHECKING:
    from .state import TrainingState

logger = logging.getLogger(__name__)

INDEX = "checkpoint.json"
FILE_BYTES = 4 * 2**30  # tensors are copied to the host one file at a time
RESERVE_BYTES = 64 * 2**20  # left free for logs and pictures


class DamagedCheckpoint(ValueError):
    """A checkpoint that is not what was written; the message says in what."""


@dataclass
class Checkpoints:
    """Saves what training changed, and finds it again.

    Args:
        path: Their folder; one folder `step-N` each.
        every: Optimizer steps between two; None saves at the end, and when the run is asked to stop, only.
        keep_last: How many of the newest are kept.
        keep_every: Those of steps that this divides are kept as well.
    """

    path: str | Path
    every: int | None = None
    keep_last: int = 2
    keep_every: int | None = None
    saves: ClassVar[bool] = True

    def __post_init__(self):
        self.path = Path(self.path)
        for name in ("every", "keep_last", "keep_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"checkpoint.{name} is {value}; expected at least 1.")

    def due(self, step: int) -> bool:
        return step > 0 and self.every is not None and step % self.every == 0

    def resume(self, accelerator, state, identity: Mapping[str, Any]) -> bool:
        """Restore `state` from the newest whole checkpoint; whether there was one. All processes call it.

        Args:
            identity: What must be as it was when the checkpoint was saved, by name.

        Raises:
            ValueError: The run has other data, or another model, than when it was saved; or it had another length, and
                cannot be extended to this one.
        """
        found = [None]
        if accelerator.is_main_process and self.path.is_dir():
            remove_leftovers(self.path)
            try:
                found = [self.newest_for(state)]
            except ValueError as error:  # told by all, or the others would wait
                found = [str(error)]
        (newest,) = broadcast_object_list(found)
        if isinstance(newest, str):
            raise ValueError(newest)
        if newest is None:
            return False
        folder, content = newest
        _check_identity(folder, content["identity"], identity)
        state.restore(partial(load_part, folder, content))
        logger.info("Going on from step %d, which %s holds.", state.step, folder)
        return True

    def keep_if_due(self, accelerator, state, identity: Mapping[str, Any], last: bool) -> None:
        """Save `state` after the `last` step, and after steps that `every` divides; all processes call it."""
        if last or self.due(state.step):
            self.keep(accelerator, state, identity, last)

    def keep(self, accelerator, state, identity: Mapping[str, Any], last: bool) -> None:
        """Save `state`; all processes call it.

        A disk without room costs a warning, as somebody may make room before the next one; the `last` has no next one.
        """
        parts = state.trees()
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            try:
                self.save(state.step, parts, identity)
            except OSError as error:
                if last:
                    raise
                logger.warning("Step %d is not kept: %s", state.step, error)
        accelerator.wait_for_everyone()

    def save(self, step: int, parts: Mapping[str, Any], identity: Mapping[str, Any] | None = None) -> Path:
        """Write the trees of `parts` as the checkpoint of this step, then delete those that are not kept.

        Raises:
            OSError: There is no room, or the folder cannot be written; what was saved before is untouched.
        """
        folder = self.path / f"step-{step:06d}"
        split = {name: split_state(tree) for name, tree in parts.items()}
        size = sum(tensor.nbytes for _, tensors in split.values() for tensor in tensors.values())
        self.check_room(size)
        with replacing_folder(folder) as unfinished:
            for name, (_, tensors) in split.items():
                for number, shard in enumerate(_shards(tensors)):
                    save_safetensors(shard, unfinished / f"{name}-{number:05d}.safetensors")
            files = {file.name: _digest(file) for file in sorted(unfinished.iterdir())}
            plain = {name: plain for name, (plain, _) in split.items()}
            content = {"step": step, "identity": dict(identity or {}), "parts": plain, "files": files}
            write_text(unfinished / INDEX, json.dumps({"digest": _digest_of(content), "content": content}))
        self._prune(step)
        return folder

    def check_room(self, size: int, count: int = 1) -> None:
        """Raise OSError if `count` checkpoints of `size` bytes do not fit where they are written."""
        self.path.mkdir(parents=True, exist_ok=True)
        needed, free = count * size + RESERVE_BYTES, shutil.disk_usage(self.path).free
        if free < needed:
            kept = max(self.steps(), default=None)
            raise OSError(
                f"{'A checkpoint takes' if count == 1 else f'{count} checkpoints take'} {_gigabytes(needed)}, but "
                f"{self.path} has {_gigabytes(free)} free: make room, or set output_root=… to a larger disk. "
                f"{'There is none yet.' if kept is None else f'The last good one, of step {kept}, is kept.'}"
            )

    def check_room_for_run(self, size: int) -> None:
        """Raise OSError if those of a whole run do not fit: what is kept, and one more while it is written."""
        most = 1 if self.every is None else self.keep_last + 1
        self.check_room(size, max(most - len(self.steps()), 1))

    def newest(self) -> tuple[Path, dict] | None:
        """The newest checkpoint that is whole, and its content."""
        return next(self.whole(), None)

    def whole(self) -> Iterator[tuple[Path, dict]]:
        """Checkpoints and their content, the newest first; those that are damaged are named and passed over."""
        for step in sorted(self.steps(), reverse=True):
            folder = self.path / f"step-{step:06d}"
            try:
                yield folder, read_checkpoint(folder)
            except DamagedCheckpoint as error:
                logger.warning("Passing over a damaged checkpoint: %s", error)

    def newest_for(self, state: "TrainingState") -> tuple[Path, dict] | None:
        """The newest whole checkpoint that a run of this length goes through; None where there is no checkpoint.

        Raises:
            ValueError: There are checkpoints, but it goes through none of them, or it ends before the newest.
        """
        passed_over = []
        for folder, content in self.whole():
            if content["step"] > state.steps:
                raise ValueError(
                    f"{self.path.parent} is at step {content['step']}, beyond the {state.steps} steps that are asked "
                    f"for: set name=… for a run of {state.steps} steps."
                )
            if state.goes_through(content["parts"]["counters"]):
                return folder, content
            passed_over.append(content["step"])
        if passed_over:
            raise ValueError(
                f"{self.path.parent} cannot be extended to {state.steps} steps: in all of its checkpoints (of step "
                f"{', '.join(map(str, passed_over))}) the learning rate already follows the end of another length. "
                f"Start from what is in {self.path.parent}/weights by lora.checkpoint=… or model.dit.path=…, or set "
                "name=… to start anew."
            )
        return None

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, whole or not."""
        names = [re.fullmatch(r"step-(\d+)", folder.name) for folder in self.path.glob("step-*")]
        return [int(name[1]) for name in names if name]

    def _prune(self, newest: int) -> None:
        steps = sorted(step for step in self.steps() if step <= newest)  # later ones were passed over
        for step in steps[: -self.keep_last]:
            if self.keep_every is None or step % self.keep_every:
                shutil.rmtree(self.path / f"step-{step:06d}")


def _check_identity(folder: Path, saved: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    for name, now in identity.items():
        if saved.get(name) != now:
            raise ValueError(
                f"{folder} was made with another {name} ({saved.get(name)}, now {now}): bring the old one back, or "
                f"set name=… to start a new run."
            )


def read_checkpoint(folder: Path) -> dict:
    """The verified content of a checkpoint: its step, its parts without their tensors, its files.

    Raises:
        DamagedCheckpoint: A file is missing, cut off or altered.
    """
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        content, digest = index["content"], index["digest"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpoint(f"{folder / INDEX} cannot be read: {error!r}") from error
    if _digest_of(content) != digest:
        raise DamagedCheckpoint(f"{folder / INDEX} is not what was written: its checksum differs.")
    for name, expected in content["files"].items():
        if not (folder / name).is_file():
            raise DamagedCheckpoint(f"{folder / name} is missing.")
        if _digest(folder / name) != expected:
            raise DamagedCheckpoint(f"{folder / name} is not what was written: its checksum differs.")
    return content


def load_part(folder: Path, content: Mapping, name: str) -> Any:
    """One tree of a checkpoint, its tensors on the CPU."""
    files = [file for file in content["files"] if file.rpartition("-")[0] == name]
    tensors = {key: tensor for file in files for key, tensor in load_file(folder / file).items()}
    return join_state(content["parts"][name], tensors)


def _shards(tensors: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """The tensors in groups of about `FILE_BYTES`."""
    shard, size = {}, 0
    for key, tensor in tensors.items():
        if shard and size + tensor.nbytes > FILE_BYTES:
            yield shard
            shard, size = {}, 0
        shard[key] = tensor
        size += tensor.nbytes
    if shard:
        yield shard


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _digest_of(content: Any) -> str:
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.3g} GB"
