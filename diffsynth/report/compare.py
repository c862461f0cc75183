"""List the differences between two runs: `python -m diffsynth.report.compare outputs/<run> outputs/<other>`."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..core.json_text import read_json
from ..core.masking import masked
from . import explained, read_config, read_metrics

DERIVED = ("run_dir",)  # settings that follow from the others
MACHINE = ("samples_per_second", "memory_gb")  # metrics that also differ between equal runs


def compare(first: str | Path, second: str | Path) -> list[str]:
    """One line for each difference in configuration, data, code and curves; none for equal runs.

    Raises:
        ValueError: A folder is not the folder of a run.
    """
    runs = [Path(first), Path(second)]
    return [masked(line) for find in (_configs, _data, _code, _curves) for line in find(*runs)]


def _configs(*runs: Path) -> Iterator[str]:
    settings = [dict(_flat(read_config(run))) for run in runs]
    folders = [str(each["run_dir"]) for each in settings]
    for key in sorted(settings[0].keys() | settings[1].keys()):
        here, there = (str(each.get(key, "absent")) for each in settings)
        if key not in DERIVED and here.replace(folders[0], "") != there.replace(folders[1], ""):
            yield f"config   {key}: {here} | {there}"


def _flat(tree: Any, path: str = "") -> Iterator[tuple[str, object]]:
    """(dotted key, value) of all leaves of nested dicts and lists."""
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
    by_step = [{line["step"]: line for line in read_metrics(run)} for run in runs]
    names = {name for lines in by_step for line in lines.values() for name in line} - {"step", *MACHINE}
    for name in sorted(names):
        here, there = ({step: line[name] for step, line in lines.items() if name in line} for lines in by_step)
        differing = [step for step in here.keys() | there.keys() if not _equal(here.get(step), there.get(step))]
        if differing:
            yield f"curve    {name}: from step {min(differing)} on; at the end {_last(here)} | {_last(there)}"


def _equal(first: Any, second: Any) -> bool:
    return json.dumps(first) == json.dumps(second)  # as text, because NaN is not equal to itself


def _last(curve: dict[int, float]) -> str:
    if not curve:
        return "absent"
    last = list(curve.values())[-1]
    return "not finite" if last is None else f"{last:.6g}"


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    with explained():
        print("\n".join(compare(*sys.argv[1:])) or "no difference")
