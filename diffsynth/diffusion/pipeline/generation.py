"""From prompts to files: images, a grid of them, each image with the parameters that it was sampled with."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from ...core.pictures import GRID_COLUMNS, beside, row, save_png, stack


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


def sample_to_files(
    pipe, requests: Sequence[Mapping], images: Mapping, batch_size: int, folder: Path, source: Mapping
) -> list[Path]:
    """Draw requests in batches and save each image, and a grid where there are several.

    The request and the `source` of the weights are the image's metadata.
    """
    pictures, paths = [], []
    for start in range(0, len(requests), batch_size):
        batch = requests[start : start + batch_size]
        for image, request in zip(pipe.generate([{**images, **request} for request in batch]), batch, strict=True):
            paths.append(folder / f"{len(paths):04d}{pipe.media.suffix}")
            pipe.media.write(image, paths[-1], {**request, **source})
            pictures.append(row([pipe.media.thumbnail(image)], [request["prompt"]]))
    if len(pictures) > 1:
        paths.append(folder / "grid.png")
        save_png(
            stack([beside(pictures[i : i + GRID_COLUMNS]) for i in range(0, len(pictures), GRID_COLUMNS)]), paths[-1]
        )
    return paths
