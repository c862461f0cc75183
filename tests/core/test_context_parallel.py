"""Networks whose tokens lie on several devices predict, and learn, what they do whole."""

import json
from itertools import product

import context_ranks
import pytest
import tiny
import tiny_flux2
import torch
import warm
from bases import Base, load
from hypothesis import given
from hypothesis import strategies as st
from miniatures import flux1, wan, wan_image

from diffsynth.core.context_parallel import TokenSplit, check_splittable
from diffsynth.pipelines.networks.qwen_image import QwenImageAttnProcessor
from diffsynth.plan.first_device import FirstOf

CASES = ["alone", "padded", "checkpointed", "kv_cache", "further text"]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What two processes find, by family."""
    path = tmp_path_factory.mktemp("apart") / "result.json"
    folders = {"qwen": tiny.model(), "flux2": tiny_flux2.klein(), "flux1": flux1.dev(), "wan": wan.text_to_video()}
    folders["given frames"] = wan_image.text_and_image_to_video()
    assert warm.ranks(2, context_ranks.compare, folders, path) == [0, 0]
    return json.loads(path.read_text())


@pytest.mark.parametrize(
    "family, case",
    [*product(["qwen", "flux2", "flux1"], CASES), *product(["wan", "given frames"], CASES[:3])],
)
def test_predictions_and_gradients_are_those_of_a_whole_network(found, family, case):
    assert found["apart"][f"{family}, {case}"] < 1e-5


@pytest.mark.parametrize("family", ["qwen", "flux2", "flux1", "wan", "given frames"])
def test_what_a_device_holds_is_planned_without_the_others(found, family):
    real, planned = found["taken"][family]
    assert planned == pytest.approx(real, rel=0.05)  # gloo lets go of what it has sent a moment later


def test_attention_exchanges_its_heads_at_once_and_then_its_outputs(monkeypatch):
    sizes, exchange = [], FirstOf._exchange
    monkeypatch.setattr(
        FirstOf, "_exchange", lambda self, sent, *rest: sizes.append(len(sent)) or exchange(self, sent, *rest)
    )
    split, heads = TokenSplit(FirstOf(2), text=[2, 1], image=[3, 3]), torch.zeros(1, 5, 4, 8)
    QwenImageAttnProcessor("block_0").attend([heads, heads, heads], None, None, split)
    tokens, own_heads, width = 9, 2, 8
    assert sizes == [3 * heads.numel(), tokens * own_heads * width]


def test_attention_that_would_see_one_devices_tokens_alone_is_refused():
    network = load(Base, tiny.model()).dit
    check_splittable(network, 2)
    network.transformer_blocks[1].attn.set_processor(Base.stock["block"]())
    with pytest.raises(ValueError, match="QwenDoubleStreamAttnProcessor2_0 does not exchange split tokens"):
        check_splittable(network, 2)


@given(tokens=st.integers(0, 10_000), devices=st.integers(1, 64))
def test_every_token_is_on_one_device_and_devices_differ_by_one_token_at_most(tokens, devices):
    shares = FirstOf(devices).shares(tokens)
    assert len(shares) == devices and sum(shares) == tokens
    assert shares[0] == max(shares) and max(shares) - min(shares) <= 1
