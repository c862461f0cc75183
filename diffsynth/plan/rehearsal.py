"""One step of a run on tensors that have shapes and no values: everything happens but the arithmetic."""

import gc
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

from ..core.data import Row, Sample
from ..core.memory.live import LiveBytes
from ..diffusion.memory_layout import lay_out, predicting_networks
from ..diffusion.pipeline.units import run_units_together
from ..diffusion.token_split import check_split, split_predicting
from ..diffusion.trained import TrainProgress
from ..diffusion.training_module import PipelineTrainingModule
from .first_device import FirstOf

STEPS_AHEAD = 16  # steps in which an objective with several roles has trained each of them


@dataclass(frozen=True)
class Working:
    """Bytes that a stage needs beside the weights.

    Args:
        peaks: The most at any moment of each of its phases.
        host: What waits in host memory at most, weights among it.
        activations: What the forward pass leaves for the backward pass.
    """

    peaks: tuple[int, ...]
    host: int = 0
    activations: int = 0

    @property
    def peak(self) -> int:
        return max(self.peaks)

    def plus(self, times: float, more: "Working", few: "Working") -> "Working":
        """This, and so many times the difference between two others of as many phases."""

        def grow(own: int, high: int, low: int) -> int:
            return own + round(times * (high - low))

        peaks = tuple(map(grow, self.peaks, more.peaks, few.peaks))
        activations = grow(self.activations, more.activations, few.activations)
        return Working(peaks, grow(self.host, more.host, few.host), activations)


class Rehearsal:
    """A training module as it stands in memory, and what the stages of a run add to that.

    Args:
        module: Read without values (`meta_modules.read`), not yet laid out.
        cp_size: Devices that have a sample's tokens together, of which this is the first.
    """

    def __init__(self, module: PipelineTrainingModule, cp_size: int = 1):
        self.module, self.mode, self.live = module, FakeTensorMode(allow_non_fake_inputs=True), LiveBytes()
        self.reached: set[nn.Parameter] = set()  # by gradients, in what was rehearsed so far
        module.pipe.device = torch.device("cpu")
        with self._measured():
            fill(module)
            lay_out(module)
        if cp_size > 1:
            check_split(module, cp_size)
            split_predicting(module, FirstOf(cp_size))
        self.at_rest = self.live.device.now  # bytes on the device

    def train(self, rows: Sequence, accumulates: bool) -> Working:
        """Forward and backward pass of a micro-batch of rows.

        Args:
            accumulates: It is not the step's only one, so that there are gradients already.
        """
        samples = [Sample(row, 0, number) for number, row in enumerate(rows)]
        steps = {tuple(self.module.trained_at(step)): step for step in reversed(range(STEPS_AHEAD))}.values()
        stages = [self._train(samples, TrainProgress(step, STEPS_AHEAD), accumulates) for step in steps]
        peaks = tuple(peak for stage in stages for peak in stage.peaks)
        return replace(max(stages, key=lambda stage: stage.peak), peaks=peaks)

    def _train(self, samples: Sequence[Sample], progress: TrainProgress, accumulates: bool) -> Working:
        self.module.train(True)
        trained = self.module.trainable_parameters()
        peaks: list[int] = []
        hooks = [parameter.register_post_accumulate_grad_hook(self.reached.add) for parameter in trained]
        with self._measured() as before:

            def end_phase(*_) -> None:
                peaks.append(self.live.device.peak - before)
                self.live.device.restart()

            hooks += [network.register_forward_pre_hook(end_phase) for network in predicting_networks(self.module)]
            for parameter in trained if accumulates else ():
                parameter.grad = torch.empty_like(parameter)
            with self.autocast():
                losses = self.module(samples, progress)
            activations = self.live.device.now - before
            end_phase()
            losses.mean().backward()
            del losses
            end_phase()
            for parameter in trained:
                parameter.grad = None
        for hook in hooks:
            hook.remove()
        return Working(tuple(peaks), self.live.host.peak, activations)

    @property
    def unreached(self) -> list[nn.Parameter]:
        """What gradients should have reached and did not; nothing before the first step."""
        trained = self.module.trainable_parameters() if self.reached else []
        return [parameter for parameter in trained if parameter not in self.reached]

    @torch.no_grad()
    def encode(self, rows: Sequence) -> tuple[Working, Row]:
        """The frozen units on rows, as when a cache is made, and what it would keep of the first."""
        module = self.module
        with self._measured() as before, self.autocast():
            inputs = [module.get_pipeline_inputs(row) for row in rows]
            given = [{**side} for side in inputs[0]]
            made = run_units_together(module.frozen_units, module.pipe, inputs)
            kept = [made_anew(*sides, module.kept_inputs) for sides in zip(given, made[0], strict=True)]
            del inputs, given, made
        working = self._since(before)
        sides = tree_map(lambda value: zeros_like(value) if isinstance(value, torch.Tensor) else value, kept)
        return working, Row(rows[0], dict(zip(("shared", "posi", "nega"), sides, strict=True)))

    @torch.no_grad()
    def sample(self, request: Mapping) -> Working:
        """One of a drawing's steps, and its picture."""
        with self._measured() as before, self.autocast(), self.module.pipe.sampling() as pipe:
            whole = pipe.complete(request)
            shared, posi, nega = pipe.prepare([whole])
            timestep = pipe.scheduler.timesteps[:1].to(pipe.device)
            velocity = pipe.guided_velocity(timestep, shared["cfg_scale"], shared, posi, nega)
            pipe.vae.decode(velocity.to(pipe.torch_dtype), whole["tiled"], whole["tile_size"], whole["tile_stride"])
            del shared, posi, nega, velocity
        return self._since(before)

    def autocast(self):
        """As the training's accelerator has it."""
        dtype = self.module.pipe.torch_dtype
        return torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16)

    @contextmanager
    def _measured(self) -> Iterator[int]:
        gc.freeze()  # collect what is made here alone, of which cycles would seem to be held; the rest takes a second
        try:
            with self.mode, self.live:
                self.live.restart()
                yield self.live.device.now
        finally:
            gc.collect()
            gc.unfreeze()

    def _since(self, before: int) -> Working:
        return Working((self.live.device.peak - before,), self.live.host.peak)


def made_anew(before: Mapping, after: Mapping, wanted: Collection[str]) -> dict:
    """What of the wanted inputs units have made; a row's own are not the cache's."""
    return {n: v for n, v in after.items() if n in wanted and (n not in before or v is not before[n])}


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
