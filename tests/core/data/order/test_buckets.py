from math import log

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from diffsynth.core.data.order.buckets import AspectBuckets, is_upscaled, kept

SIDES = st.integers(1, 20_000)
FACTORS = st.sampled_from([1, 8, 16, 32, 64])
CELLS = st.integers(1, 5000)
MEGAPIXEL = 1024 * 1024


@st.composite
def buckets_of_one_budget(draw, cells=CELLS):
    factor = draw(FACTORS)
    budget = draw(cells) * factor**2 + draw(st.integers(0, factor**2 - 1))
    return AspectBuckets(budget, factor, draw(st.floats(1, 4))), budget


@given(buckets_of_one_budget())
def test_buckets_are_multiples_of_the_factor_within_the_limits(made):
    buckets, budget = made
    sizes, factor = buckets.sizes(budget), buckets.division_factor
    assert len(set(sizes)) == len(sizes) > 0
    for width, height in sizes:
        assert width % factor == height % factor == 0
        assert max(width, height) <= buckets.max_aspect * min(width, height)
        assert width * height <= budget
        long, short = max(width, height) + factor, min(width, height)
        grown = long * (short + factor if width == height else short)
        assert grown > budget


@given(buckets_of_one_budget(cells=st.integers(81, 5000)))
def test_buckets_use_their_budget(made):
    buckets, budget = made
    assert all(width * height >= 0.8 * budget for width, height in buckets.sizes(budget))


@given(buckets_of_one_budget(), SIDES, SIDES)
def test_chosen_bucket_has_the_nearest_aspect_ratio(made, width, height):
    buckets, budget = made
    distances = {size: abs(log(width / height) - log(size[0] / size[1])) for size in buckets.sizes(budget)}
    chosen = buckets.choose(width, height, budget)
    assert distances[chosen] == pytest.approx(min(distances.values()), abs=1e-9)


@given(buckets_of_one_budget(), SIDES, SIDES)
def test_turned_image_gets_the_turned_bucket(made, width, height):
    buckets, budget = made
    assert buckets.choose(height, width, budget) == buckets.choose(width, height, budget)[::-1]


@given(buckets_of_one_budget())
def test_bucket_is_its_own_bucket(made):
    buckets, budget = made
    assert all(buckets.choose(*size, budget) == size for size in buckets.sizes(budget))


@given(buckets_of_one_budget(cells=st.integers(64, 5000)), st.integers(100, 20_000), st.integers(100, 20_000))
def test_image_within_the_limits_is_hardly_cropped(made, width, height):
    buckets, budget = made
    assume(max(width, height) <= buckets.max_aspect * min(width, height))
    bucket = buckets.choose(width, height, budget)
    assert 1 - kept(width, height, bucket) <= 3 * buckets.division_factor / min(bucket)


def test_sizes_at_a_megapixel_are_those_of_sdxl():
    landscape = [(512, 2048), (576, 1792), (640, 1600), (704, 1472), (768, 1344), (832, 1216), (896, 1152), (960, 1088)]
    sizes = AspectBuckets(MEGAPIXEL, division_factor=64, max_aspect=4).sizes(MEGAPIXEL)
    assert sizes == [*landscape, (1024, 1024), *((width, height) for height, width in reversed(landscape))]


def test_photograph_gets_its_usual_size():
    buckets = AspectBuckets(MEGAPIXEL, division_factor=64)
    assert buckets.choose(6000, 4000, MEGAPIXEL) == (1216, 832)
    assert kept(6000, 4000, (1216, 832)) == pytest.approx(0.974, abs=1e-3)


def test_enlargement_by_the_grid_alone_does_not_count():
    assert not is_upscaled(1024, 1024, (1024, 1024))
    assert not is_upscaled(1000, 1048, (1008, 1040))
    assert is_upscaled(960, 2000, (1024, 1024))
    assert is_upscaled(2000, 960, (1024, 1024))


@given(
    st.sets(st.integers(256, MEGAPIXEL), min_size=1, max_size=4),
    st.booleans(),
    st.integers(1, 3000),
    st.integers(1, 3000),
)
def test_every_image_is_shown_at_each_budget_that_it_fills_or_at_the_smallest(budgets, upscale, width, height):
    buckets = AspectBuckets(list(budgets), upscale=upscale)
    shown = buckets.assign(width, height)
    chosen = {budget: buckets.choose(width, height, budget) for budget in budgets}
    filled = {budget for budget in budgets if not is_upscaled(width, height, chosen[budget])}
    assert set(shown) == (budgets if upscale else filled or {min(budgets)})
    assert all(bucket == chosen[budget] for budget, bucket in shown.items())


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"max_pixels": 255}, "max_pixels=255: .* at least 256 pixels, one patch of division_factor=16"),
        ({"max_pixels": []}, "set one budget or several"),
        ({"max_pixels": [MEGAPIXEL, 100]}, "at least 256 pixels"),
        ({"max_aspect": 0.5}, "max_aspect=0.5 is long side over short side"),
    ],
)
def test_limits_that_leave_no_bucket_are_refused(numbers, message):
    with pytest.raises(ValueError, match=message):
        AspectBuckets(**numbers)
