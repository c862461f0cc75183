"""Rebuild the short clips of moving emoji, `motion.tar`, and their tables.

    python -m data.emoji.build_motions

Needs the images and csv files of `build.py`, and diffsynth. A clip is an animated WebP of 9 frames at 8 frames per second.
Its first frame, the still, is the same for all motions of a concept: the colour emoji at 44 of 64 pixels, in the middle.
The committed files were made with pillow 13.0.0 and its libwebp 1.6.0; the same bytes come out every time.
"""  # noqa: E501

import csv
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from io import BytesIO
from itertools import chain
from typing import NamedTuple

import numpy as np
from PIL import Image

from data.emoji.build_templates import HERE, names_in_shard, read_concepts, write_files

NUM_FRAMES, FRAME_RATE = 9, 8  # two further latent frames of Wan after the first one; about a second
SIZE, STILL_SIZE, SUPERSAMPLING = 64, 44, 4  # pixels; 10 pixels around a still
QUALITY = 75
EVERY = 2  # every second concept of a split moves
MOTIONS_EACH = 3  # of a concept: five of eight pairs of a concept and a motion are never seen
PIVOT = STILL_SIZE / 2  # pixels from the centre to the top, by which an emoji that swings is held
SAME = 7.0  # mean difference, of 255, below which an emoji that turns looks the same, as a ball does; chosen by eye


class Pose(NamedTuple):
    """Where an emoji is: shift to the right and down in pixels, scale, and angle in degrees clockwise."""

    x: float = 0.0
    y: float = 0.0
    scale: float = 1.0
    angle: float = 0.0


def swings(u: float) -> Pose:
    angle = 25 * math.sin(2 * math.pi * u)
    turned = math.radians(angle)
    return Pose(x=-PIVOT * math.sin(turned), y=PIVOT * (math.cos(turned) - 1), angle=angle)


# The pose at time u, from 0 in the first frame to 1 in the last.
MOTIONS: dict[str, Callable[[float], Pose]] = {
    "moves left": lambda u: Pose(x=-12 * u),
    "moves right": lambda u: Pose(x=12 * u),
    "moves up": lambda u: Pose(y=-12 * u),
    "moves down": lambda u: Pose(y=12 * u),
    "grows": lambda u: Pose(scale=1.45**u),
    "shrinks": lambda u: Pose(scale=0.5**u),
    "turns": lambda u: Pose(angle=90 * u),
    "bounces": lambda u: Pose(y=-12 * abs(math.sin(2 * math.pi * u))),
}
# Motions that the miniature is not pretrained on, for a LoRA to learn.
NEW_MOTIONS: dict[str, Callable[[float], Pose]] = {
    "shakes": lambda u: Pose(x=8 * math.sin(4 * math.pi * u)),
    "swings": swings,
}


def frame(image: Image.Image, pose: Pose) -> Image.Image:
    """An emoji in a pose, on white: 64 × 64 pixels."""
    large = SIZE * SUPERSAMPLING
    scale = pose.scale * STILL_SIZE / image.width * SUPERSAMPLING
    cos, sin = (function(math.radians(pose.angle)) / scale for function in (math.cos, math.sin))
    x, y, centre = large / 2 + pose.x * SUPERSAMPLING, large / 2 + pose.y * SUPERSAMPLING, image.width / 2
    to_source = (cos, sin, centre - cos * x - sin * y, -sin, cos, centre + sin * x - cos * y)
    options = {"resample": Image.Resampling.BICUBIC, "fillcolor": "white"}
    return image.transform((large, large), Image.Transform.AFFINE, to_source, **options).reduce(SUPERSAMPLING)


def clip(image: Image.Image, motion: Callable[[float], Pose]) -> list[Image.Image]:
    """The frames of a motion; the first one is the still."""
    return [frame(image, motion(number / (NUM_FRAMES - 1))) for number in range(NUM_FRAMES)]


def encoded(frames: Sequence[Image.Image]) -> bytes:
    """The bytes of a clip's file, which repeats for ever."""
    options = {"append_images": frames[1:], "duration": 1000 // FRAME_RATE, "loop": 0, "minimize_size": True}
    frames[0].save(file := BytesIO(), "webp", save_all=True, quality=QUALITY, method=6, **options)
    return file.getvalue()


def read_image(slug: str) -> Image.Image:
    return Image.open(HERE / f"color/{slug}.webp").convert("RGB")


def can_show(motion: str, image: Image.Image) -> bool:
    """Whether a motion is seen: all are, but for turning of an emoji that looks the same after 45° or 90°."""
    if motion != "turns":
        return True
    still, *turned = (np.asarray(frame(image, Pose(angle=angle)), dtype=float) for angle in (0, 45, 90))
    return all(np.abs(other - still).mean() > SAME for other in turned)


def moving_concepts(split: str) -> list[tuple[str, str]]:
    """(slug, name) of the concepts of a split that move."""
    return read_concepts(split)[::EVERY]


def motions_of(slug: str, number: int) -> list[str]:
    """The motions that a concept is pretrained with, the Nth of its split; all motions are equally frequent."""
    usable = [name for name in MOTIONS if can_show(name, read_image(slug))]
    return [usable[(number + 3 * offset) % len(usable)] for offset in range(MOTIONS_EACH)]


def new_motions_of(slug: str, number: int) -> list[str]:
    """The new motion of a concept, the Nth of its split."""
    return [list(NEW_MOTIONS)[number % len(NEW_MOTIONS)]]


def clips(choose: Callable[[str, int], list[str]], *splits: str) -> Iterator[tuple[str, str, str]]:
    """(slug, name, motion) of the clips of some splits."""
    for split in splits:
        for number, (slug, name) in enumerate(moving_concepts(split)):
            yield from ((slug, name, motion) for motion in choose(slug, number))


def file_name(slug: str, motion: str) -> str:
    return f"{slug}-{motion.replace(' ', '-')}.webp"


def files() -> Iterator[tuple[str, bytes]]:
    """(file name, bytes) of every clip."""
    motions = MOTIONS | NEW_MOTIONS
    for choose in (motions_of, new_motions_of):
        for slug, _, motion in clips(choose, "train", "held_out"):
            yield file_name(slug, motion), encoded(clip(read_image(slug), motions[motion]))


def write_table(table: str, rows: Iterable[tuple[str, str, str]]) -> None:
    places = names_in_shard("motion")
    described = ((places[file_name(slug, motion)], f"a color emoji of {name} {motion}") for slug, name, motion in rows)
    with open(HERE / f"{table}.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([("video", "prompt"), *described])


def main() -> None:
    write_files("motion", files())
    write_table("motion", clips(motions_of, "train", "held_out"))
    for split in ("train", "held_out"):
        write_table(f"motion_{split}", clips(motions_of, split))
        write_table(f"new_motion_{split}", clips(new_motions_of, split))
        write_table(f"all_motion_{split}", chain(clips(motions_of, split), clips(new_motions_of, split)))


if __name__ == "__main__":
    main()
