"""Before weights are read: does the run fit where it is, and if a budget is given, which recipe fits that."""

import json
import logging
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch
from accelerate.utils import broadcast_object_list

from ..core.files import write_text
from ..core.loader import ModelConfig
from ..core.memory import MemoryRecipe
from ..core.memory.sizes import shown_size
from ..training.engines import Engine
from ..training.run import Run
from .budget import Budget, BudgetChoice
from .meta_pipeline import file_bytes
from .plan import Plan, Planner
from .run import PlanRun
from .shares import shares

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

MOST_BYTES = 12  # in training, for each byte of a file: fp32 weights, gradients, Adam, an average, of bf16
SMALL = 0.1  # of a device: up to there a run is not rehearsed, which would take longer than many of its steps


def preflight(run: Run, accelerator: "Accelerator", engine: Engine) -> Run:
    """The run with the recipe and the micro-batch size that it is to be trained with; all processes call it.

    What was chosen for a budget is written into the run's folder, and read from there when the run is resumed.

    Raises:
        ValueError: It does not fit the device, or nothing fits the budget.
    """
    device, recipe = accelerator.device, run.memory
    if recipe.budget is None and (not recipe.check or is_small(run.model, free_bytes(device))):
        return run
    placement = {"processes": accelerator.num_processes, "engine": engine.file, "cp_size": engine.cp_size}
    planned = PlanRun.of(run, **placement, on_cuda=device.type == "cuda")
    found = [None]
    if accelerator.is_main_process:
        try:
            found = [settle(Planner(planned), Path(run.run_dir) / "memory.json", device)]
        except (ValueError, OSError) as error:  # told by all, or the others would wait
            found = [str(error)]
    (settled,) = broadcast_object_list(found)
    if isinstance(settled, str):
        raise ValueError(settled)
    memory, micro_batch_size = settled
    return replace(run, memory=memory, micro_batch_size=micro_batch_size)


def settle(planner: Planner, record: Path, device: torch.device) -> tuple[MemoryRecipe, int | None]:
    """Recipe and micro-batch size: those of the configuration, or what was chosen for its budget; checked."""
    run = planner.run
    settled = run.memory, run.micro_batch_size
    if run.memory.budget is not None and record.exists():
        kept = json.loads(record.read_text())
        settled = replace(run.memory, **kept["recipe"]), kept["micro_batch_size"]
        planner = planner.variant(*settled)
    elif run.memory.budget is not None:
        choice = Budget(planner, *run.memory.budgets).choose()
        logger.info("memory.budget=%s: %s", run.memory.budget, choice.why)
        write_text(record, json.dumps(as_record(choice), indent=1))
        settled, planner = (choice.option.recipe, choice.option.micro_batch_size), choice.planner
    if run.memory.check:
        check(run, planner.plan(largest_only=True), device)
    return settled


def as_record(choice: BudgetChoice) -> dict:
    return {
        "recipe": asdict(choice.option.recipe),
        "micro_batch_size": choice.option.micro_batch_size,
        "device_bytes": choice.need.device,
        "host_bytes": choice.need.host,
        "slowdown": choice.option.slowdown,
        "why": choice.why,
    }


def is_small(model: Callable, free: int) -> bool:
    """Whether all of the weights, trained in full, take a small part of what is free."""
    sizes = [file_bytes(part) for part in model.keywords.values() if isinstance(part, ModelConfig)]
    return None not in sizes and MOST_BYTES * sum(sizes) < SMALL * free


def check(run: PlanRun, plan: Plan, device: torch.device) -> None:
    """Refuse a run that needs more than the device has free.

    Raises:
        ValueError: Names both amounts and what to do.
    """
    free = free_bytes(device)
    share = next(share for share in shares(plan.footprint, run.processes) if share.engine == run.engine)
    needed = run.estimated(share.device + plan.worst.peak - plan.footprint.peak)
    logger.info("Planned: %s of %s free on %s.", shown_size(needed), shown_size(free), device)
    if needed > free:
        raise ValueError(
            f"This run needs {shown_size(needed)} on {device}, which has {shown_size(free)} free: set memory.budget="
            f"{free >> 30}GiB to have a recipe chosen that fits, see `python plan.py` for what takes it, or set "
            "memory.check=false to try all the same."
        )


def free_bytes(device: torch.device) -> int:
    """Of the device's memory, or of the host's where that is the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    return psutil.virtual_memory().available
