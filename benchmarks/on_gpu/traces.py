"""What a trace of torch's profiler says of a GPU: when it computed, when it copied, when the CPU waited for it."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

Span = tuple[float, float]  # beginning and end, in microseconds

COPIES = ("gpu_memcpy", "gpu_memset")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


def read(path: Path) -> list[dict]:
    """The events of a trace file."""
    return json.loads(path.read_text(encoding="utf-8"))["traceEvents"]


def figures(events: Sequence[dict], steps: int) -> dict[str, float | None]:
    """Figures of a trace of `steps` steps; those of a GPU are None where none computed.

    Returns:
        `idle`: share of the time from the first kernel to the last in which no kernel ran; `hidden`: share of the
        copies' time in which kernels ran, too; `kernels`, `waits`: kernels, and calls that wait for the GPU, a step,
        without the clock's own wait.
    """
    kernels = joined(spans(events, ("kernel",)))
    if not kernels:
        return {"idle": None, "hidden": None, "kernels": None, "waits": None}
    copies = joined(spans(events, COPIES))
    computing, copying = length(kernels), length(copies)
    return {
        "idle": 1 - computing / (kernels[-1][1] - kernels[0][0]),
        "hidden": 1 - (length(joined([*kernels, *copies])) - computing) / copying if copying else None,
        "kernels": len(list(spans(events, ("kernel",)))) / steps,
        "waits": sum(event.get("name") in WAITS for event in events) / steps - 1,
    }


def spans(events: Iterable[dict], categories: Sequence[str]) -> list[Span]:
    """When events of these categories ran."""
    return [(e["ts"], e["ts"] + e["dur"]) for e in events if e.get("cat") in categories and "dur" in e]


def joined(given: Iterable[Span]) -> list[Span]:
    """The union of spans: sorted, and without overlap."""
    union: list[Span] = []
    for begin, end in sorted(given):
        if union and begin <= union[-1][1]:
            union[-1] = (union[-1][0], max(end, union[-1][1]))
        else:
            union.append((begin, end))
    return union


def length(given: Iterable[Span]) -> float:
    """Sum of the lengths of spans that do not overlap, in microseconds."""
    return sum(end - begin for begin, end in given)
