"""A console that is lost, or that lacks a character, ends no work."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import yaml

from diffsynth.config import LogFile
from diffsynth.core import progress
from diffsynth.core.process.console import keep_console


def broken_pipe() -> io.TextIOWrapper:
    """A stream to a pipe whose reader has ended."""
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w", encoding="utf-8")


def closed_terminal() -> io.TextIOWrapper:
    """A stream to a terminal whose window was closed: writing to it is EIO."""
    window, terminal = os.openpty()
    os.close(window)
    return os.fdopen(terminal, "w", encoding="utf-8")


def closed_stream() -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


LOST = [broken_pipe, closed_stream, *([closed_terminal] if hasattr(os, "openpty") else [])]


@pytest.mark.parametrize("lost", LOST)
def test_writing_to_a_lost_console_is_no_error(lost, monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, lost())
    keep_console()
    for _ in range(100):
        print("x" * 1000, flush=True)
        sys.stderr.writelines(["y\n"])
        sys.stderr.flush()


def test_characters_that_the_console_lacks_are_escaped(monkeypatch):
    console = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(console, encoding="ascii"))
    keep_console()
    print("10 × 10…", flush=True)
    assert console.getvalue() == b"10 \\xd7 10\\u2026\n"


def test_a_process_ends_with_its_own_status_after_its_console():
    code = (
        "import sys; from diffsynth.core.process.console import keep_console; keep_console(); print('x'); sys.exit({})"
    )
    for end, status in [("75", 75), ("'error'", 1), ("0", 0)]:
        with broken_pipe() as lost:
            process = subprocess.run([sys.executable, "-c", code.format(end)], stdout=lost, stderr=lost, cwd=tiny.ROOT)
        assert process.returncode == status


def test_a_run_whose_console_is_lost_finishes_and_logs_all(tmp_path, monkeypatch):
    overrides = tiny.train_overrides(tmp_path)
    monkeypatch.setattr(progress, "LINE_SECONDS", 1e-9)  # a line at each step but the first
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, broken_pipe())
    tiny.command_line(monkeypatch, "train.py", *overrides)
    (run_dir,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert [line["step"] for line in tiny.metrics(run_dir)] == [1, 2]
    assert f"Finished. {run_dir} holds:" in (run_dir / "train.log").read_text(encoding="utf-8")


def test_the_log_holds_every_character_on_every_system(tmp_path):
    logging = yaml.safe_load((tiny.ROOT / "conf/hydra/job_logging/rank_zero.yaml").read_text(encoding="utf-8"))
    assert logging["handlers"]["file"]["class"] == "diffsynth.config.LogFile"
    assert LogFile(tmp_path / "train.log").encoding == "utf-8"


def test_every_tool_that_prints_keeps_its_console():
    files = [file for folder in (".", "diffsynth", "benchmarks", "models") for file in scripts_in(folder)]
    assert len(files) > 20
    kept = re.compile(r"\b(keep_console|explained|run_main|launch)\(")
    without = [file.name for file in files if not kept.search(file.read_text(encoding="utf-8"))]
    assert without == ["serve.py"]  # it runs without the rest of the package


def scripts_in(folder: str) -> list[Path]:
    """Python files in a folder, below it too unless it is the repository's, that run as a script."""
    files = (tiny.ROOT / folder).glob("*.py" if folder == "." else "**/*.py")
    return [
        file
        for file in files
        if file.stem == "__main__" or '__name__ == "__main__"' in file.read_text(encoding="utf-8")
    ]
