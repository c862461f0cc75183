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


def test_media_with_alpha_keep_it_and_media_without_show_it_on_white(tmp_path):
    red = Image.new("RGBA", (4, 2), (255, 0, 0, 0))
    red.putpixel((0, 0), (255, 0, 0, 255))
    with_alpha, without = ImageMedia("RGBA"), ImageMedia()
    pixels = with_alpha.preprocess(red, torch.device("cpu"), torch.float32)
    assert pixels.shape == (1, 4, 2, 4) and pixels[0, 3].unique().tolist() == [-1, 1]
    with_alpha.write(with_alpha.postprocess(pixels), tmp_path / "red.png")
    assert Image.open(tmp_path / "red.png").convert("RGBA").tobytes() == red.tobytes()
    assert with_alpha.preprocess(red.convert("RGB"), torch.device("cpu"), torch.float32)[0, 3].eq(1).all()
    for shown in (with_alpha.thumbnail(red), without.resized(red, 2, 4)):
        assert shown.mode == "RGB" and set(shown.getdata()) == {(255, 0, 0), (255, 255, 255)}
