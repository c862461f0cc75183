"""Units that families of image models share; the sizes that they need come from the pipeline's `latents`.

Shapes: B batch, C channels, h w latent size.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from ...core.data.operators.images import ImageCropAndResize
from ...core.data.operators.masks import of_other_sizes
from ...core.data.operators.picture_files import in_mode
from .units import PipelineUnit, in_groups

if TYPE_CHECKING:
    from ..base_pipeline import BasePipeline

EDIT_IMAGE_FACTOR = 32  # sides of a resized edit image are multiples of it, as in DiffSynth-Studio


class ShapeChecker(PipelineUnit):
    """Rounds height and width up to multiples of what the latents need."""

    def __init__(self):
        super().__init__(output_params=("height", "width"))

    def process(self, pipe, height, width):
        height, width = pipe.latents.fitted(height, width)
        return {"height": height, "width": width}


class NoiseInitializer(PipelineUnit):
    """Makes the initial noise (1, C, h, w) from the seed."""

    def __init__(self):
        super().__init__(output_params=("noise",))

    def process(self, pipe, height, width, seed, rand_device):
        # Made in the pipeline's dtype, as DiffSynth-Studio does: the same seed must give the same image.
        noise = pipe.generate_noise(pipe.latents.shape(height, width), seed, rand_device, pipe.torch_dtype)
        return {"noise": noise}


class InputImageEmbedder(PipelineUnit):
    """Encodes `input_image` to `input_latents`; `latents` is where sampling starts: noise, or the noised image."""

    def __init__(self):
        super().__init__(output_params=("latents", "input_latents"), onload_model_names=("vae",))

    def process(self, pipe, input_image, noise, tiled, tile_size, tile_stride):
        if input_image is None:
            return starting_from(pipe, noise, None)
        (input_latents,) = encode_images(pipe, [input_image], tiled, tile_size, tile_stride)
        return starting_from(pipe, noise, input_latents)

    def process_batch(self, pipe, batch):
        """Encode images of training data; those of equal size go through the autoencoder together."""
        latents = encode_images(pipe, [inputs["input_image"] for inputs in batch], *tiling(batch[0]))
        return [{"latents": i["noise"], "input_latents": own} for i, own in zip(batch, latents, strict=True)]


def starting_from(pipe: "BasePipeline", noise: Tensor, input_latents: Tensor | None) -> dict[str, Tensor | None]:
    """`input_latents` (1, …), and `latents` (1, …): the noise (1, …), or in sampling the input latents with noise."""
    if input_latents is None or pipe.scheduler.training:
        return {"latents": noise, "input_latents": input_latents}
    latents = pipe.scheduler.add_noise(input_latents, noise, pipe.scheduler.timesteps[0])
    return {"latents": latents, "input_latents": input_latents}


def encode_images(
    pipe: "BasePipeline", images: Sequence[Image.Image], tiled: bool, tile_size: int, tile_stride: int
) -> Sequence[Tensor]:
    """Normalised latents (1, C, h, w) of each image; images of equal size go through the autoencoder together."""
    pipe.load_models_to_device(["vae"])

    def encode(group: Sequence[Image.Image]) -> Sequence[Tensor]:
        pixels = torch.cat([pipe.preprocess_image(image) for image in group])
        return pipe.vae.encode(pixels, tiled, tile_size, tile_stride).split(1)

    return in_groups(images, [image.size for image in images], encode)


def tiling(inputs: Mapping) -> tuple[bool, int, int]:
    """A request's tiling of the autoencoder, as the last arguments of `encode_images`."""
    return inputs["tiled"], inputs["tile_size"], inputs["tile_stride"]


def crop_to_area(image: Image.Image, pixels: int) -> Image.Image:
    """Scale an image to about `pixels` pixels, then crop its sides to multiples of 32; proportions are kept."""
    width, height = _size_at_area(image, pixels)
    return ImageCropAndResize(height, width)(image)


def stretch_to_area(image: Image.Image, pixels: int) -> Image.Image:
    """Scale an image to about `pixels` pixels and to sides that are multiples of 32; proportions change a little."""
    return image.resize(_size_at_area(image, pixels), Image.Resampling.LANCZOS)


def _size_at_area(image: Image.Image, pixels: int) -> tuple[int, int]:
    scale = math.sqrt(pixels / (image.width * image.height))
    width, height = (max(1, round(n * scale / EDIT_IMAGE_FACTOR)) * EDIT_IMAGE_FACTOR for n in image.size)
    return width, height


def edit_images(
    edit_image: Image.Image | Sequence[Image.Image] | None,
    auto_resize: bool,
    pixels: int,
    resize: Callable[[Image.Image, int], Image.Image] = crop_to_area,
    mode: str = "RGB",
    multiple: int = 16,
) -> list[Image.Image]:
    """One edit image or several as a list of images in `mode`.

    Args:
        auto_resize: Scale each image to about `pixels` pixels by `resize`.
        multiple: Sides of images that are not scaled must be multiples of it.

    Raises:
        ValueError: An element is no image, or has sides that the autoencoder cannot divide.
    """
    images = image_list(edit_image, "edit_image", mode)
    return [resize(image, pixels) if auto_resize else _checked_sides(image, multiple) for image in images]


def image_list(value: Image.Image | Sequence[Image.Image] | None, name: str, mode: str = "RGB") -> list[Image.Image]:
    """One image, several or none as a list of images in `mode`; `name` is that of the argument, for errors.

    Raises:
        ValueError: An element is no image.
    """
    images = [] if value is None else value if isinstance(value, list | tuple) else [value]
    wrong = [image for image in images if not isinstance(image, Image.Image)]
    if wrong:
        raise ValueError(
            f"{name} is or holds {wrong[0]!r}, expected images; if it is a column of a data set, list it in "
            "dataset.data_file_keys."
        )
    return [in_mode(image, mode) for image in images]


def _checked_sides(image: Image.Image, multiple: int) -> Image.Image:
    if image.width % multiple or image.height % multiple:
        raise ValueError(
            f"edit_image is {image.width} x {image.height} pixels, expected multiples of {multiple}; crop it, or set "
            "edit_image_auto_resize=True, which resizes it."
        )
    return image


class EditImageEmbedder(PipelineUnit):
    """Encodes the edit images to `edit_latents`, a list of latents (1, C, h, w) of their own sizes."""

    resize = staticmethod(crop_to_area)  # the way in which the family's training data was resized
    # The unit's inputs that `images` reads.
    edit_inputs = ("edit_image", "edit_image_auto_resize", "edit_image_pixels")

    def __init__(self):
        super().__init__(output_params=("edit_latents",), onload_model_names=("vae",))

    def process(self, pipe, edit_image, edit_image_auto_resize, edit_image_pixels, tiled, tile_size, tile_stride):
        images = self.images(pipe, edit_image, edit_image_auto_resize, edit_image_pixels)
        return {"edit_latents": encode_images(pipe, images, tiled, tile_size, tile_stride)} if images else {}

    def images(
        self,
        pipe: "BasePipeline",
        edit_image: Image.Image | Sequence[Image.Image] | None,
        edit_image_auto_resize: bool,
        edit_image_pixels: int = 0,
    ) -> list[Image.Image]:
        """The edit images in the family's mode and as its training data was resized."""
        size = edit_image_auto_resize, edit_image_pixels
        return edit_images(edit_image, *size, self.resize, pipe.media.mode, pipe.latents.multiple)

    def process_batch(self, pipe, batch):
        """Encode the edit images of all samples; those of equal size go through the autoencoder together."""
        by_sample = [self.images(pipe, **{name: inputs[name] for name in self.edit_inputs}) for inputs in batch]
        images = [image for own in by_sample for image in own]
        latents = iter(encode_images(pipe, images, *tiling(batch[0])))
        return [{"edit_latents": [next(latents) for _ in own]} if own else {} for own in by_sample]


class Inpaint(PipelineUnit):
    """Turns a mask image, whose white area is sampled anew, into weights (1, 1, h, w) in [0, 1] of latent pixels."""

    def __init__(self):
        super().__init__(output_params=("inpaint_mask",))

    def process(self, pipe, inpaint_mask, inpaint_blur_sigma, height, width):
        if inpaint_mask is None:
            return {}
        return {"inpaint_mask": latent_weights(pipe, inpaint_mask, height, width, inpaint_blur_sigma)}


class LossMask(PipelineUnit):
    """Turns a mask image of training data, whose white area is trained, into weights (1, 1, h, w) of the loss."""

    def __init__(self):
        super().__init__(output_params=("loss_mask",))

    def process(self, pipe, height, width, loss_mask=None):
        if loss_mask is None:
            return {}
        if loss_mask.size != (width, height):
            raise ValueError(of_other_sizes("loss_mask", loss_mask.size, "its image", (width, height)) + ".")
        mask = latent_mask(pipe, loss_mask, height, width)
        if mask.getbbox() is None:
            raise ValueError(
                "loss_mask is black all over, and has no white area to train inside of; make that area white, or leave "
                "the row out. (The image's crop may also have cut the white area off.)"
            )
        return {"loss_mask": as_weights(pipe, mask)}


# The units of a family that samples single images, before its own.
IMAGE_UNITS = ShapeChecker, NoiseInitializer, InputImageEmbedder, Inpaint, LossMask


def latent_weights(
    pipe: "BasePipeline", mask: Image.Image, height: int, width: int, blur_sigma: float | None = None
) -> Tensor:
    """A mask image as weights (1, 1, h, w) in [0, 1], 1 where it is white; blurred by `blur_sigma` latent pixels."""
    return as_weights(pipe, latent_mask(pipe, mask, height, width, blur_sigma))


def latent_mask(
    pipe: "BasePipeline", mask: Image.Image, height: int, width: int, blur_sigma: float | None = None
) -> Image.Image:
    """A mask image in grey, one pixel for each latent pixel; blurred by `blur_sigma` latent pixels."""
    # BOX is the mean over each latent pixel. Other filters would mix in its neighbours, which may be masked.
    size = (width // pipe.latents.factor, height // pipe.latents.factor)
    mask = in_mode(mask, "L").resize(size, Image.Resampling.BOX)
    return mask.filter(ImageFilter.GaussianBlur(blur_sigma)) if blur_sigma else mask


def as_weights(pipe: "BasePipeline", mask: Image.Image) -> Tensor:
    """A grey image as weights (1, 1, h, w) in [0, 1], 1 where it is white."""
    weights = torch.from_numpy(np.array(mask, dtype=np.float32) / 255)
    return weights[None, None].to(pipe.device, pipe.torch_dtype)
