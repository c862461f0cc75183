"""Sweeps as Slurm jobs: the scripts that are submitted, and one of them run to its end through a preemption.

There is no Slurm here: `sbatch`, `srun` and `scontrol` are stand-ins that note what they are asked, for one node.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import tiny

from diffsynth.config import launch_with_signals
from diffsynth.config.texts import as_typed
from diffsynth.report.sweep import read_runs

STAND_INS = {
    "sbatch": 'echo "sbatch $*" >> {notes}\necho 7',
    # On as many nodes as the job has, all of them here; the highest status of all, as Slurm's own.
    "srun": """shift  # its only option
for node in $(seq 0 $((SLURM_JOB_NUM_NODES - 1))); do SLURM_NODEID=$node "$@" & tasks="$tasks $!"; done
worst=0; for task in $tasks; do wait $task; status=$?; [ $status -gt $worst ] && worst=$status; done
exit $worst""",
    "scontrol": 'echo "scontrol $*" >> {notes}\n[ "$1" != show ] || echo 127.0.0.1',
}


@pytest.fixture
def notes(tmp_path, monkeypatch) -> Path:
    """Where the stand-ins, which are on the PATH, write what they were asked."""
    for name, script in STAND_INS.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("#!/bin/sh\n" + script.format(notes=tmp_path / "notes") + "\n")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    return tmp_path / "notes"


def submit(monkeypatch, folder: Path, *others: str) -> Path:
    """Submit a sweep, and return its folder."""
    given = tiny.merged(tiny.train_overrides(folder), others)
    tiny.command_line(monkeypatch, "train.py", "-m", "hydra/launcher=slurm", *given)
    (sweep,) = folder.glob("tiny-sweep-*")
    return sweep


def start(script: Path, nodes: int) -> subprocess.Popen:
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "here", "SLURM_JOB_NUM_NODES": str(nodes)}
    environment = {**os.environ, **slurm, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(["bash", script], env=environment, stdout=subprocess.PIPE, text=True)


def signal_step(job: subprocess.Popen, number: int) -> None:
    """As Slurm signals a step: every process that srun started, but neither that nor the batch script."""
    (srun,) = psutil.Process(job.pid).children()
    for process in srun.children(recursive=True):
        process.send_signal(number)


def wait_for(condition, job: subprocess.Popen, seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert job.poll() is None, job.stdout.read()
        assert time.monotonic() < until
        time.sleep(0.1)


def test_every_job_is_one_script_over_all_its_nodes(notes, tmp_path, monkeypatch):
    options = ["nodes=4", "gpus_per_node=2", "time=1:00:00", "warning=60", "sbatch.partition=fast", "before=[hello]"]
    given = ["lora.rank=2,4", "name=tiny", *(f"hydra.launcher.{option}" for option in options)]
    sweep = submit(monkeypatch, tmp_path, *given)
    assert notes.read_text().splitlines() == [f"sbatch --parsable {sweep}/{number}.sh" for number in (0, 1)]
    scripts = [(sweep / f"{number}.sh").read_text() for number in (0, 1)]
    for run_dir, rank, script in zip(read_runs(sweep), (2, 4), scripts, strict=True):
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
        lines = script.splitlines()
        for option in ("nodes=4", "gpus-per-node=2", "time=1:00:00", "signal=USR1@60", "partition=fast", "requeue"):
            assert f"#SBATCH --{option}" in lines
        assert f"#SBATCH --output={run_dir}/slurm-%j.log" in lines and f"#SBATCH --job-name={run_dir.name}" in lines
        assert "account" not in script and "hello" in lines
        assert "--multi_gpu --num_machines 4 --num_processes 8" in script
        assert f" lora.rank={rank}" in script and "hydra" not in script


def test_texts_survive_the_way_through_a_script(notes, tmp_path, monkeypatch):
    prefixes, prompts = ["a cat, sitting, ", "it's a (cute) cat"], ["a red emoji", "50% #1, 猫"]
    given = [
        "validation=base",
        f"dataset.augmentation.prefix='{prefixes[0]}',{prefixes[1]}",
        f"validation.prompts=[{prompts[0]},'{prompts[1]}']",
    ]
    sweep = submit(monkeypatch, tmp_path, *given)
    monkeypatch.setenv(launch_with_signals.IS_SWEEP_JOB, "1")  # as the script's launcher sets it
    for number, prefix in enumerate(prefixes):
        script = (sweep / f"{number}.sh").read_text(encoding="utf-8").replace("\\\n", " ")
        (launch,) = (shlex.split(line) for line in script.splitlines() if "train.py" in line)
        monkeypatch.setattr("sys.argv", launch[launch.index(str(tiny.ROOT / "train.py")) :])
        config = tiny.compose("train", *as_typed(sys.argv[1:], tiny.schema("train")))
        assert (config.dataset.augmentation.prefix, config.validation.prompts) == (prefix, prompts)


def test_the_launcher_of_a_script_says_that_its_overrides_have_hydras_backslashes(monkeypatch):
    monkeypatch.setattr("os.environ", {**os.environ, "SLURM_NODEID": "0"})
    monkeypatch.setattr(launch_with_signals, "on_stop_signals", lambda *_: None)
    monkeypatch.setattr("accelerate.commands.launch.launch_command", lambda _: None)
    assert launch_with_signals.launch(["train.py"]) == 0 and os.environ[launch_with_signals.IS_SWEEP_JOB] == "1"


def test_a_launcher_file_takes_the_place_of_plain_data_parallelism(notes, tmp_path, monkeypatch):
    (tmp_path / "zero2.yaml").write_text("distributed_type: DEEPSPEED\n")
    sweep = submit(monkeypatch, tmp_path, f"hydra.launcher.accelerate_config={tmp_path / 'zero2.yaml'}")
    script = (sweep / "0.sh").read_text()
    assert f"--config_file {tmp_path / 'zero2.yaml'} --num_machines 1 --num_processes 8" in script
    assert "--multi_gpu" not in script


def test_a_launcher_file_that_is_not_there_is_refused_before_anything_is_submitted(notes, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="accelerate_config: there is no file nowhere.yaml"):
        submit(monkeypatch, tmp_path, "hydra.launcher.accelerate_config=nowhere.yaml")
    assert not notes.exists()


def test_what_sbatch_refuses_is_said(notes, tmp_path, monkeypatch):
    (tmp_path / "bin" / "sbatch").write_text("#!/bin/sh\necho invalid partition >&2\nexit 1\n")
    with pytest.raises(SystemExit, match="sbatch refuses .*0.sh: invalid partition"):
        submit(monkeypatch, tmp_path, "lora.rank=2")


@pytest.mark.slow  # two runs from their command lines, half a minute
@pytest.mark.parametrize("nodes, processes", [(1, 0), (2, 1)])
def test_a_preempted_job_saves_and_is_queued_again_and_goes_on(nodes, processes, notes, tmp_path, monkeypatch):
    given = ["lora.rank=2", "max_steps=40", "batch_size=2"]
    given += [f"hydra.launcher.nodes={nodes}", f"hydra.launcher.gpus_per_node={processes}"]
    sweep = submit(monkeypatch, tmp_path, *given)
    (run_dir,) = read_runs(sweep)

    job = start(sweep / "0.sh", nodes)
    wait_for((run_dir / "metrics.jsonl").exists, job)
    signal_step(job, signal.SIGUSR1)
    said, _ = job.communicate(timeout=120)
    assert job.returncode == 75, said
    assert notes.read_text().splitlines()[-1] == "scontrol requeue 7"
    stopped_at = len(tiny.metrics(run_dir))
    assert stopped_at < 40 and not (run_dir / "finished.json").exists()

    job = start(sweep / "0.sh", nodes)
    said, _ = job.communicate(timeout=120)
    assert job.returncode == 0, said
    assert [line["step"] for line in tiny.metrics(run_dir)] == list(range(1, 41))
    assert notes.read_text().count("requeue") == 1
    (row,) = json.loads((sweep / "sweep.json").read_text())
    assert row["state"] == "finished"

    submit(monkeypatch, tmp_path, *given)
    assert notes.read_text().count("sbatch") == 1  # a finished run is not submitted again


LISTENING = """
import os, signal, sys, time
if sys.argv[2] == "ready":
    signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
open(sys.argv[1] + os.environ["RANK"], "w").close()
time.sleep(60)
"""


@pytest.mark.parametrize("state", ["ready", "still loading"])
def test_processes_are_signalled_through_their_launcher_which_ends_as_they_do(state, tmp_path):
    (tmp_path / "listening.py").write_text(LISTENING)
    script = [str(tmp_path / "listening.py"), str(tmp_path / "process"), state]
    command = [
        sys.executable,
        "-m",
        "diffsynth.config.launch_with_signals",
        "--multi_gpu",
        "--num_processes",
        "2",
        *script,
    ]
    job = subprocess.Popen(command, cwd=tiny.ROOT, stdout=subprocess.PIPE, text=True)
    wait_for(lambda: len(list(tmp_path.glob("process?"))) == 2, job)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(60) == 75


LAUNCHERS = ["launch_with_signals", "launch"]  # the second is in the scripts of queued jobs


@pytest.mark.parametrize("module", tiny.mostly_slow(LAUNCHERS, "launch_with_signals"))
def test_a_run_that_fails_does_not_ask_to_be_run_again(module, tmp_path):
    (tmp_path / "failing.py").write_text("raise SystemExit(3)")
    launcher = [sys.executable, "-m", f"diffsynth.config.{module}", "--num_processes", "1"]
    assert subprocess.run([*launcher, str(tmp_path / "failing.py")], cwd=tiny.ROOT).returncode == 3
