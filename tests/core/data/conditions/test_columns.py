"""Columns that are made of images: of the images as they are trained on, equal at equal addresses, and cached."""

import json

import numpy as np
import pytest
import tiny
from PIL import Image
from torch.utils.data import DataLoader

from diffsynth.core.data import AddressedDataset, Augmentation, Condition, SampleAddress, UnifiedDataset
from diffsynth.core.data.conditions import Canny, Grey, MaskedImage, RandomMask, Tile
from diffsynth.core.data.operators.unread import identity, read

INPAINT = {"controlnet_image": MaskedImage(), "inpaint_mask": RandomMask(whole=0)}  # in the other order
ADDRESSES = [SampleAddress(epoch, index) for epoch in range(3) for index in range(4)]
EDGES = Canny(low=20, high=50)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four pictures of 96 x 64 with blobs of colours, and a mask of each."""
    folder = tmp_path_factory.mktemp("pictures")
    noise = np.random.default_rng(0).integers(0, 256, (4, 6, 8, 3), dtype=np.uint8)
    for number, pixels in enumerate(noise):
        Image.fromarray(pixels).resize((96, 64), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
        Image.fromarray(pixels[..., 0]).resize((96, 64)).save(folder / f"mask_{number}.png")
    names = [{"image": f"{n}.png", "object_mask": f"mask_{n}.png", "prompt": f"picture {n}"} for n in range(4)]
    return tiny.write_rows(folder, names)


def dataset(folder, conditions: dict[str, Condition], required=(), **options) -> UnifiedDataset:
    options = {"height": 32, "width": 32} | options
    made = UnifiedDataset.from_folder(str(folder), conditions=conditions, **options)
    made.scan(required=required)
    return made


def rows(made: UnifiedDataset, seed: int = 0) -> list[dict]:
    return [made.sample(address, seed)[0] for address in ADDRESSES]


def of(condition: Condition, image: Image.Image) -> Image.Image:
    return condition.make("column", [image], 0)


@pytest.mark.parametrize("size", [{}, {"height": None, "width": None, "buckets": True, "max_pixels": 2048}])
def test_a_condition_is_that_of_the_image_as_it_is_trained_on(folder, size):
    augmentation = Augmentation(flip=0.5, random_crop=True)
    found = rows(dataset(folder, {"controlnet_image": EDGES}, augmentation=augmentation, **size))
    assert all(row["controlnet_image"] == of(EDGES, row["image"]) for row in found)
    assert len({row["controlnet_image"].tobytes() for row in found}) > 8


def test_an_image_is_masked_by_the_mask_of_its_row(folder):
    for row in rows(dataset(folder, INPAINT)):
        assert row["controlnet_image"] == Image.composite(Image.new("RGB", (32, 32)), row["image"], row["inpaint_mask"])


def test_masks_are_others_in_each_epoch_equal_at_equal_addresses_and_fixed_in_validation(folder):
    first, again, other = (rows(dataset(folder, INPAINT), seed) for seed in (0, 0, 1))
    assert first == again != other and len({row["inpaint_mask"].tobytes() for row in first}) == len(ADDRESSES)
    measured = [dataset(folder, INPAINT)[number % 4] for number in range(8)]
    assert measured[:4] == measured[4:]


def test_two_masks_of_a_row_are_two_masks(folder):
    both = dataset(folder, {"inpaint_mask": RandomMask(whole=0), "other_mask": RandomMask(whole=0)})
    assert all(row["inpaint_mask"] != row["other_mask"] for row in rows(both))


def test_a_fixed_condition_stays_so_beside_one_that_changes(folder):
    found = rows(dataset(folder, {"tile": Tile(fixed=True), **INPAINT}))
    assert [row["tile"] for row in found[:4]] == [row["tile"] for row in found[4:8]]


def test_workers_make_the_same_columns(folder):
    addressed = AddressedDataset(dataset(folder, INPAINT | {"edges": Canny(spread=2)}), 3)
    loader = DataLoader(addressed, sampler=ADDRESSES, batch_size=None, num_workers=2, multiprocessing_context="fork")
    assert list(loader) == [addressed[address] for address in ADDRESSES]


@pytest.mark.slow
def test_a_run_that_was_cut_off_goes_on_with_the_masks_that_it_would_have_had(folder, tmp_path):
    mask = ["condition=inpaint", "task.mask.column=inpaint_mask", "dataset.conditions.inpaint_mask.whole=0"]
    overrides = [f"dataset.path={folder}", *mask, "max_steps=2", "checkpoint.every=1", "batch_size=2"]
    tiny.cut_off(1, tmp_path / "cut off", *overrides)
    found, whole, plain = (
        [line["loss"] for line in tiny.metrics(tiny.train(tmp_path / name, *own))]
        for name, own in (("cut off", overrides), ("whole", overrides), ("plain", [*overrides, "task.mask.outside=1"]))
    )
    assert found == whole and whole != plain


# Caches ---------------------------------------------------------------------------------------------------------------


def column(folder, condition: Condition, name: str = "inpaint_mask", variant: str = "", **options):
    return dataset(folder, {name: condition}, **options).variants(0).rows[variant][name]


@pytest.mark.parametrize("condition", [EDGES, Tile(fixed=True), RandomMask(fixed=True, whole=0)])
def test_what_a_cache_reads_is_what_is_trained_on(folder, condition):
    mirrored = dataset(folder, {"made": condition}, augmentation=Augmentation(flip=1)).sample(ADDRESSES[0], 0)[0]
    cached = column(folder, condition, "made", "mirrored", augmentation=Augmentation(flip=1))
    assert (cached.size, read(cached)) == ((32, 32), mirrored["made"])


def test_the_key_changes_with_the_options_the_class_the_image_and_its_size(folder):
    different = [
        *(column(folder, condition) for condition in (Canny(), Canny(low=20), Grey(), Tile(fixed=True))),
        column(folder, Canny(), height=48),
        column(folder, Canny(), variant="mirrored", augmentation=Augmentation(flip=1)),
    ]
    assert len({unread.identity for unread in different}) == len(different)
    assert column(folder, Canny()).identity == different[0].identity


def test_the_key_of_a_masked_image_changes_with_the_mask(folder):
    keys = set()
    for least in (0.1, 0.2):
        conditions = {**INPAINT, "inpaint_mask": RandomMask(min_area=least, fixed=True)}
        keys.add(identity(dataset(folder, conditions).variants(0).rows[""]["controlnet_image"]))
    assert len(keys) == 2


@pytest.mark.parametrize("condition", [RandomMask(), Tile(), Canny(spread=2)])
def test_what_is_random_each_time_cannot_be_cached_and_says_what_to_set(folder, condition):
    with pytest.raises(ValueError, match="conditions.made is random, .* set dataset.conditions.made.fixed=true"):
        column(folder, condition, "made")


# Mistakes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "conditions, message",
    [
        ({"image": Grey()}, "dataset.conditions.image would replace the images to train on; name another column"),
        (
            {"object_mask": Grey()},
            "row 1: has a column object_mask, which dataset.conditions.object_mask would replace",
        ),
        (
            {"c": MaskedImage()},
            r"c reads the column 'inpaint_mask', .* set dataset.data_file_keys=\[image,inpaint_mask\]",
        ),
        ({"a": MaskedImage(mask="b"), "b": MaskedImage(mask="a")}, "dataset.conditions a and b read each other"),
    ],
)
def test_conditions_that_cannot_be_made_are_refused_before_training(folder, conditions, message):
    with pytest.raises(ValueError, match=message):
        dataset(folder, conditions)


def masked_row(tmp_path, size: tuple[int, int], colour: str, **options) -> UnifiedDataset:
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    Image.new("L", size, colour).save(tmp_path / "mask.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"image": "a.png", "object_mask": "mask.png", "prompt": "a"}))
    return dataset(tmp_path, {"c": MaskedImage(mask="object_mask")}, data_file_keys=["image", "object_mask"], **options)


def test_a_mask_of_another_size_than_its_image_is_refused_with_its_row_before_training(tmp_path):
    with pytest.raises(ValueError, match="row 1: object_mask is 64 x 32 pixels and image 64 x 64; save both at one"):
        masked_row(tmp_path, (64, 32), "white")


def test_a_black_mask_is_refused_with_its_row(tmp_path):
    with pytest.raises(ValueError, match="row 1: c: the mask is black all over, .*; correct it, or skip such rows"):
        masked_row(tmp_path, (64, 64), "black").sample(ADDRESSES[0], 0)


def test_a_row_without_the_image_or_the_mask_that_a_condition_reads_is_named(folder, tmp_path):
    tiny.write_rows(tmp_path, [{"photo": "a.png", "prompt": "a"}])
    with pytest.raises(ValueError, match="row 1: has no image, but photo, prompt"):
        dataset(tmp_path, {"c": Grey()})
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    tiny.write_rows(tmp_path, [{"image": "a.png", "prompt": "a"}])
    with pytest.raises(ValueError, match="row 1: has no object_mask, but image, prompt"):
        dataset(tmp_path, {"c": RandomMask(objects=1)}, data_file_keys=["image", "object_mask"])
