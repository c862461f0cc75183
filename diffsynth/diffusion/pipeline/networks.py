"""`PipelineNetworks`: builds, loads, freezes and adapts the networks of a pipeline, each an attribute of its own."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...core.input_files import InputFile, all_in, beside
from ...core.loader import (
    ModelConfig,
    build_module,
    check_weights,
    drop_weights,
    fingerprint,
    fingerprint_folder,
    load_weights,
    to_released_keys,
    use_layouts,
)
from ..adapters.names import LayerNames
from ..architectures import config_of
from ..flow_match import ALL_LEVELS
from ..training_defaults import TrainingDefaults
from . import sampling_settings
from .components import Folder, Network
from .units import PipelineUnit


class PipelineNetworks(nn.Module):
    """A family's networks as attributes, which are None until they are built.

    Class attributes:
        components: Networks, and folders of tokenizers and processors, by attribute.
        in_iteration_models: Networks that `model_fn` calls; by default the first one. A pipeline has those of them that
            are built, and those that every model of the family has.
    """

    components: ClassVar[Mapping[str, Network | Folder]] = {}
    in_iteration_models: ClassVar[Sequence[str]] = ()

    def __init__(self, device: str | torch.device = "cpu", torch_dtype: torch.dtype = torch.bfloat16):
        super().__init__()
        self.device, self.torch_dtype = torch.device(device), torch_dtype
        self.training_defaults = TrainingDefaults()
        self._files: dict[str, list[Path] | None] = {}  # weights of each built network
        self._configs: dict[str, str | Mapping | None] = {}  # configs of weights that lie without a config.json
        self.folders: dict[str, Path] = {}  # of tokenizers and processors, by attribute
        self._fingerprints: dict[str, str] = {}
        self.sampling_settings: dict[str | None, Mapping[str, Any]] = {}  # by adapter file; None is the model itself
        for name in self.components:
            setattr(self, name, None)

    @classmethod
    def networks(cls) -> dict[str, Network]:
        """The networks among the components."""
        return {name: part for name, part in cls.components.items() if isinstance(part, Network)}

    @property
    def lora_prefixes(self) -> dict[str, str]:
        """First part of the keys in LoRA files, by network."""
        return {name: _layer_names(name, network).prefix for name, network in self.networks().items()}

    def layer_names(self, name: str) -> LayerNames:
        """Names of a network and its layers in adapter files."""
        own = _layer_names(name, self.networks().get(name))
        return replace(own, others=tuple(prefix for prefix in self.lora_prefixes.values() if prefix != own.prefix))

    # Building

    @classmethod
    def from_pretrained(
        cls,
        torch_dtype: torch.dtype = torch.bfloat16,
        device: str | torch.device = "cpu",
        model_configs: Sequence[ModelConfig] = (),
        **folder_configs: ModelConfig | None,
    ) -> "PipelineNetworks":
        """Build the pipeline and read all its weights.

        Args:
            model_configs: Where the networks are, see `build_models`.
            folder_configs: Where the tokenizers and processors are, as `tokenizer_config`, `processor_config`.

        Raises:
            TypeError: The family has no tokenizer or processor of such a name.
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
    def from_components(
        cls,
        torch_dtype: str = "bfloat16",
        training: TrainingDefaults | None = None,
        device: str | torch.device = "cpu",
        **given: Any,
    ) -> "PipelineNetworks":
        # `declaration.complete` gives each family's method its signature and docstring.
        configs = {name: given.pop(name, None) for name in cls.components}
        for name, part in cls.components.items():
            if isinstance(part, Folder) and part.needed_by and configs[part.needed_by] and not configs[name]:
                raise ValueError(
                    f"{part.needed_by} needs a {name}, but model.{name} is null; set model.{name} to where it is."
                )
        pipe = cls(device, getattr(torch, torch_dtype))
        pipe.build_models({name: configs[name] for name in cls.networks() if configs[name] is not None})
        for name in [name for name in configs if name not in cls.networks()]:
            pipe.build_folder(name, configs[name])
        pipe.call_defaults.update(given)
        pipe.training_defaults = training or TrainingDefaults()
        return pipe

    def build_models(self, model_configs: Iterable[ModelConfig] | Mapping[str, ModelConfig]) -> None:
        """Find the files of each network, build it on the meta device and compare it with its files' headers.

        The sampling settings that are stored with weights, such as a distilled student's, become the pipeline's.

        Args:
            model_configs: Where the networks are, by name or in any order; without names, several networks of one class
                are in the order of `components`.

        Raises:
            FileNotFoundError: Files are not on this machine and cannot be downloaded.
            ValueError: The family has no such network, two configs are of the same network, or files are of another
                architecture.
        """
        subclasses = {kind: cls for network in self.networks().values() for kind, cls in network.subclasses.items()}
        is_named = isinstance(model_configs, Mapping)
        named = list(model_configs.items() if is_named else ((None, own) for own in model_configs))
        for wanted, model_config in named:
            if wanted is not None:
                network = self.networks().get(wanted)
                model_config.check_path(wanted, network.made_by if network else "")
            files = model_config.resolve()
            config = self._config(wanted, model_config, files, [own for _, own in named])
            self._take(build_module(files, config, subclasses, wanted), files, config, wanted)
        self.in_iteration_models = tuple(filter(self._is_expected, type(self).in_iteration_models))
        self.check_networks()

    def _take(
        self, module: nn.Module, files: list[Path] | None, config: str | Mapping | None, wanted: str | None
    ) -> None:
        """Make a built network the attribute that it is for, and compare it with its files' headers."""
        name = self._attribute(module, files, wanted)
        network = self.networks()[name]
        use_layouts(module, network.layouts)
        if files is not None:  # a pipeline that stays on the meta device has none
            check_weights(module, files)
        if name in self._files:
            raise ValueError(
                f"{files[0]} is a {type(module).__name__}, as {self._files[name][0]} already is; leave out one."
            )
        setattr(self, name, module)
        self._files[name], self._configs[name] = files, config
        if name in self.in_iteration_models:
            self.use_sampling_settings(sampling_settings.of_model(module, files or ()))
        if network.after is not None:
            network.after(module)

    def _attribute(self, module: nn.Module, files: Sequence[Path], wanted: str | None = None) -> str:
        """The attribute of a network: the one that is wanted, or else the first free one for its class."""
        names = [name for name, network in self.networks().items() if network.holds(module)]
        if not names:
            known = sorted(kind for network in self.networks().values() for kind in network.names)
            raise ValueError(
                f"{type(self).__name__} has no place for a {type(module).__name__} ({files[0]}); expected one of "
                f"{known}."
            )
        free = [name for name in names if name not in self._files]
        return wanted if wanted in names else (free or names)[0]

    def _config(
        self, wanted: str | None, part: ModelConfig, files: list[Path] | None, parts: Iterable[ModelConfig]
    ) -> str | Mapping[str, Any] | None:
        """The config.json of a network that is named, or else of any of them; see `config_of`."""
        names = {name: (network, self.lora_prefixes[name]) for name, network in self.networks().items()}
        return config_of({wanted: names[wanted]} if wanted in names else names, part, files, parts)

    def _is_expected(self, name: str) -> bool:
        return getattr(self, name) is not None or not self.networks()[name].is_optional

    def check_networks(self) -> None:
        """Refuse networks that do not fit each other; a family may refuse more. Called when all networks are built."""

    def use_sampling_settings(self, settings: Mapping[str, Any] | None, adapter: str | Path | None = None) -> None:
        """Set the sampling settings of requests that leave them open.

        Args:
            settings: Settings that weights were trained for, such as a distilled student's number of steps; None
                changes nothing.
            adapter: The adapter file that has them, which overrides the model's; None for the model itself.
        """
        if settings is not None:
            self.sampling_settings[adapter and str(adapter)] = settings

    def build_folder(self, name: str, config: ModelConfig | None) -> None:
        """Read a tokenizer or processor and check that it is the family's; None reads nothing.

        Raises:
            ValueError: It is another family's.
        """
        if config is None:
            return
        (folder,) = config.resolve()
        setattr(self, name, self.components[name].read(folder))
        self.folders[name] = folder
        for part in self.components.values():
            if isinstance(part, Folder) and part.check is not None:
                part.check(self)

    # Weights

    def load_models(
        self,
        names: Iterable[str] | None = None,
        dtypes: Mapping[str, torch.dtype] | None = None,
        in_host_memory: Collection[str] = (),
        storages: Mapping[str, str] | None = None,
    ) -> None:
        """Read the weights of the built models `names` (None for all), and drop the other models.

        Args:
            dtypes: Dtypes by model; others get the pipeline's.
            in_host_memory: Models that are read to host memory, whatever the pipeline's device.
            storages: Storages of weights in fewer bits by model, see `core.memory.storage`; others get none.
        """
        wanted = set(self._files if names is None else names)
        self.drop_models(self.built_models - wanted)
        self.read_weights(wanted, dtypes, in_host_memory, storages)

    def read_weights(
        self,
        names: Collection[str],
        dtypes: Mapping[str, torch.dtype] | None = None,
        in_host_memory: Collection[str] = (),
        storages: Mapping[str, str] | None = None,
    ) -> None:
        """Read the weights of these built models, as `load_models` does; the others stay as they are."""
        for name in [name for name in self._files if name in names]:
            device = "cpu" if name in in_host_memory and self.device.type != "meta" else self.device
            dtype, storage = (dtypes or {}).get(name, self.torch_dtype), (storages or {}).get(name, "none")
            load_weights(getattr(self, name), self._files[name], dtype, device, storage)

    def drop_models(self, names: Iterable[str]) -> None:
        """Drop models: their weights are freed, and their attributes are None again."""
        for name in names:
            drop_weights(getattr(self, name))  # now, not when Python finds the cycles of references in the module
            setattr(self, name, None)

    @property
    def built_models(self) -> set[str]:
        """Names of the models that are built and not dropped."""
        return {name for name in self._files if getattr(self, name) is not None}

    @property
    def network(self) -> nn.Module:
        """The network that predicts: the first one that `model_fn` calls."""
        return getattr(self, self.in_iteration_models[0])

    def load_models_to_device(self, names: Iterable[str]) -> None:
        """Units call this before they call models; an override may move the models to the device here."""

    @contextmanager
    def loaded(self, names: Iterable[str]) -> Iterator[None]:
        """Inside, the weights of these built models are loaded; afterwards they are dropped."""
        names = [name for name in names if name in self._files]
        for name in names:
            load_weights(getattr(self, name), self._files[name], self.torch_dtype, self.device)
        try:
            yield
        finally:
            for name in names:
                drop_weights(getattr(self, name))

    # What is called, and what is trained

    def models_of(self, units: Iterable[PipelineUnit], *, model_fn: bool) -> set[str]:
        """Names of the models that these units call, and with `model_fn` also those that `model_fn` calls."""
        names = {name for unit in units for name in unit.onload_model_names}
        return names | (set(self.in_iteration_models) if model_fn else set())

    def networks_in_training(self, trained: Collection[str]) -> Sequence[str]:
        """Names of the networks that `model_fn` calls in a training of the models `trained`."""
        return self.in_iteration_models

    def trained_levels(self, trained: Collection[str]) -> tuple[float, float]:
        """The noise levels that a training of the models `trained` learns; see `FlowMatchScheduler.trained`."""
        return ALL_LEVELS

    def taking_turns(self, trained: Collection[str]) -> Sequence[str]:
        """Those of the models `trained` of which each optimizer step trains one; () if a step trains all of them."""
        return ()

    def turn(self, trained: Collection[str], step: int, seed: int) -> str:
        """The model that optimizer step `step` (from 0) trains, where models take turns; a function of the seed."""
        raise NotImplementedError(f"The models of {type(self).__name__} do not take turns.")

    def freeze_except(self, names: Iterable[str]) -> None:
        """Freeze all parameters but those of the named modules; a dotted name is a part of a model."""
        self.eval().requires_grad_(False)
        for name in names:
            self.named_model(name).train().requires_grad_(True)

    # Models by name

    def require(self, users: Mapping[str, str]) -> None:
        """Refuse a pipeline that was built without a model that is needed.

        Args:
            users: Needed models, and for each the name of what needs it.

        Raises:
            ValueError: The message names the model and what needs it.
        """
        for name, user in users.items():
            if getattr(self, name, None) is None:
                raise ValueError(
                    f"{user} needs {name}, but model.{name} is null; set model.{name} to where its weights are."
                )

    def named_model(self, name: str, key: str | None = None) -> nn.Module:
        """The module of a dotted name such as `dit` or `dit.transformer_blocks.3`.

        Args:
            key: The key of the configuration that chose the name; the error tells to set it.

        Raises:
            ValueError: There is no such module; the message lists the modules at that level.
        """
        try:
            module = self.get_submodule(name)
        except AttributeError:
            module = None
        if module is None:
            known = ", ".join(sorted(self._siblings(name)))
            remedy = f"set {key} to some of" if key else "it has"
            raise ValueError(f"{type(self).__name__} has no model {name!r}; {remedy} {known}.")
        return module

    def _siblings(self, name: str) -> set[str]:
        """Names of the modules at the level at which a dotted name stops to exist."""
        known, parent = dict(self.named_modules()), name.rpartition(".")[0]
        while parent not in known:
            parent = parent.rpartition(".")[0]
        return {f"{parent}.{child}".lstrip(".") for child, _ in known[parent].named_children()}

    def released_weights(self, name: str, keys: Iterable[str]) -> dict[str, Tensor]:
        """The parameters and buffers `keys` of a model, under the names of its released checkpoint."""
        model = self.named_model(name)
        tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        return to_released_keys(model, {key: tensors[key].detach() for key in keys})

    # Files

    def sources(self) -> dict[str, dict[str, str]]:
        """Folder and fingerprint of each built model's weights."""
        loaded = [name for name in self._files if name in self.built_models]
        return {n: {"path": str(self._files[n][0].parent), "fingerprint": self.fingerprint(n)} for n in loaded}

    def input_files(self) -> dict[str, dict[str, InputFile]]:
        """The files of each network, tokenizer and processor, by its name and then by their names."""
        networks = {}
        for name, files in self._files.items():
            networks[name] = {**_config_file(self._configs[name], files), **beside(files[0], files)}
        return networks | {name: all_in(folder) for name, folder in self.folders.items()}

    def weight_files(self, name: str) -> list[Path]:
        """The safetensors files of a built network."""
        return list(self._files[name])

    def fingerprint(self, name: str) -> str | None:
        """Fingerprint of the files of a model, a tokenizer or a processor, loaded or not; None if it has no files."""
        if name not in self._fingerprints:
            if name in self.folders:
                self._fingerprints[name] = fingerprint_folder(self.folders[name])
            elif name in self._files:
                self._fingerprints[name] = fingerprint(self._files[name], self._configs[name])
        return self._fingerprints.get(name)


def _config_file(config: str | Mapping | None, files: Sequence[Path]) -> dict[str, InputFile]:
    """The file of a configuration, unless it is one of this package."""
    if isinstance(config, Mapping):
        return {}
    place = Path(config or files[0].parent)
    return {"config.json": InputFile(str(place / "config.json" if place.is_dir() else place))}


def _layer_names(name: str, network: Network | None) -> LayerNames:
    return (network and network.lora) or LayerNames(prefix=name)
