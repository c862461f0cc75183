"""Runs of reward.py: rounds on disk, cut off and resumed, and what is refused before weights are read."""

import json
import math
import re
import signal
from types import SimpleNamespace
from unittest import mock

import kills
import pytest
import tiny
import torch
import warm
from miniatures import rewarded
from resumed import final_weights, metrics
from safetensors.torch import load_file
from torch.testing import assert_close

from diffsynth.diffusion.rewards import JpegSize, Symmetry
from diffsynth.training.rounds import Rounds, RoundSettings
from diffsynth.training.rounds.store import RoundStore

TASKS = ["nft", "awm", "rwr", "flow_grpo"]


def samples_of(run_dir, number: int) -> dict:
    """The files of a round, pictures as bytes and latents as tensors."""
    files = sorted((run_dir / "rounds" / f"round-{number:06d}").iterdir())
    return {f.name: load_file(f) if f.suffix == ".safetensors" else f.read_bytes() for f in files}


def assert_same_run(found, expected) -> None:
    assert metrics(found) == metrics(expected)
    assert_close(final_weights(found), final_weights(expected), rtol=0, atol=0)
    for number in (1, 2):
        ours, theirs = samples_of(found, number), samples_of(expected, number)
        assert ours.keys() == theirs.keys()
        for name, content in ours.items():
            assert_close(content, theirs[name], rtol=0, atol=0) if isinstance(content, dict) else None
            assert isinstance(content, dict) or content == theirs[name], name


def test_steps_have_the_probability_in_training_that_they_had_when_they_were_sampled(tmp_path):
    lines = metrics(rewarded.reward(tmp_path, "task=reward/flow_grpo", "rounds.levels=2", "optimizer.lr=1e-2"))
    trained = [line for line in lines if "loss" in line]
    assert trained[0]["log_prob_difference"] < 1e-6 < trained[3]["log_prob_difference"]
    assert trained[0]["clipped"] == 0


@pytest.mark.parametrize("task", tiny.mostly_slow(TASKS, "nft"))
def test_a_run_that_is_cut_off_while_it_samples_goes_on_to_the_bit(task, tmp_path):
    expected = rewarded.reward(tmp_path / "whole", f"task=reward/{task}", "checkpoint.every=1")
    overrides = [f"task=reward/{task}", "checkpoint.every=1"]
    write = RoundStore.write

    def cut(self, number, group, *others):
        write(self, number, group, *others)
        if (number, group) == (1, 0):
            raise tiny.PowerCut

    with mock.patch.object(RoundStore, "write", cut), pytest.raises(tiny.PowerCut):
        rewarded.reward(tmp_path / "cut", *overrides)
    with tiny.in_step(6, _power_cut), pytest.raises(tiny.PowerCut):  # in the middle of round 2
        rewarded.reward(tmp_path / "cut", *overrides)
    assert_same_run(rewarded.reward(tmp_path / "cut", *overrides), expected)


def _power_cut():
    raise tiny.PowerCut


def test_what_is_on_disk_is_not_sampled_again_unless_it_is_damaged(tmp_path):
    with tiny.in_step(1, _power_cut), pytest.raises(tiny.PowerCut):
        rewarded.reward(tmp_path)
    (run_dir,) = tmp_path.iterdir()
    first = run_dir / "rounds" / "round-000000" / "group-00000.safetensors"
    before = first.read_bytes()
    scored = mock.patch.object(JpegSize, "score", autospec=True, side_effect=JpegSize.score)
    with scored as calls, tiny.in_step(1, _power_cut), pytest.raises(tiny.PowerCut):
        rewarded.reward(tmp_path)
    assert calls.call_count == 1  # the evaluation's, of a held-out prompt
    first.write_bytes(before[:-1] + b"x")
    with scored as calls, tiny.in_step(1, _power_cut), pytest.raises(tiny.PowerCut):
        rewarded.reward(tmp_path)
    assert calls.call_count == 2  # of both groups of the batch, and the evaluation's
    assert first.read_bytes() == before


@pytest.mark.slow
def test_a_policy_trained_in_full_goes_on_to_the_bit(tmp_path):
    overrides = ["lora=none", "checkpoint.every=1", "optimizer.lr=1e-4"]
    expected = rewarded.reward(tmp_path / "whole", *overrides)
    with tiny.in_step(4, _power_cut), pytest.raises(tiny.PowerCut):  # `old` is between two rounds' weights
        rewarded.reward(tmp_path / "cut", *overrides)
    assert_same_run(rewarded.reward(tmp_path / "cut", *overrides), expected)


def test_prompts_whose_samples_differed_are_sampled_again_first():
    known = {"0": 0.5, "1": 0.0, "2": 2.0}
    state = SimpleNamespace(round={"spread": known})
    settings = RoundSettings(path="", prompts=3, curriculum=2)
    rounds = SimpleNamespace(settings=settings, prompts=SimpleNamespace(size=6), seed=0)
    assert set(Rounds._choose(rounds, state, 0)) == {3, 4, 5}  # those that were never sampled
    state.round["spread"] |= {"3": 0.1, "4": 0.0, "5": 1.0}
    assert Rounds._choose(rounds, state, 1) == [2, 5, 0]
    plain = SimpleNamespace(**{**vars(rounds), "settings": RoundSettings(path="", prompts=3)})
    assert sorted(Rounds._choose(plain, state, 0) + Rounds._choose(plain, state, 1)) == list(range(6))


def test_only_the_last_rounds_stay_and_each_leaves_its_picture(tmp_path):
    run_dir = rewarded.reward(tmp_path, "rounds.keep_last=1")
    names = sorted(path.name for path in (run_dir / "rounds").iterdir())
    pictures = [f"round-{number:06d}.png" for number in range(3)]
    assert names == [
        "held-out-000000.png",
        "held-out-000004.png",
        "held-out-000006.png",
        *pictures[:2],
        "round-000002",
        pictures[2],
    ]


def test_each_round_logs_its_rewards_and_evaluations_have_rewards_of_their_own(tmp_path):
    lines = metrics(rewarded.reward(tmp_path))
    rounds = [line for line in lines if "round" in line]
    assert [line["round"] for line in rounds] == [0, 1, 2]
    assert all({"reward_jpeg_size", "reward_jpeg_size_q50", "diversity"} <= line.keys() for line in rounds)
    evaluated = [line["step"] for line in lines if "evaluation_symmetry" in line]
    assert evaluated == [0, 4, 6]
    assert not [line for line in lines if "reward_symmetry" in line]
    assert all({"kl", "old_distance"} <= line.keys() for line in lines if "loss" in line)


def test_a_run_ends_where_its_samples_have_collapsed_and_exports_its_weights(tmp_path):
    run_dir = rewarded.reward(tmp_path, "guard.diversity=1.5")  # of the first round
    assert [line["step"] for line in metrics(run_dir)][-1] == 2
    assert len(tiny.weights(run_dir)) == 1
    assert (run_dir / "finished.json").exists()


def test_the_guard_lowers_the_learning_rate(tmp_path):
    lines = metrics(rewarded.reward(tmp_path, "guard.diversity=1.5", "guard.action=lower_rate", "optimizer.lr=1e-3"))
    rates = [line["lr"] for line in lines if "lr" in line]
    assert rates == pytest.approx([1e-3, 1e-3, 5e-4, 5e-4, 2.5e-4, 2.5e-4])


def test_a_run_ends_where_an_evaluation_reward_has_fallen(tmp_path):
    fallen = mock.patch.object(
        Symmetry, "score", side_effect=lambda pictures, *_: torch.full([len(pictures)], next(values))
    )
    values = iter([0.5, 0.29, 0.29, 0.29])
    with fallen:
        run_dir = rewarded.reward(tmp_path, "guard.evaluation={symmetry: 0.2}")
    assert [line["step"] for line in metrics(run_dir)][-1] == 4


def scoring(values):
    """Inside, `jpeg_size` returns `values(N)` for N pictures."""
    return mock.patch.object(JpegSize, "score", side_effect=lambda pictures, *_: values(len(pictures)))


def test_a_reward_gets_the_columns_of_the_table_as_plain_data(tmp_path):
    seen = []

    def score(pictures, prompts, rows, device):
        seen.extend(json.loads(json.dumps(rows)))  # as they are sent to a server
        return torch.arange(len(pictures))

    with mock.patch.object(JpegSize, "score", side_effect=score):
        rewarded.reward(tmp_path, "max_steps=2")
    assert all("image" not in row and row["prompt"] for row in seen) and seen


def test_a_sample_that_cannot_be_scored_is_counted_and_no_worse_for_it(tmp_path):
    def one_unknown(count: int) -> torch.Tensor:
        return torch.tensor([torch.nan, *range(count - 1)])

    with scoring(one_unknown):
        lines = metrics(rewarded.reward(tmp_path, "rounds.samples=4"))
    rounds = [line for line in lines if "round" in line]
    assert [line["reward_jpeg_size_unscored"] for line in rounds] == [2, 2]  # one of each prompt
    assert all(math.isfinite(value) for line in lines for value in line.values() if value is not None)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (lambda count: torch.full([count], torch.nan), "jpeg_size has scored none of the 4 pictures of a round"),
        (lambda count: torch.zeros(count + 1), r"reward.jpeg_size returned scores of the shape \(5,\) for 4 pictures"),
    ],
)
def test_a_reward_that_fails_ends_the_run_by_its_name(values, message, tmp_path):
    with scoring(values), pytest.raises(ValueError, match=message):
        rewarded.reward(tmp_path, "held_out=null")


@pytest.mark.parametrize("task", ["nft", "flow_grpo"])
def test_a_constant_reward_moves_nothing(task, tmp_path):
    with scoring(torch.ones):
        run_dir = rewarded.reward(tmp_path, f"task=reward/{task}", "optimizer.lr=1e-2")
    rounds = [line for line in metrics(run_dir) if "round" in line]
    assert all(line["reward_jpeg_size_constant_groups"] == 1 for line in rounds)
    ups = [tensor for name, tensor in final_weights(run_dir).items() if "lora_B" in name or "lora_up" in name]
    assert ups and max(up.abs().max().item() for up in ups) < 1e-6


REFUSED = {
    "a bound of a reward that is not evaluated": (["guard.evaluation={colour: 1}"], "guard.evaluation names colour"),
    "a task of another script": (["task=sft"], "FlowMatchSFT, which learns from a data set"),
    "a held-out prompt that is trained": (
        ["held_out.path=${prompts.path}"],
        "holds 3 prompts that .* as well, such as",
    ),
    "no reward": (["reward=none"], "There is no reward: choose one"),
    "one sample a prompt": (["rounds.samples=1"], r"rounds.samples is 1.*at least 2"),
    "a batch that does not divide a round": (
        ["batch_size=3"],
        r"A round trains 4 samples .*batch_size=3.*batch_size=2",
    ),
    "a text encoder": (["lora.models=[dit,text_encoder]"], "reward training trains dit alone"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_is_refused_before_weights_are_read(name, tmp_path):
    overrides, message = REFUSED[name]
    with (
        mock.patch("diffsynth.core.loader.load_weights", side_effect=AssertionError("weights are read")),
        pytest.raises(ValueError) as error,
    ):
        rewarded.reward(tmp_path, *overrides)
    assert re.search(message, str(error.value), re.DOTALL), error.value


# Processes ------------------------------------------------------------------------------------------------------------


def outcome(folder) -> dict:
    """Every exported tensor, sample and score, byte for byte, and every number of the curves that is not a time."""
    (run_dir,) = folder.iterdir()
    rounds = {f"{number} {name}": content for number in (1, 2) for name, content in samples_of(run_dir, number).items()}
    tensors = {name: value for name, value in rounds.items() if isinstance(value, dict)}
    tensors["weights"] = final_weights(run_dir)
    plain = {name: value for name, value in rounds.items() if not isinstance(value, dict)}
    exact = {f"{file} {key}": t.numpy().tobytes() for file, own in tensors.items() for key, t in own.items()}
    return {**exact, **plain, "metrics": metrics(run_dir)}


def work_in(output_root, *others: str) -> tuple:
    """A function and its arguments, for another process, that run `reward.py`; the prompts are this process's."""
    return tiny.run, tiny.merged(rewarded.overrides(output_root), others), "reward"


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_a_run_killed_at_any_moment_has_the_samples_scores_and_weights_of_one_that_was_not(tmp_path):
    def work(number: int | str) -> tuple:
        return work_in(tmp_path / f"run-{number}", "checkpoint.every=1")

    seconds = kills.duration(*work("unbroken"))
    for number in kills.survived(work, seconds, syncs=200):
        assert outcome(tmp_path / f"run-{number}") == outcome(tmp_path / "run-unbroken")


@pytest.mark.slow
def test_two_processes_sample_score_and_train_as_one_does(tmp_path):
    overrides = ["rounds.batch_size=2"]  # two groups of samples, one for each process
    one = rewarded.reward(tmp_path / "one", *overrides)
    assert warm.ranks(2, *work_in(tmp_path / "two", *overrides)) == [0, 0]
    (two,) = (tmp_path / "two").iterdir()
    assert_close(final_weights(two), final_weights(one), rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(metrics(two), metrics(one), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    for number in (1, 2):
        ours, theirs = samples_of(two, number), samples_of(one, number)
        latents = [name for name in ours if name.endswith(".safetensors")]
        assert ours.keys() == theirs.keys() and latents
        for name in latents:
            assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5)
