"""Four-step students of the embedded model by every method: how near each comes to its teacher, in how much time.

    python benchmarks/distillation.py [direct dmd2 …] [--output outputs/students] [--picture docs/distillation.png]

Each method is `distill.py experiment=emoji_distill/<method>` on one core, after its teacher has drawn. The distance is
the mean squared difference of final latents on 120 drawings of 60 prompts that were not trained on, from equal noise;
the base at as many steps is measured in the same run. CPU time is that of the whole command, which looks at the student
at its start and end, less the drawing of the teacher's pictures.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

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
    """Distances that a run logged, its folder, and its CPU seconds."""
    cpu_seconds(command(method, f"{output}/drawing", "max_steps=1", "validation.few_steps=null"))
    seconds = cpu_seconds(command(method, output))
    (folder,) = (ROOT / output).glob(f"{method}-*")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    first, last = ([line for line in lines if "student_distance" in line][place] for place in (0, -1))
    return {**first, **last, "folder": folder, "seconds": seconds}


def picture(found: dict[str, dict], path: str) -> None:
    """The teacher, the base and every student, a row each."""
    from PIL import Image

    from diffsynth.core.pictures import stack

    folders = [run["folder"] / "samples" for run in found.values()]
    looks = [Image.open(max(folder.glob("few_steps_step-*.png"))) for folder in folders]
    height = (looks[0].height - CAPTION_LINE) // 3  # of a row; the teacher's captions have a line more
    students = [look.crop((0, look.height - height, *look.size)) for look in looks]
    above = looks[0].crop((0, 0, looks[0].width, looks[0].height - height))
    stack([above, *students]).convert("P", palette=Image.Palette.ADAPTIVE).save(path, optimize=True)


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
    main()
