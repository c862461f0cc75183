"""What a pipeline can be asked for: the arguments of its call, documented once for all families."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, get_args, get_type_hints

from PIL import Image
from torch import Tensor

from .kv_cache import KVCache

EDIT_IMAGE_PIXELS = 1024 * 1024  # area at which the released editing models were trained


@dataclass(kw_only=True)
class ImageRequest:
    """Sample one image.

    Args:
        prompt: What the image shows.
        negative_prompt: What classifier-free guidance leads away from.
        cfg_scale: Scale of classifier-free guidance; 1 is none, and half the time.
        input_image: Start from this image instead of pure noise; it is resized to `height` and `width`.
        denoising_strength: How much noise `input_image` gets, in (0, 1].
        inpaint_mask: White is sampled anew, black keeps `input_image`.
        inpaint_blur_sigma: Latent pixels by which the mask's edge is softened; None leaves it sharp.
        height, width: In pixels, rounded up to a multiple of what the family's latents need.
        seed: Of the noise; None takes torch's global generator.
        rand_device: Device on which the noise is made.
        num_inference_steps: Calls of the network (twice as many under guidance).
        sigmas: Noise levels to sample at, instead of `num_inference_steps` of the family's own.
        sampler: `euler`, `heun`, `dpmpp_2m`, or `renoise` as some few-step students need; see `pipeline.samplers`.
        tiled: Run the autoencoder on tiles: less memory, faint seams.
        tile_size, tile_stride: Size of the tiles, and their distance, in pixels of the autoencoder's latents.

    Of `cfg_scale`, `num_inference_steps`, `sigmas` and `sampler`, None or nothing takes what the weights were trained
    to be sampled with (see `PipelineNetworks.use_sampling_settings`), else the model's own default.
    """

    prompt: str
    negative_prompt: str = ""
    cfg_scale: float = 1.0
    input_image: Image.Image | None = None
    denoising_strength: float = 1.0
    inpaint_mask: Image.Image | None = None
    inpaint_blur_sigma: float | None = None
    height: int = 1024
    width: int = 1024
    seed: int | None = None
    rand_device: str = "cpu"
    num_inference_steps: int = 30
    sigmas: Sequence[float] | None = None
    sampler: str = "euler"
    tiled: bool = False
    tile_size: int = 128
    tile_stride: int = 64


@dataclass(kw_only=True)
class EditRequest(ImageRequest):
    """Sample one image, from others if they are given.

    Args:
        edit_image: Image that the prompt says how to change, or several that it refers to.
        edit_image_auto_resize: Scale each to about `edit_image_pixels` in its own proportions; otherwise their sides
            have to be multiples of 16.
        edit_image_pixels: Area in pixels.
    """

    edit_image: Image.Image | Sequence[Image.Image] | None = None
    edit_image_auto_resize: bool = True
    edit_image_pixels: int = EDIT_IMAGE_PIXELS


@dataclass(kw_only=True)
class TemplateRequest(ImageRequest):
    """Sample one image with what templates make (`diffusion.template`), of either side of guidance.

    Args:
        kv_cache: Keys and values (1, L, heads, head_dim) by block, which the conditional prediction attends to besides
            its own; `negative_…` is of the unconditional prediction.
        lora: State dict of a LoRA of the transformer, under diffusers' names.
        extra_text_embedding: Text embeddings (1, L, D) that follow the prompt's.
    """

    kv_cache: KVCache | None = None
    negative_kv_cache: KVCache | None = None
    lora: Mapping[str, Tensor] | None = None
    negative_lora: Mapping[str, Tensor] | None = None
    extra_text_embedding: Tensor | None = None
    negative_extra_text_embedding: Tensor | None = None


def defaults_of(request: type[ImageRequest]) -> dict[str, Any]:
    """The default of every field that has one."""
    return {field.name: field.default for field in fields(request) if field.default is not MISSING}


def parameters_of(request: type[ImageRequest]) -> list[inspect.Parameter]:
    """The fields as parameters of a call: `prompt` may stand first without its name."""
    kinds = {"prompt": inspect.Parameter.POSITIONAL_OR_KEYWORD}
    hints, first = get_type_hints(request), "prompt"
    named = sorted(fields(request), key=lambda field: field.name != first)
    return [
        inspect.Parameter(
            field.name,
            kinds.get(field.name, inspect.Parameter.KEYWORD_ONLY),
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in named
    ]


def typed(request: type[ImageRequest], name: str, value: Any) -> Any:
    """An argument of a request that may be a cell of a csv, which is text, as the number that it is to be.

    Raises:
        ValueError: It is none.
    """
    hint = get_type_hints(request).get(name)
    kinds = get_args(hint) or [hint]
    kind = next((kind for kind in (int, float) if kind in kinds), None)
    if kind is None or not isinstance(value, str):
        return value
    try:
        return kind(value)
    except ValueError:
        expected = "a whole number" if kind is int else "a number"
        raise ValueError(f"{name} is {value!r}, expected {expected}.") from None


def document(request: type[ImageRequest]) -> str:
    """The documentation of a request, and of those that it adds to, as one docstring."""
    parts = [cls.__doc__ for cls in request.__mro__ if cls is not object and cls.__doc__]
    return "\n\n".join(inspect.cleandoc(part) for part in parts)
