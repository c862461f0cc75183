"""`BasePipeline`: requests, units, guidance and sampling. A model family is a subclass that declares its parts."""

import copy
import difflib
import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from ..core.data import collate
from ..core.data.operators.masks import of_other_sizes
from ..core.loader import ModelConfig
from .adaptable_networks import AdaptableNetworks
from .controlnet.family import CONTROLNET_SLOTS, ControlFamily, check_controlnets, controlnets_of, places_of
from .controlnet.inputs import ControlInputs, check_columns, check_steps, scale_at
from .flow_match import FlowMatchScheduler
from .pipeline import declaration, sampling_settings
from .pipeline.media import ImageMedia, Media
from .pipeline.request import Request, check_numbers, defaults_of, image_arguments, typed
from .pipeline.samplers import SAMPLERS, inpaint_velocity, step_noise
from .pipeline.units import PipelineUnit, PipelineUnitRunner, run_units
from .pipeline.unused_images import check_used
from .pipeline.vae import Latents, NormalisedVAE
from .prompts.embedder import check_text_widths
from .template.cache import as_inputs, template_outputs_of

__all__ = ["BasePipeline", "PipelineUnit", "PipelineUnitRunner"]


class BasePipeline(AdaptableNetworks):
    """A model family, declared by the attributes of its class; docs/pipelines.md builds one step by step.

    Class attributes:
        request: Class of the arguments of the pipeline's call (`pipeline.request`), with the family's defaults.
        components: Networks and folders by attribute; `model_fn` calls the first network.
        latents: Channels and downsampling of the latents.
        media: The kind of media that the family generates.
        model_fn: `model_fn(dit, latents, timestep, …)` predicts the velocity (B, C, h, w) of a batch.
        sigma_grid: Noise levels of N sampling steps; see `FlowMatchScheduler`.
        unit_classes: The units, in the order in which they run.
        model_settings: Fields of the request whose defaults differ between the models of the family, besides those that
            differ in every family (`declaration.SHARED_SETTINGS`).
        prompt_tokenizer: The tokenizer that decides whether a prompt is too long, see `cuts_off`.
        text_widths: For each text encoder `widths(dit, text encoder)`: the width of the text embeddings that the
            network takes, and of those that the encoder makes.
        control_family: What the family says of its ControlNets; None if it has none.
    """

    request: ClassVar[type[Request]]
    latents: ClassVar[Latents]
    media: ClassVar[Media] = ImageMedia()
    model_fn: ClassVar[Callable[..., Tensor]]
    sigma_grid: ClassVar[Callable[..., Tensor]]
    unit_classes: ClassVar[Sequence[type[PipelineUnit]]]
    model_settings: ClassVar[Sequence[str]] = ()

    per_sample_arguments: ClassVar[Sequence[str]] = ("prompt", "negative_prompt", "seed")  # besides images
    # Arguments that weights may be trained for; see `PipelineNetworks.use_sampling_settings`.
    sampling_arguments: ClassVar[Sequence[str]] = ("num_inference_steps", "cfg_scale", "sigmas", "sampler")
    decoding_models: ClassVar[Sequence[str]] = ("vae",)  # models that `decode` calls
    prompt_tokenizer: ClassVar[str] = "tokenizer"
    text_widths: ClassVar[Mapping[str, Callable[[Any, Any], tuple[Any, Any]]]] = {}
    control_family: ClassVar[ControlFamily | None] = None
    control_inputs: Sequence[ControlInputs] = ()  # what each of the pipeline's ControlNets reads

    def __init_subclass__(cls, abstract: bool = False, **kwargs):
        super().__init_subclass__(**kwargs)
        if not abstract:
            declaration.complete(cls, places_of(cls.control_family))

    def __init__(self, device: str | torch.device = "cpu", torch_dtype: torch.dtype = torch.bfloat16):
        super().__init__(device, torch_dtype)
        self.units: list[PipelineUnit] = [unit() for unit in self.unit_classes if unit.needs is None]
        self.unit_runner = PipelineUnitRunner()
        self.scheduler = FlowMatchScheduler(self.sigma_grid)
        self.template = self.template_model = None  # set by `template.units.attach` while a template is trained
        self.replacements: dict[str, nn.Module] = {}  # networks that `model_fn` gets while another role is active
        self.progress_bar = tqdm
        self.call_defaults = defaults_of(self.request)

    # A request

    def __call__(self, prompt: str, progress_bar_cmd: Callable = tqdm, **request):
        """Sample one result; the arguments are those of the family's request."""
        self.progress_bar = progress_bar_cmd
        return self.generate([{"prompt": prompt, **request}])[0]

    @property
    def one_sided_arguments(self) -> tuple[str, ...]:
        """Arguments of a request, besides `prompt`, that only the conditional prediction reads.

        Each has a counterpart for the unconditional prediction, which is named `negative_…`.
        """
        return template_outputs_of(self) + (("template_inputs",) if self.template_model is not None else ())

    @property
    def arguments(self) -> set[str]:
        """Names of all arguments that a request may have."""
        return {"prompt", *defaults_of(self.request), *self._arguments_by_side}

    @property
    def _arguments_by_side(self) -> set[str]:
        return {sign + name for name in self.one_sided_arguments for sign in ("", "negative_")}

    def typed(self, name: str, value: Any) -> Any:
        """Convert an argument that was read from a csv to the number that the request expects; see `request.typed`."""
        return typed(self.request, name, value)

    def complete(self, request: Mapping) -> dict:
        """The request, with its missing arguments filled in, and the size that is sampled.

        They come first from the settings that the weights were trained for, then from the model's defaults. This reads
        no weights.

        Raises:
            ValueError: An argument is unknown or out of its range, two arguments exclude each other, or two adapters
                disagree about a sampling setting.
        """
        known = self.arguments
        unknown = sorted(set(request) - known)
        if unknown:
            nearest = difflib.get_close_matches(unknown[0], known, 1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"it takes {', '.join(sorted(known))}."
            raise ValueError(f"{type(self).__name__} has no argument {unknown[0]!r}; {hint}")
        given = {name: value for name, value in request.items() if value is not None}
        completed = {**self.call_defaults, **self.settings_for(given), **given}
        check_numbers(self.request, completed)
        _check_request(completed)
        check_used(self, given)
        if self.control_inputs:
            check_steps(completed)
        return {**completed, **self.latents.size_of(completed)}

    def settings_for(self, request: Mapping) -> dict[str, Any]:
        """The `sampling_arguments` that the weights were trained for, except those that the request sets itself.

        Raises:
            ValueError: Two adapters disagree about one; the message names both files.
        """
        steps = {"num_inference_steps", "sigmas"}  # setting one of them overrides both
        given = {name for name in self.sampling_arguments if request.get(name) is not None}
        given |= steps if given & steps else set()
        adapters = {file: settings for file, settings in self.sampling_settings.items() if file is not None}
        names = [name for name in self.sampling_arguments if name not in given]
        return sampling_settings.agreed(adapters or self.sampling_settings, names)

    def split_request(self, request: Mapping) -> tuple[dict, dict, dict]:
        """Split a request into the units' dictionaries (shared, positive, negative); what it starts from is resized."""
        argument = self.media.argument
        if request.get(argument) is not None:
            request = {**request, argument: self.media.resized(request[argument], **self.latents.size_of(request))}
        sides = [{n: request.get(sign + n) for n in self.one_sided_arguments} for sign in ("", "negative_")]
        posi, nega = (as_inputs(self, side, type(self).__name__) for side in sides)
        posi["prompt"], nega["negative_prompt"] = request["prompt"], request.get("negative_prompt", "")
        by_side = {"prompt", "negative_prompt", *self._arguments_by_side}
        shared = {name: value for name, value in request.items() if name not in by_side}
        return shared, posi, nega

    def prepare(self, requests: Sequence[Mapping]) -> tuple[dict, dict, dict]:
        """The network's inputs for a batch of requests (shared, positive, negative); see `prepare_each`."""
        return batch_of(list(self.prepare_each(requests)))

    def prepare_each(self, requests: Sequence[Mapping]) -> Iterator[tuple[dict, dict, dict]]:
        """Yield each request's inputs (shared, positive, negative); the scheduler is first set to their steps.

        The units run on one request at a time, so that a result does not depend on the rest of its batch (except for
        rounding).

        Raises:
            ValueError: An argument is unknown, or the requests differ in an argument that a batch must share.
        """
        requests = [self.complete(request) for request in requests]
        self._check_batch(requests)
        self.set_timesteps(requests[0])
        for request in requests:
            yield run_units(self.units, self, *self.split_request(request))

    def _check_batch(self, requests: Sequence[Mapping]) -> None:
        per_sample = {*self.per_sample_arguments, *image_arguments(self.request)}
        shared = requests[0].keys() - {*per_sample, *self._arguments_by_side}
        differing = sorted(name for name in shared if any(other[name] != requests[0][name] for other in requests))
        if differing:
            raise ValueError(f"The requests of a batch differ in {differing}; sample them one after another.")

    # Sampling

    @torch.no_grad()
    def generate(self, requests: Sequence[Mapping]) -> list[Any]:
        """Sample one result per request, denoising all of them as one batch; see `prepare_each`."""
        return self.sample(requests, list(self.prepare_each(requests)))

    @torch.no_grad()
    def sample(self, requests: Sequence[Mapping], inputs: Sequence[tuple[dict, dict, dict]]) -> list[Any]:
        """Denoise requests as one batch and decode them; calls no encoder.

        Args:
            inputs: What `prepare_each` has yielded for each request.
        """
        latents = self.denoise(*batch_of(inputs))
        return [self.decode(latent.unsqueeze(0), self.complete(requests[0])) for latent in latents]

    @torch.no_grad()
    def denoise(self, shared: dict, posi: dict, nega: dict) -> Tensor:
        """Integrate the velocity from the first noise level to 0 and return the clean latents (B, C, h, w)."""
        for latents in self.trajectory(shared, posi, nega):  # noqa: B007
            pass
        return latents

    def trajectory(self, shared: dict, posi: dict, nega: dict) -> Iterator[Tensor]:
        """Yield the latents (B, C, h, w) of a batch of inputs at each noise level of the scheduler, and at 0."""

        def velocity(latents: Tensor, step: int) -> Tensor:
            level, timestep = self.scheduler.levels[step], self.scheduler.timesteps[step]
            timesteps = timestep.to(self.device).expand(len(latents))
            scale = scale_at(shared, step, len(self.scheduler.timesteps))
            inputs = {**shared, **scale, **self.inputs_at(level, shared), "latents": latents}
            guided = self.guided_velocity(timesteps, shared["cfg_scale"], inputs, posi, nega)
            if shared.get("inpaint_mask") is None:
                return guided
            return inpaint_velocity(guided, latents, self.scheduler.sigmas[step], shared)

        sampler = shared.get("sampler", "euler")
        sampler = SAMPLERS.get(sampler, sampler)  # a training may have a sampler of its own
        points = sampler(velocity, shared["latents"], self.scheduler, partial(step_noise, shared.get("seed")))
        yield next(points)
        for _, latents in zip(self.progress_bar(self.scheduler.timesteps), points, strict=True):
            yield latents

    @classmethod
    def model_fn_inputs(cls) -> set[str]:
        """Names of the inputs that `model_fn` reads: its parameters without the networks."""
        return inspect.signature(cls.model_fn).parameters.keys() - {*cls.networks(), "controlnets"}

    def predict(self, timestep: Tensor, **inputs) -> Tensor:
        """Velocity (B, …) that `model_fn` predicts at timesteps (B,) from those inputs that it has a parameter for."""
        accepted = inspect.signature(self.model_fn).parameters
        given = {name: value for name, value in inputs.items() if name in accepted}
        return self.model_fn(**self.predicting(timestep, inputs), timestep=timestep, **given)

    def predicting(self, timestep: Tensor, inputs: Mapping) -> dict[str, nn.Module]:
        """The networks that `model_fn` gets for timesteps (B,) and other inputs, by the names of its parameters."""
        models = {name: getattr(self, name) for name in self.in_iteration_models} | self.replacements
        if self.control_family is None:
            return models
        places = [models.pop(name, None) for name in CONTROLNET_SLOTS]
        return models | {"controlnets": [network for network in places if network is not None]}

    def inputs_at(self, level: float, shared: Mapping) -> dict[str, Any]:
        """Further inputs of a sampling step at a noise level in [0, 1]."""
        return {}

    def guided_velocity(
        self, timestep: Tensor, cfg_scale: float, shared: Mapping, posi: Mapping, nega: Mapping
    ) -> Tensor:
        """Classifier-free guidance: v_nega + s (v_posi - v_nega), with velocities (B, …) at timesteps (B,).

        Ho & Salimans 2022, "Classifier-Free Diffusion Guidance" (https://arxiv.org/abs/2207.12598).
        """
        positive = self.predict(timestep, **shared, **posi)
        if cfg_scale == 1:
            return positive
        names = self.control_family.prompt if self.control_family else ()
        of_controlnets = {"control_prompt": tuple(posi[name] for name in names)} if names else {}
        negative = self.predict(timestep, **shared, **nega, **of_controlnets)
        return self.combined(positive, negative, cfg_scale, shared)

    def combined(self, positive: Tensor, negative: Tensor, cfg_scale: float, shared: Mapping) -> Tensor:
        """Guided velocity (B, …) of the conditional and the unconditional one (B, …)."""
        return negative + cfg_scale * (positive - negative)

    def set_timesteps(self, request: Mapping) -> None:
        """Set the scheduler to the sampling steps that a request asks for."""
        accepted = inspect.signature(self.sigma_grid).parameters
        options = {name: request[name] for name in accepted if name in request and name != "num_inference_steps"}
        if "dynamic_shift_len" in accepted:
            options["dynamic_shift_len"] = self.latents.tokens(**self.latents.size_of(request))
        self.scheduler.set_timesteps(request["num_inference_steps"], sigmas=request["sigmas"], **options)

    @contextmanager
    def sampling_steps(self, request: Mapping) -> Iterator[FlowMatchScheduler]:
        """Inside, the scheduler has the steps that a request asks for; afterwards it is as it was before."""
        scheduler, self.scheduler = self.scheduler, copy.copy(self.scheduler)
        try:
            self.set_timesteps({**self.call_defaults, **request})
            yield self.scheduler
        finally:
            self.scheduler = scheduler

    @contextmanager
    def sampling(self) -> Iterator["BasePipeline"]:
        """Inside, the pipeline samples during a training: in evaluation mode, without a progress bar of its own."""
        training = {name: module.training for name, module in self.named_modules()}
        scheduler, progress_bar = copy.copy(self.scheduler), self.progress_bar
        self.progress_bar = iter
        try:
            yield self.eval()
        finally:
            self.scheduler, self.progress_bar = scheduler, progress_bar
            for name, module in self.named_modules():
                module.training = training[name]

    # Media

    def preprocess_image(self, image: Image.Image) -> Tensor:
        """An RGB image as the tensor that the autoencoder encodes, in the pipeline's dtype on its device.

        It is (1, 3, H, W) in [-1, 1] for a family of images.
        """
        return self.media.preprocess(image, self.device, self.torch_dtype)

    def decode(self, latents: Tensor, request: Mapping) -> Any:
        """Decode latents (1, …) to the family's media, for example to an image."""
        self.load_models_to_device(["vae"])
        return self.media.postprocess(self.pixels_of(latents, request))

    def pixels_of(self, latents: Tensor, request: Mapping) -> Tensor:
        """The pixels in [-1, 1] of latents (1, …), from the autoencoder."""
        return self.vae.decode(latents, request["tiled"], request["tile_size"], request["tile_stride"])

    def generate_noise(
        self,
        shape: Sequence[int],
        seed: int | None = None,
        rand_device: str | torch.device = "cpu",
        rand_torch_dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Standard normal noise of any shape; without a seed it comes from torch's global generator."""
        generator = None if seed is None else torch.Generator(rand_device).manual_seed(seed)
        noise = torch.randn(shape, generator=generator, device=rand_device, dtype=rand_torch_dtype)
        return noise.to(self.device, self.torch_dtype)

    # Units

    def build_models(self, model_configs: Iterable[ModelConfig] | Mapping[str, ModelConfig]) -> None:
        super().build_models(model_configs)
        if self.control_family is not None:
            self.control_inputs = tuple(map(self.control_family.inputs, controlnets_of(self).values()))
        self.add_units()

    def check_networks(self) -> None:
        check_text_widths(self)
        if isinstance(vae := getattr(self, "vae", None), NormalisedVAE):
            vae.check(self.latents)
        check_controlnets(self)

    def build_folder(self, name: str, config: ModelConfig | None) -> None:
        super().build_folder(name, config)
        self.add_units()

    def add_units(self) -> None:
        """Add each unit that needs an optional component, once that component is built, in its declared place."""
        existing = {type(unit) for unit in self.units}
        optional = [unit for unit in self.unit_classes if unit.needs is not None]
        ready = [unit for unit in optional if getattr(self, unit.needs) is not None]
        places = {unit: place for place, unit in enumerate(self.unit_classes)}
        self.units += [unit() for unit in ready if unit not in existing]
        self.units.sort(key=lambda unit: places.get(type(unit), len(places)))

    def check_columns(self, columns: Collection[str]) -> None:
        """Refuse a training whose networks do not fit the columns that `task.extra_inputs` names; needs no weights.

        Raises:
            ValueError: A network needs a column that is not named, or takes none that is named.
        """
        check_columns(self, columns)

    def cuts_off(self, prompt: str) -> bool:
        """Whether the pipeline truncates a prompt because it is too long; needs no weights."""
        limits = self.prompt_limits()
        tokenizer = next(iter(limits), None)
        return tokenizer is not None and len(self.prompt_tokens(tokenizer, prompt)) > limits[tokenizer]

    def prompt_limits(self) -> dict[str, int]:
        """Number of tokens of a prompt that is read, by tokenizer; the first one decides what is too long."""
        if getattr(self, self.prompt_tokenizer, None) is None or self.most_tokens is None:
            return {}
        return {self.prompt_tokenizer: self.most_tokens}

    def prompt_tokens(self, tokenizer: str, prompt: str) -> Sequence[int]:
        """The tokens of the whole `prompt_text`, by the tokenizer of this name."""
        return getattr(self, tokenizer)(self.prompt_text(prompt), verbose=False).input_ids

    def prompt_text(self, prompt: str) -> str:
        """What is tokenized of a prompt: the prompt in the family's template, if there is one."""
        return prompt

    @property
    def most_tokens(self) -> int | None:
        """Number of tokens of `prompt_text` that a text encoder reads; None if the family does not say."""
        return self.call_defaults.get("max_sequence_length")

    def sources(self) -> dict[str, dict[str, str]]:
        code = self.template and self.template.code
        own = {"template_model": {"path": str(code.file.parent), "fingerprint": code.digest}} if code else {}
        return super().sources() | own


def batch_of(samples: Sequence[tuple[dict, dict, dict]]) -> tuple[dict, dict, dict]:
    """Stack the inputs (shared, positive, negative) of several samples into those of a batch; see `collate`."""
    shared, posi, nega = (collate(list(side)) for side in zip(*samples, strict=True))
    return shared, posi, nega


def _check_request(request: Mapping) -> None:
    """Refuse a complete request whose arguments exclude each other, or whose sampler does not exist."""
    mask, image = request.get("inpaint_mask"), request.get("input_image")
    if request["sampler"] not in SAMPLERS:
        raise ValueError(f"sampler is {request['sampler']!r}; expected one of {', '.join(SAMPLERS)}.")
    if request["sampler"] == "renoise" and mask is not None:
        raise ValueError(
            "inpaint_mask needs deterministic sampling, but sampler=renoise adds fresh noise at each step; set "
            "sampler=euler, or leave the mask out."
        )
    if mask is not None and image is None:
        raise ValueError("inpaint_mask keeps a part of input_image, which is not given; give input_image too.")
    if isinstance(mask, Image.Image) and isinstance(image, Image.Image) and mask.size != image.size:
        raise ValueError(of_other_sizes("inpaint_mask", mask.size, "input_image", image.size) + ".")
