"""The results of the GPU benchmark: JSON lines as they come, and a Markdown table of them."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from diffsynth.core.files import write_text

# Dense bf16 operations a second, from the makers' data sheets. The first name that the card's own contains counts.
# Cards of laptops have the names of desktops' and other peaks.
PEAKS = {
    "Laptop": None,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "4090": 165e12,
    "5090": 210e12,
    "L40S": 362e12,
    "B200": 2250e12,
}

GIB = 2**30


class Column(NamedTuple):
    """How a figure is printed: its key in a result, its format, and what it is divided by before."""

    key: str
    form: str
    unit: float = 1


COLUMNS = {
    "s/step": Column("seconds", "{:.3f}"),
    "slowest": Column("slowest", "{:.2f}"),
    "first": Column("first", "{:.1f}"),
    "allocated, GiB": Column("allocated", "{:.2f}", GIB),
    "reserved": Column("reserved", "{:.2f}", GIB),
    "context": Column("context", "{:.2f}", GIB),
    "planned tensors": Column("planned_tensors", "{:.2f}", GIB),
    "planned": Column("planned", "{:.2f}", GIB),
    "image tokens/s": Column("tokens_per_second", "{:.0f}"),
    "TFLOP/s": Column("flops_per_second", "{:.0f}", 1e12),
    "MFU": Column("utilisation", "{:.0%}"),
    "idle": Column("idle", "{:.0%}"),
    "copies hidden": Column("hidden", "{:.0%}"),
    "kernels": Column("kernels", "{:.0f}"),
    "waits": Column("waits", "{:.0f}"),
    "mean loss": Column("loss", "{:.3f}"),
    "first epoch, s/step": Column("first_epoch", "{:.3f}"),
    "second": Column("second_epoch", "{:.3f}"),
}


def append(file: Path, result: Mapping[str, Any]) -> None:
    """Append one result as a JSON line, also to a file whose last line was cut off by a kill."""
    is_cut_off = file.exists() and not file.read_bytes().endswith(b"\n")
    with file.open("a", encoding="utf-8") as lines:
        lines.write("\n" * is_cut_off + json.dumps(result) + "\n")


def read(file: Path) -> dict[str, dict[str, Any]]:
    """The newest result of each row, by name; lines that were cut off are left out."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    results = [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]
    return {result["row"]: result for result in results}


def peak_of(device: str) -> float | None:
    """Peak operations a second of a card; None if it is not known."""
    return next((peak for name, peak in PEAKS.items() if name in device), None)


def table(results: Iterable[Mapping[str, Any]]) -> str:
    """A Markdown table of the results; a row that failed shows its message."""
    header = ["row", *COLUMNS]
    lines = [header, ["---"] * len(header), *map(_cells, results)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _cells(result: Mapping[str, Any]) -> list[str]:
    if "error" in result:
        return [result["row"], result["error"].replace("|", "/"), *[""] * (len(COLUMNS) - 1)]
    figures = {**result, **_utilisation(result)}
    return [result["row"], *(_cell(column, figures.get(column.key)) for column in COLUMNS.values())]


def _utilisation(result: Mapping[str, Any]) -> dict[str, float | None]:
    """Operations a second, and their share of the card's peak; nothing without a plan, which counts them."""
    if "flops" not in result:
        return {}
    found, peak = result["flops"] * result["samples"] / result["seconds"], peak_of(result["device"])
    return {"flops_per_second": found, "utilisation": found / peak if peak else None}


def _cell(column: Column, value: float | None) -> str:
    return "" if value is None else column.form.format(value / column.unit)


def write(folder: Path) -> str:
    """Write `table.md` from the folder's `rows.jsonl`, and return it."""
    written = table(read(folder / "rows.jsonl").values())
    write_text(folder / "table.md", written)
    return written
