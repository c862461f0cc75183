"""Units that families of image models share; they differ in the pipeline's `latent_channels` and `latent_factor`."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from .units import PipelineUnit, in_groups


class ShapeChecker(PipelineUnit):
    def __init__(self):
        super().__init__(output_params=("height", "width"))

    def process(self, pipe, height, width):
        height, width = pipe.check_resize_height_width(height, width)
        return {"height": height, "width": width}


class NoiseInitializer(PipelineUnit):
    def __init__(self):
        super().__init__(output_params=("noise",))

    def process(self, pipe, height, width, seed, rand_device):
        # Drawn in the pipeline's dtype, as the original does: the same seed must give the same picture.
        shape = (1, pipe.latent_channels, height // pipe.latent_factor, width // pipe.latent_factor)
        return {"noise": pipe.generate_noise(shape, seed, rand_device, pipe.torch_dtype)}


class InputImageEmbedder(PipelineUnit):
    def __init__(self):
        super().__init__(output_params=("latents", "input_latents"), onload_model_names=("vae",))

    def process(self, pipe, input_image, noise, tiled, tile_size, tile_stride):
        if input_image is None:
            return {"latents": noise, "input_latents": None}
        (input_latents,) = encode_images(pipe, [input_image], tiled, tile_size, tile_stride)
        if pipe.scheduler.training:
            return {"latents": noise, "input_latents": input_latents}
        latents = pipe.scheduler.add_noise(input_latents, noise, pipe.scheduler.timesteps[0])
        return {"latents": latents, "input_latents": input_latents}

    def process_batch(self, pipe, batch):
        """Images of training data; those of one size go through the autoencoder together."""
        latents = encode_images(pipe, [each["input_image"] for each in batch], *tiling(batch[0]))
        return [{"latents": i["noise"], "input_latents": own} for i, own in zip(batch, latents, strict=True)]


def encode_images(
    pipe, images: Sequence[Image.Image], tiled: bool, tile_size: int, tile_stride: int
) -> Sequence[Tensor]:
    """Normalised latents (1, C, h, w) of each image; those of one size go through the autoencoder together."""
    pipe.load_models_to_device(["vae"])

    def encode(alike: Sequence[Image.Image]) -> Sequence[Tensor]:
        pixels = torch.cat([pipe.preprocess_image(image) for image in alike])
        return pipe.vae.encode(pixels, tiled, tile_size, tile_stride).split(1)

    return in_groups(images, [image.size for image in images], encode)


def tiling(inputs: Mapping) -> tuple[bool, int, int]:
    return inputs["tiled"], inputs["tile_size"], inputs["tile_stride"]


class Inpaint(PipelineUnit):
    """A mask image (white is redrawn) as latent weights (1, 1, h, w) in [0, 1]."""

    def __init__(self):
        super().__init__(output_params=("inpaint_mask",))

    def process(self, pipe, inpaint_mask, inpaint_blur_sigma, height, width):
        if inpaint_mask is None:
            return {}
        return {"inpaint_mask": latent_weights(pipe, inpaint_mask, height, width, inpaint_blur_sigma)}


class LossMask(PipelineUnit):
    """A mask image of training data (white counts) as latent weights (1, 1, h, w) in [0, 1] of the loss."""

    def __init__(self):
        super().__init__(output_params=("loss_mask",))

    def process(self, pipe, height, width, loss_mask=None):
        if loss_mask is None:
            return {}
        weights = latent_weights(pipe, loss_mask, height, width)
        if not weights.any():
            raise ValueError(
                "loss_mask is black all over, so that nothing of the image would be trained; make white what counts, "
                "or leave the row out. (What was white may also have been cropped off.)"
            )
        return {"loss_mask": weights}


def latent_weights(pipe, mask: Image.Image, height: int, width: int, blur_sigma: float | None = None) -> Tensor:
    """A mask image as weights (1, 1, h, w) in [0, 1], 1 where it is white; blurred by `blur_sigma` latent pixels."""
    # The mean over each latent pixel: other filters reach beyond it, into what is to be kept.
    size = (width // pipe.latent_factor, height // pipe.latent_factor)
    mask = mask.convert("L").resize(size, Image.Resampling.BOX)
    if blur_sigma:
        mask = mask.filter(ImageFilter.GaussianBlur(blur_sigma))
    weights = torch.from_numpy(np.array(mask, dtype=np.float32) / 255)
    return weights[None, None].to(pipe.device, pipe.torch_dtype)
