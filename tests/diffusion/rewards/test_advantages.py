"""Advantages: known answers, and what they must be whatever the scores."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from diffsynth.diffusion.rewards.advantages import EPSILON, advantages, combined

NAN = math.nan
EXAMPLE = torch.tensor([[0, 0, 1, 1], [0.8, 0.8, 0.8, 1], [0.5, 0.5, 0.5, 0.5]])
STDS = st.sampled_from(["group", "round", "none"])


@st.composite
def rounds(draw) -> Tensor:
    """Scores (P, G) of a round, one at least of which is no NaN."""
    groups, members = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    cell = st.just(NAN) | st.integers(-20, 20).map(lambda number: number / 4)
    cells = draw(st.lists(cell, min_size=groups * members, max_size=groups * members))
    cells[draw(st.integers(0, len(cells) - 1))] = 1.25
    return torch.tensor(cells).reshape(groups, members)


def close(found: Tensor, expected: list, tolerance: float = 2e-3) -> None:
    torch.testing.assert_close(found, torch.tensor(expected).float(), atol=tolerance, rtol=0)


def test_each_group_has_the_same_influence_with_its_own_deviation():
    found = advantages(EXAMPLE, "group")
    close(found.values, [[-1, -1, 1, 1], [-0.577, -0.577, -0.577, 1.732], [0, 0, 0, 0]])
    assert found[1:] == (0, 0, 1)


def test_a_wide_group_has_more_influence_with_the_rounds_deviation():
    found = advantages(EXAMPLE, "round")
    close(found.values, [[-1.487, -1.487, 1.487, 1.487], [-0.149, -0.149, -0.149, 0.446], [0, 0, 0, 0]])


def test_without_a_deviation_the_mean_alone_is_taken_off():
    close(advantages(EXAMPLE, "none").values, [[-0.5, -0.5, 0.5, 0.5], [-0.05, -0.05, -0.05, 0.15], [0] * 4], 1e-6)


@pytest.mark.parametrize("std", ["group", "round"])
def test_a_sample_without_a_score_has_no_part(std):
    found = advantages(torch.tensor([[1, NAN, 3]]), std)
    close(found.values, [[-1, 0, 1]])
    assert found[1:] == (1, 0, 0)


def test_groups_that_compare_nothing_are_counted():
    found = advantages(torch.tensor([[NAN, 7, NAN], [NAN, NAN, NAN], [0.1, 0.1, 0.1], [0, 1, 2]]))
    assert (found.values[:3] == 0).all() and found[1:] == (5, 1, 1)
    assert (advantages(torch.tensor([[3.0]])).values == 0).all()


def test_equal_scores_in_unequal_groups_do_not_become_large():
    assert (advantages(torch.full((3, 24), 0.1), "round").values == 0).all()


@pytest.mark.parametrize("score", [NAN, math.inf])
def test_a_round_without_any_score_is_an_error_that_names_the_reward(score):
    with pytest.raises(ValueError, match="ocr has scored none of the 6 pictures"):
        combined({"ocr": torch.full((2, 3), score)}, {"ocr": 1.0})


def test_an_unknown_deviation_is_refused():
    with pytest.raises(ValueError, match="std is 'batch'; expected group, round, none"):
        advantages(EXAMPLE, "batch")


@given(rounds(), STDS)
def test_advantages_are_finite_and_of_each_group_have_the_mean_0(scores, std):
    found = advantages(scores, std)
    assert found.values.shape == scores.shape and found.values.isfinite().all()
    assert found.values.sum(1).abs().max() < 1e-3
    assert (found.values[scores.isnan()] == 0).all() and found.unscored == scores.isnan().sum()


@given(rounds(), STDS, st.randoms())
def test_the_order_of_groups_and_members_does_not_count(scores, std, random):
    rows, columns = (random.sample(range(size), size) for size in scores.shape)
    found = advantages(scores[rows][:, columns], std)
    expected = advantages(scores, std)
    torch.testing.assert_close(found.values, expected.values[rows][:, columns], atol=1e-4, rtol=0)
    assert found[1:] == expected[1:]


@given(rounds(), st.sampled_from(["group", "round"]), st.integers(-50, 50))
def test_a_constant_added_to_all_scores_does_not_count(scores, std, shift):
    moved = advantages(scores + shift, std).values
    torch.testing.assert_close(moved, advantages(scores, std).values, atol=1e-3, rtol=0)


@given(rounds())
def test_a_groups_advantages_do_not_depend_on_other_groups(scores):
    alone = [advantages(row[None]).values[0] for row in scores if row.isfinite().any()]
    together = [own for own, row in zip(advantages(scores).values, scores, strict=True) if row.isfinite().any()]
    torch.testing.assert_close(torch.stack(together), torch.stack(alone))


def test_the_scale_of_a_reward_does_not_count_beside_others_but_its_weight_does():
    one, other = torch.tensor([[0.0, 1, 2]]), torch.tensor([[1000.0, 0, 2000]])
    total, each = combined({"one": one, "other": other}, {"one": 1.0, "other": -2.0})
    normalised = [scores.sub(scores.mean()) / (scores.std(correction=0) + EPSILON) for scores in (one, other)]
    torch.testing.assert_close(total, normalised[0] - 2 * normalised[1])
    torch.testing.assert_close(each["other"].values, normalised[1])


def test_what_one_reward_cannot_score_the_others_do():
    scores = {"one": torch.tensor([[NAN, 1, 2.0]]), "other": torch.tensor([[0, 1, 2.0]])}
    total, each = combined(scores, {"one": 1.0, "other": 1.0})
    assert total[0, 0] == each["other"].values[0, 0] and each["one"].unscored == 1


def test_advantages_are_clipped_on_both_sides():
    total, _ = combined({"one": torch.tensor([[0.0] * 63 + [1.0]])}, {"one": -5.0}, maximum=5.0)
    assert total.min() == -5 and 0 < total.max() < 1
