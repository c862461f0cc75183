"""Several data sets trained together: how often each is shown, what shares a batch, and what each keeps to itself."""

import json
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from torch.utils.data import DataLoader

from diffsynth.core.data import (
    AddressedDataset,
    Augmentation,
    CachedDataset,
    MixedDataset,
    SampleAddress,
    UnifiedDataset,
)
from diffsynth.training.validation.validation import first_rows

SEEDS = st.integers(0, 2**63)
FIXED, BUCKETS, FREE = {"height": 32, "width": 32}, {"buckets": True, "max_pixels": 2048}, {}


def write_pictures(folder: Path, sizes) -> Path:
    """Pictures of these sizes, red growing from left to right and with each of them, and a caption that names them."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"image": f"{n}.png", "prompt": f"{folder.name} {n}"} for n in range(len(sizes))]
    for number, (width, height) in enumerate(sizes):
        red = Image.linear_gradient("L").rotate(90).resize((width, height)).point(lambda p, n=number: p // 2 + n)
        Image.merge("RGB", [red, red, red]).save(folder / f"{number}.png")
    return tiny.write_rows(folder, rows)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """`photos` of three shapes, `icons` that are square."""
    folder = tmp_path_factory.mktemp("folders")
    write_pictures(folder / "photos", [(64, 32)] * 4 + [(32, 64)] * 3 + [(32, 32)] * 3)
    write_pictures(folder / "icons", [(32, 32)] * 6)
    return folder


def one(folder: Path, size=FIXED, augmentation=None, **options) -> UnifiedDataset:
    return UnifiedDataset.from_folder(
        str(folder), augmentation=Augmentation(**(augmentation or {})), **(size | options)
    )


def test_an_epoch_shows_each_sample_as_often_as_weights_and_repeats_say(folders):
    made = {"photos": one(folders / "photos", repeat=10), "icons": one(folders / "icons")}
    assert (len(MixedDataset(made)), MixedDataset(made).size) == (106, 16)
    seldom = MixedDataset(made, {"photos": 0.1, "icons": 0.25})
    assert len(seldom) == 12  # 10 and 1.5, rounded to even
    assert len(first_rows(seldom, 100)) == len(first_rows(MixedDataset(made), 100)) == 16


def mixed(folders: Path, weights=None, photos=FIXED, icons=FIXED, **options) -> MixedDataset:
    made = {"photos": one(folders / "photos", photos, **options), "icons": one(folders / "icons", icons, **options)}
    mixture = MixedDataset(made, weights)
    mixture.scan()
    return mixture


def batches(made, batch_size: int, seed: int, start: int, stop: int) -> list[list[int]]:
    """The samples of some epochs, by their numbers."""
    order = made.order(batch_size, seed)
    steps = range(order.steps_of(start), order.steps_of(stop))
    return [[order.sample(step * batch_size + slot).index for slot in range(batch_size)] for step in steps]


def counted(made, seed: int, start: int, stop: int) -> Counter:
    """How often some epochs show each sample, by its caption."""
    return Counter(made[number]["prompt"] for (number,) in batches(made, 1, seed, start, stop))


# Which samples --------------------------------------------------------------------------------------------------------


def test_samples_are_numbered_through(folders):
    made = mixed(folders)
    assert len(made) == made.size == 16
    names = [f"photos {n}" for n in range(10)] + [f"icons {n}" for n in range(6)]
    assert [made[n]["prompt"] for n in range(16)] == names
    for outside in (-1, 16):
        with pytest.raises(IndexError, match=f"index {outside} of 16"):
            made[outside]


@given(SEEDS, st.integers(1, 5), st.integers(0, 10**6))
@settings(max_examples=20)
def test_a_mixture_of_one_data_set_is_that_data_set(folders, seed, batch_size, position):
    alone = one(folders / "photos", BUCKETS, {"flip": 0.5, "caption_dropout": 0.5, "random_crop": True}, repeat=2)
    alone.scan()
    mixture = MixedDataset({"photos": alone})
    orders = [made.order(batch_size, seed) for made in (alone, mixture)]
    first, second = (order.sample(position) for order in orders)
    assert first == second and orders[0].steps_of(3) == orders[1].steps_of(3)
    assert AddressedDataset(alone, seed)[first] == AddressedDataset(mixture, seed)[second]


@given(SEEDS, st.integers(0, 15), st.integers(0, 100))
@settings(max_examples=20)
@pytest.mark.parametrize("crop", [False, True])
def test_the_variant_of_a_sample_is_known_before_it_is_loaded(folders, crop, seed, number, epoch):
    augmentation = {"flip": 0.5, "caption_dropout": 0.5, "random_crop": crop}
    made = MixedDataset({name: one(folders / name, BUCKETS, augmentation) for name in ("photos", "icons")})
    made.scan()
    address = SampleAddress(epoch, number % made.size)
    assert made.variant_at(address, seed) == made.sample(address, seed)[1]


def test_a_weight_is_how_often_a_pass_shows_each_sample(folders):
    made = mixed(folders, {"photos": 0.1, "icons": 2.5})
    for number in range(4):
        counts = counted(made, 0, number, number + 1)
        assert sum(counts[f"photos {n}"] for n in range(10)) == 1  # another one each time
        assert Counter(counts[f"icons {n}"] for n in range(6)) == {2: 3, 3: 3}
    assert set(counted(made, 0, 0, 10)) == {made[n]["prompt"] for n in range(16)}


def test_weights_multiply_with_the_data_sets_own_repeat(folders):
    counts = counted(mixed(folders, {"icons": 3}, repeat=2), 0, 0, 1)
    assert counts == {f"photos {n}": 2 for n in range(10)} | {f"icons {n}": 6 for n in range(6)}


@pytest.mark.parametrize(
    "weights, message",
    [
        ({"photo": 2}, "dataset.weights names 'photo'; expected one of photos, icons"),
        ({"photos": 0}, "dataset.weights.photos is 0; set it above 0, or remove photos from dataset.datasets"),
        ({"icons": -1.5}, "dataset.weights.icons is -1.5"),
    ],
)
def test_weights_that_mean_nothing_are_refused(folders, weights, message):
    with pytest.raises(ValueError, match=message):
        mixed(folders, weights)


def test_something_must_be_mixed_and_be_a_data_set():
    with pytest.raises(ValueError, match="dataset.datasets is empty; name the data sets"):
        MixedDataset({})
    with pytest.raises(ValueError, match="dataset.datasets.photos is a dict; expected a data set such as image_folder"):
        MixedDataset({"photos": {"path": "photos"}})


# Batches --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shapes(folders) -> tuple[MixedDataset, dict]:
    """Photos in buckets and icons of one size, and of each sample its data set and its size."""
    made = mixed(folders, photos=BUCKETS, icons=FIXED)
    return made, {number: (made[number]["prompt"].split()[0], made[number]["image"].size) for number in range(16)}


@given(SEEDS, st.integers(1, 4))
@settings(max_examples=20)
def test_batches_are_of_one_size_and_those_of_a_size_are_shared(shapes, seed, batch_size):
    made, own = shapes
    shown = [[own[number] for number in batch] for batch in batches(made, batch_size, seed, 0, 4)]
    assert all(len({size for _, size in batch}) == 1 for batch in shown)
    assert {name for batch in shown for name, size in batch if size == (32, 32)} == {"photos", "icons"}
    assert batch_size == 1 or any(len({name for name, _ in batch}) == 2 for batch in shown)


@pytest.mark.parametrize(
    "photos, icons, parts",
    [
        (FIXED, FIXED, [2]),
        (FIXED, {"height": 64, "width": 64}, [1, 1]),
        (FREE, FREE, [2]),
        (BUCKETS, FREE, [1, 1, 1, 1]),
        (BUCKETS, BUCKETS, [2, 1, 1]),
    ],
    ids=["one size", "two sizes", "free sizes", "buckets and free sizes", "buckets"],
)
def test_data_sets_share_the_buckets_of_the_sizes_that_they_share(folders, photos, icons, parts):
    order = mixed(folders, photos=photos, icons=icons).order(1, seed=0)
    assert sorted((len(bucket.parts) for bucket in order.buckets), reverse=True) == parts


def test_parts_are_the_samples_of_each_size_and_as_often_as_they_are_shown_on_average(folders):
    parts = mixed(folders, {"icons": 2}, photos=BUCKETS, icons=BUCKETS).rows_by_size()
    assert {size: len(part.rows) for size, part in parts.items()} == {(64, 32): 4, (32, 64): 3, (32, 32): 9}
    assert parts[32, 32].weight == Fraction(3 * 1 + 6 * 2, 9)
    assert sorted(n for part in parts.values() for n in part.rows) == list(range(16))


def test_a_data_set_of_any_length_takes_no_memory():
    part = UnifiedDataset(str(tiny.dataset()), repeat=10**9).rows_by_size()[None].moved(10**12, 0.5)
    assert part.rows == range(10**12, 10**12 + 8) and part.rate == 4 * 10**9


# What each keeps to itself --------------------------------------------------------------------------------------------


def test_each_data_set_keeps_its_own_augmentation(folders):
    photos = one(folders / "photos", augmentation={"flip": 1.0})
    icons = one(folders / "icons", augmentation={"prefix": "an icon: "})
    made, plain = MixedDataset({"photos": photos, "icons": icons}), mixed(folders)
    for number in range(16):
        (row, _), expected, is_icon = made.sample(SampleAddress(7, number), seed=0), plain[number], number >= 10
        assert row["image"] == (expected["image"] if is_icon else ImageOps.mirror(expected["image"]))
        assert row["prompt"] == ("an icon: " if is_icon else "") + expected["prompt"]


def test_chance_treats_equal_numbers_of_two_data_sets_unlike(folders):
    made = mixed(folders, augmentation={"caption_dropout": 0.5})

    def is_dropped(epoch: int, number: int) -> bool:
        return made.sample(SampleAddress(epoch, number), seed=0)[0]["prompt"] == ""

    alike = [is_dropped(epoch, n) == is_dropped(epoch, 10 + n) for epoch in range(20) for n in range(6)]
    assert 40 < sum(alike) < 80  # of 120


def test_a_cache_of_a_mixture_has_the_variants_of_every_sample(folders):
    made = mixed(folders, augmentation={"flip": 0.5})
    found = [made.variants(number).rows for number in range(16)]
    assert [rows[""]["prompt"] for rows in found] == [made[number]["prompt"] for number in range(16)]
    assert all(rows.keys() == {"", "mirrored"} for rows in found)


# Bad rows -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(folders, tmp_path) -> Path:
    """Both folders again, with a photo that is not there and an icon that cannot be decoded."""
    write_pictures(tmp_path / "photos", [(32, 32)] * 3)
    write_pictures(tmp_path / "icons", [(32, 32)] * 3)
    (tmp_path / "photos" / "1.png").unlink()
    (tmp_path / "icons" / "0.png").write_bytes((tmp_path / "icons" / "0.png").read_bytes()[:-40])
    return tmp_path


REASONS = ["photos: image '1.png': not found", "icons: could not be decoded"]


def test_a_bad_row_is_named_with_its_data_set(damaged):
    with pytest.raises(ValueError, match=r"(?s)^dataset.datasets.photos: 1 of 3 rows.*row 2: image '1.png'"):
        mixed(damaged)
    (damaged / "photos" / "1.png").symlink_to("0.png")
    with pytest.raises(ValueError, match=r"^dataset.datasets.icons: row 1: image '0.png': .*dataset.on_error=skip"):
        mixed(damaged)[3]


@pytest.mark.parametrize("start_method", [None, "fork"])
def test_rows_that_any_data_set_leaves_out_are_listed_whoever_finds_them(damaged, start_method):
    made = mixed(damaged, on_error="skip")
    addresses = [SampleAddress(0, number) for number in range(made.size)]
    workers = {"num_workers": 1, "multiprocessing_context": start_method} if start_method else {}
    shown = [s.data["prompt"] for s in DataLoader(AddressedDataset(made), None, sampler=addresses, **workers)]
    assert shown == ["photos 0", "photos 2", "icons 1", "icons 1", "icons 2"]
    assert all(map(str.startswith, (row.reason for row in made.skipped), REASONS))
    made.write_skipped(damaged / "skipped.jsonl")
    lines = [json.loads(line) for line in (damaged / "skipped.jsonl").read_text().splitlines()]
    assert [(line["row"], line["file"]) for line in lines] == [(2, "1.png"), (1, "0.png")]


def test_what_another_process_could_not_decode_is_skipped_here_too(damaged):
    here, there = mixed(damaged, on_error="skip"), mixed(damaged, on_error="skip")
    assert there[2]["prompt"] == "icons 1"
    here.undecodable |= torch.stack([here.undecodable, there.undecodable]).any(0)  # as `record_data` does
    assert here.skipped == there.skipped and len(here.skipped) == 2


def test_the_fingerprint_changes_with_each_data_set_and_their_order(damaged):
    def fingerprint(*names: str) -> str:
        return MixedDataset({f"number {n}": one(damaged / name) for n, name in enumerate(names)}).fingerprint()

    assert len({fingerprint(a, b) for a in ("photos", "icons") for b in ("photos", "icons")}) == 4
    assert fingerprint("photos", "icons") == fingerprint("photos", "icons")


# Runs -----------------------------------------------------------------------------------------------------------------


def overrides(folders: Path) -> list[str]:
    groups = [f"+dataset@dataset.datasets.{name}=image_folder" for name in ("photos", "icons")]
    paths = [f"dataset.datasets.{name}.path={folders / name}" for name in ("photos", "icons")]
    photos = [f"dataset.datasets.photos.{key}={value}" for key, value in BUCKETS.items()]
    icons = [f"dataset.datasets.icons.{key}={value}" for key, value in FIXED.items()]
    return ["dataset=mixed", *groups, *paths, *photos, *icons]


def test_a_mixture_trains_and_says_what_it_was(folders, tmp_path):
    run_dir = tiny.train(tmp_path, *overrides(folders), "dataset.weights={icons:2.5}", "batch_size=3")
    about = json.loads((run_dir / "data.json").read_text())
    assert len(tiny.metrics(run_dir)) == 2
    assert about["rows"] == 16 and about["path"].count("metadata.csv") == 2


def test_a_mixture_can_be_cached(folders, tmp_path):
    options = [*overrides(folders), *tiny.model_overrides(), f"path={tmp_path}/cache", "device=cpu"]
    tiny.call("make_cache", tiny.compose("make_cache", *options))
    cached, made = CachedDataset(f"{tmp_path}/cache"), mixed(folders, photos=BUCKETS)
    assert [cached[n]["prompt"] for n in range(16)] == [made[n]["prompt"] for n in range(16)]
    assert [cached[n]["image"].size for n in range(16)] == [made[n]["image"].size for n in range(16)]
