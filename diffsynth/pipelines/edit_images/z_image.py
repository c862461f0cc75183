"""Z-Image-Omni's images to edit: their latents, and SigLIP's features of them."""

from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from ...diffusion.pipeline.image_units import EditImageEmbedder, edit_images
from ...diffusion.pipeline.units import PipelineUnit

if TYPE_CHECKING:
    from ..z_image import ZImagePipeline


class ZImageUnit_EditImageEmbedder(EditImageEmbedder):
    needs = "siglip_processor"
    model_with_it = "model=z_image_omni"


class ZImageUnit_EditImageFeatures(PipelineUnit):
    """Computes the features (1, h, w, D) of each image to edit."""

    needs = "siglip_processor"

    def __init__(self):
        super().__init__(output_params=("edit_features",), onload_model_names=("siglip",))

    def process(self, pipe, edit_image, edit_image_auto_resize, edit_image_pixels):
        images = edit_images(edit_image, edit_image_auto_resize, edit_image_pixels)
        return {"edit_features": [image_features(pipe, image) for image in images]} if images else {}


def image_features(pipe: "ZImagePipeline", image: Image.Image) -> Tensor:
    """SigLIP's features (1, h, w, D) of an image, one per patch."""
    arrays = pipe.siglip_processor(images=[image], return_tensors="np")
    height, width = arrays["spatial_shapes"][0].tolist()
    tensors = {name: torch.from_numpy(array).to(pipe.device) for name, array in arrays.items()}
    features = pipe.siglip(**tensors).last_hidden_state[:, : height * width]
    return features.unflatten(1, (height, width))
