"""The networks of a pipeline: found, compared with their files, loaded, frozen, adapted; each by its name."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
from .units import PipelineUnit


@dataclass(frozen=True, kw_only=True)
class TrainingDefaults:
    """Where a training of one model starts from unless the configuration says otherwise.

    Args:
        learning_rate: Of LoRA training.
        micro_batch_size: Samples a forward on one device; None is all at once.
        checkpointing: See `core.memory.MemoryRecipe`.
        lora_target_modules: Layers that LoRA adapts, by model.
    """

    learning_rate: float = 1e-4
    micro_batch_size: int | None = 1
    checkpointing: str = "blocks"
    lora_target_modules: Mapping[str, Sequence[str] | str] = field(default_factory=dict)


class PipelineModels(nn.Module):
    """Networks as attributes, None until built.

    A subclass sets `model_classes` (class name in a config.json → attribute, class to build), `in_iteration_models`
    (what `model_fn` calls) and `lora_prefixes` (attribute → the name diffusers gives that network in a LoRA file).
    """

    model_classes: Mapping[str, tuple[str, type | None]] = {}
    lora_prefixes: Mapping[str, str] = {}
    in_iteration_models: tuple[str, ...] = ("dit",)

    def __init__(self, device="cpu", torch_dtype: torch.dtype = torch.bfloat16):
        super().__init__()
        self.device, self.torch_dtype = torch.device(device), torch_dtype
        self.training_defaults = TrainingDefaults()
        self._files: dict[str, list[Path] | None] = {}
        self._configs: dict[str, str | None] = {}  # those of weights that have none beside them
        self.tokenizer_folders: dict[str, Path] = {}  # by attribute
        self._fingerprints: dict[str, str] = {}
        self.sampling_settings: dict[str | None, Mapping[str, Any]] = {}  # by adapter file; None: the model itself
        for name, _ in self.model_classes.values():
            setattr(self, name, None)

    def build_models(self, model_configs: Iterable[ModelConfig]) -> None:
        """Find the files of each model, build it on the meta device and compare it with its files' headers.

        Weights that say how they are to be drawn, as those of a distilled student do, are drawn so: see `use_sampling_settings`.

        Raises:
            FileNotFoundError: Files are neither here nor to be had.
            ValueError: A model this pipeline has no place for, or a second one for the same place, or files of another
                architecture.
        """
        for model_config in model_configs:
            files = model_config.resolve()
            module = build_module(files, model_config.config, {k: c for k, (_, c) in self.model_classes.items() if c})
            if files is not None:  # of a sketch there are none
                check_weights(module, files)
            name = self._attribute(module, files)
            if name in self._files:
                raise ValueError(f"{files[0]} is a {type(module).__name__}, as {self._files[name][0]} already is.")
            setattr(self, name, module)
            self._files[name], self._configs[name] = files, model_config.config
            if name in self.in_iteration_models:
                self.use_sampling_settings(sampling_settings.of_model(module, files or ()))

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
        kinds = [kind for kind, (_, cls) in self.model_classes.items() if _is_kind(module, kind, cls)]
        if not kinds:
            raise ValueError(
                f"{type(self).__name__} has no place for a {type(module).__name__} ({files[0]}); "
                f"it takes {sorted(self.model_classes)}."
            )
        return self.model_classes[kinds[0]][0]

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
            if name in self.tokenizer_folders:
                self._fingerprints[name] = fingerprint_folder(self.tokenizer_folders[name])
            elif name in self._files:
                self._fingerprints[name] = fingerprint(self._files[name], self._configs[name])
        return self._fingerprints.get(name)

    def use_sampling_settings(self, settings: Mapping[str, Any] | None, adapter: str | Path | None = None) -> None:
        """Draw as weights were trained to be drawn: with arguments that requests may still overrule.

        Args:
            settings: Such as a distilled student's number of steps; None of weights that say nothing, which changes
                nothing.
            adapter: The file they are of, which comes before the model itself.
        """
        if settings is not None:
            self.sampling_settings[adapter and str(adapter)] = settings

    def load_models_to_device(self, names: Iterable[str]) -> None:
        """Where a unit says which models it is about to call; memory recipes bring them in here."""

    def load_lora(self, model: nn.Module | str, path: str | Path, alpha: float = 1.0, fuse: bool = False) -> None:
        """Add a LoRA file to a model (`pipe.load_lora(pipe.dit, "style.safetensors")`), scaled by `alpha`.

        One that says how it is to be drawn, as that of a distilled student does, is drawn so: see `use_sampling_settings`.

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
        """Draw as an adapter file says, if it says anything (see `use_sampling_settings`); needs no weights."""
        self.use_sampling_settings(sampling_settings.of_file(path), path)

    def load_adapter(self, path: str | Path, scale: float = 1.0, fuse: bool = False) -> None:
        """Add an adapter file to all the models that its keys name; see `load_lora`."""
        for name in self.adapted_by(path):
            self.load_lora(name, path, scale, fuse)

    def adapted_by(self, path: str | Path) -> list[str]:
        """Names of the models that an adapter file is for."""
        named = lora_files.prefixes(path)
        return [name for name, prefix in self.lora_prefixes.items() if prefix in named] or [self.in_iteration_models[0]]


def _is_kind(module: nn.Module, kind: str, cls: type | None) -> bool:
    return type(module).__name__ == kind or (cls is not None and isinstance(module, cls))
