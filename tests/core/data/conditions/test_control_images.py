"""Control images: edges where edges are, tiles as Pillow shrinks, and the same for mirrored and cropped images."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter, ImageOps

from diffsynth.core.data.conditions import Canny, Condition, Grey, LineArt, Tile

SEEDS = st.integers(0, 2**32)


def made(condition: Condition, image: Image.Image, seed: int = 0) -> np.ndarray:
    return np.asarray(condition.make("column", [image], seed))


def smooth(seed: int, size: tuple[int, int] = (96, 80)) -> Image.Image:
    """Blobs of random colours."""
    noise = np.random.default_rng(seed).integers(0, 256, (10, 12, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def halves(left: int, right: int) -> np.ndarray:
    return np.repeat(np.array([left] * 16 + [right] * 16, dtype=np.uint8)[None], 16, axis=0)


def picture(*rows: np.ndarray) -> Image.Image:
    return Image.fromarray(np.repeat(np.concatenate(rows)[..., None], 3, axis=2))


# Edges ----------------------------------------------------------------------------------------------------------------


def test_the_edges_of_a_square_are_its_border():
    pixels = np.zeros((64, 64), dtype=np.uint8)
    pixels[16:48, 20:40] = 255
    edges = made(Canny(), picture(pixels))[..., 0] == 255
    rows, columns = np.nonzero(edges)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (15, 47, 19, 39)  # one side of each border
    assert not edges[17:46, 21:38].any() and edges[17:46].sum(axis=1).tolist() == [2] * 29


def test_a_weak_edge_is_kept_where_it_leads_to_a_strong_one():
    fading = np.concatenate([halves(0, level)[:1] for level in range(200, 30, -8)])  # norms of the gradient: 4 · level
    assert made(Canny(), picture(fading))[..., 0].any(axis=1).all()
    assert not made(Canny(), picture(halves(0, 48))).any()  # 192, as far down that edge


def test_edges_are_those_of_opencv():
    cv2 = pytest.importorskip("cv2")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 77, 3), dtype=np.uint8))
    for image in (smooth(0), smooth(1), noise):
        for low, high in ((100, 200), (20, 300)):
            expected = cv2.Canny(np.asarray(image), low, high)
            assert (made(Canny(low=low, high=high), image)[..., 0] == expected).mean() > 0.999


@given(SEEDS, SEEDS)
@settings(max_examples=20)
def test_random_thresholds_keep_edges_between_those_of_the_extreme_ones(seed, image_seed):
    image, spread = smooth(image_seed), 2.0
    most, least = (made(Canny(low=100 * f, high=200 * f), image) for f in (1 / spread, spread))
    edges = made(Canny(spread=spread), image, seed)
    assert (least <= edges).all() and (edges <= most).all()


def test_line_art_shows_dark_lines_and_neither_surfaces_nor_light_lines():
    pixels = np.full((64, 64), 128, dtype=np.uint8)
    pixels[:, 20:22], pixels[:, 40:42] = 0, 255
    lines = made(LineArt(sigma=48), picture(pixels))[..., 0].astype(int)
    assert lines[:, 20:22].min() > 100 and lines[:, 40:42].max() == 0 and lines[:, 55:].max() < 8
    assert not made(LineArt(), Image.new("RGB", (16, 16), "red")).any()


# Tiles and grey -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blur", [0.0, 1.5])
def test_a_tile_is_shrunk_and_enlarged_as_pillow_does(blur):
    image = smooth(3)
    blurred = image.filter(ImageFilter.GaussianBlur(blur))
    expected = np.asarray(blurred.reduce(4).resize(image.size, Image.Resampling.BICUBIC), dtype=int)
    assert (
        np.abs(made(Tile(min_factor=4, max_factor=4, blur=blur), image) - expected).max() <= 4
    )  # of 255: each step rounds


def test_tiles_lose_as_much_as_their_factors_allow_and_others_each_time():
    image, tile = smooth(4), Tile(min_factor=1, max_factor=16)
    lost = [np.abs(made(tile, image, seed) - np.asarray(image, dtype=int)).mean() for seed in range(20)]
    most = np.abs(made(Tile(min_factor=16, max_factor=16), image) - np.asarray(image, dtype=int)).mean()
    assert min(lost) < 0.1 * most < 0.8 * most < max(lost) <= most * 1.1 and len(set(lost)) > 10


def test_grey_is_luma_in_all_channels():
    assert made(Grey(), Image.new("RGB", (2, 2), (200, 100, 50)))[0, 0].tolist() == [124] * 3  # 59.8 + 58.7 + 5.7


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: Canny(low=300), "low=300 is above high=200.0; exchange them"),
        (lambda: Canny(spread=0.5), "spread is 0.5; expected a number of at least 1"),
        (lambda: Tile(min_factor=9), "min_factor=9 is above max_factor=8.0; exchange them"),
        (lambda: LineArt(sigma=0), "sigma is 0; expected a number above 0"),
    ],
)
def test_options_without_a_meaning_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


# Mirrored and cropped images ------------------------------------------------------------------------------------------


def reach(edges: np.ndarray) -> np.ndarray:
    """Edges, and the pixels beside them."""
    return np.asarray(Image.fromarray(edges).filter(ImageFilter.MaxFilter(3)))


@given(SEEDS, st.tuples(st.integers(0, 32), st.integers(0, 32)))
@settings(max_examples=20)
def test_edges_of_a_crop_are_the_crop_of_the_edges(seed, start):
    image, condition = smooth(seed), Canny(low=150, high=150)  # with two thresholds, a link may lie outside of the crop
    box = (*start, start[0] + 48, start[1] + 48)
    cropped, whole = made(condition, image.crop(box)), made(condition, image)[start[1] :, start[0] :]
    assert np.array_equal(cropped[2:-2, 2:-2], whole[2:46, 2:46])


@given(SEEDS)
@settings(max_examples=20)
def test_edges_of_a_mirrored_image_are_the_mirrored_edges_within_a_pixel(seed):
    """But for one in 30: of two equal pixels the second is the edge, in OpenCV as well."""
    image = smooth(seed)
    mirrored, edges = made(Canny(), ImageOps.mirror(image)), made(Canny(), image)[:, ::-1].copy()
    for found, other in ((mirrored, edges), (edges, mirrored)):
        assert (found > reach(other)).sum() < (found > 0).sum() / 30


@pytest.mark.parametrize("condition", [Grey(), LineArt(), Tile()], ids=lambda condition: type(condition).__name__)
def test_what_is_made_of_a_mirrored_image_is_mirrored(condition):
    image = smooth(5)
    mirrored = made(condition, ImageOps.mirror(image)).astype(int)
    assert np.abs(mirrored - made(condition, image)[:, ::-1]).max() <= 1
