import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffsynth.core.data import BatchLayout, BatchSampler, SampleOrder, generator, permutation, sample_seed

SIZES = st.integers(1, 2000)
KEYS = st.tuples(st.integers(0, 2**63), st.integers(0, 10**6))


@given(SIZES, KEYS)
def test_permutation_is_a_bijection(size, key):
    assert sorted(permutation(position, size, key) for position in range(size)) == list(range(size))


def test_permutation_reaches_ten_billion_samples_without_duplicates():
    size = 10**10
    images = [permutation(position, size, (7, 0)) for position in range(size - 1000, size)]
    assert len(set(images)) == 1000
    assert all(0 <= image < size for image in images)
    assert size / 4 < sum(images) / 1000 < 3 * size / 4


def test_permutations_of_a_small_range_are_about_equally_frequent():
    counts = {}
    for epoch in range(6000):
        order = tuple(permutation(position, 3, (0, epoch)) for position in range(3))
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 6
    assert all(abs(count - 1000) < 150 for count in counts.values())  # five standard deviations


def test_order_never_changes_between_releases():
    assert [permutation(position, 10, (0, 0)) for position in range(10)] == [5, 8, 4, 3, 9, 6, 7, 1, 2, 0]
    assert sample_seed(0, "noise", 0, 0) == 468399002398389485


def test_epochs_and_seeds_have_orders_of_their_own():
    order = SampleOrder(100, seed=0)
    epochs = [[order.sample(100 * epoch + position).index for position in range(100)] for epoch in range(3)]
    other_seed = [SampleOrder(100, seed=1).sample(position).index for position in range(100)]
    assert len({tuple(indices) for indices in [*epochs, other_seed, range(100)]}) == 5
    assert [order.sample(position).epoch for position in (0, 99, 100, 250)] == [0, 0, 1, 2]


def test_order_of_nothing_is_refused():
    with pytest.raises(ValueError, match="size=0"):
        SampleOrder(0, seed=0)


@given(
    world_size=st.integers(1, 5),
    micro_batch_size=st.integers(1, 4),
    accumulation=st.integers(1, 3),
    size=st.integers(1, 50),
    start_step=st.integers(0, 5),
)
def test_any_layout_trains_on_the_same_global_batches(world_size, micro_batch_size, accumulation, size, start_step):
    batch_size, num_steps = world_size * micro_batch_size * accumulation, 3
    order, plan = SampleOrder(size, seed=3), BatchLayout(batch_size, micro_batch_size, world_size)
    ranks = [list(BatchSampler(order, plan, rank, start_step, num_steps)) for rank in range(world_size)]
    for step in range(num_steps):
        micro_steps = slice(step * accumulation, (step + 1) * accumulation)
        found = [address for batches in ranks for batch in batches[micro_steps] for address in batch]
        first = (start_step + step) * batch_size
        assert sorted(found) == sorted(order.sample(position) for position in range(first, first + batch_size))
        assert all(len(batch) == micro_batch_size for batches in ranks for batch in batches)


@given(start_step=st.integers(0, 9), rank=st.integers(0, 1))
def test_seeking_equals_skipping(start_step, rank):
    order, plan = SampleOrder(17, seed=0), BatchLayout(12, 2, world_size=2)
    whole = list(BatchSampler(order, plan, rank, start_step=0, num_steps=10))
    rest = BatchSampler(order, plan, rank, start_step, num_steps=10 - start_step)
    assert list(rest) == whole[start_step * plan.accumulation :]
    assert len(rest) == (10 - start_step) * plan.accumulation


def test_rank_beyond_the_world_is_refused():
    with pytest.raises(ValueError, match="rank=2 is not one of the 2 devices"):
        BatchSampler(SampleOrder(5, seed=0), BatchLayout(4, 1, world_size=2), 2, 0, 1)


def test_micro_batch_is_by_default_all_that_a_device_has():
    plan = BatchLayout(12, world_size=3)
    assert (plan.micro_batch_size, plan.accumulation) == (4, 1)
    assert BatchLayout(12, 2, 3).accumulation == 2


@pytest.mark.parametrize(
    ("numbers", "remedy"),
    [
        ((12, 5, 2), "set batch_size=10 or 20, or micro_batch_size to one of 1, 2, 3, 6"),
        ((10, 2, 4), "set batch_size=8 or 16; no micro_batch_size fits 10 on 4 devices"),
        ((10, None, 4), "set batch_size=8 or 12; no micro_batch_size fits 10 on 4 devices"),
        ((2, 1, 4), "set batch_size=4;"),
        ((0, 1, 1), "every number must be at least 1"),
        ((4, 0, 1), "every number must be at least 1"),
    ],
)
def test_plan_that_is_not_whole_names_the_numbers_that_fit(numbers, remedy):
    with pytest.raises(ValueError, match=remedy) as error:
        BatchLayout(*numbers)
    batch_size, micro_batch_size, devices = numbers
    message = str(error.value)
    assert f"batch_size={batch_size} " in message and f" {devices} device(s)" in message
    assert micro_batch_size is None or re.search(rf"micro(-batches of |_batch_size=){micro_batch_size}\b", message)
    assert "BatchLayout(" not in message


def test_randomness_of_a_sample_depends_on_each_part_of_its_key():
    keys = [(0, "noise", 0, 0), (1, "noise", 0, 0), (0, "timestep", 0, 0), (0, "noise", 1, 0), (0, "noise", 0, 1)]
    assert len({sample_seed(*key) for key in keys}) == len(keys)
    noises = [torch.randn(4, generator=generator(*key)) for key in keys]
    assert all(not torch.equal(noises[0], noise) for noise in noises[1:])
    assert torch.equal(noises[0], torch.randn(4, generator=generator(*keys[0])))
    assert all(0 <= sample_seed(*key) < 2**64 for key in keys)
