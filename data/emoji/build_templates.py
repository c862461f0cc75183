"""Rebuild the rows that the shipped templates are trained on, and those pictures of them that are no emoji as drawn.

    python data/emoji/build_templates.py

Needs the images and csv files of `build.py`. Committed files were made with pillow 13.0.0; the same bytes every time.
"""

import csv
import json
import random
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parent
QUALITY = 75
SHADES = 3  # pictures of a concept
STRONGEST = 5.0  # a gamma of up to this, or down to one over it
EVERY = {"train": 2, "held_out": 5}  # one concept in so many is shaded


def grey(draw, number):
    """One gamma for all channels; those of a concept are spread over the range."""
    return STRONGEST ** (2 * (number + draw.random()) / SHADES - 1)


def colour(draw, number):
    """A gamma for each channel."""
    return STRONGEST ** np.array([draw.uniform(-1, 1) for _ in range(3)])


def read_concepts(split):
    """(slug, name) of every concept of a split."""
    with open(HERE / f"color_{split}.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [(Path(row["image"]).stem, row["prompt"].removeprefix("a color emoji of ")) for row in rows]


def write_shades(folder, draw_gamma, split):
    """Shaded pictures, whose white stays white, and a row of each, whose template input is the picture itself."""
    for slug, name in read_concepts(split)[:: EVERY[split]]:
        original, draw = np.asarray(Image.open(HERE / f"color/{slug}.webp")) / 255, random.Random(f"{folder} {slug}")
        for number in range(SHADES):
            path = f"{folder}/{slug}-{number}.webp"
            pixels = 255 * original ** draw_gamma(draw, number)
            Image.fromarray(pixels.round().astype(np.uint8)).save(HERE / path, quality=QUALITY, method=6)
            yield {"image": path, "prompt": f"a color emoji of {name}", "template_inputs": {"image": path}}


def write_mirrored():
    """The colour pictures mirrored, which the base never saw."""
    make_folder("mirrored")
    for path in sorted((HERE / "color").glob("*.webp")):
        image = Image.open(path).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        image.save(HERE / "mirrored" / path.name, quality=QUALITY, method=6)


def structures(split):
    """Line art, and the same in colour; by name, and without."""
    for slug, name in read_concepts(split):
        yield from both_ways("line", slug, f"a color emoji of {name}", "a color emoji")


def edits(split):
    """Flat pictures, and the same in colour."""
    for slug, _ in read_concepts(split):
        yield from both_ways("flat", slug, "a color emoji of this")


def both_ways(style, slug, *prompts):
    """Rows of a concept as it is, and mirrored."""
    for folder in ("color", "mirrored"):
        inputs = {"image": f"{style}/{slug}.webp", "mirror": folder == "mirrored"}
        for prompt in prompts:
            yield {"image": f"{folder}/{slug}.webp", "prompt": prompt, "template_inputs": inputs}


def make_folder(name):
    shutil.rmtree(HERE / name, ignore_errors=True)
    (HERE / name).mkdir()


def write_rows(name, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (HERE / f"{name}.jsonl").write_text(text, encoding="utf-8")


def main():
    write_mirrored()
    for folder, draw_gamma in {"brightness": grey, "soft_rgb": colour}.items():
        make_folder(folder)
        for split in EVERY:
            write_rows(f"{folder}_{split}", write_shades(folder, draw_gamma, split))
    for split in EVERY:
        write_rows(f"structure_{split}", structures(split))
        write_rows(f"edit_{split}", edits(split))


if __name__ == "__main__":
    main()
