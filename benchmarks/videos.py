"""Clips per second that are decoded, here and by DiffSynth-Studio's loader.

    python benchmarks/videos.py [--original FOLDER]

FOLDER holds the package: `pip install --target FOLDER --no-deps diffsynth==2.1.12 imageio imageio-ffmpeg`. Without it
the project's own figures are printed alone. Both loaders read the same film, which the script makes, in turns, without
resizing; torchvision, which the original imports to resize, need not be there. Ratios are of medians.
"""

import argparse
import importlib.util
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import av
import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
from diffsynth.core.data.videos.load_clip import LoadClip
from diffsynth.core.process.console import keep_console

FRAMES, RATE = 240, 24
REPEATS = 5
SIZES = [(64, 64), (480, 832)]  # height, width
CLIPS = [17, 81]  # frames


def write_film(path: Path, height: int, width: int) -> None:
    """A film of noise that moves, so that every frame differs from the one before."""
    wide = np.random.default_rng(0).integers(0, 256, (height // 8, width // 8 + FRAMES, 3), dtype=np.uint8)
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=RATE, options={"g": "48"})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for number in range(FRAMES):
            part = Image.fromarray(wide[:, number : number + width // 8]).resize((width, height))
            file.mux(stream.encode(av.VideoFrame.from_image(part)))
        file.mux(stream.encode())


def original_loader(folder: Path) -> type:
    """DiffSynth-Studio's LoadVideo."""
    sys.path.append(str(folder))
    if importlib.util.find_spec("torchvision") is None:
        sys.modules["torchvision"] = ModuleType("torchvision")
    if importlib.util.find_spec("einops") is None:
        sys.modules["einops"] = ModuleType("einops")
        sys.modules["einops"].repeat = None
    spec = importlib.util.spec_from_file_location("operators", folder / "diffsynth/core/data/operators.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.LoadVideo


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def ways(film: Path, count: int, original: type | None) -> dict[str, Callable[[], list]]:
    """Functions that load the clip, by name."""
    ours, middle = LoadClip(str(film.parent)), (FRAMES - count) // 2
    found = {
        "ours, first frames": lambda: ours.load(film.name, 0, count, lambda frame: frame),
        "ours, from the middle": lambda: ours.load(film.name, middle, count, lambda frame: frame),
    }
    if original is not None:
        found["original, first frames"] = lambda: original(num_frames=count)(str(film))
    return found


def decoding(folder: Path, original: type | None) -> list[dict]:
    rows = []
    for height, width in SIZES:
        film = folder / f"{height}.mp4"
        write_film(film, height, width)
        for count in CLIPS:
            loaders = ways(film, count, original)
            for load in loaders.values():
                assert len(load()) == count
            taken = {name: [] for name in loaders}
            for _ in range(REPEATS):
                for name, load in loaders.items():
                    taken[name].append(seconds(load))
            medians = {name: statistics.median(times) for name, times in taken.items()}
            row = {"size": f"{height} x {width}", "frames": count}
            row |= {f"{name}, clips/s": round(1 / median, 2) for name, median in medians.items()}
            if original is not None:
                row["ratio"] = round(medians["original, first frames"] / medians["ours, first frames"], 2)
            rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--original", type=Path)
    folder = parser.parse_args().original
    original = original_loader(folder) if folder else None
    with tempfile.TemporaryDirectory() as work:
        for row in decoding(Path(work), original):
            print(json.dumps(row))


if __name__ == "__main__":
    keep_console()
    main()
