import tracemalloc
from collections import Counter
from fractions import Fraction
from itertools import count, islice
from math import ceil, floor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffsynth.core.data import BatchLayout, BatchSampler
from diffsynth.core.data.order.mixing import MixedOrder, WeightedRows, exact

SHARES = st.sampled_from([0.1, 0.3, 0.5, 1.7, 2.5, Fraction(1, 3)])
WEIGHTS = SHARES | st.integers(1, 3)
SEEDS = st.integers(0, 2**63)
PASSES_TAKE_TIME = settings(max_examples=50)


@st.composite
def tables(draw, weights=WEIGHTS):
    """Buckets of parts whose indices are numbered through, as over concatenated data sets."""
    indices = count()
    parts = st.lists(st.tuples(st.integers(1, 8), weights), min_size=1, max_size=3)
    table = draw(st.lists(parts, min_size=1, max_size=3))
    return [[WeightedRows(list(islice(indices, size)), weight) for size, weight in parts] for parts in table]


def batches_of(order, start, stop):
    size = order.batch_size
    return [[order.sample(step * size + slot) for slot in range(size)] for step in range(start, stop)]


def bucket_of(batch, buckets) -> int:
    """The one bucket that a batch is from."""
    (found,) = {
        number
        for number, parts in enumerate(buckets)
        for address in batch
        if any(address.index in p.rows for p in parts)
    }
    return found


@PASSES_TAKE_TIME
@given(tables(), st.integers(1, 5), SEEDS, st.integers(0, 9))
def test_every_batch_is_of_one_bucket_and_every_bucket_gets_its_share_of_each_epoch(buckets, batch_size, seed, number):
    order = MixedOrder(buckets, batch_size, seed)
    batches = batches_of(order, order.steps_of(number), order.steps_of(number + 1))
    counts = Counter(bucket_of(batch, buckets) for batch in batches)
    for bucket, parts in enumerate(buckets):
        share = sum(exact(part.weight) * len(part.rows) for part in parts) / batch_size
        assert counts[bucket] == ceil((number + 1) * share) - ceil(number * share)


@PASSES_TAKE_TIME
@given(tables(), st.integers(1, 5), SEEDS)
def test_epochs_show_every_sample_as_often_as_its_weight_says(buckets, batch_size, seed):
    order, epochs = MixedOrder(buckets, batch_size, seed), 2
    counts = Counter(a.index for batch in batches_of(order, 0, order.steps_of(epochs)) for a in batch)
    for parts in buckets:
        due = [floor(epochs * exact(part.weight) * len(part.rows)) for part in parts]
        for part, samples in zip(parts, due, strict=True):
            assert min(counts[index] for index in part.rows) >= samples // len(part.rows)
            assert sum(counts[index] for index in part.rows) >= samples
        # No more than it takes to fill a batch, and what all the shares together have over.
        assert 0 <= sum(counts[index] for part in parts for index in part.rows) - sum(due) < batch_size + len(parts)


@PASSES_TAKE_TIME
@given(tables(st.integers(1, 3)), SEEDS, st.integers(0, 10**15))
def test_whole_weights_and_batches_make_every_pass_exact(buckets, seed, number):
    order = MixedOrder(buckets, 1, seed)
    shown = Counter(
        a.index for batch in batches_of(order, order.steps_of(number), order.steps_of(number + 1)) for a in batch
    )
    assert shown == {index: part.weight for parts in buckets for part in parts for index in part.rows}


@PASSES_TAKE_TIME
@given(tables(), st.integers(1, 5), SEEDS)
def test_addresses_never_repeat(buckets, batch_size, seed):
    order = MixedOrder(buckets, batch_size, seed)
    addresses = [order.sample(position) for position in range(50)]
    assert len(set(addresses)) == len(addresses)


@given(st.integers(1, 60), st.integers(1, 8), SEEDS, st.integers(0, 10**6))
def test_one_bucket_of_one_data_set_is_shuffled_epoch_by_epoch(size, batch_size, seed, epochs):
    order = MixedOrder([[WeightedRows(range(size))]], batch_size, seed)
    assert order.steps_of(epochs) == ceil(epochs * size / batch_size)
    first = [a for batch in batches_of(order, 0, order.steps_of(1)) for a in batch]
    assert sorted(a.index for a in first if a.epoch == 0) == list(range(size))
    assert len(first) - size < batch_size


def test_the_epoch_of_an_address_numbers_the_times_that_its_sample_is_shown():
    order = MixedOrder([[WeightedRows(range(10), 2)], [WeightedRows(range(10, 15))]], 5, seed=0)
    shown = [address for batch in batches_of(order, 0, order.steps_of(3)) for address in batch]
    for index in range(15):
        assert sorted(a.epoch for a in shown if a.index == index) == list(range(6 if index < 10 else 3))


def test_weight_of_two_and_a_half_shows_each_sample_twice_or_thrice():
    order = MixedOrder([[WeightedRows(range(10), 2.5), WeightedRows(range(10, 40))]], 1, seed=0)
    for number in range(4):
        counts = Counter(order.sample(position).index for position in range(55 * number, 55 * (number + 1)))
        assert Counter(counts[index] for index in range(10)) == {2: 5, 3: 5}
        assert all(counts[index] == 1 for index in range(10, 40))


def test_weight_of_a_tenth_shows_another_tenth_in_each_epoch():
    order = MixedOrder([[WeightedRows(range(100), 0.1), WeightedRows(range(100, 110))]], 4, seed=0)
    epochs = [{order.sample(position).index for position in range(20 * n, 20 * (n + 1))} for n in range(10)]
    assert all(len(shown) == 20 for shown in epochs)
    assert set.union(*epochs) == set(range(110))


@given(tables(), st.integers(1, 5), SEEDS, st.integers(0, 10**20))
def test_step_is_in_the_pass_whose_steps_enclose_it(buckets, batch_size, seed, step):
    order = MixedOrder(buckets, batch_size, seed)
    number = order.epoch_of(step)
    assert order.steps_of(number) <= step < order.steps_of(number + 1)


def test_epochs_may_be_broken_and_count_as_they_are_written():
    order = MixedOrder([[WeightedRows(range(10))]], 1, seed=0)
    assert [order.steps_of(epochs) for epochs in (0, 0.1, 0.3, 1.5, 7)] == [0, 1, 3, 15, 70]
    assert MixedOrder([[WeightedRows(range(10), 0.3)]], 1, seed=0).steps_of(10) == 30


def test_epochs_and_seeds_have_orders_of_their_own_in_which_buckets_take_turns():
    buckets = [[WeightedRows(range(50))], [WeightedRows(range(50, 75)), WeightedRows(range(75, 100))]]
    epochs = [
        tuple(order.sample(position).index for position in range(start, start + 100))
        for order in (MixedOrder(buckets, 5, seed=0), MixedOrder(buckets, 5, seed=1))
        for start in (0, 100, 10**9)
    ]
    assert len(set(epochs)) == 6
    assert all(sorted(order) == list(range(100)) for order in epochs)
    turns = [[index < 50 for index in order[::5]] for order in epochs]
    assert len(set(map(tuple, turns))) == 6
    assert all(sum(a != b for a, b in zip(order, order[1:], strict=False)) > 3 for order in turns)


@PASSES_TAKE_TIME
@given(tables(), st.integers(1, 3), st.integers(1, 2), SEEDS, st.integers(0, 10**12))
def test_any_number_of_processes_trains_on_the_same_batches(buckets, world_size, accumulation, seed, start):
    order = MixedOrder(buckets, 2 * world_size * accumulation, seed)
    plan = BatchLayout(order.batch_size, 2, world_size)
    ranks = [BatchSampler(order, plan, rank, start, 2).step(start) for rank in range(world_size)]
    assert sorted(a for batches in ranks for batch in batches for a in batch) == sorted(
        batches_of(order, start, start + 1)[0]
    )


def test_seeking_in_ten_billion_samples_takes_no_time_and_no_memory():
    sizes = [10**10, 3, 10**9, 1]
    starts = [sum(sizes[:number]) for number in range(4)]
    parts = [
        WeightedRows(range(start, start + size), w)
        for start, size, w in zip(starts, sizes, (1, 2.5, 0.1, 7), strict=True)
    ]
    order = MixedOrder([parts[:2], parts[2:]], 64, seed=0)
    tracemalloc.start()
    addresses = {order.sample(position * 10**10 + slot) for position in (0, 1, 12345, 10**12) for slot in range(50)}
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(addresses) == 200
    assert peak < 200_000
    assert order.steps_of(64) == 10**10 + 8 + 10**8 + 7


def test_rows_may_be_an_array():
    order = MixedOrder([[WeightedRows(np.array([7, 3, 5]))]], 3, seed=0)
    indices = [order.sample(position).index for position in range(3)]
    assert sorted(indices) == [3, 5, 7]
    assert all(type(index) is int for index in indices)


def test_mixed_order_never_changes_between_releases():
    order = MixedOrder(
        [[WeightedRows(range(3)), WeightedRows(range(3, 5), 0.5)], [WeightedRows(range(5, 9))]], 2, seed=0
    )
    assert [order.sample(position) for position in range(8)] == [
        (0, 7),
        (0, 5),
        (0, 0),
        (0, 2),
        (0, 8),
        (0, 6),
        (0, 4),
        (0, 1),
    ]


@pytest.mark.parametrize(("rows", "weight"), [([], 1), ([1], 0), ([1], -2)])
def test_data_set_with_nothing_to_show_is_refused(rows, weight):
    with pytest.raises(ValueError, match=f"weight={weight} of {len(rows)} rows: .* leave out a data set"):
        WeightedRows(rows, weight)


@pytest.mark.parametrize("buckets", [[], [[]], [[WeightedRows([1])], []]])
def test_empty_bucket_is_refused(buckets):
    with pytest.raises(ValueError, match="leave out buckets without images"):
        MixedOrder(buckets, 1, seed=0)
