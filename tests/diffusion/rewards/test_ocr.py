"""Text in pictures: the score of what was read, and what is wanted; the reader itself where it is installed."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont

from diffsynth.diffusion.rewards import Ocr, ocr
from diffsynth.diffusion.rewards.ocr import levenshtein, text_score

CPU = torch.device("cpu")
TEXTS = st.text("ab c", max_size=8)


@pytest.mark.parametrize(
    "read, wanted, score",
    [
        ("Helo World", "Hello World", 0.9),
        ("xxHELLO WORLDyy", "Hello World", 1),
        ("", "Hello World", 0),
        ("abcdefghijkl", "Hello", 0),
        ("Hallo", "Hello", 0.8),
        ("hel\nlo", "h e l l o", 1),
        ("", "", 1),
        ("a", " ", 0),
    ],
)
def test_known_scores_of_what_was_read(read, wanted, score):
    assert text_score(read, wanted) == pytest.approx(score)


@given(TEXTS, TEXTS, TEXTS)
def test_the_edit_distance_is_a_metric(one, other, third):
    assert (levenshtein(one, other) == 0) == (one == other)
    assert levenshtein(one, other) == levenshtein(other, one)
    assert levenshtein(one, third) <= levenshtein(one, other) + levenshtein(other, third)


@given(TEXTS, TEXTS)
def test_an_edit_distance_lies_between_the_difference_of_lengths_and_the_longer_length(one, other):
    assert abs(len(one) - len(other)) <= levenshtein(one, other) <= max(len(one), len(other))


@given(TEXTS, TEXTS)
def test_a_score_lies_between_0_and_1(read, wanted):
    assert 0 <= text_score(read, wanted) <= 1 == text_score(wanted, wanted)


@pytest.mark.parametrize(
    "prompt, column, row, wanted",
    [
        ('a sign that says "Open 24 h", and "no"', None, {}, "Open 24 h"),
        ("a sign", None, {}, None),
        ('one " alone', None, {}, None),
        ('a sign that says "Open"', "text", {"text": "Closed"}, "Closed"),
        ('a sign that says "Open"', "text", {"text": 24}, "24"),
        ('a sign that says "Open"', "text", {}, None),
    ],
)
def test_the_wanted_text_stands_in_quotes_or_in_a_column(prompt, column, row, wanted):
    assert Ocr(column).wanted(prompt, row) == wanted


def test_a_picture_without_a_wanted_text_cannot_be_scored(monkeypatch):
    monkeypatch.setattr(Ocr, "read", lambda self, picture: "Open")
    picture = Image.new("RGB", (8, 8))
    first, second = Ocr().score([picture] * 2, ['"open"', "open"], [{}] * 2, CPU).tolist()
    assert first == 1 and math.isnan(second)


def test_a_column_that_the_table_lacks_is_named():
    Ocr("text").check_rows({"prompt": "a", "text": "b"})
    with pytest.raises(ValueError, match="no column 'text', which reward.ocr.column names; it has prompt, image"):
        Ocr("text").check_rows({"prompt": "a", "image": "b"})


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(ocr, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'rapidocr is not installed; pip install "diffsynth-hydra\[ocr\]"'):
        Ocr().find()


def test_the_reader_reads_what_was_written():
    pytest.importorskip("rapidocr")
    reward = Ocr()
    reward.find()
    written, empty = (Image.new("RGB", (512, 256), "white") for _ in range(2))
    drawing, font = ImageDraw.Draw(written), ImageFont.load_default(60)
    drawing.text((40, 20), "Hello", fill="black", font=font)
    drawing.text((240, 120), "World", fill="red", font=font)
    prompts = ['a sign "Hello World"', 'a sign "Hello"', 'a sign "Bicycle"', 'a sign "Hello"']
    scores = reward.score([written] * 3 + [empty], prompts, [{}] * 4, CPU).tolist()
    assert scores[:2] == [1, 1] and scores[2] < 0.5 and scores[3] == 0
    assert reward.version.startswith("Ocr rapidocr=")
