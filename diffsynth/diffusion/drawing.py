"""Pictures on disk: prompts in, images and grids out, each image with the parameters that drew it."""

import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from ..core.files import replacing

LINE_HEIGHT, CAPTION_LINES, LETTER_WIDTH = 14, 2, 6
GRID_COLUMNS = 8
CELL_WIDTH = 128  # smaller images are enlarged in grids, to be seen and captioned


def read_prompts(prompt: str | Sequence[str]) -> list[str]:
    """One prompt, a list, or the non-empty lines of a text file."""
    if not isinstance(prompt, str):
        return list(prompt)
    if not prompt.endswith(".txt"):
        return [prompt]
    lines = [line.strip() for line in Path(prompt).read_text(encoding="utf-8").splitlines()]
    if not any(lines):
        raise ValueError(f"{prompt} holds no prompt; write one a line.")
    return [line for line in lines if line]


def load_images(**paths: str | None) -> dict[str, Image.Image]:
    """The images at those paths that are given, by name."""
    return {name: Image.open(path).convert("RGB") for name, path in paths.items() if path is not None}


def open_files(inputs: Mapping[str, object]) -> dict[str, object]:
    """Inputs of a template, of which those that are paths of files are opened as images."""
    is_file = {name: isinstance(value, str) and Path(value).is_file() for name, value in inputs.items()}
    return {name: Image.open(value).convert("RGB") if is_file[name] else value for name, value in inputs.items()}


def draw(
    pipe, requests: Sequence[Mapping], images: Mapping, batch_size: int, folder: Path, source: Mapping
) -> list[Path]:
    """Draw requests in batches and save each image, and a grid where there are several.

    The request and the `source` of the weights are the image's metadata.
    """
    drawn, paths = [], []
    for start in range(0, len(requests), batch_size):
        batch = requests[start : start + batch_size]
        for image, request in zip(pipe.generate([{**images, **request} for request in batch]), batch, strict=True):
            paths.append(folder / f"{len(paths):04d}.png")
            save_png(image, paths[-1], {**request, **source})
            drawn.append(row([image], [request["prompt"]]))
    if len(drawn) > 1:
        paths.append(folder / "grid.png")
        save_png(stack([beside(drawn[i : i + GRID_COLUMNS]) for i in range(0, len(drawn), GRID_COLUMNS)]), paths[-1])
    return paths


def save_png(image: Image.Image, path: Path, parameters: Mapping | None = None) -> None:
    """Save an image, with its parameters as JSON in the PNG text chunk `parameters`."""
    info = PngInfo()
    if parameters is not None:
        info.add_itxt("parameters", json.dumps(dict(parameters), ensure_ascii=False))
    with replacing(path) as partial:
        image.save(partial, format="PNG", pnginfo=info)


def row(images: Sequence[Image.Image], captions: Sequence[str]) -> Image.Image:
    """Images side by side, each above its caption, which is cut at two lines."""
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
    """Pictures next to one another."""
    return _join(pictures, across=True)


def stack(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures below one another."""
    return _join(pictures, across=False)


def _join(pictures: Sequence[Image.Image], across: bool) -> Image.Image:
    widths, heights = [p.width for p in pictures], [p.height for p in pictures]
    size = (sum(widths), max(heights)) if across else (max(widths), sum(heights))
    joined, offset = Image.new("RGB", size, "white"), 0
    for picture in pictures:
        joined.paste(picture, (offset, 0) if across else (0, offset))
        offset += picture.width if across else picture.height
    return joined
