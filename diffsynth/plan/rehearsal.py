"""Rehearses a step of a run on fake tensors, which have shapes but no values, and counts the bytes of live tensors.

All of the run's own code is executed; only the arithmetic is left out.
"""

import gc
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import wraps

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._pytree import tree_map

from ..core.data import Row, Sample, SampleAddress
from ..core.flops import Flops
from ..core.live_bytes import LiveBytes
from ..diffusion.adapters.files import leave_casts_to_autocast
from ..diffusion.memory_layout import lay_out, predicting_networks
from ..diffusion.pipeline.remembered import UnitMemory
from ..diffusion.pipeline.units import run_units_together
from ..diffusion.randomness import SampleRNG
from ..diffusion.token_split import check_split, split_predicting
from ..diffusion.trained import TrainProgress
from ..diffusion.training_module import PipelineTrainingModule
from ..training.rounds.sampling import Request, inputs_of
from .cuda_autocast import cuda_autocast
from .first_device import FirstOf

CHECKS = "TRANSFORMERS_DISABLE_TORCH_CHECK"  # read by transformers.utils.torch_compilable_check
STEPS_AHEAD = 16  # a guess: within this many steps, an objective with several roles trains each of them


@dataclass(frozen=True)
class WorkingMemory:
    """Bytes that a stage takes beyond the weights.

    Args:
        peaks: The largest number of bytes on the device in each phase of the stage.
        host: The largest number of bytes in host memory, streamed weights among them.
        activations: What the forward pass saves for the backward pass.
    """

    peaks: tuple[int, ...]
    host: int = 0
    activations: int = 0

    @property
    def peak(self) -> int:
        """The largest number of bytes on the device in any phase."""
        return max(self.peaks)

    def plus(self, times: float, more: "WorkingMemory", few: "WorkingMemory") -> "WorkingMemory":
        """Return self + times · (more - few), phase by phase."""

        def grow(own: int, high: int, low: int) -> int:
            return own + round(times * (high - low))

        peaks = tuple(map(grow, self.peaks, more.peaks, few.peaks))
        activations = grow(self.activations, more.activations, few.activations)
        return WorkingMemory(peaks, grow(self.host, more.host, few.host), activations)


@dataclass(frozen=True)
class Work:
    """Floating-point operations of a micro-batch's forward and backward pass, without checkpointing."""

    forward: float
    backward: float

    def plus(self, times: float, more: "Work", few: "Work") -> "Work":
        """Return self + times · (more - few)."""
        return Work(
            self.forward + times * (more.forward - few.forward), self.backward + times * (more.backward - few.backward)
        )


class RehearsedRNG(SampleRNG):
    """Random numbers without values, except whole numbers: objectives choose by them, so they are the largest."""

    def integers(self, purpose: str, end: int) -> list[int]:
        return [end - 1] * len(self.addresses)


class Rehearsal:
    """Applies memory options to a training module of fake tensors, and rehearses the stages of a run with it.

    Args:
        module: A training module on the meta device (`meta_module.read`), its memory options not yet applied.
        cp_size: Context-parallel size: N devices share one sample's tokens, and this is the first of them.
        on_cuda: Rehearse CUDA's mixed precision instead of the CPU's.
    """

    def __init__(self, module: PipelineTrainingModule, cp_size: int = 1, on_cuda: bool = False):
        self.module, self.mode, self.live = module, FakeTensorMode(allow_non_fake_inputs=True), LiveBytes()
        self.on_cuda = on_cuda
        self.reached: set[nn.Parameter] = set()  # parameters that have had a gradient in a rehearsal
        module.pipe.device = torch.device("cpu")
        module.pipe.scheduler.sigma_grid = with_values(module.pipe.scheduler.sigma_grid)
        with self._measured():
            allocate(module)
            lay_out(module)
        if module.pipe.torch_dtype == torch.bfloat16:
            leave_casts_to_autocast(module)  # as the training does
        if cp_size > 1:
            check_split(module, cp_size)
            split_predicting(module, FirstOf(cp_size))
        self.at_rest = self.live.device.now  # bytes of the weights on the device

    def train(self, rows: Sequence[Row], accumulates: bool) -> WorkingMemory:
        """Rehearse forward and backward pass of a micro-batch.

        Args:
            rows: The rows of the micro-batch.
            accumulates: Whether a step has several micro-batches, so that gradients of earlier ones exist already.
        """
        samples, rng = self._samples(rows)
        steps = {tuple(self.module.trained_at(step)): step for step in reversed(range(STEPS_AHEAD))}.values()
        stages = [self._train(samples, rng, TrainProgress(step, STEPS_AHEAD), accumulates) for step in steps]
        peaks = tuple(peak for stage in stages for peak in stage.peaks)
        return replace(max(stages, key=lambda stage: stage.peak), peaks=peaks)

    def work(self, rows: Sequence[Row]) -> Work:
        """Count the operations of the first step's two passes; encoders' outputs are remembered before."""
        (samples, rng), remembered, progress = self._samples(rows), UnitMemory(1.0), TrainProgress(0, STEPS_AHEAD)
        with self._measured(), self.autocast():
            with torch.no_grad():
                self.module.loss(samples, rng, remembered, progress)
            with Flops() as forward:
                losses = self.module.loss(samples, rng, remembered, progress)
            with Flops() as backward:
                losses.mean().backward()
            del losses
            for parameter in self.module.trainable_parameters():
                parameter.grad = None
        return Work(forward.total, backward.total)

    def _samples(self, rows: Sequence[Row]) -> tuple[list[Sample], SampleRNG]:
        rng = RehearsedRNG(self.module.seed, [SampleAddress(0, number) for number in range(len(rows))])
        return [Sample(row, 0, number) for number, row in enumerate(rows)], rng

    def _train(
        self, samples: Sequence[Sample], rng: SampleRNG, progress: TrainProgress, accumulates: bool
    ) -> WorkingMemory:
        """Rehearse one step; each call of a predicting network starts a phase, and so does the backward pass."""
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
                losses = self.module.loss(samples, rng, self.module.remembered, progress)
            activations = self.live.device.now - before
            end_phase()
            losses.mean().backward()
            del losses
            end_phase()
            for parameter in trained:
                parameter.grad = None
        for hook in hooks:
            hook.remove()
        return WorkingMemory(tuple(peaks), self.live.host.peak, activations)

    @property
    def unreached(self) -> list[nn.Parameter]:
        """Trained parameters that got no gradient in any rehearsal; none before the first one."""
        trained = self.module.trainable_parameters() if self.reached else []
        return [parameter for parameter in trained if parameter not in self.reached]

    @torch.no_grad()
    def encode(self, rows: Sequence[Row]) -> tuple[WorkingMemory, Row]:
        """Rehearse the frozen units, as when a cache is made; also return the first row as the cache would have it."""
        module = self.module
        with self._measured() as before, self.autocast():
            inputs = [module.get_pipeline_inputs(row) for row in rows]
            given = [{**side} for side in inputs[0]]
            made = run_units_together(module.frozen_units, module.pipe, inputs)
            kept = [new_inputs(*sides, module.kept_inputs) for sides in zip(given, made[0], strict=True)]
            del inputs, given, made
        working = self._since(before)
        sides = tree_map(lambda value: zeros_like(value) if isinstance(value, torch.Tensor) else value, kept)
        return working, Row(rows[0], dict(zip(("shared", "posi", "nega"), sides, strict=True)))

    @torch.no_grad()
    def evaluate(self, row: Row, count: int) -> WorkingMemory:
        """Rehearse the validation's loss of one row at `count` noise levels, which are one batch."""
        addresses = [SampleAddress(epoch, 0) for epoch in range(count)]
        samples, rng = [Sample(row, *address) for address in addresses], RehearsedRNG(self.module.seed, addresses)
        with self._measured() as before, self.autocast(), self.module.pipe.sampling():
            self.module.loss(samples, rng, UnitMemory(1.0))
        return self._since(before)

    @torch.no_grad()
    def sample(self, request: Mapping) -> WorkingMemory:
        """Rehearse sampling a request: one denoising step, and decoding."""
        with self._measured() as before, self.autocast(), self.module.pipe.sampling() as pipe:
            whole = pipe.complete(request)
            shared, posi, nega = pipe.prepare([whole])
            timestep = pipe.scheduler.timesteps[:1].to(pipe.device)
            inputs = {**shared, **pipe.inputs_at(1.0, shared)}  # those of the first step, at σ = 1
            velocity = pipe.guided_velocity(timestep, shared["cfg_scale"], inputs, posi, nega)
            pipe.pixels_of(velocity.to(pipe.torch_dtype), whole)
            del shared, inputs, posi, nega, velocity
        return self._since(before)

    @torch.no_grad()
    def roll_out(self, prompt: Row, count: int) -> WorkingMemory:
        """Rehearse what a reward training samples at once: one denoising step of `count` samples, and decoding one."""
        module, settings = self.module, self.module.task.sampling.settings
        requests = [Request(prompt, 0)] * count
        with self._measured() as before, self.autocast(), module.pipe.sampling() as pipe:
            shared, posi, nega = inputs_of(module, requests)
            with pipe.sampling_steps({**shared, **settings}) as scheduler:
                timestep = scheduler.timesteps[:1].to(pipe.device)
            inputs = {**shared, **pipe.inputs_at(1.0, shared)}  # those of the first step, at σ = 1
            velocity = pipe.guided_velocity(timestep, settings["cfg_scale"], inputs, posi, nega)
            pipe.pixels_of(velocity[:1].to(pipe.torch_dtype), pipe.call_defaults)
            del shared, inputs, posi, nega, velocity
        return self._since(before)

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """Inside, the mixed precision is the training's."""
        dtype = self.module.pipe.torch_dtype
        in_bf16 = dtype == torch.bfloat16
        with (
            torch.autocast("cpu", dtype, enabled=in_bf16),
            cuda_autocast() if self.on_cuda and in_bf16 else nullcontext(),
        ):
            yield

    @contextmanager
    def _measured(self) -> Iterator[int]:
        """Inside the block, tensors are fake and their bytes are counted; yields the bytes at its start.

        Reference cycles made in the block are collected at its end, as their tensors would count as live. Freezing
        older objects before spares the collector a second of going through them.
        """
        gc.freeze()
        try:
            with self.mode, self.live, without_checks_of_values():
                self.live.restart()
                yield self.live.device.now
        finally:
            gc.collect()
            gc.unfreeze()

    def _since(self, before: int) -> WorkingMemory:
        return WorkingMemory((self.live.device.peak - before,), self.live.host.peak)


@contextmanager
def without_checks_of_values() -> Iterator[None]:
    """Inside, transformers does not check values of its inputs, which fake tensors do not have."""
    before = os.environ.get(CHECKS)
    os.environ[CHECKS] = "1"
    try:
        yield
    finally:
        del os.environ[CHECKS]
        if before is not None:
            os.environ[CHECKS] = before


def with_values(sigma_grid: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return a function whose noise levels have values during a rehearsal, too: samplers need them as numbers."""

    def real_sigmas(*args, **kwargs) -> torch.Tensor:
        with unset_fake_temporarily():
            return sigma_grid(*args, **kwargs)

    return wraps(sigma_grid)(real_sigmas)


def new_inputs(before: Mapping, after: Mapping, wanted: Collection[str]) -> dict:
    """Return the wanted inputs that units have added or replaced; those that a row brings itself are not cached."""
    return {n: v for n, v in after.items() if n in wanted and (n not in before or v is not before[n])}


def zeros_like(tensor: torch.Tensor) -> torch.Tensor:
    """Return a real tensor of zeros with the shape and dtype of a fake one (of any shape)."""
    return torch.zeros(tensor.shape, dtype=tensor.dtype)


def tensors_of(module: nn.Module) -> list[torch.Tensor]:
    """Return the parameters and buffers of a module."""
    return [*module.parameters(), *module.buffers()]


def allocate(module: nn.Module) -> None:
    """Replace the parameters and buffers of a module by empty ones; those that are shared stay shared.

    Under `FakeTensorMode` and `LiveBytes`, the new ones are fake and counted.
    """
    allocated: dict[int, torch.Tensor] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                empty = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype), parameter.requires_grad)
                part._parameters[name] = allocated.setdefault(id(parameter), empty)
        for name, tensor in part._buffers.items():
            if tensor is not None:
                empty = torch.empty(tensor.shape, dtype=tensor.dtype)
                part._buffers[name] = allocated.setdefault(id(tensor), empty)
