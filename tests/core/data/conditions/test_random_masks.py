"""Masks for inpainting: of the areas that were asked for, never empty, and equal at equal addresses."""

import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from diffsynth.core.data.conditions import MaskedImage, RandomMask
from diffsynth.core.data.conditions.random_mask import LEAST_RANGE, area

SIZES = st.tuples(st.integers(16, 160), st.integers(16, 160))
SEEDS = st.integers(0, 2**64 - 1)
KINDS = st.sampled_from([{"boxes": 0}, {"strokes": 0}, {}])


@st.composite
def ranges(draw) -> dict[str, float]:
    low = draw(st.floats(0.01, 1 - LEAST_RANGE - 0.01))
    return {"min_area": low, "max_area": draw(st.floats(low + LEAST_RANGE, 1))}


def mask_of(condition: RandomMask, image: Image.Image, seed: int = 0, *others: Image.Image) -> Image.Image:
    return condition.make("inpaint_mask", [image, *others], seed)


@given(SIZES, SEEDS, KINDS, ranges())
def test_masks_are_black_and_white_and_as_large_as_was_asked_for(size, seed, kinds, areas):
    mask = mask_of(RandomMask(whole=0, **kinds, **areas), Image.new("RGB", size), seed)
    assert (mask.mode, mask.size, set(np.unique(mask)) <= {0, 255}) == ("L", size, True)
    assert areas["min_area"] <= area(mask) <= areas["max_area"]


@given(SIZES, SEEDS)
def test_equal_seeds_are_equal_masks_and_other_seeds_others(size, seed):
    masks = [mask_of(RandomMask(whole=0), Image.new("RGB", size), own).tobytes() for own in (seed, seed, seed + 1)]
    assert masks[0] == masks[1] != masks[2]


def test_a_fixed_mask_depends_on_the_image_alone():
    images = [Image.new("RGB", (32, 32), colour) for colour in ("red", "red", "blue")]
    masks = [mask_of(RandomMask(whole=0, fixed=True), image, seed) for seed, image in enumerate(images)]
    assert masks[0] == masks[1] != masks[2]


def test_kinds_are_as_frequent_as_their_weights():
    image, thing = Image.new("RGB", (64, 64)), Image.new("L", (64, 64))
    thing.paste(255, (10, 10, 20, 20))
    condition, kinds = RandomMask(strokes=0, boxes=1, objects=3, whole=0.2), Counter()
    for seed in range(1000):
        mask = mask_of(condition, image, seed, thing)
        kinds["whole" if area(mask) == 1 else "object" if mask == thing else "box"] += 1
    shares = {kind: count / 1000 for kind, count in kinds.items()}
    assert shares == {
        kind: pytest.approx(share, abs=0.05) for kind, share in (("whole", 0.2), ("object", 0.6), ("box", 0.2))
    }


def test_lamas_masks_fit_the_default_range_without_help():
    """What `band` makes, for ranges that shapes do not come to lie in, has rows that are white from end to end."""
    masks = [np.asarray(mask_of(RandomMask(whole=0, boxes=0), Image.new("RGB", (64, 64)), n)) for n in range(200)]
    assert not any(set(mask.mean(axis=1)) <= {0, 255} for mask in masks)
    assert 0.4 < np.mean([mask.mean() / 255 for mask in masks]) < 0.55  # LaMa's own: 0.46


@pytest.mark.parametrize("fill, colour", [("black", (0, 0, 0)), ("grey", (128, 128, 128))])
def test_a_masked_image_is_filled_where_the_mask_is_white(fill, colour):
    image, mask = Image.new("RGB", (32, 32), "red"), Image.new("L", (32, 32))
    mask.paste(255, (8, 0, 32, 32))
    masked = MaskedImage(fill=fill)(image, mask, rng=random.Random(0))
    assert (masked.getpixel((7, 5)), masked.getpixel((8, 5))) == ((255, 0, 0), colour)


@pytest.mark.parametrize("condition", [MaskedImage(), RandomMask(strokes=0, boxes=0, objects=1, whole=0)])
def test_a_mask_of_another_size_and_a_black_one_are_refused(condition):
    for mask, message in [
        (Image.new("L", (48, 32), 255), "the mask is 48 x 32 pixels and its image 32 x 32; save both at one size"),
        (Image.new("L", (32, 32), 100), "the mask is black all over, so that nothing is to be painted"),
    ]:
        with pytest.raises(ValueError, match=message):
            condition.make("c", [Image.new("RGB", (32, 32)), mask], 0)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"strokes": 0, "boxes": 0}, "strokes, boxes and objects are all 0; expected at least one weight above 0"),
        ({"min_area": 0.5, "max_area": 0.52}, "min_area=0.5 and max_area=0.52; set max_area at least 0.05 above it"),
        ({"whole": 2}, "whole is 2; expected a number in"),
    ],
)
def test_options_without_a_meaning_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RandomMask(**options)
