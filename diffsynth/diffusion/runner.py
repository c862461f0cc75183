"""The one loop."""

import inspect
import math
from collections.abc import Callable
from functools import partial

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from ..core.data import AddressedDataset, BatchPlan, BatchSampler, SampleOrder
from .logger import LocalLogger, Meter, ModelLogger
from .training_module import DiffusionTrainingModule


def launch_training_task(
    accelerator,
    dataset,
    model: DiffusionTrainingModule,
    model_logger: ModelLogger,
    learning_rate: float = 1e-4,
    weight_decay: float = 0.01,
    num_epochs: float = 1,
    max_steps: int | None = None,
    batch_size: int | None = None,
    micro_batch_size: int | None = 1,
    optimizer: Callable | None = None,
    lr_scheduler: Callable | None = None,
    max_grad_norm: float | None = None,
    seed: int = 0,
    num_workers: int = 0,
    logger: LocalLogger | None = None,
    validation=None,
) -> int:
    """Train `model` on `dataset` and return the number of optimizer steps taken.

    Args:
        learning_rate, weight_decay: Of AdamW, when no `optimizer` is given.
        num_epochs, max_steps: Passes over the data set, or optimizer steps, which win.
        batch_size: Samples an optimizer step, over all devices; None takes one micro-batch a device.
        micro_batch_size: Samples a forward on one device.
        optimizer: `optimizer(parameters)`.
        lr_scheduler: `lr_scheduler(optimizer)`, stepped once an optimizer step; also given `num_training_steps` if
            it takes that.
        max_grad_norm: Clip the gradient's norm to this.
    """
    batch_size = batch_size or (micro_batch_size or 1) * accelerator.num_processes
    plan = BatchPlan(batch_size, micro_batch_size, accelerator.num_processes)
    steps = max_steps or math.ceil(num_epochs * len(dataset) / batch_size)

    optimizer = (optimizer or partial(torch.optim.AdamW, lr=learning_rate, weight_decay=weight_decay))(
        model.trainable_parameters()
    )
    schedule = _schedule(lr_scheduler, optimizer, steps)
    batches = _batches(accelerator, dataset, model, plan, steps, seed, num_workers)
    accelerator.gradient_accumulation_steps = plan.accumulation
    model, optimizer = accelerator.prepare(model, optimizer)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    meter, bar = Meter(accelerator), tqdm(total=steps, disable=not accelerator.is_main_process, dynamic_ncols=True)
    step = 0

    while True:
        done = step == steps

        # Look at what the last step left: the first, the last and every other pass through the same lines.
        _set_mode(optimizer, "eval")
        if logger is not None and step > 0 and (done or step % logger.every == 0):
            values = {**meter.read(), "lr": optimizer.param_groups[0]["lr"]}
            _report(accelerator, logger, bar, step, values)
        with meter.paused():
            if validation is not None and validation.due(step, done):
                _report(accelerator, logger, bar, step, validation.run(accelerator, model, step))
            model_logger.on_step_end(accelerator, model, step, _ended_epoch(step, batch_size, len(dataset)), done)
        if done:
            break

        # Accumulate the gradient of one batch.
        _set_mode(optimizer, "train")
        for _ in range(plan.accumulation):
            with accelerator.accumulate(model):
                losses = model(next(batches))
                accelerator.backward(losses.mean())
                meter.add_losses(losses)

        # Update.
        meter.add_step(accelerator.clip_grad_norm_(parameters, max_grad_norm or math.inf))
        optimizer.step()
        if schedule is not None:
            schedule.step()
        optimizer.zero_grad()
        step += 1
        bar.update()

    bar.close()
    return step


def choose_device(device: str) -> str:
    """The name of a device that is there: `auto` takes the best.

    Raises:
        ValueError: The device is unknown or not there.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    there = [name for name, present in available.items() if present]
    if device not in ("auto", *there):
        raise ValueError(f"device={device} is not available here; choose one of {['auto', *there]}.")
    return there[0] if device == "auto" else device


def make_accelerator(device: str, torch_dtype: str):
    """An accelerator on `device` that computes in `torch_dtype`; a fresh one in every job of a sweep."""
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=False)  # process-global, and mixed precision may differ
    return Accelerator(
        cpu=choose_device(device) == "cpu",
        mixed_precision="bf16" if torch_dtype == "bfloat16" else "no",
        # Released networks carry parameters that no loss reaches, such as the last block's text output.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )


def list_skipped(accelerator, dataset, run_dir: str) -> None:
    """Write the rows that any process has left out to `skipped.jsonl`; all processes call it."""
    from accelerate.utils import gather_object

    dataset.undecodable |= torch.stack(gather_object([dataset.undecodable])).any(0)
    if accelerator.is_main_process:
        dataset.write_skipped(f"{run_dir}/skipped.jsonl")


def _batches(accelerator, dataset, model, plan: BatchPlan, steps: int, seed: int, num_workers: int):
    """An iterator over this process's micro-batches."""
    sampler = BatchSampler(SampleOrder(len(dataset), seed), plan, accelerator.process_index, 0, steps)
    loader = DataLoader(
        AddressedDataset(dataset),
        batch_sampler=sampler,
        collate_fn=model.collate_fn,
        num_workers=num_workers,
        multiprocessing_context="spawn" if num_workers else None,
    )
    return iter(loader)


def _schedule(lr_scheduler: Callable | None, optimizer, steps: int):
    if lr_scheduler is None:
        return None
    takes_steps = "num_training_steps" in inspect.signature(lr_scheduler).parameters
    return lr_scheduler(optimizer, num_training_steps=steps) if takes_steps else lr_scheduler(optimizer)


def _set_mode(optimizer, mode: str) -> None:
    """Schedule-free optimizers keep two sets of weights: one to train on, one to look at and save."""
    switch = getattr(optimizer.optimizer, mode, None)
    if switch is not None:
        switch()


def _ended_epoch(step: int, batch_size: int, size: int) -> int | None:
    """The last pass over the data set that the step ended, counted from 0."""
    before, now = (max(n, 0) * batch_size // size for n in (step - 1, step))
    return now - 1 if now > before else None


def _report(accelerator, logger: LocalLogger | None, bar: tqdm, step: int, values: dict[str, float]) -> None:
    if not accelerator.is_main_process:
        return
    bar.set_postfix({name: f"{value:.3g}" for name, value in values.items()}, refresh=False)
    if logger is not None:
        logger.log(step, values)
