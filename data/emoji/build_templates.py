"""Rebuild the rows that the shipped templates are trained on, and those pictures of them that are no emoji as drawn.

    python data/emoji/build_templates.py

Needs the images and csv files of `build.py`, and diffsynth. The pictures of each kind are one tar shard, in which the
rows name them. The committed files were made with pillow 13.0.0 and its libwebp 1.6.0; the same bytes come out every
time.
"""

import csv
import json
import random
import tarfile
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from diffsynth.core.data import read_shards

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


def shaded_concepts(split):
    """(slug, name) of those concepts of a split that are shaded."""
    return read_concepts(split)[:: EVERY[split]]


def shades(kind, draw_gamma):
    """(file name, picture) of every shade of every concept; white stays white."""
    for slug, _ in [concept for split in EVERY for concept in shaded_concepts(split)]:
        original, draw = np.asarray(Image.open(HERE / f"color/{slug}.webp")) / 255, random.Random(f"{kind} {slug}")
        for number in range(SHADES):
            pixels = 255 * original ** draw_gamma(draw, number)
            yield f"{slug}-{number}.webp", Image.fromarray(pixels.round().astype(np.uint8))


def mirrored():
    """(file name, picture) of the colour pictures mirrored, which the base never saw."""
    for path in sorted((HERE / "color").glob("*.webp")):
        yield path.name, Image.open(path).transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def write_shard(kind, pictures):
    """Write (file name, picture) into the tar shard of their kind."""
    with tarfile.open(HERE / f"{kind}.tar", "w", format=tarfile.USTAR_FORMAT) as shard:
        for name, picture in pictures:
            picture.save(file := BytesIO(), "webp", quality=QUALITY, method=6)
            member = tarfile.TarInfo(name)  # without owner and date, so that equal pictures make equal shards
            member.size = file.tell()
            file.seek(0)
            shard.addfile(member, file)


def names_in_shard(kind):
    """What rows call each picture of a shard, by its file name."""
    return {Path(row["image"]).name: row["image"] for row in read_shards(str(HERE), f"{kind}.tar")}


def shade_rows(kind, split):
    """A row of every shade, whose template input is the picture itself."""
    names = names_in_shard(kind)
    for slug, name in shaded_concepts(split):
        for number in range(SHADES):
            path = names[f"{slug}-{number}.webp"]
            yield {"image": path, "prompt": f"a color emoji of {name}", "template_inputs": {"image": path}}


def structure_rows(split):
    """Line art, and the same in colour; by name, and without."""
    names = names_in_shard("mirrored")
    for slug, name in read_concepts(split):
        yield from both_ways(names, "line", slug, f"a color emoji of {name}", "a color emoji")


def edit_rows(split):
    """Flat pictures, and the same in colour."""
    names = names_in_shard("mirrored")
    for slug, _ in read_concepts(split):
        yield from both_ways(names, "flat", slug, "a color emoji of this")


def both_ways(names, style, slug, *prompts):
    """Rows of a concept as it is, and mirrored."""
    file = f"{slug}.webp"
    for target, mirror in ((f"color/{file}", False), (names[file], True)):
        for prompt in prompts:
            inputs = {"image": f"{style}/{file}", "mirror": mirror}
            yield {"image": target, "prompt": prompt, "template_inputs": inputs}


def write_rows(name, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (HERE / f"{name}.jsonl").write_text(text, encoding="utf-8")


def main():
    write_shard("mirrored", mirrored())
    for kind, draw_gamma in {"brightness": grey, "soft_rgb": colour}.items():
        write_shard(kind, shades(kind, draw_gamma))
        for split in EVERY:
            write_rows(f"{kind}_{split}", shade_rows(kind, split))
    for split in EVERY:
        write_rows(f"structure_{split}", structure_rows(split))
        write_rows(f"edit_{split}", edit_rows(split))


if __name__ == "__main__":
    main()
