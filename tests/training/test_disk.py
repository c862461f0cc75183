"""A disk that is full, or may not be written."""

import logging
import subprocess
from pathlib import Path

import pytest
import tiny
from safetensors.torch import load_file

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


def test_a_folder_that_may_not_be_written_is_named(disk, monkeypatch):
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    with pytest.raises(SystemExit, match=f"Read-only.*{disk}.*set output_root=…"):
        tiny.command_line(monkeypatch, "train.py", *tiny.train_overrides(disk))
