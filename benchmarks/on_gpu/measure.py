"""Measures one row: builds its run, plans it, and times its steps in our loop or in the bare loop."""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.global_hydra import GlobalHydra
from PIL import Image

from diffsynth.config import build
from diffsynth.core.data import Row
from diffsynth.core.memory import MemoryRecipe
from diffsynth.diffusion.base_pipeline import BasePipeline
from diffsynth.diffusion.training_module import PipelineTrainingModule
from diffsynth.plan.few_blocks import FewBlocks
from diffsynth.plan.meta_module import MetaModules
from diffsynth.plan.meta_pipeline import meta_pipeline
from diffsynth.plan.plan import Planner
from diffsynth.plan.run import CUDA_CONTEXT, PlacedRun, PlanRun
from diffsynth.training.absent import NoLogger
from diffsynth.training.accelerator import make_accelerator
from diffsynth.training.engines import choose_engine
from diffsynth.training.loop import Trainer

from . import bare
from .clock import Clock, Setting
from .networks import Samples, random_weights, with_random_values
from .rows import BenchmarkRow

CONF = Path(__file__).parents[2] / "conf"
PLAIN = MemoryRecipe()
TINY_SIDE = 64  # pixels; the side of the embedded models' images
FEW = 3  # prompt lengths of a tiny model
SHORTEST = 64  # a guess; tokens of the shortest prompt of a row with several lengths


class LastLoss(NoLogger):
    """Keeps the metrics of the last step."""

    def __init__(self):
        self.metrics: Mapping[str, float] = {}

    def due(self, step: int, done: bool) -> bool:
        return done

    def log(self, step: int, values: Mapping[str, float], pictures: Mapping[str, Any]) -> None:
        self.metrics = values


class NoExport:
    """Exports no weights."""

    keep_best = None

    def due(self, *_: object) -> bool:
        return False


@dataclass
class Measurement:
    """One row under one setting."""

    row: BenchmarkRow
    setting: Setting
    losses: LastLoss = field(default_factory=LastLoss)

    @cached_property
    def run(self) -> PlacedRun:
        """The row's run, as plan.py builds it from the configuration, with one image as its data set."""
        GlobalHydra.instance().clear()
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            run = PlanRun(**build(hydra.compose("plan", overrides=self.arguments)))
        run.dataset.scan()
        return PlacedRun.of(run, on_cuda=self.setting.device == "cuda")

    @property
    def arguments(self) -> list[str]:
        """The arguments of plan.py for this row."""
        image = self.setting.folder / "image" / "image.png"
        if not image.exists():
            image.parent.mkdir(parents=True, exist_ok=True)
            Image.effect_noise((1024, 1024), 64).convert("RGB").save(image)
            image.with_suffix(".txt").write_text("a picture", encoding="utf-8")
        given = {
            "dataset": "image_folder",
            "dataset.path": image.parent,
            "dataset.height": self.side,
            "dataset.width": self.side,
            "validation": "none",
            "output_root": self.setting.folder / "runs",
            "name": self.row.name,
            "device": self.setting.device,
            "cached": not self.row.encodes,
            "cache_batch_size": 1,
            "memory.remember": 0,
        }
        given |= self.row.arguments(self.setting.tiny)
        return [f"{key}={value}" for key, value in given.items()]

    @property
    def side(self) -> int:
        """Height and width of the images in pixels."""
        return TINY_SIDE if self.setting.tiny else self.row.pixels

    @cached_property
    def meta_modules(self) -> MetaModules:
        return MetaModules(self.run)

    @cached_property
    def planned_row(self) -> Row:
        return self.meta_modules.row(self.run, self.run.sizes[0])

    # Without the device

    def plan(self) -> dict[str, float]:
        """Bytes that plan.py predicts, and operations of a step without recomputation."""
        planner = Planner(self.run, self.meta_modules).quickest()
        peak = planner.plan(largest_only=True).worst.peak
        return {"planned": self.run.estimated(peak), "planned_tensors": peak, "flops": self.flops}

    @cached_property
    def flops(self) -> float:
        """Operations of one sample's forward and backward pass."""
        plain = self.run.variant(PLAIN)
        work = FewBlocks(self.meta_modules.of(plain), PLAIN).work([self.planned_row])
        return work.forward + work.backward

    @property
    def kind(self) -> tuple[object, ...]:
        """What a plan's modules on the meta device depend on: rows of one kind can share them."""
        given = self.row.arguments(self.setting.tiny)
        names = ("model", "lora", "memory.trained_dtype", "memory.compile", "validation")
        return (*map(given.get, names), self.row.encodes)

    # With it

    def measure(self) -> dict[str, Any]:
        """Seconds, memory and losses of the row's steps.

        Raises:
            torch.OutOfMemoryError: The row needs more memory than it may take.
            FloatingPointError: The loss is not finite.
        """
        if self.row.limit is not None and self.setting.device == "cuda":
            total = torch.cuda.get_device_properties(0).total_memory
            limit = self.row.limit * 2**30 - CUDA_CONTEXT  # which only the allocator keeps
            torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total))
        lengths = len(self.samples)
        setting = self.setting if lengths == 1 else replace(self.setting, warm_up=0, steps=2 * lengths)
        clock = Clock(setting, self.row.name)
        loss = self.bare(clock) if self.row.bare else self.ours(clock)
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} after {clock.total} steps")
        figures = {**clock.figures(), **self.memory(), "loss": loss, "samples": self.run.batch_size}
        figures["tokens_per_second"] = self.tokens / figures["seconds"]
        if lengths > 1:
            epochs = clock.timed[:lengths], clock.timed[lengths:]
            figures |= dict(zip(("first_epoch", "second_epoch"), map(statistics.mean, epochs), strict=True))
        return figures

    def ours(self, clock: Clock) -> float:
        """Train by our loop; return the mean loss."""
        run = self.run
        accelerator = make_accelerator(self.setting.device, run.model.keywords["torch_dtype"])
        engine, pipe = choose_engine(accelerator), self.pipeline(accelerator.device)
        module = PipelineTrainingModule(pipe, run.task, run.lora, run.seed, None, run.memory)
        keeps = any(argument.startswith("checkpoint.") for argument in self.row.overrides)
        run = replace(
            run,
            dataset=run.dataset if self.row.encodes else Samples(self.samples),
            export=NoExport(),
            checkpoint=run.checkpoint if keeps else None,
            logger=self.losses,
            profile=clock,
            max_steps=clock.total,
        )
        trainer = Trainer.of(run, accelerator, engine, module, {})
        with random_weights():
            module.load(trainer.validation.models(module), not self.row.encodes)
        if self.row.attention is not None:
            pipe.network.set_attention_backend(self.row.attention)
        trainer.fit()
        return self.losses.metrics.get("loss", math.nan)  # which is left out if every step was skipped

    def bare(self, clock: Clock) -> float:
        """Train by the bare loop; return the mean loss."""
        pipe = self.pipeline(torch.device(self.setting.device))
        return bare.train(pipe, self.run.lora, self.samples[0], self.run.memory.inputs, clock)

    def pipeline(self, device: torch.device) -> BasePipeline:
        """The row's pipeline on the meta device, to be loaded to `device`."""
        pipe = meta_pipeline(self.run.model, self.run.tokens)
        pipe.device = device
        return pipe

    @cached_property
    def samples(self) -> list[Row]:
        """The rows of the data set, with prompts of as many lengths as the benchmark's row asks for."""
        lengths = min(self.row.lengths, FEW) if self.setting.tiny else self.row.lengths
        if lengths == 1:
            return [with_random_values(self.planned_row)]
        return [with_random_values(self.planned_row, SHORTEST + number) for number in range(lengths)]

    def memory(self) -> dict[str, int]:
        """Most bytes of the card that tensors took, and that its allocator kept; what is taken besides; or nothing.

        The last figure is that of CUDA's context and libraries if no other process uses the card.
        """
        if self.setting.device != "cuda":
            return {}
        free, total = torch.cuda.mem_get_info()
        return {
            "allocated": torch.cuda.max_memory_allocated(),
            "reserved": torch.cuda.max_memory_reserved(),
            "context": total - free - torch.cuda.memory_reserved(),
        }

    @property
    def tokens(self) -> int:
        """Image tokens of a step."""
        return self.run.batch_size * self.meta_modules.meta_pipe.latents.tokens(self.side, self.side)
