"""Save images with the parameters that they were sampled with, and arrange images in grids."""

import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from .files import replacing

LINE_HEIGHT, LETTER_WIDTH = 14, 6  # pixels of a caption in Pillow's built-in font
CAPTION_LINES = 2  # longer captions are cut; a guess
GRID_COLUMNS = 8  # images side by side in a grid; a guess
CELL_WIDTH = 128  # pixels; grids enlarge narrower images, so that captions fit below them; a guess


def save_png(image: Image.Image, path: Path, parameters: Mapping | None = None) -> None:
    """Save an image as PNG, with `parameters` as JSON in the text chunk of that name."""
    info = PngInfo()
    if parameters is not None:
        info.add_itxt("parameters", json.dumps(dict(parameters), ensure_ascii=False))
    with replacing(path) as partial:
        image.save(partial, format="PNG", pnginfo=info)


def save_animation(frames: Sequence[Image.Image], path: Path, milliseconds: int) -> None:
    """Save RGB images as an animated WebP that repeats; each is shown for `milliseconds`."""
    with replacing(path) as partial:
        first, *others = frames
        first.save(partial, "WEBP", save_all=True, append_images=others, duration=milliseconds, loop=0, quality=80)


def row(images: Sequence[Image.Image], captions: Sequence[str]) -> Image.Image:
    """One image of several side by side, each above its caption, which is cut after two lines."""
    return beside([_captioned(image, caption) for image, caption in zip(images, captions, strict=True)])


def _captioned(image: Image.Image, caption: str) -> Image.Image:
    enlarged = max(1, CELL_WIDTH // image.width)
    image = image.resize((image.width * enlarged, image.height * enlarged), Image.Resampling.BICUBIC)
    lines = textwrap.wrap(caption, image.width // LETTER_WIDTH, max_lines=CAPTION_LINES, placeholder=" …")
    cell = Image.new("RGB", (image.width, image.height + LINE_HEIGHT * len(lines)), "white")
    cell.paste(image, (0, 0))
    ImageDraw.Draw(cell).multiline_text((2, image.height + 1), "\n".join(lines), fill="black", spacing=2)
    return cell


def beside(pictures: Sequence[Image.Image]) -> Image.Image:
    """One image of several side by side."""
    return _join(pictures, across=True)


def stack(pictures: Sequence[Image.Image]) -> Image.Image:
    """One image of several below one another."""
    return _join(pictures, across=False)


def _join(pictures: Sequence[Image.Image], across: bool) -> Image.Image:
    widths, heights = [p.width for p in pictures], [p.height for p in pictures]
    size = (sum(widths), max(heights)) if across else (max(widths), sum(heights))
    joined, offset = Image.new("RGB", size, "white"), 0
    for picture in pictures:
        joined.paste(picture, (offset, 0) if across else (0, offset))
        offset += picture.width if across else picture.height
    return joined
