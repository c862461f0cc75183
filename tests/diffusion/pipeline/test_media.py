"""A family decides what it generates: shared code asks its `media`, and treats no value as an image itself."""

import torch
import toy
from PIL import Image

from diffsynth.diffusion.pipeline.media import ImageMedia


class Clips(ImageMedia):
    """Two frames, of which a thumbnail shows the first."""

    column, argument = "clip", "input_clip"

    def resized(self, value: list[Image.Image], height: int, width: int) -> list[Image.Image]:
        return [super(Clips, self).resized(frame, height, width) for frame in value]

    def preprocess(self, value: list[Image.Image], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        return super().preprocess(value[0], device, dtype)


class ClipPipeline(toy.ToyPipeline):
    media = Clips()


def test_what_a_request_starts_from_is_resized_by_its_media():
    pipe = ClipPipeline()
    clip = [Image.new("L", (30, 20)), Image.new("RGB", (10, 10))]
    shared, _, _ = pipe.split_request({"prompt": "a", "input_clip": clip, "height": 32, "width": 48})
    assert [(frame.mode, frame.size) for frame in shared["input_clip"]] == [("RGB", (48, 32))] * 2


def test_a_value_becomes_a_tensor_by_its_media():
    red, blue = (Image.new("RGB", (4, 4), name) for name in ("red", "blue"))
    assert ClipPipeline().preprocess_image([red, blue]).unique().tolist() == [-1, 1]
    assert ClipPipeline().preprocess_image([blue, red])[0, 0].eq(-1).all()


def test_the_column_is_trained_by_the_argument_of_its_media():
    assert ImageMedia().inputs(Image.new("RGB", (6, 4))).keys() == {"input_image", "height", "width"}
    assert Clips().inputs(Image.new("RGB", (6, 4))).keys() == {"input_clip", "height", "width"}
