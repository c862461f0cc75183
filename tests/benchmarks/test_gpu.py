"""The GPU benchmark, rehearsed without a GPU."""

import json
import math
import os
import re
import sys

import pytest
import tiny
import torch

from diffsynth.core.memory import compile as compilation


@pytest.fixture
def benchmark(monkeypatch):
    """The script `benchmarks/gpu.py` as a module."""
    monkeypatch.syspath_prepend(tiny.ROOT / "benchmarks")
    import gpu

    monkeypatch.setattr(compilation, "BACKEND", compilation.BACKEND)  # a rehearsal changes it
    return gpu


def results(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


# By default a plan, the bare loop and a batch; all rows take a minute.
@pytest.mark.parametrize("rows", tiny.mostly_slow(["*", "flux2_klein_4b-1024-b*"], "flux2_klein_4b-1024-b*"))
def test_every_row_can_be_measured(rows, benchmark, tmp_path, capsys):
    from on_gpu.rows import distinct, matching

    benchmark.main(["--rehearse", f"--rows={rows}", f"--out={tmp_path}"])
    found = results(tmp_path)
    assert [result["row"] for result in found] == [row.name for row in distinct(matching(rows))]
    assert all(math.isfinite(result["loss"]) and 0 < result["seconds"] <= result["slowest"] for result in found)
    planned = [result for result in found if "planned" in result]
    assert planned and all(result["planned"] > 1e6 and result["flops"] > 1e8 for result in planned)
    ours, bare = (result["loss"] for result in found[:2])
    assert ours == pytest.approx(bare, rel=0.5)  # of one network with random weights
    table = (tmp_path / "table.md").read_text()
    assert table in capsys.readouterr().out and len(table.splitlines()) == len(found) + 2


def test_the_page_lists_every_row(benchmark):
    from on_gpu.rows import ROWS

    page = (tiny.ROOT / "docs" / "performance.md").read_text()
    assert re.findall(r"^\| `(\S+-\d+-\S+)` \|", page, re.MULTILINE) == [row.name for row in ROWS]


def test_rows_that_fit_into_the_time_are_chosen_the_valuable_ones_first(benchmark):
    from on_gpu.rows import ROWS, fitting

    assert fitting(ROWS, 1e9) == [*ROWS]
    assert fitting(ROWS, 99) == [ROWS[0], ROWS[2]]  # 50 s, not another 50 s, 30 s
    assert sum(row.seconds for row in fitting(ROWS, 540)) <= 540


def test_a_line_of_the_table_has_every_figure_and_no_more_than_was_measured(benchmark):
    from on_gpu.table import GIB, table

    times = {"seconds": 0.5, "slowest": 0.75, "first": 9.0, "first_epoch": 0.625, "second_epoch": 0.5}
    memory = {
        "allocated": 2 * GIB,
        "reserved": 3 * GIB,
        "context": GIB // 2,
        "planned_tensors": 4 * GIB,
        "planned": 5 * GIB,
    }
    traced = {"idle": 0.25, "hidden": 0.5, "kernels": 400.0, "waits": 2.0}
    work = {"flops": 98.9e12, "samples": 2, "tokens_per_second": 1234.0, "loss": 1.5, "device": "NVIDIA H100 80GB HBM3"}
    (line,) = table([{"row": "a", **times, **memory, **traced, **work}]).splitlines()[2:]
    figures = "0.500 | 0.75 | 9.0 | 2.00 | 3.00 | 0.50 | 4.00 | 5.00 | 1234 | 396 | 40% | 25% | 50% | 400 | 2 | 1.500"
    assert line == f"| a | {figures} | 0.625 | 0.500 |"
    (line,) = table([{"row": "a", **times, **work, "device": "another card", "idle": None}]).splitlines()[2:]
    assert line == "| a | 0.500 | 0.75 | 9.0 |  |  |  |  |  | 1234 | 396 |  |  |  |  |  | 1.500 | 0.625 | 0.500 |"


@pytest.mark.parametrize(
    "card, peak", [("NVIDIA H100 PCIe", 756e12), ("NVIDIA H200", 989e12), ("RTX 4090 Laptop GPU", None)]
)
def test_the_peak_is_that_of_the_card(benchmark, card, peak):
    from on_gpu.table import peak_of

    assert peak_of(card) == peak


def test_a_row_that_fails_is_a_row_with_its_message_and_is_tried_again(benchmark, monkeypatch, tmp_path):
    outcomes = iter([{"error": "torch.OutOfMemoryError: a | b"}, {"seconds": 0.25, "slowest": 1.0}, {"seconds": 0.5}])
    monkeypatch.setattr(benchmark, "measured", lambda *_: next(outcomes))
    given = ["--rows=qwen_image-1024-blocks", f"--out={tmp_path}", "--resume", "--device=cpu"]
    benchmark.main(given)
    assert "| qwen_image-1024-blocks | torch.OutOfMemoryError: a / b |" in (tmp_path / "table.md").read_text()
    benchmark.main(given)
    assert "| qwen_image-1024-blocks | 0.250 | 1.00 |" in (tmp_path / "table.md").read_text()
    benchmark.main(given)  # which measures nothing any more
    assert len(results(tmp_path)) == 2
    benchmark.main([*given, "--tiny"])  # which is another measurement
    assert len(results(tmp_path)) == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_before_the_first_row(benchmark, tmp_path):
    with pytest.raises(SystemExit, match="device=cuda is not available"):
        benchmark.main([f"--out={tmp_path}"])


def test_a_line_that_was_cut_off_is_left_out(benchmark, tmp_path):
    from on_gpu.table import append, read

    (tmp_path / "rows.jsonl").write_text('{"row": "a", "seconds": 1.0}\n{"row": "b", "sec')
    append(tmp_path / "rows.jsonl", {"row": "c"})
    assert list(read(tmp_path / "rows.jsonl")) == ["a", "c"]


@pytest.mark.parametrize("cores", [2, 16])
@pytest.mark.parametrize(
    "measuring, said",
    [
        ("raise MemoryError('full')", "MemoryError: full"),
        ("import sys; sys.stderr.buffer.write(b'\\xff bad'); sys.exit(1)", "\ufffd bad"),
        ("print('nothing of use')", "ended with exit code 0 and no result"),
        ("import os, sys; print('a warning', file=sys.stderr, flush=True); os.kill(os.getpid(), 11)",
         "ended with exit code -11 and no result"),
    ],
)  # fmt: skip
def test_a_process_that_fails_or_hangs_is_a_result(measuring, said, cores, benchmark, monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark.os, "cpu_count", lambda: cores)
    given = benchmark.parsed([f"--out={tmp_path}", "--device=cpu"])
    (row,) = benchmark.matching("qwen_image-1024-blocks")
    commands = {"measure": measuring, "plan": "import time; time.sleep(99)"}
    monkeypatch.setattr(
        benchmark, "start", lambda _, what, __: benchmark.piped([sys.executable, "-c", commands[what]], os.environ)
    )
    found = benchmark.measured(row, given, seconds_left=1.5)
    assert found["error"] == said
    assert found["plan_error"].startswith(("no result within 2 s", "ended with exit code -9"))


def test_a_loss_that_is_not_finite_is_a_failure(benchmark, monkeypatch, tmp_path):
    from on_gpu.measure import Measurement, Setting

    monkeypatch.setattr(Measurement, "bare", lambda self, clock: math.nan)
    (row,) = benchmark.matching("qwen_image-1024-blocks-bare")
    with pytest.raises(FloatingPointError, match="loss is nan"):
        Measurement(row, Setting("cpu", tmp_path, tiny=True)).measure()


def test_a_trace_says_when_the_gpu_was_idle_and_which_copies_were_hidden(benchmark):
    from on_gpu.traces import figures

    def event(category: str, begin: float, duration: float, name: str = "") -> dict:
        return {"cat": category, "ts": begin, "dur": duration, "name": name}

    events = [
        *(event("kernel", begin, 10) for begin in (0, 10, 15, 40)),  # 0 to 25, 40 to 50
        event("gpu_memcpy", 20, 10),  # half of it beside a kernel
        *(event("cuda_runtime", begin, 5, "cudaStreamSynchronize") for begin in (0, 20)),
        *(event("cuda_runtime", begin, 5, "cudaDeviceSynchronize") for begin in (25, 50)),  # the clock's
        {"ph": "M", "name": "process_name"},
    ]
    found = figures(events, steps=2)
    assert found == {"idle": pytest.approx(15 / 50), "hidden": pytest.approx(0.5), "kernels": 2, "waits": 1}
    assert set(figures([], 1).values()) == {None}
