"""Random choices about a sample: equal at equal addresses, as frequent as configured, and never made in validation."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from safetensors.torch import load_file
from torch.testing import assert_close
from torch.utils.data import DataLoader

from diffsynth.core.data import (
    AddressedDataset,
    Augmentation,
    BatchLayout,
    BatchSampler,
    ImageCropAndResize,
    SampleAddress,
    UnifiedDataset,
)
from diffsynth.core.data.operators.augmentation import AugmentationChoice

SEEDS = st.integers(0, 2**63)
ADDRESSES = st.builds(SampleAddress, st.integers(0, 10**6), st.integers(0, 10**9))
SHARES = st.sampled_from([0.0, 0.25, 0.5, 1.0])
WEIGHTS = st.lists(st.floats(0.1, 10), min_size=1, max_size=4)
TAGS = st.lists(st.text("abc", min_size=1, max_size=3), max_size=6)
EVERYTHING = {"caption_dropout": 0.25, "flip": 0.5, "shuffle_tags": True, "random_crop": True}


def chosen(count: int, weights=(1.0,), **options) -> list[AugmentationChoice]:
    augmentation = Augmentation(**options)
    return [augmentation.choose(weights, 0, SampleAddress(n // 1000, n % 1000)) for n in range(count)]


# Addresses ------------------------------------------------------------------------------------------------------------


@given(WEIGHTS, SEEDS, ADDRESSES)
def test_the_same_address_is_the_same_choice(weights, seed, address):
    assert Augmentation(**EVERYTHING).choose(weights, seed, address) == Augmentation(**EVERYTHING).choose(
        weights, seed, SampleAddress(*address)
    )


@given(SEEDS, ADDRESSES)
def test_another_seed_epoch_or_index_is_another_choice(seed, address):
    moved = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    others = [(seed + s, SampleAddress(address.epoch + e, address.index + i)) for s, e, i in moved]
    assert len({Augmentation(**EVERYTHING).choose([1], *other).position for other in others}) == 4


@given(SHARES, SHARES, st.booleans(), st.booleans(), WEIGHTS, SEEDS, ADDRESSES)
def test_options_do_not_move_one_another(dropout, flip, tags, crop, weights, seed, address):
    def choose(**options):
        return Augmentation(**options).choose(weights, seed, address)

    together = choose(caption_dropout=dropout, flip=flip, shuffle_tags=tags, random_crop=crop)
    dropped = choose(caption_dropout=dropout).caption is None
    assert together.caption == (None if dropped else choose().caption)
    assert together.mirrored == choose(flip=flip).mirrored
    assert together.tags == choose(shuffle_tags=tags).tags
    assert together.position == choose(random_crop=crop).position


# Shares ---------------------------------------------------------------------------------------------------------------


def test_shares_come_out_as_asked_and_independently():
    choices = chosen(20_000, caption_dropout=0.1, flip=0.3)
    pairs = Counter((choice.caption is None, choice.mirrored) for choice in choices)
    shares = {pair: count / len(choices) for pair, count in pairs.items()}
    expected = {(False, False): 0.63, (False, True): 0.27, (True, False): 0.07, (True, True): 0.03}
    assert shares == {pair: pytest.approx(share, abs=0.01) for pair, share in expected.items()}


def test_captions_are_chosen_by_the_weights_of_their_columns_and_evenly_from_a_list():
    augmentation = Augmentation({"prompt": 3, "short": 1, "old": 0})
    row = {"prompt": ["a", "b"], "short": "c", "old": "never"}
    weights = [weight for _, weight in augmentation.texts(row)]
    choices = [augmentation.choose(weights, 0, SampleAddress(0, n)) for n in range(20_000)]
    counts = Counter(augmentation.prompt(row, choice) for choice in choices)
    assert {text: count / 20_000 for text, count in counts.items()} == {
        "a": pytest.approx(0.375, abs=0.01),
        "b": pytest.approx(0.375, abs=0.01),
        "c": pytest.approx(0.25, abs=0.01),
    }


@pytest.mark.parametrize("empty", [None, "", "  ", float("nan"), []])
def test_an_empty_caption_is_never_chosen_where_there_is_another(empty):
    augmentation = Augmentation({"prompt": 1, "short": 1})
    assert augmentation.texts({"prompt": empty, "short": "c"}) == [("c", 1)]
    assert augmentation.texts({"prompt": [empty, "a"]}) == [("a", 1)]
    assert augmentation.texts({"prompt": empty}) == [("", 1)]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"caption_dropout": 1.1}, "caption_dropout is 1.1; expected a number in \\[0, 1\\]"),
        ({"flip": -0.1}, "flip is -0.1; expected a number in"),
        ({"captions": {}}, "captions are {}; expected columns with weights"),
        ({"captions": {"prompt": 0}}, "captions are {'prompt': 0}; .* at least one above 0"),
        ({"captions": {"prompt": 2, "short": -1}}, "captions are .*-1"),
        ({"tag_separator": ""}, 'tag_separator is empty; .* such as ","'),
        ({"keep_tags": -1}, "keep_tags is -1; expected a whole number of at least 0"),
    ],
)
def test_options_without_a_meaning_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Augmentation(**options)


# Texts ----------------------------------------------------------------------------------------------------------------


@given(st.text(), st.text(), st.text("abc ,"))
def test_prefix_and_suffix_stand_around_every_caption_but_the_empty_one(prefix, suffix, text):
    augmentation = Augmentation(prefix=prefix, suffix=suffix)
    assert augmentation.prompt({"prompt": text}, AugmentationChoice()) == (
        f"{prefix}{text}{suffix}" if text.strip() else ""
    )
    assert augmentation.prompt({"prompt": text}, AugmentationChoice(caption=None)) == ""


@given(TAGS, st.integers(0, 7), st.sampled_from([",", ";", "\n", " "]), st.integers(0, 2**32 - 1))
def test_shuffled_tags_are_all_there_behind_those_that_are_kept(tags, keep, separator, seed):
    augmentation = Augmentation(shuffle_tags=True, keep_tags=keep, tag_separator=separator)
    shuffled = augmentation.prompt({"prompt": separator.join(tags)}, AugmentationChoice(tags=seed))
    found = [tag.strip() for tag in shuffled.split(separator)] if shuffled else []
    assert found[:keep] == tags[:keep]
    assert sorted(found) == sorted(tags)


def test_shuffled_tags_come_in_every_order_and_the_trigger_word_stays_before_them():
    augmentation = Augmentation(shuffle_tags=True, prefix="sks, ")
    prompts = {augmentation.prompt({"prompt": "a,b , c,"}, choice) for choice in chosen(200, shuffle_tags=True)}
    assert prompts == {f"sks, {x}, {y}, {z}" for x, y, z in ("abc", "acb", "bac", "bca", "cab", "cba")}


# Variants -------------------------------------------------------------------------------------------------------------


@given(SHARES, SHARES, WEIGHTS, SEEDS, st.lists(ADDRESSES, min_size=10, max_size=10))
def test_all_that_may_be_chosen_is_among_the_choices_each_by_a_name_of_its_own(dropout, flip, weights, seed, addresses):
    augmentation = Augmentation(caption_dropout=dropout, flip=flip)
    choices = augmentation.choices(weights)
    names = [choice.variant for choice in choices]
    assert len(set(names)) == len(names) and "" in names and None not in names
    assert {augmentation.choose(weights, seed, address) for address in addresses} <= set(choices)


@pytest.mark.parametrize("option", ["shuffle_tags", "random_crop"])
def test_what_is_another_one_in_every_pass_has_no_name_and_is_not_listed(option):
    assert {choice.variant for choice in chosen(50, **{option: True})} == {None}
    with pytest.raises(ValueError, match=f"{option}=true makes new variants each time, .* set it to false"):
        Augmentation(**{option: True}).choices([1])


# Images ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four rows of images of 48 x 32 whose pixels say where they are, lists of such, and several captions."""
    folder = tmp_path_factory.mktemp("rows")
    columns, rows = np.meshgrid(np.arange(48), np.arange(32))
    for number in range(4):
        pixels = np.stack([5 * columns, 8 * rows, np.full_like(rows, number)], axis=-1)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
    names = [f"{number}.png" for number in range(4)]
    lines = [
        {"image": name, "edit_image": [name, names[0]], "prompt": f"{n}, x, y", "others": ["one", "two"]}
        for n, name in enumerate(names)
    ]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def dataset(folder, **options) -> UnifiedDataset:
    keys, size = ["image", "edit_image"], {"height": 32, "width": 32}
    made = UnifiedDataset.from_folder(
        str(folder), data_file_keys=keys, augmentation=Augmentation({"prompt": 1, "others": 1}, **options), **size
    )
    made.scan()
    return made


def samples(made: UnifiedDataset, count: int = 40) -> list[tuple[SampleAddress, dict]]:
    addresses = [SampleAddress(n // 4, n % 4) for n in range(count)]
    return [(address, made.sample(address, seed=0)[0]) for address in addresses]


def images_of(row: dict) -> list[Image.Image]:
    return [row["image"], *row["edit_image"]]


def test_a_mirrored_row_has_all_its_images_mirrored(folder):
    plain, flipped = dataset(folder), dataset(folder, flip=0.5)
    mirrored = Counter()
    for address, row in samples(flipped):
        both = images_of(row), images_of(plain[address.index])
        ways = [found == expected for found, expected in zip(*both, strict=True)]
        assert all(ways) or all(f == ImageOps.mirror(e) for f, e in zip(*both, strict=True))
        mirrored[not ways[0]] += 1
    assert min(mirrored[True], mirrored[False]) > 10


def test_a_random_crop_is_a_part_of_the_image_and_the_same_in_all_images_of_a_row(folder):
    starts = set()
    for _, row in samples(dataset(folder, random_crop=True)):
        offsets = {image.getpixel((0, 0))[0] // 5 for image in images_of(row)}
        (start,) = offsets
        whole = Image.open(folder / f"{row['image'].getpixel((0, 0))[2]}.png")
        assert row["image"] == whole.crop((start, 0, start + 32, 32))
        starts.add(start)
    assert min(starts) <= 1 and max(starts) >= 15 and len(starts) > 8


@given(
    st.tuples(st.integers(1, 900), st.integers(1, 900)),
    st.tuples(st.integers(1, 20), st.integers(1, 20)),
    st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
@settings(max_examples=50)
def test_no_part_reaches_beyond_the_image(size, cells, position):
    cropped = ImageCropAndResize()(Image.new("RGB", size, "white"), (16 * cells[0], 16 * cells[1]), position)
    assert cropped.size == (16 * cells[0], 16 * cells[1])  # Pillow refuses a box that is not inside
    assert cropped.getextrema() == ((255, 255),) * 3


def test_what_is_measured_has_nothing_left_to_chance(folder):
    plain, augmented = dataset(folder, prefix="sks "), dataset(folder, prefix="sks ", **EVERYTHING | {"flip": 1.0})
    assert [augmented[n] for n in range(4)] == [plain[n] for n in range(4)]
    assert [plain[n]["prompt"] for n in range(4)] == [f"sks {n}, x, y" for n in range(4)]  # the first caption


# Captions of a table --------------------------------------------------------------------------------------------------


def rows_with(folder: Path, *rows: dict, **captions) -> UnifiedDataset:
    Image.new("RGB", (32, 32)).save(folder / "a.png")
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps({"image": "a.png", **row}) for row in rows))
    return UnifiedDataset(str(folder), augmentation=Augmentation(captions or {"prompt": 1}), on_error="skip")


def test_captions_may_be_in_columns_of_any_name(tmp_path):
    made = rows_with(tmp_path, {"long": "a"}, {"short": "b", "long": None}, {}, prompt=0, long=1, short=1)
    assert [str(row) for row in made.scan(required=("image", "prompt"))] == ["row 3: has no prompt, but image"]
    assert [made[n]["prompt"] for n in range(2)] == ["a", "b"]


def test_a_row_without_a_caption_that_may_be_chosen_is_named(tmp_path):
    made = rows_with(tmp_path, {"long": "a"}, {"prompt": "b", "long": " "}, {"long": {"en": "c"}}, prompt=0, long=1)
    assert [row.reason for row in made.scan()] == [
        "long is empty",
        "long is {'en': 'c'}; expected text, or a list of texts",
    ]


def test_a_column_of_captions_that_no_row_has_is_named_with_those_there_are(tmp_path):
    with pytest.raises(ValueError, match=r"captions names 'lnog', which no row .* choose from image, prompt, long"):
        rows_with(tmp_path, {"prompt": "a", "long": "b"}, prompt=1, lnog=1).scan()


# Runs -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world, micro, workers", [(1, 4, 0), (1, 2, 2), (2, 1, 0), (4, 1, 0)])
def test_any_number_of_processes_and_workers_chooses_alike(folder, world, micro, workers):
    made = dataset(folder, **EVERYTHING)
    plan, order = BatchLayout(4, micro, world), made.order(4, seed=3)
    found = []
    for rank in range(world):
        sampler = BatchSampler(order, plan, rank, start_step=0, num_steps=2)
        context = "fork" if workers else None
        found += DataLoader(
            AddressedDataset(made, 3),
            batch_sampler=sampler,
            collate_fn=list,
            num_workers=workers,
            multiprocessing_context=context,
        )
    expected = [AddressedDataset(made, 3)[order.sample(position)] for position in range(8)]
    by_address = [sorted(each, key=lambda sample: sample[1:3]) for each in ([s for b in found for s in b], expected)]
    assert by_address[0] == by_address[1]


AUGMENTED = [
    "dataset.augmentation.captions={prompt:1,others:2}",
    "dataset.augmentation.prefix=sks",
    *(f"dataset.augmentation.{name}={str(value).lower()}" for name, value in EVERYTHING.items()),
]
STEPS = ["max_steps=2", "checkpoint.every=1", "batch_size=2"]


def test_a_run_with_all_of_it_that_was_cut_off_goes_on_as_if_nothing_had_been(folder, tmp_path):
    overrides = [*STEPS, f"dataset.path={folder}", "dataset.metadata=metadata.jsonl", *AUGMENTED]
    tiny.cut_off(1, tmp_path / "cut off", *overrides)
    found, expected = (tiny.train(tmp_path / name, *overrides) for name in ("cut off", "whole"))
    assert losses(found) == losses(expected)
    assert_close(final_weights(found), final_weights(expected), rtol=0, atol=0)


def losses(run_dir: Path) -> list[float]:
    return [line["loss"] for line in tiny.metrics(run_dir)]


def final_weights(run_dir: Path) -> dict:
    return load_file(run_dir / "weights" / tiny.weights(run_dir)[-1])
