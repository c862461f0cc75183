"""Before weights are read: checks that a run fits its device, and chooses memory options that fit a given budget."""

import logging
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate.utils import broadcast_object_list

from ..core.data.order.buckets import shown
from ..core.devices import free_host_memory
from ..core.files import write_text
from ..core.json_text import read_json, to_json
from ..core.loader import ModelConfig
from ..core.memory import MemoryRecipe
from ..core.memory.sizes import shown_size
from ..diffusion.pipeline.request import defaults_of
from ..training.engines import Engine
from ..training.run import Run
from .budget import Budget, BudgetChoice
from .meta_pipeline import file_bytes
from .plan import Plan, Planner
from .run import PlacedRun
from .shares import shares

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

# Bytes of training per byte of a bf16 file, at most: 2 each for fp32 weights, gradients and EMA, 4 for Adam's state,
# and 2 for everything else, which is a guess.
MOST_BYTES = 12
# An adapter of full rank has twice the parameters of its layer, all of them trained.
MOST_BYTES_WITH_ADAPTER = 3 * MOST_BYTES
# Bytes of activations per pixel, at most; a guess: an autoencoder with 96 channels at the full size, as released ones
# have, keeps about ten tensors in fp32.
PIXEL_BYTES = 4096
# A guess: a run that takes less than this share of the device is not rehearsed, as that takes longer than many steps.
SMALL = 0.1


def preflight(run: Run, accelerator: "Accelerator", engine: Engine) -> Run:
    """Return the run with the memory options and the micro-batch size to train it with; all processes call it.

    A choice by budget is written to the run's folder, and read from there when the run is resumed.

    Raises:
        ValueError: The run does not fit the device, or no memory options fit the budget.
    """
    device, recipe = accelerator.device, run.memory
    if recipe.budget is None and not recipe.check:
        return run
    placement = {"processes": accelerator.num_processes, "engine": engine.file, "cp_size": engine.cp_size}
    planned = PlacedRun.of(run, **placement, on_cuda=device.type == "cuda")
    found = [(recipe, run.micro_batch_size)]
    if accelerator.is_main_process and (recipe.budget or not is_small(planned, free_bytes(device))):
        try:
            found = [settle(Planner(planned), Path(run.run_dir) / "memory.json", device)]
        except (ValueError, OSError) as error:  # broadcast, because the other processes wait for a result
            found = [str(error)]
    (settled,) = broadcast_object_list(found)
    if isinstance(settled, str):
        raise ValueError(settled)
    memory, micro_batch_size = settled
    return replace(run, memory=memory, micro_batch_size=micro_batch_size)


def settle(planner: Planner, record: Path, device: torch.device) -> tuple[MemoryRecipe, int | None]:
    """Return memory options and micro-batch size: as configured, or chosen by budget; then check that they fit.

    Args:
        planner: Plans the run as it is configured.
        record: File of the choice by budget; if it exists, the run is resumed and its content is used.
        device: The run's device.
    """
    run = planner.run
    if run.memory.check:
        check_one_image(run, free_bytes(device))
    settled = run.memory, run.micro_batch_size
    if run.memory.budget is None:
        planner = planner.quickest()
    elif record.exists():
        settled = _chosen(run, record)
        planner = planner.variant(*settled).quickest()
    else:
        choice = Budget(planner, *run.memory.budgets).choose()
        logger.info("memory.budget=%s: %s", run.memory.budget, choice.why)
        write_text(record, to_json(as_record(choice), indent=1))
        settled, planner = (choice.option.recipe, choice.option.micro_batch_size), choice.planner
    if run.memory.check:
        check(run, planner.plan(largest_only=True), device)
    return settled


def _chosen(run: Run, record: Path) -> tuple[MemoryRecipe, int | None]:
    """Return the memory options and micro-batch size that an earlier start of the run chose.

    Raises:
        ValueError: The file is damaged.
    """
    chosen = read_json(record)
    try:
        return replace(run.memory, **chosen["recipe"]), chosen["micro_batch_size"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{record} holds no choice by memory.budget ({error!r}); delete it, and the run chooses again."
        ) from error


def as_record(choice: BudgetChoice) -> dict:
    """Return the content of memory.json in the run's folder."""
    return {
        "recipe": asdict(choice.option.recipe),
        "micro_batch_size": choice.option.micro_batch_size,
        "device_bytes": choice.need.device,
        "host_bytes": choice.need.host,
        "slowdown": choice.option.slowdown,
        "why": choice.why,
    }


def is_small(run: PlacedRun, free: int) -> bool:
    """Whether all weights are on disk and would take, trained and with a batch, a small share of the `free` bytes.

    This reads sizes of files and of images, and builds nothing.
    """
    sizes = [file_bytes(part) for part in run.model.keywords.values() if isinstance(part, ModelConfig)]
    if None in sizes:
        return False
    weights = (MOST_BYTES_WITH_ADAPTER if run.lora else MOST_BYTES) * sum(sizes)
    return weights + PIXEL_BYTES * pixels_of(run) < SMALL * free


def pixels_of(run: PlacedRun) -> int:
    """Return the pixels of the largest micro-batch of the training, or of the validation's images if they are more."""
    sizes = [size for size in run.sizes if size is not None] or run.dataset.own_sizes
    trained = run.batches.micro_batch_size * max(map(math.prod, sizes), default=0)
    if not run.validation.prompts:
        return trained
    given = {name: value for name, value in run.validation.options.items() if value is not None}
    sampled = {**defaults_of(run.model.func.__self__.request), **given}
    of_one = sampled["height"] * sampled["width"] * sampled.get("num_frames", 1)
    return max(trained, len(run.validation.prompts) * of_one)


def check_one_image(run: PlacedRun, free: int) -> None:
    """Check that one image or clip fits, as RGB in fp32, before a rehearsal reads one: that takes host memory itself.

    Raises:
        ValueError: It does not.
    """
    size = max([size for size in run.sizes if size] or run.dataset.own_sizes, key=math.prod, default=(0, 0))
    needed = 3 * torch.float32.itemsize * math.prod(size)
    if needed > free:
        kind, fewer = ("image", "") if len(size) == 2 else ("clip", "fewer dataset.num_frames, or ")
        raise ValueError(
            f"One {kind} of {shown(size)} takes {shown_size(needed)} by itself, and {shown_size(free)} are "
            f"free: set {fewer}dataset.height=… and dataset.width=…, or dataset.max_pixels=…, to a smaller size."
        )


def check(run: PlacedRun, plan: Plan, device: torch.device) -> None:
    """Check that the device has enough free memory for a run.

    Raises:
        ValueError: It has not; the message says how much is needed, how much is free, and what to set.
    """
    free = free_bytes(device)
    share = next(share for share in shares(plan.footprint, run.processes) if share.engine == run.engine)
    needed = run.estimated(share.device + plan.worst.peak - plan.footprint.peak)
    logger.info("Planned: %s of %s free on %s.", shown_size(needed), shown_size(free), device)
    if needed > free:
        raise ValueError(
            f"This run needs {shown_size(needed)} on {device}, which has {shown_size(free)} free: set memory.budget="
            f"{free >> 30}GiB to have memory options chosen that fit, run `python plan.py` with the same arguments to "
            "see what takes the memory, or set memory.check=false to try all the same."
        )


def free_bytes(device: torch.device) -> int:
    """Return the free bytes of a device's memory; for the CPU, those of host memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    return free_host_memory()
