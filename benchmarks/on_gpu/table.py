"""The results of the GPU benchmark: JSON lines as they come, and a Markdown table of them."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from diffsynth.core.files import write_text

# Dense bf16 operations a second, by what the card's name contains: the makers' data sheets.
PEAKS = {
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "4090": 165e12,
    "5090": 210e12,
    "L40S": 362e12,
    "B200": 2250e12,
}

GIB = 2**30
COLUMNS = {
    "s/step": lambda r: f"{r['seconds']:.3f}",
    "slowest": lambda r: f"{r['slowest']:.2f}",
    "first": lambda r: f"{r['first']:.1f}",
    "allocated, GiB": lambda r: f"{r['allocated'] / GIB:.2f}",
    "reserved": lambda r: f"{r['reserved'] / GIB:.2f}",
    "planned tensors": lambda r: f"{r['planned_tensors'] / GIB:.2f}",
    "planned": lambda r: f"{r['planned'] / GIB:.2f}",
    "image tokens/s": lambda r: f"{r['tokens_per_second']:.0f}",
    "TFLOP/s": lambda r: f"{r['flops'] * r['samples'] / r['seconds'] / 1e12:.0f}",
    "MFU": lambda r: f"{r['flops'] * r['samples'] / r['seconds'] / peak_of(r['device']):.0%}",
    "idle": lambda r: f"{r['idle']:.0%}",
    "copies hidden": lambda r: f"{r['hidden']:.0%}",
    "kernels": lambda r: f"{r['kernels']:.0f}",
    "waits": lambda r: f"{r['waits']:.0f}",
    "loss": lambda r: f"{r['loss']:.3f}",
    "epochs, s/step": lambda r: f"{r['first_epoch']:.3f}, {r['second_epoch']:.3f}",
}


def append(file: Path, result: Mapping[str, Any]) -> None:
    """Append one result as a JSON line."""
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(result) + "\n")
        lines.flush()


def read(file: Path) -> dict[str, dict[str, Any]]:
    """The newest result of each row, by name."""
    if not file.exists():
        return {}
    results = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    return {result["row"]: result for result in results}


def peak_of(device: str) -> float:
    """Peak operations a second of a card.

    Raises:
        IndexError: It is not listed.
    """
    return [peak for name, peak in PEAKS.items() if name in device][0]


def table(results: Iterable[Mapping[str, Any]]) -> str:
    """A Markdown table of the results; a row that failed shows its message."""
    header = ["row", *COLUMNS]
    lines = [header, ["---"] * len(header), *map(_cells, results)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _cells(result: Mapping[str, Any]) -> list[str]:
    if "error" in result:
        return [result["row"], result["error"].replace("|", "/"), *[""] * (len(COLUMNS) - 1)]
    return [result["row"], *(_cell(form, result) for form in COLUMNS.values())]


def _cell(form: Any, result: Mapping[str, Any]) -> str:
    try:
        return form(result)
    except (KeyError, TypeError, IndexError):  # not measured on this device, or of an unlisted card
        return ""


def write(folder: Path) -> str:
    """Write `table.md` from the folder's `rows.jsonl`, and return it."""
    written = table(read(folder / "rows.jsonl").values())
    write_text(folder / "table.md", written)
    return written
