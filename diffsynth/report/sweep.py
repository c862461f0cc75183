"""What the runs of a sweep came to, side by side: `python -m diffsynth.report.sweep outputs/<name>-sweep-<signature>`.

Of any other folder, all the runs in it.
"""

import json
import re
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from html import escape
from pathlib import Path

from ..core.files import write_text
from . import PAGE, embed, read_json, read_lines

MEASURE = "held_out_loss"  # the run where it was lowest is the best
NUMBERS = ("loss", MEASURE, "at step", "minutes", "memory_gb")
LOGGED = re.compile(r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),\d+ (\w+) (.*)$", re.MULTILINE)
BODY = """<body><h1>{title}</h1>
<div class="wide"><table>{table}</table></div>
<p>held_out_loss is the lowest, reached at that step; minutes from the first line of the log to the last.</p>
<h2>What each drew last</h2>
<p>The same prompts from the same noise.</p>
<div class="wide"><table>{pictures}</table></div>
</body></html>"""


def write_sweep(folder: str | Path) -> Path:
    """Write `sweep.html`, which needs no other file, and `sweep.json` with its numbers; return the page's path.

    Raises:
        ValueError: There are no runs.
    """
    folder = Path(folder)
    runs = read_runs(folder)
    if not runs:
        raise ValueError(f"{folder} is neither the folder of a sweep nor one of runs.")
    rows = [about(run, overrides) for run, overrides in runs.items()]
    mark_best(rows)
    write_text(folder / "sweep.json", json.dumps(rows, indent=1))
    head = PAGE.read_text(encoding="utf-8").partition("<body>")[0].replace("<!-- title -->", escape(folder.name))
    grid = "".join(map(picture_row, runs, rows))
    write_text(folder / "sweep.html", head + BODY.format(title=escape(folder.name), table=table(rows), pictures=grid))
    return folder / "sweep.html"


def read_runs(folder: Path) -> dict[Path, list[str]]:
    """The folders of the runs, with what each was asked for."""
    records = sorted(folder.glob("[0-9]*.json"), key=lambda path: int(path.stem))
    if records:
        noted = map(read_json, records)
        return {(folder / each["run"]).resolve(): each["overrides"] for each in noted}
    return {path.parent: read_json(path.parent / "command.json")[1:] for path in sorted(folder.glob("*/resolved.yaml"))}


def about(run: Path, overrides: Sequence[str]) -> dict:
    """One run's row: what it was asked for, how far it is, and what it measured."""
    lines = read_lines(run / "metrics.jsonl")
    found = {name: [(line[name], line["step"]) for line in lines if name in line] for name in ("loss", MEASURE)}
    lowest, step = min(found[MEASURE], default=(None, None))
    values = (
        found["loss"][-1][0] if found["loss"] else None,
        lowest,
        step,
        minutes(run),
        max((line["memory_gb"] for line in lines if "memory_gb" in line), default=None),
    )
    asked = dict(override.partition("=")[::2] for override in overrides if "=" in override)
    return {"run": run.name, "asked": asked, "state": state(run, lines), **dict(zip(NUMBERS, values, strict=True))}


def state(run: Path, lines: Sequence[Mapping]) -> str:
    """`finished`, `failed: …`, or how far it is."""
    if (run / "finished.json").exists():
        return "finished"
    if not (run / "resolved.yaml").exists():
        return "not started"
    logged = _log(run)
    if logged and logged[-1][1] == "ERROR":
        return f"failed: {logged[-1][2]}"
    return f"not finished: {lines[-1]['step'] if lines else 0} steps"


def minutes(run: Path) -> float | None:
    logged = _log(run)
    if not logged:
        return None
    first, last = (datetime.fromisoformat(logged[at][0]) for at in (0, -1))
    return (last - first).total_seconds() / 60


def _log(run: Path) -> list[tuple[str, str, str]]:
    """Time, level and first line of every entry of the run's log."""
    log = run / "train.log"
    return LOGGED.findall(log.read_text(encoding="utf-8")) if log.exists() else []


def mark_best(rows: Sequence[dict]) -> None:
    """Say of every row whether its held-out loss is the lowest."""
    measured = [row[MEASURE] for row in rows if row[MEASURE] is not None]
    for row in rows:
        row["best"] = bool(measured) and row[MEASURE] == min(measured)


def table(rows: Sequence[Mapping]) -> str:
    """A line a run, with only those of its settings in which they differ."""
    settings = dict.fromkeys(name for row in rows for name in row["asked"])
    differing = [name for name in settings if len({row["asked"].get(name) for row in rows}) > 1]
    lines = [["", "run", *differing, "state", *NUMBERS]]
    for row in rows:
        asked = [row["asked"].get(name, "") for name in differing]
        numbers = ["" if row[name] is None else f"{row[name]:.4g}" for name in NUMBERS]
        lines.append(["★ best" if row["best"] else "", row["run"], *asked, row["state"], *numbers])
    head, *others = lines
    return _line("th", head) + "".join(_line("td", cells) for cells in others)


def picture_row(run: Path, row: Mapping) -> str:
    """The run's last look at its prompts."""
    drawn = sorted((run / "samples").glob("step-*.png"))
    if not drawn:
        return ""
    name, step = escape(row["run"]), int(drawn[-1].stem.rpartition("-")[2])
    picture = f'<img src="{embed(drawn[-1])}" alt="{name} after {step} steps">'
    return f"<tr><th>{name}<br>{'★ ' if row['best'] else ''}after {step} steps</th><td>{picture}</td></tr>"


def _line(cell: str, texts: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{cell}>{escape(text)}&emsp;</{cell}>" for text in texts) + "</tr>"


if __name__ == "__main__":
    for given in sys.argv[1:] or sys.exit(__doc__):
        print(write_sweep(given))
