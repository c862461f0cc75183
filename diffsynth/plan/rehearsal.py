"""One step of a run on tensors that have shapes and no values: everything happens but the arithmetic."""

import gc
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

from ..core.data import CachedRow, Sample
from ..core.memory.live import LiveBytes, bytes_of
from ..diffusion.loss.base import Moment
from ..diffusion.memory_layout import lay_out
from ..diffusion.training_module import PipelineTrainingModule
from ..diffusion.unit_memory import UnitMemory
from ..diffusion.units import run_units_together

LOOKED_AHEAD = 16  # steps in which an objective with several roles has trained each of them


@dataclass(frozen=True)
class Working:
    """Bytes that a stage needs beside the weights.

    Args:
        activations: What the forward pass leaves for the backward pass.
        peak: The most at any moment.
        host: What waits in host memory at most, weights among it.
    """

    peak: int
    host: int = 0
    activations: int = 0


class Rehearsal:
    """A training module as it stands in memory, and what the stages of a run add to that.

    Args:
        module: Built on a pipeline of sketches (`sketched`).
        also: Models beside those that are trained with, such as those of the validation.
        cached: What frozen units make is read from a cache.
    """

    def __init__(self, module: PipelineTrainingModule, also: Iterable[str] = (), cached: bool = False):
        self.module, self.mode, self.live = module, FakeTensorMode(allow_non_fake_inputs=True), LiveBytes()
        self.reached: set[nn.Parameter] = set()  # by gradients, in what was rehearsed so far
        module.remembered = UnitMemory(0)
        with torch.device("meta"):
            module.read(also, cached)
        module.pipe.device = torch.device("cpu")
        with self.mode, self.live:
            fill(module)
            lay_out(module)
        gc.collect()
        self.at_rest = self.live.device.now  # bytes on the device

    def train(self, rows: Sequence, accumulates: bool) -> Working:
        """Forward and backward pass of a micro-batch of rows.

        Args:
            accumulates: It is not the step's only one, so that there are gradients already.
        """
        samples = [Sample(row, 0, number) for number, row in enumerate(rows)]
        steps = {tuple(self.module.trained_at(step)): step for step in reversed(range(LOOKED_AHEAD))}.values()
        stages = [self._train(samples, Moment(step, LOOKED_AHEAD), accumulates) for step in steps]
        return max(stages, key=lambda stage: stage.peak)

    def _train(self, samples: Sequence[Sample], moment: Moment, accumulates: bool) -> Working:
        self.module.train(True)
        self.module.moment = moment
        trained = self.module.trainable_parameters()
        hooks = [parameter.register_post_accumulate_grad_hook(self.reached.add) for parameter in trained]
        with self._measured() as before:
            for parameter in trained if accumulates else ():
                parameter.grad = torch.empty_like(parameter)
            with self.autocast():
                losses = self.module(samples)
            activations = self.live.device.now - before
            losses.mean().backward()
            del losses
            for parameter in trained:
                parameter.grad = None
        for hook in hooks:
            hook.remove()
        return self._since(before, activations=activations)

    @torch.no_grad()
    def encode(self, rows: Sequence) -> tuple[Working, CachedRow]:
        """The frozen units on rows, as when a cache is made, and what it would keep of the first."""
        module = self.module
        with self._measured() as before, self.autocast():
            inputs = [module.get_pipeline_inputs(row) for row in rows]
            made = run_units_together(module.frozen_units, module.pipe, inputs)
            kept = [{n: v for n, v in side.items() if n in module.kept_inputs} for side in made[0]]
            del inputs, made
        working = self._since(before)
        sides = tree_map(lambda value: zeros_like(value) if isinstance(value, torch.Tensor) else value, kept)
        return working, CachedRow(rows[0], dict(zip(("shared", "posi", "nega"), sides, strict=True)))

    @torch.no_grad()
    def draw(self, request: Mapping) -> Working:
        """One of a drawing's steps, and its picture."""
        with self._measured() as before, self.autocast(), self.module.pipe.sampling() as pipe:
            whole = pipe.complete(request)
            shared, posi, nega = pipe.prepare([whole])
            timestep = pipe.scheduler.timesteps[:1].to(pipe.device)
            velocity = pipe.guided_velocity(timestep, shared["cfg_scale"], shared, posi, nega)
            pipe.vae.decode(velocity.to(pipe.torch_dtype), whole["tiled"], whole["tile_size"], whole["tile_stride"])
            del shared, posi, nega, velocity
        return self._since(before)

    def weights(self, names: Iterable[str]) -> int:
        """Bytes of the parameters and buffers of some of the pipeline's models."""
        return sum(bytes_of(tensors_of(getattr(self.module.pipe, name))) for name in names)

    def autocast(self):
        """As the training's accelerator has it."""
        dtype = self.module.pipe.torch_dtype
        return torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16)

    @contextmanager
    def _measured(self) -> Iterator[int]:
        gc.collect()
        with self.mode, self.live:
            self.live.restart()
            yield self.live.device.now
        gc.collect()

    def _since(self, before: int, **more: int) -> Working:
        return Working(self.live.device.peak - before, self.live.host.peak, **more)


def zeros_like(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor with values, of the shape of one without."""
    return torch.zeros(tensor.shape, dtype=tensor.dtype)


def tensors_of(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]


def fill(module: nn.Module) -> None:
    """Replace parameters and buffers by ones of the mode that is entered; shared ones stay shared."""
    filled: dict[int, torch.Tensor] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                empty = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype), parameter.requires_grad)
                part._parameters[name] = filled.setdefault(id(parameter), empty)
        for name, tensor in part._buffers.items():
            if tensor is not None:
                empty = torch.empty(tensor.shape, dtype=tensor.dtype)
                part._buffers[name] = filled.setdefault(id(tensor), empty)
