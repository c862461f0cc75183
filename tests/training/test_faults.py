"""A run that is killed again and again ends as one that never was. `make faults` kills 200 times, with more workers."""

import json
import signal
from pathlib import Path

import kills
import pytest
import tiny
from safetensors.torch import load_file

OPTIONS = [
    "max_steps=10",
    "lora.target_modules=[to_q,to_v]",
    "batch_size=4",
    "micro_batch_size=2",
    f"dataset.num_workers={kills.WORKERS or 1}",
    "lora.dropout=0.1",
    "ema=power",
    "checkpoint.every=2",
    "logger.every=3",
    "export.save_steps=7",
    "validation=base",
    "validation.every=6",
    "validation.prompts=[a red apple]",
    "validation.options={num_inference_steps: 2, height: 32, width: 32}",
]


def outcome(folder: Path) -> dict:
    """Every exported tensor and picture, byte for byte, and every number of the curves that is not a time or a size."""
    (run_dir,) = folder.iterdir()
    weights = {
        f"{path.name}: {key}": tensor.numpy().tobytes()
        for path in sorted((run_dir / "weights").iterdir())
        for key, tensor in load_file(path).items()
    }
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    untimed = [{k: v for k, v in line.items() if k not in ("samples_per_second", "memory_gb")} for line in lines]
    samples = {path.name: path.read_bytes() for path in sorted((run_dir / "samples").iterdir())}
    return {**weights, **samples, "metrics": untimed}


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_a_run_killed_at_any_moment_ends_as_one_that_was_not(tmp_path):
    def work(number: int | str) -> tuple:
        return tiny.run, tiny.merged(tiny.train_overrides(tmp_path / f"run-{number}"), OPTIONS)

    seconds = kills.duration(*work("unbroken"))
    for number in kills.survived(work, seconds, syncs=110):
        assert outcome(tmp_path / f"run-{number}") == outcome(tmp_path / "run-unbroken")
