"""The training state: what an optimizer step changes, and what a checkpoint saves and restores.

`TrainingState` has one `TrainedPart` per optimizer. The model is the first part; each further role of the objective,
such as DMD2's fake score, is another.
"""

import inspect
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..diffusion.adapters.files import casts_left_to_autocast
from ..diffusion.noted import noting
from ..diffusion.trained import MODEL, TrainProgress
from .absent import NoEMA
from .ema import EMA
from .engines import Engine, choose_engine
from .fused import fused
from .meter import Meter
from .restorable import check_average, check_counters, check_optimizer, check_schedule, check_weights
from .schedule import make_schedule, same_until
from .stochastic_rounding import StochasticRounding

if TYPE_CHECKING:
    from accelerate import Accelerator

    from ..diffusion.training_module import DiffusionTrainingModule


class TrainedPart:
    """The parameters of one optimizer, with the optimizer and its learning rate schedule.

    Args:
        parameters: The trained parameters by name.
        optimizer, lr_scheduler: See `TrainingState`.
        steps: Number of the run's optimizer steps that train this part.
        has_master_weights: Whether the engine keeps fp32 master weights, so that bf16 weights need no rounding here.
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        optimizer: Callable,
        lr_scheduler: Callable | None,
        steps: int,
        has_master_weights: bool = False,
    ):
        self.parameters = parameters
        # Kept from before an engine shards the parameters, which changes their shapes.
        self.shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        in_bf16 = any(parameter.dtype == torch.bfloat16 for parameter in parameters.values())
        self.rounding = StochasticRounding(self.all) if in_bf16 and not has_master_weights else None
        if all(parameter.is_cuda for parameter in self.all) and not has_master_weights:  # ZeRO has kernels of its own
            optimizer = fused(optimizer)
        self.optimizer = optimizer(self.rounding.fp32_copies if self.rounding else self.all)
        self.schedule = make_schedule(lr_scheduler, self.optimizer, steps)

    @property
    def all(self) -> list[nn.Parameter]:
        """The parameters without their names."""
        return list(self.parameters.values())

    def step(self, seed: int) -> None:
        """Take one optimizer step; `seed` determines the stochastic rounding of bf16 weights."""
        if self.rounding:
            self.rounding.step(self.optimizer, seed=seed)
        else:
            self.optimizer.step()

    @property
    def numel(self) -> int:
        """Number of trained scalars, on all processes together."""
        return sum(map(math.prod, self.shapes.values()))

    @property
    def nbytes(self) -> int:
        """Bytes of the trained parameters, on all processes together."""
        return sum(math.prod(self.shapes[name]) * p.element_size() for name, p in self.parameters.items())

    def check(self, tree: Callable[[str], Any]) -> None:
        """Check that this part can load what `tree` returns, before it does; see `restore`."""
        weights = tree("weights")
        check_weights(weights)
        _check_same({name: tuple(tensor.shape) for name, tensor in weights.items()}, self.shapes)
        check_optimizer(self, tree("optimizer"))
        if self.schedule is not None:
            check_schedule(tree("schedule"))

    def trees(self, engine: Engine) -> dict[str, Any]:
        """Return weights, optimizer state and schedule state as nested dicts of full tensors and plain data."""
        return {
            "weights": engine.weights(self),
            "optimizer": engine.optimizer_state(self),
            "schedule": None if self.schedule is None else self.schedule.state_dict(),
        }

    def restore(self, engine: Engine, tree: Callable[[str], Any]) -> None:
        """Load what `trees` returned; `tree(name)` returns the tree of that name."""
        engine.set_weights(self, tree("weights"))
        engine.set_optimizer_state(self, tree("optimizer"))
        if self.schedule is not None:
            self.schedule.load_state_dict(tree("schedule"))


class TrainingState:
    """Trained weights, their optimizers, schedules and average, and the number of optimizer steps taken.

    Args:
        accelerator: Device and precision.
        model: The training module, its weights loaded.
        optimizer: Called as `optimizer(parameters)`, once for each trained part.
        lr_scheduler: Called as `lr_scheduler(optimizer)`, with `num_training_steps` too if it has such a parameter;
            stepped once per optimizer step. None keeps the learning rate constant.
        steps: Number of optimizer steps of the run.
        ema: Averages the weights of the model, not those of further roles.
        engine: Spreads the training over processes; None chooses the launcher's (`engines.choose_engine`).
    """

    def __init__(
        self,
        accelerator: "Accelerator",
        model: "DiffusionTrainingModule",
        optimizer: Callable,
        lr_scheduler: Callable | None,
        steps: int,
        ema: EMA | NoEMA,
        engine: Engine | None = None,
    ):
        self.module, self.steps, self.lr_scheduler = model, steps, lr_scheduler
        self.tells_progress = "progress" in inspect.signature(model.forward).parameters
        self.engine = engine or choose_engine(accelerator)
        self.engine.shard(model)
        self.lagging = model.lagging_parts()  # of roles, which only DDP trains: nothing here is sharded
        steps_of = self._steps_of_parts(steps)
        self.parts = {
            name: TrainedPart(
                named,
                _with_rate(optimizer, model.learning_rate(name)),
                lr_scheduler,
                steps_of[name],
                self.engine.has_master_weights,
            )
            for name, named in model.trained_parts().items()
        }
        self.accelerator, self.meter, self.ema = accelerator, Meter(accelerator, self.engine.cp_size), ema
        self.model = self.engine.prepare(model, self.parts)
        self.step = self.skipped_steps = self.skipped_in_a_row = 0
        self.learning_rate = self._next_rate
        self.measured: Mapping[str, float] = {}  # metrics of the current step that decide whether it is exported
        self.round: dict[
            str, Any
        ] = {}  # what the round of samples that is trained on was made of; see `training.rounds`
        self.skipped_losses: Sequence[Tensor] = ()  # (b,) of each micro-batch, if the last step was skipped
        ema.start(self.engine.local(self.main.all))

    def _steps_of_parts(self, steps: int) -> Counter:
        """The number of the first `steps` optimizer steps that train each part."""
        return Counter(part for step in range(steps) for part in self.module.trained_at(step))

    def goes_through(self, counters: Mapping[str, Any]) -> bool:
        """Whether this run has the learning rates of a saved run, maybe of another length, up to the saved step.

        Args:
            counters: The `counters` of the saved state.
        """
        step, saved_steps = counters["step"], counters.get("steps", self.steps)
        if saved_steps == self.steps:
            return True
        taken, saved, now = (self._steps_of_parts(number) for number in (step, saved_steps, self.steps))
        return all(same_until(self.lr_scheduler, taken[name], saved[name], now[name]) for name in self.parts)

    @property
    def main(self) -> TrainedPart:
        """The model's part, without further roles."""
        return next(iter(self.parts.values()))

    @property
    def _next_rate(self) -> float:
        return self.main.optimizer.param_groups[0]["lr"]

    def metrics(self) -> dict[str, float]:
        """Return the training metrics since the last call: means, learning rate, and skipped steps if there are any."""
        skipped = {"skipped_steps": self.skipped_steps} if self.skipped_steps else {}
        return {**self.meter.read(), "lr": self.learning_rate, **skipped}

    def mixed_precision(self) -> AbstractContextManager:
        """Inside, adapters leave the casts of their inputs to autocast, if passes are under bf16 autocast."""
        in_bf16 = self.accelerator.mixed_precision == "bf16"
        return casts_left_to_autocast(self.module) if in_bf16 else nullcontext()

    def losses(self, batch: Any) -> Tensor:
        """Return the losses (b,) of a micro-batch of b samples."""
        progress = {"progress": TrainProgress(self.step, self.steps)} if self.tells_progress else {}
        with noting() as notes:
            losses = self.model(batch, **progress)
        self.meter.add_notes(notes)
        return losses

    def backward(self, losses: Tensor) -> None:
        """Backpropagate the mean of a micro-batch's losses (b,), and count them in the metrics."""
        self.engine.backward(losses.mean())
        self.meter.add_losses(losses)

    def update(self, max_grad_norm: float | None) -> bool:
        """Take one optimizer step unless the gradient is not finite; return whether it was taken."""
        names = self.module.trained_at(self.step)
        self.learning_rate = self._next_rate  # of this step: `metrics` is called after the schedule's step
        trained = [self.parts[name] for name in names]
        norms = self.engine.step(trained, max_grad_norm or math.inf, seed=self.step)
        finite = all(map(math.isfinite, norms))
        for part in trained:
            if part.schedule is not None:
                part.schedule.step()
        for part in self.parts.values():
            for parameter in part.all:
                parameter.grad = None
        self.step += 1
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        self.skipped_steps += not finite
        self.skipped_losses = () if finite else self.meter.losses
        self.meter.end_step(norms[0] if finite else None, names[0])
        if self.main in trained:
            self.ema.update(self.engine.local(self.main.all), self.step)
        return finite

    def set_mode(self, mode: str) -> None:
        """Switch optimizers to `train` or `eval`: schedule-free ones train one set of weights and evaluate another."""
        for part in self.parts.values():
            switch = getattr(part.optimizer, mode, None)
            if switch is not None:
                switch()

    @contextmanager
    def using(self, weights: str) -> Iterator[None]:
        """Inside the block, the model has the `raw` weights or their average `ema`, for evaluation or export."""
        if weights == "raw":
            yield
            return
        with self.ema.in_place(self.engine.local(self.main.all)):
            self.engine.rewritten()
            yield
        self.engine.rewritten()

    def exporting(self) -> AbstractContextManager:
        """Inside the block, the first process's module has all trained weights in full."""
        return self.engine.exporting(self.module, self.parts)

    def accumulating(self, last: bool) -> AbstractContextManager:
        """The context of one micro-batch's forward and backward; `last` if it is the last one of its step."""
        return self.engine.accumulating(self.model, last)

    @property
    def expected_bytes(self) -> int:
        """Bytes of a checkpoint, if the optimizers keep two fp32 numbers per weight, as Adam does."""
        weights = sum(part.nbytes for part in self.parts.values())
        numel = 2 * sum(part.numel for part in self.parts.values())
        return weights + 4 * (numel + (self.main.numel if self.ema.average else 0))

    def trees(self) -> dict[str, Any]:
        """Return the whole state as nested dicts of tensors and plain data; all processes call it."""
        parts = {name: part.trees(self.engine) for name, part in self.parts.items()}
        trees = {_prefixed(name, key): tree for name, part in parts.items() for key, tree in part.items()}
        lagging = {name: pair.old.detach() for name, pair in self.lagging.items()}
        return (
            trees
            | ({"lagging": lagging} if lagging else {})
            | {
                "ema": self._whole_average(),
                "counters": {
                    "step": self.step,
                    "steps": self.steps,
                    "skipped_steps": self.skipped_steps,
                    "skipped_in_a_row": self.skipped_in_a_row,
                    "ema_betas": list(self.ema.betas),
                    "measured": dict(self.measured),
                    "meter": self.meter.state(),
                    "round": dict(self.round),
                },
            }
        )

    def _whole_average(self) -> list[Tensor]:
        pairs = zip(self.main.all, self.ema.average, strict=False)  # without an EMA, `average` is empty
        return [self.engine.keep(self.engine.whole(parameter, average)) for parameter, average in pairs]

    def check(self, tree: Callable[[str], Any]) -> None:
        """Check that `restore` can load what `tree(name)` returns, whose tensors may be on the meta device.

        Raises:
            DamagedCheckpoint: It is no training state.
            ValueError: The state is that of another model.
        """
        check_counters(tree("counters"))
        for name, part in self.parts.items():
            part.check(lambda key, name=name: tree(_prefixed(name, key)))
        check_average(self, tree("ema"))
        if self.lagging:
            check_weights(tree("lagging"))
            shapes = {name: tuple(pair.old.shape) for name, pair in self.lagging.items()}
            _check_same({name: tuple(each.shape) for name, each in tree("lagging").items()}, shapes)

    @torch.no_grad()
    def has_finite_weights(self) -> bool:
        """Whether all trained weights are finite; all processes call it and get the same answer.

        It reads every weight once, without a copy.
        """
        local = [each for part in self.parts.values() for each in self.engine.local(part.all) if each.numel()]
        norms = [torch.linalg.vector_norm(each, math.inf).to(self.accelerator.device) for each in local]
        diverged = torch.zeros((), device=self.accelerator.device) + sum((~norm.isfinite()).float() for norm in norms)
        return self.accelerator.reduce(diverged, "sum").item() == 0

    @torch.no_grad()
    def restore(self, tree: Callable[[str], Any]) -> None:
        """Load the state that `trees` returned and `check` passed; `tree(name)` returns the tree of that name."""
        for name, part in self.parts.items():
            part.restore(self.engine, lambda key, name=name: tree(_prefixed(name, key)))
        for parameter, average, kept in zip(self.main.all, self.ema.average, tree("ema") or (), strict=False):
            average.copy_(self.engine.part_of(parameter, kept))
        for name, pair in self.lagging.items():
            pair.old.copy_(tree("lagging")[name])
        counters = tree("counters")
        self.step, self.skipped_steps = counters["step"], counters["skipped_steps"]
        self.skipped_in_a_row = counters["skipped_in_a_row"]
        self.ema.betas = counters.get("ema_betas", [])  # absent in checkpoints from before ema.every
        self.measured = counters.get("measured", {})  # absent in older checkpoints
        self.meter.restore(counters["meter"])
        self.round = dict(counters.get("round", {}))  # absent in checkpoints of other trainings

    def scale_rates(self, factor: float) -> None:
        """Multiply the learning rates of all further steps by `factor`."""
        for part in self.parts.values():
            for group in part.optimizer.param_groups:
                group["lr"] *= factor
            if part.schedule is not None:
                part.schedule.base_lrs = [rate * factor for rate in part.schedule.base_lrs]

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        """Move the role `old` towards the trained weights: θ_old ← d θ_old + (1 - d) θ with d = `decay`."""
        for old, followed in self.lagging.values():
            old.lerp_(followed.to(old.dtype), 1 - decay)


def _prefixed(part: str, key: str) -> str:
    return key if part == MODEL else f"{part}_{key}"


def _with_rate(optimizer: Callable, learning_rate: float | None) -> Callable:
    return optimizer if learning_rate is None else partial(optimizer, lr=learning_rate)


def _check_same(found: Mapping[str, tuple], expected: Mapping[str, tuple]) -> None:
    if found != expected:
        name = min(name for name, _ in found.items() ^ expected.items())
        raise ValueError(
            f"The checkpoint is that of another model: the shape of {name} is {found.get(name, 'absent')} in the "
            f"checkpoint and {expected.get(name, 'absent')} in this run. Set name=… to start a new run."
        )
