"""The one loop."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch.utils.data import DataLoader

from ..core.data import AddressedDataset, BatchPlan, BatchSampler, MixedOrder
from ..core.data.order.mixing import order_of
from ..core.devices import peak_memory
from ..core.files import write_text
from ..core.progress import Progress
from ..core.signals import leave_to_parent
from ..diffusion.logger import ModelLogger
from ..diffusion.training_module import DiffusionTrainingModule
from .bad_steps import BadSteps
from .checkpoint import Checkpoints
from .ema import EMA
from .engines import Engine, choose_engine
from .record.numbers import LocalLogger
from .state import TrainingState
from .stopping import Stopped, stop_on_signals
from .validation.validation import BANDS

DETAILS = ("_error", *(f"_band{number}" for number in range(1, BANDS + 1)))  # logged, but not shown on the console


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
    ema: EMA | None = None,
    checkpoints: Checkpoints | None = None,
    logger: LocalLogger | None = None,
    validation=None,
    bad_steps: BadSteps | None = None,
    engine: Engine | None = None,
) -> int:
    """Train `model` on `dataset` and return the number of optimizer steps taken.

    Args:
        learning_rate, weight_decay: Of AdamW, when no `optimizer` is given.
        num_epochs, max_steps: Passes over the data set, or optimizer steps, which win.
        batch_size: Samples an optimizer step, over all devices; None takes one micro-batch a device.
        micro_batch_size: Samples a forward on one device.
        optimizer, lr_scheduler: See `TrainingState`.
        max_grad_norm: Clip the gradient's norm to this.
        checkpoints: Where to go on from, if a run was here before.
        engine: How it is spread over processes; None is the one that the launcher's file asks for.

    Raises:
        Stopped: A signal asked for it; the state is saved.
        FloatingPointError: Too many steps in a row had a gradient that is not finite.
    """
    engine = engine or choose_engine(accelerator)
    batch_size = batch_size or (micro_batch_size or 1) * engine.replicas
    plan = BatchPlan(batch_size, micro_batch_size, engine.replicas)
    order = order_of(dataset, batch_size, seed)
    steps = max_steps or order.steps_of(num_epochs)
    optimizer = optimizer or partial(torch.optim.AdamW, lr=learning_rate, weight_decay=weight_decay)
    accelerator.gradient_accumulation_steps = plan.accumulation
    state = TrainingState(accelerator, model, optimizer, lr_scheduler, steps, ema, engine)
    resumed = checkpoints is not None and checkpoints.resume(accelerator, state)
    bad_steps = bad_steps or BadSteps()
    if accelerator.is_main_process:
        bad_steps.start(state.step)
        if checkpoints is not None:
            checkpoints.check_room_for_run(state.expected_bytes)
        if logger is not None:
            logger.start(state.step, resumed)
    sampler = BatchSampler(order, plan, engine.replica, state.step, steps - state.step)
    progress = Progress(steps, state.step, accelerator.is_main_process)
    look = partial(_look, accelerator, state, model_logger, logger, validation, progress)

    with stop_on_signals() as stop, _batches(dataset, model, sampler, num_workers) as batches:
        while True:
            done, asked = state.step == steps, stop.agreed(accelerator)

            # Look at what the last step left, and keep it; a run that was taken up again has already done so.
            state.set_mode("eval")
            with state.meter.paused():
                if not resumed:
                    look(epoch=_ended_epoch(order, state.step), done=done)
                    if checkpoints is not None and (done or asked or checkpoints.due(state.step)):
                        checkpoints.keep(accelerator, state, last=done or asked)
            if done or asked:
                break
            resumed = False

            # Accumulate the gradient of one batch.
            state.start_step()
            for number in range(plan.accumulation):
                with state.accumulating(last=number == plan.accumulation - 1):
                    torch.manual_seed(sampler.seed(state.step, number))  # for what the networks draw, such as dropout
                    state.backward(state.model(next(batches)))

            # Update.
            if not state.update(max_grad_norm):
                bad_steps.note(accelerator, state, sampler.step(state.step - 1))
            progress.advance(state.step)

    progress.close()
    if logger is not None and accelerator.is_main_process:
        logger.finish()
    if not done:
        raise Stopped(state.step, saved=checkpoints is not None)
    return state.step


def _look(accelerator, state, model_logger, logger, validation, progress, epoch: int | None, done: bool) -> None:
    """Numbers, pictures and weights of the step that was taken last, each when it is due."""
    values, pictures = {}, {}
    if logger is not None and state.step > 0 and (done or state.step % logger.every == 0):
        values = {**state.meter.read(), "lr": state.learning_rate, "memory_gb": peak_memory(accelerator.device)}
        if state.skipped_steps:
            values["skipped_steps"] = state.skipped_steps
    if validation is not None and validation.due(state.step, done):
        measured, pictures = validation.run(accelerator, state)
        values |= measured
    if values:
        progress.show({name: value for name, value in values.items() if not name.endswith(DETAILS)})
    if logger is not None and accelerator.is_main_process:
        if values:
            logger.log(state.step, values)
        for name, path in pictures.items():
            logger.picture(state.step, name, path)
    due = model_logger.due(state.step, epoch, done, values)
    with state.exporting() if due else nullcontext():  # gathering weights copies them, as putting them in place does
        model_logger.on_step_end(accelerator, state.model, state.step, epoch, done, values)
    if state.ema and due:
        with state.using("ema"), state.exporting():
            model_logger.on_step_end(accelerator, state.model, state.step, epoch, done, values, "ema")


def record_data(accelerator, dataset, fingerprint: str, run_dir: str) -> None:
    """Write what is trained on to `data.json`, and the rows that any process left out to `skipped.jsonl`.

    All processes call it.
    """
    from accelerate.utils import gather_object

    dataset.undecodable |= torch.stack(gather_object([dataset.undecodable])).any(0)
    if accelerator.is_main_process:
        about = {"path": dataset.metadata_path, "rows": len(dataset), "fingerprint": fingerprint}
        write_text(f"{run_dir}/data.json", json.dumps(about, indent=1))
        dataset.write_skipped(f"{run_dir}/skipped.jsonl")


@contextmanager
def _batches(dataset, model, sampler: BatchSampler, num_workers: int) -> Iterator[Iterator]:
    """An iterator over this process's micro-batches."""
    loader = DataLoader(
        AddressedDataset(dataset, sampler.order.seed),
        batch_sampler=sampler,
        collate_fn=model.collate_fn,
        num_workers=num_workers,
        multiprocessing_context="spawn" if num_workers else None,
        worker_init_fn=leave_to_parent,
    )
    batches = iter(loader)
    try:
        yield batches
    finally:
        if num_workers:
            batches._shutdown_workers()  # after an error they would wait for a signal that they ignore


def _ended_epoch(order: MixedOrder, step: int) -> int | None:
    """The last pass over the data set that the step ended, counted from 0."""
    before, now = (order.pass_of(max(n, 0)) for n in (step - 1, step))
    return now - 1 if now > before else None
