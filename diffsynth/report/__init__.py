"""Write an HTML report of a run from the files in its folder: `python -m diffsynth.report outputs/<run>`."""

import base64
import io
import json
from collections import defaultdict
from html import escape
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from ..core.files import write_text
from ..core.masking import masked

PAGE = Path(__file__).with_name("page.html")
PICTURE_WIDTH = 1600  # pixels; wider images are reduced, to keep the page small; a guess
# Charts of the page, in order, and which metrics each shows.
PANELS = {
    "Loss": lambda name: name == "loss" or name.endswith("_loss"),
    "Loss in each quarter of the timesteps": lambda name: "_loss_band" in name,
    "Standard error of the loss": lambda name: name.endswith("_loss_error"),
    "Retrieval": lambda name: name.endswith("_retrieval"),
    "CLIP score": lambda name: name.endswith("_clip_score"),
    "Fréchet distance": lambda name: name.endswith("_frechet_distance"),
    "LPIPS": lambda name: name.endswith("_lpips"),
    "Learning rate": lambda name: name == "lr",
    "Gradient norm": lambda name: name == "grad_norm",
    "Samples per second": lambda name: name == "samples_per_second",
    "Memory, GB": lambda name: name == "memory_gb",
    "Skipped steps": lambda name: name == "skipped_steps",
}


def write_report(run_dir: str | Path) -> Path:
    """Write `report.html` into a run's folder, as one file without dependencies, and return its path.

    Raises:
        ValueError: The folder is not the folder of a run.
    """
    run_dir = Path(run_dir)
    if not (run_dir / "resolved.yaml").exists():
        raise ValueError(f"{run_dir} is not the folder of a run: it has no resolved.yaml; expected outputs/<run>.")
    config = masked((run_dir / "resolved.yaml").read_text(encoding="utf-8"))
    data = {"charts": charts(run_dir), "pictures": pictures(run_dir)}
    parts = {
        "title": escape(run_dir.name),
        "facts": _table(facts(run_dir, yaml.safe_load(config))),
        "warnings": "".join(f"<li>{escape(masked(line))}</li>" for line in warnings(run_dir)),
        "data_report": contact_sheet(run_dir),
        "config": escape(config),
        "data": json.dumps(data).replace("</", "<\\/"),
    }
    page = PAGE.read_text(encoding="utf-8")
    for name, part in parts.items():
        page = page.replace(f"<!-- {name} -->", part)
    write_text(run_dir / "report.html", page)
    return run_dir / "report.html"


def charts(run_dir: Path) -> list[dict]:
    """The charts of a run's metrics: `{title, series: {name: [[step, value], …]}}`.

    A metric that no panel shows gets a chart of its own.
    """
    series = defaultdict(list)
    for line in read_lines(run_dir / "metrics.jsonl"):
        for name, value in line.items():
            if name != "step":
                series[name].append([line["step"], value])
    found = defaultdict(dict)
    for name, points in series.items():
        title = next((title for title, shows in PANELS.items() if shows(name)), name)
        found[title][name] = points
    order = [*PANELS, *sorted(found)]
    return [{"title": title, "series": found.pop(title)} for title in order if title in found]


def pictures(run_dir: Path) -> list[dict]:
    """The validation images of a run, `{step, source}` for each validation; `source` is a data URL."""
    files = sorted((run_dir / "samples").glob("*step-*.png"), key=lambda file: file.stem.rpartition("-")[2])
    return [{"step": int(file.stem.rpartition("-")[2]), "source": embed(file)} for file in files]


def contact_sheet(run_dir: Path) -> str:
    """The image of the data report as an HTML `img`; empty text if there is none."""
    path = run_dir / "data_report.png"
    return f'<img src="{embed(path)}" alt="the first samples">' if path.exists() else ""


def facts(run_dir: Path, config: dict) -> dict[str, str]:
    """A summary of the run, by the titles of its lines."""
    environment = read_json(run_dir / "environment.json")
    skipped, bad = len(read_lines(run_dir / "skipped.jsonl")), len(read_lines(run_dir / "bad_steps.jsonl"))
    finished = read_json(run_dir / "finished.json")
    packages = {name: value for name, value in environment.items() if name not in ("commit", "diff", "python")}
    return {
        "state": "finished" if finished else "not finished",
        "command": " ".join(read_json(run_dir / "command.json") or []),
        "model": (config.get("model") or {}).get("_target_", ""),
        "data set": (config.get("dataset") or {}).get("path", ""),
        "samples": data_report_lines(read_json(run_dir / "data_report.json")),
        "skipped rows": str(skipped),
        "skipped steps": str(bad),
        "commit": environment.get("commit") or "unknown",
        "packages": ", ".join(f"{name} {version}" for name, version in packages.items()),
        "files": ", ".join(finished.get("artefacts", [])),
    }


def data_report_lines(data_report: dict) -> str:
    """A summary of `data_report.json` in one line; empty text if there is no data report."""
    if not data_report:
        return ""
    sizes = ", ".join(f"{count} of {size}" for size, count in data_report["sizes"].items())
    counts = {"enlarged": data_report["enlarged"], "captions cut off": data_report["caption_cut_off"]}
    counts |= {f"also in {name}": pairs for name, pairs in data_report["also_in_validation"].items()}
    return "; ".join([sizes, *(f"{len(found)} {name}" for name, found in counts.items() if found)])


def warnings(run_dir: Path) -> list[str]:
    """The warnings and errors in the run's log."""
    log = run_dir / "train.log"
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    return [line for line in lines if "WARNING" in line or "ERROR" in line]


def embed(path: Path) -> str:
    """An image file as a data URL for the source of an `img`, reduced to `PICTURE_WIDTH`."""
    picture = Image.open(path).convert("RGB")
    picture.thumbnail((PICTURE_WIDTH, picture.height))
    stream = io.BytesIO()
    picture.save(stream, format="WEBP", quality=85)
    return "data:image/webp;base64," + base64.b64encode(stream.getvalue()).decode()


def _table(rows: dict[str, str]) -> str:
    shown = {title: masked(text) for title, text in rows.items() if text}
    return "".join(f"<tr><th>{escape(title)}</th><td>{escape(text)}</td></tr>" for title, text in shown.items())


def read_lines(path: Path) -> list[dict]:
    """The objects of a JSON lines file; none if the file does not exist."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def read_json(path: Path) -> Any:
    """The content of a JSON file; an empty dict if the file does not exist."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
