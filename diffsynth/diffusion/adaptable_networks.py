"""`AdaptableNetworks`: a pipeline's networks, to which adapter files can be added, and their sampling settings."""

from collections.abc import Iterable
from pathlib import Path

from torch import nn

from ..core.loader import ModelConfig
from .adapters import files as lora_files
from .pipeline import sampling_settings
from .pipeline.networks import PipelineNetworks


class AdaptableNetworks(PipelineNetworks):
    """A family's networks with adapters that are read from files; an adapter belongs to the networks its keys name."""

    def load_lora(
        self,
        model: nn.Module | str,
        path: str | Path | ModelConfig,
        alpha: float = 1.0,
        fuse: bool = False,
        hotload: bool | None = None,
    ) -> None:
        """Add a LoRA file to a model (`pipe.load_lora(pipe.dit, "style.safetensors")`), scaled by `alpha`.

        The sampling settings that are stored in the file, such as a distilled student's, become the pipeline's.

        Args:
            path: The file, or where it is on a hub.
            fuse: Merge the LoRA into the weights.
            hotload: DiffSynth-Studio's name for `not fuse`; None leaves it to `fuse`.

        Raises:
            FileNotFoundError: The file is not on this machine and cannot be downloaded.
            ValueError: The file has a key that belongs to no layer of the model.
        """
        path, fuse = self.adapter_file(_one_file(path)), fuse if hotload is None else not hotload
        name = model if isinstance(model, str) else next(n for n, m in self.named_children() if m is model)
        lora_files.warn_of_unread(path, self.lora_prefixes.values())
        lora_files.load(self.named_model(name), path, self.layer_names(name), scale=alpha, fuse=fuse)
        settings = sampling_settings.of_file(lora_files.find_file(path))
        self.use_sampling_settings(settings, None if fuse else path)

    def clear_lora(self) -> None:
        """Remove all adapters that are not merged into the weights."""
        for name in self.built_models & self.lora_prefixes.keys():
            lora_files.remove(getattr(self, name))
        self.sampling_settings = {path: kept for path, kept in self.sampling_settings.items() if path is None}

    def check_adapters(self, paths: Iterable[str | Path]) -> None:
        """Refuse adapter files that are broken or were made for other models; needs no weights."""
        for path in paths:
            for name in self.adapted_by(path):
                file = self.adapter_file(path)
                tensors = lora_files.read(file, self.layer_names(name), self.named_model(name))
                lora_files.infer_config(tensors, file)

    def use_sampling_settings_of(self, path: str | Path) -> None:
        """Set the sampling settings to those stored in an adapter file, if it has any; needs no weights."""
        file = self.adapter_file(path)
        self.use_sampling_settings(sampling_settings.of_file(lora_files.find_file(file)), file)

    def load_adapter(self, path: str | Path, scale: float = 1.0, fuse: bool = False) -> None:
        """Add an adapter file to all models that its keys name; see `load_lora`."""
        for name in self.adapted_by(path):
            self.load_lora(name, path, scale, fuse)

    def adapted_by(self, path: str | Path) -> list[str]:
        """Names of the models that an adapter file is for; the predicting network if its keys name none.

        A name before the file's path, such as `dit2:low.safetensors`, says it for a file whose keys do not.
        """
        if (file := self.adapter_file(path)) != path:
            return [str(path).partition(":")[0]]
        lora_files.warn_of_unread(path, self.lora_prefixes.values())
        named, main = lora_files.prefixes(file, self.lora_prefixes.values()), self.in_iteration_models[0]
        adapted = [name for name, prefix in self.lora_prefixes.items() if prefix in named]
        bare = [main] if None in named and main not in adapted else []
        return self._stated(path) or [*bare, *adapted] or [main]

    def adapter_file(self, path: str | Path) -> str | Path:
        """The path of an adapter file without the name of the model before it."""
        name, _, file = str(path).partition(":")
        return file if file and name in self.networks() else path

    def _stated(self, path: str | Path) -> list[str]:
        """The network that shares the names of another one, and that a file of this project states."""
        sharing = [name for name in self.networks() if self.layer_names(name).shared is not None]
        stated = lora_files.stated_network(path) if sharing else None
        return [name for name in sharing if self.lora_prefixes[name] == stated]


def _one_file(path: str | Path | ModelConfig) -> str | Path:
    if not isinstance(path, ModelConfig):
        return path
    files = path.resolve()
    if len(files) != 1:
        raise ValueError(f"{path} names {len(files)} files; expected one adapter file, such as model.safetensors.")
    return files[0]
