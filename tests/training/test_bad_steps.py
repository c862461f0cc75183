"""A step whose gradient is not finite is skipped and written down; too many in a row end the run."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import tiny
import torch
from safetensors.torch import load_file

from diffsynth.core.data import MixedOrder, WeightedRows
from diffsynth.diffusion.training_module import PipelineTrainingModule
from diffsynth.training.state import TrainingState

OVERRIDES = ["max_steps=5", "micro_batch_size=2", "export.save_steps=1", "checkpoint.every=3", "max_bad_steps=2"]
OVERRIDES += ["seed=2"]  # with which a row is in steps 2 and 4 alone


def addresses(step: int) -> list:
    """The four samples of an optimizer step, counted from 1, of a run over eight rows."""
    order = MixedOrder([[WeightedRows(range(8))]], 4, seed=2)
    return [order.sample(position) for position in range(4 * step - 4, 4 * step)]


def steps_of(row: int) -> list[int]:
    return [step for step in range(1, 6) if row in [address.index for address in addresses(step)]]


ROW = next(row for row in range(8) if steps_of(row) == [2, 4])


@contextmanager
def poisoned(*rows: int) -> Iterator[None]:
    """The loss of these rows is NaN while the block runs."""
    forward = PipelineTrainingModule.forward

    def poisoned_forward(module, samples):
        bad = torch.tensor([sample.index in rows for sample in samples])
        return forward(module, samples) * torch.where(bad, math.nan, 1.0)

    with mock.patch.object(PipelineTrainingModule, "forward", poisoned_forward):
        yield


def written_down(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "bad_steps.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """The folder of a run with a row whose loss is NaN, cut off after the second bad step and taken up before it."""
    output_root = tmp_path_factory.mktemp("bad_steps")
    with poisoned(ROW):
        tiny.cut_off(4, output_root, *OVERRIDES)
        return tiny.train(output_root, *OVERRIDES)


def test_the_weights_of_a_step_that_is_not_finite_are_not_exported(run_dir):
    assert tiny.weights(run_dir) == [f"step-{step}.safetensors" for step in (1, 3, 5)]


def test_steps_that_are_not_finite_are_counted_but_not_in_the_mean(run_dir):
    lines = tiny.metrics(run_dir)
    assert [line.get("skipped_steps", 0) for line in lines] == [0, 1, 1, 2, 2]
    assert [math.isfinite(line["loss"]) if "loss" in line else None for line in lines] == [True, None, True, None, True]


def test_steps_that_are_not_finite_are_written_down_once_with_their_samples(run_dir):
    steps = written_down(run_dir)
    assert [step["step"] for step in steps] == [2, 4]
    for step in steps:
        assert [(sample["epoch"], sample["index"]) for sample in step["samples"]] == addresses(step["step"])
        assert [sample["index"] for sample in step["samples"] if sample["loss"] is None] == [ROW]


def test_too_many_such_steps_in_a_row_end_the_run_and_name_the_rows(tmp_path, monkeypatch):
    with poisoned(*range(8)), pytest.raises(SystemExit) as exit:
        tiny.command_line(monkeypatch, "train.py", *tiny.merged(tiny.train_overrides(tmp_path), OVERRIDES))
    rows = sorted(address.index for address in addresses(2))
    assert f"error: 2 steps in a row had a gradient that is not finite. The last one, step 2, had the rows {rows}" in (
        str(exit.value)
    )
    (run_dir,) = tmp_path.iterdir()
    assert f"in {run_dir}/bad_steps.jsonl" in str(exit.value) and "max_bad_steps is 2" in str(exit.value)
    assert [step["step"] for step in written_down(run_dir)] == [1, 2]
    assert not (run_dir / "finished.json").exists()


# Weights that are not finite ------------------------------------------------------------------------------------------


@contextmanager
def diverging(after: int) -> Iterator[None]:
    """The weights are NaN after this many steps, whose gradients are finite, of runs in this block."""
    update = TrainingState.update

    def update_to_nan(state, max_grad_norm):
        taken = update(state, max_grad_norm)
        if state.step == after:
            state.main.all[0].data.fill_(math.nan)
        return taken

    with mock.patch.object(TrainingState, "update", update_to_nan):
        yield


SAVED_OFTEN = ["checkpoint.every=1", "checkpoint.keep_last=1", "export.save_steps=1", "max_bad_steps=2"]


@pytest.mark.parametrize(
    "steps, fault",
    [(9, "2 steps in a row had a gradient that is not finite"), (2, "The weights of step 2 are not finite")],
    ids=["too many bad steps", "the last step"],
)
def test_weights_that_diverge_replace_none_that_did_not(steps, fault, tmp_path):
    with diverging(after=2), pytest.raises(FloatingPointError, match=f"{fault}.*newest checkpoint, of step 1, is kept"):
        tiny.train(tmp_path, *SAVED_OFTEN, f"max_steps={steps}")
    (run_dir,) = tmp_path.iterdir()
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step-000001"]
    assert tiny.weights(run_dir) == ["step-1.safetensors"]
    assert not (run_dir / "finished.json").exists()


def test_a_bad_step_leaves_the_weights_as_they_are_and_at_the_end_they_are_saved_beside_the_good_ones(tmp_path):
    with poisoned(*(address.index for address in addresses(2))):
        run_dir = tiny.train(tmp_path, *SAVED_OFTEN, "seed=2", "max_steps=2")
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["step-000001", "step-000002"]
    weights = [load_file(run_dir / "weights" / f"step-{step}.safetensors") for step in (1, 2)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
