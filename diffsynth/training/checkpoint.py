"""Checkpoints: the training state on disk, to resume from.

A checkpoint is a folder `step-N`. It appears under that name only when it is complete, and its checksums are verified
before it is loaded. It holds trained weights, optimizers, schedules, EMA and counters, but no frozen weights.
"""

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from accelerate.utils import broadcast_object_list
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from ..core.advice import how_to_start_from
from ..core.data.cache.mapped import DTYPES
from ..core.data.cache.shards import MALFORMED
from ..core.files import digest_of, remove_leftovers, replacing_folder, write_text
from ..core.json_text import to_json
from ..core.loader import save_safetensors
from ..core.ranges import PositiveInt, check_fields
from ..core.regular import require_regular
from ..core.safe_tree import join_state, split_state
from .restorable import DamagedCheckpoint, expect

if TYPE_CHECKING:
    from accelerate import Accelerator

    from .state import TrainingState

logger = logging.getLogger(__name__)

INDEX = "checkpoint.json"
FILE_BYTES = 4 * 2**30  # a guess: tensors are copied to host memory one file at a time, so this bounds that memory
RESERVE_BYTES = 64 * 2**20  # a guess: disk space left free for logs and images
INDEX_BYTES = 2**28  # a guess: the index of the largest models is a thousandth of that
FILE_NAME = re.compile(r"[\w.-]+-\d+\.safetensors")


@dataclass
class Checkpoints:
    """Saves the training state every N steps, deletes old checkpoints, and resumes from the newest one.

    Args:
        path: Folder of the checkpoints; each checkpoint is a folder `step-N` in it.
        every: Optimizer steps between checkpoints; None saves only at the end and when a signal stops the run.
        keep_last: Number of the newest checkpoints to keep.
        keep_every: Checkpoints of steps that are multiples of this are kept as well; None keeps no others.
    """

    path: str | Path
    every: PositiveInt | None = None
    keep_last: PositiveInt = 2
    keep_every: PositiveInt | None = None
    saves: ClassVar[bool] = True

    def __post_init__(self):
        self.path = Path(self.path)
        check_fields(self, "checkpoint.")

    def due(self, step: int) -> bool:
        """Whether a checkpoint is saved after `step` optimizer steps."""
        return step > 0 and self.every is not None and step % self.every == 0

    def resume(self, accelerator: "Accelerator", state: "TrainingState", identity: Mapping[str, Any]) -> bool:
        """Load the newest undamaged checkpoint into `state`; return whether there was one. All processes call it.

        Args:
            identity: Fingerprints by name that must equal those in the checkpoint.

        Raises:
            ValueError: The run's data, template or model differs from the checkpoint's, or its length does and the
                learning rate schedule does not allow that.
        """
        found = [None]
        if accelerator.is_main_process and self.path.is_dir():
            remove_leftovers(self.path)
            try:
                found = [self.newest_for(state)]
            except ValueError as error:  # broadcast, so that all processes raise it and none waits
                found = [str(error)]
        (newest,) = broadcast_object_list(found)
        if isinstance(newest, str):
            raise ValueError(newest)
        if newest is None:
            return False
        folder, content = newest
        _check_identity(folder, content["identity"], identity)
        state.restore(partial(load_part, folder, content))
        logger.info("Resuming from step %d, from %s.", state.step, folder)
        return True

    def save_if_due(
        self, accelerator: "Accelerator", state: "TrainingState", identity: Mapping[str, Any], last: bool
    ) -> None:
        """Save `state` if a checkpoint is due or this is the run's `last` step; all processes call it."""
        if last or self.due(state.step):
            self.save(accelerator, state, identity, last)

    def save(self, accelerator: "Accelerator", state: "TrainingState", identity: Mapping[str, Any], last: bool) -> None:
        """Save `state`; all processes call it.

        A full disk is a warning, because there may be room again at the next checkpoint; for the `last` checkpoint it
        is an error. A state in a row of bad steps may have diverged: it deletes no older checkpoint.
        """
        parts = state.trees()
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            try:
                self.write(state.step, parts, identity, prunes=not state.skipped_in_a_row)
            except OSError as error:
                if last:
                    raise
                logger.warning("The checkpoint of step %d is not saved: %s", state.step, error)
        accelerator.wait_for_everyone()

    def write(
        self, step: int, parts: Mapping[str, Any], identity: Mapping[str, Any] | None = None, prunes: bool = True
    ) -> Path:
        """Write the trees of `parts` as the checkpoint of `step`, then delete old checkpoints if `prunes`.

        Raises:
            OSError: The disk is full, or the folder cannot be written; older checkpoints are untouched.
        """
        folder = self.path / f"step-{step:06d}"
        split = {name: split_state(tree) for name, tree in parts.items()}
        size = sum(tensor.nbytes for _, tensors in split.values() for tensor in tensors.values())
        self.check_room(size)
        with replacing_folder(folder) as unfinished:
            for name, (_, tensors) in split.items():
                for number, shard in enumerate(_shards(tensors)):
                    save_safetensors(shard, unfinished / f"{name}-{number:05d}.safetensors")
            files = {file.name: digest_of(file) for file in sorted(unfinished.iterdir())}
            plain = {name: plain for name, (plain, _) in split.items()}
            content = {"step": step, "identity": dict(identity or {}), "parts": plain, "files": files}
            write_text(unfinished / INDEX, to_json({"digest": _digest_of(content), "content": content}))
        if prunes:
            self._prune(step)
        return folder

    def check_room(self, size: int, count: int = 1) -> None:
        """Check that `count` checkpoints of `size` bytes fit on the disk of their folder.

        Raises:
            OSError: They do not fit.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        needed, free = count * size + RESERVE_BYTES, shutil.disk_usage(self.path).free
        if free < needed:
            raise OSError(
                f"{'A checkpoint takes' if count == 1 else f'{count} checkpoints take'} {_gigabytes(needed)}, but "
                f"{self.path} has {_gigabytes(free)} free: make room, or set output_root=… to a larger disk. "
                f"{self.kept()}"
            )

    def kept(self) -> str:
        """Say in a sentence which checkpoint is the newest."""
        newest = max(self.steps(), default=None)
        return "There is no checkpoint yet." if newest is None else f"The newest checkpoint, of step {newest}, is kept."

    def most(self, steps: int) -> int:
        """Return the largest number of checkpoints that a run of `steps` has at a time."""
        saved = {steps} if self.every is None else {steps, *range(self.every, steps, self.every)}
        kept_as_well = [] if self.keep_every is None else [step for step in saved if step % self.keep_every == 0]
        return min(len(saved), len(kept_as_well) + self.keep_last + 1)

    def check_room_for_run(self, size: int, steps: int) -> None:
        """Check that the checkpoints of a run of `steps` fit, those that it has saved before it was resumed included.

        Raises:
            OSError: They do not fit.
        """
        self.check_room(size, max(self.most(steps) - len(self.steps()), 1))

    def newest(self) -> tuple[Path, dict] | None:
        """Return folder and content of the newest undamaged checkpoint; a warning names each damaged one."""
        return next(self.undamaged(), None)

    def undamaged(self, state: "TrainingState | None" = None) -> Iterator[tuple[Path, dict]]:
        """Yield folder and content of undamaged checkpoints, newest first; a warning names each damaged one.

        Args:
            state: One that holds no training state of this kind counts as damaged; None does not check that.
        """
        for step in sorted(self.steps(), reverse=True):
            folder = self.path / f"step-{step:06d}"
            try:
                content = read_checkpoint(folder)
                if state is not None:
                    check_content(folder, content, state)
            except DamagedCheckpoint as error:
                logger.warning("Skipping a damaged checkpoint: %s", error)
            else:
                yield folder, content

    def newest_for(self, state: "TrainingState") -> tuple[Path, dict] | None:
        """Return the newest undamaged checkpoint that `state`'s run also reaches; None if there is no checkpoint.

        The run may have another length than the one that saved the checkpoint. It reaches the checkpoint if both have
        the same learning rates up to that step.

        Raises:
            ValueError: The run ends before the newest checkpoint, or it reaches none of them.
        """
        unreached = []
        for folder, content in self.undamaged(state):
            if content["step"] > state.steps:
                raise ValueError(
                    f"{self.path.parent} has a checkpoint of step {content['step']}, but this run has only "
                    f"{state.steps} steps: set max_steps to at least {content['step']}, or name=… for a separate run."
                )
            if state.goes_through(content["parts"]["counters"]):
                return folder, content
            unreached.append(content["step"])
        if unreached:
            raise ValueError(
                f"{self.path.parent} cannot be extended to {state.steps} steps: at each of its checkpoints (step "
                f"{', '.join(map(str, unreached))}) the schedule of the learning rate already depends on the "
                f"number of steps. {how_to_start_from(self.path.parent)}"
            )
        return None

    def steps(self) -> list[int]:
        """Return the steps that have a checkpoint, damaged ones among them."""
        names = [re.fullmatch(r"step-(\d+)", folder.name) for folder in self.path.glob("step-*")]
        return [int(name[1]) for name in names if name]

    def _prune(self, newest: int) -> None:
        steps = sorted(step for step in self.steps() if step <= newest)  # later ones are damaged: resuming skipped them
        for step in steps[: -self.keep_last]:
            if self.keep_every is None or step % self.keep_every:
                shutil.rmtree(self.path / f"step-{step:06d}")


def _check_identity(folder: Path, saved: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    if unknown := [name for name in identity if name not in saved]:
        logger.warning(
            "%s is of an older version, which recorded no fingerprint of %s: whether that has changed is not known.",
            folder,
            ", ".join(unknown),
        )
    for name, now in identity.items():
        if saved.get(name, now) != now:
            raise ValueError(
                f"{folder} was saved with another {name}: its fingerprint was {saved.get(name)} and is {now} now. "
                f"Restore the old {name}, or set name=… to start a new run."
            )


def read_checkpoint(folder: Path) -> dict:
    """Verify a checkpoint and return its content: step, identity, parts without their tensors, and files.

    Raises:
        DamagedCheckpoint: A file is missing or its checksum differs, or the index is none.
    """
    try:
        content = _read_index(folder / INDEX)
    except DamagedCheckpoint as error:
        raise DamagedCheckpoint(f"{folder / INDEX} is damaged: {error}.") from error
    except (OSError, *MALFORMED) as error:
        raise DamagedCheckpoint(f"{folder / INDEX} cannot be read: {error!r:.300}") from error
    for name, expected in content["files"].items():
        if not (folder / name).is_file():
            raise DamagedCheckpoint(f"{folder / name} is missing.")
        if digest_of(folder / name) != expected:
            raise DamagedCheckpoint(f"{folder / name} is damaged: its checksum differs.")
    return content


def _read_index(path: Path) -> dict:
    require_regular(path)
    expect(path.stat().st_size <= INDEX_BYTES, f"at most {INDEX_BYTES} bytes")
    index = json.loads(path.read_text(encoding="utf-8"))
    content, digest = index["content"], index["digest"]
    if _digest_of(content) != digest:
        raise DamagedCheckpoint("its checksum differs")
    expect(all(isinstance(content[name], dict) for name in ("identity", "parts", "files")), "identity, parts and files")
    expect(type(content["step"]) is int and content["step"] >= 0, "a number of steps")
    expect(all(map(FILE_NAME.fullmatch, content["files"])), "names such as weights-00000.safetensors")
    return content


def check_content(folder: Path, content: Mapping, state: "TrainingState") -> None:
    """Check what a checkpoint holds before it is loaded; of its tensors only the headers are read.

    Raises:
        DamagedCheckpoint: It is no training state; names the folder.
        ValueError: It is the state of another model.
    """
    try:
        state.check(partial(load_part, folder, content, read=_on_meta))
    except DamagedCheckpoint as error:
        raise DamagedCheckpoint(f"{folder} holds no training state: {error}.") from error
    except (KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:  # RecursionError among them
        raise DamagedCheckpoint(f"{folder} holds no training state: {error!r:.300}.") from error


def load_part(folder: Path, content: Mapping, name: str, read: Callable[[Path], dict[str, Tensor]] = load_file) -> Any:
    """Read one part of a checkpoint as a tree with its tensors on the CPU.

    Args:
        read: Returns the tensors of a file by name.

    Raises:
        DamagedCheckpoint: The part, or a tensor of it, is not there.
    """
    try:
        files = [file for file in content["files"] if file.rpartition("-")[0] == name]
        tensors = {key: tensor for file in files for key, tensor in read(folder / file).items()}
        return join_state(content["parts"][name], tensors)
    except (OSError, *MALFORMED) as error:
        raise DamagedCheckpoint(f"{folder} has no {name}: {error!r:.300}") from error


def _on_meta(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file by name, on the meta device: with shapes and dtypes only."""
    with safe_open(path, "pt") as file:
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 - it is no dict
        headers = {key: (each.get_shape(), DTYPES[each.get_dtype()]) for key, each in slices.items()}
    return {key: torch.empty(shape, dtype=dtype, device="meta") for key, (shape, dtype) in headers.items()}


def _shards(tensors: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Split tensors into groups of at most `FILE_BYTES`, unless a single tensor is larger."""
    shard, size = {}, 0
    for key, tensor in tensors.items():
        if shard and size + tensor.nbytes > FILE_BYTES:
            yield shard
            shard, size = {}, 0
        shard[key] = tensor
        size += tensor.nbytes
    if shard:
        yield shard


def _digest_of(content: Any) -> str:
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.3g} GB"
