"""Write an HTML report of a run from the files in its folder: `python -m diffsynth.report outputs/<run>`."""

import base64
import io
import logging
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import Any

import yaml

from ..core.files import write_text
from ..core.json_text import read_json, read_lines, to_json
from ..core.masking import masked
from ..core.process.console import keep_console
from ..core.process.library_warnings import drop_needless_warnings
from ..core.regular import require_regular

logger = logging.getLogger(__name__)

PAGE = Path(__file__).with_name("page.html")
WEBP_URL = "data:image/webp;base64,"
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


@contextmanager
def explained() -> Iterator[None]:
    """Inside, a folder that is no run's, or a damaged file in it, exits with an error of one line."""
    keep_console()
    drop_needless_warnings()
    try:
        yield
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def write_report(run_dir: str | Path, finished: Mapping[str, Any] | None = None) -> Path:
    """Write `report.html` into a run's folder, as one file without dependencies, and return its path.

    Args:
        run_dir: Folder of the run.
        finished: What finished.json is about to say; None reads that file, which an unfinished run does not have.

    Raises:
        ValueError: The folder is not the folder of a run.
    """
    run_dir = Path(run_dir)
    settings = read_config(run_dir)
    config = masked((run_dir / "resolved.yaml").read_text(encoding="utf-8", errors="replace"))
    data = {"charts": charts(run_dir), "pictures": pictures(run_dir)}
    parts = {
        "title": escape(run_dir.name),
        "facts": _table(facts(run_dir, settings, finished or read_json(run_dir / "finished.json"))),
        "warnings": "".join(f"<li>{escape(masked(line))}</li>" for line in warnings(run_dir)),
        "data_report": contact_sheet(run_dir),
        "config": escape(config),
        "data": to_json(data).replace("</", "<\\/"),
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
    for line in read_metrics(run_dir):
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
    """The validation images of a run, `{step, source}` for each validation; `source` is a data URL.

    Where videos were sampled, it is the animation of them.
    """
    files = sorted((run_dir / "samples").glob("*step-*.png"), key=lambda file: file.stem.rpartition("-")[2])
    sources = [(int(file.stem.rpartition("-")[2]), embed_newest(file)) for file in files]
    return [{"step": step, "source": source} for step, source in sources if source]


def contact_sheet(run_dir: Path) -> str:
    """The image of the data report as an HTML `img`; empty text if there is none."""
    path = run_dir / "data_report.png"
    source = embed(path) if path.exists() else ""
    return source and f'<img src="{source}" alt="the first samples">'


def facts(run_dir: Path, config: dict, finished: Mapping[str, Any]) -> dict[str, str]:
    """A summary of the run, by the titles of its lines; `finished` is empty if the run is not."""
    environment = read_json(run_dir / "environment.json")
    skipped, bad = len(read_lines(run_dir / "skipped.jsonl")), len(read_lines(run_dir / "bad_steps.jsonl"))
    packages = {name: value for name, value in environment.items() if name not in ("commit", "diff", "python")}
    return {
        "state": "finished" if finished else "not finished",
        "command": " ".join(map(str, read_json(run_dir / "command.json", list))),
        "model": (config.get("model") or {}).get("_target_", ""),
        "data set": (config.get("dataset") or {}).get("path", ""),
        "samples": data_report_lines(read_json(run_dir / "data_report.json")),
        "skipped rows": str(skipped),
        "skipped steps": str(bad),
        "commit": environment.get("commit") or "unknown",
        "packages": ", ".join(f"{name} {version}" for name, version in packages.items()),
        "files": ", ".join(map(str, finished.get("artefacts") or ())),
    }


def data_report_lines(data_report: dict) -> str:
    """A summary of `data_report.json` in one line; empty text if there is no data report."""
    if not data_report.keys() >= {"sizes", "enlarged", "caption_cut_off", "also_in_validation"}:
        return ""
    sizes = ", ".join(f"{count} of {size}" for size, count in data_report["sizes"].items())
    counts = {"enlarged": data_report["enlarged"], "captions cut off": data_report["caption_cut_off"]}
    counts |= {f"also in {name}": pairs for name, pairs in data_report["also_in_validation"].items()}
    return "; ".join([sizes, *(f"{len(found)} {name}" for name, found in counts.items() if found)])


def warnings(run_dir: Path) -> list[str]:
    """The warnings and errors in the run's log."""
    return [line for line in read_log(run_dir).splitlines() if "WARNING" in line or "ERROR" in line]


def read_log(run_dir: Path) -> str:
    """The text of the run's log; empty if it has none."""
    log = run_dir / "train.log"
    if not log.exists():
        return ""
    require_regular(log)
    return log.read_text(encoding="utf-8", errors="replace")


def embed_newest(picture: Path) -> str:
    """A validation's picture, or the animation beside it, as a data URL."""
    animation = picture.with_suffix(".webp")
    if not animation.exists():
        return embed(picture)
    require_regular(animation)
    return WEBP_URL + base64.b64encode(animation.read_bytes()).decode()


def embed(path: Path) -> str:
    """An image file as a data URL for the source of an `img`, reduced to `PICTURE_WIDTH`.

    A file that cannot be read is left out with a warning; its URL is empty.
    """
    from ..core.data.operators.picture_files import read_image  # it imports torch, which other reports do without

    try:
        picture = read_image(str(path))
    except Exception as error:  # Pillow's decoders raise exceptions of many types
        logger.warning("%s is left out of the report: %s", path, error)
        return ""
    picture.thumbnail((PICTURE_WIDTH, picture.height))
    stream = io.BytesIO()
    picture.save(stream, format="WEBP", quality=85)
    return WEBP_URL + base64.b64encode(stream.getvalue()).decode()


def _table(rows: dict[str, str]) -> str:
    shown = {title: masked(text) for title, text in rows.items() if text}
    return "".join(f"<tr><th>{escape(title)}</th><td>{escape(text)}</td></tr>" for title, text in shown.items())


def read_metrics(run_dir: Path) -> list[dict]:
    """The lines of a run's metrics; each has a `step`, and None in the place of numbers that are not finite."""
    return [line for line in read_lines(run_dir / "metrics.jsonl") if isinstance(line.get("step"), int)]


def read_config(run_dir: Path) -> dict:
    """The run's resolved configuration.

    Raises:
        ValueError: The folder is not the folder of a run, or the file is damaged.
    """
    path = run_dir / "resolved.yaml"
    if not path.exists():
        raise ValueError(f"{run_dir} is not the folder of a run: it has no resolved.yaml; expected outputs/<run>.")
    require_regular(path)
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8", errors="replace"))
    except (yaml.YAMLError, RecursionError) as error:
        config = error
    if not isinstance(config, dict):
        raise ValueError(f"{path} is no configuration; the run's command, typed again, writes it anew.")
    return config
