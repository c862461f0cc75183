"""Draws docs/conditions.png, the conditions of three embedded emoji, and times each condition at 1024 x 1024 pixels.

    python benchmarks/conditions.py

CPU times, medians of nine calls for an enlarged emoji.
"""

import statistics
import time
from pathlib import Path

from PIL import Image

from diffsynth.core.data import LoadImage
from diffsynth.core.data.conditions import Canny, Grey, LineArt, MaskedImage, RandomMask, Tile
from diffsynth.core.data.conditions.base import add_conditions
from diffsynth.core.pictures import row, save_png, stack
from diffsynth.core.process.console import keep_console

ROOT = Path(__file__).resolve().parents[1]
EMOJI = ["octopus", "hamburger", "rocket"]
COLOURS = 64  # of the picture's palette
CONDITIONS = {
    "canny": Canny(),
    "line_art": LineArt(),
    "grey": Grey(),
    "tile": Tile(),
    "strokes": RandomMask(boxes=0, whole=0),
    "boxes": RandomMask(strokes=0, whole=0),
    "masked_image": MaskedImage(mask="strokes"),
}


def picture(name: str, seed: int) -> Image.Image:
    """An emoji, beside what each condition makes of it."""
    cells = {"image": LoadImage()(str(ROOT / "data/emoji/color" / f"{name}.webp"))}
    add_conditions(cells, "image", CONDITIONS, seed)
    return row([image.resize((128, 128), Image.Resampling.NEAREST) for image in cells.values()], [*cells])


def milliseconds(condition, images: list[Image.Image]) -> float:
    times = []
    for seed in range(9):
        start = time.process_time()
        condition.make("column", images, seed)
        times.append(1000 * (time.process_time() - start))
    return statistics.median(times)


def main():
    sheet = stack([picture(name, seed) for seed, name in enumerate(EMOJI)])
    save_png(sheet.quantize(COLOURS), ROOT / "docs/conditions.png")
    image = LoadImage()(str(ROOT / "data/emoji/color/rocket.webp")).resize((1024, 1024), Image.Resampling.BICUBIC)
    for name, condition in CONDITIONS.items():
        masks = [Image.new("L", image.size, 255)] * len(condition.columns)
        print(f"{name}: {milliseconds(condition, [image, *masks]):.0f} ms")


if __name__ == "__main__":
    keep_console()
    main()
