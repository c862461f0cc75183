"""The GPU benchmark, rehearsed without a GPU."""

import json
import math
import re
import subprocess
import sys

import pytest
import tiny

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


def test_every_row_can_be_measured(benchmark, tmp_path, capsys):
    from on_gpu.rows import ROWS, distinct

    benchmark.main(["--rehearse", f"--out={tmp_path}"])
    found = results(tmp_path)
    assert [result["row"] for result in found] == [row.name for row in distinct(ROWS)]
    assert all(math.isfinite(result["loss"]) and 0 < result["seconds"] <= result["slowest"] for result in found)
    planned = [result for result in found if "planned" in result]
    assert len(planned) > 5 and all(result["planned"] > 1e6 and result["flops"] > 1e8 for result in planned)
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


def test_a_row_that_fails_is_a_row_with_its_message_and_is_tried_again(benchmark, monkeypatch, tmp_path):
    outcomes = iter([{"error": "torch.OutOfMemoryError: a | b"}, {"seconds": 0.25, "slowest": 1.0}])
    monkeypatch.setattr(benchmark, "measured", lambda *_: next(outcomes))
    given = ["--rows=qwen_image-1024-blocks", f"--out={tmp_path}", "--resume"]
    benchmark.main(given)
    assert "| qwen_image-1024-blocks | torch.OutOfMemoryError: a / b |" in (tmp_path / "table.md").read_text()
    benchmark.main(given)
    assert "| qwen_image-1024-blocks | 0.250 | 1.00 |" in (tmp_path / "table.md").read_text()
    benchmark.main(given)  # which measures nothing any more
    assert len(results(tmp_path)) == 2


def test_a_process_that_fails_or_hangs_is_a_result(benchmark, monkeypatch, tmp_path):
    given = benchmark.parsed([f"--out={tmp_path}", "--device=cpu"])
    (row,) = benchmark.matching("qwen_image-1024-blocks")
    commands = {"measure": "raise MemoryError('full')", "plan": "import time; time.sleep(99)"}
    monkeypatch.setattr(benchmark, "start", lambda _, what, __: started(commands[what]))
    found = benchmark.measured(row, given, seconds_left=1.5)
    assert found == {"error": "MemoryError: full", "plan_error": "took too long"}


def started(code: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


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
        event("cuda_runtime", 0, 5, "cudaStreamSynchronize"),
        {"ph": "M", "name": "process_name"},
    ]
    found = figures(events, steps=2)
    assert found == {"idle": pytest.approx(15 / 50), "hidden": pytest.approx(0.5), "kernels": 2, "waits": 0.5}
    assert set(figures([], 1).values()) == {None}
