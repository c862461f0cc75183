"""The training loop: `Trainer.fit`, and `launch_training_task`, which builds a `Trainer` from plain arguments."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Dataset

from ..core.data import AddressedDataset, BatchLayout, BatchSampler, MixedOrder, PlainData, TrainingData
from ..core.data.loading import WorkerKilled, loading
from ..core.devices import peak_memory, reset_peak_memory
from ..core.process.locks import require_held
from ..core.progress import ProgressBar
from ..diffusion.logger import ModelLogger
from ..diffusion.training_module import DiffusionTrainingModule
from .bad_steps import BadSteps
from .engines import Engine, choose_engine
from .run import LoopSettings, Run
from .schedule import warn_of_warmup
from .state import TrainingState
from .stopping import StopRequest, stop_on_signals
from .validation import BANDS

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

# Endings of the names of metrics that are logged but not shown beside the progress bar.
DETAILS = ("_error", *(f"_band{number}" for number in range(1, BANDS + 1)))


@dataclass(kw_only=True)
class Trainer(LoopSettings):
    """Trains a module whose weights are loaded.

    Args:
        accelerator: Device and precision.
        engine: Spreads the training over processes.
        module: Computes the losses of a batch of samples, and has the trained parameters.
        identity: Fingerprints by name that must be equal when the run is resumed.
        bad_steps: Handles steps whose gradient is not finite.

    The other arguments are those of `LoopSettings`.
    """

    accelerator: "Accelerator"
    engine: Engine
    module: DiffusionTrainingModule
    identity: Mapping[str, Any] = field(default_factory=dict)
    bad_steps: BadSteps = field(default_factory=BadSteps)

    def __post_init__(self):
        super().__post_init__()
        self.layout = BatchLayout(self.batch_size, self.micro_batch_size, self.engine.replicas)
        self.order = self.dataset.order(self.batch_size, self.seed, self.samples)
        self.steps = self.order.steps_of(self.num_epochs) if self.max_steps is None else self.max_steps
        warn_of_warmup(self.lr_scheduler, self.optimizer, self.steps)
        if self.ema.every > self.steps:
            raise ValueError(
                f"ema.every is {self.ema.every}, but the run has {self.steps} steps, so that the average would never "
                f"move; set it to {self.steps} or less."
            )

    @classmethod
    def of(
        cls, run: Run, accelerator: "Accelerator", engine: Engine, module: DiffusionTrainingModule, identity: Mapping
    ) -> "Trainer":
        """Return the trainer of a configured run and its training module."""
        settings = {each.name: getattr(run, each.name) for each in fields(LoopSettings)}
        bad_steps = BadSteps(f"{run.run_dir}/bad_steps.jsonl", run.max_bad_steps)
        return cls(
            **settings, accelerator=accelerator, engine=engine, module=module, identity=identity, bad_steps=bad_steps
        )

    def fit(self) -> int:
        """Train and return the number of optimizer steps taken.

        Raises:
            Stopped: A signal asked the run to stop; its state is saved.
            WorkerKilled: A process that loads data was killed; the run's state is saved.
            FloatingPointError: Too many steps in a row had a gradient that is not finite, or the last weights are not.
            OSError: The disk is full at the last export or checkpoint.
            FolderInUse: Another process has taken over the run's folder while this one stood still.
        """
        reset_peak_memory(self.accelerator.device)  # loading may have taken more
        state = self._build_state()
        resumed = recorded = self._begin(state)
        sampler = BatchSampler(self.order, self.layout, self.engine.replica, state.step, self.steps - state.step)
        bar = ProgressBar(self.steps, state.step, self.accelerator.is_main_process)

        casts = state.mixed_precision()
        with stop_on_signals() as stop, self._batches(sampler, stop) as batches, self.profile as profile, casts:
            while True:
                require_held()
                done, ends = self._ends(state, stop)

                # Log, evaluate, save and export the current weights. A resumed run has done so, except that the export,
                # which comes last, may be missing.
                state.set_mode("eval")
                with state.meter.paused():
                    if not recorded:
                        values = self._record(state, bar, done)
                        state.measured = {name: values[name] for name in values if name == self.export.keep_best}
                    self._save(state, done, ends, resumed)
                if ends:
                    break
                resumed = recorded = False

                # Sample what is trained on, if the run has rounds. A run that is stopped meanwhile, or whose samples
                # have collapsed, ends above.
                with state.meter.paused():
                    ready = self.rounds.begin(self.accelerator, state, stop, self.logger)
                if not ready:
                    recorded = not self.rounds.has_ended(state)
                    continue

                # Accumulate the gradient of one batch.
                state.set_mode("train")
                for number in range(self.layout.accumulation):
                    with state.accumulating(last=number == self.layout.accumulation - 1):
                        torch.manual_seed(sampler.seed(state.step, number))  # for dropout and the like in networks
                        state.backward(state.losses(next(batches)))

                # Update the weights.
                if not state.update(self.max_grad_norm):
                    addresses = sampler.step(state.step - 1)
                    self.bad_steps.note(self.accelerator, state, addresses, self.checkpoint.kept())
                bar.advance(state.step)
                profile.step()

        if done:
            self.rounds.finish(self.accelerator, state, self.logger)
        bar.close()
        if self.accelerator.is_main_process:
            self.logger.finish()
        if not done:
            raise stop.end(state.step, saved=self.checkpoint.saves)
        return state.step

    def _build_state(self) -> TrainingState:
        self.accelerator.gradient_accumulation_steps = self.layout.accumulation
        return TrainingState(
            self.accelerator, self.module, self.optimizer, self.lr_scheduler, self.steps, self.ema, self.engine
        )

    def _begin(self, state: TrainingState) -> bool:
        """Resume from the newest checkpoint and open the log files; return whether there was a checkpoint."""
        resumed = self.checkpoint.resume(self.accelerator, state, self.identity)
        if self.accelerator.is_main_process:
            self.bad_steps.start(state.step)
            self.checkpoint.check_room_for_run(state.expected_bytes, self.steps)
            self.logger.start(state.step, resumed)
        return resumed

    def _ends(self, state: TrainingState, stop: StopRequest) -> tuple[bool, bool]:
        """Return whether all steps are taken, and whether the loop ends, for that reason or by a signal."""
        done = state.step == self.steps or self.rounds.has_ended(state)
        return done, stop.agreed(self.accelerator) or done

    @contextmanager
    def _batches(self, sampler: BatchSampler, stop: StopRequest) -> Iterator[Iterator]:
        """Inside the block, an iterator over this process's micro-batches; workers are stopped at its end."""
        workers = self.dataset.workers_on(self.accelerator.device)
        dataset = AddressedDataset(self.dataset, sampler.order.seed, None if workers else self.module.remembers)
        with loading(dataset, workers, batch_sampler=sampler, collate_fn=self.module.collate_fn) as batches:
            yield self._to_step_end(batches, sampler, dataset, stop)

    def _to_step_end(
        self, batches: Iterator, sampler: BatchSampler, dataset: AddressedDataset, stop: StopRequest
    ) -> Iterator:
        """Yield the micro-batches; if a worker is killed, ask the run to stop and load the rest of its step here.

        So the state that is saved is that of a whole step, on every process.
        """
        count = 0
        try:
            for batch in batches:
                yield batch
                count += 1
            return
        except WorkerKilled as error:
            stop.note_killed_worker(error)
        step, done = divmod(count, self.layout.accumulation)
        for addresses in sampler.step(sampler.start_step + step)[done:]:
            yield self.module.collate_fn([dataset[address] for address in addresses])

    def _record(self, state: TrainingState, bar: ProgressBar, done: bool) -> dict[str, float]:
        """Log the metrics and evaluate, each if it is due; return the metrics of the current step."""
        values, pictures = {}, {}
        evaluated = self.validation.due(state.step, done)
        if self.logger.due(state.step, done):
            values = {**state.metrics(), "memory_gb": peak_memory(self.accelerator.device)}
        if evaluated:
            measured, pictures = self.validation.run(self.accelerator, state)
            values |= measured
        if values:
            bar.show({name: value for name, value in values.items() if not name.endswith(DETAILS)})
        if values and (evaluated or done):
            bar.keep()
        if self.accelerator.is_main_process:
            self.logger.log(state.step, values, pictures)
        return values

    def _save(self, state: TrainingState, done: bool, ends: bool, resumed: bool) -> None:
        """Save a checkpoint and export, each if it is due and the weights have not diverged.

        The export comes last, because the run can be finished without it: a resumed run has its checkpoint, and exports
        what it had no room for.

        Args:
            done, ends: See `_ends`.
            resumed: Whether the checkpoint of the current step exists already.

        Raises:
            FloatingPointError: The run ends, and its weights are not finite.
            OSError: The run ends, and the disk is full.
        """
        step = state.step
        exports = self.export.due(step, _ended_epoch(self.order, step), done, state.measured)
        saves = not resumed and (ends or self.checkpoint.due(step))
        if not (exports or saves) or self._has_diverged(state, ends):
            return
        if saves:
            self.checkpoint.save_if_due(self.accelerator, state, self.identity, ends)
        if exports:
            self._export(state, done)

    def _has_diverged(self, state: TrainingState, ends: bool) -> bool:
        """Whether the weights are not to be saved: they are not finite, or the run goes on after a bad step.

        In a row of bad steps the weights may be finite and useless: saved every few steps, they would replace the good
        ones. At the end they are saved beside these.
        """
        if not state.has_finite_weights():
            fault = f"The weights of step {state.step} are not finite and are not saved. {self.checkpoint.kept()}"
            if ends:
                raise FloatingPointError(f"{fault} Lower optimizer.lr, or set max_grad_norm.")
            logger.warning(fault)
            return True
        if state.skipped_in_a_row and not ends:
            logger.warning("The weights of step %d are not saved: its gradient is not finite.", state.step)
            return True
        return False

    def _export(self, state: TrainingState, done: bool) -> None:
        step, epoch = state.step, _ended_epoch(self.order, state.step)
        for weights in self.ema.weights:
            # Exporting gathers a copy of the weights, so the average must be in place before.
            with state.using(weights) if weights != "raw" else nullcontext(), state.exporting():
                self.export.on_step_end(self.accelerator, state.model, step, epoch, done, state.measured, weights)


def launch_training_task(
    accelerator: "Accelerator",
    dataset: Dataset,
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
    num_workers: int | None = None,
    **parts,
) -> int:
    """Train `model` on `dataset` and return the number of optimizer steps taken.

    Args:
        accelerator: Device and precision.
        dataset: A `TrainingData`, or any map-style data set.
        model: The training module.
        model_logger: Saves weights for inference.
        learning_rate, weight_decay: Options of AdamW; unused if an `optimizer` is given.
        num_epochs: Number of epochs; each shows every sample `repeat` times. Unused if `max_steps` is given.
        max_steps: Number of optimizer steps.
        batch_size: Samples per optimizer step, summed over all devices; None is one micro-batch per device.
        micro_batch_size: Samples per forward pass on one device.
        optimizer, lr_scheduler: See `TrainingState`.
        max_grad_norm: The gradient's norm is clipped to this; None does not clip.
        seed: Seed of the order of samples and of networks' random numbers.
        num_workers: Number of processes that load data; None keeps `dataset.num_workers`.
        parts: Further fields of `Trainer`: `engine`, `ema`, `checkpoint`, `logger`, `validation`, `profile`,
            `bad_steps`.

    Raises:
        Stopped: A signal asked the run to stop; its state is saved.
        WorkerKilled: A process that loads data was killed; the run's state is saved.
        FloatingPointError: Too many steps in a row had a gradient that is not finite.
    """
    data = dataset if isinstance(dataset, TrainingData) else PlainData(dataset)
    data.num_workers = data.num_workers if num_workers is None else num_workers
    engine = parts.pop("engine", None) or choose_engine(accelerator)
    trainer = Trainer(
        accelerator=accelerator,
        engine=engine,
        module=model,
        dataset=data,
        optimizer=optimizer or partial(torch.optim.AdamW, lr=learning_rate, weight_decay=weight_decay),
        export=model_logger,
        lr_scheduler=lr_scheduler,
        max_steps=max_steps,
        num_epochs=num_epochs,
        batch_size=(micro_batch_size or 1) * engine.replicas if batch_size is None else batch_size,
        micro_batch_size=micro_batch_size,
        max_grad_norm=max_grad_norm,
        seed=seed,
        **parts,
    )
    return trainer.fit()


def _ended_epoch(order: MixedOrder, step: int) -> int | None:
    """Return the number, from 0, of the epoch that ended with this step; None if none did."""
    before, now = (order.epoch_of(max(n, 0)) for n in (step - 1, step))
    return now - 1 if now > before else None
