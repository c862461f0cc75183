"""A run that is killed again and again ends as one that never was. `make faults` kills 200 times."""

import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import tiny
from safetensors.torch import load_file

KILLS = int(os.environ.get("FAULTS", 5))
OPTIONS = [
    "max_steps=16",
    "lora.target_modules=[to_q,to_v]",
    "batch_size=4",
    "micro_batch_size=2",
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
# Children start as copies of a process that has imported everything, and are processes like any other.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tiny", "diffsynth.training.loop", "diffsynth.pipelines.qwen_image"])


def train(folder: str, model: str, dataset: str, fatal_sync: int | None) -> None:
    """The run, in a process of its own, which dies in the middle of its `fatal_sync`-th fsync."""
    os.environ["OMP_NUM_THREADS"] = "1"
    left, sync = fatal_sync, os.fsync

    def fsync(descriptor):
        nonlocal left
        left = None if left is None else left - 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        sync(descriptor)

    os.fsync = fsync
    tiny.train(Path(folder), *tiny.model_overrides(Path(model)), f"dataset.path={dataset}", *OPTIONS)


def start(folder: Path, fatal_sync: int | None = None):
    given = (str(folder), str(tiny.model()), str(tiny.dataset()), fatal_sync)
    process = SERVER.Process(target=train, args=given)
    process.start()
    return process


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
def test_a_run_killed_at_random_moments_ends_as_one_that_was_not(tmp_path):
    began = time.monotonic()
    unbroken = start(tmp_path / "unbroken")
    unbroken.join()
    duration, expected = time.monotonic() - began, outcome(tmp_path / "unbroken")
    moments, killed, number = random.Random(KILLS), 0, 0
    while killed < KILLS:
        folder, number = tmp_path / f"broken-{number}", number + 1
        while not list(folder.glob("*/finished.json")):
            in_a_save = killed < KILLS and moments.random() < 0.5
            process = start(folder, moments.randint(1, 60) if in_a_save else None)
            if not in_a_save and killed < KILLS:
                process.join(moments.uniform(0, duration))
                process.kill()
            process.join()
            killed += process.exitcode == -signal.SIGKILL
            assert process.exitcode in (0, -signal.SIGKILL)
        assert outcome(folder) == expected
    print(f"killed {killed} times, {number} runs, each as the unbroken one")
