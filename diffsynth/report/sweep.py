"""Compare the runs of a sweep in one page: `python -m diffsynth.report.sweep outputs/<name>-sweep-<signature>`.

For any other folder, the page compares all runs in it.
"""

import re
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from html import escape
from pathlib import Path

from ..core.files import write_text
from ..core.json_text import read_json, to_json
from ..core.masking import masked_values
from . import PAGE, embed_newest, explained, read_log, read_metrics

MEASURE = "held_out_loss"  # the metric that decides: the run with its lowest value is the best
NUMBERS = ("loss", MEASURE, "at step", "minutes", "memory_gb")
# Time, level and message of an entry of the log.
LOGGED = re.compile(r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),\d+ (\w+) (.*)$", re.MULTILINE)
BODY = """<body><h1>{title}</h1>
<div class="wide"><table>{table}</table></div>
<p>held_out_loss is the lowest value, reached at that step; minutes are from the first line of the log to the last.</p>
<h2>Last validation images of each run</h2>
<p>All runs sample the same prompts from the same noise.</p>
<div class="wide"><table>{pictures}</table></div>
</body></html>"""


def write_sweep(folder: str | Path) -> Path:
    """Write `sweep.html`, as one file without dependencies, and its data, `sweep.json`; return the page's path.

    Raises:
        ValueError: The folder contains no runs.
    """
    folder = Path(folder)
    runs = read_runs(folder)
    if not runs:
        raise ValueError(
            f"{folder} contains no runs; expected the folder of a sweep, outputs/<name>-sweep-<signature>, or a folder "
            "of runs."
        )
    rows = [about(run, overrides) for run, overrides in runs.items()]
    mark_best(rows)
    write_text(folder / "sweep.json", to_json(rows, indent=1))
    head = PAGE.read_text(encoding="utf-8").partition("<body>")[0].replace("<!-- title -->", escape(folder.name))
    grid = "".join(map(picture_row, runs, rows))
    write_text(folder / "sweep.html", head + BODY.format(title=escape(folder.name), table=table(rows), pictures=grid))
    return folder / "sweep.html"


def read_runs(folder: Path) -> dict[Path, list[str]]:
    """The folders of the runs, each with its command line overrides."""
    records = sorted(folder.glob("[0-9]*.json"), key=lambda path: int(path.stem))
    if records:
        jobs = [job for job in map(read_json, records) if job.keys() >= {"run", "overrides"}]
        return {(folder / job["run"]).resolve(): masked_values(job["overrides"]) for job in jobs}
    runs = [path.parent for path in sorted(folder.glob("*/resolved.yaml"))]
    return {run: masked_values(read_json(run / "command.json", list)[1:]) for run in runs}


def about(run: Path, overrides: Sequence[str]) -> dict:
    """The row of a run: its overrides, its state and its `NUMBERS`."""
    lines = read_metrics(run)
    losses = [line["loss"] for line in lines if "loss" in line]
    measured = [(line[MEASURE], line["step"]) for line in lines if line.get(MEASURE) is not None]
    lowest, step = min(measured, default=(None, None))
    memory = max((line["memory_gb"] for line in lines if line.get("memory_gb") is not None), default=None)
    values = (losses[-1] if losses else None, lowest, step, minutes(run), memory)
    settings = dict(override.partition("=")[::2] for override in overrides if "=" in override)
    numbers = dict(zip(NUMBERS, values, strict=True))
    return {"run": run.name, "overrides": settings, "state": state(run, lines), **numbers}


def state(run: Path, lines: Sequence[Mapping]) -> str:
    """The state of a run: `finished`, `failed: …`, `not started`, or `not finished: … steps`."""
    if (run / "finished.json").exists():
        return "finished"
    logged = _log(run)
    if logged and logged[-1][1] == "ERROR":
        return f"failed: {logged[-1][2]}"
    if not (run / "resolved.yaml").exists():
        return "not started"
    return f"not finished: {lines[-1]['step'] if lines else 0} steps"


def minutes(run: Path) -> float | None:
    """The time in minutes from the first to the last entry of the run's log; None if there is no log."""
    logged = _log(run)
    if not logged:
        return None
    first, last = (datetime.fromisoformat(time) for time, *_ in (logged[0], logged[-1]))
    return (last - first).total_seconds() / 60


def _log(run: Path) -> list[tuple[str, str, str]]:
    """Time, level and first line of the message of every entry of the run's log."""
    return LOGGED.findall(read_log(run))


def mark_best(rows: Sequence[dict]) -> None:
    """Set `best` in every row: whether its held-out loss is the lowest."""
    measured = [row[MEASURE] for row in rows if row[MEASURE] is not None]
    for row in rows:
        row["best"] = bool(measured) and row[MEASURE] == min(measured)


def table(rows: Sequence[Mapping]) -> str:
    """An HTML table with a line per run, and a column for each setting in which the runs differ."""
    settings = dict.fromkeys(name for row in rows for name in row["overrides"])
    differing = [name for name in settings if len({row["overrides"].get(name) for row in rows}) > 1]
    lines = [["", "run", *differing, "state", *NUMBERS]]
    for row in rows:
        values = [row["overrides"].get(name, "") for name in differing]
        numbers = ["" if row[name] is None else f"{row[name]:.4g}" for name in NUMBERS]
        lines.append(["★ best" if row["best"] else "", row["run"], *values, row["state"], *numbers])
    head, *others = lines
    return _line("th", head) + "".join(_line("td", cells) for cells in others)


def picture_row(run: Path, row: Mapping) -> str:
    """An HTML table row with the last validation images of a run; empty text if none can be read."""
    files = sorted((run / "samples").glob("step-*.png"))
    if not files or not (source := embed_newest(files[-1])):
        return ""
    name, step = escape(row["run"]), int(files[-1].stem.rpartition("-")[2])
    picture = f'<img src="{source}" alt="{name} after {step} steps">'
    return f"<tr><th>{name}<br>{'★ ' if row['best'] else ''}after {step} steps</th><td>{picture}</td></tr>"


def _line(cell: str, texts: Sequence[str]) -> str:
    cells = [f"<{cell}>{escape(text)}&emsp;</{cell}>" for text in texts]
    return f"<tr>{''.join(cells)}</tr>"


if __name__ == "__main__":
    with explained():
        for argument in sys.argv[1:] or sys.exit(__doc__):
            print(write_sweep(argument))
