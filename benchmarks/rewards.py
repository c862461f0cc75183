"""Trains the embedded model on rewards and prints what they are on held-out prompts, before and after.

    python benchmarks/rewards.py [reward=colour task=reward/awm …]

Three seeds each; further arguments are those of reward.py. Without arguments the rewards are `jpeg_size` and `colour`.
`text_match`, which is not trained for, tells whether the pictures still show their prompts. A seed takes minutes on
one core.
"""

import json
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev

sys.path.insert(0, str(Path(__file__).parents[1]))
from diffsynth.core.process.console import keep_console

ROOT = Path(__file__).resolve().parents[1]
OUTPUTS = ROOT / "outputs" / "rewards"
SEEDS = (0, 1, 2)
REWARDS = ("jpeg_size", "colour")


def trained(*arguments: str) -> list[dict]:
    """The metrics of a run of reward.py; one that is finished already is not run again."""
    folder = OUTPUTS / "-".join(arguments).replace("/", ".").replace("=", "_")
    command = [sys.executable, "reward.py", *arguments, f"run_dir={folder}"]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]


def ends(lines: list[dict], name: str) -> tuple[float, float, float]:
    """A metric before and after the training, and the standard error of the first over prompts."""
    values = [line for line in lines if name in line]
    return values[0][name], values[-1][name], values[0][f"{name}_error"]


def main(arguments: list[str]) -> None:
    chosen = [argument.removeprefix("reward=") for argument in arguments if argument.startswith("reward=")]
    others = [argument for argument in arguments if not argument.startswith("reward=")]
    print("| reward | before | after | text_match before | after |\n|---|---|---|---|---|")
    for reward in chosen or REWARDS:
        runs = [trained(f"reward={reward}", f"seed={seed}", *others) for seed in SEEDS]
        cells = []
        for name in (f"held_out_{reward}", "evaluation_text_match"):
            before, after, errors = zip(*(ends(lines, name) for lines in runs), strict=True)
            spread = stdev(after) / len(SEEDS) ** 0.5
            cells += [f"{mean(before):.3f} ± {mean(errors):.3f}", f"{mean(after):.3f} ± {spread:.3f}"]
        print(f"| `{reward}` | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    keep_console()
    main(sys.argv[1:])
