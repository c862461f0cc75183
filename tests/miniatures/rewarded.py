"""Run `reward.py` in miniature: a model with random weights, three prompts, rounds of two prompts with two samples."""

from functools import cache
from pathlib import Path

import tiny


@cache
def prompts() -> Path:
    """A folder of two files of prompts, `train.txt` and `held_out.txt`; written once per session."""
    folder = tiny.kept_folder() / "prompts"
    folder.mkdir()
    (folder / "train.txt").write_text("a red circle\na blue square of two sides\na dot\n")
    (folder / "held_out.txt").write_text("a green line\n")
    return folder


def overrides(output_root: Path) -> list[str]:
    """Overrides of a run of three rounds, each of four samples and two optimizer steps."""
    kept = [
        o for o in tiny.train_overrides(output_root) if not o.startswith(("dataset.", "data_report.", "validation"))
    ]
    sizes = {"prompts": 2, "samples": 2, "levels": 1, "batch_size": 4, "held_out_prompts": 1, "evaluate_every": 2}
    return [
        *kept,
        f"prompts.path={prompts()}/train.txt",
        f"held_out.path={prompts()}/held_out.txt",
        "reward@evaluation_reward=symmetry",
        "prompts.height=32",
        "prompts.width=32",
        "task.sampling.num_inference_steps=2",
        "batch_size=2",
        "max_steps=6",
        *(f"rounds.{name}={value}" for name, value in sizes.items()),
    ]


def reward(output_root: Path, *others: str) -> Path:
    """Run `python reward.py` in this process, and return the run's folder."""
    return tiny.run(tiny.merged(overrides(output_root), others), "reward")
