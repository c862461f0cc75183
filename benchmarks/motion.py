"""Measures whether clips of the embedded Wan move as their prompts say, and saves film strips and an animation.

    python benchmarks/motion.py [LoRA file ...]

The motion of a clip is classified by centroid, area and angle of the emoji over the frames (`classify`). The concepts
are those of data/emoji's held-out tables: the base has seen each in three of eight motions, a LoRA of new motions none.
Each clip is sampled from its text alone, and from the text and the first frame. Five minutes on one core.
"""

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
from data.emoji.build_motions import (
    FRAME_RATE,
    MOTIONS,
    NEW_MOTIONS,
    NUM_FRAMES,
    Pose,
    can_show,
    frame,
    moving_concepts,
    read_image,
)
from diffsynth.core.files import replacing
from diffsynth.core.loader import ModelConfig
from diffsynth.core.pictures import beside, save_png, stack
from diffsynth.core.process.console import keep_console
from diffsynth.pipelines.wan import WanPipeline

ROOT = Path(__file__).resolve().parents[1]
MODEL, PICTURES = ROOT / "models/emoji_wan", ROOT / "outputs/motion"
PARTS = {"dit": "transformer", "text_encoder": "text_encoder", "vae": "vae", "tokenizer": "tokenizer"}
OPTIONS = {"cfg_scale": 4.0, "num_inference_steps": 20, "height": 64, "width": 64, "num_frames": NUM_FRAMES}
EVERY = 3  # every third concept is sampled in a motion
SHOWN = (0, 2, 4, 6, 8)  # frames in a film strip

STILL = "stands still"
ALL_MOTIONS: dict[str, Callable[[float], Pose]] = {STILL: lambda u: Pose(), **MOTIONS, **NEW_MOTIONS}
# Differences that count as much as one another, chosen so that the true clips are told apart.
CENTROID, LOG_AREA, TURNED = 4.0, 0.3, 0.1  # pixels; logarithm; share of the emoji's energy
ANGLES = range(-90, 95, 5)  # degrees to which a frame is compared

Clip = Sequence[Image.Image]


# Classifying ----------------------------------------------------------------------------------------------------------


def ink(image: Image.Image) -> np.ndarray:
    """How far each pixel is from white, (64, 64) in [0, 1]; faint traces on the background count as white."""
    darkness = 255 - np.asarray(image, dtype=np.float64).min(-1)
    return ((darkness - 16) / 48).clip(0, 1)


def moments(image: Image.Image) -> tuple[np.ndarray, float]:
    """Centroid (x, y) and area, in pixels, of what is not white; an empty frame has its centroid in the middle."""
    weights = ink(image)
    area = max(float(weights.sum()), 1.0)
    offsets = np.arange(len(weights)) + 0.5 - len(weights) / 2
    return np.array([(weights.sum(0) * offsets).sum(), (weights.sum(1) * offsets).sum()]) / area, area


def centred(image: Image.Image, centroid: np.ndarray, scale: float, angle: float = 0.0) -> np.ndarray:
    """An image, moved so that the centroid is in the middle, and enlarged and turned about it, as one row of pixels."""
    cos, sin = (function(math.radians(angle)) / scale for function in (math.cos, math.sin))
    middle = image.width / 2
    x, y = middle + centroid
    to_source = (cos, sin, x - (cos + sin) * middle, -sin, cos, y + (sin - cos) * middle)
    options = {"resample": Image.Resampling.BILINEAR, "fillcolor": "white"}
    return 255 - np.asarray(image.transform(image.size, Image.Transform.AFFINE, to_source, **options), float).ravel()


def turning_errors(clip: Clip, centroids: Sequence[np.ndarray], areas: Sequence[float]) -> np.ndarray:
    """How badly the first frame, turned by each of ANGLES, fits each frame: (frames, angles), 0 for the best angle."""
    first = np.stack([centred(clip[0], centroids[0], 1.0, angle) for angle in ANGLES])
    scales = [math.sqrt(areas[0] / area) for area in areas]
    frames = np.stack([centred(*each) for each in zip(clip, centroids, scales, strict=True)])
    errors = ((frames[:, None] - first[None]) ** 2).mean(-1) / max(1.0, (first**2).mean())
    return errors - errors.min(1, keepdims=True)


class Track(NamedTuple):
    """What is measured of a clip: centroids (F, 2) and areas (F,) in pixels, and `turning_errors` (F, angles)."""

    centroids: np.ndarray
    areas: np.ndarray
    turning: np.ndarray


def track(clip: Clip) -> Track:
    centroids, areas = zip(*map(moments, clip), strict=True)
    return Track(np.stack(centroids), np.array(areas), turning_errors(clip, centroids, areas))


def misfit(found: Track, motion: Callable[[float], Pose]) -> float:
    """How far a clip is from a motion of its own first frame, the mean over frames; 0 fits perfectly."""
    poses = [motion(u) for u in np.linspace(0, 1, len(found.areas))]
    return float(np.mean([frame_misfit(found, number, pose) for number, pose in enumerate(poses)]))


def frame_misfit(found: Track, number: int, pose: Pose) -> float:
    cos, sin = math.cos(math.radians(pose.angle)), math.sin(math.radians(pose.angle))
    expected = pose.scale * np.array([[cos, -sin], [sin, cos]]) @ found.centroids[0] + (pose.x, pose.y)
    moved = np.linalg.norm(found.centroids[number] - expected) / CENTROID
    grown = math.log(found.areas[number] / found.areas[0] / pose.scale**2) / LOG_AREA
    return moved**2 + grown**2 + float(np.interp(pose.angle, ANGLES, found.turning[number])) / TURNED


def classify(clip: Clip) -> str:
    """The motion, or "stands still", that a clip is nearest to."""
    found = track(clip)
    return min(ALL_MOTIONS, key=lambda name: misfit(found, ALL_MOTIONS[name]))


# Sampling -------------------------------------------------------------------------------------------------------------


def pipeline(model: Path = MODEL) -> WanPipeline:
    parts = {name: ModelConfig(path=str(model / folder)) for name, folder in PARTS.items()}
    pipe = WanPipeline.from_components(
        **parts, torch_dtype="float32", takes_input_image=True, max_sequence_length=24, sigma_shift=3.0
    )
    pipe.load_models()
    pipe.progress_bar = iter
    return pipe


def stills(concepts: Sequence[tuple[str, str]]) -> list[Image.Image]:
    return [frame(read_image(slug), Pose()) for slug, _ in concepts]


def sample(pipe: WanPipeline, prompts: Sequence[str], first: Clip | None = None) -> list[list[Image.Image]]:
    """Sample a clip for each prompt, from seeds 0, 1, …, after the given first frames."""
    given = [{"input_image": image} for image in first] if first else [{}] * len(prompts)
    requests = [{"prompt": p, "seed": n, **g} for n, (p, g) in enumerate(zip(prompts, given, strict=True))]
    return pipe.generate([OPTIONS | request for request in requests])


def psnr(a: Image.Image, b: Image.Image) -> float:
    """Peak signal-to-noise ratio of two images in dB."""
    difference = np.asarray(a, float) - np.asarray(b, float)
    return float(-10 * np.log10((difference**2).mean() / 255**2 + 1e-10))


def concepts_for(motion: str) -> list[tuple[str, str]]:
    """(slug, name) of the held-out concepts whose clips show a motion."""
    return [(slug, name) for slug, name in moving_concepts("held_out") if can_show(motion, read_image(slug))]


def measure(pipe: WanPipeline, motions: Sequence[str]) -> tuple[list[dict], dict[str, Clip]]:
    """A row of figures by motion, and a clip of each, by its prompt."""
    rows, shown = [], {}
    for number, motion in enumerate(motions):
        concepts = concepts_for(motion)[number % EVERY :: EVERY]
        prompts, first = [f"a color emoji of {name} {motion}" for _, name in concepts], stills(concepts)
        from_text, from_image = sample(pipe, prompts), sample(pipe, prompts, first)
        rows.append(
            {
                "motion": motion,
                "from text": accuracy(from_text, motion),
                "from text and image": accuracy(from_image, motion),
                "first frame, dB": round(np.mean([psnr(c[0], f) for c, f in zip(from_image, first, strict=True)]), 1),
            }
        )
        shown |= {f"text: {prompts[0]}": from_text[0], f"image: {prompts[0]}": from_image[0]}
    return rows, shown


def accuracy(clips: Sequence[Clip], motion: str) -> float:
    return round(float(np.mean([classify(clip) == motion for clip in clips])), 2)


# Pictures -------------------------------------------------------------------------------------------------------------


def save_pictures(clips: Mapping[str, Clip], name: str) -> None:
    """Save film strips as PNG, one below the other, and all clips side by side as an animation."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    strips = [beside([clip[number] for number in SHOWN]) for clip in clips.values()]
    save_png(stack(strips).quantize(128), PICTURES / f"{name}.png")
    frames = [beside([clip[number] for clip in clips.values()]).quantize(128) for number in range(NUM_FRAMES)]
    with replacing(PICTURES / f"{name}.gif") as partial:
        options = {"append_images": frames[1:], "duration": 1000 // FRAME_RATE, "loop": 0}
        frames[0].save(partial, "GIF", save_all=True, **options)


def report(pipe: WanPipeline, motions: Sequence[str], name: str) -> None:
    rows, clips = measure(pipe, motions)
    for row in rows:
        print(json.dumps({"weights": name, **row}), flush=True)
    save_pictures(clips, name)


def main() -> None:
    pipe = pipeline()
    report(pipe, list(MOTIONS), "base")
    report(pipe, list(NEW_MOTIONS), "base_new")
    for file in sys.argv[1:]:
        pipe.load_lora(pipe.dit, file)
    if sys.argv[1:]:
        report(pipe, list(NEW_MOTIONS), "lora_new")


if __name__ == "__main__":
    keep_console()
    main()
