"""What all pipelines share: units, guidance, the sampling loop."""

import copy
import difflib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from ..core.data import collate, generator
from .flow_match import FlowMatchScheduler
from .pipeline import sampling_settings
from .pipeline.networks import PipelineModels
from .pipeline.units import PipelineUnit, PipelineUnitRunner, required_units, run_units
from .template.cache import as_inputs, media_of

__all__ = ["BasePipeline", "PipelineUnit", "PipelineUnitRunner"]


class BasePipeline(PipelineModels):
    """A model family: its networks, its units, its `model_fn`, its noise schedule.

    A subclass sets `model_fn`, `scheduler` and `units`, and what `PipelineModels` asks for.
    """

    per_image_arguments: tuple[str, ...] = ("prompt", "negative_prompt", "seed", "input_image", "inpaint_mask")
    sampling_arguments = ("num_inference_steps", "cfg_scale", "sigmas", "renoise")  # that weights may come with
    decoding_models: tuple[str, ...] = ("vae",)  # what `decode_image` calls
    height_division_factor = width_division_factor = 16
    latent_channels: int
    latent_factor: int  # pixels along each side of a latent pixel
    model_fn: Callable[..., Tensor]

    def __init__(self, device="cpu", torch_dtype: torch.dtype = torch.bfloat16):
        super().__init__(device, torch_dtype)
        self.units: list[PipelineUnit] = []
        self.unit_runner = PipelineUnitRunner()
        self.scheduler = None
        self.template = self.template_model = None  # one that is part of this pipeline, as in its training
        self.replacements: dict[str, nn.Module] = {}  # what predicts in place of a model while another role is played
        self.progress_bar = tqdm
        self.call_defaults = {
            name: parameter.default
            for name, parameter in inspect.signature(type(self).__call__).parameters.items()
            if parameter.default is not inspect.Parameter.empty
        }

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

    def predict(self, timestep: Tensor, **inputs) -> Tensor:
        """Velocity (B, …) that `model_fn` predicts at timesteps (B,) from those of the inputs that it takes."""
        models = {name: getattr(self, name) for name in self.in_iteration_models} | self.replacements
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

    def trajectory(self, shared: dict, posi: dict, nega: dict) -> Iterator[Tensor]:
        """The latents of a batch of inputs at each of the scheduler's noise levels, and at 0."""
        latents = shared["latents"]
        given = {name: shared[name] for name in ("inpaint_mask", "input_latents") if shared.get(name) is not None}
        yield latents
        for index, timestep in enumerate(self.progress_bar(self.scheduler.timesteps)):
            timestep = timestep.to(self.device).expand(len(latents))
            velocity = self.guided_velocity(timestep, shared["cfg_scale"], {**shared, "latents": latents}, posi, nega)
            if shared.get("renoise"):
                noise = step_noise(shared["seed"], index, latents)
                latents = self.scheduler.renoise_step(velocity, index, latents, noise)
            else:
                latents = self.step(velocity, index, latents, **given)
            yield latents

    @torch.no_grad()
    def denoise(self, shared: dict, posi: dict, nega: dict) -> Tensor:
        """Integrate the velocity from the first noise level to 0, for a batch of inputs; the final latents."""
        for latents in self.trajectory(shared, posi, nega):  # noqa: B007
            pass
        return latents

    def prepare(self, requests: Sequence[Mapping]) -> tuple[dict, dict, dict]:
        """What the network reads of requests (arguments of `__call__`) as one batch; sets the scheduler to their steps.

        Each request's units run alone, so that what is drawn does not depend on its company (but for rounding).

        Raises:
            ValueError: An unknown argument, or requests that differ in what a batch must share.
        """
        requests = [self.complete(request) for request in requests]
        self._check_batch(requests)
        self.set_timesteps(requests[0])
        prepared = [run_units(self.units, self, *self.split_request(request)) for request in requests]
        shared, posi, nega = (collate(list(side)) for side in zip(*prepared, strict=True))
        return shared, posi, nega

    @torch.no_grad()
    def generate(self, requests: Sequence[Mapping]) -> list[Image.Image]:
        """Draw one image a request, denoising all of them as one batch; see `prepare`."""
        latents = self.denoise(*self.prepare(requests))
        return [self.decode_image(latent.unsqueeze(0), self.complete(requests[0])) for latent in latents]

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

    def settings_for(self, request: Mapping) -> dict[str, Any]:
        """The `sampling_arguments` that its weights were trained for (see `use_sampling_settings`) and that a request leaves open.

        Raises:
            ValueError: Two adapters differ in them; names both.
        """
        steps = {"num_inference_steps", "sigmas"}  # of which one takes the place of the other
        said = {name for name in self.sampling_arguments if request.get(name) is not None}
        said |= steps if said & steps else set()
        adapters = {file: settings for file, settings in self.sampling_settings.items() if file is not None}
        names = [name for name in self.sampling_arguments if name not in said]
        return sampling_settings.agreed(adapters or self.sampling_settings, names)

    @contextmanager
    def sampling_steps(self, request: Mapping) -> Iterator[FlowMatchScheduler]:
        """The scheduler at the steps that a request is drawn in; the pipeline's own comes back afterwards."""
        scheduler, self.scheduler = self.scheduler, copy.copy(self.scheduler)
        try:
            self.set_timesteps({**self.call_defaults, **request})
            yield self.scheduler
        finally:
            self.scheduler = scheduler

    def typed(self, name: str, value: Any) -> Any:
        """An argument of `__call__` that may be a cell of a csv, which is text, as the number that it is to be.

        Raises:
            ValueError: It is none.
        """
        parameter = inspect.signature(type(self).__call__).parameters.get(name)
        kinds = [] if parameter is None else get_args(parameter.annotation) or [parameter.annotation]
        kind = next((kind for kind in (int, float) if kind in kinds), None)
        if kind is None or not isinstance(value, str):
            return value
        try:
            return kind(value)
        except ValueError:
            expected = "a whole number" if kind is int else "a number"
            raise ValueError(f"{name} is {value!r}, expected {expected}.") from None

    def split_request(self, request: Mapping) -> tuple[dict, dict, dict]:
        """The three dictionaries the units work on, from the arguments of `__call__`; `input_image` is fitted."""
        image = request.get("input_image")
        if image is not None:
            size = self.check_resize_height_width(request["height"], request["width"])
            request = {**request, "input_image": image.convert("RGB").resize(size[::-1])}
        sides = [{n: request.get(sign + n) for n in self.one_sided_arguments} for sign in ("", "negative_")]
        posi, nega = (as_inputs(self, side, type(self).__name__) for side in sides)
        posi["prompt"], nega["negative_prompt"] = request["prompt"], request.get("negative_prompt", "")
        by_side = {"prompt", "negative_prompt", *self._arguments_by_side}
        return {name: value for name, value in request.items() if name not in by_side}, posi, nega

    @property
    def one_sided_arguments(self) -> tuple[str, ...]:
        """Arguments of a request, besides `prompt`, that only the conditional prediction reads.

        The other's are named `negative_…`.
        """
        return media_of(self) + (("template_inputs",) if self.template_model is not None else ())

    @property
    def arguments(self) -> set[str]:
        """Names that a request may hold."""
        return {*inspect.signature(type(self).__call__).parameters, *self._arguments_by_side} - {"self"}

    @property
    def _arguments_by_side(self) -> set[str]:
        return {sign + name for name in self.one_sided_arguments for sign in ("", "negative_")}

    def complete(self, request: Mapping) -> dict:
        """A request with what its weights were trained for, and the defaults of `__call__`; needs no weights.

        Raises:
            ValueError: `__call__` has no argument of such a name, or not together; or adapters differ in how to draw.
        """
        known = self.arguments
        unknown = sorted(set(request) - known)
        if unknown:
            nearest = difflib.get_close_matches(unknown[0], known, 1)
            raise ValueError(
                f"{type(self).__name__} has no argument {unknown[0]!r}; nearest: {nearest or sorted(known)}."
            )
        given = {name: value for name, value in request.items() if value is not None}
        whole = {**self.call_defaults, **self.settings_for(given), **given}
        if whole.get("renoise") and whole.get("inpaint_mask") is not None:
            raise ValueError(
                "renoise=true leaves the way of the noise that inpaint_mask would keep to where it is black; set "
                "renoise=false, or leave the mask out."
            )
        return whole

    def _check_batch(self, requests: Sequence[Mapping]) -> None:
        shared = requests[0].keys() - {*self.per_image_arguments, *self._arguments_by_side}
        differing = sorted(name for name in shared if any(other[name] != requests[0][name] for other in requests))
        if differing:
            raise ValueError(f"The requests of a batch differ in {differing}; draw them one after another.")

    def set_timesteps(self, request: Mapping) -> None:
        """Set the scheduler to the sampling steps that a request asks for."""
        raise NotImplementedError(f"{type(self).__name__} defines no sampling steps.")

    def decode_image(self, latents: Tensor, request: Mapping) -> Image.Image:
        """Latents (1, …) as an image."""
        self.load_models_to_device(["vae"])
        pixels = self.vae.decode(latents, request["tiled"], request["tile_size"], request["tile_stride"])
        return self.vae_output_to_image(pixels)

    def cuts_off(self, prompt: str) -> bool:
        """Whether a prompt is longer than what the pipeline reads of it; needs no weights."""
        return False

    def sources(self) -> dict[str, dict[str, str]]:
        code = self.template and self.template.code
        own = {"template_model": {"path": str(code.file.parent), "fingerprint": code.digest}} if code else {}
        return super().sources() | own

    def required_units(self, wanted: Iterable[str]) -> list[PipelineUnit]:
        """The units that lead to the `wanted` inputs of an objective or of `model_fn`."""
        return required_units(self.units, wanted)


def step_noise(seeds: int | None | Sequence[int | None], index: int, like: Tensor) -> Tensor:
    """Fresh noise (B, …) for the step `index`, each sample's from its own seed; None takes torch's generator."""
    seeds = seeds if isinstance(seeds, list | tuple) else [seeds] * len(like)
    generators = [None if seed is None else generator(seed, "renoise", 0, index) for seed in seeds]
    noise = [torch.randn(like.shape[1:], generator=own) for own in generators]  # on CPU, so that all devices agree
    return torch.stack(noise).to(like)
