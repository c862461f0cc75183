"""Runs that train more than one role: cut off, accumulated, in several processes and averaged, as any other."""

import math

import pytest
import tiny
import warm
from resumed import assert_same_run, final_weights, metrics, uninterrupted
from torch.testing import assert_close

from diffsynth.training.checkpoint import load_part, read_checkpoint

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
DMD2 = ["task=distill/dmd2", "task.teacher=null", "task.student.num_inference_steps=2", "task.student_every=3"]
GAN = ["discriminator=heads", "task.discriminator.hidden=4"]
FULL = ["lora=none", "ema=constant", "ema.decay=0.5", "task.fake_score.rank=2"]
ROLES = {
    "adapters and discriminator": [*DMD2, *GAN, "micro_batch_size=2", "lr_scheduler=cosine"],
    "full student": [*DMD2, *FULL],
}


def trees(run_dir) -> dict:
    folder = run_dir / "checkpoints" / "step-000005"
    content = read_checkpoint(folder)
    return {name: load_part(folder, content, name) for name in content["parts"]}


@pytest.mark.parametrize("name", tiny.mostly_slow(ROLES, "adapters"))
def test_a_run_that_was_cut_off_in_a_phase_goes_on_as_if_nothing_had_been(name, tmp_path):
    overrides = [*ROLES[name], "max_steps=5", "checkpoint.every=1"]
    tiny.cut_off(2, tmp_path, *overrides)  # in the middle of a phase of the fake score
    assert_same_run(tiny.train(tmp_path, *overrides), uninterrupted(*ROLES[name], "checkpoint.every=1"))


def test_each_role_has_its_own_optimizer_and_schedule_which_count_its_own_steps():
    kept = trees(run_dir := uninterrupted(*ROLES["adapters and discriminator"], "checkpoint.every=1"))
    for prefix, count in {"": 2, "fake_score_": 3, "discriminator_": 3}.items():  # the student takes steps 0 and 3
        assert {int(state["step"]) for state in kept[f"{prefix}optimizer"]["state"].values()} == {count}
        assert kept[f"{prefix}schedule"]["last_epoch"] == count
    assert not kept["weights"].keys() & kept["fake_score_weights"].keys()
    assert not [name for name in final_weights(run_dir) if "fake_score" in name]


def test_losses_are_logged_by_who_is_trained():
    lines = metrics(uninterrupted(*ROLES["adapters and discriminator"], "checkpoint.every=1"))
    named = [("loss" in line, "fake_score_loss" in line) for line in lines]
    assert named == [(True, False), (False, True), (False, True), (True, False), (False, True)]
    assert all(math.isfinite(value) for line in lines for value in line.values())


def test_the_average_is_of_the_student_alone_and_moves_when_it_does():
    kept = trees(uninterrupted(*ROLES["full student"], "checkpoint.every=1"))
    assert len(kept["ema"]) == len(kept["weights"])
    moved = [(a - w).abs().max() for a, w in zip(kept["ema"], kept["weights"].values(), strict=True)]
    assert max(moved) > 0


@pytest.mark.slow
def test_two_processes_train_the_roles_that_one_does(tmp_path):
    plain = uninterrupted(*ROLES["adapters and discriminator"], "checkpoint.every=1")
    overrides = tiny.merged(tiny.train_overrides(tmp_path), [*ROLES["adapters and discriminator"], "max_steps=5"])
    assert warm.ranks(2, tiny.run, overrides) == [0, 0]
    (run_dir,) = tmp_path.iterdir()
    assert [line.keys() for line in metrics(run_dir)] == [line.keys() for line in metrics(plain)]
    assert_close(final_weights(run_dir), final_weights(plain), **CLOSE)
