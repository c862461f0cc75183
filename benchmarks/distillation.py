"""Distils four-step students of the embedded model by every method, and measures their distance to the teacher.

    python benchmarks/distillation.py [direct dmd2 …] [--output outputs/students] [--picture docs/distillation.png]

Each method is `distill.py experiment=emoji_distill/<method>` on one core, after its teacher has sampled. The distance
is the mean squared difference of final latents on 120 images of 60 held-out prompts, from equal noise; the base at as
many steps is measured in the same run. CPU time is that of the whole command without sampling the teacher's images; the
command evaluates the student at its start and end.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

from diffsynth.core.process.console import keep_console

ROOT = Path(__file__).parents[1]
CAPTION_LINE = 13  # pixels
METHODS = ("direct", "trajectory", "lcm", "dmd2", "add", "hyper_sd")


def command(method: str, output: str, *overrides: str) -> list[str]:
    where = [f"output_root={output}", f"name={method}", "device=cpu"]
    return [sys.executable, "distill.py", f"experiment=emoji_distill/{method}", *where, *overrides]


def cpu_seconds(words: list[str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(words, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure(method: str, output: str) -> dict:
    """Return the distances that a run logged, its folder, and its CPU seconds."""
    cpu_seconds(command(method, f"{output}/teacher", "max_steps=1", "validation.few_steps=null"))
    seconds = cpu_seconds(command(method, output))
    (folder,) = (ROOT / output).glob(f"{method}-*")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    first, last = ([line for line in lines if "student_distance" in line][place] for place in (0, -1))
    return {**first, **last, "folder": folder, "seconds": seconds}


def picture(found: dict[str, dict], path: str) -> None:
    """Save a picture with a row each for the teacher, the base and every student."""
    from PIL import Image

    from diffsynth.core.pictures import stack

    folders = [run["folder"] / "samples" for run in found.values()]
    pictures = [Image.open(max(folder.glob("few_steps_step-*.png"))) for folder in folders]
    height = (pictures[0].height - CAPTION_LINE) // 3  # of a row; the teacher's captions have one line more
    students = [each.crop((0, each.height - height, *each.size)) for each in pictures]
    teacher_and_base = pictures[0].crop((0, 0, pictures[0].width, pictures[0].height - height))
    joined = stack([teacher_and_base, *students])
    joined.convert("P", palette=Image.Palette.ADAPTIVE).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", default=METHODS)
    parser.add_argument("--output", default="outputs/students")
    parser.add_argument("--picture")
    arguments = parser.parse_args()
    found = {}
    for method in arguments.methods:
        found[method] = run = measure(method, arguments.output)
        best = min(run["base_distance"], run["base_guided_distance"])
        print(
            f"{method:11} {run['student_distance']:.4f} ± {run['student_distance_error']:.4f}, "
            f"{1 - run['student_distance'] / best:.0%} below the base ({run['base_distance']:.4f}, guided "
            f"{run['base_guided_distance']:.4f}), {run['seconds'] / 60:.1f} CPU minutes",
            flush=True,
        )
    if arguments.picture:
        picture(found, arguments.picture)


if __name__ == "__main__":
    keep_console()
    main()
