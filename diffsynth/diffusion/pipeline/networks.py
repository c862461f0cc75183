"""The networks of a pipeline: found, compared with their files, loaded, frozen, adapted; each by its name."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...core.loader import (
    ModelConfig,
    build_module,
    check_weights,
    drop_weights,
    fingerprint,
    fingerprint_folder,
    load_weights,
    to_released_keys,
)
from ..adapters import files as lora_files
from . import sampling_settings
from .components import Folder, Network
from .units import PipelineUnit


@dataclass(frozen=True, kw_only=True)
class TrainingDefaults:
    """Where a training of one model starts from unless the configuration says otherwise.

    Args:
        learning_rate: Of an adapter or a template.
        full_learning_rate: Of the model itself, trained in full.
        max_steps: Optimizer steps.
        batch_size: Samples an optimizer step, over all devices.
        micro_batch_size: Samples a forward on one device; None is all at once.
        validate_every: Optimizer steps between two evaluations; None evaluates before the first and after the last.
        checkpointing: See `core.memory.MemoryRecipe`.
        lora_target_modules: Layers that LoRA adapts, by model.
        data_file_keys: Columns of image files that a row of its data has.
        extra_inputs: Those of them that the pipeline reads beside the image it is to make.
        example: Folder of its images in the data set `DiffSynth-Studio/diffsynth_example_dataset`; None for none.
    """

    learning_rate: float = 1e-4
    full_learning_rate: float = 1e-5
    max_steps: int = 300
    batch_size: int = 8
    micro_batch_size: int | None = 1
    validate_every: int | None = 100
    checkpointing: str = "blocks"
    lora_target_modules: Mapping[str, Sequence[str] | str] = field(default_factory=dict)
    data_file_keys: Sequence[str] = ("image",)
    extra_inputs: Sequence[str] = ()
    example: str | None = None


class PipelineNetworks(nn.Module):
    """A family's networks as attributes, None until built.

    Class attributes:
        components: Networks, and folders of tokenizers and processors, by attribute.
        in_iteration_models: What `model_fn` calls; by default the first network.
    """

    components: ClassVar[Mapping[str, Network | Folder]] = {}
    in_iteration_models: ClassVar[Sequence[str]] = ()

    def __init__(self, device="cpu", torch_dtype: torch.dtype = torch.bfloat16):
        super().__init__()
        self.device, self.torch_dtype = torch.device(device), torch_dtype
        self.training_defaults = TrainingDefaults()
        self._files: dict[str, list[Path] | None] = {}
        self._configs: dict[str, str | None] = {}  # those of weights that have none beside them
        self.folders: dict[str, Path] = {}  # of tokenizers and processors, by attribute
        self._fingerprints: dict[str, str] = {}
        self.sampling_settings: dict[str | None, Mapping[str, Any]] = {}  # by adapter file; None: the model itself
        for name in self.components:
            setattr(self, name, None)

    @classmethod
    def networks(cls) -> dict[str, Network]:
        """The networks among the components."""
        return {name: part for name, part in cls.components.items() if isinstance(part, Network)}

    @property
    def lora_prefixes(self) -> dict[str, str]:
        """What LoRA files call each network that has LoRAs."""
        return {name: network.lora for name, network in self.networks().items() if network.lora is not None}

    @classmethod
    def from_pretrained(
        cls,
        torch_dtype: torch.dtype = torch.bfloat16,
        device="cpu",
        model_configs: Sequence[ModelConfig] = (),
        **folder_configs: ModelConfig | None,
    ):
        """Build the pipeline and read all its weights.

        Args:
            model_configs: Where its networks are, in any order.
            folder_configs: Where its tokenizers and processors are, `tokenizer_config`, `processor_config`.

        Raises:
            TypeError: There is no folder of such a name.
        """
        folders = {f"{name}_config": name for name in cls.components if name not in cls.networks()}
        if unknown := sorted(folder_configs.keys() - folders.keys()):
            raise TypeError(f"{cls.__name__}.from_pretrained takes no {unknown[0]!r}; it takes {sorted(folders)}.")
        pipe = cls(device, torch_dtype)
        pipe.build_models(model_configs)
        for name, config in folder_configs.items():
            pipe.build_folder(folders[name], config)
        pipe.load_models()
        return pipe

    @classmethod
    def from_components(cls, torch_dtype: str = "bfloat16", training=None, device="cpu", **given):
        parts = {name: given.pop(name, None) for name in cls.components}
        for name, part in cls.components.items():
            if isinstance(part, Folder) and part.needed_by and parts[part.needed_by] and not parts[name]:
                raise ValueError(f"{part.needed_by} needs a {name}, but model.{name} is null; say where it is.")
        pipe = cls(device, getattr(torch, torch_dtype))
        pipe.build_models(parts[name] for name in cls.networks() if parts[name] is not None)
        for name in [name for name in parts if name not in cls.networks()]:
            pipe.build_folder(name, parts[name])
        pipe.call_defaults.update(given)
        pipe.training_defaults = training or TrainingDefaults()
        return pipe

    def build_models(self, model_configs: Iterable[ModelConfig]) -> None:
        """Find the files of each model, build it on the meta device and compare it with its files' headers.

        Weights that were trained for certain sampling settings, such as a distilled student's, are sampled with them.

        Raises:
            FileNotFoundError: Files are neither here nor to be had.
            ValueError: A model this pipeline has no place for, or a second one for the same place, or files of another
                architecture.
        """
        for model_config in model_configs:
            files = model_config.resolve()
            subclasses = {kind: cls for network in self.networks().values() for kind, cls in network.subclasses.items()}
            module = build_module(files, model_config.config, subclasses)
            if files is not None:  # of a sketch there are none
                check_weights(module, files)
            name = self._attribute(module, files)
            if name in self._files:
                raise ValueError(f"{files[0]} is a {type(module).__name__}, as {self._files[name][0]} already is.")
            setattr(self, name, module)
            self._files[name], self._configs[name] = files, model_config.config
            if name in self.in_iteration_models:
                self.use_sampling_settings(sampling_settings.of_model(module, files or ()))
            if (after := self.networks()[name].after) is not None:
                after(module)
        self.check_networks()

    def check_networks(self) -> None:
        """Refuse networks that are not of one model; called when those that there are are built."""

    def build_folder(self, name: str, config: ModelConfig | None) -> None:
        """Read a tokenizer or processor and check that it is the family's; None reads nothing.

        Raises:
            ValueError: It is another one.
        """
        if config is None:
            return
        (folder,) = config.resolve()
        setattr(self, name, self.components[name].read(folder))
        self.folders[name] = folder
        for part in self.components.values():
            if isinstance(part, Folder) and part.check is not None:
                part.check(self)

    def load_models(
        self,
        names: Iterable[str] | None = None,
        dtypes: Mapping[str, torch.dtype] | None = None,
        in_host_memory: Collection[str] = (),
        storages: Mapping[str, str] | None = None,
    ) -> None:
        """Read the weights of the built models `names` (all of them by default), drop the others.

        Args:
            dtypes: By model, where it is not the pipeline's.
            in_host_memory: Models that are read there, whatever the pipeline's device.
            storages: By model, how weights are kept in fewer bits; see `core.memory.storage`.
        """
        wanted = set(self._files if names is None else names)
        for name, files in self._files.items():
            if name in wanted:
                device = "cpu" if name in in_host_memory and self.device.type != "meta" else self.device
                dtype, storage = (dtypes or {}).get(name, self.torch_dtype), (storages or {}).get(name, "none")
                load_weights(getattr(self, name), files, dtype, device, storage)
            else:
                setattr(self, name, None)

    @property
    def built_models(self) -> set[str]:
        """Names of the models there are."""
        return {name for name in self._files if getattr(self, name) is not None}

    @property
    def network(self) -> nn.Module:
        """What `model_fn` predicts with."""
        return getattr(self, self.in_iteration_models[0])

    @contextmanager
    def loaded(self, names: Iterable[str]) -> Iterator[None]:
        """Read the weights of these built models, and let go of them afterwards."""
        names = [name for name in names if name in self._files]
        for name in names:
            load_weights(getattr(self, name), self._files[name], self.torch_dtype, self.device)
        try:
            yield
        finally:
            for name in names:
                drop_weights(getattr(self, name))

    def _attribute(self, module: nn.Module, files: Sequence[Path]) -> str:
        names = [name for name, network in self.networks().items() if network.holds(module)]
        if not names:
            taken = sorted(kind for network in self.networks().values() for kind in network.names)
            raise ValueError(
                f"{type(self).__name__} has no place for a {type(module).__name__} ({files[0]}); it takes {taken}."
            )
        return names[0]

    def models_of(self, units: Iterable[PipelineUnit], *, model_fn: bool) -> set[str]:
        """Names of the models that these units, and `model_fn` if it is called, need loaded."""
        names = {name for unit in units for name in unit.onload_model_names}
        return names | (set(self.in_iteration_models) if model_fn else set())

    def require(self, users: Mapping[str, str]) -> None:
        """Refuse a pipeline that was built without a model that is needed; `users` says of each what needs it.

        Raises:
            ValueError: Names both.
        """
        for name, user in users.items():
            if getattr(self, name, None) is None:
                raise ValueError(f"{user} needs {name}, but model.{name} is null; say where its weights are.")

    def freeze_except(self, names: Iterable[str]) -> None:
        """Let gradients reach the named modules only (dotted names reach into a model)."""
        self.eval().requires_grad_(False)
        for name in names:
            self.named_model(name).train().requires_grad_(True)

    def named_model(self, name: str) -> nn.Module:
        """The module of a dotted name such as `dit` or `dit.transformer_blocks.3`.

        Raises:
            ValueError: There is no such module; the message lists those there are.
        """
        try:
            module = self.get_submodule(name)
        except AttributeError:
            module = None
        if module is None:
            raise ValueError(f"{type(self).__name__} has no model {name!r}; it has {sorted(self._beside(name))}.")
        return module

    def _beside(self, name: str) -> set[str]:
        """Names of the modules where a dotted name leads nowhere."""
        known, parent = dict(self.named_modules()), name.rpartition(".")[0]
        while parent not in known:
            parent = parent.rpartition(".")[0]
        return {f"{parent}.{child}".lstrip(".") for child, _ in known[parent].named_children()}

    def released_weights(self, name: str, keys: Iterable[str]) -> dict[str, Tensor]:
        """The tensors `keys` of a model, under the names that its released checkpoint gives them."""
        model = self.named_model(name)
        return to_released_keys(model, {key: model.get_parameter(key).detach() for key in keys})

    def sources(self) -> dict[str, dict[str, str]]:
        """Where each loaded model's weights lie, and their fingerprint."""
        loaded = [name for name in self._files if name in self.built_models]
        return {n: {"path": str(self._files[n][0].parent), "fingerprint": self.fingerprint(n)} for n in loaded}

    def fingerprint(self, name: str) -> str | None:
        """Of the files of a model or tokenizer, loaded or not; None if it has none."""
        if name not in self._fingerprints:
            if name in self.folders:
                self._fingerprints[name] = fingerprint_folder(self.folders[name])
            elif name in self._files:
                self._fingerprints[name] = fingerprint(self._files[name], self._configs[name])
        return self._fingerprints.get(name)

    def use_sampling_settings(self, settings: Mapping[str, Any] | None, adapter: str | Path | None = None) -> None:
        """Sample with the settings that weights were trained for, unless a request says otherwise.

        Args:
            settings: Such as a distilled student's number of steps; None changes nothing.
            adapter: The file of the weights, whose settings come before the model's own.
        """
        if settings is not None:
            self.sampling_settings[adapter and str(adapter)] = settings

    def load_models_to_device(self, names: Iterable[str]) -> None:
        """Where a unit says which models it is about to call; memory recipes bring them in here."""

    def load_lora(self, model: nn.Module | str, path: str | Path, alpha: float = 1.0, fuse: bool = False) -> None:
        """Add a LoRA file to a model (`pipe.load_lora(pipe.dit, "style.safetensors")`), scaled by `alpha`.

        A file that was trained for certain sampling settings, such as a distilled student's, is sampled with them.

        Raises:
            ValueError: The file holds a key this model has no place for.
        """
        name = model if isinstance(model, str) else next(n for n, m in self.named_children() if m is model)
        lora_files.load(self.named_model(name), path, prefix=self.lora_prefixes.get(name, name), scale=alpha, fuse=fuse)
        self.use_sampling_settings_of(path)

    def check_adapters(self, paths: Iterable[str | Path]) -> None:
        """Refuse adapter files that fit none of this pipeline's models; needs no weights."""
        for path in paths:
            for name in self.adapted_by(path):
                lora_files.check_layers(
                    self.named_model(name), lora_files.read(path, self.lora_prefixes[name])[0], path
                )

    def use_sampling_settings_of(self, path: str | Path) -> None:
        """Sample with the settings that an adapter file names, if it names any; needs no weights."""
        self.use_sampling_settings(sampling_settings.of_file(path), path)

    def load_adapter(self, path: str | Path, scale: float = 1.0, fuse: bool = False) -> None:
        """Add an adapter file to all the models that its keys name; see `load_lora`."""
        for name in self.adapted_by(path):
            self.load_lora(name, path, scale, fuse)

    def adapted_by(self, path: str | Path) -> list[str]:
        """Names of the models that an adapter file is for."""
        named = lora_files.prefixes(path)
        return [name for name, prefix in self.lora_prefixes.items() if prefix in named] or [self.in_iteration_models[0]]
