"""Shows a plan as a Markdown table and as an SVG chart."""

from collections.abc import Callable, Iterable, Sequence
from html import escape

from .plan import Plan, StageMemory

GIB = 2**30
COLUMNS = ("weights", "gradients", "optimizer", "activations", "peak", "host", "disk")
ONLY_OF_SEVERAL = ("zero2", "fsdp2")  # engines that save no memory on a single device
COLOURS = {"weights": "#4c78a8", "optimizer": "#f58518", "gradients": "#e45756", "passing": "#72b7b2"}
BAR, GAP, LEFT, WIDTH = 22, 10, 170, 900  # height of a bar, gap below it, left margin and width of the chart, in pixels


def table(plan: Plan, needed: Callable[[int], int] | None = None) -> str:
    """Return the stages and the shares of a plan, in GiB, as two Markdown tables.

    Args:
        plan: The plan.
        needed: Estimates the bytes that a GPU must have free for a peak in bytes; None for other devices.
    """
    lines = [
        "Memory of one device in each stage, the largest peak of which must fit (`cache` is make_cache.py):",
        "",
    ]
    lines += _rows(("stage", "pixels", *(f"{column}, GiB" for column in COLUMNS)))
    for stage in plan.stages:
        lines += [_line((stage.name, _size(stage), *(_gib(getattr(stage, column)) for column in COLUMNS)))]
    lines += [
        "",
        "Memory of each device in training, by number of devices and engine (conf/accelerate/):",
        "",
    ]
    lines += _rows(("devices", "engine", "each device, GiB", "host for each, GiB"))
    shares = [share for share in plan.shares if share.devices > 1 or share.engine not in ONLY_OF_SEVERAL]
    lines += [_line((str(s.devices), s.engine, _gib(s.device), _gib(s.host))) for s in shares]
    lines += ["", f"To be downloaded: {_gib(plan.download) or 0} GiB."]
    if needed is not None:
        peaks = {"training": plan.worst.peak}
        caches = [stage.peak for stage in plan.stages if stage.name == "cache"]
        peaks |= {"make_cache.py": max(caches)} if caches else {}
        each = "; ".join(f"{name} {_gib(needed(peak))} GiB" for name, peak in peaks.items())
        lines.append(f"A GPU needs about, with what its allocator and context take (an estimate): {each}.")
    return "\n".join(lines)


def chart(plan: Plan, budget: int | None = None) -> str:
    """Return an SVG chart with one bar per stage, of what its peak consists, and a line at the budget."""
    most = max([stage.peak for stage in plan.stages] + [budget or 0])
    scale, height = (WIDTH - LEFT - 90) / most, GAP + (BAR + GAP) * (len(plan.stages) + 1)
    elements = [_bar(stage, GAP + row * (BAR + GAP), scale) for row, stage in enumerate(plan.stages)]
    if budget:
        at = LEFT + budget * scale
        elements.append(f'<path d="M{at:.0f} 0V{height - BAR - GAP}" stroke="#b00" stroke-dasharray="4"/>')
    legend = [_text(LEFT + 110 * n, height - GAP, name, colour) for n, (name, colour) in enumerate(COLOURS.items())]
    style = "font:13px sans-serif;background:#fff"
    size = f'viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} style="{style}">{"".join([*elements, *legend])}</svg>\n'


def filling(stage: StageMemory) -> dict[str, int]:
    """Return the parts of a stage's peak in bytes; `passing` is the part that a step adds besides gradients."""
    static = stage.weights + stage.optimizer
    gradients = min(stage.gradients, stage.peak - static)
    parts = {"weights": stage.weights, "optimizer": stage.optimizer, "gradients": gradients}
    return {**parts, "passing": stage.peak - static - gradients}


def _bar(stage: StageMemory, top: float, scale: float) -> str:
    elements, left = [_text(8, top + 15, f"{stage.name} {_size(stage)}", "#222")], LEFT
    for name, size in filling(stage).items():
        width = size * scale
        elements.append(f'<rect x="{left:.1f}" y="{top}" width="{width:.1f}" height="{BAR}" fill="{COLOURS[name]}"/>')
        left += width
    return "".join([*elements, _text(left + 6, top + 15, f"{_gib(stage.peak)} GiB", "#222")])


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
