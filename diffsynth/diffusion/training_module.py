"""Training modules: from rows of the data set to a loss per sample, with a pipeline and an objective.

`DiffusionTrainingModule` is the base class for a loss of one's own, as DiffSynth-Studio's guides write it;
`PipelineTrainingModule` is the one that the configuration builds.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.data import Sample, SampleAddress
from ..core.data.dataset import TrainingData
from ..core.memory import MemoryRecipe
from .adapters import files as lora_files
from .adapters.formats import ADAPTER_FILE
from .adapters.lora import Adapter, LoRA
from .adapters.preset import without_preset
from .base_pipeline import BasePipeline, batch_of
from .distillation.roles import Lagging
from .flow_match import TRAINING_STEPS
from .loss import Objective
from .memory_layout import check_memory, lay_out, stored_models
from .pipeline.remembered import UnitMemory, to_device
from .pipeline.units import optional_inputs, run_units, run_units_together, split_units
from .pipeline.unused_images import check_used
from .randomness import SampleRNG
from .template.model import Template
from .template.units import attach, rehearse
from .trained import MODEL, TrainProgress

DEFAULT_RECIPE = MemoryRecipe()


def single_sample(samples: Sequence[Sample]) -> dict:
    """The row of the only sample of a batch, for a module whose `forward` takes one row."""
    if len(samples) != 1:
        raise ValueError(
            f"This training module takes one sample per forward, got {len(samples)}; set micro_batch_size=1."
        )
    return samples[0].data


class DiffusionTrainingModule(nn.Module):
    """A pipeline with a loss: subclass it, set `self.pipe` in `__init__`, return a loss from `forward(data)`."""

    pipe: BasePipeline
    collate_fn = staticmethod(single_sample)
    is_whole = True  # an engine that leaves this process only a part of each weight sets it to False
    sampling_settings: Mapping[str, Any] | None = None  # steps, guidance, …, stored with the exported weights

    def switch_pipe_to_training_mode(
        self,
        pipe: BasePipeline,
        trainable_models: Sequence[str] | str = (),
        lora_base_model: str | None = None,
        lora_target_modules: Sequence[str] | str | None = None,
        lora_rank: int = 32,
        lora_checkpoint: str | None = None,
        preset_lora_path: str | None = None,
        seed: int = 0,
    ) -> None:
        """Freeze the pipeline except for the named models and a new LoRA, and set the training noise levels.

        Args:
            trainable_models: Models trained in full: a list, or one string with commas.
            lora_base_model: Model that gets a LoRA; None for no LoRA.
            lora_target_modules: Layers that get the LoRA; None takes the model's defaults.
            lora_checkpoint: LoRA file that the new LoRA starts from.
            preset_lora_path: LoRA file that is merged into the model first (differential training).
            seed: Of the LoRA's initial values.
        """
        names = trainable_models.split(",") if isinstance(trainable_models, str) else trainable_models
        adapter = None
        if lora_base_model:
            adapter = LoRA(
                rank=lora_rank,
                models=(lora_base_model,),
                target_modules=lora_target_modules or None,
                checkpoint=lora_checkpoint,
                preset=preset_lora_path,
            )
        prepare_training(pipe, [name for name in names if name], adapter, seed)

    def trained_parts(self) -> dict[str, dict[str, nn.Parameter]]:
        """Trainable parameters by part and name; each part has an optimizer of its own, and the model is the first."""
        return {MODEL: {name: p for name, p in self.named_parameters() if p.requires_grad}}

    def lagging_parts(self) -> dict[str, Lagging]:
        """Parameters that no optimizer updates, by name, each with the trained one that it follows."""
        return {}

    def trained_at(self, step: int) -> Sequence[str]:
        """Names of the parts that optimizer step `step` (from 0) updates."""
        return (MODEL,)

    def learning_rate(self, part: str) -> float | None:
        """Learning rate of a part; None takes the model's."""
        return None

    def remembers(self, index: int, variant: str | None) -> bool:
        """Whether the next loss of sample `index` in this augmentation variant reads nothing of its row."""
        return False

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The trainable parameters, in a fixed order."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def export_trainable_state_dict(self, remove_prefix: str | None = None) -> dict[str, Tensor]:
        """Trainable tensors by name; names that begin with `remove_prefix` lose it."""
        named = {name: p.detach() for name, p in self.named_parameters() if p.requires_grad}
        return {name.removeprefix(remove_prefix or ""): p for name, p in named.items()}

    def export_weights(self, format: str = "common") -> dict[str, tuple[dict[str, Tensor], dict[str, str]]]:
        """The files to export, `{model: (tensors, metadata)}`; adapters share one file, `lora`.

        An adapter whose keys would be those of another one has a file of its own, such as `lora_dit2`. Tensors of
        models trained in full have the names of the released checkpoint.

        Args:
            format: Format of the adapters, a key of `adapters.formats.FORMATS`.
        """
        files = {}
        for name, model in self.pipe.named_children():
            trainable = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
            if not hasattr(model, "peft_config") and trainable:
                files[name] = (self.pipe.released_weights(name, [*trainable, *_saved_buffers(model)]), {})
        adapted = [name for name, model in self.pipe.named_children() if hasattr(model, "peft_config")]
        prefixes = {self.pipe.layer_names(name).prefix for name in adapted}
        apart = [name for name in adapted if self.pipe.layer_names(name).shared in prefixes]
        together = [name for name in adapted if name not in apart]
        adapters = {ADAPTER_FILE: together} | {f"{ADAPTER_FILE}_{name}": [name] for name in apart}
        return files | {file: self._adapter_file(names, format) for file, names in adapters.items() if names}

    def _adapter_file(self, models: Sequence[str], format: str) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The tensors and the metadata of a file with the adapters of some models."""
        networks = [self.pipe.layer_names(name) for name in models]
        exports = [lora_files.export(getattr(self.pipe, m), n, format) for m, n in zip(models, networks, strict=True)]
        tensors, configs = ({k: v for part in parts for k, v in part.items()} for parts in zip(*exports, strict=True))
        return tensors, lora_files.metadata(configs, networks)

    def describe_adapters(self) -> dict[str, dict]:
        """Kind, rank and alpha of each model's adapter."""
        adapted = {n: m for n, m in self.pipe.named_children() if hasattr(m, "peft_config")}
        return {name: lora_files.describe(model) for name, model in adapted.items()}

    def check_export(self, path: str | Path) -> None:
        """Read an adapter file back and compare it with the trained adapters; see `adapters.files.check_export`."""
        with without_preset(self.pipe):
            for name in self.pipe.adapted_by(path):
                lora_files.check_export(getattr(self.pipe, name), path, self.pipe.layer_names(name))


class PipelineTrainingModule(DiffusionTrainingModule):
    """Any pipeline with any objective, as the configuration composes them.

    Args:
        pipe: A pipeline whose models are built but not loaded; `load` reads only those that this training needs.
        task: The objective.
        lora: The adapter, or None for full training.
        seed: Of noise, timesteps, dropped captions and the adapter's initial values.
        template: A template to train or to train with; its inputs are the column `template_inputs` of the data set.
        memory: How memory is saved: checkpointing, storage of frozen weights, streaming, compilation.

    Raises:
        ValueError: A setting names a model, layer or input that the pipeline does not have. No weight is read before.
    """

    collate_fn = staticmethod(list)

    def __init__(
        self,
        pipe: BasePipeline,
        task: Objective,
        lora: Adapter | None = None,
        seed: int = 0,
        template: Template | None = None,
        memory: MemoryRecipe = DEFAULT_RECIPE,
    ):
        super().__init__()
        self.pipe, self.task, self.lora, self.seed, self.memory = pipe, task, lora, seed, memory
        self.trainable_models = list(self._trainable_models())
        self.extra_inputs, self.roles = task.row_inputs, None
        if template is not None:
            attach(pipe, template, (*self.trainable_models, *(lora.models if lora else ())))
            self.extra_inputs = {**task.row_inputs, "template_inputs": "template_inputs"}
        self.units = task.units(pipe)
        self.frozen_units, self.live_units = split_units(self.units, self.trained_roots)
        self.kept_inputs = task.wanted_inputs(pipe).union(*(unit.fetch_input_params() for unit in self.live_units))
        self.remembered = UnitMemory(memory.remember)
        self.trained_dtype = getattr(torch, memory.trained_dtype)
        self._check()
        self.storages = dict.fromkeys(stored_models(self), memory.storage)

    def load(
        self, also: Iterable[str] = (), cached: bool = False, in_host_memory: Collection[str] = ()
    ) -> "PipelineTrainingModule":
        """Read the weights that this training needs, add the adapter and the roles, and apply the memory recipe.

        Args:
            also: Further models to read, which validation calls.
            cached: The outputs of the frozen units come from a cache, so that their models are not read.
            in_host_memory: Models that stay in host memory, because an engine moves them to the devices itself.
        """
        self.read(also, cached, in_host_memory)
        lay_out(self)
        return self

    def read(self, also: Iterable[str] = (), cached: bool = False, in_host_memory: Collection[str] = ()) -> None:
        """The first half of `load`: everything but the memory recipe."""
        self.task.check(self.pipe, self.lora, cached)
        if self.task.calls_model_fn:
            self.pipe.check_columns(self.task.extra_inputs)
        units = self.live_units if cached else self.units
        users = {**dict.fromkeys(also, "validation"), **dict.fromkeys(self.trained_roots, "training")}
        users |= dict.fromkeys(self.task.called_models(self.pipe), type(self.task).__name__)
        if self.task.calls_model_fn:
            users |= dict.fromkeys(self.pipe.networks_in_training(self.trained_roots), type(self.task).__name__)
        if self.task.samples_in_training:
            users |= dict.fromkeys(self.pipe.models_of((), model_fn=True), type(self.task).__name__)
        users |= {name: type(unit).__name__ for unit in units for name in unit.onload_model_names}
        self.pipe.require(users)
        full = {name: self.trained_dtype for name in self.trainable_models}
        streamed = self.pipe.in_iteration_models[:1] if self.memory.stream_blocks else ()
        on_host = {*in_host_memory, *streamed}
        self.pipe.load_models(users, dtypes=full, in_host_memory=on_host, storages=self.storages)
        prepare_training(self.pipe, self.trainable_models, self.lora, self.seed, self.trained_dtype)
        self.roles = self.task.build_roles(self.pipe, self.lora, self.seed)
        self.role_networks = self.roles and self.roles.networks

    def forward(self, samples: Sequence[Sample], progress: TrainProgress | None = None) -> Tensor:
        """Loss per sample (B,); see `loss`."""
        addresses = [SampleAddress(sample.epoch, sample.index) for sample in samples]
        return self.loss(samples, SampleRNG(self.seed, addresses), self.remembered, progress)

    def loss(
        self,
        samples: Sequence[Sample],
        rng: SampleRNG,
        memory: UnitMemory | None = None,
        progress: TrainProgress | None = None,
    ) -> Tensor:
        """Loss per sample (B,).

        Args:
            samples: B samples of one data set.
            rng: Source of the random numbers.
            memory: Keeps the outputs of frozen units for the next epoch; None keeps nothing.
            progress: How far the training is, by which some objectives choose a role to train; None evaluates the
                student.
        """
        memory = memory or UnitMemory(0)
        frozen = [self._frozen_inputs(sample, memory) for sample in samples]
        prepared = run_units_together(self.live_units, self.pipe, frozen)
        shared, posi, nega = batch_of(prepared)
        inputs = {**shared, **posi}
        if self.roles is not None:
            inputs |= {"roles": self.roles, "negative": nega, "progress": progress}
        with self._turn(progress):
            return self.task(self.pipe, rng=rng, **inputs)

    @contextmanager
    def _turn(self, progress: TrainProgress | None) -> Iterator[None]:
        """Inside, the noise levels are those of the network that this step trains; all of them in an evaluation."""
        scheduler = self.pipe.scheduler
        before = scheduler.trained
        if self.taking_turns and progress is not None:
            scheduler.trained = self.pipe.trained_levels([self.pipe.turn(self.trained_roots, progress.step, self.seed)])
        try:
            yield
        finally:
            scheduler.trained = before

    def trained_parts(self) -> dict[str, dict[str, nn.Parameter]]:
        """Trainable parameters by part and name: the model's (in a distillation the student's), then other roles'."""
        parts = super().trained_parts()
        if self.roles:
            return self.roles.partition(parts[MODEL])
        first, *others = self.taking_turns or (MODEL,)
        others = {name: {n: p for n, p in parts[MODEL].items() if n.startswith(f"pipe.{name}.")} for name in others}
        taken = {n for own in others.values() for n in own}
        return {MODEL: {n: p for n, p in parts[MODEL].items() if n not in taken}, **others}

    def lagging_parts(self) -> dict[str, Lagging]:
        return self.roles.lagging if self.roles else {}

    def trained_at(self, step: int) -> Sequence[str]:
        if not self.taking_turns:
            return self.task.trained_at(step)
        name = self.pipe.turn(self.trained_roots, step, self.seed)
        return (MODEL if name == self.taking_turns[0] else name,)

    @property
    def taking_turns(self) -> Sequence[str]:
        """Networks of which each optimizer step trains one, such as two experts; () if a step trains all."""
        return self.pipe.taking_turns(self.trained_roots)

    def remembers(self, index: int, variant: str | None) -> bool:
        return (index, variant) in self.remembered

    def learning_rate(self, role: str) -> float | None:
        return self.task.learning_rate(role)

    @property
    def sampling_settings(self) -> Mapping[str, Any] | None:
        return self.task.sampling_settings

    @torch.no_grad()
    def _frozen_inputs(self, sample: Sample, memory: UnitMemory) -> tuple[dict, dict, dict]:
        """A sample's inputs (shared, positive, negative) after the frozen units; from `memory` if they are there."""
        key = sample.index, sample.variant
        if key not in memory and (sample.variant is None or sample.data.made):  # never comes again, or is from a cache
            return self._run_frozen_units(sample)
        return memory.get(key, partial(self._run_frozen_units, sample), self.pipe.device)

    def _run_frozen_units(self, sample: Sample) -> tuple[dict, dict, dict]:
        """Run the frozen units unless a cache has their outputs; drop the inputs that nothing reads afterwards."""
        row = sample.data
        made = {side: to_device(inputs, self.pipe.device) for side, inputs in row.made.items()}
        inputs = with_made(self.get_pipeline_inputs(row), made)
        devices = [self.pipe.device] if self.pipe.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices):  # dropout of trained networks is the same if `memory` has the outputs
                sides = run_units(() if row.made else self.frozen_units, self.pipe, *inputs)
        except ValueError as error:
            raise ValueError(f"sample {sample.index} ({row['prompt']!r}): {error}") from error
        return tuple({name: value for name, value in side.items() if name in self.kept_inputs} for side in sides)

    def get_pipeline_inputs(self, data: dict) -> tuple[dict, dict, dict]:
        """The pipeline's inputs (shared, positive, negative) for one row, as if it were called to generate that row."""
        self.task.check_row(data)
        read = self.pipe.media.read
        optional = {name: name for name in self.task.optional_columns if name in data}
        extra = {name: self.pipe.typed(name, read(data, own)) for name, own in (self.extra_inputs | optional).items()}
        posi = {name: extra.pop(name) for name in self.pipe.one_sided_arguments if name in extra}
        shared = {
            **self.pipe.media.inputs(data[self.pipe.media.column]),
            "cfg_scale": self.task.guidance if self.task.reads_negative else 1,
            **self.memory.inputs,
            **self.task.sampling_inputs(self.pipe),
            **extra,
        }
        return shared, {"prompt": data["prompt"], **posi}, {"negative_prompt": self.task.negative_prompt}

    @torch.no_grad()
    def rehearse(self, dataset: TrainingData) -> None:
        """Run the template on the first sample before the base's weights are read, unless it needs them.

        Raises:
            ValueError: The template's output does not fit the pipeline.
        """
        if self.pipe.template is not None:
            row = dataset[0]
            rehearse(self.pipe, with_made(self.get_pipeline_inputs(row), row.made))

    def _trainable_models(self) -> Sequence[str]:
        if self.task.trainable_models is not None:
            return self.task.trainable_models
        defaults = self.pipe.training_defaults
        return () if self.lora else self.task.default_models or defaults.full_models or defaults.models

    @property
    def trained_roots(self) -> set[str]:
        """Names of the models with trained parameters: trained in full or in part, or with an adapter."""
        names = [*self.trainable_models, *(self.lora.models if self.lora else ())]
        return {name.split(".")[0] for name in names}

    def _check(self) -> None:
        for name in self.trainable_models:
            self.pipe.named_model(name, key="task.trainable_models")
        known = {*self.pipe.call_defaults, *optional_inputs(self.units)}
        unknown = set(self.extra_inputs) - known
        if unknown:
            raise ValueError(
                f"task.extra_inputs: {type(self.pipe).__name__} has no input {min(unknown)!r}; it has {sorted(known)}."
            )
        check_used(self.pipe, self.extra_inputs, "task.extra_inputs: ")
        both = {name.split(".")[0] for name in self.trainable_models} & set(self.lora.models if self.lora else ())
        if both:
            raise ValueError(
                f"task.trainable_models and lora.models both name {sorted(both)}, which would be trained in full and "
                "by LoRA at once; take it out of one of them."
            )
        if not self.trained_roots:
            raise ValueError("Nothing is trained: set task.trainable_models=[dit], or lora=lora.")
        if self.trained_dtype == torch.bfloat16 != self.pipe.torch_dtype:
            found = str(self.pipe.torch_dtype).removeprefix("torch.")
            raise ValueError(
                f"memory.trained_dtype=bfloat16 needs model.torch_dtype=bfloat16, but it is {found}; set either of "
                "them."
            )
        check_memory(self)
        if self.lora:
            self.lora.check(self.pipe)
        self.task.check(self.pipe, self.lora, cached=True)  # `read` checks again, when it knows whether data is cached


def with_made(inputs: Sequence[Mapping], made: Mapping[str, Mapping]) -> tuple[dict, dict, dict]:
    """A row's inputs (shared, positive, negative), with the outputs of frozen units that a cache has of the row."""
    sides = zip(("shared", "posi", "nega"), inputs, strict=True)
    return tuple({**own, **made.get(side, {})} for side, own in sides)


def prepare_training(
    pipe: BasePipeline,
    trainable_models: Iterable[str],
    adapter: Adapter | None,
    seed: int,
    trained_dtype: torch.dtype = torch.float32,
) -> None:
    """Make a pipeline with loaded weights ready: set the training noise levels, freeze, inject the adapter.

    Args:
        trainable_models: Models trained in full, converted to `trained_dtype`; everything else is frozen.
        adapter: Injected in fp32; None for none.
        seed: Of the adapter's initial values.
    """
    trainable_models = list(trainable_models)
    pipe.scheduler.set_timesteps(TRAINING_STEPS, training=True)
    pipe.scheduler.trained = pipe.trained_levels([*trainable_models, *(adapter.models if adapter else ())])
    pipe.freeze_except(trainable_models)
    for name in trainable_models:
        pipe.named_model(name).to(trained_dtype)
    if adapter is not None:
        adapter.inject(pipe, seed)


def _saved_buffers(model: nn.Module) -> list[str]:
    """Buffers that a released file of a model has, such as a table of positions; of a part of a model none."""
    if not all(parameter.requires_grad for parameter in model.parameters()):
        return []
    return sorted(model.state_dict().keys() & dict(model.named_buffers()).keys())
