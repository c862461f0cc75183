"""Rewards without weights: their scores are those of the formulas, and gradients lead to better pictures."""

import csv
import logging
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from diffsynth.diffusion.rewards import Brightness, Colour, JpegSize, Reward, Symmetry, TextMatch, pixels_of

CPU = torch.device("cpu")
DIFFERENTIABLE = [Brightness(0.7), Colour("#ff8000"), Symmetry()]


@pytest.fixture(scope="module")
def noise() -> list[Image.Image]:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    return [Image.fromarray(each) for each in pixels]


def score(reward: Reward, *pictures: Image.Image, prompts=None) -> list[float]:
    found = reward.score(pictures, prompts or [""] * len(pictures), [{}] * len(pictures), CPU)
    assert found.shape == (len(pictures),) and found.dtype == torch.float32
    return found.tolist()


def plain(colour: str, size=(32, 32)) -> Image.Image:
    return Image.new("RGB", size, colour)


def test_the_size_of_a_jpeg_counts_in_thousand_bytes_and_a_plain_picture_scores_higher(noise):
    file = BytesIO()
    noise[0].save(file, "JPEG", quality=95)
    assert score(JpegSize(), noise[0]) == pytest.approx([-len(file.getvalue()) / 1000])
    assert score(JpegSize(), plain("red"))[0] > score(JpegSize(), noise[0])[0]
    assert score(JpegSize(quality=30), noise[0])[0] > score(JpegSize(), noise[0])[0]


def test_a_brightness_scores_minus_its_squared_difference():
    assert score(Brightness(0.7), plain("white"), plain("black")) == pytest.approx([-0.09, -0.49])
    assert score(Brightness(0.2), plain("#333333")) == pytest.approx([0], abs=1e-6)


def test_a_colour_scores_minus_its_squared_distance():
    assert score(Colour("red"), plain("red"), plain("blue"), plain("black")) == pytest.approx([0, -2, -1])
    assert Colour("#FF0000").version == Colour("red").version != Colour("blue").version


def test_a_picture_like_its_mirror_image_scores_best(noise):
    mirrored = Image.new("RGB", (64, 32))
    mirrored.paste(noise[0], (0, 0))
    mirrored.paste(ImageOps.mirror(noise[0]), (32, 0))
    half = plain("black")
    half.paste("white", (0, 0, 16, 32))
    assert score(Symmetry(), mirrored, half) == pytest.approx([0, -1])


@pytest.mark.parametrize("reward", DIFFERENTIABLE, ids=lambda reward: type(reward).__name__)
def test_steps_along_the_gradient_raise_the_score(reward, noise):
    pixels = torch.stack([pixels_of(picture) for picture in noise]).requires_grad_()
    scores = reward.score_pixels(pixels, [""] * 6, [{}] * 6)
    torch.testing.assert_close(scores.detach(), torch.tensor(score(reward, *noise)))
    scores.sum().backward()
    better = reward.score_pixels(pixels + pixels.grad, [""] * 6, [{}] * 6)
    assert pixels.grad.isfinite().all() and (better > scores).all()


@pytest.mark.parametrize("reward", DIFFERENTIABLE, ids=lambda reward: type(reward).__name__)
def test_pictures_may_differ_in_size(reward, noise):
    other = noise[1].resize((48, 16))
    assert score(reward, noise[0], other) == pytest.approx(score(reward, noise[0]) + score(reward, other))


def test_a_reward_measures_the_mean_of_its_scores_as_a_validation_does():
    assert Brightness(0.7).measure([plain("white"), plain("black")], ["", ""], None, CPU) == pytest.approx(-0.29)


@pytest.mark.parametrize(
    "wrong, said",
    [
        (lambda: JpegSize(quality=0), r"reward.quality is 0; expected a whole number in \[1, 100\]"),
        (lambda: Brightness(target=70), r"reward.target is 70; expected a number in \[0, 1\]"),
        (lambda: Colour("blurple"), "reward.colour is 'blurple'; expected a name such as red"),
        (lambda: Symmetry(weight=0), "reward.weight is 0; expected a number above 0, or a number below 0"),
        (lambda: Symmetry(weight=float("nan")), "reward.weight is nan; expected "),
    ],
)
def test_a_setting_out_of_range_is_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        wrong()


def test_a_reward_without_gradients_says_so():
    with pytest.raises(NotImplementedError, match="JpegSize is not differentiable"):
        JpegSize().score_pixels(torch.zeros(1, 3, 8, 8), [""], [{}])


# A picture and its prompt ---------------------------------------------------------------------------------------------


@pytest.fixture
def table(tmp_path, noise):
    """Rows of four prompts, the last two of which share a picture, and the first of which has two."""
    rows = [("a", 0), ("a", 1), ("b", 2), ("c", 3), ("d", 3)]
    for number, picture in enumerate(noise):
        picture.save(tmp_path / f"{number}.png")
    with (tmp_path / "table.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([("prompt", "image"), *((prompt, f"{number}.png") for prompt, number in rows)])
    return TextMatch(str(tmp_path / "table.csv"))


def test_a_picture_matches_if_no_other_prompts_target_is_nearer(table, noise):
    near = [Image.blend(picture, plain("grey"), 0.3) for picture in noise]
    found = score(table, *near[:4], near[3], prompts=["a", "a", "b", "c", "d"])
    assert found == [1, 1, 1, 1, 1]
    assert score(table, near[2], near[0], prompts=["a", "b"]) == [0, 0]


def test_pictures_of_any_size_are_compared_at_their_own(table, noise):
    assert score(table, noise[2].resize((64, 64)), noise[0], prompts=["b", "a"]) == [1, 1]


def test_a_prompt_that_the_table_lacks_cannot_be_scored_and_is_refused_beforehand(table, noise, caplog):
    first, second = score(table, noise[0], noise[0], prompts=["x", "a"])
    assert np.isnan(first) and second == 1
    with caplog.at_level(logging.WARNING):
        assert table.measure(noise[:2], ["x", "a"], None, CPU) == 1
    assert "TextMatch cannot score 1 of 2 images; its mean is that of the others." in caplog.text
    table.check_rows({"prompt": "a"})
    with pytest.raises(ValueError, match="table.csv has no picture for the prompt 'x'"):
        table.check_rows({"prompt": "x"})


def test_a_table_without_its_columns_is_refused(tmp_path):
    (tmp_path / "table.csv").write_text("prompt,picture\na,0.png\n")
    with pytest.raises(ValueError, match="table.csv has no column 'image'"):
        TextMatch(str(tmp_path / "table.csv")).find()


def test_the_version_of_a_table_changes_with_its_pictures(table, noise):
    again = TextMatch(table.table)
    assert again.version == table.version
    noise[5].save(f"{table.folder}/0.png")
    assert TextMatch(table.table).version != table.version


def test_embedded_emoji_match_their_own_prompts():
    reward = TextMatch("data/emoji/color.csv")
    rows = [reward.targets[number] for number in (0, 7, 100)]
    pictures = [Image.open(f"data/emoji/{row['image']}") for row in rows]
    assert score(reward, *pictures, prompts=[row["prompt"] for row in rows]) == [1, 1, 1]
    assert score(reward, *pictures, prompts=[rows[1]["prompt"]] * 3) == [0, 1, 0]
