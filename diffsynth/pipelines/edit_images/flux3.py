"""FLUX.3's images to edit: their sizes, as in the training."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from diffusers.modular_pipelines.flux3.image_processor import Flux3ImageProcessor
from PIL import Image

from ...diffusion.pipeline.image_units import EditImageEmbedder, edit_images

if TYPE_CHECKING:
    from ..flux3_image import Flux3ImagePipeline


class Flux3Unit_EditImageEmbedder(EditImageEmbedder):
    edit_inputs = ("edit_image", "edit_image_auto_resize")  # the released pipeline decides the area

    def process(self, pipe, edit_image, edit_image_auto_resize, tiled, tile_size, tile_stride):
        return super().process(pipe, edit_image, edit_image_auto_resize, 0, tiled, tile_size, tile_stride)

    def images(
        self,
        pipe: "Flux3ImagePipeline",
        edit_image: Image.Image | Sequence[Image.Image] | None,
        edit_image_auto_resize: bool,
        edit_image_pixels: int = 0,
    ) -> list[Image.Image]:
        alone = isinstance(edit_image, Image.Image) or (edit_image is not None and len(edit_image) == 1)
        return edit_images(edit_image, edit_image_auto_resize, 0, lambda image, _: as_reference(image, alone))


def as_reference(image: Image.Image, alone: bool) -> Image.Image:
    """An image that is padded if it is alone, and else cropped, to multiples of 16, as in the training."""
    processor = Flux3ImageProcessor()  # its `preprocess` reads values, which a plan's tensors do not have
    if not alone:
        image = processor._resize_if_exceeds_area(image)
        return processor.resize(image, *processor.get_default_height_width(image), resize_mode="crop")
    image = processor._resize_if_canvas_exceeds_area(image)
    canvas = processor._get_canvas_height_width(image.height, image.width)
    return processor.resize(image, *canvas, resize_mode="fill")
