"""Frozen encoders see a sample once, and nothing else changes."""

import inspect

import pytest
import torch

from diffsynth.diffusion.adapters.lora import LoRA
from diffsynth.diffusion.loss import FlowMatchSFT
from diffsynth.diffusion.pipeline.image_units import InputImageEmbedder
from diffsynth.diffusion.pipeline.remembered import to_device
from diffsynth.diffusion.pipeline.units import PipelineUnit, split_units
from diffsynth.pipelines.prompts.qwen_image import QwenImageUnit_PromptEmbedder

ADAPTER = LoRA(rank=2, target_modules=["to_q"])
TEXT_TOO = FlowMatchSFT(trainable_models=["dit", "text_encoder"])


@pytest.fixture
def calls(monkeypatch):
    """Names of the units, once for each sample that they see."""
    seen = []

    def encode_image(self, *args, original=InputImageEmbedder.process, **kwargs):
        seen.append("InputImageEmbedder")
        return original(self, *args, **kwargs)

    def encode_prompts(self, pipe, batch, original=QwenImageUnit_PromptEmbedder.process_batch):
        seen.extend(["QwenImageUnit_PromptEmbedder"] * len(batch))
        return original(self, pipe, batch)

    encode_image.__signature__ = inspect.signature(InputImageEmbedder.process)
    monkeypatch.setattr(InputImageEmbedder, "process", encode_image)
    monkeypatch.setattr(QwenImageUnit_PromptEmbedder, "process_batch", encode_prompts)
    return seen


def test_tensors_go_to_the_device_out_of_lists_as_well():
    moved = to_device(
        {"edit_latents": [torch.zeros(1)], "prompt_emb": torch.zeros(2), "height": 32}, torch.device("meta")
    )
    assert moved["edit_latents"][0].is_meta and moved["prompt_emb"].is_meta and moved["height"] == 32


@pytest.mark.parametrize("task, lora", [(None, ADAPTER), (TEXT_TOO, None)])
def test_a_remembered_loss_is_the_same_to_the_bit(training_module, samples, task, lora):
    plain, remembering = training_module(task, lora), training_module(task, lora, remember=1.0)
    first, second = remembering(samples), remembering(samples)
    assert torch.equal(first, plain(samples))
    assert torch.equal(second, first)


def test_frozen_encoders_run_once_a_sample(training_module, samples, calls):
    module = training_module(lora=ADAPTER, remember=1.0)
    module(samples)
    once = len(calls)
    module(samples)
    assert (once, len(calls)) == (6, 6)


def test_a_trained_encoder_runs_every_time(training_module, samples, calls):
    module = training_module(TEXT_TOO, remember=1.0)
    module(samples)
    module(samples)
    assert calls.count("QwenImageUnit_PromptEmbedder") == 6
    assert calls.count("InputImageEmbedder") == 3


def test_a_spent_budget_keeps_no_more(training_module, samples):
    module = training_module(lora=ADAPTER, remember=0.0)
    module(samples)
    assert not module.remembered.kept


def test_only_what_is_read_later_is_kept(training_module, samples):
    module = training_module(lora=ADAPTER, remember=1.0)
    module(samples)
    shared, posi, nega = next(iter(module.remembered.kept.values()))
    assert set(posi) == {"prompt_emb", "prompt_emb_mask"} and not nega.keys() - posi.keys()
    assert "input_latents" in shared and "input_image" not in shared


class Reads(PipelineUnit):
    def __init__(self, reads, writes, models=()):
        self.reads = reads
        super().__init__(output_params=writes, onload_model_names=models)
        self.input_params = tuple(reads)

    def process(self, pipe):
        return {}


def test_what_depends_on_a_trained_unit_is_not_frozen():
    first, trained = Reads(["a"], ["b"]), Reads(["b"], ["c"], ["dit"])
    after, beside, overwriting = Reads(["c"], ["d"]), Reads(["a"], ["e"]), Reads(["a"], ["b"])
    frozen, live = split_units([first, trained, after, beside, overwriting], {"dit"})
    assert frozen == [first, beside]
    assert live == [trained, after, overwriting]
