"""Prompts that are longer than a text encoder reads: what sampling says of them."""

import logging

import pytest
import tiny
from families import FAMILIES
from miniatures import flux1, sd3
from miniatures.requests import REQUEST

from diffsynth.diffusion.prompts.limits import warn_of_long_prompts

BY_NAME = {str(family): family for family in FAMILIES}


def warnings(name: str, caplog, *prompts: str, **options) -> list[str]:
    pipe = BY_NAME[name].build()
    caplog.clear()
    warn_of_long_prompts(pipe, [pipe.complete(REQUEST | options | {"prompt": prompt}) for prompt in prompts])
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_each_long_prompt_is_named_once_with_counts_and_with_what_is_cut_off(caplog):
    long = "red " * sd3.T5_TOKENS + "end"
    (message,) = warnings("sd3_5_medium", caplog, "red", long, long)
    assert f"for tokenizer_3, and its text encoder reads {sd3.T5_TOKENS}: " in message and "end' is not read" in message
    assert "Set model.max_sequence_length higher" in message and len(message) < 300
    assert warnings("sd3_5_medium", caplog, long, max_sequence_length=2 * sd3.T5_TOKENS) == []
    assert len(warnings("sd3_5_medium", caplog, "red", negative_prompt=long, cfg_scale=3.0)) == 1
    assert warnings("sd3_5_medium", caplog, "red", negative_prompt=long, cfg_scale=1.0) == []


LONG = {
    "sd3_5_medium": ["tokenizer_3", "tokenizer", "tokenizer_2"],
    "flux1_dev": ["tokenizer_2", "tokenizer"],
    "anima": ["tokenizer", "t5_tokenizer"],
    **{name: ["tokenizer"] for name in ("emoji_flux2", "z_image", "krea2", "flux3_klein_base", "emoji")},
}


@pytest.mark.parametrize("name", tiny.mostly_slow(LONG, "flux1_dev", "emoji_flux2"))
def test_every_text_encoder_that_cuts_a_prompt_off_is_named(name, caplog):
    prompt = "a red apple, " * 9000 if name == "flux3_klein_base" else "a red apple, " * 1200
    options = {"max_sequence_length": 128} if name == "z_image" else {}  # the miniature has positions for little more
    found = warnings(name, caplog, prompt, **options)
    assert [message.split(" for ")[1].split(",")[0] for message in found] == LONG[name]
    assert name != "flux1_dev" or f"reads {flux1.MAX_TOKENS}: " in found[0]
