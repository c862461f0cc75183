"""Which frames a clip takes, as statements about all videos: resampling, starts, numbers of frames, buckets."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from diffsynth.core.data.operators.video import ROUNDING, Frame, resample
from diffsynth.core.data.order.buckets import AspectBuckets
from diffsynth.core.data.order.row_index import SortedRows
from diffsynth.core.data.video_dataset import start_of
from diffsynth.core.data.videos.buckets import ClipBuckets, ClipLengths
from diffsynth.core.data.videos.times import FrameTimes

lengths = st.lists(st.integers(1, 40), min_size=1, max_size=30)  # of frames, in units
units = st.sampled_from([Fraction(1, 1000), Fraction(1, 24), Fraction(1001, 24000), Fraction(1, 90000)])
rates = st.sampled_from([0.5, 1, 8, 15, 16, 23.976, 24, 29.97, 30, 60])


def times_of(durations: list[int], unit: Fraction, start: int = 0) -> FrameTimes:
    ends = start + np.cumsum(durations)
    return FrameTimes(ends - durations, int(ends[-1]), unit)


@given(lengths, units, rates, st.integers(-5, 100))
@example([42], Fraction(1, 1000), 24, 0)  # Matroska rounds 1/24 s to whole milliseconds
def test_frames_are_those_that_resampling_decoded_frames_gives(durations, unit, rate, start):
    """`resample` walks over decoded frames; the numbers follow from the times alone."""
    times = times_of(durations, unit, start)
    starts = [int(time) for time in times.starts]
    ends = [*starts[1:], times.end]
    image = Image.new("L", (1, 1))
    frames = [Frame(begin * unit, end * unit, image) for begin, end in zip(starts, ends, strict=True)]
    walked = [starts.index(int(frame.start / unit)) for frame in resample(iter(frames), rate)]
    assert times.at(rate, 0, times.ticks(rate)) == walked


@given(lengths, units, rates)
def test_each_tick_shows_the_frame_that_is_on_the_screen(durations, unit, rate):
    times = times_of(durations, unit)
    count = times.ticks(rate)
    numbers = times.at(rate, 0, count)
    assert numbers == sorted(numbers) and numbers[0] == 0
    for tick, number in enumerate(numbers[1:], 1):
        time = tick / Fraction(rate) + ROUNDING
        assert times.starts[number] * unit <= time
        assert number + 1 == len(durations) or time < times.starts[number + 1] * unit


@given(lengths, units, rates, st.data())
def test_a_part_of_a_video_is_that_part_of_all_its_frames(durations, unit, rate, data):
    times = times_of(durations, unit)
    total = min(times.ticks(rate), 500)
    first = data.draw(st.integers(0, total - 1))
    count = data.draw(st.integers(1, total - first))
    assert times.at(rate, first, count) == times.at(rate, 0, total)[first : first + count]


@given(st.integers(1, 10_000), st.integers(1, 10_000), st.floats(0, 1, exclude_max=True) | st.none())
def test_a_clip_lies_within_its_video(available, count, position):
    start = start_of(available, count, position)
    assert 0 <= start <= max(0, available - count)


def test_starts_are_spread_evenly_over_the_whole_video():
    starts = [start_of(10, 5, number / 600) for number in range(600)]
    assert [starts.count(start) for start in range(6)] == [100] * 6
    assert [start_of(available, 5, None) for available in (5, 6, 7, 8, 9, 10)] == [0, 1, 1, 2, 2, 3]


numbers_of_frames = st.lists(st.integers(0, 40).map(lambda n: 4 * n + 1), min_size=1, max_size=4)


@given(numbers_of_frames, st.integers(1, 200))
def test_a_video_gets_the_largest_number_of_frames_that_it_fills(numbers, available):
    wanted = ClipLengths(numbers)
    if available < min(numbers):
        with pytest.raises(ValueError, match=f"has {available} frame.*, expected {min(numbers)}; take a longer video"):
            wanted.choose(available)
    else:
        assert wanted.choose(available) == max(number for number in numbers if number <= available)


@given(st.integers(1, 500), st.sampled_from([1, 4, 8]))
def test_numbers_of_frames_are_one_more_than_a_multiple(number, factor):
    if number % factor == 1 % factor:
        assert ClipLengths(number, factor).num_frames == (number,)
    else:
        with pytest.raises(ValueError, match=r"set dataset.num_frames=(\d+) or (\d+)") as error:
            ClipLengths(number, factor)
        below, above = (int(word) for word in str(error.value).rpartition("=")[2].split(" or "))
        assert below < number < above == below + factor and ClipLengths(below, factor) and ClipLengths(above, factor)


sides = st.integers(64, 2000)
videos = st.lists(st.tuples(sides, sides, st.integers(1, 200)), min_size=1, max_size=20)


@given(videos, st.sampled_from([None, (832, 480)]))
def test_each_video_is_in_one_bucket_for_each_budget_and_a_bucket_holds_one_shape(found, fixed):
    buckets = ClipBuckets(ClipLengths([1, 17, 81]), AspectBuckets([128 * 128, 256 * 256], upscale=True), fixed)
    rows = SortedRows.of(buckets, enumerate(found))
    by_size = rows.by_size()
    assert sorted(number for numbers in by_size.values() for number in numbers) == list(range(len(rows)))
    assert len(rows) == len(found) * (1 if fixed else 2)
    for size, numbers in by_size.items():
        width, height, frames = size
        assert width % 16 == height % 16 == 0 and frames in (1, 17, 81)
        for number in numbers:
            assert rows.size_of(number) == size
            assert frames == max(n for n in (1, 17, 81) if n <= found[rows.rows[number]][2])
