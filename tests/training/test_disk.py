"""A disk that is full, or may not be written."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from safetensors.torch import load_file

from diffsynth.config import LogFile
from diffsynth.core.progress import ProgressBar
from diffsynth.diffusion.logger import ModelLogger

STEPS = ["max_steps=4", "checkpoint.every=1", "export.save_steps=4"]


@pytest.fixture
def disk(tmp_path):
    """A small disk of its own, mounted; where that is not allowed there is nothing to test."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(disk: Path) -> Path:
    filler = disk / "filler"
    filler.write_bytes(b"\0" * (60 << 20))
    return filler


def test_a_disk_that_fills_up_costs_nothing_that_was_saved(disk, tmp_path, caplog):
    with (
        tiny.in_step(3, lambda: fill(disk)),
        caplog.at_level(logging.WARNING),
        pytest.raises(OSError, match="make room, or set output_root.*The newest checkpoint, of step 2, is kept"),
    ):
        tiny.train(disk, *STEPS)
    assert "The checkpoint of step 3 is not saved: A checkpoint takes" in caplog.text
    (checkpoints,) = disk.glob("*/checkpoints")
    assert sorted(folder.name for folder in checkpoints.iterdir()) == ["step-000001", "step-000002"]
    (disk / "filler").unlink()
    found, expected = tiny.train(disk, *STEPS), tiny.train(tmp_path / "elsewhere", *STEPS)
    weights = [load_file(run_dir / "weights" / "step-4.safetensors") for run_dir in (found, expected)]
    assert all((weights[0][key] == weights[1][key]).all() for key in weights[1])


def test_a_disk_without_room_is_told_before_the_first_step(disk):
    fill(disk)
    with (
        tiny.in_step(1, lambda: pytest.fail("trains")),
        pytest.raises(OSError, match="3 checkpoints take.*no checkpoint yet"),
    ):
        tiny.train(disk, *STEPS)


# One that has no room for a while: `no_room` limits the size of every file, so that all writes fail.

EVERYTHING = [
    *("max_steps=4", "checkpoint.every=1", "export.save_steps=1", "logger=tensorboard", "logger.every=1"),
    *("validation=base", "validation.every=1", "validation.prompts=[a red apple]"),
    "validation.options={num_inference_steps: 1, height: 32, width: 32}",
    "profile={_target_: diffsynth.training.profile.Profile, path: '${run_dir}/trace', after: 1, steps: 1}",
]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of TensorBoard's writer
def test_a_run_goes_on_without_room_and_writes_again_when_there_is_some(tmp_path, no_room, caplog, capsys):
    with tiny.in_step(2, no_room), tiny.in_step(3, lambda: no_room(but=None)):
        run_dir = tiny.train(tmp_path, *EVERYTHING)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "lr" in line] == [1, 2, 3, 4]
    assert tiny.weights(run_dir) == [f"step-{step}.safetensors" for step in (1, 3, 4)]
    pictures = sorted(path.name for path in (run_dir / "samples").glob("step-*"))
    assert pictures == [f"step-{step:06d}.png" for step in (0, 1, 3, 4)]
    assert (run_dir / "finished.json").exists() and len(list((run_dir / "tensorboard").iterdir())) > 1
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    names = ("metrics.jsonl", "step-2.safetensors", "step-000002.png", "checkpoint of step 2", "tensorboard", "rank-0")
    for name in names:
        assert any(name in warning for warning in warnings), name


def test_a_run_without_room_for_its_last_export_saves_its_state_and_ends(tmp_path, monkeypatch):
    write = ModelLogger._write

    def write_but_the_last(export, module, name):
        if name == "step-2":
            raise OSError(28, "No space left on device", f"{name}.safetensors")
        write(export, module, name)

    monkeypatch.setattr(ModelLogger, "_write", write_but_the_last)
    with pytest.raises(OSError, match=r"No space left on device.*step-2"):
        tiny.train(tmp_path, "export.save_steps=1")
    (run_dir,) = tmp_path.iterdir()
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step-000002"]
    assert not (run_dir / "finished.json").exists()


def test_a_log_without_room_says_so_once_and_loses_no_line(tmp_path, no_room, capsys):
    log = LogFile(str(tmp_path / "train.log"))
    no_room()
    for text in ("one", "two"):
        log.handle(logging.makeLogRecord({"msg": text}))
    no_room(but=None)
    log.handle(logging.makeLogRecord({"msg": "three, of caf\udce9.png"}))
    log.close()
    assert (tmp_path / "train.log").read_text() == "one\ntwo\nthree, of caf\\udce9.png\n"
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"{tmp_path}/train.log is not written" in said


def test_a_progress_that_cannot_be_shown_does_not_end_a_run(tmp_path, no_room, monkeypatch, caplog):
    with (tmp_path / "stderr").open("w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        no_room()
        bar = ProgressBar(3)
        bar.keep()
        no_room(but=None)
    assert "stderr is not written" in caplog.text


def test_a_folder_that_may_not_be_written_is_named(disk, monkeypatch):
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    with pytest.raises(SystemExit, match=f"Read-only.*{disk}.*set output_root=…"):
        tiny.command_line(monkeypatch, "train.py", *tiny.train_overrides(disk))
