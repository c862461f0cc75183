"""Requests: the arguments of a pipeline's call, documented once for all families.

Shapes: L tokens, D width.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import cache
from typing import Any, get_args, get_type_hints

from PIL import Image
from torch import Tensor

from ...core.ranges import (
    NonNegativeFloat,
    Pixels,
    PositiveFloat,
    PositiveFraction,
    PositiveInt,
    SamplingSteps,
    Seed,
    Side,
    allows,
    expected,
)
from .kv_cache import KVCache

Frames = list[Image.Image]  # a video; a field for several images is a Sequence of them

EDIT_IMAGE_PIXELS = 1024 * 1024  # area at which the released editing models were trained, as DiffSynth-Studio has it


@dataclass(kw_only=True)
class Request:
    """Sample one image or video.

    Args:
        prompt: Description of the image or video.
        negative_prompt: Description of what classifier-free guidance moves away from.
        cfg_scale: Scale of classifier-free guidance; 1 switches it off and takes half the time.
        denoising_strength: Noise level to which the image or video to start from is noised, in (0, 1].
        height, width: Size in pixels, rounded up to a multiple of what the family's latents need.
        seed: Seed of the noise; None takes torch's global generator.
        rand_device: Device on which the noise is made.
        num_inference_steps: Number of steps; the network is called once per step, twice under guidance.
        sigmas: Noise levels to sample at, instead of the family's grid of `num_inference_steps` levels.
        sampler: `euler`, `heun`, `dpmpp_2m`, or `renoise` as some few-step students need; see `pipeline.samplers`.
        tiled: Run the autoencoder on tiles, which takes less memory and may leave faint seams.
        tile_size, tile_stride: Size of the tiles and distance between them, in pixels of the autoencoder's latents.

    If `cfg_scale`, `num_inference_steps`, `sigmas` or `sampler` is None or left out, it has the value that the weights
    were trained for (see `PipelineNetworks.use_sampling_settings`), or else the model's default.
    """

    prompt: str
    negative_prompt: str = ""
    cfg_scale: NonNegativeFloat = 1.0
    denoising_strength: PositiveFraction = 1.0
    height: Side = 1024
    width: Side = 1024
    seed: Seed | None = None
    rand_device: str = "cpu"
    num_inference_steps: SamplingSteps = 30
    sigmas: Sequence[PositiveFraction] | None = None
    sampler: str = "euler"
    tiled: bool = False
    tile_size: PositiveInt = 128
    tile_stride: PositiveInt = 64


@dataclass(kw_only=True)
class ImageRequest(Request):
    """Sample one image.

    Args:
        input_image: Image to start from instead of pure noise; it is resized to `height` and `width`.
        inpaint_mask: Image whose white area is sampled anew; its black area keeps `input_image`.
        inpaint_blur_sigma: Latent pixels by which the mask's edge is softened; None leaves it sharp.
    """

    input_image: Image.Image | None = None
    inpaint_mask: Image.Image | None = None
    inpaint_blur_sigma: NonNegativeFloat | None = None


@dataclass(kw_only=True)
class VideoRequest(Request):
    """Sample one video.

    Args:
        input_video: Frames to start from instead of pure noise, resized to `height` and `width`.
        num_frames: Number of frames, rounded up to one that the autoencoder takes, such as 4 n + 1.
        frame_rate: Frames per second of the file that is written; the network does not read it.
    """

    input_video: Frames | None = None
    num_frames: PositiveInt = 81
    frame_rate: PositiveFloat = 16.0


@dataclass(kw_only=True)
class EditRequest(ImageRequest):
    """Sample one image from a prompt, or from a prompt and images to edit.

    Args:
        edit_image: Image that is changed as the prompt says, or several that the prompt refers to.
        edit_image_auto_resize: Scale each edit image to about `edit_image_pixels` in its own proportions; if false,
            their sides must be multiples of 16.
        edit_image_pixels: Area in pixels.
    """

    edit_image: Image.Image | Sequence[Image.Image] | None = None
    edit_image_auto_resize: bool = True
    edit_image_pixels: Pixels = EDIT_IMAGE_PIXELS


@dataclass(kw_only=True)
class TemplateRequest(ImageRequest):
    """Sample one image with the outputs of templates (`diffusion.template`).

    The conditional prediction reads these arguments; the unconditional one reads those that begin with `negative_`.

    Args:
        kv_cache, negative_kv_cache: Extra keys and values (1, L, heads, head_dim) by block, to attend to.
        lora, negative_lora: State dict of a LoRA of the transformer, under diffusers' names.
        extra_text_embedding, negative_extra_text_embedding: Text embeddings (1, L, D) appended to the prompt's.
    """

    kv_cache: KVCache | None = None
    negative_kv_cache: KVCache | None = None
    lora: Mapping[str, Tensor] | None = None
    negative_lora: Mapping[str, Tensor] | None = None
    extra_text_embedding: Tensor | None = None
    negative_extra_text_embedding: Tensor | None = None


def defaults_of(request: type[Request]) -> dict[str, Any]:
    """The defaults of a request's fields, by name."""
    return {field.name: field.default for field in fields(request) if field.default is not MISSING}


@cache
def annotations_of(request: type[Request]) -> dict[str, Any]:
    """The annotations of a request's fields, by name; a family that only changes a default keeps the field's range."""
    found: dict[str, Any] = {}
    types: dict[str, Any] = {}
    for base in reversed(request.__mro__):
        plain = get_type_hints(base)
        for name, hint in get_type_hints(base, include_extras=True).items():
            only_changes_default = hint == plain[name] == types.get(name)
            if not only_changes_default:
                found[name], types[name] = hint, plain[name]
    return found


def image_arguments(request: type[Request]) -> set[str]:
    """The fields of a request that take images, those that take videos included."""
    return {name for name, hint in annotations_of(request).items() if _names(hint, Image.Image)}


def video_arguments(request: type[Request]) -> set[str]:
    """The fields of a request that take videos."""
    return {name for name, hint in annotations_of(request).items() if _names(hint, Frames)}


def _names(hint: Any, kind: Any) -> bool:
    """Whether an annotation names a type, at any depth."""
    return hint == kind or any(_names(inner, kind) for inner in get_args(hint))


def parameters_of(request: type[Request]) -> list[inspect.Parameter]:
    """A request's fields as parameters of a call; all are keyword-only but `prompt`, which comes first."""
    kinds = {"prompt": inspect.Parameter.POSITIONAL_OR_KEYWORD}
    hints, first = annotations_of(request), "prompt"
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


def check_numbers(request: type[Request], arguments: Mapping[str, Any], path: str = "") -> None:
    """Check the numbers among a call's arguments against their ranges.

    Args:
        path: What stands before an argument's name where it is typed, such as `options.`.

    Raises:
        ValueError: One is out of its range, or is no number; the first by the order of the request's fields.
    """
    hints = annotations_of(request)
    for name in [name for name in hints if name in arguments]:
        if not allows(hints[name], arguments[name]):
            found = arguments[name]
            raise ValueError(f"{path}{name} is {found!r}; expected {expected(hints[name], found)}.")


def typed(request: type[Request], name: str, value: Any) -> Any:
    """Convert an argument that was read from a csv, as text, to the number that the request expects.

    Raises:
        ValueError: The text is no such number.
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


def document(request: type[Request]) -> str:
    """The docstrings of a request's class and of its base classes, as one."""
    parts = [cls.__doc__ for cls in request.__mro__ if cls is not object and cls.__doc__]
    return "\n\n".join(inspect.cleandoc(part) for part in parts)
