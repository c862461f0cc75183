"""What all pipelines share: models by name, units, guidance, the sampling loop."""

import copy
import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from ..core.data import collate
from ..core.loader import ModelConfig, build_module, check_weights, load_weights, to_released_keys
from . import lora as lora_format
from .units import PipelineUnit, PipelineUnitRunner, required_units, run_units

__all__ = ["BasePipeline", "PipelineUnit", "PipelineUnitRunner"]


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


class BasePipeline(nn.Module):
    """A model family: its networks as attributes, its units, its `model_fn`, its noise schedule.

    A subclass sets `model_classes` (class name in a config.json → attribute, class to build), `model_fn`, `scheduler`,
    `units` and `lora_prefixes` (attribute → the name diffusers gives that network in a LoRA file).
    """

    model_classes: Mapping[str, tuple[str, type | None]] = {}
    lora_prefixes: Mapping[str, str] = {}
    in_iteration_models: tuple[str, ...] = ("dit",)
    per_image_arguments: tuple[str, ...] = ("prompt", "negative_prompt", "seed", "input_image", "inpaint_mask")
    height_division_factor = width_division_factor = 16
    model_fn: Callable[..., Tensor]

    def __init__(self, device="cpu", torch_dtype: torch.dtype = torch.bfloat16):
        super().__init__()
        self.device, self.torch_dtype = torch.device(device), torch_dtype
        self.units: list[PipelineUnit] = []
        self.unit_runner = PipelineUnitRunner()
        self.scheduler = None
        self.progress_bar = tqdm
        self.training_defaults = TrainingDefaults()
        self._files: dict[str, list[Path]] = {}
        for name, _ in self.model_classes.values():
            setattr(self, name, None)
        self.call_defaults = {
            name: parameter.default
            for name, parameter in inspect.signature(type(self).__call__).parameters.items()
            if parameter.default is not inspect.Parameter.empty
        }

    # Models -----------------------------------------------------------------------------------------------------------

    def build_models(self, model_configs: Iterable[ModelConfig]) -> None:
        """Find the files of each model, build it on the meta device and compare it with its files' headers.

        Raises:
            FileNotFoundError: Files are neither here nor to be had.
            ValueError: A model this pipeline has no place for, or a second one for the same place, or files of another
                architecture.
        """
        for model_config in model_configs:
            files = model_config.resolve()
            module = build_module(files, model_config.config, {k: c for k, (_, c) in self.model_classes.items() if c})
            check_weights(module, files)
            name = self._attribute(module, files)
            if name in self._files:
                raise ValueError(f"{files[0]} is a {type(module).__name__}, as {self._files[name][0]} already is.")
            setattr(self, name, module)
            self._files[name] = files

    def load_models(self, names: Iterable[str] | None = None, dtypes: Mapping[str, torch.dtype] | None = None) -> None:
        """Read the weights of the built models `names` (all of them by default), drop the others."""
        wanted = set(self._files if names is None else names)
        for name, files in self._files.items():
            if name in wanted:
                load_weights(getattr(self, name), files, (dtypes or {}).get(name, self.torch_dtype), self.device)
            else:
                setattr(self, name, None)

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
            raise ValueError(
                f"{type(self).__name__} has no model {name!r}; it has {sorted(dict(self.named_children()))}."
            )
        return module

    @contextmanager
    def sampling(self):
        """Draw images in the middle of training: evaluation mode inside, the training state back afterwards."""
        training = {name: module.training for name, module in self.named_modules()}
        scheduler = copy.copy(self.scheduler)
        try:
            yield self.eval()
        finally:
            self.scheduler = scheduler
            for name, module in self.named_modules():
                module.training = training[name]

    def released_weights(self, name: str, keys: Iterable[str]) -> dict[str, Tensor]:
        """The tensors `keys` of a model, under the names that its released checkpoint gives them."""
        model = self.named_model(name)
        return to_released_keys(model, {key: model.get_parameter(key).detach() for key in keys})

    def load_models_to_device(self, names: Iterable[str]) -> None:
        """Where a unit says which models it is about to call; memory recipes bring them in here."""

    def load_lora(self, model: nn.Module | str, path: str | Path, alpha: float = 1.0, fuse: bool = False) -> None:
        """Add a LoRA file to a model (`pipe.load_lora(pipe.dit, "style.safetensors")`), scaled by `alpha`.

        Raises:
            ValueError: The file holds a key this model has no place for.
        """
        name = model if isinstance(model, str) else next(n for n, m in self.named_children() if m is model)
        lora_format.load(
            self.named_model(name), path, prefix=self.lora_prefixes.get(name, name), scale=alpha, fuse=fuse
        )

    def check_adapters(self, paths: Iterable[str | Path]) -> None:
        """Refuse adapter files that fit none of this pipeline's models; needs no weights."""
        for path in paths:
            for name in self._adapted_by(path):
                lora_format.check_layers(
                    self.named_model(name), lora_format.read(path, self.lora_prefixes[name])[0], path
                )

    def load_adapter(self, path: str | Path, scale: float = 1.0) -> None:
        """Add an adapter file to all the models that its keys name."""
        for name in self._adapted_by(path):
            self.load_lora(name, path, scale)

    def _adapted_by(self, path: str | Path) -> list[str]:
        named = lora_format.prefixes(path)
        return [name for name, prefix in self.lora_prefixes.items() if prefix in named] or [self.in_iteration_models[0]]

    # Inputs -----------------------------------------------------------------------------------------------------------

    def check_resize_height_width(self, height: int, width: int) -> tuple[int, int]:
        """Round a size in pixels up to what the pipeline can draw."""
        up = lambda size, factor: (size + factor - 1) // factor * factor  # noqa: E731
        return up(height, self.height_division_factor), up(width, self.width_division_factor)

    def preprocess_image(self, image: Image.Image) -> Tensor:
        """An RGB image as a tensor (1, 3, H, W) in [-1, 1], in the pipeline's dtype on its device."""
        pixels = torch.from_numpy(np.array(image, dtype=np.float32)).to(self.device, self.torch_dtype)
        return (pixels * (2 / 255) - 1).permute(2, 0, 1).unsqueeze(0)

    def vae_output_to_image(self, pixels: Tensor) -> Image.Image:
        """A tensor (1, 3, H, W) in [-1, 1] as an RGB image."""
        pixels = ((pixels[0].float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())

    def generate_noise(
        self, shape: Sequence[int], seed: int | None = None, rand_device="cpu", rand_torch_dtype=torch.float32
    ) -> Tensor:
        """Standard normal noise, from `seed` or, without one, from torch's global generator."""
        generator = None if seed is None else torch.Generator(rand_device).manual_seed(seed)
        noise = torch.randn(shape, generator=generator, device=rand_device, dtype=rand_torch_dtype)
        return noise.to(self.device, self.torch_dtype)

    # Denoising --------------------------------------------------------------------------------------------------------

    def predict(self, timestep: Tensor, **inputs) -> Tensor:
        """Velocity (B, …) that `model_fn` predicts at timesteps (B,) from those of the inputs that it takes."""
        models = {name: getattr(self, name) for name in self.in_iteration_models}
        accepted = inspect.signature(self.model_fn).parameters
        given = {name: value for name, value in inputs.items() if name in accepted}
        return self.model_fn(**models, timestep=timestep, **given)

    def guided_velocity(
        self, timestep: Tensor, cfg_scale: float, shared: Mapping, posi: Mapping, nega: Mapping
    ) -> Tensor:
        """v_nega + s (v_posi - v_nega): classifier-free guidance, Ho & Salimans 2022 (https://arxiv.org/abs/2207.12598)."""
        positive = self.predict(timestep, **shared, **posi)
        if cfg_scale == 1:
            return positive
        negative = self.predict(timestep, **shared, **nega)
        return negative + cfg_scale * (positive - negative)

    def step(self, velocity: Tensor, index: int, latents: Tensor, inpaint_mask=None, input_latents=None) -> Tensor:
        """One Euler step; where `inpaint_mask` (B, 1, h, w) is 0 the latents follow the input image instead."""
        if inpaint_mask is not None:
            towards_input = (latents - input_latents) / self.scheduler.sigmas[index]
            velocity = towards_input * (1 - inpaint_mask) + velocity * inpaint_mask
        return self.scheduler.step(velocity, index, latents)

    @torch.no_grad()
    def denoise(self, shared: dict, posi: dict, nega: dict) -> Tensor:
        """Integrate the velocity from the first noise level to 0, for a batch of inputs; the final latents."""
        latents = shared["latents"]
        given = {name: shared[name] for name in ("inpaint_mask", "input_latents") if shared.get(name) is not None}
        for index, timestep in enumerate(self.progress_bar(self.scheduler.timesteps)):
            timestep = timestep.to(self.device).expand(len(latents))
            shared = {**shared, "latents": latents}
            velocity = self.guided_velocity(timestep, shared["cfg_scale"], shared, posi, nega)
            latents = self.step(velocity, index, latents, **given)
        return latents

    @torch.no_grad()
    def generate(self, requests: Sequence[Mapping]) -> list[Image.Image]:
        """Draw one image a request (arguments of `__call__`), denoising all of them as one batch.

        Each request's units run alone, so an image does not depend on its company (but for rounding).

        Raises:
            ValueError: An unknown argument, or requests that differ in what a batch must share.
        """
        requests = [self.complete(request) for request in requests]
        self._check_batch(requests)
        self.set_timesteps(requests[0])
        prepared = [run_units(self.units, self, *self.split_request(request)) for request in requests]
        latents = self.denoise(*(collate(list(side)) for side in zip(*prepared, strict=True)))
        return [self.decode_image(latent.unsqueeze(0), requests[0]) for latent in latents]

    def split_request(self, request: Mapping) -> tuple[dict, dict, dict]:
        """The three dictionaries the units work on, from the arguments of `__call__`."""
        shared = {name: value for name, value in request.items() if name not in ("prompt", "negative_prompt")}
        return shared, {"prompt": request["prompt"]}, {"negative_prompt": request.get("negative_prompt", "")}

    def complete(self, request: Mapping) -> dict:
        """A request with the defaults of `__call__`; needs no weights.

        Raises:
            ValueError: `__call__` has no argument of such a name.
        """
        known = {*inspect.signature(type(self).__call__).parameters} - {"self"}
        unknown = sorted(set(request) - known)
        if unknown:
            nearest = difflib.get_close_matches(unknown[0], known, 1)
            raise ValueError(
                f"{type(self).__name__} has no argument {unknown[0]!r}; nearest: {nearest or sorted(known)}."
            )
        return {**self.call_defaults, **{name: value for name, value in request.items() if value is not None}}

    def _check_batch(self, requests: Sequence[Mapping]) -> None:
        shared = requests[0].keys() - set(self.per_image_arguments)
        differing = sorted(name for name in shared if any(other[name] != requests[0][name] for other in requests))
        if differing:
            raise ValueError(f"The requests of a batch differ in {differing}; draw them one after another.")

    def set_timesteps(self, request: Mapping) -> None:
        """Set the scheduler to the sampling steps that a request asks for."""
        raise NotImplementedError(f"{type(self).__name__} defines no sampling steps.")

    def decode_image(self, latents: Tensor, request: Mapping) -> Image.Image:
        """Latents (1, …) as an image."""
        raise NotImplementedError(f"{type(self).__name__} decodes no images.")

    def required_units(self, wanted: Iterable[str]) -> list[PipelineUnit]:
        """The units that lead to the `wanted` inputs of an objective or of `model_fn`."""
        return required_units(self.units, wanted)


def _is_kind(module: nn.Module, kind: str, cls: type | None) -> bool:
    return type(module).__name__ == kind or (cls is not None and isinstance(module, cls))
