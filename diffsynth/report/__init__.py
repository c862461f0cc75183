"""One page about a run, from the files in its folder: `python -m diffsynth.report outputs/<run>`."""

import base64
import io
import json
from collections import defaultdict
from html import escape
from pathlib import Path

import yaml
from PIL import Image

from ..core.files import write_text

PAGE = Path(__file__).with_name("page.html")
PICTURE_WIDTH = 1600  # wider ones are reduced
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
    "Samples a second": lambda name: name == "samples_per_second",
    "Memory, GB": lambda name: name == "memory_gb",
    "Steps left out": lambda name: name == "skipped_steps",
}


def write_report(run_dir: str | Path) -> Path:
    """Write `report.html`, which needs no other file, and return its path.

    Raises:
        ValueError: The folder is not a run's.
    """
    run_dir = Path(run_dir)
    if not (run_dir / "resolved.yaml").exists():
        raise ValueError(f"{run_dir} is not the folder of a run: it has no resolved.yaml.")
    config = (run_dir / "resolved.yaml").read_text(encoding="utf-8")
    data = {"charts": charts(run_dir), "pictures": pictures(run_dir)}
    parts = {
        "title": escape(run_dir.name),
        "facts": _table(facts(run_dir, yaml.safe_load(config))),
        "warnings": "".join(f"<li>{escape(line)}</li>" for line in warnings(run_dir)),
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
    """`{title, series: {name: [[step, value], …]}}` of every panel that has numbers; others get one of their own."""
    series = defaultdict(list)
    for line in read_lines(run_dir / "metrics.jsonl"):
        for name, value in line.items():
            if name != "step":
                series[name].append([line["step"], value])
    found = defaultdict(dict)
    for name, points in series.items():
        found[next((title for title, belongs in PANELS.items() if belongs(name)), name)][name] = points
    order = [*PANELS, *sorted(found)]
    return [{"title": title, "series": found.pop(title)} for title in order if title in found]


def pictures(run_dir: Path) -> list[dict]:
    """`{step, source}` of every look at the fixed prompts."""
    files = sorted((run_dir / "samples").glob("*step-*.png"), key=lambda file: file.stem.rpartition("-")[2])
    return [{"step": int(file.stem.rpartition("-")[2]), "source": embed(file)} for file in files]


def contact_sheet(run_dir: Path) -> str:
    """The receipt's picture, if there is one."""
    path = run_dir / "data_report.png"
    return f'<img src="{embed(path)}" alt="the first samples">' if path.exists() else ""


def facts(run_dir: Path, config: dict) -> dict[str, str]:
    """What the run was, in a few lines."""
    environment = read_json(run_dir / "environment.json")
    skipped, bad = len(read_lines(run_dir / "skipped.jsonl")), len(read_lines(run_dir / "bad_steps.jsonl"))
    finished = read_json(run_dir / "finished.json")
    return {
        "state": "finished" if finished else "not finished",
        "command": " ".join(read_json(run_dir / "command.json") or []),
        "model": (config.get("model") or {}).get("_target_", ""),
        "data set": (config.get("dataset") or {}).get("path", ""),
        "samples": data_report_lines(read_json(run_dir / "data_report.json")),
        "rows left out": str(skipped),
        "steps left out": str(bad),
        "commit": environment.get("commit") or "unknown",
        "packages": ", ".join(f"{n} {v}" for n, v in environment.items() if n not in ("commit", "diff", "python")),
        "files": ", ".join(finished.get("artefacts", [])),
    }


def data_report_lines(data_report: dict) -> str:
    """What a run's data report counts, in one line."""
    if not data_report:
        return ""
    sizes = ", ".join(f"{count} of {size}" for size, count in data_report["sizes"].items())
    counts = {"enlarged": data_report["enlarged"], "captions cut off": data_report["caption_cut_off"]}
    counts |= {f"also in {name}": pairs for name, pairs in data_report["also_in_validation"].items()}
    return "; ".join([sizes, *(f"{len(found)} {name}" for name, found in counts.items() if found)])


def warnings(run_dir: Path) -> list[str]:
    """The lines of warning in the run's log."""
    log = run_dir / "train.log"
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    return [line for line in lines if "WARNING" in line or "ERROR" in line]


def embed(path: Path) -> str:
    """A picture as the source of an `img`, reduced if it is wide."""
    picture = Image.open(path).convert("RGB")
    picture.thumbnail((PICTURE_WIDTH, picture.height))
    stream = io.BytesIO()
    picture.save(stream, format="WEBP", quality=85)
    return "data:image/webp;base64," + base64.b64encode(stream.getvalue()).decode()


def _table(rows: dict[str, str]) -> str:
    return "".join(f"<tr><th>{escape(k)}</th><td>{escape(v)}</td></tr>" for k, v in rows.items() if v)


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
