"""A run that was cut off, or asked to stop, goes on as if nothing had been."""

import json
import multiprocessing
import os
import shutil
import signal

import pytest
import tiny
import warm
from resumed import (
    EXACT,
    STEPS,
    artefacts,
    assert_same_run,
    final_weights,
    kept,
    losses,
    metrics,
    pictures,
    uninterrupted,
)
from torch.testing import assert_close

from diffsynth.core.data import UnifiedDataset
from diffsynth.core.process import locks
from diffsynth.core.process.locks import FolderInUse
from diffsynth.diffusion.logger import ModelLogger
from diffsynth.training.stopping import Stopped, stop_on_signals

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
DROPOUT = ["lora.dropout=0.5", "lr_scheduler=cosine", "lr_scheduler.num_warmup_steps=2"]
AVERAGE = ["ema=constant", "ema.decay=0.9", "ema.device=cpu", "ema.every=3"]  # the checkpoint is between two updates
ACCUMULATION = ["micro_batch_size=2", "logger.every=3", "optimizer=prodigy", *AVERAGE]
EVALUATING = [
    "validation=base",
    "validation.every=2",
    "validation.prompts=[a red emoji]",
    "validation.options={num_inference_steps: 1, height: 32, width: 32}",
    "validation.loss_samples=1",
    "+validation.datasets.held_out={_target_: diffsynth.core.data.UnifiedDataset.from_folder, height: 32, width: 32}",
    f"+validation.datasets.held_out.path={tiny.dataset()}",
]


@pytest.mark.parametrize(
    "after, overrides",
    [
        (2, DROPOUT),  # when a checkpoint was written; the others one step later
        (3, ACCUMULATION),
        pytest.param(3, ["lora=none", "ema=power"], marks=pytest.mark.slow),
        pytest.param(3, ["optimizer=schedule_free", "ema=constant", "ema.decay=0.9"], marks=pytest.mark.slow),
    ],
    ids=["dropout", "accumulation, prodigy and ema.every=3", "full and ema=power", "schedule_free and ema=constant"],
)
def test_a_run_that_was_cut_off_goes_on_as_if_nothing_had_been(overrides, after, tmp_path):
    tiny.cut_off(after, tmp_path, *STEPS, *overrides)
    assert_same_run(tiny.train(tmp_path, *STEPS, *overrides), uninterrupted(*overrides))


@pytest.mark.parametrize("after", tiny.mostly_slow([1, 3], 3))
def test_a_run_that_is_evaluated_goes_on_with_its_pictures(after, tmp_path):
    tiny.cut_off(after, tmp_path, *STEPS, *DROPOUT, *EVALUATING)
    run_dir, evaluated = tiny.train(tmp_path, *STEPS, *DROPOUT, *EVALUATING), uninterrupted(*DROPOUT, *EVALUATING)
    assert_same_run(run_dir, evaluated)
    assert [line["step"] for line in tiny.metrics(run_dir) if "held_out_loss" in line] == [0, 2, 4, 5]
    assert pictures(run_dir) == pictures(evaluated) and len(pictures(run_dir)) == 5


def test_evaluating_a_run_with_dropout_changes_nothing():
    evaluated = uninterrupted(*DROPOUT, *EVALUATING)
    assert_close(final_weights(evaluated), final_weights(uninterrupted(*DROPOUT)), **EXACT)


@pytest.fixture
def cut_off_at_the_end(tmp_path):
    """The folder of a run that did all of its steps, but was cut off before it said so."""
    finished = uninterrupted(*DROPOUT)
    run_dir = shutil.copytree(finished, tmp_path / finished.name)
    (run_dir / "finished.json").unlink()
    return run_dir


def test_a_run_that_was_cut_off_at_its_very_end_only_finishes(cut_off_at_the_end, tmp_path):
    for name in ("mine.safetensors", ".partial-7-step-5.safetensors"):  # no artefacts of the run
        (cut_off_at_the_end / "weights" / name).touch()
    with tiny.in_step(5, lambda: pytest.fail("trains again")):
        assert tiny.train(tmp_path, *STEPS, *DROPOUT) == cut_off_at_the_end
    assert metrics(cut_off_at_the_end) == metrics(uninterrupted(*DROPOUT))
    assert artefacts(cut_off_at_the_end) == artefacts(uninterrupted(*DROPOUT))


def test_an_export_that_fails_leaves_the_checkpoint_of_its_step_and_is_made_up_for(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("no space left")

    overrides = ["max_steps=1", *EVALUATING, "export.keep_best=held_out_loss"]
    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space left"):
        patch.setattr(ModelLogger, "_write", fail)
        tiny.train(tmp_path, *overrides)
    assert [path.name for path in tmp_path.glob("*/checkpoints/step-*")] != []
    run_dir = tiny.train(tmp_path, *overrides)
    assert tiny.weights(run_dir) == ["best.json", "best.safetensors", "step-1.safetensors"]
    assert [line["step"] for line in tiny.metrics(run_dir)] == [0, 1]
    best = json.loads((run_dir / "weights" / "best.json").read_text())
    assert best["step"] == 1 and best["value"] == tiny.metrics(run_dir)[-1]["held_out_loss"]


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(cut_off_at_the_end, tmp_path):
    damaged = cut_off_at_the_end / "checkpoints" / "step-000005" / "weights-00000.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert_same_run(tiny.train(tmp_path, *STEPS, *DROPOUT), uninterrupted(*DROPOUT))


def test_a_run_does_not_go_on_with_another_data_set(cut_off_at_the_end, tmp_path, monkeypatch):
    monkeypatch.setattr(UnifiedDataset, "fingerprint", lambda dataset: "another")
    with pytest.raises(ValueError, match="was saved with another data set"):
        tiny.train(tmp_path, *STEPS, *DROPOUT)


def test_a_data_set_is_another_one_with_other_rows_or_files_but_not_in_another_place(tmp_path):
    def fingerprint(place: str, count: int = 8, size: int = 32, **rows) -> str:
        folder = tiny.write_dataset(tmp_path / place, count, size)
        if rows:
            tiny.write_rows(folder, [{"image": f"{number}.png", **rows} for number in range(count)])
        return UnifiedDataset(str(folder)).fingerprint()

    assert fingerprint("here") == fingerprint("there")
    others = [fingerprint("fewer", count=7), fingerprint("larger", size=33), fingerprint("said", prompt="otherwise")]
    assert len({fingerprint("again"), *others}) == 4


def test_a_run_may_go_on_with_other_micro_batches(tmp_path):
    tiny.cut_off(3, tmp_path, *STEPS, "logger.every=2", "micro_batch_size=1")
    run_dir = tiny.train(tmp_path, *STEPS, "logger.every=2", "micro_batch_size=2")
    assert_close(losses(run_dir), losses(uninterrupted("logger.every=2")), **CLOSE)
    assert_close(final_weights(run_dir), final_weights(uninterrupted("logger.every=2")), **CLOSE)


# Asked to stop --------------------------------------------------------------------------------------------------------


def train_and_signal_the_group(overrides: list[str]) -> None:
    """Train in a process group of its own, all of which is signalled in the third step, as Slurm does."""
    os.setpgrp()
    with tiny.in_step(3, lambda: os.killpg(0, signal.SIGTERM)):
        tiny.run(overrides)


def train_and_signal_the_second(number: int, overrides: list[str]) -> None:
    """Train in one of two ranks, the second of which is signalled in the third step."""
    with tiny.in_step(3, lambda: os.environ["RANK"] == "1" and os.kill(os.getpid(), number)):
        tiny.run(overrides)


def test_a_run_that_is_asked_to_stop_finishes_its_step_and_saves(tmp_path, caplog):
    with tiny.in_step(3, lambda: os.kill(os.getpid(), signal.SIGUSR1)), pytest.raises(Stopped) as stop:
        tiny.train(tmp_path, *STEPS, *DROPOUT)
    (run_dir,) = tmp_path.iterdir()
    assert stop.value.code == 75 and "Stopped after step 3; run the same command to resume" in caplog.text
    assert kept(run_dir) == [2, 3] and [line["step"] for line in tiny.metrics(run_dir)] == [1, 2, 3]
    assert not (run_dir / "finished.json").exists()


def test_a_run_whose_folder_another_process_has_taken_over_ends_before_it_writes(tmp_path):
    def take_over():
        (lock,) = locks._held.values()
        lock.lost = "is in use"

    try:
        with tiny.in_step(2, take_over), pytest.raises(FolderInUse, match="is in use"):
            tiny.train(tmp_path, *STEPS)
    finally:
        locks.release_all()
    (run_dir,) = tmp_path.iterdir()
    assert [line["step"] for line in tiny.metrics(run_dir)] == [1] and 2 not in kept(run_dir)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"])
def test_signals_are_heard_while_a_run_goes_on_and_left_alone_afterwards(name):
    number = getattr(signal, name)
    handler = signal.default_int_handler  # not the test's own: SIGHUP may be ignored
    before = signal.signal(number, handler)
    try:
        with stop_on_signals() as request:
            os.kill(os.getpid(), number)
            assert request.received == name
        assert signal.getsignal(number) == handler
    finally:
        signal.signal(number, before)


def test_a_run_that_nohup_started_outlives_its_terminal():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_on_signals() as request:
            os.kill(os.getpid(), signal.SIGHUP)
        assert request.received is None and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(("rank", "lines"), [("0", 1), ("1", 0)])
def test_an_interrupt_is_acknowledged_once_and_a_second_stops_at_once(rank, lines, monkeypatch, capfd):
    monkeypatch.setenv("RANK", rank)
    with stop_on_signals() as request, pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        assert request.received == "SIGINT"
        assert capfd.readouterr().err.count("Stopping after this step") == lines
        os.kill(os.getpid(), signal.SIGINT)
    assert capfd.readouterr().err == ""


def test_a_process_whose_whole_group_is_asked_to_stop_saves_and_says_that_it_wants_to_go_on(tmp_path):
    overrides = tiny.merged(tiny.train_overrides(tmp_path / "runs"), [*STEPS, *ACCUMULATION, "dataset.num_workers=1"])
    process = warm.start(train_and_signal_the_group, overrides, output=tmp_path / "said.txt")
    process.join()
    said = (tmp_path / "said.txt").read_text()
    assert process.exitcode == 75 and "Stopped after step 3; run the same command to resume." in said
    assert "Traceback" not in said  # nor from the worker, which hears the signal as well
    assert_same_run(tiny.train(tmp_path / "runs", *STEPS, *ACCUMULATION), uninterrupted(*ACCUMULATION))


KILLED = ["dataset.num_workers=2", *ACCUMULATION]
needs_sigkill = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")


def kill_a_worker() -> None:
    worker, *_ = multiprocessing.active_children()
    worker.kill()
    worker.join()


@needs_sigkill
def test_a_run_whose_worker_is_killed_finishes_its_step_and_saves(tmp_path):
    with tiny.in_step(3, kill_a_worker), pytest.raises(ChildProcessError) as error:
        tiny.train(tmp_path, *STEPS, *KILLED)
    (run_dir,) = tmp_path.iterdir()
    assert kept(run_dir) == [2, 3] and not multiprocessing.active_children()
    assert "was killed by SIGKILL" in str(error.value) and "a dataset.num_workers of less than 2" in str(error.value)
    assert "The state of step 3 is saved, and the same command resumes." in str(error.value)
    assert_same_run(tiny.train(tmp_path, *STEPS, *ACCUMULATION), uninterrupted(*ACCUMULATION))


def train_and_kill_a_worker_of_the_second(overrides: list[str]) -> None:
    """Train in one of two ranks, the second of which loses a worker in the third step."""
    with tiny.in_step(3, lambda: os.environ["RANK"] == "1" and kill_a_worker()), pytest.raises(ChildProcessError):
        tiny.run(overrides)


@needs_sigkill
@pytest.mark.slow
def test_all_processes_end_alike_where_one_lost_a_worker(tmp_path):
    overrides = tiny.merged(tiny.train_overrides(tmp_path / "runs"), [*STEPS, "dataset.num_workers=1"])
    assert warm.ranks(2, train_and_kill_a_worker_of_the_second, overrides) == [0, 0]
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert kept(run_dir) == [2, 4]  # the fourth step is the first that lacks a batch


ENDS = [(signal.SIGUSR1, [2, 3]), (signal.SIGKILL, [2])]


@pytest.mark.parametrize("end", tiny.mostly_slow(ENDS, ENDS[1]), ids=str)
def test_one_process_goes_on_where_two_were_stopped_or_killed(end, tmp_path):
    number, saved = end
    overrides = tiny.merged(tiny.train_overrides(tmp_path / "runs"), [*STEPS, "logger.every=2"])
    assert 0 not in warm.ranks(2, train_and_signal_the_second, number, overrides)
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert kept(run_dir) == saved
    assert tiny.train(tmp_path / "runs", *STEPS, "logger.every=2") == run_dir
    assert_close(losses(run_dir), losses(uninterrupted("logger.every=2")), **CLOSE)
    assert_close(final_weights(run_dir), final_weights(uninterrupted("logger.every=2")), **CLOSE)
