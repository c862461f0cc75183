"""Rebuild the rows that the shipped templates and ControlNets are trained on, and the changed images of some rows.

    python data/emoji/build_templates.py

Needs the images and csv files of `build.py`, and diffsynth. The images of each kind are in one tar shard, and rows name
them by their place in it. The committed files were made with pillow 13.0.0 and its libwebp 1.6.0; the same bytes come
out every time.
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
SHADES = 3  # images per shaded concept
STRONGEST = 5.0  # gammas lie between 1 / STRONGEST and STRONGEST; a guess
EVERY = {"train": 2, "held_out": 5}  # every Nth concept of a split is shaded


def grey(rng, number):
    """A random gamma for all channels; the gammas of a concept are spread over the range."""
    return STRONGEST ** (2 * (number + rng.random()) / SHADES - 1)


def colour(rng, number):
    """A random gamma for each channel."""
    return STRONGEST ** np.array([rng.uniform(-1, 1) for _ in range(3)])


def read_concepts(split):
    """(slug, name) of every concept of a split."""
    with open(HERE / f"color_{split}.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [(Path(row["image"]).stem, row["prompt"].removeprefix("a color emoji of ")) for row in rows]


def shaded_concepts(split):
    """(slug, name) of the shaded concepts of a split."""
    return read_concepts(split)[:: EVERY[split]]


def shades(kind, sample_gamma):
    """(file name, image) of every shade of every shaded concept; white stays white."""
    for slug, _ in [concept for split in EVERY for concept in shaded_concepts(split)]:
        original, rng = np.asarray(Image.open(HERE / f"color/{slug}.webp")) / 255, random.Random(f"{kind} {slug}")
        for number in range(SHADES):
            pixels = 255 * original ** sample_gamma(rng, number)
            yield f"{slug}-{number}.webp", Image.fromarray(pixels.round().astype(np.uint8))


def mirrored():
    """(file name, image) of every colour image, mirrored; the base model was not trained on these."""
    for path in sorted((HERE / "color").glob("*.webp")):
        yield path.name, Image.open(path).transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def write_shard(kind, images):
    """Write (file name, image) pairs to the tar shard of their kind."""
    write_files(kind, ((name, encoded(image)) for name, image in images))


def encoded(image):
    """The bytes of an image's file."""
    image.save(file := BytesIO(), "webp", quality=QUALITY, method=6)
    return file.getvalue()


def write_files(kind, files):
    """Write (file name, bytes) pairs to the tar shard of their kind."""
    with tarfile.open(HERE / f"{kind}.tar", "w", format=tarfile.USTAR_FORMAT) as shard:
        for name, content in files:
            member = tarfile.TarInfo(name)  # without owner and date, so that equal images make equal shards
            member.size = len(content)
            shard.addfile(member, BytesIO(content))


def names_in_shard(kind):
    """The names that rows have for the images of a shard, by file name."""
    return {Path(row["image"]).name: row["image"] for row in read_shards(str(HERE), f"{kind}.tar")}


def shade_rows(kind, split):
    """One row per shade; its template input is the image itself."""
    names = names_in_shard(kind)
    for slug, name in shaded_concepts(split):
        for number in range(SHADES):
            path = names[f"{slug}-{number}.webp"]
            yield {"image": path, "prompt": f"a color emoji of {name}", "template_inputs": {"image": path}}


def structure_rows(split):
    """Rows from line art to colour, each once with the concept's name in the prompt and once without."""
    names = names_in_shard("mirrored")
    for slug, name in read_concepts(split):
        yield from both_ways(names, "line", slug, f"a color emoji of {name}", "a color emoji")


def edit_rows(split):
    """Rows from flat images to colour."""
    names = names_in_shard("mirrored")
    for slug, _ in read_concepts(split):
        yield from both_ways(names, "flat", slug, "a color emoji of this")


def control_rows(split):
    """Rows in colour with line art that controls them, each once with the concept's name in the prompt and once not."""
    for slug, name in read_concepts(split):
        for prompt in (f"a color emoji of {name}", "a color emoji"):
            yield {"image": f"color/{slug}.webp", "prompt": prompt, "controlnet_image": f"line/{slug}.webp"}


def both_ways(names, style, slug, *prompts):
    """Rows of a concept, each once as it is and once mirrored."""
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
    for kind, sample_gamma in {"brightness": grey, "soft_rgb": colour}.items():
        write_shard(kind, shades(kind, sample_gamma))
        for split in EVERY:
            write_rows(f"{kind}_{split}", shade_rows(kind, split))
    for split in EVERY:
        write_rows(f"structure_{split}", structure_rows(split))
        write_rows(f"edit_{split}", edit_rows(split))
        write_rows(f"control_{split}", control_rows(split))


if __name__ == "__main__":
    main()
