"""What signals do to a process outside of a training's steps, and what becomes of a process without its parent."""

import os
import runpy
import signal
import subprocess
import sys

import pytest
import tiny
import warm
from kills import left_by

import diffsynth.config
from diffsynth.core.process import signals
from diffsynth.core.process.signals import child_environment

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no such signals on this system")


def loading(script: str, number: int, hang_up: signal.Handlers = signal.SIG_DFL) -> None:
    """Run a script that gets a signal while it checks its configuration; SIGHUP is handled so at its start."""
    signal.signal(signal.SIGHUP, hang_up)
    diffsynth.config.check = lambda *_: [os.kill(os.getpid(), number), sys.exit(3)]
    sys.argv = [str(tiny.ROOT / script), "hydra.run.dir=${oc.env:FOLDER}"]
    runpy.run_path(sys.argv[0], run_name="__main__")


SIGNALS = [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGUSR1] if hasattr(signal, "SIGHUP") else []


@pytest.mark.parametrize("number", tiny.mostly_slow(SIGNALS, signal.SIGTERM, signal.SIGHUP))
def test_a_run_that_is_stopped_while_it_loads_asks_to_be_run_again(number, tmp_path):
    process = warm.start(loading, "train.py", number, output=tmp_path / "said.txt", FOLDER=str(tmp_path))
    process.join()
    said = (tmp_path / "said.txt").read_text()
    assert process.exitcode == 75 and f"Stopped by {number.name}; run the same command to go on." in said
    assert "Traceback" not in said and not (tmp_path / "config.yaml").exists()


def test_a_run_that_nohup_started_loads_on_without_its_terminal(tmp_path):
    process = warm.start(loading, "train.py", signal.SIGHUP, signal.SIG_IGN, FOLDER=str(tmp_path))
    process.join()
    assert process.exitcode == 3


WAITING = """
from diffsynth.core.process.signals import end_with_parent
end_with_parent()
print("ready", flush=True)
time.sleep(60)
"""


def launch_and_be_killed() -> None:
    os.setsid()
    environment = os.environ | child_environment()
    with subprocess.Popen([sys.executable, "-c", WAITING], cwd=tiny.ROOT, env=environment, stdout=-1) as child:
        child.stdout.readline()
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_launched_process_ends_with_its_launcher():
    process = warm.start(launch_and_be_killed)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert left_by(process.pid) == []


def test_a_process_watches_its_parent_where_the_system_does_not(monkeypatch):
    parents, sent = iter([7, 7, 1]), []
    monkeypatch.setattr(signals, "WATCH_SECONDS", 0)
    monkeypatch.setattr(os, "getppid", lambda: next(parents))
    monkeypatch.setattr("psutil.pid_exists", lambda number: True)
    monkeypatch.setattr(os, "kill", lambda *given: sent.append(given))
    signals._watch(7, signal.SIGTERM)
    assert sent == [(os.getpid(), signal.SIGTERM)]
