"""A plan as a table and as a chart."""

from collections.abc import Iterable, Sequence
from html import escape

from .plan import Plan, StageMemory

GIB = 2**30
COLUMNS = ("weights", "gradients", "optimizer", "activations", "peak", "host", "disk")
ONLY_OF_SEVERAL = ("zero2", "fsdp2")  # engines that spare nothing on one device
COLOURS = {"weights": "#4c78a8", "optimizer": "#f58518", "gradients": "#e45756", "passing": "#72b7b2"}
BAR, GAP, LEFT, WIDTH = 22, 10, 170, 900  # of the chart, in pixels


def table(plan: Plan, needed: int | None = None) -> str:
    """Stages and shares in GiB, each as a Markdown table.

    Args:
        needed: What a GPU has to have free for the worst of the training's stages, an estimate; None of other devices.
    """
    lines = _rows(("stage", "pixels", *(f"{column}, GiB" for column in COLUMNS)))
    for stage in plan.stages:
        lines += [_line((stage.name, _size(stage), *(_gib(getattr(stage, column)) for column in COLUMNS)))]
    lines += ["", *_rows(("devices", "engine", "each device, GiB", "host for each, GiB"))]
    told = [share for share in plan.shares if share.devices > 1 or share.engine not in ONLY_OF_SEVERAL]
    lines += [_line((str(s.devices), s.engine, _gib(s.device), _gib(s.host))) for s in told]
    lines += ["", f"To be downloaded: {_gib(plan.download) or 0} GiB."]
    if needed is not None:
        lines.append(f"A GPU needs about {_gib(needed)} GiB with what its allocator and context take: an estimate.")
    return "\n".join(lines)


def chart(plan: Plan, budget: int | None = None) -> str:
    """SVG: what fills each stage's peak; a line where the budget ends."""
    most = max([stage.peak for stage in plan.stages] + [budget or 0])
    scale, height = (WIDTH - LEFT - 90) / most, GAP + (BAR + GAP) * (len(plan.stages) + 1)
    drawn = [_bar(stage, GAP + row * (BAR + GAP), scale) for row, stage in enumerate(plan.stages)]
    if budget:
        at = LEFT + budget * scale
        drawn.append(f'<path d="M{at:.0f} 0V{height - BAR - GAP}" stroke="#b00" stroke-dasharray="4"/>')
    legend = [_text(LEFT + 110 * n, height - GAP, name, colour) for n, (name, colour) in enumerate(COLOURS.items())]
    style = "font:13px sans-serif;background:#fff"
    size = f'viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} style="{style}">{"".join([*drawn, *legend])}</svg>\n'


def filling(stage: StageMemory) -> dict[str, int]:
    """What a stage's peak is made of; `passing` is what comes and goes within a step."""
    kept = stage.weights + stage.optimizer
    gradients = min(stage.gradients, stage.peak - kept)
    parts = {"weights": stage.weights, "optimizer": stage.optimizer, "gradients": gradients}
    return {**parts, "passing": stage.peak - kept - gradients}


def _bar(stage: StageMemory, top: float, scale: float) -> str:
    drawn, left = [_text(8, top + 15, f"{stage.name} {_size(stage)}", "#222")], LEFT
    for name, size in filling(stage).items():
        width = size * scale
        drawn.append(f'<rect x="{left:.1f}" y="{top}" width="{width:.1f}" height="{BAR}" fill="{COLOURS[name]}"/>')
        left += width
    return "".join([*drawn, _text(left + 6, top + 15, f"{_gib(stage.peak)} GiB", "#222")])


def _text(x: float, y: float, text: str, colour: str) -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" fill="{colour}">{escape(text)}</text>'


def _rows(head: Sequence[str]) -> list[str]:
    return [_line(head), _line("---" for _ in head)]


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}" if size else ""


def _size(stage: StageMemory) -> str:
    return "x".join(map(str, stage.size)) if stage.size else ""
