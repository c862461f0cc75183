"""What differs between two runs: `python -m diffsynth.report.compare outputs/<run> outputs/<other>`."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import yaml

from . import read_json, read_lines

UNTOLD = ("run_dir",)  # follow from the rest
TIMES = ("samples_per_second", "memory_gb")


def compare(first: str | Path, second: str | Path) -> list[str]:
    """One line for each difference in configuration, data, code and curves; none for two equal runs."""
    runs = [Path(first), Path(second)]
    for run in runs:
        if not (run / "resolved.yaml").exists():
            raise ValueError(f"{run} is not the folder of a run: it has no resolved.yaml.")
    return [*_configs(*runs), *_data(*runs), *_code(*runs), *_curves(*runs)]


def _configs(*runs: Path) -> Iterator[str]:
    sides = [dict(_flat(yaml.safe_load((run / "resolved.yaml").read_text(encoding="utf-8")))) for run in runs]
    folders = [str(side["run_dir"]) for side in sides]
    for key in sorted(sides[0].keys() | sides[1].keys()):
        here, there = (str(side.get(key, "absent")) for side in sides)
        if key not in UNTOLD and here.replace(folders[0], "") != there.replace(folders[1], ""):
            yield f"config   {key}: {here} | {there}"


def _flat(tree, path: str = "") -> Iterator[tuple[str, object]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else None
    if not items:
        yield path, tree
        return
    for key, value in items:
        yield from _flat(value, f"{path}.{key}".lstrip("."))


def _data(*runs: Path) -> Iterator[str]:
    here, there = (read_json(run / "data.json") for run in runs)
    for key in here.keys() & there.keys():
        if here[key] != there[key]:
            yield f"data     {key}: {here[key]} | {there[key]}"


def _code(*runs: Path) -> Iterator[str]:
    here, there = (read_json(run / "environment.json") for run in runs)
    for key in [key for key in here if here[key] != there.get(key)]:
        shown = "uncommitted changes differ" if key == "diff" else f"{here[key]} | {there.get(key)}"
        yield f"code     {key}: {shown}"


def _curves(*runs: Path) -> Iterator[str]:
    here, there = ({line["step"]: line for line in read_lines(run / "metrics.jsonl")} for run in runs)
    names = {name for side in (here, there) for line in side.values() for name in line} - {"step", *TIMES}
    for name in sorted(names):
        points = [{step: line[name] for step, line in side.items() if name in line} for side in (here, there)]
        differing = [step for step in sorted(points[0].keys() | points[1].keys()) if not _same(points, step)]
        if differing:
            last = [f"{list(side.values())[-1]:.6g}" if side else "absent" for side in points]
            yield f"curve    {name}: from step {differing[0]} on; at the end {last[0]} | {last[1]}"


def _same(points: list[dict], step: int) -> bool:
    return json.dumps(points[0].get(step)) == json.dumps(points[1].get(step))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    print("\n".join(compare(*sys.argv[1:])) or "no difference")
