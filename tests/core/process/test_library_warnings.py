"""Warnings of libraries: the needless ones are dropped where a script calls them, and others of the same stay."""

import logging
import warnings

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.models.embeddings import FluxPosEmbed
from peft import LoraConfig, inject_adapter_in_model

from diffsynth.config import explained
from diffsynth.core.process.library_warnings import NEEDLESS


@pytest.fixture(autouse=True)
def restored():
    """The filters of loggers and of warnings as they were."""
    before = {name: list(logging.getLogger(name).filters) for name in NEEDLESS}
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        yield
    for name, filters in before.items():
        logging.getLogger(name).filters = filters


def texts_of(name: str, monkeypatch) -> list[str]:
    """What a logger writes from now on, in a list that grows."""
    texts, handler = [], logging.Handler()
    handler.emit = lambda record: texts.append(record.getMessage())
    monkeypatch.setattr(logging.getLogger(name), "handlers", [handler])
    return texts


@pytest.mark.parametrize(
    ("name", "needless"),
    [
        ("bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward from kernels-community: %s. Please"),
        ("transformers.utils.import_utils", "`CLIPImageProcessor` requires torchvision (not installed); %s"),
        ("DeepSpeed", "Setting accelerator to CPU. If you have GPU or other accelerator, %s"),
    ],
)
def test_a_needless_line_is_dropped_and_another_stays(name, needless, monkeypatch):
    texts = texts_of(name, monkeypatch)
    for _ in range(2):
        with explained():
            logging.getLogger(name).warning(needless, "reason")
            logging.getLogger(name).warning("memory is short")
    assert texts == ["memory is short"] * 2
    assert len(logging.getLogger(name).filters) == 1


def test_a_cast_is_warned_of_only_if_a_module_should_keep_its_precision(monkeypatch):
    texts = texts_of("diffusers.models.modeling_utils", monkeypatch)
    network = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2)
    with explained():
        for kept in ([], ["decoder"]):
            network._keep_in_fp32_modules = kept
            network.to(torch.bfloat16)
    assert [text.partition("float32: ")[2].partition(".")[0] for text in texts] == ["['decoder']"]


def test_a_second_adapter_and_a_class_that_diffusers_itself_uses_are_no_news_and_other_warnings_stay():
    network, config = torch.nn.Sequential(torch.nn.Linear(2, 2)), LoraConfig(target_modules=["0"])
    with explained(), warnings.catch_warnings(record=True) as caught:
        for name in ("a", "b"):
            network.peft_config = getattr(network, "peft_config", {})
            inject_adapter_in_model(config, network, name)
        FluxPosEmbed(theta=10000, axes_dim=[2])
        warnings.warn("another of peft", UserWarning, stacklevel=1)
    assert [str(each.message) for each in caught] == ["another of peft"]
