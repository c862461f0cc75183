"""Pictures of several shapes, trained in batches of one shape: nothing is lost, and nothing depends on the machine."""

import csv
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.testing import assert_close

from diffsynth.config import claim
from diffsynth.core.data import AspectBuckets, BatchLayout, BatchSampler, MixedDataset, UnifiedDataset
from diffsynth.training.checks import check_one_size

CLOSE = {"rtol": 1e-6, "atol": 1e-6}
SIZES = [(64, 32)] * 4 + [(32, 64)] * 3 + [(36, 34), (100, 50), (40, 100)]
SHAPES = {(64, 32), (32, 64), (32, 32)}  # of a budget of 2048 pixels
BUCKETS = {"buckets": True, "max_pixels": 2048}


def write_pictures(folder: Path, sizes, suffix="png", **options) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    names = [f"{number}.{suffix}" for number in range(len(sizes))]
    for name, (width, height) in zip(names, sizes, strict=True):
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / name, **options)
    with (folder / "metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("image", "prompt"), *((name, f"picture {n}") for n, name in enumerate(names))])
    return folder


@cache
def pictures() -> Path:
    return write_pictures(tiny.kept_folder(), SIZES)


@cache
def dataset(folder: Path | None = None, **options) -> UnifiedDataset:
    made = UnifiedDataset.from_folder(str(folder or pictures()), **(BUCKETS | options))
    made.scan()
    return made


def batches(order, count: int, start: int = 0) -> list[list[int]]:
    size = order.batch_size
    return [[order.sample(step * size + slot).index for slot in range(size)] for step in range(start, start + count)]


def size_of(made: UnifiedDataset, number: int) -> tuple[int, int]:
    return made.sorted.size_of(number)


# Batches --------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 6), st.integers(0, 2**63))
@settings(max_examples=20)
def test_every_batch_is_of_one_size(batch_size, seed):
    order = dataset().order(batch_size, seed)
    sizes = [{size_of(dataset(), number) for number in batch} for batch in batches(order, 20)]
    assert all(len(own) == 1 for own in sizes) and set.union(*sizes) == SHAPES


@given(st.integers(1, 4), st.integers(0, 2**63))
@settings(max_examples=20)
def test_no_pass_leaves_a_picture_out(batch_size, seed):
    order, epochs = dataset(repeat=2).order(batch_size, seed), 3
    shown = Counter(number for batch in batches(order, order.steps_of(epochs)) for number in batch)
    assert min(shown[number] for number in range(len(SIZES))) >= 2 * epochs
    assert shown.total() - 2 * epochs * len(SIZES) < len(SHAPES) * batch_size  # the last batches are filled up


@given(st.integers(0, 2**63))
@settings(max_examples=20)
def test_batches_of_one_show_every_picture_once_a_pass(seed):
    order = dataset().order(1, seed)
    for number in range(3):
        assert sorted(batches(order, len(SIZES), number * len(SIZES))) == [[n] for n in range(len(SIZES))]


@pytest.mark.parametrize("world, micro", [(1, 4), (1, 1), (2, 2), (2, 1), (4, 1)])
def test_the_batches_of_a_step_are_the_same_for_any_number_of_processes_and_micro_batches(world, micro):
    order = dataset().order(4, seed=1)
    ranks = [BatchSampler(order, BatchLayout(4, micro, world), rank, 0, 6) for rank in range(world)]
    found = [sorted(a.index for rank in ranks for batch in rank.step(step) for a in batch) for step in range(6)]
    assert found == [sorted(batch) for batch in batches(order, 6)]


def test_samples_have_the_size_of_their_bucket_and_are_cut_from_the_middle():
    made = dataset()
    assert [made[n]["image"].size for n in range(len(SIZES))] == [size_of(made, n) for n in range(len(SIZES))]
    whole, long = Image.open(pictures() / "0.png"), Image.open(pictures() / "9.png")
    assert made[0]["image"] == whole.copy()
    assert made[9]["image"] == long.resize((32, 64), Image.Resampling.BILINEAR, box=(0, 10, 40, 90))


# Several budgets ------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.integers(20, 140), st.integers(20, 140)), min_size=1, max_size=4),
    st.sets(st.sampled_from([1024, 2048, 4096, 16384]), min_size=1),
    st.integers(1, 3),
)
@settings(max_examples=20)
def test_a_pass_shows_each_picture_once_at_each_size_that_it_fills(sizes, budgets, max_aspect):
    folder = write_pictures(tiny.kept_folder(), sizes)
    made = UnifiedDataset.from_folder(str(folder), buckets=True, max_pixels=sorted(budgets), max_aspect=max_aspect)
    made.scan()
    expected = [AspectBuckets(sorted(budgets), 16, max_aspect).assign(*size).values() for size in sizes]
    order = made.order(1, seed=0)
    shown = [made[number] for (number,) in batches(order, order.steps_of(1))]
    found = Counter((row["prompt"], row["image"].size) for row in shown)
    assert found == Counter((f"picture {n}", bucket) for n, buckets in enumerate(expected) for bucket in buckets)


def test_a_large_picture_is_shown_large_and_small_and_a_small_one_small(tmp_path):
    made = dataset(write_pictures(tmp_path, [(64, 64), (32, 32)]), max_pixels=(1024, 4096))
    found = [(made[number]["prompt"], made[number]["image"].size) for number in range(made.size)]
    assert found == [("picture 0", (32, 32)), ("picture 0", (64, 64)), ("picture 1", (32, 32))]
    assert [made.original_size(number) for number in range(made.size)] == [(64, 64), (64, 64), (32, 32)]


def test_max_data_items_limits_what_is_shown_at_all_sizes(tmp_path):
    folder = write_pictures(tmp_path, SIZES)
    made = dataset(folder)
    made.max_data_items = 4
    order = made.order(1, seed=0)
    assert len(made) == made.size == order.steps_of(1) == 4
    assert {number for (number,) in batches(order, 12)} == set(range(4))


# Pictures that are not what they seem ---------------------------------------------------------------------------------


def test_a_photograph_that_is_stored_on_its_side_is_sorted_by_how_it_is_shown(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    made = dataset(write_pictures(tmp_path, [(64, 32)], "jpg", exif=exif))
    assert made.original_size(0) == size_of(made, 0) == made[0]["image"].size == (32, 64)


@pytest.mark.parametrize("broken, in_its_place", [(0, 1), (3, 8), (6, 9), (9, 4)])
def test_the_next_picture_of_its_size_takes_the_place_of_one_that_cannot_be_read(tmp_path, broken, in_its_place):
    folder = write_pictures(tmp_path, SIZES)
    (folder / f"{broken}.png").write_bytes((pictures() / f"{broken}.png").read_bytes()[:-200])
    made = dataset(folder, on_error="skip")
    assert made[broken]["prompt"] == f"picture {in_its_place}"
    assert made[broken]["image"].size == size_of(made, broken)
    assert [row.file for row in made.skipped] == [f"{broken}.png"]


def test_a_size_of_which_no_picture_can_be_read_is_named(tmp_path):
    folder = write_pictures(tmp_path, SIZES)
    (folder / "7.png").write_bytes((pictures() / "7.png").read_bytes()[:-200])
    with pytest.raises(ValueError, match="none of the samples of 32 x 32 pixels of .*metadata.csv can be loaded"):
        dataset(folder, on_error="skip")[7]


def test_a_picture_whose_size_cannot_be_fetched_is_a_bad_row(tmp_path, monkeypatch):
    monkeypatch.setattr("diffsynth.core.data.sources.urls.time.sleep", lambda seconds: None)
    folder = write_pictures(tmp_path, SIZES[:1])
    with (folder / "metadata.csv").open("a") as file:
        file.write("http://127.0.0.1:9/a.png,p\n")
    made = UnifiedDataset.from_folder(str(folder), on_error="skip", allow_urls=True, **BUCKETS)
    (skipped,) = made.scan()
    assert (skipped.row, skipped.file) == (2, "http://127.0.0.1:9/a.png") and "127.0.0.1" in skipped.reason
    assert made.size == 1


# Combinations ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"height": 32, "width": 32},
            "dataset.buckets=true chooses sizes, and dataset.height and dataset.width fix one; set",
        ),
        ({"width": 32}, "dataset.buckets=true chooses sizes, and dataset.height and dataset.width fix one; set"),
        ({"buckets": False, "max_pixels": [1024, 2048]}, r"dataset.max_pixels=\[1024, 2048\] .* dataset.buckets=true"),
        ({"max_pixels": 100}, "max_pixels=100: .* at least 256 pixels"),
    ],
)
def test_options_that_exclude_one_another_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        UnifiedDataset.from_folder(str(pictures()), **(BUCKETS | options))


def test_buckets_need_something_that_fits_images_into_them():
    with pytest.raises(ValueError, match="without fit images are not resized to them; pass fit as well"):
        UnifiedDataset(str(pictures()), buckets=AspectBuckets(2048))


def test_buckets_need_the_size_of_every_row():
    made = UnifiedDataset.from_folder(str(pictures()), scan_rows=3, **BUCKETS)
    with pytest.raises(ValueError, match="need the size of every row; set dataset.scan_rows=10"):
        made.scan()
    with pytest.raises(ValueError, match="are not sorted into buckets yet"):
        made.order(1, seed=0)


def test_pictures_of_several_sizes_need_buckets_to_form_a_batch():
    free = UnifiedDataset.from_folder(str(pictures()), max_pixels=2048)
    free.scan()
    with pytest.raises(ValueError, match="4 sizes, from .*; a forward of 2 samples needs one; set dataset.buckets"):
        check_one_size(free, 2)
    with pytest.raises(ValueError, match="4 sizes"):
        check_one_size(MixedDataset({"free": free}), 2)
    check_one_size(free, 1)
    for options in (BUCKETS, {"height": 32, "width": 32}):
        sized = UnifiedDataset.from_folder(str(pictures()), **options)
        sized.scan()
        check_one_size(sized, 2)


# Runs -----------------------------------------------------------------------------------------------------------------


AUGMENTATION = ["dataset.augmentation.flip=0.5", "dataset.augmentation.caption_dropout=0.3"]


def overrides(*others: str) -> list[str]:
    sizes = ["dataset.height=null", "dataset.width=null", "dataset.buckets=true", "dataset.max_pixels=2048"]
    return [f"dataset.path={pictures()}", *sizes, *AUGMENTATION, "max_steps=3", "batch_size=2", "seed=1", *others]


def losses(run_dir: Path) -> list[float]:
    return [line["loss"] for line in tiny.metrics(run_dir)]


@pytest.fixture(scope="module")
def bucketed(tmp_path_factory) -> Path:
    """Three steps of two pictures each, one of each size."""
    steps = batches(dataset().order(2, seed=1), 3)
    assert {size_of(dataset(), number) for batch in steps for number in batch} == SHAPES
    return tiny.train(tmp_path_factory.mktemp("bucketed"), *overrides("micro_batch_size=null"))


def test_a_run_of_several_sizes_trains_the_same_in_micro_batches_of_any_size(bucketed, tmp_path):
    assert_close(losses(tiny.train(tmp_path, *overrides("micro_batch_size=1"))), losses(bucketed), rtol=1e-5, atol=1e-5)


def test_training_from_a_cache_of_several_sizes_is_training_from_the_pictures(bucketed, tmp_path):
    given = tiny.merged(tiny.train_overrides(tmp_path), overrides("micro_batch_size=null"))
    own = [override for override in given if override.startswith(("dataset.", "model."))]
    cache = tiny.compose("make_cache", *own, f"path={tmp_path}/cache", "device=cpu", "lora.rank=4")
    tiny.call("make_cache", cache)
    others = [override for override in given if not override.startswith("dataset.")]
    cached = tiny.compose("train", "dataset=cache", f"dataset.path={tmp_path}/cache", *AUGMENTATION, *others)
    run_dir = claim(cached)
    tiny.call("train", cached)
    assert_close(losses(run_dir), losses(bucketed), **CLOSE)
