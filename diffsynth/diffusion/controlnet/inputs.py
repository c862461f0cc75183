"""What ControlNets read: the arguments of a request, the latents of its images, when and how strongly they act.

Shapes: B batch, C channels of the latents, h w latent size, H W size in pixels.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ...core.data.operators.masks import of_other_sizes, white_area
from ...core.ranges import NonNegativeFloat, Probability
from ..pipeline.image_units import image_list
from ..pipeline.request import ImageRequest
from ..pipeline.units import PipelineUnit

if TYPE_CHECKING:
    from ..base_pipeline import BasePipeline

BLACK = -1.0  # of a pixel
Encode = Callable[[Tensor], Tensor]  # pixels (1, 3, H, W) in [-1, 1] to latents (1, C, h, w)


@dataclass(frozen=True)
class ControlInputs:
    """What a ControlNet reads; a pipeline keeps it when the network is dropped.

    Args:
        channels: Channels C of the latents, more than those of an image if it reads a mask, too.
        num_modes: Number of kinds of images that it tells apart by a mode; None for one kind.
        is_shifted: Whether the autoencoder's shift is subtracted from the latents, as for the transformer.
    """

    channels: int
    num_modes: int | None = None
    is_shifted: bool = True


@dataclass(frozen=True)
class ControlImages:
    """An image of a ControlNet, and what belongs to it.

    Args:
        reads: What the ControlNet reads.
        image: Pixels (1, 3, H, W) in [-1, 1].
        mask: (1, 1, H, W), 1 where the image is sampled anew, and 0 elsewhere; None without.
        kept: Pixels (1, 3, H, W) in [-1, 1] of the image to inpaint, where it is not `image`; None without.
    """

    reads: ControlInputs
    image: Tensor
    mask: Tensor | None = None
    kept: Tensor | None = None


@dataclass(kw_only=True)
class ControlRequest(ImageRequest):
    """Sample one image with a ControlNet.

    Args:
        controlnet_image: Image that the sample follows, such as edges or depths, resized to `height` and `width`; or
            several, all for one ControlNet or one for each of several. The outputs are added.
        controlnet_scale: Factor of the ControlNet's outputs, one for all images or one for each.
        controlnet_start, controlnet_end: The part of the sampling steps, from 0 to 1, in which the ControlNet is used,
            one for all images or one for each.
    """

    controlnet_image: Image.Image | Sequence[Image.Image] | None = None
    controlnet_scale: NonNegativeFloat | Sequence[NonNegativeFloat] = 1.0
    controlnet_start: Probability | Sequence[Probability] = 0.0
    controlnet_end: Probability | Sequence[Probability] = 1.0


@dataclass(kw_only=True)
class InpaintControlRequest(ControlRequest):
    """Sample one image with a ControlNet, which may be one that was trained to inpaint.

    Args:
        controlnet_inpaint_mask: Image whose white area is sampled anew.
    """

    controlnet_inpaint_mask: Image.Image | None = None


class ControlEmbedder(PipelineUnit):
    """Encodes the images of ControlNets to `control_latents`, a list of latents (1, C', h, w), one for each image.

    C' is C, or more for a ControlNet that reads a mask, too; see `InpaintControlEmbedder`.
    """

    needs = "controlnet"
    model_with_it = "the option of the model whose name ends in _controlnet (docs/controlnets.md)"

    def __init__(self):
        super().__init__(output_params=("control_latents",), onload_model_names=("vae",))

    def depends_on(self, pipe: "BasePipeline") -> dict[str, str]:
        return {"control_inputs": str(pipe.control_inputs)}

    def process(self, pipe, controlnet_image, height, width, tiled, tile_size, tile_stride):
        return self.encoded(pipe, controlnet_image, (width, height), (tiled, tile_size, tile_stride))

    def encoded(
        self,
        pipe: "BasePipeline",
        value: Image.Image | Sequence[Image.Image] | None,
        size: tuple[int, int],
        tiling: tuple[bool, int, int],
        **inpainted: Image.Image | None,
    ) -> dict[str, list[Tensor]]:
        """What the unit returns for `controlnet_image`.

        Args:
            size: Width and height in pixels.
            inpainted: `mask` and `kept` of `ControlImages` as images, if they are given.
        """
        images = [pixels(pipe, image, size) for image in image_list(value, "controlnet_image")]
        reads = inputs_of_images(pipe, len(images))
        as_tensors = {"mask": mask_pixels, "kept": pixels}
        others = {name: as_tensors[name](pipe, image, size) for name, image in inpainted.items() if image is not None}
        pipe.load_models_to_device(["vae"])
        encode = partial(_encode, pipe, tiling)
        read = [ControlImages(own, image, **others) for own, image in zip(reads, images, strict=True)]
        return {"control_latents": [self.control(pipe, encode, own) for own in read]} if read else {}

    def control(self, pipe: "BasePipeline", encode: Encode, images: ControlImages) -> Tensor:
        """What a ControlNet reads (1, C', h, w)."""
        return encode(images.image)


class InpaintControlEmbedder(ControlEmbedder):
    """`ControlEmbedder` of a family with ControlNets that inpaint, which read an image that is black in the mask."""

    def process(self, pipe, controlnet_image, controlnet_inpaint_mask, height, width, tiled, tile_size, tile_stride):
        mask = one_image(controlnet_inpaint_mask, "controlnet_inpaint_mask", "L")
        check_mask(pipe, mask, controlnet_image=controlnet_image)
        return self.encoded(pipe, controlnet_image, (width, height), (tiled, tile_size, tile_stride), mask=mask)

    def control(self, pipe: "BasePipeline", encode: Encode, images: ControlImages) -> Tensor:
        if images.reads.channels > pipe.latents.channels:
            return blackened(encode, images.image, images.mask)
        latents = encode(images.image)
        if images.reads.is_shifted:
            return latents
        mean, std = pipe.vae.statistics(latents)
        return latents + mean / std


def _encode(pipe: "BasePipeline", tiling: tuple[bool, int, int], image: Tensor) -> Tensor:
    return pipe.vae.encode(image, *tiling)


def inputs_of_images(pipe: "BasePipeline", images: int) -> Sequence[ControlInputs]:
    """What the ControlNet of each image reads: one ControlNet takes all images, several take one each."""
    controlnets = pipe.control_inputs
    if images and len(controlnets) not in (1, images):
        raise ValueError(
            f"controlnet_image holds {images} images for {len(controlnets)} ControlNets; give one for each, in their "
            "order."
        )
    return controlnets * images if len(controlnets) == 1 else controlnets[:images]


def pixels(pipe: "BasePipeline", image: Image.Image, size: tuple[int, int]) -> Tensor:
    """Pixels (1, 3, H, W) in [-1, 1] of an RGB image that is resized to (W, H)."""
    return pipe.preprocess_image(image.resize(size, Image.Resampling.LANCZOS))


def mask_pixels(pipe: "BasePipeline", mask: Image.Image, size: tuple[int, int]) -> Tensor:
    """A mask (1, 1, H, W) of a grey image that is resized to (W, H): 1 where it is nearer to white, and 0 elsewhere."""
    white = white_area(mask.resize(size, Image.Resampling.LANCZOS))
    return torch.from_numpy(white)[None, None].to(pipe.device, pipe.torch_dtype)


def kept_area(mask: Tensor, latents: Tensor) -> Tensor:
    """1 - mask (1, 1, H, W) at the size of latents (1, C, h, w), by the nearest pixel."""
    return F.interpolate(1 - mask, latents.shape[-2:]).to(latents)


def scale_at(request: Mapping[str, Any], step: int, count: int) -> dict[str, list[float]]:
    """`controlnet_scale` of each image in one of `count` sampling steps.

    It is 0 outside of `controlnet_start` to `controlnet_end`. The part of the steps is counted as by diffusers: step i
    of N is used if start ≤ i / N and (i + 1) / N ≤ end.
    """
    images = len(request.get("control_latents") or ())
    if not images:
        return {}
    each = [
        _of_each(request[name], images, name) for name in ("controlnet_scale", "controlnet_start", "controlnet_end")
    ]
    return {
        "controlnet_scale": [
            scale if start <= step / count and (step + 1) / count <= end else 0.0
            for scale, start, end in zip(*each, strict=True)
        ]
    }


def check_steps(request: Mapping[str, Any]) -> None:
    """Refuse a ControlNet that would act in no part of the steps."""
    starts, ends = (np.atleast_1d(request[f"controlnet_{end}"]).tolist() for end in ("start", "end"))
    pairs = np.broadcast(starts, ends) if 1 in (len(starts), len(ends)) else zip(starts, ends, strict=False)
    if wrong := next(((start, end) for start, end in pairs if start >= end), None):
        raise ValueError(
            f"controlnet_start is {wrong[0]} and controlnet_end {wrong[1]}, so that the ControlNet never acts; set "
            "controlnet_start below controlnet_end, or leave controlnet_image out."
        )


def _of_each(value: Any, images: int, name: str) -> Sequence[float]:
    """One number for each image, of one for all or of a list."""
    value = value[0] if isinstance(value, list) else value  # one of B equal lists
    values = [value] * images if isinstance(value, int | float) else value
    if len(values) != images:
        raise ValueError(f"{name} has {len(values)} numbers for {images} controlnet_image; give one for each.")
    return values


def check_columns(pipe: "BasePipeline", columns: Collection[str]) -> None:
    """Refuse a training with a ControlNet that gets no image from the data set's `columns`."""
    if "controlnet" in pipe.in_iteration_models and "controlnet_image" not in columns:
        raise ValueError(
            "model.controlnet is set, but the training reads no column controlnet_image; set "
            "task.extra_inputs=[controlnet_image] and dataset.data_file_keys=[image,controlnet_image], or "
            "model.controlnet=null."
        )


def check_sizes(name: str, controlnet: nn.Module, dit: nn.Module, sizes: Iterable[str]) -> None:
    """Refuse a ControlNet, called `name`, that differs from the transformer in one of these sizes of both."""
    for size in sizes:
        found, wanted = controlnet.config[size], dit.config[size]
        if found != wanted:
            raise ValueError(
                f"{name} has {size} {found}, but dit has {wanted}; take a ControlNet that was trained for this "
                "transformer."
            )


def blackened(encode: Encode, image: Tensor, mask: Tensor | None) -> Tensor:
    """Latents (1, C + 1, h, w) of an image (1, 3, H, W) that is black in the mask's area, and the area that is kept.

    Raises:
        ValueError: There is no mask.
    """
    if mask is None:
        raise ValueError("This ControlNet inpaints: controlnet_image needs controlnet_inpaint_mask; give both.")
    latents = encode(torch.where(mask > 0, BLACK, image))
    return torch.cat([latents, kept_area(mask, latents)], dim=1)


def one_image(value: Any, name: str, mode: str) -> Image.Image | None:
    """One image or none in `mode`; `name` is that of the argument, for errors.

    Raises:
        ValueError: There are several, or it is no image.
    """
    images = image_list(value, name, mode)
    if len(images) > 1:
        raise ValueError(f"{name} holds {len(images)} images, expected one.")
    return images[0] if images else None


def check_mask(pipe: "BasePipeline", mask: Image.Image | None, **images: Any) -> None:
    """Refuse a `controlnet_inpaint_mask` that no ControlNet reads, or that does not fit the request's other images.

    Args:
        images: What the arguments hold that a mask needs, by name; the last one is the image to inpaint.

    Raises:
        ValueError: There is a mask, and one of them is missing, or the last one has another size.
    """
    if mask is None:
        return
    channels = max(inputs.channels for inputs in pipe.control_inputs)
    if channels == pipe.latents.channels:
        raise ValueError(
            f"controlnet_inpaint_mask is given, but this ControlNet reads {channels} channels, which are "
            "those of an image alone; leave it out, or take a ControlNet that was trained to inpaint."
        )
    if missing := [name for name, image in images.items() if image is None]:
        raise ValueError(f"controlnet_inpaint_mask is given without {missing[0]}; give both.")
    *_, (name, image) = images.items()
    if isinstance(image, Image.Image) and image.size != mask.size:
        raise ValueError(of_other_sizes("controlnet_inpaint_mask", mask.size, name, image.size) + ".")
